"""How far one next-token distribution is from another, token by token.

A reference keeps, for each token, its K likeliest next tokens with their log-probabilities and the log of the
probability that is left (the tail). The Kullback-Leibler divergence over these K + 1 outcomes is a lower bound
of the one over the whole vocabulary (the data processing inequality: Cover and Thomas, Elements of
Information Theory, 2.8), and equal to it when K is not smaller than the vocabulary. The K are never scaled up
to sum to one: that would be neither bound nor estimate.
"""

from dataclasses import dataclass

import mlx.core as mx

TOP_K = 64
#: log-probabilities of a tail are not told apart below this
LEAST = -80.0


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


def log_softmax(logits: mx.array) -> mx.array:
    """(n, V) logits of any float dtype → log-probabilities in float32."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def reference(logprobs: mx.array, targets: mx.array, k: int = TOP_K) -> Reference:
    """Of (n, V) log-probabilities and the (n,) tokens that came."""
    k = min(k, logprobs.shape[-1])
    ids = mx.argpartition(-logprobs, k - 1, axis=-1)[:, :k].astype(mx.int32)
    top = mx.take_along_axis(logprobs, ids, axis=-1)
    return Reference(
        ids=ids,
        logprobs=top,
        tail=_rest(logprobs, ids),
        entropy=-(mx.exp(logprobs) * mx.where(logprobs > -mx.inf, logprobs, 0.0)).sum(axis=-1),
        target=_at(logprobs, targets),
        best=mx.argmax(logprobs, axis=-1).astype(mx.int32),
    )


def kl(kept: Reference, logprobs: mx.array) -> mx.array:
    """(n,) KL(reference ‖ `logprobs`) in nats, over the K + 1 outcomes; ≥ 0 but for rounding."""
    theirs = mx.take_along_axis(logprobs, kept.ids, axis=-1)
    probabilities = mx.exp(kept.logprobs)
    inside = mx.where(probabilities > 0, probabilities * (kept.logprobs - theirs), 0.0).sum(axis=-1)
    if kept.ids.shape[-1] >= logprobs.shape[-1]:
        return inside
    return inside + mx.exp(kept.tail) * (kept.tail - _rest(logprobs, kept.ids))


def agreement(kept: Reference, logprobs: mx.array) -> mx.array:
    """(n,) 1.0 where both find the same token likeliest."""
    return (mx.argmax(logprobs, axis=-1).astype(mx.int32) == kept.best).astype(mx.float32)


def _rest(logprobs: mx.array, ids: mx.array) -> mx.array:
    """(n,) log-probability of all tokens but `ids`, summed up from theirs: 1 - Σ has no digits left near 0."""
    if ids.shape[-1] >= logprobs.shape[-1]:
        return mx.full(ids.shape[:1], LEAST)
    without = mx.put_along_axis(mx.zeros(logprobs.shape), ids, mx.array(-mx.inf), axis=-1)
    return mx.maximum(mx.logsumexp(logprobs + without, axis=-1), LEAST)


def _at(logprobs: mx.array, tokens: mx.array) -> mx.array:
    return mx.take_along_axis(logprobs, tokens[:, None].astype(mx.int32), axis=-1)[:, 0]
