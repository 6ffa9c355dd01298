"""What a prefix makes of rows, on disk: from one update to those after it.

It is a cache, so whatever cannot be read is not there. It is written and read in parts, between which whoever drives
may do other work. Each part is a file that tells whose work it is (the prefix's depth, the device), and by a digest
whether a bit of it has changed since.
"""

import contextlib
import hashlib
import itertools
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..errors import CheckpointDamaged
from .files import load_arrays, save_arrays

_INPUTS, _LENGTHS = "inputs", "lengths"
#: of rows, in one part; a single row may have more
PART_BYTES = 8 * 2**20


def row_key(inputs: object) -> bytes:
    """What a row is kept under, of its inputs: whole numbers (length,)."""
    return np.asarray(inputs, dtype=np.int32).tobytes()


def parts_of(place: Path) -> list[Path]:
    """The files that `save_kept` wrote for `place`, in order."""
    return sorted(place.parent.glob(f"{place.name}.*.safetensors"))


def save_kept(place: Path, kept: Mapping[bytes, mx.array], depth: str) -> Iterator[None]:
    """Add what a prefix of this `depth` makes of rows, (inputs, dims) each, by `row_key`, to the parts of `place`.

    They are files beside it, in an existing folder.
    """
    there, part, size = len(parts_of(place)), dict[bytes, mx.array](), 0
    for number, (key, row) in enumerate(kept.items(), 1):
        part[key] = row
        size += row.nbytes
        if size >= PART_BYTES or number == len(kept):
            _save_part(place.with_name(f"{place.name}.{there:04}.safetensors"), part, depth)
            there, part, size = there + 1, {}, 0
            yield


def size_of(place: Path) -> int:
    """Bytes of its parts on the disk."""
    size = 0
    for file in parts_of(place):
        with contextlib.suppress(OSError):
            size += file.stat().st_size
    return size


def load_kept(place: Path, depth: str, limit: int, wanted: Collection[bytes]) -> Iterator[dict[bytes, mx.array]]:
    """Of what `save_kept` wrote, the `wanted` rows of each part that is whole and of the same depth and device.

    It ends with the part before which they would have more than `limit` bytes together.
    """
    for file in parts_of(place):
        with contextlib.suppress(OSError):
            limit -= file.stat().st_size
        if limit < 0:
            return
        yield _load_part(file, depth, wanted)


def _save_part(file: Path, kept: Mapping[bytes, mx.array], depth: str) -> None:
    inputs, whole = np.frombuffer(b"".join(kept), dtype=np.int32), mx.concatenate(list(kept.values()))
    lengths = np.array([len(key) // 4 for key in kept], dtype=np.int32)
    arrays = {_INPUTS: mx.array(inputs), _LENGTHS: mx.array(lengths)}
    save_arrays(file, {**arrays, _name(depth, inputs, lengths, whole): whole})


def _load_part(file: Path, depth: str, wanted: Collection[bytes]) -> dict[bytes, mx.array]:
    """They are copies: the others stay in memory no longer than this takes."""
    try:
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
