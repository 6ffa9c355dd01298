"""One micro-batch's loss and gradients, as a run of pieces that can be evaluated one at a time.

MLX is lazy: the whole graph (loss, noted outputs, gradients) is built first and evaluated piece by piece,
outputs forward, then each module's gradients in reversed call order. No result changes and no work is added;
between two pieces the engine may decode.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.trainer import default_loss

from .batches import Batch, target_positions
from .halves import fewest_tokens, in_halves, streams
from .head import TargetRows
from .head_loss import CROSS_ENTROPY, RowLoss, head_losses
from .tree import TrainingTree


@dataclass(frozen=True)
class Piece:
    """Arrays to evaluate together. What follows a `barrier` piece is asked for once they have been evaluated.

    With `pause` it is asked for in a slice of its own: it takes long, and cannot be cut. `threads` of OpenBLAS divide
    each of its products, 0: all.
    """

    arrays: list[mx.array]
    barrier: bool = False
    pause: bool = False
    threads: int = 0


@dataclass
class MicroBatchResult:
    """What `MicroBatch.pieces` leaves behind: token-mean loss, target count, flat gradients by name."""

    loss: mx.array | None = None
    tokens: int = 0
    grads: dict[str, mx.array] = field(default_factory=dict)


def target_logits(module: nn.Module, head: TargetRows | None, batch: Batch) -> tuple[mx.array, np.ndarray]:
    """Logits (targets, vocabulary) that predict the targets of `batch`, row after row, and those tokens (targets,).

    Without a `head` the logits of all positions are computed, and the others thrown away.
    """
    positions, targets = target_positions(batch)
    inputs = batch[0][:, :-1]
    if head is None:
        full = module(inputs)
        return full.reshape(-1, full.shape[-1])[mx.array(positions)], targets
    with head.only_at(mx.array(positions)):
        return module(inputs)[0], targets


def quiet_logits(
    tree: TrainingTree, head: TargetRows | None, batch: Batch, hidden: mx.array | None = None
) -> tuple[mx.array, np.ndarray]:
    """`target_logits` of a tree without dropout, from what its prefix made of `batch`, if that is given.

    `noted` then gives where the graph may be cut.
    """
    with tree.quiet(hidden):
        return target_logits(tree.module, head, batch)


def noted(tree: TrainingTree) -> Iterator[Piece]:
    """The outputs that the last forward pass has noted, one at a time: evaluated ones must not be held."""
    outputs, tree.tape.outputs = tree.tape.outputs, []
    yield from _one_by_one(outputs, tree.tape.dear)


def _one_by_one(outputs: list[Any], dear: Collection[int]) -> Iterator[Piece]:
    """Dear ones are barriers: they are timed each by itself."""
    for i in range(len(outputs)):
        piece, outputs[i] = Piece([outputs[i]], barrier=i in dear), None  # evaluated outputs must not be held
        yield piece


def in_order(arrays: list[mx.array]) -> Iterator[Piece]:
    """`arrays`, each computed from those before it, one at a time and each a barrier: they may be large.

    Takes them out of the list: evaluated ones must not be held.
    """
    while arrays:
        yield Piece([arrays.pop(0)], barrier=True)


class LossFunction:
    """mlx-lm's `default_loss`, or the same over target rows only where the head of `tree` allows it."""

    def __init__(self, tree: TrainingTree, head: TargetRows | None) -> None:
        self._tree, self._head = tree, head

    def __call__(self, module: nn.Module, tokens: mx.array, spans: mx.array) -> tuple[mx.array, int]:
        """(token-mean cross-entropy in nats, number of targets)."""
        batch = (tokens, spans)
        targets = target_positions(batch)[1]
        if self._head is None:
            return default_loss(module, tokens, spans)[0], len(targets)
        losses = losses_at_targets(self._tree, self._head, batch, CROSS_ENTROPY, [mx.array(targets)])
        return losses.mean(), len(targets)


def losses_at_targets(
    tree: TrainingTree, head: TargetRows | None, batch: Batch, loss: RowLoss, known: Sequence[mx.array]
) -> mx.array:
    """`loss` at each target of `batch`, (targets,) float32; `known` is what it takes of them beside their logits."""
    module = tree.module
    if head is None or head.project is None:
        return loss.alone(target_logits(module, head, batch)[0].astype(mx.float32), *known)
    hidden = head.hidden(module, batch[0][:, :-1], mx.array(target_positions(batch)[0]))
    options = {"with_gradient": module.training}
    return head_losses(loss, hidden, known, head.project, head.vocab_size, tree.tape.note_dear, **options)


