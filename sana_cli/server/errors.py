"""Errors in the shape of OpenAI's API, with what the command line would have said beside it.

{"error": {"message", "type", "param", "code", "sana": {"message", "hint", "exit_code"}}}
"""

import re
from collections.abc import Mapping
from typing import Any

from sana_cli.errors import MissingModel, NotEnoughMemory, SanaError, UsageError

OPTION = re.compile(r"--([a-z][a-z_-]*)")
INVALID = "invalid_request_error"


class ApiError(Exception):
    """An answer other than the one that was asked for."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,  # seconds
        cause: SanaError | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after, self.cause = retry_after, cause

    def document(self) -> dict[str, Any]:
        kind = INVALID if self.status < 500 and self.status != 429 else "server_error"
        error: dict[str, Any] = {
            "message": self.message,
            "type": "rate_limit_error" if self.status == 429 else kind,
            "param": self.param,
            "code": self.code,
        }
        if self.cause is not None:
            error["sana"] = {
                "message": self.cause.message,
                "hint": self.cause.hint,
                "exit_code": self.cause.exit_code,
            }
        return {"error": error}

    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def of(error: SanaError, names: Mapping[str, str] | None = None) -> ApiError:
    """The error of a request, with its options as fields, by the `names` that the request used."""

    def field(found: re.Match[str]) -> str:
        option = found[1].replace("-", "_")
        return (names or {}).get(option, option)

    message = error.message + (f" ({error.hint})" if error.hint else "")
    named = OPTION.search(error.message)
    param, code = (field(named) if named else None), None
    status = 400 if isinstance(error, UsageError) else 500
    if isinstance(error, MissingModel):
        status, param, code = 404, "model", "model_not_found"
    elif isinstance(error, NotEnoughMemory):  # as the plan says beforehand
        status, code = 400, "not_enough_memory"
    return ApiError(status, OPTION.sub(field, message), param=param, code=code, cause=error)
