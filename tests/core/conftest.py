"""A web server on loopback that makes trouble on request."""

import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class Server:
    """Files by path, on loopback, and the trouble to make: a list of faults, one a request."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.faults: list[str] = []
        self.log: list[tuple[str, dict]] = []
        self.version = "one"
        self.moved: dict[str, str] = {}
        self.headers: dict[str, str] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # head and body in one packet

            def do_GET(self):
                outer.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # callers that hang up are part of the test
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, call):
        path = call.path.partition("?")[0]
        self.log.append((call.path, dict(call.headers)))
        fault = self.faults.pop(0) if self.faults else ""
        if fault.isdecimal():
            call.send_response(int(fault))
            if fault == "429":
                call.send_header("Retry-After", "0")
            call.send_header("Content-Length", "0")
            call.end_headers()
            return
        if fault == "hang up":
            call.close_connection = True
            call.connection.close()
            return
        if path in self.moved:
            call.send_response(302)
            call.send_header("Location", self.moved[path])
            call.send_header("Content-Length", "0")
            call.end_headers()
            return
        data = self.files.get(path)
        if data is None:
            call.send_response(404)
            call.send_header("Content-Length", "0")
            call.end_headers()
            return
        etag = f'"{self.version}-{zlib.crc32(data):08x}"'
        if call.headers.get("If-None-Match") == etag:
            call.send_response(304)
            call.end_headers()
            return
        asked, whole = call.headers.get("Range"), data
        if asked and fault != "no ranges":
            first, _, last = asked.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(int(last) + 1, len(whole))
            data = whole[begin:end]
            call.send_response(206)
            shown = begin + 1 if fault == "wrong range" else begin
            call.send_header("Content-Range", f"bytes {shown}-{end - 1}/{len(whole)}")
        else:
            call.send_response(200)
        call.send_header("Content-Length", str(len(data)))
        call.send_header("ETag", etag)
        for key, value in self.headers.items():
            call.send_header(key, value)
        call.end_headers()
        half = fault == "half"
        if call.command != "HEAD":
            call.wfile.write(data[: len(data) // 2] if half else data)
        if half:
            call.close_connection = True


@pytest.fixture
def servers():
    """Return a function that starts another server; all stop when the test ends."""
    made = []

    def start():
        made.append(Server())
        return made[-1]

    yield start
    for server in made:
        server.server.shutdown()
        server.server.server_close()


@pytest.fixture
def server(servers):
    return servers()
