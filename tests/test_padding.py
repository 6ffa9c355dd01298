"""Products that are padded to as many rows as OpenBLAS multiplies best."""

import copy

import mlx.core as mx
import mlx.nn as nn
import pytest
import tiny
from running import FACTS, QUICK, running, until

from radiance_mlx import blas
from radiance_mlx.engine import padding
from radiance_mlx.engine.padding import grain_here, pad_rows
from radiance_mlx.lora.targets import LINEAR


@pytest.mark.parametrize("tied", [False, True])
def test_padding_changes_nothing_but_the_rows_of_a_product(monkeypatch, tied):
    """Whatever the number of rows: logits are the same but for rounding, of the same shape; a linear stays one."""
    monkeypatch.setattr(padding, "SMALL", 0)
    plain = tiny.model(tie_word_embeddings=tied)
    padded = copy.deepcopy(plain)
    pad_rows(padded, 16)
    assert all(isinstance(m, LINEAR) for m in padded.modules() if type(m).__name__ == "Linear")
    assert not {nn.Linear, nn.Embedding} & {type(m) for m in padded.modules()}  # the embedding may be the head
    for rows, length in [(1, 1), (3, 1), (5, 2), (16, 1), (7, 5)]:
        tokens = mx.array(tiny.prompts(*[length] * rows))
        wanted, found = plain(tokens), padded(tokens)
        assert found.shape == wanted.shape
        assert mx.allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_product_is_of_so_many_rows_and_few_are_left_alone(monkeypatch):
    """Few in all, or few in the last block. With a bias, and rows in more than one dimension."""
    seen = []

    class Noting(nn.Linear):
        def __call__(self, x):
            seen.append(x.shape)
            return super().__call__(x)

    linear = Noting(4, 6)
    assert 16 * linear.weight.size < padding.SMALL
    padding._padded(Noting.__call__, 16)(linear, mx.ones((5, 4)))
    assert seen.pop() == (5, 4)  # it would be computed by one thread
    monkeypatch.setattr(padding, "SMALL", 0)
    call = padding._padded(Noting.__call__, 16)
    for shape in [(2, 1, 4), (3, 1, 4), (4, 1, 4), (16, 4), (2, 3, 3, 4), (19, 1, 4), (36, 4)]:
        x = mx.random.normal(shape)
        assert mx.allclose(call(linear, x), nn.Linear.__call__(linear, x), atol=1e-6)
    assert seen == [(2, 1, 4), (3, 1, 4), (16, 4), (16, 4), (2, 3, 3, 4), (19, 1, 4), (48, 4)]


def test_rows_are_padded_where_it_was_measured_to_pay(monkeypatch):
    """With OpenBLAS at two threads on the CPU; `serving.pad_rows: off` is off."""
    monkeypatch.setattr(blas, "threads", lambda: 2)
    assert grain_here() == 16
    for threads in (0, 1, 4):
        monkeypatch.setattr(blas, "threads", lambda threads=threads: threads)
        assert grain_here() == 1


@pytest.mark.parametrize(("wanted", "padded"), [("auto", True), ("off", False)])
def test_the_service_pads_what_answers_and_not_what_learns(tmp_path, monkeypatch, wanted, padded):
    """The serving tree, and the one with the stable checkpoint folded in; a checkpoint is learnt and answers."""
    monkeypatch.setattr(blas, "threads", lambda: 2)
    flags = {**QUICK, "training.max_steps": 30, "training.batch_size": 4, "serving.fuse": "always"}
    with running(tmp_path, flags, serving__pad_rows=wanted) as service:
        service.learn(FACTS[0])
        until(lambda: service.engine(lambda e: e._fused.tree), "the folded tree")
        trees = service.engine(lambda e: (e._decoder._model.tree, e._fused.tree, e._base.module))
        serving, folded, base = ({type(m) for m in tree.modules()} for tree in trees)
        assert (nn.Linear not in serving) is (nn.Linear not in folded) is padded
        assert nn.Linear in base
        assert service.ask(FACTS[0][0]).text == FACTS[0][1]
