"""Bodies that come in and go out. The same models validate requests and describe `/openapi.json`."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ..messages import STABLE, EventKind, Generate, Sampling
from ..rows import ExampleBody, turns
from ..rows.limits import MOST_EXAMPLES

Body = turns.Strict
Text = turns.Text


class Message(Body):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class SearchRequest(Body):
    """`POST /search`: a `prompt`, or `messages`."""

    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    system: str | None = None
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] = 256
    temperature: Annotated[float, Field(ge=0.0, le=10.0)] = 0.2
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Annotated[list[Text], Field(max_length=16), BeforeValidator(_one_or_many)] = []
    checkpoint: Text = STABLE
    use_training_adapter: bool = False
    stream: bool = False

    @model_validator(mode="after")
    def _one_question(self) -> "SearchRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        if self.use_training_adapter and self.checkpoint != STABLE:
            raise ValueError("give either checkpoint or use_training_adapter")
        return self

    def as_request(self) -> Generate:
        """For the service."""
        turns = [(m.role, m.content) for m in self.messages or ()] or [("user", str(self.prompt))]
        if self.system is not None:
            turns.insert(0, ("system", self.system))
        sampling = Sampling(self.max_tokens, self.temperature, self.top_p, self.seed, tuple(self.stop))
        return Generate(
            messages=tuple(turns),
            checkpoint=self.checkpoint,
            sampling=sampling,
            training=self.use_training_adapter,
            stream=self.stream,
        )


class Usage(BaseModel):
    """Tokens of one answer; `cached_tokens` of the prompt were not computed again."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class SearchAnswer(BaseModel):
    """The answer; `reasoning` only from models that reason."""

    response: str
    checkpoint: str
    checkpoint_status: Literal["base", "stable", "risky", "rolled_back", "candidate", "training"]
    latency_ms: int
    finish_reason: Literal["stop", "length"]
    usage: Usage
    reasoning: str | None = None


class UpdateRequest(Body):
    """`POST /update`."""

    examples: Annotated[list[ExampleBody], Field(min_length=1, max_length=MOST_EXAMPLES)]
    tags: Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], Field(max_length=64)] = []


class UpdateEnvelope(Body):
    """`UpdateRequest` before its examples are looked at one by one."""

    examples: Annotated[list[Any], Field(min_length=1, max_length=MOST_EXAMPLES)]
    tags: Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], Field(max_length=64)] = []


class Serving(BaseModel):
    """The checkpoint that answers by default now."""

    checkpoint: str
    checkpoint_status: Literal["base", "stable", "risky", "rolled_back", "candidate"]


class UpdateAnswer(Serving):
    """Accepted: durable from now on."""

    job_id: str
    queued: bool


class RollbackRequest(Body):
    """`to`: a checkpoint, `base`, or null for the parent."""

    to: str | None = None
    reason: Annotated[str, Field(max_length=2000)] = ""


class RollbackAnswer(BaseModel):
    checkpoint: str
    checkpoint_status: str
    previous: str


class EvalRequest(Body):
    """Checkpoints to measure (null: all), beside their own parents or `against` one; other anchors than configured.

    A data set is named as on the hub: no path comes in over HTTP.
    """

    checkpoints: Annotated[list[str], Field(min_length=1, max_length=1000)] | None = None
    against: str | None = None
    anchor_provider: Literal["hf", "local"] | None = None
    anchor_dataset: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")] | None = None
    anchor_split: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    anchor_sample: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    anchor_columns: Annotated[list[str], Field(max_length=8)] | None = None
    stream: bool = False


class EvalResult(BaseModel):
    """Means over tokens, in nats; `intervals` holds [low, high] (95%) for each."""

    model_config = ConfigDict(extra="allow")

    checkpoint: str
    against: str
    forgetting_loss: float
    forgetting_kl: float
    anchor_ce_delta: float
    base_agreement: float
    retention_score: float
    drift_loss: float | None
    drift_kl: float | None
    forgetting_loss_delta: float | None
    intervals: dict[str, list[float]]


class EvalAnswer(Serving):
    anchors: dict[str, Any]
    results: list[EvalResult]


class ErrorInfo(BaseModel):
    code: str
    message: str
    hint: str
    details: Any = None


class ErrorAnswer(BaseModel):
    """Every error has this shape."""

    error: ErrorInfo


class Progress(BaseModel):
    step: int
    max_steps: int
    loss: float | None
    tokens_per_s: float
    eta_s: float | None
    phase: Literal["training", "evaluating"]


class Job(BaseModel):
    """One accepted update, or one reconsolidation, which has no examples of its own.

    `checkpoint` is the one it became, or is becoming.
    """

    job_id: str
    kind: Literal["update", "reconsolidation"]
    state: Literal[
        "review",
        "queued",
        "paused",
        "training",
        "evaluating",
        "published",
        "rejected",
        "failed",
        "cancelled",
        "quarantined",
    ]
    created: str
    updated: str
    tags: list[str]
    example_count: int
    attempts: int
    checkpoint: str | None
    progress: Progress | None
    error: ErrorInfo | None
    notes: list[str]
    serving: Serving | None = None


class Jobs(Serving):
    """Newest first; `next` is the `before` of the following page."""

    jobs: list[Job]
    next: int | None


class Checkpoint(BaseModel):
    """One adapter; `parent` null means the base."""

    checkpoint: str
    parent: str | None
    status: Literal["candidate", "stable", "risky", "rolled_back"]
    current: bool
    created: str
    jobs: list[str]
    data_hash: str
    metrics: dict[str, Any]
    config: dict[str, Any]
    files: dict[str, str]
    notes: list[str]
    damaged: str | None
    pruned: bool
    reconsolidated: bool
    serving: Serving | None = None


class Checkpoints(Serving):
    """Oldest first."""

    checkpoints: list[Checkpoint]
    current: str


class Event(BaseModel):
    """One entry of the journal; `reason` is "" where none was given, `data` depends on `kind`."""

    id: int
    at: str
    kind: EventKind
    reason: str
    data: dict[str, Any]


class Events(Serving):
    """Newest first; `next` is the `before` of the following page."""

    events: list[Event]
    next: int | None


class LossCurves(BaseModel):
    """One number per published checkpoint, oldest first, in nats per token."""

    finetune_loss: list[float | None]
    forgetting_loss: list[float | None] | None
    eval_loss: list[float | None]


class ForgettingSummary(BaseModel):
    """Of the checkpoint that answers now."""

    model_config = ConfigDict(extra="allow")

    anchor_ce_delta: float
    retention_score: float


class Info(BaseModel):
    """The specification's fields; more come beside them."""

    model_config = ConfigDict(extra="allow")

    base_model: str
    current_checkpoint: str
    queue_depth: int
    last_update: str | None
    loss_curves: LossCurves
    forgetting_summary: ForgettingSummary | None
    hardware: dict[str, Any]


class Health(BaseModel):
    status: str
