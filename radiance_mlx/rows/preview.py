"""How rows are understood, before anything is sent: formats, examples as the model sees them, tokens, refusals."""

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..errors import InvalidRequest
from ..messages import Example
from .intake import Intake, Refused, Taken

SHOWN = 3


class Encoding(Protocol):
    """Tokens of one example: the answer's are those from `offset` on."""

    @property
    def tokens(self) -> tuple[int, ...]: ...
    @property
    def offset(self) -> int: ...


class Encoder(Protocol):
    """What turns an example into tokens (`lora.encoding.ChatEncoder`)."""

    tokenizer: Any

    def example(self, example: Example, *, mask_prompt: bool = ..., max_tokens: int = ...) -> Encoding: ...


@dataclass
class Tokens:
    """Lengths in tokens, by the tokenizer named `by`; longer than `longest` is cut when it is learnt.

    `learnt` of the tokens are targets, if none is cut.
    """

    by: str
    longest: int
    lengths: list[int] = field(default_factory=list)
    learnt: int = 0

    def as_dict(self) -> dict[str, Any]:
        lengths = self.lengths
        return {
            "tokenizer": self.by,
            "min": min(lengths, default=0),
            "median": statistics.median(lengths) if lengths else 0,
            "max": max(lengths, default=0),
            "total": sum(lengths),
            "learnt": self.learnt,
            "max_seq_length": self.longest,
            "cut": sum(length > self.longest for length in lengths),
        }


@dataclass
class Shown:
    """One example as it will be learnt: what is asked, and the answer; the last of the `answers` of its row."""

    place: str
    format: str
    asked: str
    learnt: str
    answers: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "place": self.place,
            "format": self.format,
            "asked": self.asked,
            "learnt": self.learnt,
            "answers": self.answers,
        }


@dataclass
class Preview:
    """What came of looking at all rows of an intake."""

    intake: Intake
    shown: list[Shown] = field(default_factory=list)
    tokens: Tokens | None = None
    why_no_tokens: str = ""

    def as_dict(self) -> dict[str, Any]:
        intake = self.intake
        return {
            "source": intake.source.name,
            "kind": intake.source.kind,
            "columns": str(intake.columns) if intake.columns else None,
            "left_out": intake.left_out,
            "remarks": intake.source.remarks,
            "rows": intake.rows,
            "examples": intake.examples,
            "formats": dict(intake.formats),
            "refused": [{"place": refused.place, "problem": refused.problem} for refused in intake.refused],
            "tokens": self.tokens.as_dict() if self.tokens else None,
            "why_no_tokens": self.why_no_tokens or None,
            "shown": [shown.as_dict() for shown in self.shown],
        }


def counted(
    rows: Iterable[Taken | Refused], preview: Preview, encoder: Encoder | None, *, mask_prompt: bool = True
) -> Iterator[Taken | Refused]:
    """`rows`, put into `preview` as they pass; what the chat template refuses is refused here too."""
    for row in rows:
        if isinstance(row, Taken) and encoder is not None and preview.tokens is not None:
            row = _encoded(row, preview, encoder, preview.tokens, mask_prompt)
        if isinstance(row, Taken) and encoder is None and len(preview.shown) < SHOWN:
            preview.shown.append(_plain(row))
        yield row


def _encoded(row: Taken, preview: Preview, encoder: Encoder, tokens: Tokens, mask_prompt: bool) -> Taken | Refused:
    try:
        encoded = [encoder.example(e, mask_prompt=mask_prompt, max_tokens=2**31) for e in row.examples]
    except InvalidRequest as error:
        intake, refused = preview.intake, Refused(row.place, error.message)
        intake.examples -= len(row.examples)
        intake.refused.append(refused)
        return refused
    for one in encoded:
        tokens.lengths.append(len(one.tokens))
        tokens.learnt += len(one.tokens) - max(one.offset, 1)
    if len(preview.shown) < SHOWN:
        last, decode = encoded[-1], encoder.tokenizer.decode
        asked, learnt = decode(list(last.tokens[: last.offset])), decode(list(last.tokens[last.offset :]))
        preview.shown.append(Shown(row.place, row.format, asked, learnt, len(encoded)))
    return row


def _plain(row: Taken) -> Shown:
    """Without a tokenizer: roles and contents."""
    example, answers = row.examples[-1], len(row.examples)
    if not example.messages:
        return Shown(row.place, row.format, "", example.text, answers)
    said = [f"[{m['role']}] {m['content'] or m.get('tool_calls')}" for m in example.chat()]
    return Shown(row.place, row.format, "\n".join(said[:-1]), said[-1], answers)
