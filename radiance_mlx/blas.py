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


def threads() -> int:
    """How many threads OpenBLAS divides a product among; 0 without OpenBLAS, or with one that does not tell."""
    count = getattr(_library, "openblas_get_num_threads", None)
    return int(count()) if count is not None else 0


def described() -> str:
    """The library and its threads, for figures: `OpenBLAS 0.3.21 … Haswell MAX_THREADS=128, 2 threads`; "" without."""
    config = getattr(_library, "openblas_get_config", None)
    if config is None:
        return ""
    config.restype = ctypes.c_char_p
    return f"{config().decode().strip()}, {threads()} threads"
