"""Rows of training files, as examples: JSONL, each line looked at, every bad one named. Pure.

`examples_of_row` is where a row's form is recognised: what it takes, files may hold.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..errors import InvalidRequest
from ..messages import Example

#: so many bad lines are told; a file of another format has nothing but bad ones
TOLD = 20
FORM = 'A line is {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}.'


def examples_of(content: bytes) -> list[Example]:
    """The examples of a JSONL file, in its order. Raises `InvalidRequest`, with `line` and `problem` in `details`."""
    examples: list[Example] = []
    faults: list[dict[str, Any]] = []
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            examples += examples_of_row(_json(line))
        except InvalidRequest as error:
            faults.append({"line": number, "problem": error.message})
    if faults:
        named = "; ".join(f"line {fault['line']}: {fault['problem']}" for fault in faults[:5])
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise InvalidRequest(f"{named}{more}.", FORM, faults[:TOLD])
    if not examples:
        raise InvalidRequest("There is no line in it.", FORM)
    return examples


def examples_of_row(row: Any) -> list[Example]:
    """One row in OpenAI's chat format: each assistant's message is learnt, after what stands before it.

    Those whose `weight` is 0 are not. Raises `InvalidRequest`.
    """
    if not isinstance(row, dict):
        raise InvalidRequest("a row must be an object")
    try:
        chat = ChatRow.model_validate(row)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in fault["loc"] if not str(part).startswith(("list[", "str")))
        problem = fault["msg"].removeprefix("Value error, ")
        raise InvalidRequest(f"{place}: {problem}" if place else problem) from None
    turns = [message.turn for message in chat.messages]
    return [
        Example(messages=tuple(turns[: place + 1])) for place, message in enumerate(chat.messages) if message.learnt
    ]


def _json(line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError:
        raise InvalidRequest("it is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"it is not JSON ({error})") from None


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPiece(_Row):
    type: Literal["text"]
    text: str


class RowMessage(_Row):
    """One turn. Calls of tools are not learnt from files."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPiece]
    weight: Literal[0, 1] | None = None
    name: None = None

    @model_validator(mode="after")
    def _weighs_what_is_learnt(self) -> "RowMessage":
        if self.weight is not None and self.role != "assistant":
            raise ValueError("only an assistant's message has a weight")
        if self.learnt and not self.turn[1]:
            raise ValueError("an assistant's message that is to be learnt must not be empty")
        return self

    @property
    def learnt(self) -> bool:
        return self.role == "assistant" and self.weight != 0

    @property
    def turn(self) -> tuple[str, str]:
        """(role, content) for the chat template."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return ("system" if self.role == "developer" else self.role), content


class ChatRow(_Row):
    messages: Annotated[list[RowMessage], Field(min_length=2)]

    @field_validator("messages")
    @classmethod
    def _something_is_learnt(cls, messages: list[RowMessage]) -> list[RowMessage]:
        if not any(message.learnt for message in messages):
            raise ValueError("no assistant's message in it is to be learnt")
        if messages[0].role == "assistant":
            raise ValueError("the first message must not be the assistant's: nothing would be asked")
        return messages
