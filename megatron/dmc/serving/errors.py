"""Errors of requests: OpenAI's error object, and the HTTP status that goes with it."""

import reprlib
from collections.abc import Mapping
from typing import Any, Optional

from megatron.dmc.inference.errors import InvalidRequest


class APIError(Exception):
    """A request that ends without a completion."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: Optional[str] = None,
        code: Optional[str] = None,
        headers: Optional[Mapping[str, str]] = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.type, self.param, self.code = status, message, type, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """``{"error": {"message", "type", "param", "code"}}``"""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class _Shown(reprlib.Repr):
    def repr_NoneType(self, value: None, level: int) -> str:
        return "null"

    def repr_bool(self, value: bool, level: int) -> str:
        return str(value).lower()


shown = _Shown().repr
"""A value of JSON for a message, however large: its beginning and its end, with JSON's words."""


def invalid(message: str, param: Optional[str] = None, code: Optional[str] = None) -> APIError:
    """400: the request is wrong, and will be wrong the next time."""
    return APIError(400, message, param=param, code=code)


def of_invalid_request(error: InvalidRequest) -> APIError:
    """400 from a request that the engine cannot take."""
    return invalid(str(error), error.param, error.code)


def wrong_key() -> APIError:
    headers = {"WWW-Authenticate": "Bearer", "Connection": "close"}
    return APIError(
        401, "the API key is missing or wrong; send Authorization: Bearer KEY", code="invalid_api_key", headers=headers
    )


def overloaded(message: str, retry_after: int = 1, close: bool = False) -> APIError:
    """503: the same request may succeed later. ``close``: the connection cannot be used again."""
    headers = {"Retry-After": str(retry_after)} | ({"Connection": "close"} if close else {})
    return APIError(503, message, type="service_unavailable", code="overloaded", headers=headers)


def too_many_connections(most: int) -> APIError:
    """503 on a connection above the limit."""
    headers = {"Retry-After": "1", "Connection": "close"}
    message = f"{most} connections are open, and no more may be; try again later"
    return APIError(503, message, type="service_unavailable", code="too_many_connections", headers=headers)


def too_slow(what: str, seconds: float) -> APIError:
    """408: a part of the request has not come in time."""
    message = f"the {what} of the request did not come within {seconds:g} s"
    return APIError(408, message, code="request_timeout", headers={"Connection": "close"})


def shutting_down() -> APIError:
    headers = {"Retry-After": "1", "Connection": "close"}
    return APIError(
        503, "the server is shutting down", type="service_unavailable", code="shutting_down", headers=headers
    )


def engine_failed() -> APIError:
    """500 of a request that the engine took down with it. The cause is in the server's log, not in the response."""
    return APIError(
        500, "the engine has failed; the cause is in the server's log", type="server_error", code="engine_failed"
    )


def engine_down() -> APIError:
    """503 of a request that came after the engine failed."""
    return APIError(
        503, "the engine has failed; start the server again", type="service_unavailable", code="engine_failed"
    )


def not_answered(reason: str) -> APIError:
    """500 of a request that the engine gave up: no room in the cache for it alone, or logits with NaN or Inf."""
    return APIError(500, reason, type="server_error", code="not_answered")
