"""What a checkpoint has learnt and what it cost: anchors, metrics, intervals, and the rules that act on them."""

from .. import blas as blas  # before MLX
