"""Prefix reuse: finished sequences' keys and values, by the version of the weights that made them.

On mlx-lm's `LRUPromptCache`. Entries are kept without the row entry (a stored slot number would go stale) and
evaluated first (an unevaluated slice holds the whole batch's buffers).
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import LRUPromptCache, can_trim_prompt_cache, trim_prompt_cache


class PromptCache:
    """Bounded by bytes; 0 turns it off."""

    def __init__(self, max_bytes: int, max_entries: int = 256) -> None:
        self._kept = LRUPromptCache(max_size=max_entries, max_bytes=max_bytes) if max_bytes else None

    def take(self, version: str, prompt: list[int]) -> tuple[list[Any] | None, list[int]]:
        """(keys and values of the longest known prefix or None, the rest of the prompt: at least one token)."""
        if self._kept is None:
            return None, prompt
        cache, rest = self._kept.fetch_nearest_cache(version, prompt)
        if cache is None or rest:
            return cache, rest
        if not can_trim_prompt_cache(cache):
            return None, prompt
        trim_prompt_cache(cache, 1)
        return cache, prompt[-1:]

    def keep(self, version: str, tokens: Sequence[int], cache: list[Any]) -> None:
        """Remember a finished sequence; `tokens` are those that `cache` holds."""
        if self._kept is None or not tokens:
            return
        mx.eval([entry.state for entry in cache])
        self._kept.insert_cache(version, list(tokens), cache)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._kept.nbytes if self._kept is not None else 0
