"""A server of OpenAI's protocol for models that are merged, routed, fused or somebody else's.

    server = pluribus.serve.of("server.yml")
    pluribus.serve.serve(server, port=8000)

Requests to one model share its passes: answers join and leave a running batch between tokens. Needs
the extra `serve`. Names are imported when they are first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pluribus.serve.config import Limits, Server, of, read
    from pluribus.serve.run import background, serve
    from pluribus.serve.served import Served, open_all

_WHERE = {
    "Limits": "config",
    "Served": "served",
    "Server": "config",
    "background": "run",
    "of": "config",
    "open_all": "served",
    "read": "config",
    "serve": "run",
}

__all__ = ["Limits", "Served", "Server", "background", "of", "open_all", "read", "serve"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _WHERE:
        raise AttributeError(f"module 'pluribus.serve' has no attribute {name!r}")
    return getattr(import_module(f"pluribus.serve.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
