"""The forms of a row, and what each means. `understand` is the one way from a row to examples.

The same models validate rows from everywhere and describe `POST /update` in `/openapi.json`.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from ..errors import InvalidRequest
from ..messages import Example
from .turns import Strict, TaughtMessage, Text, Tools, Turn, check, examples_of, parsed_json, without_nulls

SHAPES = (
    "{messages}, with tools or not, {input, output}, {prompt, completion}, {instruction, input, output}, "
    "{conversations} or {text}"
)
#: what ShareGPT's writers call the roles
SPEAKERS = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "function_response", "observation", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
}


class InputOutput(Strict):
    """A question and its answer."""

    input: Text
    output: Text

    def examples(self, every_answer: bool | None) -> list[Example]:
        return [_pair(self.input, self.output)]


class PromptCompletion(Strict):
    """The same, in mlx-lm's words."""

    prompt: Text
    completion: Text

    def examples(self, every_answer: bool | None) -> list[Example]:
        return [_pair(self.prompt, self.completion)]


class Chat(Strict):
    """A chat in OpenAI's and mlx-lm's format; its last message, or what has a `weight`, is to be learnt."""

    messages: Annotated[list[TaughtMessage], Field(min_length=2)]
    tools: Tools | None = None
    functions: Tools | None = None
    parallel_tool_calls: bool | None = None

    def examples(self, every_answer: bool | None) -> list[Example]:
        if self.tools and self.functions:
            raise ValueError("give either tools or functions")
        turns = [message.turn() for message in self.messages]
        return examples_of(turns, self.tools or self.functions, bool(every_answer))


class PlainText(Strict):
    """Text to be continued; every token is learnt."""

    text: Text

    def examples(self, every_answer: bool | None) -> list[Example]:
        return [Example(text=self.text)]


class Alpaca(Strict):
    """An instruction, what it is about (`input`, may be empty), and the answer."""

    instruction: Text
    input: str | None = None
    output: Text
    system: str | None = None

    def examples(self, every_answer: bool | None) -> list[Example]:
        asked = "\n\n".join(part for part in (self.instruction, self.input) if part and part.strip())
        return [_pair(asked, self.output, self.system)]


