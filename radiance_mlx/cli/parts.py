"""Examples on their way to the service: one update where they fit into one, else named parts of one.

Nothing is sent before every row has been looked at. Examples wait on disk, so that a large file takes no memory.
"""

import json
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..errors import InvalidRequest, RadianceError
from ..messages import Example
from ..rows.limits import MOST_EXAMPLES
from . import output

if TYPE_CHECKING:
    from ..client import Client

#: how large an update may be is the service's own setting, which is asked for above this
ASK_BYTES = 2**19
MEMORY_BYTES = 2**25
#: for tags and what stands around examples
ENVELOPE_BYTES = 2**15


@dataclass
class Part:
    """What of the spool goes into one update: its place in the file, and where its examples came from."""

    start: int = 0
    size: int = 0
    places: list[str] = field(default_factory=list)


class Spool:
    """Examples as lines of JSON, with the places they came from."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(MEMORY_BYTES)  # noqa: SIM115
        self._sizes: list[int] = []
        self._places: list[str] = []

    def __enter__(self) -> "Spool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, place: str, examples: Sequence[Example]) -> None:
        """Keep a row's examples."""
        for example in examples:
            line = json.dumps(example.as_dict(), ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
            self._file.write(line)
            self._sizes.append(len(line))
            self._places.append(place)

    @property
    def bytes(self) -> int:
        return sum(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)

    def parts(self, most_bytes: int, most_examples: int = MOST_EXAMPLES) -> list[Part]:
        """In order, each within the limits. Raises `BadInput` for an example that fits into none."""
        parts = [Part()]
        for place, size in zip(self._places, self._sizes, strict=True):
            if size > most_bytes:
                raise output.BadInput(
                    f"{place} has {size / 2**20:.1f} MB, more than one update may have; nothing was sent.",
                    "Raise server.max_body_mb, or leave it out.",
                )
            part = parts[-1]
            if part.places and (part.size + size > most_bytes or len(part.places) == most_examples):
                parts.append(part := Part(part.start + part.size))
            part.size += size
            part.places.append(place)
        return parts

    def examples(self, part: Part) -> list[dict[str, Any]]:
        """As they are sent."""
        self._file.seek(part.start)
        return [json.loads(line) for line in self._file.read(part.size).split(b"\n") if line]


def send(client: "Client", spool: Spool, tags: list[str], key: str | None) -> Iterator[dict[str, Any]]:
    """Post all of it; the service's answer to each update as it comes, with `part`, `of` and `examples`.

    If one fails after others were accepted, or the command is interrupted then, it is said which were.
    """
    parts = spool.parts(_most_bytes(client, spool))
    if len(parts) == 1:
        yield {**_post(client, spool, parts[0], tags, key), "part": 1, "of": 1, "examples": len(spool)}
        return
    name = key or uuid.uuid4().hex
    accepted: list[str] = []
    try:
        for number, part in enumerate(parts, 1):
            answer = _post(client, spool, part, tags, f"{name}/{number}-of-{len(parts)}")
            accepted.append(answer["job_id"])
            yield {**answer, "part": number, "of": len(parts), "examples": len(part.places), "idempotency_key": name}
    except (RadianceError, KeyboardInterrupt) as error:
        if len(accepted) == len(parts):
            raise
        raise _half_sent(error, accepted, len(parts), name) from error


def _half_sent(error: BaseException, accepted: list[str], count: int, name: str) -> RadianceError:
    why = error.message if isinstance(error, RadianceError) else "interrupted"
    done = f"{len(accepted)} of {count} parts were accepted and are learnt"
    if not accepted:
        done = f"none of {count} parts was surely accepted"
    said = RadianceError(
        f"Not everything was sent: {done}. ({why})",
        f"To send the rest, give the same command again with --idempotency-key {name}: no part is learnt twice."
        + (" To take a part back: jobs cancel JOB." if accepted else ""),
        {"accepted": accepted, "parts": count, "idempotency_key": name},
    )
    said.code = "half_sent"
    if isinstance(error, RadianceError):
        said.status = error.status
    return said


def _most_bytes(client: "Client", spool: Spool) -> int:
    if spool.bytes <= ASK_BYTES:
        return 2**62
    server = client.info().config.get("server") or {}
    return max(1, int(float(server.get("max_body_mb", 16)) * 2**20) - ENVELOPE_BYTES)


def _post(client: "Client", spool: Spool, part: Part, tags: list[str], key: str | None) -> dict[str, Any]:
    """The service's remarks about single examples get the place they came from."""
    try:
        return client.update(spool.examples(part), tags, idempotency_key=key).raw
    except InvalidRequest as error:
        if isinstance(error.details, list):
            error.details = [_with_place(fault, part.places) for fault in error.details]
        raise


def _with_place(fault: Any, places: Sequence[str]) -> Any:
    index = fault.get("example") if isinstance(fault, dict) else None
    if isinstance(index, int) and index < len(places):
        return {"where": places[index], **fault}
    return fault
