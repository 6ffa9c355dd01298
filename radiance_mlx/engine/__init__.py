"""The engine: one thread that owns MLX. Import `radiance_mlx.engine.thread` only; the rest loads MLX."""

from .. import blas as blas  # before MLX