class Said(Strict):
    """One turn in ShareGPT's words."""

    speaker: Annotated[str, Field(validation_alias=AliasChoices("from", "role"))]
    value: Annotated[str, Field(validation_alias=AliasChoices("value", "content"))]
    weight: Annotated[int, Field(ge=0, le=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return without_nulls(value)

    @model_validator(mode="after")
    def _speaks(self) -> "Said":
        if self.speaker not in SPEAKERS:
            raise ValueError(f"from: {self.speaker!r} is none of {', '.join(SPEAKERS)}")
        if self.weight is not None and SPEAKERS[self.speaker] not in ("assistant", "function_call"):
            raise ValueError("weight is for answers")
        self.turn()
        return self

    def turn(self) -> Turn:
        """In the service's own words; a call of a function is JSON: {name, arguments}."""
        role = SPEAKERS[self.speaker]
        if role != "function_call":
            return Turn(role, self.value, weight=self.weight)
        called = parsed_json(self.value)
        if not isinstance(called, dict) or not isinstance(called.get("name"), str):
            raise ValueError("a function_call's value must be JSON: {name, arguments}")
        calls = TaughtMessage.model_validate({"role": "assistant", "function_call": called})
        return Turn("assistant", "", calls.turn().beside, self.weight)


class Conversation(Strict):
    """A chat in ShareGPT's format; each answer in it is to be learnt."""

    conversations: Annotated[
        list[Said], Field(min_length=2, validation_alias=AliasChoices("conversations", "conversation"))
    ]
    id: str | int | None = None
    system: str | None = None
    tools: Tools | None = None

    def examples(self, every_answer: bool | None) -> list[Example]:
        turns = [said.turn() for said in self.conversations]
        first = [Turn("system", self.system)] if self.system else []
        return examples_of([*first, *turns], self.tools, every_answer is not False)


ExampleBody = InputOutput | PromptCompletion | Chat | PlainText | Alpaca | Conversation
#: which key tells which form, and what it is called; the first that a row has decides
FORMS: dict[str, tuple[str, type[ExampleBody]]] = {
    "instruction": ("alpaca", Alpaca),
    "messages": ("chat", Chat),
    "conversations": ("sharegpt", Conversation),
    "conversation": ("sharegpt", Conversation),
    "prompt": ("completions", PromptCompletion),
    "completion": ("completions", PromptCompletion),
    "input": ("pairs", InputOutput),
    "output": ("pairs", InputOutput),
    "text": ("text", PlainText),
}
FORMATS = tuple(dict.fromkeys(name for name, _ in FORMS.values()))
#: forms that are known, and cannot be learnt here: a key that tells, and why
OTHERS = {
    "chosen": "preference rows (chosen, rejected) are not taught here: give the answers that are right",
    "preferred_output": "preference rows are not taught here: give {messages} that end with the preferred answer",
    "non_preferred_output": "preference rows are not taught here: give {messages} that end with the preferred answer",
}


@dataclass(frozen=True)
class Understood:
    """What a row is: its format, one of `FORMATS`, and its examples, one at least."""

    format: Literal["alpaca", "chat", "sharegpt", "completions", "pairs", "text"]
    examples: tuple[Example, ...]


def understand(row: Any, *, every_answer: bool | None = None) -> Understood:
    """One row, parsed but otherwise as it came. Raises `InvalidRequest`; its `details` are all faults of the row.

    Of a chat that gives no weights `every_answer` is learnt, or only the last; None: as is usual for the format
    (ShareGPT: every, else the last).
    """
    if not isinstance(row, dict):
        raise InvalidRequest(f"an example must be an object, not {_kind(row)}")
    try:
        check(row)
    except ValueError as error:
        raise InvalidRequest(str(error)) from None
    if other := next((why for key, why in OTHERS.items() if key in row), None):
        raise InvalidRequest(other)
    key = next((key for key in FORMS if key in row), None)
    if key is None:
        raise InvalidRequest(f"no known form: it has the keys {', '.join(map(str, row)) or '(none)'}")
    name, form = FORMS[key]
    try:
        examples = form.model_validate(row).examples(every_answer)
    except ValidationError as error:
        details = faults_of(error, form)
        said = "; ".join(f"{d['field']}: {d['problem']}" if d["field"] else d["problem"] for d in details[:5])
        raise InvalidRequest(said, details=details) from None
    except ValueError as error:
        raise InvalidRequest(str(error)) from None
    return Understood(name, tuple(examples))  # type: ignore[arg-type]


def keys_of(form: type[Strict]) -> dict[str, FieldInfo]:
    """The fields of a form by the keys that rows have for them, the usual one where there are several."""
    return {
        str(field.validation_alias.choices[0]) if isinstance(field.validation_alias, AliasChoices) else name: field
        for name, field in form.model_fields.items()
    }


def faults_of(error: ValidationError, form: type[Strict]) -> list[dict[str, str]]:
    """pydantic's faults in plain words, as `{field, problem}`."""
    keys = " and ".join(keys_of(form))
    words = {
        "missing": "is missing",
        "extra_forbidden": "is not a key that can be taught here",
        "string_type": "must be text",
        "string_too_short": "must not be empty",
        "string_unicode": "holds half a surrogate pair, which is no text",
        "too_short": "must be a list of at least two messages",
        "list_type": "must be a list",
        "model_type": "must be an object",
        "model_attributes_type": "must be an object",
        "dict_type": "must be an object",
    }
    found = []
    for fault in error.errors(include_url=False, include_context=False, include_input=False):
        place = ".".join(str(part) for part in fault["loc"])
        problem = words.get(fault["type"], fault["msg"].removeprefix("Value error, "))
        if fault["type"] == "extra_forbidden" and len(fault["loc"]) == 1:
            problem = f"is not a key beside {keys}"
        found.append({"field": place, "problem": problem})
    return found


def _pair(asked: str, answer: str, system: str | None = None) -> Example:
    first = (("system", system),) if system else ()
    return Example(messages=(*first, ("user", asked), ("assistant", answer)))


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
