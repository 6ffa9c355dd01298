"""Fine-tuning jobs, their events and checkpoints as OpenAI shapes them."""

import time
from typing import Any

from ...messages import FINAL_STATES
from ...service import Service
from ...store import CheckpointRecord, JobRecord, Tuned, TuningRecord
from .tuning_requests import hyperparameters_of

STATUS = {
    "review": "validating_files",
    "queued": "queued",
    "paused": "paused",
    "training": "running",
    "evaluating": "running",
    "published": "succeeded",
    "rejected": "failed",
    "failed": "failed",
    "quarantined": "failed",
    "cancelled": "cancelled",
}


def model_of(tuning: TuningRecord, job: JobRecord) -> str | None:
    """The model id that came of it."""
    if job.state != "published" or job.checkpoint is None:
        return None
    return f"{job.checkpoint}:{tuning.suffix}" if tuning.suffix else job.checkpoint


def tuning_body(service: Service, tuned: Tuned, record: CheckpointRecord | None) -> dict[str, Any]:
    """`schemas.TuningJob`; `record` is the checkpoint that was published of it."""
    tuning, job = tuned
    asked = tuning.request
    wanted = hyperparameters_of(asked)
    hyperparameters = {
        name: wanted.get(name, "auto") for name in ("n_epochs", "batch_size", "learning_rate_multiplier")
    }
    eta = (service.progress_of(job) or {}).get("eta_s") if STATUS[job.state] == "running" else None
    return {
        "id": tuning.tuning_id,
        "object": "fine_tuning.job",
        "created_at": int(tuning.created),
        "error": _error(job),
        "fine_tuned_model": model_of(tuning, job),
        "finished_at": int(job.updated) if job.state in FINAL_STATES else None,
        "estimated_finish": None if eta is None else int(time.time() + eta),
        "hyperparameters": hyperparameters,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "model": asked["model"],
        "organization_id": "local",
        "result_files": [],
        "seed": asked.get("seed", service.config.training.seed),
        "status": STATUS[job.state],
        "trained_tokens": record.metrics.get("trained_tokens") if record else None,
        "training_file": asked["training_file"],
        "validation_file": asked.get("validation_file"),
        "integrations": None,
        "metadata": asked.get("metadata"),
        "user_provided_suffix": tuning.suffix,
        "job_id": job.job_id,
    }


def _error(job: JobRecord) -> dict[str, Any] | None:
    if job.error is None or STATUS[job.state] != "failed":
        return None
    message = f"{job.error['message']} {job.error.get('hint') or ''}".strip()
    return {"code": job.error["code"], "message": message, "param": None}


# --- events --------------------------------------------------------------------------------------


class Events:
    """A job's, oldest first: from its making, by what the journal says as it goes on, to its end."""

    def __init__(self, tuning: TuningRecord) -> None:
        self._tuning = tuning
        self._begun = False
        self.seen = 0  # the last entry of the journal that was told

    @classmethod
    def all(cls, tuned: Tuned, journal: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Of one look at the whole journal."""
        tuning, job = tuned
        events = cls(tuning)
        return [events.created(), *events.more(journal), *events.end(job)]

    def created(self) -> dict[str, Any]:
        """The first."""
        tuning = self._tuning
        return _event(tuning, "created", tuning.created, f"Created fine-tuning job: {tuning.tuning_id}")

    def more(self, journal: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Of entries that follow those of the last time."""
        told: list[dict[str, Any]] = []
        for entry in journal:
            self.seen = entry["id"]
            number, at = str(entry["id"]), entry["at"]
            if entry["kind"] == "progress":
                if not self._begun:
                    told.append(_event(self._tuning, f"{number}-begun", at, "Fine-tuning job started"))
                self._begun = True
                told.append(_progress(self._tuning, number, at, entry["data"]))
            elif entry["kind"] in ("paused", "resumed", "restarted"):
                self._begun = False
                why = f": {entry['data']['why']}" if entry["kind"] == "restarted" else ""
                told.append(_event(self._tuning, number, at, f"Fine-tuning job {entry['kind']}{why}"))
        return told

    def end(self, job: JobRecord) -> list[dict[str, Any]]:
        """The last, if it has come to an end."""
        return _end(self._tuning, job) if job.state in FINAL_STATES else []


def _progress(tuning: TuningRecord, number: str, at: float, data: dict[str, Any]) -> dict[str, Any]:
    loss = "" if data["loss"] is None else f", training loss={data['loss']:.4f}"
    metrics = {"step": data["step"], "total_steps": data["max_steps"], "train_loss": data["loss"]}
    message = f"Step {data['step']}/{data['max_steps']}{loss}"
    return _event(tuning, number, at, message, kind="metrics", data=metrics)


def _end(tuning: TuningRecord, job: JobRecord) -> list[dict[str, Any]]:
    model = model_of(tuning, job)
    if model is not None:
        return [
            _event(tuning, "model", job.updated, f"New fine-tuned model created: {model}"),
            _event(tuning, "end", job.updated, "The job has successfully completed"),
        ]
    if job.state == "cancelled":
        return [_event(tuning, "end", job.updated, "Fine-tuning job cancelled", level="warn")]
    why = (job.error or {}).get("message", job.state)
    return [_event(tuning, "end", job.updated, f"Fine-tuning job failed: {why}", level="error")]


def _event(
    tuning: TuningRecord,
    name: str,
    at: float,
    message: str,
    *,
    level: str = "info",
    kind: str = "message",
    data: dict[str, Any] | None = None,
) -> dict[str, Any]:
    return {
        "id": f"ftevent-{tuning.tuning_id.removeprefix('ftjob-')}-{name}",
        "object": "fine_tuning.job.event",
        "created_at": int(at),
        "level": level,
        "message": message,
        "type": kind,
        "data": data or {},
    }


# --- checkpoints ---------------------------------------------------------------------------------


def checkpoint_bodies(tuning: TuningRecord, record: CheckpointRecord | None) -> list[dict[str, Any]]:
    """`schemas.TuningCheckpoint`: one, or none as long as nothing was published."""
    if record is None:
        return []
    metrics = record.metrics
    measured = {
        "step": metrics.get("steps"),
        "train_loss": metrics.get("last_step_loss"),
        "full_train_loss": metrics.get("finetune_loss"),
        "full_valid_loss": metrics.get("validation_loss"),
    }
    return [
        {
            "id": f"ftckpt-{record.checkpoint}",
            "object": "fine_tuning.job.checkpoint",
            "created_at": int(record.created),
            "fine_tuned_model_checkpoint": record.checkpoint,
            "fine_tuning_job_id": tuning.tuning_id,
            "step_number": metrics.get("steps") or 0,
            "metrics": {name: value for name, value in measured.items() if value is not None},
        }
    ]
