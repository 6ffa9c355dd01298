"""Losses through a frozen head: what autodiff makes of whole logits, in chunks, with the gradient found on the way."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from architectures import ARCHITECTURES, GEMMA2

from radiance_mlx.lora import head_loss
from radiance_mlx.lora.distributions import DIVERGENCE, kl, kl_and_slope, likeliest, log_softmax
from radiance_mlx.lora.head import install_head
from radiance_mlx.lora.head_loss import CROSS_ENTROPY, head_losses

ROWS, DIMS, VOCAB = 13, 64, 50


@pytest.fixture(params=[1, 4, 100], ids="chunks of {}".format)
def chunk(request, monkeypatch):
    """Rows of a chunk: single ones, some left over at the end, all at once."""
    monkeypatch.setattr(head_loss, "FEWEST", 1)
    monkeypatch.setattr(head_loss, "CHUNK_ON_CPU", request.param * VOCAB)
    monkeypatch.setattr(head_loss, "CHUNK_ELSEWHERE", request.param * VOCAB)
    return request.param


def through(project, hidden, targets, note=lambda _: None, with_gradient=True):
    """Cross-entropy of each row."""
    known = [mx.array(targets)]
    return head_losses(CROSS_ENTROPY, hidden, known, project, VOCAB, note, with_gradient=with_gradient)


def some(scale=1.0, bits=None):
    """hidden, targets and a frozen head whose logits are about `scale`."""
    mx.random.seed(3)
    linear = nn.Linear(DIMS, VOCAB)
    hidden = scale * mx.random.normal((ROWS, DIMS))
    return hidden, np.arange(ROWS) * 3 % VOCAB, nn.QuantizedLinear.from_linear(linear) if bits else linear


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_losses_and_gradient_are_those_of_the_whole(chunk, scale, bits):
    """Logits in the hundreds included: a target that has no share left still has a finite loss."""
    hidden, targets, project = some(scale, bits)
    weights = mx.random.normal((ROWS,))

    def whole(hidden):
        return (nn.losses.cross_entropy(project(hidden), mx.array(targets)) * weights).sum()

    def chunked(hidden):
        return (through(project, hidden, targets, noted.append) * weights).sum()

    noted = []
    (value, grad), (same, same_grad) = mx.value_and_grad(whole)(hidden), mx.value_and_grad(chunked)(hidden)
    assert same.item() == pytest.approx(value.item(), rel=1e-5)
    assert mx.allclose(same_grad, grad, rtol=1e-4, atol=1e-5).item()
    assert len(noted) == -(-ROWS // chunk)


def test_without_gradient_the_losses_are_the_same(chunk):
    hidden, targets, project = some()
    noted = []
    losses = through(project, hidden, targets, noted.append, with_gradient=False)
    assert mx.allclose(losses, nn.losses.cross_entropy(project(hidden), mx.array(targets)), atol=1e-5).item()
    assert [part.shape[0] for part in noted] == [min(chunk, ROWS - start) for start in range(0, ROWS, chunk)]


def test_half_precision_keeps_the_sum_in_full():
    """bfloat16 has three digits: the loss has them from the logits, and none is lost by adding up."""
    hidden, targets, project = some()
    project.set_dtype(mx.bfloat16)
    hidden = hidden.astype(mx.bfloat16)
    losses = through(project, hidden, targets)
    wide = nn.losses.cross_entropy(project(hidden).astype(mx.float32), mx.array(targets))
    assert losses.dtype == mx.float32
    assert mx.allclose(losses, wide, atol=1e-5).item()


@pytest.mark.parametrize("k", [1, 8, VOCAB])
@pytest.mark.parametrize("scale", [1.0, 20.0, 300.0])
def test_the_divergence_has_the_slope_of_its_definition(k, scale):
    """Of one kept token, some, and all; also where the model gives what is kept next to nothing, or all."""
    mx.random.seed(4)
    other, logits = 2.0 * mx.random.normal((ROWS, VOCAB)), scale * mx.random.normal((ROWS, VOCAB))
    kept = likeliest(log_softmax(other), k)
    value, slope = kl_and_slope(logits, *kept)
    assert mx.allclose(value, kl(*kept, log_softmax(logits)), rtol=1e-4, atol=1e-4).item()
    expected = mx.grad(lambda logits: kl(*kept, log_softmax(logits)).sum())(logits)
    assert mx.allclose(slope, expected, rtol=1e-3, atol=1e-4).item()


def test_the_divergence_goes_through_the_head_in_chunks(chunk):
    hidden, _, project = some()
    kept = likeliest(log_softmax(project(hidden) + mx.random.normal((ROWS, VOCAB))), 8)

    def whole(hidden):
        return kl(*kept, log_softmax(project(hidden))).sum()

    def chunked(hidden):
        return head_losses(DIVERGENCE, hidden, kept, project, VOCAB, lambda _: None, with_gradient=True).sum()

    (value, grad), (same, same_grad) = mx.value_and_grad(whole)(hidden), mx.value_and_grad(chunked)(hidden)
    assert same.item() == pytest.approx(value.item(), rel=1e-5)
    assert mx.allclose(same_grad, grad, rtol=1e-4, atol=1e-5).item()


@pytest.mark.parametrize(
    ("config", "direct"),
    [(tiny.LLAMA, True), (ARCHITECTURES["qwen3_moe"], True), (GEMMA2, False), (ARCHITECTURES["cohere"], False)],
    ids=["llama", "qwen3_moe", "gemma2", "cohere"],
)
def test_only_where_nothing_happens_to_the_logits_after_the_head(config, direct):
    """Gemma 2 bends them, Cohere scales them: there the model's own logits are used."""
    head = install_head(tiny.model(config), tiny.VOCAB)
    assert (head.project is not None) is direct
