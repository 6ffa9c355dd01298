"""An output head only where there are targets.

With the prompt masked, logits are needed at answer positions alone. The head of a training tree is made to
take just those rows of its input: equal loss and gradients, less time and memory. Where exactly one module
can be the head, it is used; otherwise (`find_head` gives None) the full head is.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .targets import LINEAR


class TargetRows:
    """Positions whose logits are wanted: flat indices (n,) int32, or None for all. `hits` counts head calls."""

    def __init__(self) -> None:
        self.positions: mx.array | None = None
        self.hits = 0

    def take(self, hidden: mx.array) -> mx.array:
        """(rows, length, dims) → (1, n, dims)."""
        self.hits += 1
        if self.positions is None:
            return hidden
        return hidden.reshape(-1, hidden.shape[-1])[self.positions][None]


def install_head(tree: nn.Module, vocab_size: int) -> TargetRows | None:
    """Make the head of `tree` take target rows; None (and nothing changed) unless it is certain which it is.

    Only this tree's instances change, not their classes, nor trees that share their arrays.
    """
    heads = _candidates(tree, vocab_size)
    if not heads:
        return None
    rows = TargetRows()
    originals = [(module, type(module)) for module in heads]
    for module in heads:
        module.__class__ = _taking(type(module), rows)
    probe = mx.array([[0, 1]])
    try:
        full = tree(probe)
        calls = rows.hits
        rows.positions = mx.array([1])
        part = tree(probe)
        certain = calls == 1 and part.shape[1] == 1 and _alike(part[0, 0], full[0, 1])
    except (ValueError, TypeError, AttributeError):
        certain = False
    rows.positions = None
    if certain:
        return rows
    for module, kind in originals:
        module.__class__ = kind
    return None


def _alike(part: mx.array, full: mx.array) -> bool:
    """Equal but for rounding, which in half precision differs with the shape of a product."""
    part, full = part.astype(mx.float32), full.astype(mx.float32)
    return bool((mx.abs(part - full).max() <= 0.02 * (full.max() - full.min())).item())


def _candidates(tree: nn.Module, vocab_size: int) -> list[nn.Module]:
    inside = {id(m) for layer in tree.layers if layer is not None for _, m in layer.named_modules()}
    outside = [m for _, m in tree.named_modules() if id(m) not in inside]
    return [
        m for m in outside if hasattr(m, "as_linear") or (isinstance(m, LINEAR) and m.weight.shape[0] == vocab_size)
    ]


def _taking(kind: type, rows: TargetRows) -> type:
    method = "as_linear" if hasattr(kind, "as_linear") else "__call__"

    def call(self: Any, x: mx.array) -> mx.array:
        return getattr(kind, method)(self, rows.take(x))

    return type(kind.__name__, (kind,), {method: call})
