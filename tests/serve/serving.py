"""What a test of the running server needs; its tests skip where something is not installed."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pluribus.serve.run import background

__all__ = ["answering", "background", "httpx", "openai"]

for package in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(package, reason=f"{package} is of the extra serve")
httpx = pytest.importorskip("httpx", reason="httpx is of the extra serve")
openai = pytest.importorskip("openai", reason="openai, the test client, is not installed")


@contextmanager
def answering(status, body, headers=()):
    """A server that always says the same."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            length = int(self.headers["Content-Length"])
            seen.append((self.path, json.loads(self.rfile.read(length)), dict(self.headers)))
            self.send_response(status)
            own = {"Content-Length": str(len(body)), **dict(headers)}
            for name, value in own.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1", seen
        finally:
            server.shutdown()
            thread.join()
