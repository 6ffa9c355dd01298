"""A store in a test: opened on a folder of its own, with a clock that stands still, and short ways to fill it.

Its fixtures are imported by name: `from stores import store as store`, and `clock`, on which it stands.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import radiance_mlx.store as store_package
from radiance_mlx.messages import Example
from radiance_mlx.store import CheckpointRecord, JobRecord, Store

BASE = "base-hash"
FIRST_DAY = 1_770_638_400.0  # 2026-02-09 12:00 UTC
ROOT = Path(store_package.__file__).parents[2]


class Clock:
    """Time that moves only when a test says so."""

    def __init__(self) -> None:
        self.now = FIRST_DAY

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    opened = Store(tmp_path, clock)
    yield opened
    opened.close()


def accept(store: Store, *texts: str, key: str | None = None, body_hash: str = "hash", **more: Any) -> JobRecord:
    examples = [Example(text=text) for text in texts or ("one",)]
    curated = {"examples.jsonl": b"curated"}
    job, _ = store.accept(
        examples, ["user:a"], raw=b"raw", curated=curated, idempotency_key=key, body_hash=body_hash, **more
    )
    return job


def record(checkpoint: str, parent: str | None = None, jobs: tuple[str, ...] = (), **more: Any) -> CheckpointRecord:
    values: dict[str, Any] = {
        "checkpoint": checkpoint,
        "number": int(checkpoint.rpartition("_")[2]),
        "base_hash": BASE,
        "parent": parent,
        "status": "stable",
        "created": FIRST_DAY,
        "jobs": jobs,
        "data_hash": "data",
        "files": {"adapters.safetensors": "sha"},
        "metrics": {"finetune_loss": 0.5},
        "config": {"r": 8},
    }
    return CheckpointRecord(**(values | more))


def train(store: Store, parent: str | None = None, **more: Any) -> str:
    """One job, all the way to a published checkpoint."""
    job = accept(store)
    checkpoint = store.start_batch([job.job_id], more.get("base_hash", BASE))
    store.publish(record(checkpoint, parent, (job.job_id,), **more), events=[("published", {"id": checkpoint})])
    return checkpoint


def chain(store: Store, length: int) -> list[str]:
    ids: list[str] = []
    for _ in range(length):
        ids.append(train(store, ids[-1] if ids else None))
    return ids


def statuses(store: Store) -> list[str]:
    return [one.status for one in store.checkpoints()]


def in_state(store: Store, state: str) -> str:
    """A new job, led to `state`."""
    job_id = accept(store, state="review" if state == "review" else "queued").job_id
    if state in ("training", "evaluating", "published", "rejected"):
        checkpoint = store.start_batch([job_id], BASE)
        if state == "published":
            store.publish(record(checkpoint, jobs=(job_id,)), events=[])
        elif state != "training":
            store.set_state([job_id], state)
    elif state not in ("review", "queued"):
        store.set_state([job_id], state)
    return job_id


def python(code: str, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
