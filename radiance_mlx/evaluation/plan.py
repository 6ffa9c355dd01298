"""What is to be measured around one update, as plain values that cross threads."""

from dataclasses import dataclass
from pathlib import Path

from ..lora.encoding import Encoded
from ..messages import Example
from .anchors import AnchorSet
from .policy import Rule


@dataclass(frozen=True, slots=True)
class EarlierUpdate:
    """Some examples of an update that led here, and their token-mean loss just before and just after it."""

    checkpoint: str
    examples: tuple[Example, ...]
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class Plan:
    """`anchors` None: none are measured, or they could not be had, for the reason `unavailable`.

    `rehearsed` are anchors to learn from, which are never those that measure. `notes` are for the job.

    `sample` examples of an update stand for it: its own now, and the `earlier` ones'.
    """

    rule: Rule
    anchors: AnchorSet | None = None
    unavailable: str = ""
    earlier: tuple[EarlierUpdate, ...] = ()
    sample: int = 8
    scale_first: bool = False
    rehearsed: tuple[Encoded, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Subject:
    """What to measure: `folder` holds an adapter that mlx-lm reads (None: the base); `parent` a checkpoint or None."""

    name: str
    folder: Path | None
    parent: str | None


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` indices spread evenly over `range(count)`; all of them if there are no more."""
    if count <= wanted:
        return list(range(count))
    return [i * count // wanted for i in range(wanted)]
