"""Products of a batch: by as many threads, by columns, and padded to as many rows, as OpenBLAS multiplies best."""

import asyncio
import copy
import gc

import mlx.core as mx
import mlx.nn as nn
import pytest
import tiny
from mlx.utils import tree_flatten
from running import FACTS, QUICK, request, running, until

from radiance_mlx import blas
from radiance_mlx.engine import products
from radiance_mlx.engine.products import AVX2, AVX512, UNKNOWN, WITH_SMALL, Best, Columns, best_here, shape_products
from radiance_mlx.lora.targets import LINEAR

BY_COLUMNS = WITH_SMALL["SkylakeX"]


@pytest.mark.parametrize("tied", [False, True])
def test_padding_changes_nothing_but_the_rows_of_a_product(monkeypatch, tied):
    """Whatever the number of rows: logits are the same but for rounding, of the same shape; a linear stays one."""
    monkeypatch.setattr(products, "SMALL", 0)
    monkeypatch.setattr(blas, "used", lambda: 2)
    plain = tiny.model(tie_word_embeddings=tied)
    padded = copy.deepcopy(plain)
    shape_products(padded, AVX2)
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
    products._shaped(Noting.__call__, AVX2)(linear, mx.ones((5, 4)))
    assert seen.pop() == (5, 4)  # it would be computed by one thread
    monkeypatch.setattr(products, "SMALL", 0)
    call = products._shaped(Noting.__call__, AVX2)
    for shape in [(2, 1, 4), (3, 1, 4), (4, 1, 4), (16, 4), (2, 3, 3, 4), (19, 1, 4), (36, 4)]:
        x = mx.random.normal(shape)
        assert mx.allclose(call(linear, x), nn.Linear.__call__(linear, x), atol=1e-6)
    assert seen == [(2, 1, 4), (3, 1, 4), (16, 4), (16, 4), (2, 3, 3, 4), (19, 1, 4), (48, 4)]
    seen.clear()
    for rows in (9, 10, 25, 26):  # with AVX-512 a block that is half empty costs no more than a full one
        products._shaped(Noting.__call__, AVX512)(linear, mx.ones((rows, 4)))
    assert seen == [(9, 4), (16, 4), (25, 4), (32, 4)]


@pytest.fixture
def _few_by_one(monkeypatch):
    """One thread of a library with kernels for small matrices, whatever there is here: of 600 multiplications."""
    monkeypatch.setattr(blas, "used", lambda: 1)
    monkeypatch.setattr(blas, "takes_small", lambda columns, rows, inner: columns * rows * inner <= 600)


@pytest.mark.usefixtures("_few_by_one")
@pytest.mark.parametrize("tied", [False, True])
def test_products_by_columns_change_nothing_but_rounding(tied):
    """Whatever the number of rows, more than are done so among them; there are no more parameters."""
    plain = tiny.model(tie_word_embeddings=tied)
    divided = copy.deepcopy(plain)
    shape_products(divided, BY_COLUMNS)
    for rows, length in [(1, 1), (3, 1), (5, 2), (16, 1), (7, 5)]:
        tokens = mx.array(tiny.prompts(*[length] * rows))
        wanted, found = plain(tokens), divided(tokens)
        assert found.shape == wanted.shape
        assert mx.allclose(found, wanted, rtol=1e-4, atol=1e-4)
    names = [name for name, _ in tree_flatten(plain.parameters())]
    assert [name for name, _ in tree_flatten(divided.parameters())] == names


def _shaped(linear):
    shape_products(linear, BY_COLUMNS)
    return linear


def _shapes(divided):
    return None if divided is None else tuple(part if part is None else part.shape for part in divided)


@pytest.mark.usefixtures("_few_by_one")
def test_as_many_columns_at_a_time_as_small_kernels_take():
    """Evenly if that is nearly as many, else with what is left over by itself; in the weight's own memory."""
    weight = mx.random.normal((48, 5))
    mx.eval(weight)
    gc.collect()
    before, columns = mx.get_active_memory(), Columns(weight)
    even = {2: None, 3: (2, 5, 24), 6: (3, 5, 16), 10: (4, 5, 12), 15: (6, 5, 8), 16: None}
    for rows, shape in even.items():
        divided = columns.of(rows)
        assert _shapes(divided) == (None if shape is None else (shape, None))
        mx.eval(divided[0] if divided else [])
    assert _shapes(Columns(weight[:47]).of(3)) == ((1, 5, 40), (5, 7))
    assert _shapes(Columns(weight[:46]).of(6)) == ((2, 5, 20), (5, 6))
    odd = Columns(weight[:47]).of(3)
    mx.eval(odd)
    assert mx.get_active_memory() <= before


