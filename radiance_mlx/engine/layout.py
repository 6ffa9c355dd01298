"""How a base's weights lie in memory on the CPU.

x Wᵀ of few rows x is bound by how OpenBLAS copies W into its own order, and its kernels with AVX2 copy a third faster
where W lies transposed, those with AVX-512 slower (docs/benchmarks.md). Only the order in memory changes: shapes,
values and whoever reads them do not.
"""

import mlx.core as mx
import mlx.nn as nn

from .. import blas

#: threads of OpenBLAS with which it was measured, and its cores that gain by it
MEASURED, GAINING = (1, 2), ("Haswell", "Zen")


def transpose_here() -> bool:
    """Whether the default device multiplies faster by transposed weights."""
    return blas.threads() in MEASURED and blas.core() in GAINING and mx.default_device() == mx.cpu


def transpose_weights(model: nn.Module) -> None:
    """Let the weights of all plain linears of `model` lie transposed, and of its embeddings those that may be the head.

    Those are all whose shape no linear has. One at a time, so that no more than one of them is there twice.
    """
    linears = [m for m in model.modules() if type(m) is nn.Linear]
    embeddings = [m for m in model.modules() if type(m) is nn.Embedding]
    shapes = {m.weight.shape for m in linears}
    for module in (*linears, *(m for m in embeddings if m.weight.shape not in shapes)):
        module.weight = mx.contiguous(module.weight.T).T
        mx.eval(module.weight)
