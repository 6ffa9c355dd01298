"""Under which conditions something was measured: for the files under metrics/. No MLX: the event loop writes some."""

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .. import __version__

_PACKAGES = ("mlx", "mlx-lm", "numpy", "transformers")


def conditions(backend: str, device: str, seed: int, config: Mapping[str, Any]) -> dict[str, Any]:
    """Versions, machine and seed; of `config`, all that the figures depend on, the hash."""
    return {
        "versions": {"radiance-mlx": __version__, **{name: _version(name) for name in _PACKAGES}},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "backend": backend,
        "device": device,
        "seed": seed,
        "config_hash": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
