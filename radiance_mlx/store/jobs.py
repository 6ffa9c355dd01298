"""Rows of jobs and their examples. Each function works inside a transaction that its caller holds."""

import json
import sqlite3
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

from ..errors import Cancelled, Conflict, NotFound
from ..messages import FINAL_STATES, Example, JobKind, JobState, Terms
from .database import optional_from_json, optional_json, to_json

#: what `set_state` may do. Into training and published lead `start_batch` and `publish` alone, and out of
#: them back to queued `requeue`, since a checkpoint is taken or given up with those steps
TRANSITIONS: dict[str, frozenset[str]] = {
    "review": frozenset({"queued", "cancelled", "quarantined"}),
    "queued": frozenset({"paused", "failed", "cancelled", "quarantined"}),
    "paused": frozenset({"queued", "failed", "cancelled", "quarantined"}),
    "training": frozenset({"evaluating", "rejected", "failed", "cancelled", "quarantined"}),
    "evaluating": frozenset({"rejected", "failed", "cancelled", "quarantined"}),
    **{state: frozenset() for state in FINAL_STATES},
}
IN_BATCH = frozenset({"training", "evaluating"})

_IN_LIST = "job_id IN (SELECT value FROM json_each(?))"


@dataclass(frozen=True, slots=True)
class JobRecord:
    """One accepted update, or one reconsolidation, as it stood when it was read."""

    job_id: str
    number: int
    state: str
    created: float
    updated: float
    tags: tuple[str, ...]
    example_count: int
    attempts: int
    checkpoint: str | None  # reserved while it trains, made when it is published
    error: dict[str, Any] | None  # code, message, hint
    notes: tuple[str, ...]
    progress: dict[str, Any] | None
    idempotency_key: str | None
    body_hash: str
    cancel_requested: bool = False  # while it trains: to be cancelled, not published
    consolidates: str | None = None  # the checkpoint whose whole log it trains anew; None: an update
    terms: Terms | None = None  # what it asks of its training: a batch of its own

    @property
    def kind(self) -> JobKind:
        """A reconsolidation has no examples of its own, and is never queued."""
        return "update" if self.consolidates is None else "reconsolidation"


def next_number(db: sqlite3.Connection) -> int:
    return int(db.execute("SELECT coalesce(max(number), 0) + 1 FROM jobs").fetchone()[0])


def insert(db: sqlite3.Connection, job: JobRecord, examples: Sequence[Example]) -> None:
    row = (job.number, job.job_id, job.state, job.created, job.updated, to_json(job.tags), job.example_count)
    db.execute(
        """INSERT INTO jobs
           (number, job_id, state, created, updated, tags, example_count, idempotency_key, body_hash, consolidates,
            terms)
           VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)""",
        (*row, job.idempotency_key, job.body_hash, job.consolidates, optional_json(job.terms and asdict(job.terms))),
    )
    db.executemany(
        "INSERT INTO examples VALUES (?, ?, ?)",
        ((job.number, position, to_json(example.as_dict())) for position, example in enumerate(examples)),
    )


def one(db: sqlite3.Connection, job_id: str) -> JobRecord:
    row = db.execute("SELECT * FROM jobs WHERE job_id = ?", (job_id,)).fetchone()
    if row is None:
        raise NotFound(f"There is no job {job_id}.", "List the jobs to see their ids.")
    return _record(row)


def by_key(db: sqlite3.Connection, idempotency_key: str) -> JobRecord | None:
    row = db.execute("SELECT * FROM jobs WHERE idempotency_key = ?", (idempotency_key,)).fetchone()
    return None if row is None else _record(row)


def many(db: sqlite3.Connection, job_ids: Iterable[str]) -> list[JobRecord]:
    """The named jobs in the order given, each once. Raises `NotFound`."""
    wanted = list(dict.fromkeys(job_ids))
    rows = db.execute(f"SELECT * FROM jobs WHERE {_IN_LIST}", (to_json(wanted),))
    found = {row["job_id"]: _record(row) for row in rows}
    return [found[job_id] if job_id in found else one(db, job_id) for job_id in wanted]


def newest(db: sqlite3.Connection, state: str | None, limit: int, before: int | None) -> list[JobRecord]:
    wanted = [("state = ?", state), ("number < ?", before)]
    given = [(condition, value) for condition, value in wanted if value is not None]
    where = " AND ".join(condition for condition, _ in given) or "TRUE"
    rows = db.execute(
        f"SELECT * FROM jobs WHERE {where} ORDER BY number DESC LIMIT ?",
        (*(value for _, value in given), limit),
    )
    return [_record(row) for row in rows]


