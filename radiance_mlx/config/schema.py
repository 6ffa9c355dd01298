"""The configuration: one schema for `config.yaml`, the environment and the flags.

Names and defaults are the contract with users. `config.yaml` in the repository explains each key; a test
holds that file and this schema together. Nothing here reads a file: see `radiance_mlx.config.loading`.
"""

import json
from ipaddress import ip_address
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict


class Section(BaseModel):
    """Unknown keys are errors, and a value never changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


def _off_is_a_word(value: Any) -> Any:
    """YAML 1.1 reads a bare `off` as false."""
    return "off" if value is False else value


def _none_is_a_word(value: Any) -> Any:
    return "none" if value is False else value


#: counts: what MLX takes as a size, and SQLite as a number, with room for products of two
MANY = 2**31 - 1
#: factors: what 32-bit floats hold, with room for sums
BIG = 1e30
#: seconds, minutes, milliseconds: beyond it, waiting overflows somewhere
LONG = 1e9
#: sizes in memory or on disk: their bytes must fit in 63 bits
MOST_MB, MOST_GB = 1e9, 1e6
MOST_SLOTS = 1024

Positive = Annotated[int, Field(ge=1, le=MANY)]
NotNegative = Annotated[int, Field(ge=0, le=MANY)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Factor = Annotated[float, Field(gt=0, le=BIG)]
Duration = Annotated[float, Field(gt=0, le=LONG)]


def is_loopback(host: str) -> bool:
    """Whether `host` names this machine only."""
    if host == "localhost":
        return True
    try:  # an address, not a name: 127.example.com is somebody's
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class ModelSection(Section):
    """How the base model is loaded and spoken to."""

    revision: str | None = None
    chat_template_args: dict[str, Any] = {}
    trust_remote_code: bool = False

    @field_validator("chat_template_args")
    @classmethod
    def _can_be_shown(cls, args: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(args, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"must be what JSON can hold: {error}") from error
        return args


class LoraSection(Section):
    """Shape of the adapters. `alpha` becomes mlx-lm's `scale = alpha / r`."""

    r: Annotated[int, Field(ge=1, le=512)] = 8
    alpha: Factor = 16
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    target_modules: str | list[str] = ["q_proj", "k_proj", "v_proj", "o_proj"]
    num_layers: Annotated[int, Field(le=MANY)] = -1

    @field_validator("target_modules", mode="before")
    @classmethod
    def _names_modules(cls, modules: Any) -> Any:
        names = [modules] if isinstance(modules, str) else modules
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"must be a name, or a list of names such as [q_proj, v_proj] (got {modules!r})")
        if not names or not all(names):
            raise ValueError("names no module: write names such as [q_proj, v_proj], or all-linear")
        return modules

    @field_validator("num_layers")
    @classmethod
    def _some_or_all(cls, layers: int) -> int:
        if layers != -1 and layers < 1:
            raise ValueError("must be 1 or more, or -1 for all layers")
        return layers

    @property
    def scale(self) -> float:
        """What mlx-lm multiplies the low-rank product with."""
        return self.alpha / self.r

    @property
    def targets(self) -> list[str]:
        """`target_modules` as a list of names."""
        return [self.target_modules] if isinstance(self.target_modules, str) else self.target_modules


