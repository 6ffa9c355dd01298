"""Next-token distributions of which the K likeliest tokens are kept, and all the others together as one outcome.

The Kullback-Leibler divergence over these K + 1 outcomes is a lower bound of the one over the whole vocabulary (the
data processing inequality: Cover and Thomas, Elements of Information Theory, 2.8), and equal to it when K is not
smaller than the vocabulary. The K are never scaled up to sum to one: that would be neither bound nor estimate.
"""

import mlx.core as mx

#: log-probabilities are not told apart below this, so that what is impossible to both costs nothing
LEAST = -80.0


def log_softmax(logits: mx.array) -> mx.array:
    """(n, V) logits of any float dtype → log-probabilities in float32."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def likeliest(logprobs: mx.array, k: int) -> tuple[mx.array, mx.array, mx.array]:
    """Of (n, V) log-probabilities: ids (n, K) int32 in any order, theirs (n, K), and the others' together (n,)."""
    k = min(k, logprobs.shape[-1])
    ids = mx.argpartition(-logprobs, k - 1, axis=-1)[:, :k].astype(mx.int32)
    return ids, mx.maximum(mx.take_along_axis(logprobs, ids, axis=-1), LEAST), rest(logprobs, ids)


def rest(logprobs: mx.array, ids: mx.array) -> mx.array:
    """(n,) log-probability of all tokens but `ids`, summed up from theirs: 1 - Σ has no digits left near 0."""
    if ids.shape[-1] >= logprobs.shape[-1]:
        return mx.full(ids.shape[:1], LEAST)
    without = mx.put_along_axis(mx.zeros(logprobs.shape), ids, mx.array(-mx.inf), axis=-1)
    return mx.maximum(mx.logsumexp(logprobs + without, axis=-1), LEAST)


def kl(ids: mx.array, kept: mx.array, tail: mx.array, logprobs: mx.array) -> mx.array:
    """(n,) KL(what `likeliest` kept ‖ `logprobs`) in nats; ≥ 0 but for rounding."""
    theirs = mx.maximum(mx.take_along_axis(logprobs, ids, axis=-1), LEAST)
    inside = (mx.exp(kept) * (kept - theirs)).sum(axis=-1)
    if ids.shape[-1] >= logprobs.shape[-1]:
        return inside
    return inside + mx.exp(tail) * (tail - rest(logprobs, ids))
