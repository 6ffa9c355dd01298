"""The connection: how it is opened, what a transaction is, and what an unusable database is told as."""

import errno
import json
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import DiskFull, StoreError
from .migrations import MIGRATIONS, Migration, migrate

HINT = "See that the disk has room, that this user may write there, and that no other program holds the file."
MAKE_ROOM = (
    "Make room on that disk, then try again: nothing was stored, and nothing that was stored before is lost. "
    "storage.keep_checkpoints says how many checkpoints are kept."
)
NO_DATABASE = "The file is damaged or no database. Put a backup in its place, or move it away to start anew."


class Database:
    """One SQLite connection for one thread at a time; every change goes through `write`."""

    def __init__(self, path: Path, clock: Callable[[], float], migrations: tuple[Migration, ...] = MIGRATIONS) -> None:
        """Open or create the database and bring its tables up to date. Raises `StoreError`."""
        self._path = path
        with self._told():
            # transactions begin where the code says so, not where the sqlite3 module guesses
            self._connection = sqlite3.connect(path, timeout=5, isolation_level=None, check_same_thread=False)
        try:
            self._connection.row_factory = sqlite3.Row
            with self._told():
                self._configure()
            migrate(self.write, clock, migrations)
        except BaseException:
            self.close()
            raise

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A transaction that changes something: all of it is on disk afterwards, or none on any error."""
        with self._transaction("BEGIN IMMEDIATE") as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """A transaction whose queries all see the same state."""
        with self._transaction("BEGIN") as connection:
            yield connection

    def close(self) -> None:
        """May be called more than once."""
        self._connection.close()

    def _configure(self) -> None:
        mode = self._connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
        if mode != "wal":
            raise StoreError(
                f"{self._path} cannot keep a write-ahead log (journal mode {mode}).",
                "Keep the home on a local disk, not on a network share.",
            )
        self._connection.execute("PRAGMA synchronous=FULL")
        self._connection.execute("PRAGMA foreign_keys=ON")
        if sys.platform == "darwin":
            self._connection.execute("PRAGMA fullfsync=1")
            self._connection.execute("PRAGMA checkpoint_fullfsync=1")

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        with self._told():
            self._connection.execute(begin)
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    # the error that led here is the one to tell
                    with suppress(sqlite3.Error):
                        self._connection.execute("ROLLBACK")
                raise

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turn what the disk or the file is to blame for into `StoreError`; a bug of ours passes as it is."""
        try:
            yield
        except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
            raise
        except (sqlite3.OperationalError, OSError) as error:
            if _no_room(error):
                why = getattr(error, "strerror", None) or error
                raise DiskFull(f"The disk with {self._path} is full: {why}.", MAKE_ROOM) from error
            raise StoreError(f"The store {self._path} cannot be used: {error}.", HINT) from error
        except sqlite3.DatabaseError as error:
            raise StoreError(f"The store {self._path} cannot be read: {error}.", NO_DATABASE) from error


def _no_room(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL


def to_json(value: Any) -> str:
    """Compact, and in ASCII: text that is not valid UTF-8 (a lone surrogate) is kept as it came."""
    return json.dumps(value, separators=(",", ":"))


def optional_json(value: Any) -> str | None:
    return None if value is None else to_json(value)


def optional_from_json(text: str | None) -> Any:
    return None if text is None else json.loads(text)
