"""Errors as OpenAI's clients expect them: a status, and a JSON object with message, type, code."""

from typing import Any


class ApiError(Exception):
    """What a client is told. `retry_after` in seconds where trying again makes sense."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.param, self.code, self.retry_after = param, code, retry_after

    @property
    def headers(self) -> dict[str, str]:
        """Headers that go with it."""
        found = {}
        if self.retry_after is not None:
            found["Retry-After"] = str(self.retry_after)
        if self.status == 401:
            found["WWW-Authenticate"] = "Bearer"
        if self.status in (408, 413):  # of a request whose rest nobody reads
            found["Connection"] = "close"
        return found

    def body(self) -> dict[str, Any]:
        """Return the JSON object."""
        kinds = {
            401: "authentication_error",
            404: "not_found_error",
            429: "rate_limit_error",
        }
        kind = kinds.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


def wrong(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return the error for a request that cannot be done as it is."""
    return ApiError(400, message, param=param, code=code)


def told(error: BaseException) -> Exception:
    """Return an error that can be passed on; one that ended a model's thread as ApiError 500."""
    if isinstance(error, Exception):
        return error
    return ApiError(500, f"the model failed: {type(error).__name__}")


def stopping(model: str) -> ApiError:
    """Return the error for a model that takes no more requests."""
    return ApiError(503, f"the model {model!r} has stopped; ask again later", retry_after=5)
