"""Where `update` gets its rows: a file or stdin, a data set, pairs from the command line; bad rows in words."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from ..rows import SHAPES
from ..rows.files import Row, Source, read
from ..rows.intake import Refused
from .output import BadInput

SHOWN_FAULTS = 20
STDIN = "-"


def source_of_file(stack: ExitStack, file: str, kind: str | None, encoding: str) -> Source:
    """The rows of `file` (`-` is stdin), open until `stack` closes. Raises `InvalidRequest`."""
    if file == STDIN:
        return read(sys.stdin.buffer, "stdin", kind, encoding)
    try:
        path = Path(file).expanduser()
        stream: BinaryIO = stack.enter_context(path.open("rb"))
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadInput(f"{file} cannot be read: {reason}.") from error
    return read(stream, file, kind, encoding)


def source_of_pairs(inputs: Sequence[str], outputs: Sequence[str]) -> Source:
    """Those of --input and --output."""
    if len(inputs) != len(outputs):
        raise BadInput(
            f"There are {len(inputs)} --input and {len(outputs)} --output.", "Each --input needs its --output."
        )
    pairs = zip(inputs, outputs, strict=True)
    rows = [Row(f"--input {i}", {"input": a, "output": b}) for i, (a, b) in enumerate(pairs, 1)]
    return Source("the command line", "pairs", iter(rows))


def source_of_dataset(dataset: str, split: str) -> Source:
    """A data set of the hub, or of this disk. Raises `DatasetUnavailable`, `InvalidRequest`."""
    from ..rows.hub import source_of

    return source_of(dataset, split)


@contextlib.contextmanager
def told_as_bad_input(name: str) -> Iterator[None]:
    """A file that breaks off in the middle of reading is bad input, not a bug."""
    try:
        yield
    except OSError as error:
        raise BadInput(f"{name} cannot be read: {error.strerror}.") from error


def bad_rows(name: str, refused: Sequence[Refused]) -> BadInput:
    """All that was refused, the first of it by name; nothing was sent."""
    shown = [str(one) for one in refused[:SHOWN_FAULTS]]
    more = len(refused) - len(shown)
    shown += [f"and {more} more"] if more else []
    count = "1 bad example" if len(refused) == 1 else f"{len(refused)} bad examples"
    return BadInput(
        f"{name} has {count}; nothing was sent.",
        f"An example is {SHAPES}. --map names other columns, --skip-bad goes on without the bad ones.",
        shown,
    )