@pytest.mark.usefixtures("_few_by_one")
@pytest.mark.parametrize("columns", [48, 47])
def test_rows_lie_in_any_number_of_dimensions(columns):
    """With the bias; also none of them, and more than are multiplied so."""
    mx.random.seed(3)
    linear = _shaped(nn.Linear(5, columns))
    for shape in ((1, 5), (3, 5), (5,), (2, 3, 5), (5, 1, 3, 5), (17, 5), (0, 5)):
        x = mx.random.normal(shape)
        found = linear(x)
        assert found.shape == (*shape[:-1], columns)
        assert mx.allclose(found, x @ linear.weight.T + linear.bias, atol=1e-5)


@pytest.mark.usefixtures("_few_by_one")
@pytest.mark.parametrize("what", ["wide", "transposed", "bfloat16", "replaced", "half rows"])
def test_what_cannot_be_divided_is_multiplied_whole(what):
    """Fewer than 8 columns at a time, weights that lie otherwise, or of another dtype, or put there afterwards."""
    linear = nn.Linear(16 if what == "wide" else 5, 48, bias=False)
    if what == "transposed":
        linear.weight = mx.contiguous(linear.weight.T).T
    if what == "bfloat16":
        linear.set_dtype(mx.bfloat16)
    _shaped(linear)
    if what == "replaced":
        linear.weight = linear.weight + 1
    x = mx.random.normal((6, linear.weight.shape[1])).astype(mx.float16 if what == "half rows" else linear.weight.dtype)
    assert mx.allclose(linear(x), x @ linear.weight.T, atol=1e-6)
    if what not in ("replaced", "half rows"):
        assert linear._columns.of(6) is None


@pytest.mark.usefixtures("_measured")
@pytest.mark.parametrize(("kind", "alone"), [("float32", True), ("half of it", False), ("4 bit", False)])
def test_one_thread_decodes_where_nearly_all_is_multiplied_by_columns(monkeypatch, kind, alone):
    """Else what is not would be the slower for it: then as many threads as without."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.cpu)
    monkeypatch.setattr(blas, "core", lambda: "SkylakeX")
    monkeypatch.setattr(blas, "takes_small", lambda columns, rows, inner: columns <= 8)
    tree = tiny.model(bits=4 if kind == "4 bit" else None)
    if kind == "half of it":
        for layer in tree.layers:
            for linear in layer.mlp.children().values():
                linear.weight = mx.contiguous(linear.weight.T).T
    best = shape_products(tree, best_here())
    assert best.by_columns == BY_COLUMNS.by_columns
    assert (best.alone, best.beside) == (
        (BY_COLUMNS if alone else AVX512).alone,
        (BY_COLUMNS if alone else AVX512).beside,
    )


def _largest(rows, inner):
    """Columns that the library's kernels for small matrices take."""
    return products._most_columns(100_000, rows, inner)


@pytest.mark.skipif(blas.core() != "SkylakeX" or not blas.takes_small(8, 1, 64), reason="no kernels for small matrices")
def test_the_library_tells_which_products_are_small():
    """The more rows and the longer they are, the fewer columns; the sums are those of its other kernels."""
    assert _largest(1, 512) > _largest(8, 512) > _largest(8, 4096) > 0
    assert not blas.takes_small(_largest(8, 512) + 1, 8, 512)
    linear = _shaped(nn.Linear(512, 15_361, bias=False))
    blas.use(1)
    try:
        for rows in (1, 4, 16):
            x = mx.random.normal((rows, 512))
            many, _ = linear._columns.of(rows)
            assert 8 <= many.shape[-1] <= _largest(rows, 512)
            assert mx.allclose(linear(x), x @ linear.weight.T, atol=1e-5)
    finally:
        blas.use()


@pytest.fixture
def _measured(monkeypatch):
    """An OpenBLAS that was measured, whatever there is here."""
    monkeypatch.setattr(blas, "can_use_fewer", lambda: True)
    monkeypatch.setattr(blas, "threads", lambda: 2)
    monkeypatch.setattr(blas, "core", lambda: "Zen")


