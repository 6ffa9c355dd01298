"""One process per home: a kernel lock, which ends with its process however that ends."""

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from ..errors import HomeLocked, StoreError
from .files import write_durably


class HomeLock:
    """The right to work on `home`, as a context manager.

    `state/lock` carries the lock. `state/holder.json` only tells people who holds it: one that a killed
    process left behind is overwritten.
    """

    def __init__(self, home: Path, clock: Callable[[], float] = time.time) -> None:
        self._home = home
        self._clock = clock
        self._holder = home / "state" / "holder.json"
        # by default the lock could be released only on the thread that took it, and where flock is missing
        # it would turn into a file that outlives its process
        self._lock = FileLock(home / "state" / "lock", thread_local=False, fallback_to_soft=False)

    def acquire(self) -> None:
        """Take the lock at once, or raise `HomeLocked` that names the process which has it."""
        try:
            self._holder.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(blocking=False)
        except Timeout:
            raise self._locked() from None
        except (OSError, NotImplementedError) as error:
            raise self._unusable(error) from error
        try:
            write_durably(self._holder, json.dumps(self._self_description()).encode())
        except OSError as error:
            self._lock.release()
            raise self._unusable(error) from error

    def release(self) -> None:
        """Give the lock back; nothing happens when it is not held."""
        if self._lock.is_locked:
            with suppress(OSError):
                self._holder.unlink(missing_ok=True)
            self._lock.release()

    def __enter__(self) -> "HomeLock":
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _self_description(self) -> dict[str, Any]:
        # program and subcommand only: later arguments may hold a token
        command = " ".join([_program(Path(sys.argv[0])), *sys.argv[1:2]])
        return {"pid": os.getpid(), "host": platform.node(), "started": self._clock(), "command": command}

    def _locked(self) -> HomeLocked:
        holder = _read_holder(self._holder)
        who = "another process"
        if holder:
            since = datetime.fromtimestamp(holder["started"]).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
            who = f"process {holder['pid']} on {holder['host']} ({holder['command']}) since {since}"
        return HomeLocked(
            f"The home {self._home} is in use by {who}.",
            "Stop that process first, or choose another home with --home.",
            holder,
        )

    def _unusable(self, error: Exception) -> StoreError:
        return StoreError(
            f"The home {self._home} cannot be locked: {error}.",
            "It must be a folder on a local disk in which this user may write.",
        )


def _program(started: Path) -> str:
    return f"python -m {started.parent.name}" if started.name == "__main__.py" else started.name


def _read_holder(path: Path) -> dict[str, Any] | None:
    """Who holds the lock, or None when the file is missing, half there, or of another make."""
    try:
        holder = json.loads(path.read_bytes())
        return {
            "pid": int(holder["pid"]),
            "host": str(holder["host"]),
            "started": float(holder["started"]),
            "command": str(holder["command"]),
        }
    except (OSError, ValueError, TypeError, KeyError):
        return None
