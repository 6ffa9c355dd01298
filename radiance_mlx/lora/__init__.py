"""LoRA: finding target modules, the adapter bank, sliced training, adapter files. No threads, no HTTP."""

from .. import blas as blas  # before MLX
