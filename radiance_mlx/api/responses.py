"""JSON answers, and records as the bodies of `schemas`."""

from collections.abc import Mapping
from typing import Any

from ..errors import RadianceError
from ..messages import FINAL_STATES, Answer, iso
from ..store import CheckpointRecord, JobRecord
from .v1.errors import PREFIX, error_body, status_of
from .writing import JSONResponse


def error_response(error: RadianceError, path: str) -> JSONResponse:
    """`{"error": …}` with the error's own status; under `/v1` as OpenAI's clients know errors."""
    openai = path.startswith(PREFIX)
    status = status_of(error) if openai else error.status
    headers = {"retry-after": "1"} if status in (429, 503) else {}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if openai and status == 409:
        headers["x-should-retry"] = "false"  # OpenAI's clients would ask again
    return JSONResponse(error_body(error, path) if openai else {"error": error.as_dict()}, status, headers)


def answer_body(answer: Answer, latency_s: float) -> dict[str, Any]:
    """`schemas.SearchAnswer`."""
    body: dict[str, Any] = {
        "response": answer.text,
        "checkpoint": answer.checkpoint,
        "checkpoint_status": answer.checkpoint_status,
        "latency_ms": round(latency_s * 1000),
        "finish_reason": answer.finish_reason,
        "usage": {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
            "cached_tokens": answer.cached_tokens,
        },
    }
    return {**body, "reasoning": answer.reasoning} if answer.reasoning else body


def job_body(job: JobRecord, progress: dict[str, Any] | None) -> dict[str, Any]:
    """`schemas.Job`. A job that ended without a checkpoint names none, though one was reserved for it."""
    gave_up = job.state in ("failed", "cancelled", "quarantined")
    stopping = job.cancel_requested and job.state not in FINAL_STATES
    return {
        "job_id": job.job_id,
        "kind": job.kind,
        "state": job.state,
        "created": iso(job.created),
        "updated": iso(job.updated),
        "tags": list(job.tags),
        "example_count": job.example_count,
        "attempts": job.attempts,
        "checkpoint": None if gave_up else job.checkpoint,
        "progress": progress,
        "error": job.error and {"details": None, "hint": "", **job.error},
        "notes": [*job.notes, *(["to be cancelled: its training is being stopped"] if stopping else [])],
    }


def event_body(event: Mapping[str, Any]) -> dict[str, Any]:
    """`schemas.Event`."""
    data = event["data"]
    told = data.get("reason") or data.get("why") or (data.get("verdict") or {}).get("reason")
    reason = told or (data.get("error") or {}).get("message") or ""
    return {"id": event["id"], "at": iso(event["at"]), "kind": event["kind"], "reason": reason, "data": data}


def checkpoint_body(record: CheckpointRecord, current: str) -> dict[str, Any]:
    """`schemas.Checkpoint`."""
    return {
        "checkpoint": record.checkpoint,
        "parent": record.parent,
        "status": record.status,
        "current": record.checkpoint == current,
        "created": iso(record.created),
        "jobs": list(record.jobs),
        "data_hash": record.data_hash,
        "metrics": record.metrics,
        "config": record.config,
        "files": record.files,
        "notes": list(record.notes),
        "damaged": record.damaged,
        "pruned": record.pruned,
        "reconsolidated": record.reconsolidated,
    }
