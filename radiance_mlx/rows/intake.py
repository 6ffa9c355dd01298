"""From a source's rows to examples, one row at a time: what was understood and what was refused, and counts of both."""

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from ..errors import InvalidRequest
from ..messages import Example
from .columns import ColumnMap, find_map
from .files import Row, Source, kind_of, read
from .forms import understand
from .limits import MAX_BODY_MB, Room
from .lines import TOLD, examples_of_jsonl


@dataclass(frozen=True)
class Taken:
    """A row that can be learnt, with its place, its format and its examples."""

    place: str
    format: str
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class Refused:
    """A row that cannot, and why."""

    place: str
    problem: str

    def __str__(self) -> str:
        return f"{self.place}: {self.problem}"


class Intake:
    """Goes over the rows of `source` once, `limit` of them at most; the counts grow on the way.

    A table without `columns` has them found by their names (`find_map`, which raises `InvalidRequest`). `formats`
    counts rows that were understood; a chat may be several examples.
    """

    def __init__(
        self,
        source: Source,
        columns: ColumnMap | None = None,
        *,
        every_answer: bool | None = None,
        limit: int | None = None,
    ) -> None:
        self.source, self.columns = source, columns
        self._every_answer, self._limit = every_answer, limit
        if source.columns is not None:
            self.columns = columns or find_map(source.columns)
            self._check(self.columns, source.columns)
            if source.narrow is not None:
                source.rows = source.narrow([c for c in source.columns if c not in self.left_out])
        self.formats: Counter[str] = Counter()
        self.refused: list[Refused] = []
        self.rows = self.examples = 0

    @property
    def left_out(self) -> list[str]:
        """A table's columns that are not read."""
        read = {column.partition(".")[0] for column in self.columns.columns} if self.columns else set()
        read |= set(self.columns.columns) if self.columns else set()
        return [column for column in self.source.columns or () if column not in read]

    def __iter__(self) -> Iterator[Taken | Refused]:
        for row in islice(self.source.rows, self._limit):
            self.rows += 1
            found = self._understood(row)
            if isinstance(found, Refused):
                self.refused.append(found)
            else:
                self.formats[found.format] += 1
                self.examples += len(found.examples)
            yield found

    def _understood(self, row: Row) -> Taken | Refused:
        if row.fault:
            return Refused(row.place, row.fault)
        try:
            value = self.columns.row(row.value) if self.columns else row.value
            found = understand(value, every_answer=self._every_answer)
        except InvalidRequest as error:
            return Refused(row.place, error.message)
        return Taken(row.place, found.format, found.examples)

    @staticmethod
    def _check(columns: ColumnMap, there: list[str]) -> None:
        missing = [c for c in columns.columns if c not in there and c.partition(".")[0] not in there]
        if missing:
            raise InvalidRequest(
                f"There is no column {', '.join(missing)}; there are: {', '.join(there)}.", "See --map."
            )


def examples_of_upload(content: bytes, name: str, *, max_body_mb: float = MAX_BODY_MB) -> list[Example]:
    """Every answer of a file that is in memory, in its order; its kind is what its `name` says, else JSONL.

    Nothing of it is passed over: columns or tags that would not be learnt are a fault. Raises as `examples_of_jsonl`.
    """
    if kind_of(name) == "jsonl":
        return examples_of_jsonl(content, every_answer=True, max_body_mb=max_body_mb)
    intake = Intake(read(io.BytesIO(content), name), every_answer=True)
    source = intake.source
    for what, unread in (("columns", intake.left_out), ("tags", source.tags), ("keys", source.left_out)):
        if unread:
            raise InvalidRequest(f"Its {what} {', '.join(unread)} would not be learnt.", "Leave them out of the file.")
    examples, room = list[Example](), Room(max_body_mb)
    for row in intake:
        if isinstance(row, Taken):
            room.take(row.examples)
            examples += row.examples
    if intake.refused:
        named = "; ".join(map(str, intake.refused[:5]))
        more = f"; and {len(intake.refused) - 5} more" if len(intake.refused) > 5 else ""
        details = [{"place": r.place, "problem": r.problem} for r in intake.refused[:TOLD]]
        raise InvalidRequest(f"{named}{more}.", "See the rows that can be learnt in the documentation.", details)
    if not examples:
        raise InvalidRequest("There is no row in it.", "At least one is needed.")
    return examples
