"""Rows of checkpoints, their lineage, and the stable pointer of each base model.

Each function works inside a transaction that its caller holds.
"""

import json
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from ..errors import CheckpointDamaged, Conflict, NotFound
from .database import to_json

#: with which status a checkpoint may come to the lineage, and with which it may only be recorded
STATUS_OF_JOB_STATE = {"published": ("stable", "risky"), "rejected": ("candidate", "risky", "rolled_back")}


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """One adapter that was made whole: where it came from, what it is, what became of it."""

    checkpoint: str
    number: int
    base_hash: str
    parent: str | None  # None: trained from the base
    status: str  # candidate, stable, risky, rolled_back
    created: float
    jobs: tuple[str, ...]
    data_hash: str
    files: dict[str, str]  # name → sha256
    metrics: dict[str, Any]
    config: dict[str, Any]
    notes: tuple[str, ...] = ()
    damaged: str | None = None  # what is wrong with its files
    pruned: bool = False  # its folder was removed to save room
    reconsolidated: bool = False  # trained from the base over the whole log of its parent's line

    @property
    def verdict(self) -> dict[str, Any]:
        """What the policy said of it; empty if it was not asked."""
        return (self.metrics.get("evaluation") or {}).get("verdict") or {}

    @property
    def rejected(self) -> bool:
        """Whether the policy refused it. It is served only if somebody goes to it by hand."""
        return bool(self.verdict.get("outcome") == "rejected")


def reserve(db: sqlite3.Connection, base_hash: str, now: float) -> str:
    """The next checkpoint id of this home; once given, it is not given again."""
    number = db.execute(
        """SELECT max(coalesce((SELECT max(number) FROM reservations), 0),
                      coalesce((SELECT max(number) FROM checkpoints), 0)) + 1"""
    ).fetchone()[0]
    checkpoint = f"A_{datetime.fromtimestamp(now, UTC):%Y-%m-%d}_{number:04d}"
    db.execute("INSERT INTO reservations VALUES (?, ?, ?, ?)", (number, checkpoint, base_hash, now))
    return checkpoint


def is_newest(db: sqlite3.Connection, checkpoint: str) -> bool:
    """Whether no id was given after this one."""
    row = db.execute("SELECT checkpoint FROM reservations ORDER BY number DESC LIMIT 1").fetchone()
    return row is not None and bool(row["checkpoint"] == checkpoint)


def insert(db: sqlite3.Connection, record: CheckpointRecord) -> None:
    """Raises `Conflict` when its id or number is taken, or its parent is not of the same base."""
    taken = db.execute(
        "SELECT 1 FROM checkpoints WHERE checkpoint = ? OR number = ?", (record.checkpoint, record.number)
    ).fetchone()
    if taken:
        raise Conflict(f"{record.checkpoint} is published already.", "A checkpoint is published once.")
    if record.parent is not None and one(db, record.parent).base_hash != record.base_hash:
        raise Conflict(f"The parent {record.parent} of {record.checkpoint} belongs to another base model.")
    values = asdict(record)
    for name in ("jobs", "files", "metrics", "config", "notes"):
        values[name] = to_json(values[name])
    db.execute(
        f"INSERT INTO checkpoints ({', '.join(values)}) VALUES ({', '.join(f':{name}' for name in values)})",
        values,
    )


def one(db: sqlite3.Connection, checkpoint: str) -> CheckpointRecord:
    row = db.execute("SELECT * FROM checkpoints WHERE checkpoint = ?", (checkpoint,)).fetchone()
    if row is None:
        raise NotFound(f"There is no checkpoint {checkpoint}.", "List the checkpoints to see their ids.")
    return _record(row)


def many(db: sqlite3.Connection, names: Sequence[str]) -> list[CheckpointRecord]:
    """Those of `names` that there are, in no order."""
    rows = db.execute(
        "SELECT * FROM checkpoints WHERE checkpoint IN (SELECT value FROM json_each(?))", (to_json(list(names)),)
    )
    return [_record(row) for row in rows]


def oldest_first(db: sqlite3.Connection, base_hash: str | None) -> list[CheckpointRecord]:
    if base_hash is None:
        rows = db.execute("SELECT * FROM checkpoints ORDER BY number")
    else:
        rows = db.execute("SELECT * FROM checkpoints WHERE base_hash = ? ORDER BY number", (base_hash,))
    return [_record(row) for row in rows]


