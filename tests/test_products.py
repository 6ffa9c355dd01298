"""Products of a batch: by as many threads, and padded to as many rows, as OpenBLAS multiplies best."""

import asyncio
import copy

import mlx.core as mx
import mlx.nn as nn
import pytest
import tiny
from running import FACTS, QUICK, request, running, until

from radiance_mlx import blas
from radiance_mlx.engine import products
from radiance_mlx.engine.products import AVX2, AVX512, UNKNOWN, best_here, pad_rows, threads_here
from radiance_mlx.lora.targets import LINEAR


@pytest.mark.parametrize("tied", [False, True])
def test_padding_changes_nothing_but_the_rows_of_a_product(monkeypatch, tied):
    """Whatever the number of rows: logits are the same but for rounding, of the same shape; a linear stays one."""
    monkeypatch.setattr(products, "SMALL", 0)
    monkeypatch.setattr(blas, "used", lambda: 2)
    plain = tiny.model(tie_word_embeddings=tied)
    padded = copy.deepcopy(plain)
    pad_rows(padded, AVX2)
    assert all(isinstance(m, LINEAR) for m in padded.modules() if type(m).__name__ == "Linear")
    assert not {nn.Linear, nn.Embedding} & {type(m) for m in padded.modules()}  # the embedding may be the head
    for rows, length in [(1, 1), (3, 1), (5, 2), (16, 1), (7, 5)]:
        tokens = mx.array(tiny.prompts(*[length] * rows))
        wanted, found = plain(tokens), padded(tokens)
        assert found.shape == wanted.shape
        assert mx.allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_product_is_of_so_many_rows_and_few_are_left_alone(monkeypatch):
    """Few in all, or few in the last block. With a bias, and rows in more than one dimension."""
    monkeypatch.setattr(blas, "used", lambda: 2)
    seen = []

    class Noting(nn.Linear):
        def __call__(self, x):
            seen.append(x.shape)
            return super().__call__(x)

    linear = Noting(4, 6)
    assert 16 * linear.weight.size < products.SMALL
    products._padded(Noting.__call__, AVX2)(linear, mx.ones((5, 4)))
    assert seen.pop() == (5, 4)  # it would be computed by one thread
    monkeypatch.setattr(products, "SMALL", 0)
    call = products._padded(Noting.__call__, AVX2)
    for shape in [(2, 1, 4), (3, 1, 4), (4, 1, 4), (16, 4), (2, 3, 3, 4), (19, 1, 4), (36, 4)]:
        x = mx.random.normal(shape)
        assert mx.allclose(call(linear, x), nn.Linear.__call__(linear, x), atol=1e-6)
    assert seen == [(2, 1, 4), (3, 1, 4), (16, 4), (16, 4), (2, 3, 3, 4), (19, 1, 4), (48, 4)]
    seen.clear()
    for rows in (9, 10, 25, 26):  # with AVX-512 a block that is half empty costs no more than a full one
        products._padded(Noting.__call__, AVX512)(linear, mx.ones((rows, 4)))
    assert seen == [(9, 4), (16, 4), (25, 4), (32, 4)]


@pytest.fixture
def _measured(monkeypatch):
    """An OpenBLAS that was measured, whatever there is here."""
    monkeypatch.setattr(blas, "threads", lambda: 2)
    monkeypatch.setattr(blas, "core", lambda: "Zen")


@pytest.mark.usefixtures("_measured")
def test_what_is_done_is_what_was_measured_to_pay(monkeypatch):
    """By OpenBLAS's core, with its two threads, on the CPU; of any other nothing is known, and nothing is done."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.cpu)
    for core, best in (("Zen", AVX2), ("Haswell", AVX2), ("SkylakeX", AVX512), ("Cooperlake", UNKNOWN), ("", UNKNOWN)):
        monkeypatch.setattr(blas, "core", lambda core=core: core)
        assert best_here() is best
    monkeypatch.setattr(blas, "core", lambda: "Zen")
    for threads in (0, 1, 4):
        monkeypatch.setattr(blas, "threads", lambda threads=threads: threads)
        assert best_here() is UNKNOWN
    monkeypatch.setattr(blas, "threads", lambda: 2)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    assert best_here() is UNKNOWN


@pytest.mark.usefixtures("_measured")
def test_few_rows_are_decoded_by_one_thread_where_it_was_measured_to_pay(monkeypatch):
    """With AVX-512 only while something in the background has use for the other core."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.cpu)
    rows = (1, 2, 3, 8, 9, 16)
    for core, alone, beside in (("Zen", 1, 1), ("SkylakeX", 0, 1), ("Cooperlake", 0, 0)):
        monkeypatch.setattr(blas, "core", lambda core=core: core)
        assert [threads_here(n) for n in rows] == [0, 0, alone, alone, 0, 0]
        assert [threads_here(n, beside=True) for n in rows] == [0, 0, beside, beside, 0, 0]


@pytest.mark.skipif(blas.threads() < 2, reason="OpenBLAS has one thread here, or is not there")
def test_one_thread_has_no_blocks_to_fill(monkeypatch):
    """What is used is what the library says; it is never more than there is."""
    monkeypatch.setattr(products, "SMALL", 0)
    linear, seen = nn.Linear(4, 6), []
    call = products._padded(lambda module, x: seen.append(x.shape[0]) or nn.Linear.__call__(module, x), AVX2)
    try:
        for count, rows in ((1, 5), (0, 16), (10_000, 16)):
            blas.use(count)
            assert blas.used() == blas._told("openblas_get_num_threads") == (1 if count == 1 else blas.threads())
            call(linear, mx.ones((5, 4)))
            assert seen.pop() == rows
    finally:
        blas.use()


@pytest.mark.usefixtures("_measured")
@pytest.mark.parametrize("wanted", ["auto", "off"])
def test_the_service_decodes_few_by_one_thread_and_all_else_by_all(tmp_path, monkeypatch, wanted):
    """Prompts and training have all; a batch of answers what it was measured for, in `serving.decode_threads: auto`."""
    used = [0]
    monkeypatch.setattr(blas, "use", lambda count=0: used.append(count))
    monkeypatch.setattr(blas, "used", lambda: used[-1] or 2)
    with running(tmp_path, {**QUICK, "backend": "cpu"}, serving__decode_threads=wanted) as service:
        asked = [service.service.search(request(question)) for question, _ in FACTS[:4]]

        async def together():
            return await asyncio.gather(*asked)

        service.call(together())
        assert (1 in used) is (wanted == "auto")
        del used[:-1]
        service.learn(FACTS[0])
        assert 1 not in used[1:]


@pytest.mark.usefixtures("_measured")
@pytest.mark.parametrize(("wanted", "padded"), [("auto", True), ("off", False)])
def test_the_service_pads_what_answers_and_not_what_learns(tmp_path, wanted, padded):
    """The serving tree, and the one with the stable checkpoint folded in; a checkpoint is learnt and answers."""
    flags = {**QUICK, "training.max_steps": 30, "training.batch_size": 4, "serving.fuse": "always", "backend": "cpu"}
    with running(tmp_path, flags, serving__pad_rows=wanted) as service:
        service.learn(FACTS[0])
        until(lambda: service.engine(lambda e: e._fused.tree), "the folded tree")
        trees = service.engine(lambda e: (e._decoder._model.tree, e._fused.tree, e._base.module))
        serving, folded, base = ({type(m) for m in tree.modules()} for tree in trees)
        assert (nn.Linear not in serving) is (nn.Linear not in folded) is padded
        assert nn.Linear in base
        assert service.ask(FACTS[0][0]).text == FACTS[0][1]
