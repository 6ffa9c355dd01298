"""Commands in a test, as on a machine where nothing is set.

The fixture is imported by name, and serves every test of the file: `from commands import _clean as _clean`.
"""

import os
from pathlib import Path

import pytest

from radiance_mlx.cli import output


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No RADIANCE_… of the machine, no config.yaml of the repository."""
    for name in [name for name in os.environ if name.startswith("RADIANCE_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    output.out.cache_clear()
    output.err.cache_clear()
