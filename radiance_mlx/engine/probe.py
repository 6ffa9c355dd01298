"""Whether a model decodes rows of different lengths together, tried on the model itself.

Some architectures fail in mlx-lm's batched attention mask (gemma2 does); they are served one row at a time.
"""

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator


def decodes_in_batches(tree: nn.Module) -> bool:
    """Run two short prompts through mlx-lm's generator; False if it raises. Slots must be off (all base)."""
    generator = None
    try:
        generator = BatchGenerator(tree, max_tokens=2, stream=mx.default_stream(mx.default_device()))
        left = len(generator.insert([[1, 1, 1], [1, 1, 1, 1, 1]]))
        while left:
            left -= sum(r.finish_reason is not None for r in generator.next()[1])
    except (ValueError, TypeError, AttributeError, RuntimeError):
        return False
    finally:
        if generator is not None:
            generator.close()
    return True