def lineage(db: sqlite3.Connection, base_hash: str, checkpoint: str | None) -> list[CheckpointRecord]:
    if checkpoint is None:
        return []
    if one(db, checkpoint).base_hash != base_hash:
        raise Conflict(f"{checkpoint} belongs to another base model.", "Each base model has its own lineage.")
    rows = db.execute(
        """WITH RECURSIVE chain (id, depth) AS (
               VALUES (?, 0)
               UNION ALL
               SELECT parent, depth + 1 FROM checkpoints JOIN chain ON checkpoint = id
               WHERE parent IS NOT NULL
           )
           SELECT checkpoints.* FROM chain JOIN checkpoints ON checkpoint = id ORDER BY depth""",
        (checkpoint,),
    )
    return [_record(row) for row in rows]


def stable(db: sqlite3.Connection, base_hash: str) -> str | None:
    row = db.execute("SELECT checkpoint FROM stable WHERE base_hash = ?", (base_hash,)).fetchone()
    return None if row is None else str(row["checkpoint"])


def point(db: sqlite3.Connection, base_hash: str, checkpoint: str | None) -> None:
    """Set the stable pointer; None is the base itself."""
    if checkpoint is None:
        db.execute("DELETE FROM stable WHERE base_hash = ?", (base_hash,))
    else:
        db.execute(
            """INSERT INTO stable VALUES (?, ?)
               ON CONFLICT (base_hash) DO UPDATE SET checkpoint = excluded.checkpoint""",
            (base_hash, checkpoint),
        )


def require_usable(db: sqlite3.Connection, base_hash: str, checkpoint: str) -> CheckpointRecord:
    """The checkpoint, if the pointer of `base_hash` may move to it."""
    record = one(db, checkpoint)
    if record.base_hash != base_hash:
        raise Conflict(f"{checkpoint} belongs to another base model.", "Choose one of this base's lineage.")
    if record.pruned:
        raise Conflict(
            f"The files of {checkpoint} were removed to save room.",
            "Choose a newer checkpoint; storage.keep_checkpoints says how many are kept.",
        )
    if record.damaged is not None:
        raise CheckpointDamaged(f"{checkpoint} is damaged: {record.damaged}.", "Choose another checkpoint.")
    return record


def move(db: sqlite3.Connection, base_hash: str, target: str | None) -> tuple[str | None, list[str]]:
    """Move the pointer and mark what it leaves; the old place, and the ids left behind, newest first.

    What leads to the target is the lineage now: whatever of it was rolled back is stable again.
    """
    old = stable(db, base_hash)
    if target is not None:
        reached = require_usable(db, base_hash, target)
        if reached.status == "candidate":
            set_status(db, [target], served_status(reached))
    line = lineage(db, base_hash, target)
    for record in line:
        if record.status == "rolled_back":
            set_status(db, [record.checkpoint], served_status(record))
    kept = {r.checkpoint for r in line}
    left = [r.checkpoint for r in lineage(db, base_hash, old) if r.checkpoint not in kept]
    set_status(db, left, "rolled_back")
    point(db, base_hash, target)
    return old, left


def served_status(record: CheckpointRecord) -> str:
    """What a checkpoint serves as: what its measures made it stays known, however it came to serve."""
    return "risky" if record.verdict.get("outcome") in ("risky", "rejected") else "stable"


def set_status(db: sqlite3.Connection, checkpoints: Iterable[str], status: str) -> None:
    db.executemany(
        "UPDATE checkpoints SET status = ? WHERE checkpoint = ?",
        [(status, checkpoint) for checkpoint in checkpoints],
    )


def mark_damaged(db: sqlite3.Connection, checkpoint: str, why: str | None) -> None:
    one(db, checkpoint)
    db.execute("UPDATE checkpoints SET damaged = ? WHERE checkpoint = ?", (why, checkpoint))


def mark_pruned(db: sqlite3.Connection, checkpoints: Iterable[str]) -> None:
    for record in [one(db, checkpoint) for checkpoint in checkpoints]:
        if stable(db, record.base_hash) == record.checkpoint:
            raise Conflict(f"{record.checkpoint} is the stable checkpoint of its base and must be kept.")
        db.execute("UPDATE checkpoints SET pruned = 1 WHERE checkpoint = ?", (record.checkpoint,))


def _record(row: sqlite3.Row) -> CheckpointRecord:
    values = dict(row)
    for name in ("files", "metrics", "config"):
        values[name] = json.loads(row[name])
    for name in ("jobs", "notes"):
        values[name] = tuple(json.loads(row[name]))
    for name in ("pruned", "reconsolidated"):
        values[name] = bool(row[name])
    return CheckpointRecord(**values)
