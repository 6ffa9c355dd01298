"""What the service answers, typed. `raw` is the body as it came: fields of newer versions are there too.

Times are ISO 8601 in UTC, losses nats per token.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import RadianceError
from ..messages import FINAL_STATES
from .wire import error_from

Json = dict[str, Any]


def _needed(body: Json, *names: str) -> None:
    if missing := [name for name in names if name not in body]:
        error = RadianceError(
            f"The answer has no {', '.join(missing)}.",
            "Another program, or another version, may answer at that address.",
        )
        error.code = "bad_answer"
        raise error


@dataclass(frozen=True)
class Usage:
    """Tokens of one answer; `cached_tokens` of the prompt were not computed again."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True)
class SearchResult:
    """A whole answer, and the checkpoint that gave it."""

    response: str
    checkpoint: str
    checkpoint_status: str
    finish_reason: str = "stop"
    reasoning: str = ""
    latency_ms: int = 0
    usage: Usage = Usage()
    raw: Json = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, body: Json) -> "SearchResult":
        _needed(body, "response", "checkpoint", "checkpoint_status")
        counts = body.get("usage") or {}
        return cls(
            response=body["response"],
            checkpoint=body["checkpoint"],
            checkpoint_status=body["checkpoint_status"],
            finish_reason=body.get("finish_reason", "stop"),
            reasoning=body.get("reasoning") or "",
            latency_ms=body.get("latency_ms", 0),
            usage=Usage(**{name: int(counts.get(name, 0)) for name in Usage.__dataclass_fields__}),
            raw=body,
        )

    def __str__(self) -> str:
        return self.response


@dataclass(frozen=True)
class Progress:
    """Where a job's training stands; `eta_s` is the estimated rest in seconds."""

    step: int
    max_steps: int
    loss: float | None = None
    tokens_per_s: float = 0.0
    eta_s: float | None = None
    phase: str = "training"


@dataclass(frozen=True)
class Job:
    """One accepted update (or a reconsolidation). `checkpoint` is the one it became, or is becoming."""

    job_id: str
    state: str
    kind: Literal["update", "reconsolidation"] = "update"
    created: str = ""
    updated: str = ""
    tags: tuple[str, ...] = ()
    example_count: int = 0
    attempts: int = 0
    checkpoint: str | None = None
    progress: Progress | None = None
    error: RadianceError | None = field(default=None, compare=False)
    notes: tuple[str, ...] = ()
    raw: Json = field(default_factory=dict, repr=False, compare=False)

    @property
    def ended(self) -> bool:
        return self.state in FINAL_STATES

    @property
    def published(self) -> bool:
        """Whether it was learnt, and answers."""
        return self.state == "published"

    def require_published(self) -> "Job":
        """The job itself, once published; else raises what kept it from that."""
        if not self.published:
            raise self.error or RadianceError(f"{self.job_id} is {self.state}.", "See its notes.", self.raw)
        return self

    @classmethod
    def of(cls, body: Json) -> "Job":
        _needed(body, "job_id", "state")
        progress, error = body.get("progress"), body.get("error")
        return cls(
            job_id=body["job_id"],
            state=body["state"],
            kind=body.get("kind", "update"),
            created=body.get("created", ""),
            updated=body.get("updated", ""),
            tags=tuple(body.get("tags") or ()),
            example_count=body.get("example_count", 0),
            attempts=body.get("attempts", 0),
            checkpoint=body.get("checkpoint"),
            progress=Progress(**{k: v for k, v in progress.items() if k in Progress.__dataclass_fields__})
            if progress
            else None,
            error=error_from(error, 500) if error else None,
            notes=tuple(body.get("notes") or ()),
            raw=body,
        )


@dataclass(frozen=True)
class UpdateResult:
    """An accepted update: durable from now on. `job` is there if it was waited for."""

    job_id: str
    queued: bool
    idempotency_key: str
    checkpoint: str = ""  # what answers now
    checkpoint_status: str = ""
    job: Job | None = None
    raw: Json = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, body: Json, key: str) -> "UpdateResult":
        _needed(body, "job_id")
        return cls(
            job_id=body["job_id"],
            queued=bool(body.get("queued", True)),
            idempotency_key=key,
            checkpoint=body.get("checkpoint", ""),
            checkpoint_status=body.get("checkpoint_status", ""),
            raw=body,
        )


@dataclass(frozen=True)
class Jobs:
    """One page, newest first; `next` is the `before` of the following one."""

    jobs: tuple[Job, ...]
    next: int | None = None
    raw: Json = field(default_factory=dict, repr=False, compare=False)

    def __iter__(self) -> Iterator[Job]:
        return iter(self.jobs)

    def __len__(self) -> int:
        return len(self.jobs)

    @classmethod
    def of(cls, body: Json) -> "Jobs":
        _needed(body, "jobs")
        return cls(tuple(Job.of(job) for job in body["jobs"]), body.get("next"), body)