@pytest.mark.usefixtures("_measured")
def test_what_is_done_is_what_was_measured_to_pay(monkeypatch):
    """By OpenBLAS's core, with its two threads, on the CPU; of any other nothing is known, and nothing is done."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.cpu)
    monkeypatch.setattr(blas, "takes_small", lambda *_: False)
    for core, best in (("Zen", AVX2), ("Haswell", AVX2), ("SkylakeX", AVX512), ("Cooperlake", UNKNOWN), ("", UNKNOWN)):
        monkeypatch.setattr(blas, "core", lambda core=core: core)
        assert best_here() is best
    monkeypatch.setattr(blas, "core", lambda: "Zen")
    for threads in (0, 1, 4):
        monkeypatch.setattr(blas, "threads", lambda threads=threads: threads)
        assert best_here() == UNKNOWN
    monkeypatch.setattr(blas, "threads", lambda: 2)
    assert best_here(pads=False) == Best(1, 1, (3, 8), (3, 8))
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    assert best_here() is UNKNOWN


@pytest.mark.usefixtures("_measured")
def test_columns_are_for_libraries_with_kernels_for_small_matrices(monkeypatch):
    """And processors where it was measured, with one thread, too; each switch leaves the other alone."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.cpu)
    monkeypatch.setattr(blas, "takes_small", lambda *_: True)
    for core, best in (("Zen", AVX2), ("SkylakeX", BY_COLUMNS), ("Cooperlake", UNKNOWN)):
        monkeypatch.setattr(blas, "core", lambda core=core: core)
        assert best_here() is best
    monkeypatch.setattr(blas, "core", lambda: "SkylakeX")
    assert best_here(columns=False) is AVX512
    assert best_here(pads=False) == Best(1, 1, (1, 8), (1, 12), 16)
    monkeypatch.setattr(blas, "threads", lambda: 1)
    assert best_here() == Best(1, 1, (1, 0), (1, 0), 16)
    monkeypatch.setattr(blas, "threads", lambda: 4)
    assert best_here() is UNKNOWN


@pytest.mark.parametrize(
    ("best", "alone", "beside"),
    [(AVX2, "0011000", "0011000"), (AVX512, "0000000", "0011000"), (BY_COLUMNS, "1111000", "1111110")],
)
def test_few_rows_are_decoded_by_one_thread_where_it_was_measured_to_pay(best, alone, beside):
    """With AVX-512 only while something in the background has use for the other core, or by columns."""
    rows = (1, 2, 3, 8, 9, 12, 13)
    assert "".join(str(best.threads(n)) for n in rows) == alone
    assert "".join(str(best.threads(n, beside=True)) for n in rows) == beside
    assert {UNKNOWN.threads(n) for n in rows} == {0}


def test_a_library_that_cannot_use_fewer_threads_is_not_waited_for(monkeypatch):
    """One with OpenMP's: what computes goes on while the next step is built."""
    monkeypatch.setattr(blas, "can_use_fewer", lambda: False)
    monkeypatch.setattr(blas, "used", lambda: 2)
    done = []
    monkeypatch.setattr(products, "wait", lambda: done.append("waited"))
    monkeypatch.setattr(blas, "use", lambda count=0: done.append("used"))
    products.use_threads(1)
    assert done == []
    monkeypatch.setattr(blas, "can_use_fewer", lambda: True)
    products.use_threads(1)
    assert done == ["waited", "used"]


@pytest.mark.skipif(blas.threads() < 2, reason="OpenBLAS has one thread here, or is not there")
def test_one_thread_has_no_blocks_to_fill(monkeypatch):
    """What is used is what the library says; it is never more than there is."""
    monkeypatch.setattr(products, "SMALL", 0)
    linear, seen = nn.Linear(4, 6), []
    call = products._shaped(lambda module, x: seen.append(x.shape[0]) or nn.Linear.__call__(module, x), AVX2)
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


@pytest.mark.usefixtures("_measured")
@pytest.mark.parametrize("wanted", ["auto", "off"])
def test_the_service_multiplies_by_columns_where_it_may(tmp_path, monkeypatch, wanted):
    """`serving.column_blocks`: by one thread then, where without them both decode; padding is a switch of its own."""
    monkeypatch.setattr(blas, "core", lambda: "SkylakeX")
    monkeypatch.setattr(blas, "takes_small", lambda columns, rows, inner: columns * rows * inner <= 40_000)
    used, divided = [0], []
    monkeypatch.setattr(blas, "use", lambda count=0: used.append(count))
    monkeypatch.setattr(blas, "used", lambda: used[-1] or 2)
    of = Columns.of
    monkeypatch.setattr(Columns, "of", lambda columns, rows: divided.append(of(columns, rows)) or divided[-1])
    with running(
        tmp_path, {**QUICK, "backend": "cpu"}, serving__column_blocks=wanted, serving__pad_rows="off"
    ) as service:
        divided.clear()
        answer = service.ask(FACTS[0][0]).text
    assert (1 in used) is (wanted == "auto")
    assert any(parts is not None for parts in divided) is (wanted == "auto")
    with running(tmp_path / "plain", {**QUICK, "backend": "cpu"}, serving__column_blocks="off") as service:
        assert service.ask(FACTS[0][0]).text == answer
