"""Loads OpenBLAS ahead of MLX where Linux has it: the Linux wheel's own BLAS is some 30 times slower.

MLX takes the first BLAS that its process has loaded, so this must come before `mlx`. Every room that uses MLX
imports it in its `__init__`.
"""

import contextlib
import ctypes
import sys

_library: ctypes.CDLL | None = None
if sys.platform == "linux":
    with contextlib.suppress(OSError):
        _library = ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)


def _told() -> int:
    count = getattr(_library, "openblas_get_num_threads", None)
    return int(count()) if count is not None else 0


_ALL = _told()
_used = _ALL


def threads() -> int:
    """How many threads OpenBLAS has; 0 without OpenBLAS, or with one that does not tell."""
    return _ALL


def used() -> int:
    """Among how many of them products are divided now."""
    return _used


def use(count: int = 0) -> None:
    """Have the products that begin from now on divided among `count` threads; 0 or too many: all."""
    global _used
    count = min(count, threads()) or threads()
    set_threads = getattr(_library, "openblas_set_num_threads", None)
    if count != _used and set_threads is not None:
        set_threads(count)
        _used = count


def described() -> str:
    """The library and its threads, for figures: `OpenBLAS 0.3.21 … Haswell MAX_THREADS=128, 2 threads`; "" without."""
    config = getattr(_library, "openblas_get_config", None)
    if config is None:
        return ""
    config.restype = ctypes.c_char_p
    return f"{config().decode().strip()}, {threads()} threads"
