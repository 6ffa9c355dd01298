"""Every error that a user may see: a code for programs, a message and a hint for people, an HTTP status.

Raise the most specific class. `details` is plain JSON data. Anything that is not a `RadianceError` is a
bug, and is answered as `internal_error` without its text.
"""

from collections.abc import Callable
from typing import Any, Self


class RadianceError(Exception):
    """Base of all errors; subclasses set `code` and `status`. `job_id` is the job that one is about (`about_job`)."""

    code = "error"
    status = 500
    job_id = ""
    _said: Callable[[str], str] | None = None

    def __init__(self, message: str, hint: str = "", details: Any = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = details

    @classmethod
    def about_job(cls, job_id: str, said: Callable[[str], str], hint: str = "", details: Any = None) -> Self:
        """An error whose message is what is `said` of a job: by its id, or as somebody knows it (`called`)."""
        error = cls(said(job_id), hint, details)
        error.job_id, error._said = job_id, said
        return error

    def called(self, name: str) -> Self:
        """The same about the job as `name`, for somebody who does not know its id."""
        return self if self._said is None else type(self)(self._said(name), self.hint, self.details)

    def as_dict(self) -> dict[str, Any]:
        """The body of `{"error": …}` in HTTP answers and `--json` output."""
        return {"code": self.code, "message": self.message, "hint": self.hint, "details": self.details}

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class ConfigError(RadianceError):
    """The configuration cannot be used; `details` lists every fault with the path of its key."""

    code, status = "bad_config", 400


class InvalidRequest(RadianceError):
    """The body or a parameter is not what the route takes."""

    code, status = "invalid_request", 422


class MalformedBody(RadianceError):
    """The body is not JSON in UTF-8."""

    code, status = "malformed_body", 400


class PayloadTooLarge(RadianceError):
    code, status = "payload_too_large", 413


class UnsupportedMediaType(RadianceError):
    code, status = "unsupported_media_type", 415


class RankLost(RadianceError):
    """A machine that trains with this one does not answer any more."""

    code, status = "rank_lost", 503


class NotFound(RadianceError):
    code, status = "not_found", 404


class MethodNotAllowed(RadianceError):
    code, status = "method_not_allowed", 405


class Conflict(RadianceError):
    """The request is sound, but the state of what it names forbids it."""

    code, status = "conflict", 409


class IdempotencyMismatch(RadianceError):
    """The same Idempotency-Key came with another body."""

    code, status = "idempotency_mismatch", 422


class Forbidden(RadianceError):
    """A Host or Origin that is not on the list."""

    code, status = "forbidden", 403


class Unauthorized(RadianceError):
    code, status = "unauthorized", 401


class PromptTooLong(RadianceError):
    code, status = "prompt_too_long", 422


class Busy(RadianceError):
    """The waiting line is full."""

    code, status = "busy", 503


class NotReady(RadianceError):
    """The model is still loading, or the engine has stopped."""

    code, status = "not_ready", 503


class RequestTimeout(RadianceError):
    code, status = "request_timeout", 408


class CheckpointDamaged(RadianceError):
    """A checkpoint's files are missing or differ from their recorded hashes."""

    code, status = "checkpoint_damaged", 409


class ModelError(RadianceError):
    """The base model cannot be found, loaded or adapted."""

    code, status = "model_error", 500


class TrainingFailed(RadianceError):
    """A job cannot be trained; nothing is published."""

    code, status = "training_failed", 500


class NotEnoughMemory(TrainingFailed):
    code = "not_enough_memory"


class NonFinite(TrainingFailed):
    """The loss or the gradient became NaN or infinite."""

    code = "non_finite"


class Rejected(RadianceError):
    """The policy refused what was trained: it is kept, and not served."""

    code, status = "rejected", 409

    def __init__(self, message: str, hint: str = "", details: Any = None) -> None:
        super().__init__(
            message,
            hint
            or "Its parent goes on to answer. Roll back to the checkpoint by name to serve it all the same, or "
            "post the examples again, changed.",
            details,
        )


class AnchorsUnavailable(RadianceError):
    """The anchors cannot be had: no network, no such data set, split or column, a bad file."""

    code, status = "anchors_unavailable", 503


class DatasetUnavailable(RadianceError):
    """A data set to learn from cannot be had now: no network, or a hub that does not answer."""

    code, status = "dataset_unavailable", 503


class Cancelled(RadianceError):
    code, status = "cancelled", 409


class Paused(Cancelled):
    """Training was stopped for now, and its state kept."""


class StoreError(RadianceError):
    """The database or the home folder cannot be used."""

    code, status = "store_error", 500


class DiskFull(StoreError):
    """There is no room, or no quota left, for what was to be stored; nothing was changed."""

    code, status = "disk_full", 507


class HomeLocked(StoreError):
    """Another process works on this home."""

    code, status = "home_locked", 409


class InternalError(RadianceError):
    """A bug of ours: its text is for the log alone."""

    code, status = "internal_error", 500

    @classmethod
    def of(cls, error: BaseException) -> "InternalError":
        """What users are told of `error`."""
        return cls(f"Something unexpected went wrong ({type(error).__name__}).", "See the service's log.")


class ServiceUnreachable(RadianceError):
    """A command found no running service."""

    code, status = "service_unreachable", 503
