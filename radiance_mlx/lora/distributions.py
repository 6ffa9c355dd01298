"""Next-token distributions of which the K likeliest tokens are kept, and all the others together as one outcome.

The Kullback-Leibler divergence over these K + 1 outcomes is a lower bound of the one over the whole vocabulary (the
data processing inequality: Cover and Thomas, Elements of Information Theory, 2.8), and equal to it when K is not
smaller than the vocabulary. The K are never scaled up to sum to one: that would be neither bound nor estimate.
"""

import mlx.core as mx

from .head_loss import RowLoss, log_of_sum

#: log-probabilities are not told apart below this, so that what is impossible to both costs nothing
LEAST = -80.0
SMALLEST = 1e-38  # of what may divide


def log_softmax(logits: mx.array) -> mx.array:
    """(n, V) logits of any float dtype → log-probabilities in float32."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def likeliest(logits: mx.array, k: int) -> tuple[mx.array, mx.array, mx.array]:
    """Of (n, V) logits, or log-probabilities: ids (n, K) int32 of the likeliest, in any order, their log-probabilities
    (n, K), and that of all others together (n,); float32.
    """
    logits = logits.astype(mx.float32)
    k = min(k, logits.shape[-1])
    ids = mx.argpartition(-logits, k - 1, axis=-1)[:, :k].astype(mx.int32)
    shares = mx.softmax(logits, axis=-1)
    logprobs = mx.take_along_axis(logits, ids, axis=-1) - log_of_sum(logits, shares)[:, None]
    if k == logits.shape[-1]:
        return ids, mx.maximum(logprobs, LEAST), mx.full(ids.shape[:1], LEAST)
    # summed up from theirs: 1 - Σ has no digits left near 0
    others = mx.put_along_axis(shares, ids, mx.array(0.0), axis=-1).sum(axis=-1)
    return ids, mx.maximum(logprobs, LEAST), mx.maximum(mx.log(others), LEAST)


def kl_and_slope(logits: mx.array, ids: mx.array, kept: mx.array, tail: mx.array) -> tuple[mx.array, mx.array]:
    """(n,) KL(what `likeliest` kept ‖ softmax(logits)) and its gradient for `logits` (n, V), float32.

    With shares p and kept outcomes q, the others together as one, the gradient is p - q at a kept token, and
    p (1 - q_others / p_others) at another one; an outcome below `LEAST` pulls no more.
    """
    shares = mx.softmax(logits, axis=-1)
    whole = log_of_sum(logits, shares)[:, None]
    theirs, q = mx.take_along_axis(logits, ids, axis=-1) - whole, mx.exp(kept)
    divergence = (q * (kept - mx.maximum(theirs, LEAST))).sum(axis=-1)
    pulls = mx.where(theirs > LEAST, q, 0.0)
    pull = pulls.sum(axis=-1, keepdims=True)
    others = shares
    if ids.shape[-1] < logits.shape[-1]:
        others = mx.put_along_axis(shares, ids, mx.array(0.0), axis=-1)
        share = others.sum(axis=-1, keepdims=True)
        log_share = mx.log(share)
        divergence = divergence + mx.exp(tail) * (tail - mx.maximum(log_share[:, 0], LEAST))
        pull_of_others = mx.where(log_share > LEAST, mx.exp(tail)[:, None], 0.0)
        pull = pull + pull_of_others
        others = others * (pull - pull_of_others / mx.maximum(share, SMALLEST))
    return divergence, mx.put_along_axis(others, ids, pull * mx.take_along_axis(shares, ids, axis=-1) - pulls, axis=-1)


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


#: `kl` of logits and what `likeliest` kept of another distribution
DIVERGENCE = RowLoss(lambda logits, ids, kept, tail: kl(ids, kept, tail, log_softmax(logits)), kl_and_slope)
