"""What lies below everything that is adapted, computed once for each row and kept.

Nothing in it changes while a batch trains, and a position's output depends on the row's own tokens alone: what comes
out for a row is the same in every step. With all of a micro-batch's rows known, training begins where the first
adapted module is: at its layer, or within that layer after what comes before it and is added to the layer's input
(the attention, where MLPs are adapted). Only what goes on as one array can be kept so: `install_prefix` tries it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .batches import as_batch, of_like_length, padded
from .encoding import Encoded
from .head import alike
from .kept import row_key
from .step import Piece, noted
from .targets import EXPERTS, LINEAR, Targets, layer_paths
from .tree import TrainingTree

#: tokens that go through these layers together
TOGETHER = 1024


class _Reached(Exception):
    """The first adapted module has been reached, and no more is wanted of this pass."""

    def __init__(self, hidden: mx.array) -> None:
        super().__init__()
        self.hidden = hidden


class Prefix:
    """What is kept for one tree, whose layers `first` and later are adapted.

    `before` are the children of layer `first` that are done before its adapted ones. Without `keeps` nothing is kept
    here: passes begin at the first adapted module only where what they begin with is handed in.
    """

    def __init__(self, tree: TrainingTree, first: int, before: Sequence[str], keeps: bool) -> None:
        self._tree, self.keeps = tree, keeps
        self._kept: dict[bytes, mx.array] = {}
        #: what passes begin with at the first adapted module; None: they begin at the beginning
        self.given: mx.array | None = None
        self._passing = False
        #: where it ends, to tell what has been made by one that ends elsewhere
        self.depth = "_".join([str(first), *before])
        self._kinds: list[tuple[nn.Module, type]] = []
        *below, lowest = tree.module.layers[: first + 1]
        for layer in below:
            self._replace(layer, self._below)
        for name, child in _working_children(lowest) if before else ():
            self._replace(child, self._done_before if name in before else self._done_after)
        self._replace(lowest, self._through if before else self._lowest)

    def _replace(self, module: nn.Module, make: Callable[[type], Callable[..., Any]]) -> None:
        kind = type(module)
        self._kinds.append((module, kind))
        module.__class__ = type(kind.__name__, (kind,), {"__call__": make(kind)})

    def remove(self) -> None:
        """Leave the tree as it was."""
        for module, kind in self._kinds:
            module.__class__ = kind

    # --- the modules' part -----------------------------------------------------------------------

    def _below(self, kind: type) -> Callable[..., Any]:
        def call(layer: nn.Module, x: mx.array, *more: Any, **named: Any) -> Any:
            if self.given is not None:
                return x
            out = kind.__call__(layer, x, *more, **named)
            self._tree.tape.note_dear(out)
            return out

        return call

    def _lowest(self, kind: type) -> Callable[..., Any]:
        def call(layer: nn.Module, x: mx.array, *more: Any, **named: Any) -> Any:
            if self._passing:
                raise _Reached(x)
            return kind.__call__(layer, x if self.given is None else self.given, *more, **named)

        return call

    def _through(self, kind: type) -> Callable[..., Any]:
        """What its children give is added to what it was given: of those that give nothing, nothing is."""

        def call(layer: nn.Module, x: mx.array, *more: Any, **named: Any) -> Any:
            out = kind.__call__(layer, x if self.given is None else self.given, *more, **named)
            if self._passing:
                raise _Reached(out)
            return out

        return call

    def _done_before(self, kind: type) -> Callable[..., Any]:
        def call(child: nn.Module, x: mx.array, *more: Any, **named: Any) -> Any:
            return kind.__call__(child, x, *more, **named) if self.given is None else mx.zeros_like(x)

        return call

    def _done_after(self, kind: type) -> Callable[..., Any]:
        def call(child: nn.Module, x: mx.array, *more: Any, **named: Any) -> Any:
            return mx.zeros_like(x) if self._passing else kind.__call__(child, x, *more, **named)

        return call

    @property
    def nbytes(self) -> int:
        """Bytes of all kept rows."""
        return sum(row.nbytes for row in self._kept.values())

    # --- rows ------------------------------------------------------------------------------------

    def missing(self, rows: Sequence[Encoded]) -> dict[bytes, Encoded]:
        """Those of `rows` that are not kept, each once, by `kept.row_key`."""
        own = {row_key(row.tokens[:-1]): row for row in rows if len(row.tokens) > 1}
        return {key: row for key, row in own.items() if key not in self._kept}

    def recall(self, kept: Mapping[bytes, mx.array]) -> None:
        """If rows are kept, keep these too: what such a prefix has made of others, by `kept.row_key`."""
        if self.keeps:
            self._kept.update(kept)

    def part(self, keys: Iterable[bytes]) -> dict[bytes, mx.array]:
        """What is kept of these."""
        return {key: self._kept[key] for key in keys if key in self._kept}

    def fill(self, rows: Sequence[Encoded]) -> Iterator[Piece]:
        """If rows are kept, keep all of `rows`, many at a time: the same rows in the same order give the same bits."""
        if not self.keeps:
            return
        new = list(self.missing(rows).values())
        for places in of_like_length(new, TOGETHER):
            chunk = [new[i] for i in places]
            hidden = self.compute(as_batch(chunk)[0][:, :-1])
            yield from noted(self._tree)
            parts = rows_of(hidden, chunk)
            del hidden
            self._kept.update((row_key(row.tokens[:-1]), part) for row, part in zip(chunk, parts, strict=True))
            yield Piece(parts, barrier=True)

    def pieces(self, batch: tuple[Any, ...], out: list[mx.array]) -> Iterator[Piece]:
        """If rows are kept, append to `out` what passes begin with for them, (rows, length, dims).

        A row that is not there yet is computed by itself: whatever company it comes in, also after an interruption,
        it is the same to the last bit.
        """
        if not self.keeps:
            return
        tokens, ends = np.array(batch[0]), np.array(batch[1])[:, 1]
        keys = [row_key(row[:end]) for row, end in zip(tokens, ends, strict=True)]
        for key, row, end in zip(keys, tokens, ends, strict=True):
            if key not in self._kept:
                hidden = self.compute(mx.array(row[None, : padded(int(end))]))
                yield from noted(self._tree)
                self._kept[key] = mx.contiguous(hidden[0, :end])
                del hidden
                yield Piece([self._kept[key]], barrier=True)
        out.append(side_by_side([self._kept[key] for key in keys], tokens.shape[1] - 1))

    def compute(self, inputs: mx.array) -> mx.array:
        """What passes begin with for `inputs` (rows, length): (rows, length, dims), not evaluated."""
        self._passing = True
        try:
            with self._tree.forward(mx.random.key(0)):
                self._tree.module(inputs)
        except _Reached as reached:
            return reached.hidden
        finally:
            self._passing = False
        raise AssertionError("the model does not call its layers")


def rows_of(hidden: mx.array, rows: Sequence[Encoded]) -> list[mx.array]:
    """Each row's own part, (its inputs, dims), of `hidden` (rows, length, dims)."""
    return [mx.contiguous(whole[: len(row.tokens) - 1]) for row, whole in zip(rows, hidden, strict=True)]


