"""Files that were uploaded: their rows in the database, their bodies under `data/files`.

A job that was made of a file has its examples, so that a file may go at any time.
"""

import hashlib
import secrets
import sqlite3
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path

from ..errors import NotFound, StoreError
from .database import Database
from .files import write_durably


@dataclass(frozen=True, slots=True)
class UploadRecord:
    """`examples` is how many it is; `bytes` and `sha256` are of the body."""

    file_id: str
    filename: str
    purpose: str
    bytes: int
    examples: int
    sha256: str
    created: float


_COLUMNS = ", ".join(UploadRecord.__slots__)


class Uploads:
    """Part of the `Store`: each method is one short transaction."""

    def __init__(self, database: Database, folder: Path, clock: Callable[[], float]) -> None:
        self._database, self._folder, self._clock = database, folder, clock
        known = {upload.file_id for upload in self.all()}
        for body in folder.iterdir():  # a crash came between a body and its row
            if body.name not in known:
                body.unlink()

    def add(self, filename: str, purpose: str, content: bytes, examples: int) -> UploadRecord:
        """Keep a file: its body is on disk before it is known."""
        upload = UploadRecord(
            file_id=f"file-{secrets.token_hex(12)}",
            filename=filename,
            purpose=purpose,
            bytes=len(content),
            examples=examples,
            sha256=hashlib.sha256(content).hexdigest(),
            created=self._clock(),
        )
        with self._database.write() as db:
            db.execute(f"INSERT INTO uploads ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)", astuple(upload))
            write_durably(self._folder / upload.file_id, content)
        return upload

    def one(self, file_id: str) -> UploadRecord:
        """Raises `NotFound`."""
        with self._database.read() as db:
            return _one(db, file_id)

    def all(self) -> list[UploadRecord]:
        """Newest first."""
        with self._database.read() as db:
            return [_record(row) for row in db.execute(f"SELECT {_COLUMNS} FROM uploads ORDER BY number DESC")]

    def content(self, file_id: str) -> bytes:
        """The body as it came. Raises `NotFound`; `StoreError` if it is not what it was."""
        record = self.one(file_id)
        try:
            content = (self._folder / file_id).read_bytes()
        except OSError as error:
            raise StoreError(f"The content of {file_id} cannot be read: {error.strerror}.") from error
        if hashlib.sha256(content).hexdigest() != record.sha256:
            raise StoreError(f"The content of {file_id} is not what was uploaded.", "Delete it and upload it again.")
        return content

    def delete(self, file_id: str) -> None:
        """Jobs that were made of it keep what they need. Raises `NotFound`."""
        with self._database.write() as db:
            _one(db, file_id)
            db.execute("DELETE FROM uploads WHERE file_id = ?", (file_id,))
        (self._folder / file_id).unlink(missing_ok=True)


def _one(db: sqlite3.Connection, file_id: str) -> UploadRecord:
    row = db.execute(f"SELECT {_COLUMNS} FROM uploads WHERE file_id = ?", (file_id,)).fetchone()
    if row is None:
        raise NotFound(f"There is no file {file_id}.", "List the files to see their ids.")
    return _record(row)


def _record(row: sqlite3.Row) -> UploadRecord:
    return UploadRecord(**dict(row))
