"""How far one next-token distribution is from another, token by token.

A reference keeps, for each token, its K likeliest next tokens with their log-probabilities and the log of the
probability that is left (the tail): see `radiance_mlx.lora.distributions` for what is computed from them.
"""

from dataclasses import dataclass

import mlx.core as mx

from ..lora import distributions
from ..lora.distributions import log_softmax as log_softmax

TOP_K = 64


@dataclass(frozen=True)
class Reference:
    """What is kept of one distribution for each of n tokens.

    `ids` (n, K) int32 and `logprobs` (n, K) float32, the likeliest next tokens, likeliest first or in any
    order; `tail` (n,) float32, the log-probability of all others together; `entropy` (n,) float32, in nats and
    over the whole vocabulary; `target` (n,) float32, the log-probability of the token that came; `best` (n,)
    int32, the likeliest token.
    """

    ids: mx.array
    logprobs: mx.array
    tail: mx.array
    entropy: mx.array
    target: mx.array
    best: mx.array

    def arrays(self) -> dict[str, mx.array]:
        """By field name."""
        return {name: getattr(self, name) for name in ("ids", "logprobs", "tail", "entropy", "target", "best")}


def reference(logprobs: mx.array, targets: mx.array, k: int = TOP_K) -> Reference:
    """Of (n, V) log-probabilities and the (n,) tokens that came."""
    ids, top, tail = distributions.likeliest(logprobs, k)
    return Reference(
        ids=ids,
        logprobs=top,
        tail=tail,
        entropy=-(mx.exp(logprobs) * mx.where(logprobs > -mx.inf, logprobs, 0.0)).sum(axis=-1),
        target=_at(logprobs, targets),
        best=mx.argmax(logprobs, axis=-1).astype(mx.int32),
    )


def kl(kept: Reference, logprobs: mx.array) -> mx.array:
    """(n,) KL(reference ‖ `logprobs`) in nats, over the K + 1 outcomes; ≥ 0 but for rounding."""
    return distributions.kl(kept.ids, kept.logprobs, kept.tail, logprobs)


def agreement(kept: Reference, logprobs: mx.array) -> mx.array:
    """(n,) 1.0 where both find the same token likeliest."""
    return (mx.argmax(logprobs, axis=-1).astype(mx.int32) == kept.best).astype(mx.float32)


def _at(logprobs: mx.array, tokens: mx.array) -> mx.array:
    return mx.take_along_axis(logprobs, tokens[:, None].astype(mx.int32), axis=-1)[:, 0]
