"""The layers below the lowest adapted one, computed once for each row and kept.

Nothing in them changes while a batch trains, and a position's output depends on the row's own tokens alone: what
comes out for a row is the same in every step. With all of a micro-batch's rows known, training begins at the first
adapted layer. Only what goes from layer to layer as one array can be kept so: `install_prefix` tries it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .batches import padded
from .head import alike
from .step import Piece, noted
from .targets import Targets, layer_paths
from .tree import TrainingTree


class _Reached(Exception):
    """The first adapted layer has been reached, and no more is wanted of this pass."""

    def __init__(self, hidden: mx.array) -> None:
        super().__init__()
        self.hidden = hidden


class Prefix:
    """What is kept for one tree, whose layers `first` and later are adapted.

    Without `keeps` nothing is kept here: passes begin at the first adapted layer only where what they begin with is
    handed in.
    """

    def __init__(self, tree: TrainingTree, first: int, keeps: bool) -> None:
        self._tree, self._keeps = tree, keeps
        self._kept: dict[bytes, mx.array] = {}
        #: what passes begin with at the first adapted layer; None: they begin at the beginning
        self.given: mx.array | None = None
        self._passing = False
        layers = tree.module.layers
        for layer in layers[:first]:
            layer.__class__ = self._below(type(layer))
        layers[first].__class__ = self._lowest(type(layers[first]))

    # --- the layers' part ------------------------------------------------------------------------

    def _below(self, kind: type) -> type:
        def call(layer: nn.Module, x: mx.array, *more: Any, **named: Any) -> Any:
            if self.given is not None:
                return x
            out = kind.__call__(layer, x, *more, **named)
            self._tree.tape.note_dear(out)
            return out

        return type(kind.__name__, (kind,), {"__call__": call})

    def _lowest(self, kind: type) -> type:
        def call(layer: nn.Module, x: mx.array, *more: Any, **named: Any) -> Any:
            if self._passing:
                raise _Reached(x)
            return kind.__call__(layer, x if self.given is None else self.given, *more, **named)

        return type(kind.__name__, (kind,), {"__call__": call})

    @property
    def nbytes(self) -> int:
        """Bytes of all kept rows."""
        return sum(row.nbytes for row in self._kept.values())

    # --- rows ------------------------------------------------------------------------------------

    def pieces(self, batch: tuple[Any, ...], out: list[mx.array]) -> Iterator[Piece]:
        """If rows are kept, append to `out` what the first adapted layer is given for them, (rows, length, dims).

        Each new row is computed by itself: whatever company it comes in, also after an interruption, it is the same
        to the last bit.
        """
        if not self._keeps:
            return
        tokens, ends = np.array(batch[0]), np.array(batch[1])[:, 1]
        keys = [row[:end].tobytes() for row, end in zip(tokens, ends, strict=True)]
        for key, row, end in zip(keys, tokens, ends, strict=True):
            if key not in self._kept:
                hidden = self.compute(mx.array(row[None, : padded(int(end))]))
                yield from noted(self._tree)
                self._kept[key] = mx.contiguous(hidden[0, :end])
                del hidden
                yield Piece([self._kept[key]], barrier=True)
        out.append(side_by_side([self._kept[key] for key in keys], tokens.shape[1] - 1))

    def compute(self, inputs: mx.array) -> mx.array:
        """What the first adapted layer is given for `inputs` (rows, length): (rows, length, dims), not evaluated."""
        self._passing = True
        try:
            with self._tree.forward(mx.random.key(0)):
                self._tree.module(inputs)
        except _Reached as reached:
            return reached.hidden
        finally:
            self._passing = False
        raise AssertionError("the model does not call its layers")


def side_by_side(rows: Sequence[mx.array], length: int) -> mx.array:
    """Rows of (their inputs, dims) as one array (rows, length, dims); what comes after a row's end is zero."""
    return mx.stack([mx.pad(row, ((0, length - row.shape[0]), (0, 0))) for row in rows])


def lowest_adapted(module: nn.Module, targets: Targets) -> int:
    """How many layers there are below the first adapted one; 0 also where that would be no place to begin."""
    paths = layer_paths(module)
    adapted = [i for i, path in enumerate(paths) if any(p.startswith(path + ".") for p in targets.paths)]
    outside = any(not p.startswith(tuple(path + "." for path in paths)) for p in targets.paths)
    return 0 if not adapted or outside or len(paths) != len(module.layers) else adapted[0]


def install_prefix(tree: TrainingTree, tokens: int, limit: int, *, keeps: bool = True) -> None:
    """Give `tree` its `prefix`, if it has one and a pass that begins after it is the same.

    It `keeps` rows if what it makes of `tokens`, theirs, fits into `limit` bytes: all of them, for a micro-batch needs
    all of its own. If they do not fit, there is none.
    """
    first = lowest_adapted(tree.module, tree.targets)
    if not first or limit <= 0:
        return
    layers = tree.module.layers[: first + 1]
    kinds = [type(layer) for layer in layers]
    probe = mx.array([[0, 1, 2, 3]])
    before = tree.module(probe)
    prefix = Prefix(tree, first, keeps)
    try:
        hidden = prefix.compute(probe)
        tree.prefix = prefix
        with tree.forward(mx.random.key(0), hidden):
            same = alike(tree.module(probe), before) and (not keeps or tokens * hidden[0, 0].nbytes <= limit)
    except (ValueError, TypeError, AttributeError, AssertionError):
        same = False
    if same:
        return
    tree.prefix = None
    for layer, kind in zip(layers, kinds, strict=True):
        layer.__class__ = kind
