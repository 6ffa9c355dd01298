"""One row of a data set found elsewhere as an anchor.

Such a row is whatever it is: one without usable text becomes an empty `Example`, for the caller to skip and count.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import AnchorsUnavailable
from ..messages import Example
from ..rows.columns import PAIRS

#: names that columns of data sets have, in lower case, likeliest first
TITLES = ("title", "headline")
TEXTS = ("text", "content", "article", "document", "body")
NOTHING = Example()


@dataclass(frozen=True)
class Columns:
    """Which columns hold what: `asked` is the chat's column, the prompt's, or those of the text.

    Several columns are joined by an empty line. `answer` is the column of a pair's answer.
    """

    form: Literal["messages", "pair", "text"]
    asked: tuple[str, ...]
    answer: str = ""

    @property
    def names(self) -> list[str]:
        """All that is read."""
        return [*self.asked, *([self.answer] if self.answer else [])]

    def example(self, row: Mapping[str, Any]) -> Example:
        """`row` as an example, or an empty one when it holds nothing that could be measured."""
        if self.form == "messages":
            return _up_to_the_last_answer(row[self.asked[0]])
        text = "\n\n".join(row[name] for name in self.asked if _is_text(row[name]) and row[name].strip())
        if self.form == "text" or not text:
            return Example(text=text)
        answer = row[self.answer]
        if not _is_text(answer) or not answer.strip():
            return NOTHING
        return Example(messages=(("user", text), ("assistant", answer)))


def columns_of(kinds: Mapping[str, bool], wanted: Sequence[str] = ()) -> Columns:
    """Where the text is, in a data set with the columns `kinds` (name → whether it holds strings).

    `wanted` names the columns instead: known names mean what they always mean; otherwise one is a text (or a
    chat), two are a prompt and its answer, and a title with others, or more than two, are joined as text.
    Raises `AnchorsUnavailable` for a wanted column that is not there, and when nothing is wanted and nothing
    known is found.
    """
    there = ", ".join(kinds) or "none"
    if missing := [name for name in wanted if name not in kinds]:
        raise AnchorsUnavailable(
            f"The anchor data set has no column {', '.join(missing)}; it has: {there}.",
            "Name columns that are there in evaluation.anchor_columns, or leave it empty to have them found.",
        )
    found = _known({name: kinds[name] for name in wanted or kinds})
    if not wanted:
        if found is None:
            raise AnchorsUnavailable(
                f"No text was found in the anchor data set; its columns are: {there}.",
                "Name a text's or a chat's column, or a prompt's and its answer's, in evaluation.anchor_columns.",
            )
        return found
    if found is not None and set(found.names) == set(wanted):
        return found
    if len(wanted) == 2 and wanted[0].lower() not in TITLES:
        return Columns("pair", (wanted[0],), wanted[1])
    return Columns("messages" if len(wanted) == 1 and not kinds[wanted[0]] else "text", tuple(wanted))


def _known(kinds: Mapping[str, bool]) -> Columns | None:
    """Columns by their usual names, in any case: a chat before a pair, a pair before a text."""
    chats = [name for name, strings in kinds.items() if name.lower() == "messages" and not strings]
    if chats:
        return Columns("messages", (chats[0],))
    strings = {name.lower(): name for name, strings in kinds.items() if strings}
    for asked, answer in PAIRS:
        if asked in strings and answer in strings:
            # instructions often come with what they are about in a column of its own
            names = ("instruction", "input") if asked == "instruction" and "input" in strings else (asked,)
            return Columns("pair", tuple(strings[name] for name in names), strings[answer])
    body = next((strings[name] for name in TEXTS if name in strings), None)
    if body is None:
        return None
    titles = [strings[name] for name in TITLES if name in strings]
    return Columns("text", (*titles[:1], body))


def _up_to_the_last_answer(messages: Any) -> Example:
    """A chat without what comes after its last answer."""
    if not isinstance(messages, list):
        return NOTHING
    turns: list[tuple[str, str]] = []
    for message in messages:
        if not isinstance(message, dict) or not _is_text(message.get("content")) or not _is_text(message.get("role")):
            return NOTHING
        turns.append((message["role"], message["content"]))
    while turns and (turns[-1][0] != "assistant" or not turns[-1][1].strip()):
        turns.pop()
    return Example(messages=tuple(turns)) if len(turns) > 1 else NOTHING


def _is_text(value: Any) -> bool:
    """Half a surrogate pair, which JSON can spell, is no text: no tokenizer takes it."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)
