"""Whether a model decodes rows of different lengths together, tried on the model itself.

Some architectures fail in mlx-lm's batched attention mask, or take it for another axis and go on with wrong
numbers (gemma2 does either, by its number of heads); they are served one row at a time.
"""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator

_PROMPTS = ((1, 2, 3), (5, 8, 2, 9, 4))


def decodes_in_batches(tree: nn.Module) -> bool:
    """Whether two short prompts through mlx-lm's generator give together what each gives alone, but for rounding.

    Slots must be off (all base).
    """
    try:
        together = _first_logprobs(tree, _PROMPTS)
        apart = [_first_logprobs(tree, [prompt])[0] for prompt in _PROMPTS]
    except (ValueError, TypeError, AttributeError, RuntimeError, IndexError):
        return False
    return all(_alike(*pair) for pair in zip(together, apart, strict=True))


def _first_logprobs(tree: nn.Module, prompts: Sequence[Sequence[int]]) -> list[mx.array]:
    """Log-probabilities after each prompt, and one token more decoded, which may fail too."""
    generator = BatchGenerator(tree, max_tokens=2, stream=mx.default_stream(mx.default_device()))
    try:
        uids = generator.insert([list(prompt) for prompt in prompts])
        first: dict[int, mx.array] = {}
        left = len(uids)
        while left:
            for response in generator.next()[1]:
                first.setdefault(response.uid, response.logprobs)
                left -= response.finish_reason is not None
        return [first[uid] for uid in uids]
    finally:
        generator.close()


def _alike(one: mx.array, other: mx.array) -> bool:
    """Half precision rounds by the shape of a product; a wrong mask is off by far more."""
    one, other = one.astype(mx.float32), other.astype(mx.float32)
    return bool((mx.abs(one - other).max() <= 0.05 * (other.max() - other.min())).item())
