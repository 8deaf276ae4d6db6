"""What a test of the running server needs; its tests skip where something is not installed."""

import pytest

from pluribus.serve.run import background

__all__ = ["background", "httpx", "openai"]

for package in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(package, reason=f"{package} is of the extra serve")
httpx = pytest.importorskip("httpx", reason="httpx is of the extra serve")
openai = pytest.importorskip("openai", reason="openai, the test client, is not installed")
