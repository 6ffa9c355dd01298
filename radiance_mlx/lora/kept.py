"""What a prefix makes of rows, on disk: from one update to those after it.

It is a cache, so whatever cannot be read is not there. A file tells whose work it is (the prefix's depth, the device),
and a digest whether a bit of it has changed since.
"""

import hashlib
import itertools
from collections.abc import Collection, Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..errors import CheckpointDamaged
from .files import load_arrays, save_arrays

_INPUTS, _LENGTHS = "inputs", "lengths"


def row_key(inputs: object) -> bytes:
    """What a row is kept under, of its inputs: whole numbers (length,)."""
    return np.asarray(inputs, dtype=np.int32).tobytes()


def save_kept(file: Path, kept: Mapping[bytes, mx.array], depth: str) -> None:
    """Write what a prefix of this `depth` makes of rows, (inputs, dims) each, by `row_key`; at least one."""
    inputs, whole = np.frombuffer(b"".join(kept), dtype=np.int32), mx.concatenate(list(kept.values()))
    lengths = np.array([len(key) // 4 for key in kept], dtype=np.int32)
    arrays = {_INPUTS: mx.array(inputs), _LENGTHS: mx.array(lengths)}
    save_arrays(file, {**arrays, _name(depth, inputs, lengths, whole): whole})


def load_kept(file: Path, depth: str, limit: int, wanted: Collection[bytes]) -> dict[bytes, mx.array]:
    """Of what `save_kept` wrote, the `wanted` rows; none unless it is whole, of the same depth and device, and of at
    most `limit` bytes. They are copies: the others stay in memory no longer than this takes.
    """
    try:
        if file.stat().st_size > limit:
            return {}
        arrays = load_arrays(file)
        inputs, lengths = (np.array(arrays.pop(name)) for name in (_INPUTS, _LENGTHS))
        [(name, whole)] = arrays.items()
        if whole.ndim != 2 or not len(lengths) or not lengths.sum() == len(inputs) == len(whole):
            return {}
        if name != _name(depth, inputs, lengths, whole):
            return {}
    except (OSError, CheckpointDamaged, ValueError, KeyError):
        return {}
    ends = list(itertools.accumulate(lengths.tolist()))
    keys = [row_key(part) for part in np.split(inputs, ends[:-1])]
    starts = [0, *ends[:-1]]
    found = {
        key: whole[mx.arange(start, end)] for key, start, end in zip(keys, starts, ends, strict=True) if key in wanted
    }
    mx.eval(list(found.values()))
    return found


def _name(depth: str, inputs: np.ndarray, lengths: np.ndarray, whole: mx.array) -> str:
    digest = hashlib.sha256(inputs.tobytes() + lengths.tobytes())
    digest.update(np.array(mx.contiguous(whole).view(mx.uint8)).tobytes())
    return f"below_{depth}_{mx.default_device().type.name}_{digest.hexdigest()}"