class TrainingSection(Section):
    """One batch's training. `max_steps` counts optimizer steps."""

    batch_size: Positive = 1
    grad_accum: Positive = 16
    lr: Factor = 1e-4
    max_steps: Positive = 200
    eval_every: NotNegative = 1
    optimizer: Literal["adam", "adamw"] = "adam"
    weight_decay: Annotated[float, Field(ge=0, le=BIG)] = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: NotNegative = 0
    clip_norm: Factor | None = 1.0
    mask_prompt: bool = True
    max_seq_length: Annotated[int, Field(ge=8, le=MANY)] = 2048
    stop_loss: Factor | None = None
    extensions: Annotated[int, Field(ge=0, le=100)] = 0
    learnt_loss: Factor = 0.05
    grad_checkpoint: bool = False
    seed: Seed = 0
    slice_ms: Annotated[float, Field(ge=0, le=LONG)] = 50.0
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    aside: Annotated[Literal["auto", "off"], BeforeValidator(_off_is_a_word)] = "auto"
    save_every_s: Duration = 30.0
    prefix_cache_mb: Annotated[float, Field(ge=0, le=MOST_MB)] = 256
    halves: Annotated[Literal["auto", "off"], BeforeValidator(_off_is_a_word)] = "auto"
    distributed: Annotated[Literal["off", "auto", "ring", "jaccl"], BeforeValidator(_off_is_a_word)] = "off"
    # last: their validators ask for the keys above
    eval_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    eval_holdout: bool = False
    patience: NotNegative = 0

    @property
    def prefix_bytes(self) -> int:
        """What may be kept of what lies below the adapted modules: of rows learnt, and again of rows rehearsed."""
        return int(self.prefix_cache_mb * 2**20) if self.slice_ms > 0 else 0

    @field_validator("eval_fraction")
    @classmethod
    def _our_own_loop_holds_out(cls, fraction: float, info: ValidationInfo) -> float:
        # a key that is at fault is not there: that fault is told, and is enough
        if fraction > 0 and info.data.get("slice_ms") == 0:
            raise ValueError("with training.slice_ms: 0 (mlx-lm's own train loop) nothing can be held out: set it to 0")
        return fraction

    @field_validator("eval_holdout")
    @classmethod
    def _something_is_held_out(cls, holdout: bool, info: ValidationInfo) -> bool:
        fraction = info.data.get("eval_fraction")
        if holdout and fraction == 0:
            raise ValueError("needs training.eval_fraction above 0: nothing is held out")
        if not holdout and fraction and info.data.get("max_steps") == 1:
            raise ValueError(
                "must be true with training.max_steps: 1 and training.eval_fraction above 0: "
                "no step is left to learn the held-out rows"
            )
        return holdout

    @field_validator("patience")
    @classmethod
    def _has_something_to_wait_for(cls, patience: int, info: ValidationInfo) -> int:
        missing = [key for key in ("eval_fraction", "eval_every") if info.data.get(key) == 0]
        if patience and missing:
            needed = " and ".join(f"training.{key}" for key in missing)
            raise ValueError(f"needs {needed} above 0: it waits for the held-out loss to improve")
        return patience


class ReplaySection(Section):
    """Earlier examples among the new ones: `fraction` of each optimizer step's rows."""

    fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    reservoir: Annotated[int, Field(ge=1, le=1_000_000)] = 1000
    refocus: Annotated[int, Field(ge=0, le=100)] = 0
    by_tag: bool = False


class RehearsalSection(Section):
    """What the base says, rehearsed while new things are learnt: `kl_weight` times the divergence from it."""

    kl_weight: Annotated[float, Field(ge=0.0, le=1e6)] = 0.0
    sources: list[Literal["self", "neighbours", "anchors"]] = ["self", "neighbours"]
    rows: Annotated[int, Field(ge=1, le=4096)] = 8
    row_targets: Annotated[int, Field(ge=1, le=4096)] | None = None
    samples: Annotated[int, Field(ge=1, le=100_000)] = 400
    sample_tokens: Annotated[int, Field(ge=8, le=4096)] = 64
    sample_seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    neighbours: Annotated[int, Field(ge=1, le=1000)] = 6
    rewording: bool = False
    ask_ahead: bool = True


class ReconsolidateSection(Section):
    """When `lineage: reconsolidate` trains the whole log anew from the base, and in how many steps at most."""

    after_updates: Positive = 8
    idle_minutes: Duration = 10
    max_steps: Positive = 2000


class BatchSection(Section):
    """When `update_mode: batched` starts to train: whichever comes first."""

    max_examples: Positive = 128
    max_age_minutes: Duration = 30


class EvaluationSection(Section):
    """Anchors, what is measured on them, and what a bad figure leads to.

    Unset, `anchor_provider` is the base's own anchors if its folder brings some (nano's does), else none.
    """

    anchor_provider: Annotated[Literal["hf", "local", "none"] | None, BeforeValidator(_none_is_a_word)] = None
    anchor_dataset: str = "tnn1t1s/news-100-sept-2023"
    anchor_split: str = "train"
    anchor_sample: Positive = 1000
    anchor_columns: list[str] = []
    anchor_max_tokens: Annotated[int, Field(ge=8, le=MANY)] = 128
    anchor_seed: Seed = 0
    require_anchors: bool = False
    rollback_mode: Annotated[Literal["off", "warn", "auto_rollback"], BeforeValidator(_off_is_a_word)] = "off"
    catastrophic_delta: Annotated[float, Field(ge=-BIG, le=BIG)] = 0.25
    metric: Literal["forgetting_loss_delta", "forgetting_kl", "drift_kl", "anchor_ce_delta", "finetune_loss"] = (
        "forgetting_loss_delta"
    )
    confidence: Literal["mean", "lower_bound"] = "mean"
    scale_first: bool = False
    update_sample: NotNegative = 8
    update_window: NotNegative = 8


