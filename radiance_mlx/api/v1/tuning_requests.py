"""Bodies of `POST /v1/fine_tuning/jobs`."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ...messages import Terms
from ..schemas import Text
from .parsing import OpenAIBody

Auto = Literal["auto"]
#: names a model in ids, so that it must not hold what separates their parts
SUFFIX = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class Hyperparameters(OpenAIBody):
    """What "auto", or nothing, leaves to the service's configuration."""

    n_epochs: Auto | Annotated[int, Field(ge=1, le=1000)] | None = None
    batch_size: Auto | Annotated[int, Field(ge=1, le=1024)] | None = None
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0.0, le=1000.0)] | None = None


class Supervised(OpenAIBody):
    hyperparameters: Hyperparameters | None = None


class Method(OpenAIBody):
    """How it is trained: on answers."""

    type: Literal["supervised"]
    supervised: Supervised | None = None

    @field_validator("type", mode="before")
    @classmethod
    def _is_supervised(cls, given: Any) -> Any:
        if given != "supervised":
            raise ValueError(f"{given!r} is not supported: training is 'supervised'")
        return given


def hyperparameters_of(request: Mapping[str, Any]) -> Mapping[str, Any]:
    """Those of a `TuningRequest` as plain data, wherever they stand."""
    supervised = (request.get("method") or {}).get("supervised") or {}
    return request.get("hyperparameters") or supervised.get("hyperparameters") or {}


class TuningRequest(OpenAIBody):
    """`hyperparameters` may stand at the top, in the older form, or under `method`."""

    model: Text
    training_file: Text
    validation_file: Text | None = None
    hyperparameters: Hyperparameters | None = None
    method: Method | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    suffix: Annotated[str, Field(min_length=1, max_length=64, pattern=SUFFIX)] | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = None
    integrations: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _says_it_once(self) -> "TuningRequest":
        under = self.method and self.method.supervised and self.method.supervised.hyperparameters
        if self.hyperparameters is not None and under:
            raise ValueError("'hyperparameters' stand at the top and under 'method': give them once")
        return self

    def terms(self) -> Terms | None:
        """None: as configured, in company of others. A name or a validation of its own asks for a batch of its own."""
        asked = hyperparameters_of(self.model_dump(exclude_none=True))
        wanted = {name: value for name, value in asked.items() if value != "auto"}
        terms = Terms(
            epochs=wanted.get("n_epochs"),
            batch_size=wanted.get("batch_size"),
            lr_multiplier=wanted.get("learning_rate_multiplier"),
            seed=self.seed,
        )
        return terms if terms != Terms() or self.suffix or self.validation_file else None
