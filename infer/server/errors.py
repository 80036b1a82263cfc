"""Errors as HTTP statuses and OpenAI's JSON objects."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Any

from phi4rv.errors import ContextLengthError, UserError

_ERROR_TYPES = {401: "authentication_error", 404: "not_found_error", 408: "timeout_error", 429: "rate_limit_error"}
_ERROR_TYPES |= {500: "server_error", 503: "server_error", 504: "timeout_error"}


class ApiError(Exception):
    """A response other than 200: its status, a message, and the request's field and an error code if there is one."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The JSON object of OpenAI's errors."""
        kind = _ERROR_TYPES.get(self.status, "invalid_request_error")
        code = self.code or HTTPStatus(self.status).phrase.lower().replace(" ", "_")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": code}}


def from_user_error(error: UserError) -> ApiError:
    """400. ``--top-p: …``, as a command line would name it, becomes ``top_p: …``."""
    message = str(error)
    if isinstance(error, ContextLengthError):
        return ApiError(400, message, "messages", "context_length_exceeded")
    found = re.match(r"--([a-z-]+): ", message)
    if found is None:
        return ApiError(400, message)
    param = found[1].replace("-", "_")
    return ApiError(400, f"{param}: {message[found.end() :]}", param)
