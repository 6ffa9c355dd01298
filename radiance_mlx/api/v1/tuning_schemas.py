"""Bodies of answers about files and fine-tuning, as OpenAI describes them."""

from typing import Any, Literal

from pydantic import BaseModel

from .tuning_requests import Auto


class FileInfo(BaseModel):
    """An uploaded file; `examples` is how many were found in it."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["fine-tune"]
    status: Literal["processed"]
    examples: int


class _Page(BaseModel):
    """`last_id` is the `after` of the next page, if `has_more`."""

    object: Literal["list"]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileList(_Page):
    data: list[FileInfo]


class FileDeleted(BaseModel):
    id: str
    object: Literal["file"]
    deleted: Literal[True]


class TuningError(BaseModel):
    code: str
    message: str
    param: str | None


class HyperparametersUsed(BaseModel):
    n_epochs: int | Auto
    batch_size: int | Auto
    learning_rate_multiplier: float | Auto


class SupervisedUsed(BaseModel):
    hyperparameters: HyperparametersUsed


class MethodUsed(BaseModel):
    type: Literal["supervised"]
    supervised: SupervisedUsed


class TuningJob(BaseModel):
    """`job_id` is the service's own job that does it."""

    id: str
    object: Literal["fine_tuning.job"]
    created_at: int
    error: TuningError | None
    fine_tuned_model: str | None
    finished_at: int | None
    estimated_finish: int | None
    hyperparameters: HyperparametersUsed
    method: MethodUsed
    model: str
    organization_id: str
    result_files: list[str]
    seed: int
    status: Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
    trained_tokens: int | None
    training_file: str
    validation_file: str | None
    integrations: None
    metadata: dict[str, str] | None
    user_provided_suffix: str | None
    job_id: str


class TuningJobs(_Page):
    data: list[TuningJob]


class TuningEvent(BaseModel):
    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class TuningEvents(_Page):
    data: list[TuningEvent]


class TuningCheckpoint(BaseModel):
    """`full_…` losses are over all rows, with the final weights."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"]
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, float]


class TuningCheckpoints(_Page):
    data: list[TuningCheckpoint]
