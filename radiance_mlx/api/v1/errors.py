"""Errors as OpenAI's clients know them: `{"error": {"message", "type", "param", "code"}}`, with OpenAI's statuses.

Clients choose the class that they raise by the status, so it differs from the service's own in places: what cannot be
used is 400 here, and a full waiting line 429.
"""

from typing import Any

from ...errors import InvalidRequest, NotFound, RadianceError

PREFIX = "/v1/"
#: by the error's code; others keep their own status
STATUS = {"invalid_request": 400, "prompt_too_long": 400, "idempotency_mismatch": 409, "busy": 429, "cancelled": 409}
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    422: "unprocessable_error",
    429: "rate_limit_error",
}
#: what OpenAI calls the same
CODES = {"prompt_too_long": "context_length_exceeded", "busy": "rate_limit_exceeded"}
#: the parameter that an error without one of its own is about, by its code and the route
PARAMS = {
    ("prompt_too_long", "/v1/chat/completions"): "messages",
    ("prompt_too_long", "/v1/completions"): "prompt",
}


class BadParameter(InvalidRequest):
    """One parameter that cannot be used, by name; `code` says in which way."""

    status = 400

    def __init__(self, param: str | None, message: str, hint: str = "", code: str = "invalid_value") -> None:
        super().__init__(message, hint)
        self.param, self.code = param, code

    @classmethod
    def unsupported(cls, param: str, why: str, hint: str = "") -> "BadParameter":
        """What OpenAI has, and this service has not."""
        return cls(param, f"'{param}' is not supported here: {why}", hint or "Leave it out.", "unsupported_parameter")


class ModelNotFound(NotFound):
    """No model has this id."""

    code, param = "model_not_found", "model"


class NotAsAsked(RadianceError):
    """The model answered, and the answer is not of the form that was asked for."""

    code, status, param = "response_format_not_met", 422, "response_format"


def status_of(error: RadianceError) -> int:
    """The status that makes OpenAI's clients raise the right class."""
    return STATUS.get(error.code, error.status)


def error_body(error: RadianceError, path: str = "") -> dict[str, Any]:
    """The whole document, for the route `path`. The hint is part of the message: clients show nothing else."""
    status = status_of(error)
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    message = f"{error.message} {error.hint}".strip()
    param = getattr(error, "param", PARAMS.get((error.code, path)))
    return {"error": {"message": message, "type": kind, "param": param, "code": CODES.get(error.code, error.code)}}