class ServerSection(Section):
    """Where HTTP listens, and whom it lets in."""

    token: str | None = None  # before host, whose validator asks for it
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8321
    allowed_hosts: list[str] = []
    allowed_origins: list[str] = []
    max_body_mb: Annotated[float, Field(gt=0, le=MOST_MB)] = 16
    body_timeout_s: Duration = 30
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("token")
    @classmethod
    def _can_be_sent(cls, token: str | None) -> str | None:
        if token and not (token.isascii() and token.isprintable()):
            raise ValueError("may hold printable ASCII characters only: it is sent in a header")
        return token

    @field_validator("host")
    @classmethod
    def _beyond_this_machine_only_with_a_token(cls, host: str, info: ValidationInfo) -> str:
        # a token that is at fault is not there: that fault is told, and is enough
        if not is_loopback(host) and not info.data.get("token", "faulty"):
            raise ValueError(f"{host} is reachable from outside this machine: set server.token too, or use 127.0.0.1")
        return host


class StorageSection(Section):
    """What is kept on disk. 0 keeps every checkpoint."""

    keep_checkpoints: NotNegative = 50


class ServingSection(Section):
    """The engine's decoding."""

    max_batch: Positive = 16
    prefill_step_size: Positive | None = None
    adapter_slots: Annotated[int, Field(ge=3, le=MOST_SLOTS)] = 8
    prompt_cache_mb: Annotated[float, Field(ge=0, le=MOST_MB)] = 256
    max_waiting: Positive = 256
    max_context: Positive | None = None
    merge_toward_base: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    fuse: Annotated[Literal["auto", "off", "always"], BeforeValidator(_off_is_a_word)] = "auto"
    transpose: Annotated[Literal["auto", "off"], BeforeValidator(_off_is_a_word)] = "auto"
    sigmoid: Annotated[Literal["auto", "off"], BeforeValidator(_off_is_a_word)] = "auto"
    decode_threads: Annotated[Literal["auto", "off"], BeforeValidator(_off_is_a_word)] = "auto"
    pad_rows: Annotated[Literal["auto", "off"], BeforeValidator(_off_is_a_word)] = "auto"
    column_blocks: Annotated[Literal["auto", "off"], BeforeValidator(_off_is_a_word)] = "auto"
    halves: Annotated[Literal["auto", "off"], BeforeValidator(_off_is_a_word)] = "auto"


class MemorySection(Section):
    """Bounds on what MLX may take. Unset limits come from the device."""

    limit_gb: Annotated[float, Field(gt=0, le=MOST_GB)] | None = None
    cache_limit_mb: Annotated[float, Field(ge=0, le=MOST_MB)] | None = None
    wired: bool = False


class Config(BaseSettings):
    """Everything that can be set.

    `radiance_mlx.config.loading` reads and merges the sources: pydantic-settings' own environment source stops
    at the first value that it cannot read, and every fault is to be told at once.
    """

    model_config = SettingsConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what it is given."""
        return (init_settings,)

    backend: Literal["auto", "metal", "mps", "cuda", "cpu"] = "auto"
    preset: Annotated[Literal["none", "lasting"], BeforeValidator(_none_is_a_word)] = "none"
    base_model: Annotated[str, Field(min_length=1)] = "nano"
    update_mode: Literal["immediate", "batched"] = "batched"
    lineage: Literal["continue", "fresh", "reconsolidate"] = "continue"
    model: ModelSection = ModelSection()
    lora: LoraSection = LoraSection()
    training: TrainingSection = TrainingSection()
    replay: ReplaySection = ReplaySection()
    rehearsal: RehearsalSection = RehearsalSection()
    reconsolidate: ReconsolidateSection = ReconsolidateSection()
    batch: BatchSection = BatchSection()
    evaluation: EvaluationSection = EvaluationSection()
    server: ServerSection = ServerSection()
    storage: StorageSection = StorageSection()
    serving: ServingSection = ServingSection()
    memory: MemorySection = MemorySection()

    @model_validator(mode="after")
    def _holds_together(self) -> "Config":
        if self.training.grad_checkpoint and self.training.slice_ms == 0 and self.lora.dropout > 0:
            raise ValueError(
                "training.grad_checkpoint with training.slice_ms: 0 needs lora.dropout: 0 "
                "(mlx-lm's recomputation draws another dropout mask)"
            )
        if self.training.slice_ms == 0 and self.training.distributed != "off":
            raise ValueError("training.slice_ms: 0 (mlx-lm's own train loop) cannot be training.distributed")
        if self.training.slice_ms == 0 and self.training.extensions:
            raise ValueError("training.slice_ms: 0 (mlx-lm's own train loop) knows no training.extensions")
        lasting = self.replay.fraction > 0 or self.rehearsal.kl_weight > 0 or self.rehearsal.rewording
        if self.training.slice_ms == 0 and lasting:
            raise ValueError("training.slice_ms: 0 (mlx-lm's own train loop) knows no replay and no rehearsal")
        return self
