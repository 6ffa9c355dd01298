"""The tables, as named steps from an empty database to the present one.

A step that was ever released is not changed any more: another one is added after it.
"""

import sqlite3
from collections.abc import Callable
from contextlib import AbstractContextManager

from ..errors import StoreError

Migration = Callable[[sqlite3.Connection], None]


def migrate(
    write: Callable[[], AbstractContextManager[sqlite3.Connection]],
    clock: Callable[[], float],
    migrations: tuple[Migration, ...],
) -> None:
    """Run the steps that this database has not seen, each in one transaction with its record.

    Raises `StoreError`, and changes nothing, when the database has seen a step that is not known here.
    """
    with write() as db:
        db.execute("CREATE TABLE IF NOT EXISTS migrations (name TEXT PRIMARY KEY, at REAL NOT NULL)")
        done = {row["name"] for row in db.execute("SELECT name FROM migrations")}
        unknown = sorted(done - {step.__name__ for step in migrations})
        if unknown:
            raise StoreError(
                f"The database was made by a newer radiance_mlx: it has {', '.join(unknown)}.",
                "Upgrade radiance_mlx, or choose another home with --home.",
                unknown,
            )
    for step in migrations:
        if step.__name__ not in done:
            with write() as db:
                step(db)
                db.execute("INSERT INTO migrations VALUES (?, ?)", (step.__name__, clock()))


def create_jobs(db: sqlite3.Connection) -> None:
    db.execute(
        """CREATE TABLE jobs (
            number INTEGER PRIMARY KEY,
            job_id TEXT NOT NULL UNIQUE,
            state TEXT NOT NULL,
            created REAL NOT NULL,
            updated REAL NOT NULL,
            tags TEXT NOT NULL,
            example_count INTEGER NOT NULL,
            attempts INTEGER NOT NULL DEFAULT 0,
            checkpoint TEXT,
            error TEXT,
            notes TEXT NOT NULL DEFAULT '[]',
            progress TEXT,
            idempotency_key TEXT UNIQUE,
            body_hash TEXT NOT NULL
        )"""
    )
    db.execute("CREATE INDEX jobs_by_state ON jobs (state, number)")
    db.execute(
        """CREATE TABLE examples (
            job INTEGER NOT NULL REFERENCES jobs (number),
            position INTEGER NOT NULL,
            body TEXT NOT NULL,
            PRIMARY KEY (job, position)
        )"""
    )


def create_checkpoints(db: sqlite3.Connection) -> None:
    db.execute(
        """CREATE TABLE reservations (
            number INTEGER PRIMARY KEY,
            checkpoint TEXT NOT NULL UNIQUE,
            base_hash TEXT NOT NULL,
            at REAL NOT NULL
        )"""
    )
    db.execute(
        """CREATE TABLE checkpoints (
            checkpoint TEXT PRIMARY KEY,
            number INTEGER NOT NULL UNIQUE,
            base_hash TEXT NOT NULL,
            parent TEXT REFERENCES checkpoints (checkpoint),
            status TEXT NOT NULL,
            created REAL NOT NULL,
            jobs TEXT NOT NULL,
            data_hash TEXT NOT NULL,
            files TEXT NOT NULL,
            metrics TEXT NOT NULL,
            config TEXT NOT NULL,
            notes TEXT NOT NULL,
            damaged TEXT,
            pruned INTEGER NOT NULL DEFAULT 0
        )"""
    )
    db.execute("CREATE INDEX checkpoints_by_base ON checkpoints (base_hash, number)")
    db.execute(
        """CREATE TABLE stable (
            base_hash TEXT PRIMARY KEY,
            checkpoint TEXT NOT NULL REFERENCES checkpoints (checkpoint)
        )"""
    )


def create_events(db: sqlite3.Connection) -> None:
    db.execute(
        """CREATE TABLE events (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            at REAL NOT NULL,
            kind TEXT NOT NULL,
            data TEXT NOT NULL
        )"""
    )


def create_meta(db: sqlite3.Connection) -> None:
    db.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)")


def remember_cancellations(db: sqlite3.Connection) -> None:
    """A job in training is cancelled once its training has stopped; the wish must survive until then."""
    db.execute("ALTER TABLE jobs ADD COLUMN cancel_requested INTEGER NOT NULL DEFAULT 0")


def tell_reconsolidations(db: sqlite3.Connection) -> None:
    """A job that trains the whole log anew, of which checkpoint; and a checkpoint that came of one."""
    db.execute("ALTER TABLE jobs ADD COLUMN consolidates TEXT REFERENCES checkpoints (checkpoint)")
    db.execute("ALTER TABLE checkpoints ADD COLUMN reconsolidated INTEGER NOT NULL DEFAULT 0")


def keep_uploads_and_tunings(db: sqlite3.Connection) -> None:
    """Uploaded files, fine-tuning jobs made of them, and what such a job asks of its training (JSON)."""
    db.execute(
        """CREATE TABLE uploads (
            number INTEGER PRIMARY KEY AUTOINCREMENT,
            file_id TEXT NOT NULL UNIQUE,
            filename TEXT NOT NULL,
            purpose TEXT NOT NULL,
            bytes INTEGER NOT NULL,
            rows INTEGER NOT NULL,
            sha256 TEXT NOT NULL,
            created REAL NOT NULL
        )"""
    )
    db.execute(
        """CREATE TABLE tunings (
            number INTEGER PRIMARY KEY AUTOINCREMENT,
            tuning_id TEXT NOT NULL UNIQUE,
            job_id TEXT NOT NULL UNIQUE REFERENCES jobs (job_id),
            created REAL NOT NULL,
            suffix TEXT,
            request TEXT NOT NULL,
            validation TEXT NOT NULL
        )"""
    )
    db.execute("ALTER TABLE jobs ADD COLUMN terms TEXT")


def index_events_by_job(db: sqlite3.Connection) -> None:
    """Which events name a job, so that following one does not read the whole journal at every look."""
    db.execute(
        """CREATE TABLE job_events (
            job_id TEXT NOT NULL,
            event INTEGER NOT NULL REFERENCES events (id),
            PRIMARY KEY (job_id, event)
        ) WITHOUT ROWID"""
    )
    db.execute(
        """INSERT OR IGNORE INTO job_events (job_id, event)
           SELECT job.value, events.id FROM events, json_each(events.data, '$.jobs') AS job
           WHERE job.value IS NOT NULL"""
    )


def count_examples_of_uploads(db: sqlite3.Connection) -> None:
    """What was called rows was a number of examples."""
    db.execute("ALTER TABLE uploads RENAME COLUMN rows TO examples")


def index_events_by_kind(db: sqlite3.Connection) -> None:
    """Nearly all events are the progress of training: what else happened is found without reading those."""
    db.execute("CREATE INDEX events_by_kind ON events (kind, id)")


MIGRATIONS: tuple[Migration, ...] = (
    create_jobs,
    create_checkpoints,
    create_events,
    create_meta,
    remember_cancellations,
    tell_reconsolidations,
    keep_uploads_and_tunings,
    index_events_by_job,
    count_examples_of_uploads,
    index_events_by_kind,
)
