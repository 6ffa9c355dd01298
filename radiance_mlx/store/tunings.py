"""Fine-tuning jobs: what was asked for, beside the service's own job that does it."""

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ..errors import NotFound
from ..messages import Example
from . import acceptance, checkpoints, jobs
from .checkpoints import CheckpointRecord
from .database import Database, to_json
from .jobs import JobRecord


@dataclass(frozen=True, slots=True)
class TuningRecord:
    """`request` is plain data, as it was asked; `suffix` names the model that comes of it."""

    tuning_id: str
    job_id: str
    created: float
    suffix: str | None
    request: dict[str, Any]


Tuned = tuple[TuningRecord, JobRecord]
_COLUMNS = ", ".join(TuningRecord.__slots__)  # not the examples for validation, which may be large


class Tunings:
    """Part of the `Store`: each method is one short transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def one(self, tuning_id: str) -> Tuned:
        """A fine-tuning job and the job that does it. Raises `NotFound`."""
        with self._database.read() as db:
            found = _where(db, "WHERE tuning_id = ?", tuning_id)
        if not found:
            raise NotFound(f"There is no fine-tuning job {tuning_id}.", "List the jobs to see their ids.")
        return found[0]

    def of_job(self, job_id: str) -> Tuned | None:
        """The fine-tuning job that a job does, if it does one."""
        with self._database.read() as db:
            found = _where(db, "WHERE job_id = ?", job_id)
        return found[0] if found else None

    def known(self, idempotency_key: str, body_hash: str) -> Tuned | None:
        """The one that this key already made. Raises `IdempotencyMismatch` when that was with another body."""
        with self._database.read() as db:
            job = acceptance.known(db, idempotency_key, body_hash)
            found = [] if job is None else _where(db, "WHERE job_id = ?", job.job_id)
        return found[0] if found else None

    def page(
        self, metadata: Mapping[str, str], after: str | None, limit: int
    ) -> tuple[list[tuple[TuningRecord, JobRecord, CheckpointRecord | None]], bool]:
        """Those that have this metadata, newest first, from the one that follows `after`; and whether there are more.

        Each with its job, and the checkpoint that was published of it. Raises `NotFound` if `after` is none of them.
        """
        with self._database.read() as db:
            with closing(db.execute(f"SELECT {_COLUMNS} FROM tunings ORDER BY number DESC")) as rows:
                found = _with_metadata(map(_record, rows), metadata)
                if after is not None and not any(tuning.tuning_id == after for tuning in found):
                    raise NotFound(f"{after} is not in this list.")
                tunings = list(islice(found, limit + 1))
            tuned = _with_jobs(db, tunings[:limit])
            published = [job.checkpoint for _, job in tuned if job.state == "published" and job.checkpoint is not None]
            records = {record.checkpoint: record for record in checkpoints.many(db, published)}
            return [(tuning, job, records.get(job.checkpoint or "")) for tuning, job in tuned], len(tunings) > limit

    def names(self) -> dict[str, str]:
        """`checkpoint:suffix` → checkpoint, of those that were given a suffix; newest first."""
        with self._database.read() as db:
            rows = db.execute(
                """SELECT checkpoint, suffix FROM tunings JOIN jobs ON jobs.job_id = tunings.job_id
                   WHERE suffix IS NOT NULL AND state = 'published' ORDER BY tunings.number DESC"""
            )
            return {f"{row['checkpoint']}:{row['suffix']}": row["checkpoint"] for row in rows}

    def validation(self, job_ids: Sequence[str]) -> tuple[Example, ...]:
        """Examples that are to be measured after these jobs were learnt."""
        with self._database.read() as db:
            rows = db.execute(
                """SELECT validation FROM tunings WHERE job_id IN (SELECT value FROM json_each(?)) ORDER BY number""",
                (to_json(list(job_ids)),),
            ).fetchall()
        return tuple(Example.from_dict(one) for row in rows for one in json.loads(row["validation"]))


def insert(db: sqlite3.Connection, tuning: TuningRecord, validation: Sequence[Example]) -> None:
    """Inside a transaction that its caller holds."""
    examples = to_json([example.as_dict() for example in validation])
    row = (tuning.tuning_id, tuning.job_id, tuning.created, tuning.suffix, to_json(tuning.request), examples)
    db.execute(
        "INSERT INTO tunings (tuning_id, job_id, created, suffix, request, validation) VALUES (?, ?, ?, ?, ?, ?)", row
    )


def _where(db: sqlite3.Connection, condition: str, *values: str) -> list[Tuned]:
    rows = db.execute(f"SELECT {_COLUMNS} FROM tunings {condition}", values)
    return _with_jobs(db, [_record(row) for row in rows])


def _with_jobs(db: sqlite3.Connection, tunings: Sequence[TuningRecord]) -> list[Tuned]:
    return list(zip(tunings, jobs.many(db, [tuning.job_id for tuning in tunings]), strict=True))


def _with_metadata(tunings: Iterator[TuningRecord], metadata: Mapping[str, str]) -> Iterator[TuningRecord]:
    return (one for one in tunings if metadata.items() <= (one.request.get("metadata") or {}).items())


def _record(row: sqlite3.Row) -> TuningRecord:
    return TuningRecord(**{**dict(row), "request": json.loads(row["request"])})
