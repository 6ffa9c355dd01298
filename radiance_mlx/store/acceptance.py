"""How an update becomes a job: its files and its rows, on the disk before anybody is told so."""

import shutil
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import IdempotencyMismatch
from ..messages import Example, Terms
from . import jobs
from .files import write_unpublished
from .jobs import JobRecord


def known(db: sqlite3.Connection, idempotency_key: str | None, body_hash: str) -> JobRecord | None:
    """The job that this key already made. Raises `IdempotencyMismatch` when that was with another body."""
    job = None if idempotency_key is None else jobs.by_key(db, idempotency_key)
    if job is not None and job.body_hash != body_hash:
        raise IdempotencyMismatch.about_job(
            job.job_id,
            lambda owner: f"The idempotency key {idempotency_key!r} belongs to {owner}, which had another body.",
            "Send a new key with a new body, or the same body again.",
            {"job_id": job.job_id},
        )
    return job


def new_job(
    db: sqlite3.Connection,
    examples: Sequence[Example],
    tags: Sequence[str],
    state: str,
    idempotency_key: str | None,
    body_hash: str,
    now: float,
    consolidates: str | None = None,
    terms: Terms | None = None,
) -> JobRecord:
    """Insert the next job with its examples; it gets the next number."""
    number = jobs.next_number(db)
    job = JobRecord(
        job_id=f"job_{number:06d}",
        number=number,
        state=state,
        created=now,
        updated=now,
        tags=tuple(tags),
        example_count=len(examples),
        attempts=0,
        checkpoint=None,
        error=None,
        notes=(),
        progress=None,
        idempotency_key=idempotency_key,
        body_hash=body_hash,
        consolidates=consolidates,
        terms=terms,
    )
    jobs.insert(db, job, examples)
    return job


def write_files(data: Path, job_id: str, raw: bytes, curated: Mapping[str, bytes]) -> None:
    """Put the job's data on the disk. The job is not committed yet: what lies under its id is a leftover."""
    if any(Path(name).name != name or name in ("", "..") for name in curated):
        raise ValueError(f"curated names must be plain file names: {sorted(curated)}")
    folder = data / "curated" / job_id
    shutil.rmtree(folder, ignore_errors=True)
    folders = [data / "raw"]
    if curated:
        folder.mkdir()
        folders += [folder, folder.parent]
    files = {data / "raw" / f"{job_id}.json": raw}
    files |= {folder / name: content for name, content in curated.items()}
    write_unpublished(files, folders)
