"""Fine-tuning jobs: what was asked for, beside the service's own job that does it."""

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import NotFound
from ..messages import Example
from . import acceptance, jobs
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

    def all(self) -> list[Tuned]:
        """Newest first."""
        with self._database.read() as db:
            return _where(db, "ORDER BY number DESC")

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
    rows = db.execute(f"SELECT * FROM tunings {condition}", values).fetchall()
    return [
        (
            TuningRecord(row["tuning_id"], row["job_id"], row["created"], row["suffix"], json.loads(row["request"])),
            jobs.one(db, row["job_id"]),
        )
        for row in rows
    ]