def count(db: sqlite3.Connection) -> dict[str, int]:
    rows = db.execute("SELECT state, count(*) AS jobs FROM jobs GROUP BY state")
    return dict.fromkeys(get_args(JobState), 0) | {row["state"]: row["jobs"] for row in rows}


def in_states(db: sqlite3.Connection, states: Collection[str]) -> list[JobRecord]:
    """Oldest first."""
    rows = db.execute(
        "SELECT * FROM jobs WHERE state IN (SELECT value FROM json_each(?)) ORDER BY number",
        (to_json(sorted(states)),),
    )
    return [_record(row) for row in rows]


def examples(db: sqlite3.Connection, job_ids: Iterable[str]) -> list[tuple[str, Example]]:
    rows = db.execute(
        f"""SELECT job_id, body FROM jobs JOIN examples ON examples.job = jobs.number
            WHERE {_IN_LIST} ORDER BY job, position""",
        (to_json(list(job_ids)),),
    )
    return [(row["job_id"], Example.from_dict(json.loads(row["body"]))) for row in rows]


def last_accepted(db: sqlite3.Connection) -> float | None:
    row = db.execute("SELECT max(created) FROM jobs WHERE consolidates IS NULL").fetchone()
    return None if row[0] is None else float(row[0])


def last_consolidated(db: sqlite3.Connection, base_hash: str) -> int | None:
    row = db.execute(
        """SELECT max(checkpoints.number) FROM jobs JOIN checkpoints ON checkpoints.checkpoint = jobs.consolidates
           WHERE checkpoints.base_hash = ? AND (jobs.state != 'cancelled' OR jobs.cancel_requested)""",
        (base_hash,),
    ).fetchone()
    return None if row[0] is None else int(row[0])


def interrupted(db: sqlite3.Connection) -> list[tuple[str, list[JobRecord]]]:
    groups: dict[str, list[JobRecord]] = {}
    for job in in_states(db, IN_BATCH):
        assert job.checkpoint is not None
        groups.setdefault(job.checkpoint, []).append(job)
    return sorted(groups.items(), key=lambda group: int(group[0].rpartition("_")[2]))


def require(found: Sequence[JobRecord], states: Collection[str], wish: str) -> None:
    """Raise `Conflict` that names every job whose state is not one of `states`."""
    wrong = [job for job in found if job.state not in states]
    if wrong:
        first, *others = wrong
        more = "".join(f", {job.job_id} is {job.state}" for job in others)
        raise Conflict.about_job(
            first.job_id,
            lambda job: f"{job} is {first.state}{more}: {wish}.",
            f"This takes jobs that are {' or '.join(sorted(states)) or 'in some other state'}.",
            [{"job_id": job.job_id, "state": job.state} for job in wrong],
        )


def require_batch(found: Sequence[JobRecord], checkpoint: str, wish: str) -> None:
    """Raise `Conflict` unless every job is in training or evaluating for `checkpoint`."""
    require(found, IN_BATCH, wish)
    strange = [job.job_id for job in found if job.checkpoint != checkpoint]
    if strange:
        raise Conflict(f"{', '.join(strange)} trains for another checkpoint than {checkpoint}: {wish}.")


def require_wanted(found: Sequence[JobRecord], wish: str) -> None:
    """Raise `Cancelled` if somebody has asked for the end of one of the jobs."""
    unwanted = [job.job_id for job in found if job.cancel_requested]
    if unwanted:
        raise Cancelled(f"{', '.join(unwanted)} is to be cancelled: {wish}.")


def start(db: sqlite3.Connection, job_ids: Iterable[str], checkpoint: str, now: float) -> None:
    """`job_ids` go (again) into training for `checkpoint`, one more attempt counted."""
    db.execute(
        f"""UPDATE jobs SET state = 'training', attempts = attempts + 1, checkpoint = ?, progress = NULL,
            updated = ? WHERE {_IN_LIST}""",
        (checkpoint, now, to_json(list(job_ids))),
    )


def take_back_attempt(db: sqlite3.Connection, job_ids: Sequence[str], now: float) -> None:
    require(many(db, job_ids), IN_BATCH, "has no attempt to take back")
    db.execute(
        f"UPDATE jobs SET attempts = max(attempts - 1, 0), updated = ? WHERE {_IN_LIST}",
        (now, to_json(list(job_ids))),
    )


