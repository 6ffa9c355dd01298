"""Weights that lie transposed in memory: the same numbers, in the order that OpenBLAS takes fastest."""

import copy

import mlx.core as mx
import mlx.nn as nn
import pytest
import tiny
from mlx.utils import tree_flatten
from running import FACTS, QUICK, running, until

from radiance_mlx import blas
from radiance_mlx.engine.layout import transpose_here, transpose_weights


def transposed(weight):
    """Whether a matrix lies column by column."""
    strides = memoryview(weight).strides
    return strides[0] < strides[1]


@pytest.mark.parametrize("tied", [False, True])
def test_only_the_order_in_memory_changes(tied):
    """Of the linears, and of the head: an embedding that only looks words up stays as it is."""
    plain = tiny.model(tie_word_embeddings=tied)
    turned = copy.deepcopy(plain)
    transpose_weights(turned)
    assert not any(transposed(m.weight) for m in plain.modules() if isinstance(m, nn.Linear))
    assert all(transposed(m.weight) for m in turned.modules() if isinstance(m, nn.Linear))
    assert transposed(turned.model.embed_tokens.weight) is tied
    before, after = (dict(tree_flatten(m.parameters())) for m in (plain, turned))
    assert tiny.equal(before, after)
    tokens = mx.array(tiny.prompts(*[7] * 5))
    assert mx.allclose(turned(tokens), plain(tokens), rtol=1e-4, atol=1e-4)


def test_weights_are_turned_where_it_was_measured_to_pay(monkeypatch):
    """With OpenBLAS at one or two threads and its kernels with AVX2, on the CPU."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.cpu)
    monkeypatch.setattr(blas, "core", lambda: "Haswell")
    for threads, pays in ((0, False), (1, True), (2, True), (8, False)):
        monkeypatch.setattr(blas, "threads", lambda threads=threads: threads)
        assert transpose_here() is pays
    monkeypatch.setattr(blas, "threads", lambda: 1)
    monkeypatch.setattr(blas, "core", lambda: "SkylakeX")
    assert not transpose_here()
    monkeypatch.setattr(blas, "core", lambda: "Zen")
    assert transpose_here()
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    assert not transpose_here()


@pytest.mark.parametrize("wanted", ["auto", "off"])
def test_the_base_and_what_is_folded_of_it_lie_alike(tmp_path, monkeypatch, wanted):
    """A checkpoint is learnt and answers; `serving.transpose: off` leaves the weights as they came."""
    monkeypatch.setattr(blas, "threads", lambda: 1)
    monkeypatch.setattr(blas, "core", lambda: "Zen")
    flags = {**QUICK, "training.max_steps": 30, "training.batch_size": 4, "serving.fuse": "always", "backend": "cpu"}
    with running(tmp_path, flags, serving__transpose=wanted) as service:
        service.learn(FACTS[0])
        until(lambda: service.engine(lambda e: e._fused.tree), "the folded tree")
        trees = service.engine(lambda e: (e._base.module, e._decoder._model.tree, e._fused.tree))
        for tree in trees:
            weights = [m.weight for m in tree.modules() if isinstance(m, nn.Linear | nn.Embedding)]
            assert {transposed(w) for w in weights} == {wanted == "auto"}
        assert service.ask(FACTS[0][0]).text == FACTS[0][1]
