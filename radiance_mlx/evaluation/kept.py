"""The references that are kept between updates: the base's, once for each set of anchors, and the last checkpoints'.

One folder for each (base model, anchors, K), so that nothing measured on other tokens is ever compared. A
cache: what is missing or unreadable is measured again.
"""

import hashlib
import logging
import os
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path

import mlx.core as mx
import numpy as np

from .divergence import TOP_K, Reference
from .measuring import Documents

log = logging.getLogger(__name__)
_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Kept:
    """A checkpoint's (or the base's) distributions on the anchors, and its ΣKL(p0 ‖ p) of each document."""

    reference: Reference
    base_kl: np.ndarray


class KeptReferences:
    """Files `<folder>/<key>/<name>.safetensors`."""

    def __init__(self, folder: Path, base_fingerprint: str, anchors: str, documents: Documents, k: int = TOP_K) -> None:
        key = hashlib.sha256(f"{base_fingerprint}\n{anchors}\n{k}".encode()).hexdigest()[:16]
        self._folder = folder / key
        self._documents = documents

    def load(self, name: str) -> Kept | None:
        """What is kept of `name`; None if nothing usable is."""
        try:
            arrays = mx.load(str(self._folder / f"{name}{_SUFFIX}"))
            mx.eval(arrays)
            base_kl = np.array(arrays.pop("base_kl"), dtype=np.float64)
            found = Reference(**{field.name: arrays[field.name] for field in fields(Reference)})
        except (RuntimeError, OSError, ValueError, KeyError):
            return None
        right = found.target.size == self._documents.tokens and base_kl.shape == self._documents.counts.shape
        return Kept(found, base_kl) if right else None

    def save(self, name: str, kept: Kept) -> None:
        """Write beside and rename. A failure is no fault of what was measured: it is measured again next time."""
        beside = self._folder / f".{name}{_SUFFIX}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            mx.save_safetensors(str(beside), {**kept.reference.arrays(), "base_kl": mx.array(kept.base_kl)})
            os.replace(beside, self._folder / f"{name}{_SUFFIX}")
        except (OSError, RuntimeError) as error:
            log.warning("distributions on the anchors cannot be kept in %s: %s", self._folder, error)

    def keep_only(self, names: Collection[str]) -> None:
        """Remove the others: a set of a thousand anchors takes some 50 MB for each."""
        for file in self._folder.glob(f"*{_SUFFIX}"):
            if file.name.removesuffix(_SUFFIX) not in names:
                file.unlink(missing_ok=True)