@dataclass(frozen=True)
class Checkpoint:
    """One adapter of the lineage; `parent` None means the base."""

    checkpoint: str
    status: str
    parent: str | None = None
    current: bool = False
    created: str = ""
    jobs: tuple[str, ...] = ()
    data_hash: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    damaged: str | None = None
    pruned: bool = False
    raw: Json = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, body: Json) -> "Checkpoint":
        _needed(body, "checkpoint", "status")
        plain = ("checkpoint", "status", "parent", "current", "created", "data_hash", "metrics", "config", "damaged")
        return cls(
            **{name: body[name] for name in (*plain, "pruned") if name in body},
            jobs=tuple(body.get("jobs") or ()),
            notes=tuple(body.get("notes") or ()),
            raw=body,
        )


@dataclass(frozen=True)
class Checkpoints:
    """The lineage, oldest first, and the checkpoint that answers."""

    checkpoints: tuple[Checkpoint, ...]
    current: str
    raw: Json = field(default_factory=dict, repr=False, compare=False)

    def __iter__(self) -> Iterator[Checkpoint]:
        return iter(self.checkpoints)

    def __len__(self) -> int:
        return len(self.checkpoints)

    @classmethod
    def of(cls, body: Json) -> "Checkpoints":
        _needed(body, "checkpoints", "current")
        return cls(tuple(Checkpoint.of(one) for one in body["checkpoints"]), body["current"], body)


@dataclass(frozen=True)
class Event:
    """Something that happened to the lineage or to a job: `kind`, why (`reason`, perhaps ""), and its `data`."""

    id: int
    at: str
    kind: str
    reason: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    raw: Json = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, body: Json) -> "Event":
        _needed(body, "id", "at", "kind")
        plain = ("id", "at", "kind", "reason", "data")
        return cls(**{name: body[name] for name in plain if name in body}, raw=body)


@dataclass(frozen=True)
class Events:
    """One page, newest first; `next` is the `before` of the following one."""

    events: tuple[Event, ...]
    next: int | None = None
    raw: Json = field(default_factory=dict, repr=False, compare=False)

    def __iter__(self) -> Iterator[Event]:
        return iter(self.events)

    def __len__(self) -> int:
        return len(self.events)

    @classmethod
    def of(cls, body: Json) -> "Events":
        _needed(body, "events")
        return cls(tuple(Event.of(event) for event in body["events"]), body.get("next"), body)


@dataclass(frozen=True)
class LossCurves:
    """One number per published checkpoint, oldest first; `forgetting_loss` None: anchors are disabled."""

    finetune_loss: tuple[float | None, ...] = ()
    forgetting_loss: tuple[float | None, ...] | None = None
    eval_loss: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class Info:
    """How the service stands. `jobs` counts those in each state; `config` is what it runs with."""

    base_model: str
    current_checkpoint: str
    checkpoint_status: str = ""
    queue_depth: int = 0
    last_update: str | None = None
    loss_curves: LossCurves = LossCurves()
    forgetting_summary: Mapping[str, Any] | None = None
    hardware: Mapping[str, Any] = field(default_factory=dict)
    ready: bool = True
    version: str = ""
    update_mode: str = ""
    jobs: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    raw: Json = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, body: Json) -> "Info":
        _needed(body, "base_model", "current_checkpoint")
        curves = body.get("loss_curves") or {}
        given = {name: tuple(curves[name]) for name in LossCurves.__dataclass_fields__ if curves.get(name) is not None}
        apart = ("loss_curves", "warnings", "raw")
        return cls(
            **{name: body[name] for name in cls.__dataclass_fields__ if name in body and name not in apart},
            loss_curves=LossCurves(**given),
            warnings=tuple(body.get("warnings") or ()),
            raw=body,
        )


@dataclass(frozen=True)
class RollbackResult:
    """What answers from now on, and what answered before."""

    checkpoint: str
    checkpoint_status: str
    previous: str
    raw: Json = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, body: Json) -> "RollbackResult":
        _needed(body, "checkpoint", "checkpoint_status", "previous")
        return cls(body["checkpoint"], body["checkpoint_status"], body["previous"], body)


@dataclass(frozen=True)
class Evaluation:
    """Checkpoints measured on `anchors`: for each a mapping with losses, divergences and their intervals."""

    results: tuple[Mapping[str, Any], ...]
    anchors: Mapping[str, Any] = field(default_factory=dict)
    raw: Json = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, body: Json) -> "Evaluation":
        _needed(body, "results")
        return cls(tuple(body["results"]), body.get("anchors") or {}, body)