def side_by_side(rows: Sequence[mx.array], length: int) -> mx.array:
    """Rows of (their inputs, dims) as one array (rows, length, dims); what comes after a row's end is zero."""
    places, start = np.zeros((len(rows), length), dtype=np.int32), 1
    for number, row in enumerate(rows):
        end = start + row.shape[0]
        places[number, : row.shape[0]] = np.arange(start, end)
        start = end
    nothing = mx.zeros((1, rows[0].shape[1]), rows[0].dtype)
    return mx.concatenate([nothing, *rows])[mx.array(places)]


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
    probe = mx.array([[0, 1, 2, 3]])
    whole = tree.module(probe)
    for before in _befores(tree, first):
        prefix = Prefix(tree, first, before, keeps)
        try:
            hidden = prefix.compute(probe)
            tree.prefix = prefix
            with tree.forward(mx.random.key(0), hidden):
                begun = tree.module(probe)
            # within a layer, everything that follows is given the very same: a layer that adds up otherwise shows
            same = bool(mx.array_equal(begun, whole).item()) if before else alike(begun, whole)
            size = tokens * hidden[0, 0].nbytes
        except (ValueError, TypeError, AttributeError, AssertionError):
            same = False
        if same and (not keeps or size <= limit):
            return
        tree.prefix = None
        prefix.remove()
        if same:
            return


def _befores(tree: TrainingTree, first: int) -> list[list[str]]:
    """What may be done before the adapted children of layer `first`: the others that work, or none of them."""
    layer, path = tree.module.layers[first], layer_paths(tree.module)[first]
    adapted = {p[len(path) + 1 :].split(".")[0] for p in tree.targets.paths if p.startswith(path + ".")}
    others = [name for name, _ in _working_children(layer) if name not in adapted]
    return [others, []] if others else [[]]


def _working_children(layer: nn.Module) -> list[tuple[str, nn.Module]]:
    """Those with linears inside, or experts."""
    children = [(name, child) for name, child in layer.children().items() if isinstance(child, nn.Module)]
    return [(name, m) for name, m in children if any(isinstance(inner, (*LINEAR, *EXPERTS)) for inner in m.modules())]
