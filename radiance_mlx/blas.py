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


def _told(name: str) -> int:
    function = getattr(_library, name, None)
    return int(function()) if function is not None else 0


#: of how it divides its work (`openblas_get_parallel`): threads of its own. Of OpenMP's, fewer must not be used while a
#: product is under way: memory of those left out would be freed
_OWN_THREADS = 1
_ALL = _told("openblas_get_num_threads")
_used = _ALL


def threads() -> int:
    """How many threads OpenBLAS has; 0 without OpenBLAS, or with one that does not tell."""
    return _ALL


def core() -> str:
    """The kind of processor for which the library's kernels were written that it has picked: `Zen`; "" if unknown."""
    name = getattr(_library, "openblas_get_corename", None)
    if name is None:
        return ""
    name.restype = ctypes.c_char_p
    return str(name().decode())


def used() -> int:
    """Among how many of them products are divided now."""
    return _used


def can_use_fewer() -> bool:
    """Whether `use` has an effect."""
    return _told("openblas_get_parallel") == _OWN_THREADS


def use(count: int = 0) -> None:
    """Have the products that begin from now on divided among `count` threads; 0 or too many: all.

    Nothing happens with a library that must not be asked for it while it works.
    """
    global _used
    count = min(count, threads()) or threads()
    if _library is not None and count != _used and can_use_fewer():
        _library.openblas_set_num_threads(count)
        _used = count


def takes_small(columns: int, rows: int, inner: int) -> bool:
    """Whether float32 x Wᵀ of `(rows, inner)` and `(columns, inner)` goes to a kernel for small matrices.

    Those read W as it lies, where all others copy it into an order of their own first. The library is asked itself.
    """
    permits = getattr(_library, f"sgemm_small_matrix_permit_{core().upper()}", None)
    if permits is None:
        return False
    permits.argtypes = [ctypes.c_int] * 2 + [ctypes.c_long] * 3 + [ctypes.c_float] * 2
    return bool(permits(1, 0, columns, rows, inner, 1.0, 0.0))


def described() -> str:
    """The library and its threads, for figures: `OpenBLAS 0.3.21 … Haswell MAX_THREADS=128, 2 threads`; "" without."""
    config = getattr(_library, "openblas_get_config", None)
    if config is None:
        return ""
    config.restype = ctypes.c_char_p
    return f"{config().decode().strip()}, {threads()} threads"