class MicroBatch:
    """Builds and cuts the graph of one micro-batch.

    `loss` is called with the module and all that a batch consists of; it gives the loss and the number of targets.
    The loss is a mean over these, or with `summed` a sum. With `seen_often` the tree's prefix is used, if it has one:
    what is computed for it pays when rows come again. With `halved` it is computed in `halves`.
    """

    def __init__(
        self,
        tree: TrainingTree,
        loss: Callable[..., tuple[mx.array, Any]],
        *,
        summed: bool = False,
        seen_often: bool = True,
        halved: bool = False,
    ) -> None:
        self.tree = tree
        self._prefix = tree.prefix if seen_often else None
        self._loss, self._summed = loss, summed
        self._fewest = fewest_tokens(tree.module) if halved else None
        self._value_and_grad: Callable[..., Any] = nn.value_and_grad(tree.module, self._taped_loss)

    def _taped_loss(self, module: nn.Module, *batch: Any) -> tuple[Any, ...]:
        loss, count = self._loss(module, *batch)
        return loss, count, list(self.tree.tape.outputs)

    def pieces(
        self, batch: tuple[Any, ...], key: mx.array, result: MicroBatchResult, known: mx.array | None = None
    ) -> Iterator[Piece]:
        """Yield the pieces in order and fill `result`; `key` is the micro-batch's dropout key.

        `known` is what the tree's prefix would make of the batch, (rows, length, dims), where that is kept elsewhere.
        """
        hidden = [] if known is None else [known]
        if self._prefix is not None:
            yield from self._prefix.pieces(batch, hidden)
        halves = [] if self._fewest is None else in_halves(batch, self._fewest)
        if halves:
            yield from self._in_halves(halves, key, hidden, result)
        else:
            yield from self._cut(batch, key, hidden, result)

    def _in_halves(
        self, halves: list[tuple[Any, ...]], key: mx.array, hidden: list[mx.array], result: MicroBatchResult
    ) -> Iterator[Piece]:
        found = [MicroBatchResult() for _ in halves]
        middle, (own, other) = halves[0][0].shape[0], streams()
        begun = [[h[:middle] for h in hidden], [h[middle:] for h in hidden]]
        runs = []
        for half, part, start, stream, one in zip(
            halves, mx.random.split(key), begun, (own, other), found, strict=True
        ):
            with mx.stream(stream):
                runs.append(self._cut(half, part, start, one))
            yield Piece([])  # building took a while: there may be something else to do
        yield from _side_by_side(runs, threads=1 if own != other else 0)
        counts = [int(one.tokens) for one in found]
        shares = [1.0 if self._summed else count / sum(counts) for count in counts]
        result.tokens = sum(counts)
        result.loss = _weighted(shares, [one.loss for one in found])
        result.grads = {name: _weighted(shares, [one.grads[name] for one in found]) for name in found[0].grads}

    def _cut(
        self, batch: tuple[Any, ...], key: mx.array, hidden: list[mx.array], result: MicroBatchResult
    ) -> Iterator[Piece]:
        """Build the graph at once, on the stream of now; what is given then are its pieces."""
        tape = self.tree.tape
        with self.tree.forward(key, *hidden):
            (result.loss, result.tokens, outputs), grads = self._value_and_grad(self.tree.module, *batch)
        tape.outputs = []
        result.grads = dict(tree_flatten(grads))
        del grads
        groups = reversed(_by_call_order(result.grads, tape.order))
        ends = [Piece([result.loss]), *map(Piece, groups)]
        return itertools.chain(_one_by_one(outputs, tape.dear), ends)


def _side_by_side(runs: Sequence[Iterator[Piece]], threads: int) -> Iterator[Piece]:
    """The pieces of all runs, those of the same place as one, for so many threads of OpenBLAS."""
    for pieces in itertools.zip_longest(*runs, fillvalue=Piece([])):
        arrays = [array for piece in pieces for array in piece.arrays]
        yield Piece(arrays, barrier=any(piece.barrier for piece in pieces), threads=threads)


def _weighted(shares: Sequence[float], values: Sequence[Any]) -> mx.array:
    return sum((share * value for share, value in zip(shares, values, strict=True)), mx.array(0.0))


#: the flat gradient and the loss of one optimizer step
Gradients = tuple[dict[str, mx.array], mx.array]
#: computes a step's gradients into its last argument, from the micro-batches and their dropout keys
ComputeGradients = Callable[[MicroBatch, Sequence[Batch], Sequence[mx.array], list[Gradients]], Iterator[Piece]]


def own_gradients(
    micro: MicroBatch, batches: Sequence[Batch], keys: Sequence[mx.array], out: list[Gradients]
) -> Iterator[Piece]:
    """Append the mean gradient and loss of the micro-batches to `out`."""
    total: dict[str, mx.array] | None = None
    losses = []
    for batch, key in zip(batches, keys, strict=True):
        result = MicroBatchResult()
        yield from micro.pieces(batch, key, result)
        total = add_grads(total, result.grads)
        losses.append(result.loss)
        if len(batches) > 1:  # a barrier: two micro-batches evaluated together would take twice the memory
            yield Piece(list(total.values()), barrier=True)
    assert total is not None
    grads = {name: grad / len(batches) for name, grad in total.items()} if len(batches) > 1 else total
    out.append((grads, mx.stack(losses).mean()))


def _by_call_order(grads: dict[str, mx.array], order: list[str]) -> list[list[mx.array]]:
    """Gradients grouped by the module (or the layer, when layers were noted) they belong to, first called first."""
    called = {path: position for position, path in enumerate(order)}
    groups: dict[int, list[mx.array]] = {}
    for name, grad in grads.items():
        parents = itertools.accumulate(name.split("."), "{}.{}".format)
        position = next((called[path] for path in parents if path in called), len(order))
        groups.setdefault(position, []).append(grad)
    return [groups[position] for position in sorted(groups)]


def add_grads(total: dict[str, mx.array] | None, grads: dict[str, mx.array]) -> dict[str, mx.array]:
    """Sum of two flat gradient trees."""
    return grads if total is None else {name: total[name] + grad for name, grad in grads.items()}


def unflatten(flat: dict[str, mx.array]) -> Any:
    """A flat tree as the nested one that optimizers take."""
    return tree_unflatten(list(flat.items()))
