"""Training one batch on several machines: each computes the gradient of its rows of every micro-batch.

Rank 0 is the service. The others keep nothing but the base: for each optimizer step they are sent the adapter's
weights and the step's micro-batches, compute the gradient of their own rows, and all gradients are summed. Weighted
by how many targets a rank has, the sum is the gradient of the whole micro-batch, and so is the loss: they are those
of one machine but for the order of the sums. Everything travels as sums of arrays in which the others have zeros.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from ..errors import ConfigError, RankLost
from .batches import Batch, target_positions
from .step import Gradients, MicroBatch, MicroBatchResult, Piece, add_grads


def connect(backend: Literal["auto", "ring", "jaccl"]) -> Any:
    """MLX's group of all ranks, once for a process; returns when they have come. Raises `ConfigError` if they do not.

    While it waits, no Python runs in this process: signals must have their default effect.
    """
    try:
        return mx.distributed.init(strict=True, backend="any" if backend == "auto" else backend)
    except RuntimeError as error:
        raise ConfigError(
            f"training.distributed: the other machines cannot be reached: {error}",
            "Start the service on all of them (docs/distributed.md), or set training.distributed: off.",
            [{"key": "training.distributed", "problem": str(error)}],
        ) from error


class Wire:
    """What ranks say to each other. Every call must be met by one of the same kind on each of the others."""

    def __init__(self, backend: Literal["auto", "ring", "jaccl"]) -> None:
        """As `connect`."""
        self._group = connect(backend)
        self.rank, self.size = self._group.rank(), self._group.size()

    def sum(self, array: mx.array) -> mx.array:
        """The sum over all ranks, evaluated. Raises `RankLost`."""
        try:
            total = mx.distributed.all_sum(array, group=self._group, stream=mx.cpu)
            mx.eval(total)
        except RuntimeError as error:
            raise RankLost(f"A machine that trains with this one is gone: {error}") from error
        return total

    def tell(self, document: dict[str, Any], arrays: Sequence[mx.array] = ()) -> None:
        """Send plain values and arrays to all others, who `listen`."""
        shapes = [[list(array.shape), str(array.dtype).rpartition(".")[2]] for array in arrays]
        text = np.frombuffer(json.dumps([document, shapes]).encode(), dtype=np.uint8)
        self.sum(mx.array([len(text)], dtype=mx.int32))
        for array in (mx.array(text), *arrays):
            self.sum(array)

    def listen(self) -> tuple[dict[str, Any], list[mx.array]]:
        """What the one rank that speaks tells."""
        length = int(self.sum(mx.zeros(1, dtype=mx.int32)).item())
        text = bytes(np.array(self.sum(mx.zeros(length, dtype=mx.uint8))))
        document, shapes = json.loads(text)
        return document, [self.sum(mx.zeros(shape, dtype=getattr(mx, dtype))) for shape, dtype in shapes]


class Ranks:
    """Rank 0's side: the others are told what to compute. Alone as soon as one of them is lost."""

    def __init__(self, backend: Literal["auto", "ring", "jaccl"], base: str) -> None:
        """`base` is the fingerprint of the model, which must be everybody's. Raises `ConfigError` or `RankLost`."""
        self._wire = Wire(backend)
        self._awaited = 0  # numbers that the others add up for a step that was given up here
        self.lost = ""
        if self._wire.size < 2:
            raise ConfigError(
                "training.distributed: this process was started alone.",
                "Start it on each machine (docs/distributed.md), or set training.distributed: off.",
                [{"key": "training.distributed", "problem": "there is no other rank"}],
            )
        self._wire.tell({"base": base})
        others = np.flatnonzero(np.array(self._wire.sum(mx.zeros(self._wire.size, dtype=mx.int32)))).tolist()
        if others:
            raise ConfigError(
                f"training.distributed: rank {', '.join(map(str, others))} has another base model.",
                "All machines need the same files under base_model.",
                [{"key": "base_model", "problem": f"other files on rank {rank}"} for rank in others],
            )

    @property
    def size(self) -> int:
        """How many take part."""
        return 1 if self.lost else self._wire.size

    def facts(self) -> dict[str, Any]:
        """For `/info`."""
        return {"ranks": self.size, "ranks_lost": self.lost or None}

    def gradients(
        self,
        lora: dict[str, Any],
        micro: MicroBatch,
        batches: Sequence[Batch],
        keys: Sequence[mx.array],
        out: list[Gradients],
    ) -> Iterator[Piece]:
        """Append those of a step to `out`; `lora` is what the others make their trees of.

        Raises `RankLost`; from then on there is nobody else.
        """
        try:
            if self._awaited:
                self._wire.sum(mx.zeros(self._awaited))
            weights = micro.tree.parameters()
            arrays = [_joined(weights), *(array for batch in batches for array in batch), *keys]
            self._wire.tell({"lora": lora, "batches": len(batches)}, arrays)
            self._awaited = 1 + arrays[0].size
            mine: list[mx.array] = []
            yield from own_part(micro, batches, keys, (0, self._wire.size), mine)
            total = self._wire.sum(mine[0])
            self._awaited = 0
        except RankLost as error:
            self.lost = error.message
            raise
        out.append((split_up(total[1:], weights), total[0]))


def own_part(
    micro: MicroBatch, batches: Sequence[Batch], keys: Sequence[mx.array], place: tuple[int, int], out: list[mx.array]
) -> Iterator[Piece]:
    """Append this rank's part to `out`: loss and gradients in one vector, float32; `place` is (rank, of how many)."""
    total = {name: mx.zeros_like(value) for name, value in micro.tree.parameters().items()}
    loss = mx.array(0.0)
    for index, (batch, key) in enumerate(zip(batches, keys, strict=True)):
        rows, share = _rows(batch, (place[0] + index) % place[1], place[1])
        if not share:
            continue
        result = MicroBatchResult()
        yield from micro.pieces(rows, mx.random.split(key, place[1])[place[0]], result)
        assert result.loss is not None
        weight = share / len(batches)
        loss = loss + weight * result.loss
        total = add_grads(total, {name: weight * grad for name, grad in result.grads.items()})
        yield Piece([loss, *total.values()], barrier=True)
    out.append(mx.concatenate([loss.reshape(1), _joined(total)]))
    yield Piece([out[-1]], barrier=True)


def _rows(batch: Batch, first: int, size: int) -> tuple[Batch, float]:
    """Every `size`-th row from `first` on, and which part of all targets they hold.

    Rows are dealt out in turn, and so are those that are left over, from one micro-batch to the next.
    """
    part = (batch[0][first::size], batch[1][first::size])
    targets = len(target_positions(part)[1]) if part[0].shape[0] else 0
    return part, targets / len(target_positions(batch)[1])


def _joined(arrays: dict[str, mx.array]) -> mx.array:
    return mx.concatenate([arrays[name].reshape(-1).astype(mx.float32) for name in sorted(arrays)])


def split_up(vector: mx.array, like: dict[str, mx.array]) -> dict[str, mx.array]:
    """The inverse of joining arrays of these names, shapes and dtypes."""
    names = sorted(like)
    ends = np.cumsum([like[name].size for name in names])[:-1].tolist()
    parts = mx.split(vector, ends)
    return {name: p.reshape(like[name].shape).astype(like[name].dtype) for name, p in zip(names, parts, strict=True)}