def requeue(db: sqlite3.Connection, job_ids: Sequence[str], count_attempt: bool, now: float) -> list[str]:
    found = many(db, job_ids)
    require(found, IN_BATCH, "cannot go back to the queue")
    left = [job.job_id for job in found if not job.cancel_requested]
    put_state(db, [job.job_id for job in found if job.cancel_requested], "cancelled", now)
    db.execute(
        f"""UPDATE jobs SET state = 'queued', attempts = attempts - ?, checkpoint = NULL, progress = NULL,
            updated = ? WHERE {_IN_LIST}""",
        (0 if count_attempt else 1, now, to_json(left)),
    )
    return left


def set_state(
    db: sqlite3.Connection,
    job_ids: Sequence[str],
    state: str,
    error: Mapping[str, Any] | None,
    notes: Sequence[str],
    now: float,
) -> None:
    sources = {source for source, targets in TRANSITIONS.items() if state in targets}
    require(many(db, job_ids), sources, f"cannot be set to {state}")
    put_state(db, job_ids, state, now, error)
    add_notes(db, job_ids, notes, now)


def put_state(
    db: sqlite3.Connection, job_ids: Iterable[str], state: str, now: float, error: Mapping[str, Any] | None = None
) -> None:
    """Without a look at the state before. `error` None leaves the one that is there."""
    document = optional_json(dict(error)) if error is not None else None
    db.execute(
        f"UPDATE jobs SET state = ?, updated = ?, error = coalesce(?, error) WHERE {_IN_LIST}",
        (state, now, document, to_json(list(job_ids))),
    )


def add_notes(db: sqlite3.Connection, job_ids: Iterable[str], notes: Sequence[str], now: float) -> None:
    found = many(db, job_ids)
    if notes:
        db.executemany(
            "UPDATE jobs SET notes = ?, updated = ? WHERE job_id = ?",
            [(to_json((*job.notes, *notes)), now, job.job_id) for job in found],
        )


def save_progress(db: sqlite3.Connection, job_ids: Iterable[str], progress: Mapping[str, Any], now: float) -> None:
    db.execute(
        f"UPDATE jobs SET progress = ?, updated = ? WHERE {_IN_LIST} AND state IN ('training', 'evaluating')",
        (to_json(dict(progress)), now, to_json(list(job_ids))),
    )


def cancel(db: sqlite3.Connection, job_id: str, now: float) -> JobRecord:
    job = one(db, job_id)
    if job.state in FINAL_STATES:
        raise Conflict.about_job(
            job_id,
            lambda name: f"{name} is {job.state} and cannot be cancelled.",
            "To take back what a published job taught, roll back to an earlier checkpoint."
            if job.state == "published"
            else "Nothing is left to be done for it.",
            {"job_id": job_id, "state": job.state},
        )
    if job.state in IN_BATCH:
        db.execute("UPDATE jobs SET cancel_requested = 1 WHERE job_id = ?", (job_id,))
        return one(db, job_id)
    put_state(db, [job_id], "cancelled", now)
    return one(db, job_id)


def pause(db: sqlite3.Connection, job_id: str, now: float) -> JobRecord:
    """A job that waits is queued no more. One that trains stays as it is: it is held by whoever trains it."""
    job = one(db, job_id)
    require([job], {"queued", "paused", *IN_BATCH}, "cannot be paused")
    if job.state == "queued":
        put_state(db, [job_id], "paused", now)
    return one(db, job_id)


def hold(db: sqlite3.Connection, job_id: str, now: float) -> None:
    """Its training has been stopped and its state kept: the checkpoint that it becomes stays reserved."""
    job = one(db, job_id)
    require([job], IN_BATCH, "does not train, and cannot be held")
    if job.cancel_requested:
        put_state(db, [job_id], "cancelled", now)
        return
    db.execute(
        "UPDATE jobs SET state = 'paused', attempts = max(attempts - 1, 0), updated = ? WHERE job_id = ?", (now, job_id)
    )


def resume(db: sqlite3.Connection, job_id: str, now: float) -> JobRecord:
    require([one(db, job_id)], {"paused"}, "cannot be resumed")
    put_state(db, [job_id], "queued", now)
    return one(db, job_id)


def _record(row: sqlite3.Row) -> JobRecord:
    values = dict(row)
    values["tags"] = tuple(json.loads(row["tags"]))
    values["notes"] = tuple(json.loads(row["notes"]))
    values["error"] = optional_from_json(row["error"])
    values["progress"] = optional_from_json(row["progress"])
    values["cancel_requested"] = bool(row["cancel_requested"])
    values["terms"] = None if row["terms"] is None else Terms(**json.loads(row["terms"]))
    return JobRecord(**values)
