"""The store, from the event loop: one thread owns the database, calls are awaited."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from .store import Store

T = TypeVar("T")


class StoreThread:
    """Runs functions of the `Store` one after another on its own thread."""

    def __init__(self, home: Path, clock: Callable[[], float] = time.time) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="radiance-store")
        try:
            self._store = self._executor.submit(Store, home, clock).result()
        except BaseException:
            self._executor.shutdown()
            raise

    async def __call__(self, work: Callable[[Store], T]) -> T:
        """`await store(lambda s: s.job(id))`. Raises what `work` raises."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, work, self._store)

    def close(self) -> None:
        """Waits for what has been asked, then closes the database."""
        self._executor.submit(self._store.close).result()
        self._executor.shutdown()
