"""Loads OpenBLAS ahead of MLX where Linux has it: the Linux wheel's own BLAS is some 30 times slower.

MLX takes the first BLAS that its process has loaded, so this must come before `mlx`. Every room that uses MLX
imports it in its `__init__`; it is the whole purpose of this module to be imported.
"""

import contextlib
import ctypes
import sys

if sys.platform == "linux":
    with contextlib.suppress(OSError):
        ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
