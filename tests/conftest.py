"""What every test can count on: no setting of this machine reaches the service under test."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before MLX is loaded: the workers share the cores
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from running import Process

from radiance_mlx import blas as blas  # before any test imports MLX

settings.register_profile("shared machine", deadline=None)  # an example may wait for others that compute
settings.load_profile("shared machine")
pytest.register_assert_rewrite("served", "tuning")  # what they assert is told with its values, as in a test


@pytest.fixture(autouse=True, scope="session")
def _nothing_of_this_machine() -> Iterator[None]:
    """`RADIANCE_…` variables of the machine are put away while the tests run.

    So is the one by which Python keeps no compiled files: every process that a test starts would compile all anew.
    """
    names = [name for name in os.environ if name.startswith("RADIANCE_") or name == "PYTHONDONTWRITEBYTECODE"]
    kept = {name: os.environ.pop(name) for name in names}
    yield
    os.environ.update(kept)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """`start(**settings)`: a service process on this test's own home; none outlives the test."""
    with ExitStack() as stack:

        def make(*arguments: str, home: Path = tmp_path / "home", **options: Any) -> Process:
            process = Process(home, *arguments, **options)
            stack.callback(process.close)
            return process

        yield make


@pytest.fixture
def unlimited() -> Iterator[None]:
    """MLX's memory limit is the process's: put back after a test that lowers it."""
    import mlx.core as mx

    before = mx.set_memory_limit(2**40)
    mx.set_memory_limit(before)
    yield
    mx.set_memory_limit(before)


@pytest.fixture(scope="module")
def nano() -> Any:
    """The embedded model as the engine loads it, on the CPU."""
    from radiance_mlx.config import Config
    from radiance_mlx.engine import backend
    from radiance_mlx.engine.model import load_base

    backend.select("cpu", Config().memory)
    return load_base(Config(), cpu=True)
