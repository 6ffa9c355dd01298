"""The journal of what happened, in order, and a few values that are remembered by name."""

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..messages import EventKind
from .database import to_json


def append(db: sqlite3.Connection, kind: EventKind, data: Mapping[str, Any], now: float) -> int:
    cursor = db.execute("INSERT INTO events (at, kind, data) VALUES (?, ?, ?)", (now, kind, to_json(dict(data))))
    number = cursor.lastrowid
    assert number is not None
    named = [(job_id, number) for job_id in dict.fromkeys(data.get("jobs") or ())]
    db.executemany("INSERT INTO job_events (job_id, event) VALUES (?, ?)", named)
    return number


def append_all(db: sqlite3.Connection, events: Iterable[tuple[EventKind, Mapping[str, Any]]], now: float) -> None:
    for kind, data in events:
        append(db, kind, data, now)


def after(db: sqlite3.Connection, number: int, limit: int) -> list[dict[str, Any]]:
    rows = db.execute("SELECT * FROM events WHERE id > ? ORDER BY id LIMIT ?", (number, limit))
    return [_event(row) for row in rows]


def newest(db: sqlite3.Connection, kinds: Sequence[str], before: int | None, limit: int) -> list[dict[str, Any]]:
    marks = ", ".join("?" * len(kinds))
    rows = db.execute(
        f"SELECT * FROM events WHERE kind IN ({marks}) AND id < ? ORDER BY id DESC LIMIT ?",
        (*kinds, 2**63 - 1 if before is None else before, limit),
    )
    return [_event(row) for row in rows]


def of_job(db: sqlite3.Connection, job_id: str, number: int) -> list[dict[str, Any]]:
    rows = db.execute(
        """SELECT events.* FROM job_events JOIN events ON events.id = job_events.event
           WHERE job_events.job_id = ? AND job_events.event > ? ORDER BY job_events.event""",
        (job_id, number),
    )
    return [_event(row) for row in rows]


def _event(row: sqlite3.Row) -> dict[str, Any]:
    return {"id": row["id"], "at": row["at"], "kind": row["kind"], "data": json.loads(row["data"])}


def get(db: sqlite3.Connection, key: str) -> str | None:
    row = db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    return None if row is None else str(row["value"])


def put(db: sqlite3.Connection, key: str, value: str) -> None:
    db.execute("INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value", (key, value))
