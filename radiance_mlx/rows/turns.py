"""Messages of a chat as they come (OpenAI's, mlx-lm's, ShareGPT's), and the examples that a chat is.

What of a message cannot be learnt is refused by its name. What older clients call functions are tools here.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from ..messages import Example, as_call, json_of
from .limits import check_answers

Text = Annotated[str, Field(min_length=1)]
#: levels of what tools and their calls may hold
DEEPEST = 64
#: what other programs call the roles that chat templates know
ROLES = {"developer": "system", "function": "tool"}


class Strict(BaseModel):
    """Unknown keys are faults: what is not understood, or misspelt, must not be left out silently."""

    model_config = ConfigDict(extra="forbid")


def without_nulls(value: Any, *kept: str) -> Any:
    """Data sets fill up each message with the keys that some other one has; null is meant in those that are `kept`."""
    return {k: v for k, v in value.items() if v is not None or k in kept} if isinstance(value, dict) else value


@dataclass(frozen=True)
class Turn:
    """One message. `beside` is what it has but role and content; `weight` 0 keeps an answer from being learnt."""

    role: str
    content: str
    beside: dict[str, Any] = field(default_factory=dict)
    weight: int | None = None

    @property
    def empty(self) -> bool:
        return not self.content and "tool_calls" not in self.beside


def _flat(content: Any) -> Any:
    """Text parts as one text; other parts are named."""
    if not isinstance(content, list):
        return content
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            said = f"part {i} is {kind!r}" if isinstance(kind, str) and kind != "text" else f"part {i} holds no text"
            raise ValueError(f"{said}: only parts {{type: text, text: …}} can be learnt")
        texts.append(part["text"])
    return "".join(texts)


PARTS = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
        "required": ["type", "text"],
    },
}
Content = Annotated[
    str | None,
    BeforeValidator(_flat),
    WithJsonSchema({"anyOf": [{"type": "string"}, PARTS, {"type": "null"}], "default": None}),
]


def _json(value: Any) -> Any:
    """What stands in a text as JSON; else the value itself."""
    if isinstance(value, str):
        value = parsed_json(value)
        check(value)
    return value


def parsed_json(text: str) -> Any:
    """Raises `ValueError`."""
    try:
        return loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is no JSON: {error}") from None


def loads(text: str) -> Any:
    """As `json.loads`; a key that an object has twice is a fault, of which one value would be lost in silence."""
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:100]!r} is there twice")
        found[key] = value
    return found


def check(value: Any, place: str = "", levels: int = DEEPEST) -> None:
    """It is stored, sent on and rendered: none of these must stumble. Raises `ValueError` that names the place."""
    problem = ""
    if levels < 0:
        problem = f"is nested more than {DEEPEST} levels deep"
    elif isinstance(value, dict):
        for key, inner in value.items():
            check(key, place or "a key")
            check(inner, f"{place}.{key}" if place else str(key), levels - 1)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            check(inner, f"{place}.{i}" if place else str(i), levels - 1)
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            problem = "holds half a surrogate pair, which is no text"
    elif isinstance(value, float) and not math.isfinite(value):
        problem = f"{value} is no JSON"
    if problem:
        place = place.encode(errors="replace").decode()
        raise ValueError(f"{place}: {problem}" if place else problem)


Object = Annotated[dict[str, Any], BeforeValidator(_json), WithJsonSchema({"type": ["object", "string"]})]


class Function(Strict):
    """The function that is called; `arguments` is an object, or that as JSON."""

    name: Text
    arguments: Object = {}


class ToolCall(Strict):
    """One call of a tool in an assistant's message."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: Function
    index: int | None = None  # left over from a stream

    def as_dict(self) -> dict[str, Any]:
        """As templates take it."""
        return as_call(self.function.name, self.function.arguments, self.id)


class TaughtMessage(Strict):
    """One message of a chat, as OpenAI and mlx-lm have it; keys that are null are not there."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: Function | None = None
    weight: Annotated[int, Field(ge=0, le=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return without_nulls(value, "content")

    @model_validator(mode="after")
    def _fits_its_role(self) -> "TaughtMessage":
        mine = {"assistant": ("tool_calls", "function_call", "weight"), "tool": ("tool_call_id",)}
        for role, keys in mine.items():
            for key in keys:
                if self.role != role and getattr(self, key) is not None:
                    raise ValueError(f"{key} is for messages of the {role}, not of the {self.role}")
        if self.tool_calls and self.function_call:
            raise ValueError("give either tool_calls or function_call")
        if self.content is None and not (self.tool_calls or self.function_call):
            raise ValueError("content is missing")
        return self

    def turn(self) -> Turn:
        """In the service's own words."""
        calls = self.tool_calls or ([ToolCall(function=self.function_call)] if self.function_call else [])
        beside = {
            "name": self.name,
            "tool_calls": [call.as_dict() for call in calls],
            "tool_call_id": self.tool_call_id,
        }
        role = ROLES.get(self.role, self.role)
        return Turn(role, self.content or "", {k: v for k, v in beside.items() if v}, self.weight)


def _tool(value: Any) -> Any:
    """A tool in OpenAI's envelope, also where the function comes without it."""
    if isinstance(value, dict) and "function" not in value and "name" in value:
        value = {"type": "function", "function": value}
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError("a tool is {type: function, function: {name, description, parameters}}")
    if value.get("type", "function") != "function":
        raise ValueError(f"a tool of the type {value['type']!r} is none that a chat template knows")
    return value


Tool = Annotated[dict[str, Any], BeforeValidator(_tool)]
Tools = Annotated[
    list[Tool],
    BeforeValidator(_json),
    WithJsonSchema({"anyOf": [{"type": "array", "items": {"type": "object"}}, {"type": "string"}]}),
]


def examples_of(turns: Sequence[Turn], tools: Sequence[dict[str, Any]] | None, every_answer: bool) -> list[Example]:
    """What of a chat is to be learnt: one example for each answer that counts, with all that came before it.

    That is the last message, if nothing else is said; with `every_answer`, or as soon as one message has a `weight`,
    it is each answer whose weight is not 0. Raises `ValueError` if there is none.
    """
    weighted = any(turn.weight is not None for turn in turns)
    if not (every_answer or weighted):
        if turns[-1].role != "assistant" or turns[-1].empty:
            raise ValueError("the last message must be the assistant's, and not empty")
        return _examples(turns, [len(turns) - 1], tools, False)
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant" and i > 0]
    wanted = [i for i in answers if turns[i].weight != 0]
    if not wanted:
        raise ValueError("no answer is to be learnt: " + ("all have weight 0" if answers else "nothing is answered"))
    if bare := [i for i in wanted if turns[i].empty]:
        raise ValueError(f"message {bare[0]}, an answer, must not be empty")
    return _examples(turns, wanted, tools, True)


def _examples(
    turns: Sequence[Turn], wanted: Sequence[int], tools: Sequence[dict[str, Any]] | None, answer_only: bool
) -> list[Example]:
    """Those whose answers are the `wanted` turns."""
    shown = json_of(list(tools)) if tools else ""
    extras = tuple(json_of(turn.beside) for turn in turns)
    check_answers(
        [len(turn.content) + len(extra) for turn, extra in zip(turns, extras, strict=True)], wanted, len(shown)
    )
    messages = tuple((turn.role, turn.content) for turn in turns)
    first = next(i for i, turn in enumerate(turns) if turn.role == "assistant")
    return [
        Example(
            messages=messages[: i + 1],
            tools=shown,
            extras=extras[: i + 1] if any(extras[: i + 1]) else (),
            answer_only=answer_only and first < i,
        )
        for i in wanted
    ]
