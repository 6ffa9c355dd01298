"""An output head, and the last layer's MLP, only where there are targets.

With the prompt masked, logits are needed at answer positions alone. The head of a training tree is made to
take just those rows of its input: equal loss and gradients, less time and memory. Where exactly one module
can be the head, it is used; otherwise (`install_head` gives None) the full head is. What the last layer does to
each position by itself is then done to those rows only, too: nobody looks at the others any more.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .targets import LINEAR


@dataclass(frozen=True)
class Found:
    """What was found out about a base: the head's candidates, the head itself where nothing bends its logits, and the
    parts of the last layer that can be done at some rows only; all as paths.
    """

    candidates: tuple[str, ...]
    direct: str | None
    narrowed: tuple[str, ...]


class TargetRows:
    """Positions whose logits are wanted: flat indices (n,) int32, or None for all. `hits` counts head calls.

    Without `narrows` the last layer's parts are done at all positions even so.

    `project` maps rows of the head's input (n, dims) to the model's logits (n, vocabulary), where that is all that
    becomes of them; None where the model does more with what its head gives.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.positions: mx.array | None = None
        self.narrows = True
        self.hits = 0
        self.project: Callable[[mx.array], mx.array] | None = None
        self.found: Found | None = None
        self._taken: mx.array | None = None

    def take(self, hidden: mx.array) -> mx.array:
        """(rows, length, dims) → (1, n, dims)."""
        self.hits += 1
        if self.positions is not None:
            hidden = self._taken = hidden.reshape(-1, hidden.shape[-1])[self.positions][None]
        return hidden

    def only(self, function: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
        """`function` of the wanted positions of `x` (rows, length, dims), and 0 at the others."""
        if self.positions is None or not self.narrows:
            return function(x)
        y = function(x.reshape(-1, x.shape[-1])[self.positions][None])[0]
        return mx.zeros((x.shape[0] * x.shape[1], y.shape[-1]), y.dtype).at[self.positions].add(y).reshape(x.shape)

    @contextlib.contextmanager
    def only_at(self, positions: mx.array, *, narrows: bool = True) -> Iterator[None]:
        """Inside, logits are computed at `positions` only; nothing is held afterwards."""
        self.positions, self.narrows = positions, narrows
        try:
            yield
        finally:
            self.positions = self._taken = None

    def hidden(self, module: nn.Module, inputs: mx.array, positions: mx.array) -> mx.array:
        """What the head of `module` is given at `positions`, (n, dims); its logits are not computed."""
        with self.only_at(positions):
            module(inputs)
            assert self._taken is not None
            return self._taken[0]


def install_head(tree: nn.Module, vocab_size: int, *, narrow: bool = True) -> TargetRows | None:
    """Make the head of `tree` take target rows; None (and nothing changed) unless it is certain which it is.

    With `narrow` the last layer does, too. Layers that are computed once more for the gradient must not: by then
    the rows are forgotten. Only this tree's instances change, not their classes, nor trees that share their arrays.
    """
    heads = _candidates(tree, vocab_size)
    if not heads:
        return None
    rows = TargetRows(vocab_size)
    originals = [(module, type(module)) for module in heads]
    for module in heads:
        module.__class__ = _taking(type(module), rows)
    probe = mx.array([[0, 1]])
    try:
        full = tree(probe)
        calls = rows.hits
        rows.positions = mx.array([1])
        part = tree(probe)
        certain = calls == 1 and part.shape[1] == 1 and alike(part[0, 0], full[0, 1])
    except (ValueError, TypeError, AttributeError):
        certain = False
    rows.positions = None
    if certain:
        hidden = rows.hidden(tree, probe, mx.array([1]))
        direct = next((o for o in originals if _gives(_projection(o), hidden, part[0, 0])), None)
        rows.project = _projection(direct) if direct else None
        narrowed = _narrow_last_layer(tree, rows, hidden.shape[-1]) if narrow else []
        paths = {id(module): path for path, module in tree.named_modules()}
        rows.found = Found(
            tuple(paths[id(module)] for module in heads),
            paths[id(direct[0])] if direct else None,
            tuple(paths[id(part)] for part in narrowed),
        )
        return rows
    for module, kind in originals:
        module.__class__ = kind
    return None


def install_found(tree: nn.Module, vocab_size: int, found: Found, *, narrow: bool = True) -> TargetRows:
    """As `install_head` on another tree of the same base, whose head is not adapted; nothing is tried again."""
    rows, modules = TargetRows(vocab_size), dict(tree.named_modules())
    if found.direct is not None:
        rows.project = _projection((modules[found.direct], type(modules[found.direct])))
    for path in found.candidates:
        modules[path].__class__ = _taking(type(modules[path]), rows)
    for path in found.narrowed if narrow else ():
        modules[path].__class__ = _narrowed(type(modules[path]), rows)
    rows.found = found
    return rows


def unadapted(head: TargetRows | None, adapted: Iterable[str]) -> TargetRows | None:
    """`head`, if all is known about it and none of the `adapted` modules is, or may be, the head."""
    found = head.found if head is not None else None
    return None if found is None or set(found.candidates) & set(adapted) else head


def serve_places(tree: nn.Module, head: TargetRows | None) -> TargetRows | None:
    """Have `tree`, which answers, compute logits at single places when it is asked to, as the base's `head` can."""
    return None if head is None or head.found is None else install_found(tree, head.vocab_size, head.found)


def _narrow_last_layer(tree: nn.Module, rows: TargetRows, dims: int) -> list[nn.Module]:
    """Have the last layer's position-wise parts done at `rows` only, if the logits there stay what they were."""
    done = []
    layer = tree.layers[-1]
    parts = [] if layer is None else [m for m in layer.children().values() if isinstance(m, nn.Module)]
    parts = [m for m in parts if any(isinstance(inner, LINEAR) for inner in m.modules())]
    probe, place = mx.array([[0, 1, 2, 3]]), mx.array([2])
    before = rows.hidden(tree, probe, place)
    for part in parts:
        if not _is_position_wise(part, dims, before.dtype):
            continue
        kind = type(part)
        part.__class__ = _narrowed(kind, rows)
        try:
            same = alike(rows.hidden(tree, probe, place), before)
        except (ValueError, TypeError, AttributeError, IndexError):
            same = False
        if same:
            done.append(part)
        else:
            part.__class__ = kind
    return done


def _is_position_wise(part: nn.Module, dims: int, dtype: mx.Dtype) -> bool:
    """Whether a position's output depends on nothing but its input, and is of the same size."""
    x = mx.random.normal((1, 4, dims), key=mx.random.key(0)).astype(dtype)
    try:
        whole, alone = part(x), part(x[:, 2:3])
        return whole.shape == x.shape and alike(alone[0, 0], whole[0, 2])
    except (ValueError, TypeError, AttributeError, IndexError):
        return False


def _narrowed(kind: type, rows: TargetRows) -> type:
    def call(self: Any, x: mx.array, *more: Any, **named: Any) -> mx.array:
        return rows.only(lambda x: kind.__call__(self, x, *more, **named), x)

    return type(kind.__name__, (kind,), {"__call__": call})


def _projection(original: tuple[nn.Module, type]) -> Callable[[mx.array], mx.array]:
    module, kind = original
    return partial(getattr(kind, _method(kind)), module)


def _gives(project: Callable[[mx.array], mx.array], hidden: mx.array, logits: mx.array) -> bool:
    """To the last bit: a bend of the logits may be slight where they are small."""
    try:
        return bool(mx.array_equal(project(hidden)[0], logits).item())
    except ValueError:  # of other shapes
        return False


def _method(kind: type) -> str:
    return "as_linear" if hasattr(kind, "as_linear") else "__call__"


def alike(part: mx.array, full: mx.array) -> bool:
    """Equal but for rounding, which in half precision differs with the shape of a product."""
    tolerance = 1e-3 if full.dtype == mx.float32 else 0.02
    part, full = part.astype(mx.float32), full.astype(mx.float32)
    return bool((mx.abs(part - full).max() <= tolerance * (full.max() - full.min())).item())


def _candidates(tree: nn.Module, vocab_size: int) -> list[nn.Module]:
    inside = {id(m) for layer in tree.layers if layer is not None for _, m in layer.named_modules()}
    outside = [m for _, m in tree.named_modules() if id(m) not in inside]
    return [
        m for m in outside if hasattr(m, "as_linear") or (isinstance(m, LINEAR) and m.weight.shape[0] == vocab_size)
    ]


def _taking(kind: type, rows: TargetRows) -> type:
    method = _method(kind)

    def call(self: Any, x: mx.array) -> mx.array:
        return getattr(kind, method)(self, rows.take(x))

    return type(kind.__name__, (kind,), {method: call})
