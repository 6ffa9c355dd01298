"""The loss through a frozen head: mlx's own cross-entropy, in chunks, with the gradient found on the way."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from architectures import ARCHITECTURES, GEMMA2

from radiance_mlx.lora import cross_entropy
from radiance_mlx.lora.cross_entropy import head_losses
from radiance_mlx.lora.head import install_head

ROWS, DIMS, VOCAB = 13, 64, 50


@pytest.fixture(params=[1, 4, 100], ids="chunks of {}".format)
def chunk(request, monkeypatch):
    """Rows of a chunk: single ones, some left over at the end, all at once."""
    monkeypatch.setattr(cross_entropy, "CHUNK_ON_CPU", request.param * VOCAB)
    monkeypatch.setattr(cross_entropy, "CHUNK_ELSEWHERE", request.param * VOCAB)
    return request.param


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
        return (head_losses(hidden, targets, project, VOCAB, noted.append, with_gradient=True) * weights).sum()

    noted = []
    (value, grad), (same, same_grad) = mx.value_and_grad(whole)(hidden), mx.value_and_grad(chunked)(hidden)
    assert same.item() == pytest.approx(value.item(), rel=1e-5)
    assert mx.allclose(same_grad, grad, rtol=1e-4, atol=1e-5).item()
    assert len(noted) == -(-ROWS // chunk)


def test_without_gradient_the_losses_are_the_same(chunk):
    hidden, targets, project = some()
    noted = []
    losses = head_losses(hidden, targets, project, VOCAB, noted.append, with_gradient=False)
    assert mx.allclose(losses, nn.losses.cross_entropy(project(hidden), mx.array(targets)), atol=1e-5).item()
    assert [part.shape[0] for part in noted] == [min(chunk, ROWS - start) for start in range(0, ROWS, chunk)]


def test_half_precision_keeps_the_sum_in_full():
    """bfloat16 has three digits: the loss has them from the logits, and none is lost by adding up."""
    hidden, targets, project = some()
    project.set_dtype(mx.bfloat16)
    hidden = hidden.astype(mx.bfloat16)
    losses = head_losses(hidden, targets, project, VOCAB, lambda _: None, with_gradient=True)
    wide = nn.losses.cross_entropy(project(hidden).astype(mx.float32), mx.array(targets))
    assert losses.dtype == mx.float32
    assert mx.allclose(losses, wide, atol=1e-5).item()


@pytest.mark.parametrize(
    ("config", "direct"),
    [(tiny.LLAMA, True), (ARCHITECTURES["qwen3_moe"], True), (GEMMA2, False), (ARCHITECTURES["cohere"], False)],
    ids=["llama", "qwen3_moe", "gemma2", "cohere"],
)
def test_only_where_nothing_happens_to_the_logits_after_the_head(config, direct):
    """Gemma 2 bends them, Cohere scales them: there the model's own logits are used."""
    head = install_head(tiny.model(config), tiny.VOCAB)
    assert (head.project is not None) is direct
