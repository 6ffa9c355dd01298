"""Plain frozen values that cross threads: what the asyncio side and the engine say to each other.

Nothing here holds an MLX array, an open file or a lock. Times are seconds since the epoch (`time.time`)
unless a field says otherwise.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

BASE = "base"
STABLE = "stable"

JobState = Literal[
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
FINAL_STATES: frozenset[str] = frozenset({"published", "rejected", "failed", "cancelled", "quarantined"})
JobKind = Literal["update", "reconsolidation"]
CheckpointStatus = Literal["candidate", "stable", "risky", "rolled_back"]
#: of the journal. Those that move what answers are `published`, `rollback`, `damaged` and `base_changed`
EventKind = Literal[
    "published",
    "rejected",
    "rollback",
    "damaged",
    "base_changed",
    "failed",
    "quarantined",
    "cancelled",
    "restarted",
    "put_aside",
    "paused",
    "resumed",
    "progress",
]
#: what the policy made of a trained batch; "unknown": nothing was measured, "logged": over the threshold, mode off
Outcome = Literal["pass", "unknown", "logged", "risky", "rejected"]


@dataclass(frozen=True, slots=True)
class Example:
    """One training pair. Either `messages` (chat, the last one the answer) or `text` (plain continuation).

    A chat may call tools: then `tools` is the JSON list of those that it may call, and `extras` holds a JSON object for
    each message with what it has beside role and content (`tool_calls`, `tool_call_id`, `name`), "" for nothing.
    With `answer_only` nothing but the last message is learnt, even where prompts are learnt too.
    """

    messages: tuple[tuple[str, str], ...] = ()  # (role, content)
    text: str = ""
    tools: str = ""
    extras: tuple[str, ...] = ()  # one for each message, or none at all
    answer_only: bool = False

    @property
    def prompt(self) -> tuple[tuple[str, str], ...]:
        """What is asked: the messages before the answer; empty for a plain text."""
        return self.messages[:-1]

    @property
    def question(self) -> tuple[Any, ...]:
        """All that the answer depends on: two examples with the same question contradict or repeat each other."""
        return (self.prompt, self.extras[:-1], self.tools) if self.prompt else ()

    @property
    def plain(self) -> bool:
        """Whether roles and contents are all that there is to it."""
        return not self.tools and not self.extras

    @property
    def needs_tools(self) -> bool:
        """Whether only a chat template that knows tools can show all of it."""
        return bool(self.tools) or any('"tool_calls"' in extra for extra in self.extras)

    def chat(self) -> list[dict[str, Any]]:
        """The messages as a chat template takes them."""
        return as_chat(self.messages, [json.loads(extra) if extra else {} for extra in self.extras])

    def as_dict(self) -> dict[str, Any]:
        """In mlx-lm's own data formats: `text`, `prompt`/`completion`, or `messages`, with `tools` if there are any.

        With `answer_only` the answers before the last have `weight` 0, as in OpenAI's format.
        """
        if not self.messages:
            return {"text": self.text}
        pair = self.plain and not self.answer_only and [role for role, _ in self.messages] == ["user", "assistant"]
        if pair and all(content for _, content in self.messages):
            return {"prompt": self.messages[0][1], "completion": self.messages[1][1]}
        return self.as_messages()

    def as_messages(self) -> dict[str, Any]:
        """As `as_dict`, of a chat, and always as `messages`."""
        chat = self.chat()
        for message in chat[:-1] if self.answer_only else ():
            if message["role"] == "assistant":
                message["weight"] = 0
        return {"messages": chat, **({"tools": json.loads(self.tools)} if self.tools else {})}

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> "Example":
        """The inverse of `as_dict`."""
        if "text" in row:
            return cls(text=row["text"])
        if "prompt" in row:
            return cls(messages=(("user", row["prompt"]), ("assistant", row["completion"])))
        chat = row["messages"]
        extras = tuple(json_of({k: v for k, v in m.items() if k not in ("role", "content", "weight")}) for m in chat)
        return cls(
            messages=tuple((m["role"], m["content"]) for m in chat),
            tools=json_of(row.get("tools")),
            extras=extras if any(extras) else (),
            answer_only=any(m.get("weight") == 0 for m in chat),
        )


def as_chat(messages: Sequence[tuple[str, str]], beside: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """Messages as a chat template takes them; `beside` is what each has but role and content, or is empty."""
    turns = zip(messages, beside or ({},) * len(messages), strict=True)
    return [{"role": role, "content": content, **more} for (role, content), more in turns]


def as_call(name: str, arguments: Any, call_id: str | None = None) -> dict[str, Any]:
    """A call of a tool in a message, as a chat template takes it: arguments as an object."""
    return {
        **({"id": call_id} if call_id else {}),
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def iso(seconds: float) -> str:
    """Seconds since the epoch as ISO 8601 in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def json_of(value: Any) -> str:
    """`value` as JSON in the order that it has, which a chat template shows; "" for an empty one."""
    return json.dumps(value, ensure_ascii=False) if value else ""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an answer is drawn. `temperature` 0 is greedy; `seed` None draws one.

    `logit_bias` pairs tokens with what is added to their logits; the penalties are taken off the logits of tokens
    that the answer has already, for each time and once. With `logprobs` each token's log-probability is told, and
    those of so many of the likeliest beside it.
    """

    max_tokens: int = 256
    temperature: float = 0.2
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Tools:
    """What a chat template is told beside roles and contents.

    `functions` are tools in OpenAI's form; `beside` has, for each message, what else it holds (`tool_calls`,
    `tool_call_id`, `name`). An `Example` has the same as text, since it is compared and stored.
    """

    functions: tuple[dict[str, Any], ...] = ()
    beside: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Generate:
    """One question to the engine: chat `messages` as (role, content), answered by `checkpoint`.

    `checkpoint` is an id or "base"; with `training` the live weights answer while a batch trains, and
    `checkpoint` otherwise.
    """

    messages: tuple[tuple[str, str], ...]
    checkpoint: str = BASE
    checkpoint_status: str = BASE
    sampling: Sampling = field(default_factory=Sampling)
    training: bool = False
    stream: bool = False
    prompt: tuple[int, ...] | None = None  # the messages as tokens, if they have been encoded already
    tools: Tools | None = None

    @property
    def plain(self) -> bool:
        """Bare tokens to be continued, no chat: what comes of them is text and nothing else."""
        return not self.messages


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token of an answer with its bytes and the natural logarithm of its probability by the model itself.

    Neither temperature nor top_p, penalties or biases are in it. `top` are the likeliest at its place, likeliest first.
    """

    token: int
    data: bytes
    logprob: float
    top: tuple["TokenLogprob", ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model made; `arguments` is JSON. `id` is None if the model gave none."""

    name: str
    arguments: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of a streamed answer; `reasoning` pieces come apart from the answer's `text`.

    `logprobs` are of the tokens of which a first part is in `text`; `checkpoint` is what answers.
    """

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    checkpoint: str = ""
    checkpoint_status: str = ""

    def __bool__(self) -> bool:
        return bool(self.text or self.reasoning or self.tool_calls or self.logprobs)


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished answer; `logprobs`, if they were asked for, of the tokens that `text` was made of."""

    text: str
    reasoning: str
    checkpoint: str
    checkpoint_status: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Terms:
    """What one job asks of its training, where it differs from the configuration (None: it does not).

    Such a job is a batch of its own. `batch_size` counts the examples of one optimizer step.
    """

    epochs: int | None = None
    batch_size: int | None = None
    lr_multiplier: float | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """What the engine is to train: the jobs' examples, where to start, which checkpoint it becomes."""

    checkpoint: str
    parent: str | None
    jobs: tuple[str, ...]
    examples: tuple[Example, ...]
    data_hash: str
    number: int  # of the batch in the lineage; part of the data order's seed
    lineage: Literal["continue", "fresh"] = "continue"
    log: tuple[Example, ...] = ()  # what was learnt before, oldest first
    replayable: tuple[int, ...] = ()  # places in `log` of what may be trained again
    line: tuple[str, ...] = ()  # the checkpoints that led here, newest first, back to the last reconsolidation
    reconsolidated: bool = False  # `examples` are the whole log: nothing of it is replayed
    max_steps: int | None = None  # None: training.max_steps
    notes: tuple[str, ...] = ()  # for the job and the checkpoint
    terms: Terms = Terms()
    validation: tuple[Example, ...] = ()  # measured when all is learnt, and not learnt


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a batch in training stands; `eta_s` is the estimated rest in seconds."""

    step: int
    max_steps: int
    loss: float | None
    tokens_per_s: float
    eta_s: float | None
    phase: Literal["training", "evaluating"] = "training"

    def as_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "max_steps": self.max_steps,
            "loss": self.loss,
            "tokens_per_s": self.tokens_per_s,
            "eta_s": self.eta_s,
            "phase": self.phase,
        }


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A trained adapter, written to the unfinished folder `written` and not yet a checkpoint.

    `metrics` is what `metrics/<checkpoint>.json` holds; `notes` are remarks for the job and the checkpoint.
    """

    checkpoint: str
    parent: str | None
    written: str
    metrics: dict[str, Any]
    config: dict[str, Any]
    notes: tuple[str, ...]
    data_hash: str
    jobs: tuple[str, ...]
    outcome: Outcome = "pass"
    reconsolidated: bool = False


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What the engine says once the base is loaded."""

    base_model: str
    base_hash: str
    backend: str
    device: str
    memory_bytes: int
    context: int
    vocab_size: int
    targets: tuple[str, ...]
    chat_template: bool
    tools: bool
    warnings: tuple[str, ...]
    seconds: float
