"""The adapter bank: a row of a mixed batch is what its adapter gives alone."""

import copy
import gc

import mlx.core as mx
import pytest
import tiny
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tuner.lora import LoRALinear

from radiance_mlx.engine.rows import BankModel, RowEntry, RowSampler, RowState
from radiance_mlx.lora.bank import BASE_SLOT, AdapterWeights, Bank, BankLinear, RowSlots
from radiance_mlx.lora.targets import find_targets

PROMPTS = tiny.prompts(5, 9, 17, 30)


@pytest.fixture(scope="module")
def base():
    return tiny.model()


@pytest.fixture(scope="module")
def adapters(base):
    targets = find_targets(base, tiny.ATTENTION)
    return [None, *(tiny.random_adapter(base, targets, seed=seed) for seed in (1, 2, 3))]


def banked(base, adapters, *, slots=None, rank=4, names=tiny.ATTENTION):
    """A bank with `adapters[i]` in slot i, and its model."""
    tree = copy.deepcopy(base)
    bank = Bank(tree, find_targets(base, names).paths, slots or len(adapters), rank)
    for slot, adapter in enumerate(adapters):
        if adapter is not None:
            bank.write(slot, adapter)
    return bank, BankModel(tree, bank.rows, head=tiny.served_head(tree, base))


def answers(served, rows, prompts=PROMPTS, n=16, **options):
    running = tiny.bank_generator(served, **options)
    return tiny.drain(running, tiny.ask(running, served, prompts, rows, n))


def answer_alone(base, adapter, prompt, n=16):
    """mlx-lm's generator with the plain LoRA model and one prompt."""
    running = tiny.generator(tiny.alone(base, adapter))
    return tiny.drain(running, running.insert([prompt], max_tokens=[n]))[0]


# --- one linear ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2.0, 0.3])
@pytest.mark.parametrize("bits", [None, 4])
def test_a_row_is_the_lora_layer(bits, scale):
    """Each row of a `BankLinear` is mlx-lm's `LoRALinear` with that row's weights, up to rounding."""
    base = tiny.model(bits=bits)
    path = "model.layers.1.self_attn.q_proj"
    targets = find_targets(base, [path])
    adapters = [None, *(tiny.random_adapter(base, targets, scale=scale, seed=s) for s in (1, 2))]
    bank, served = banked(base, adapters, names=[path])
    linear = dict(served.tree.named_modules())[path]
    x = mx.random.normal((4, 7, 32))
    bank.rows.slots = RowSlots([2, 0, 1, 2])
    y = linear(x)
    for row, slot in enumerate((2, 0, 1, 2)):
        plain = dict(tiny.alone(base, adapters[slot]).named_modules())[path]
        assert isinstance(plain, LoRALinear) == (slot != 0)
        assert mx.allclose(y[row], plain(x[row : row + 1])[0], rtol=1e-5, atol=1e-4).item()
    assert not mx.allclose(y[0], linear.linear(x[:1])[0], atol=0.1).item()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(3, 1, 32), (3, 5, 32), (3, 2, 5, 32)], ids=["decoding", "prompts", "inner axis"])
def test_rows_that_are_alike_are_what_each_is_among_others(dtype, shape):
    """Rows of one slot alone, whose product is taken of all together, give what they give beside a row of another."""
    base = tiny.model()
    base.set_dtype(getattr(mx, dtype))
    path = "model.layers.0.mlp.up_proj"
    targets = find_targets(base, [path])
    bank, served = banked(base, [None, *(tiny.random_adapter(base, targets, seed=s) for s in (1, 2))], names=[path])
    linear = dict(served.tree.named_modules())[path]
    x = mx.random.normal(shape).astype(getattr(mx, dtype))
    bank.rows.slots = RowSlots([2, 2, 2])
    assert bank.rows.slots.only == 2
    alike = linear(x)
    bank.rows.slots = RowSlots([2, 1, 2])
    assert bank.rows.slots.only is None
    mixed = linear(x)
    rounding = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]
    assert alike.dtype == mixed.dtype == getattr(mx, dtype)
    assert mx.allclose(alike[::2], mixed[::2], rtol=rounding, atol=rounding).item()
    assert not mx.allclose(alike[1], mixed[1], rtol=rounding, atol=0.1).item()


def test_what_is_written_after_a_slot_was_used_is_used(base, adapters):
    """A slot that has answered and is filled anew, with a larger rank too, answers by what it was filled with, and
    writing takes no second copy of the stacks.
    """
    bank, served = banked(base, adapters, slots=64)
    assert answers(served, [tiny.greedy(1)], [PROMPTS[0]]) == [answer_alone(base, adapters[1], PROMPTS[0])]
    module = bank.linear(bank.paths[0])
    gc.collect()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    bank.write(1, adapters[2])
    assert mx.get_peak_memory() - held < module.a.nbytes
    assert answers(served, [tiny.greedy(1)], [PROMPTS[0]]) == [answer_alone(base, adapters[2], PROMPTS[0])]
    wider = tiny.random_adapter(base, find_targets(base, tiny.ATTENTION), rank=bank.rank + 3, seed=9)
    bank.write(1, wider)
    assert answers(served, [tiny.greedy(1)], [PROMPTS[0]]) == [answer_alone(base, wider, PROMPTS[0])]


def test_half_precision_goes_through():
    """A base in bfloat16 answers in bfloat16; the adapter's product is taken in float32, as LoRA layers do."""
    base = tiny.model()
    base.set_dtype(mx.bfloat16)
    path = "model.layers.0.self_attn.v_proj"
    adapter = tiny.random_adapter(base, find_targets(base, [path]))
    bank, served = banked(base, [None, adapter], names=[path])
    x = mx.random.normal((1, 3, 32)).astype(mx.bfloat16)
    bank.rows.slots = RowSlots([1])
    y = dict(served.tree.named_modules())[path](x)
    plain = dict(tiny.alone(base, adapter).named_modules())[path](x)
    assert y.dtype == plain.dtype == mx.bfloat16
    assert mx.allclose(y, plain, rtol=0.02, atol=0.02).item()


def test_rows_with_an_inner_axis():
    """Some architectures put an axis between rows and positions: the slot still goes by row."""
    base = tiny.model()
    path = "model.layers.0.mlp.up_proj"
    adapter = tiny.random_adapter(base, find_targets(base, [path]))
    bank, served = banked(base, [None, adapter], names=[path])
    linear = dict(served.tree.named_modules())[path]
    x = mx.random.normal((2, 3, 5, 32))
    bank.rows.slots = RowSlots([1, 0])
    y = linear(x)
    plain = dict(tiny.alone(base, adapter).named_modules())[path]
    assert mx.allclose(y[0], plain(x[0]), atol=1e-4).item()
    assert mx.allclose(y[1], linear.linear(x[1]), atol=1e-5).item()  # another shape, another path in BLAS


# --- batches through mlx-lm's generator ------------------------------------------------------------


def test_a_mixed_batch_is_each_adapter_alone(base, adapters):
    """Base and three adapters in one batch of unlike prompts give the tokens that each gives alone."""
    _, served = banked(base, adapters)
    together = answers(served, [tiny.greedy(slot) for slot in range(4)])
    apart = [answer_alone(base, adapter, prompt) for adapter, prompt in zip(adapters, PROMPTS, strict=True)]
    assert together == apart
    assert all(len(set(tokens)) > 4 for tokens in together)


def test_logits_of_a_mixed_batch(base, adapters):
    """The same prompt by every slot at once: each row's logits are its adapter's."""
    _, served = banked(base, adapters)
    logits = tiny.bank_logits(served, PROMPTS[2], range(4))
    for slot, adapter in enumerate(adapters):
        plain = tiny.alone(base, adapter)(mx.array([PROMPTS[2]]))[0]
        assert mx.allclose(logits[slot], plain, atol=1e-3).item()
        assert not mx.allclose(logits[slot], logits[slot - 1], atol=0.5).item()


def test_rows_that_come_and_go(base, adapters):
    """Sequences that join a running batch, end at different times or are removed keep their adapters."""
    _, served = banked(base, adapters)
    running = tiny.bank_generator(served, completion_batch_size=3, prefill_batch_size=2, prefill_step_size=8)
    slots, lengths = [1, 2, 0, 3, 2, 1], [4, 9, 14, 6, 3, 11]
    prompts = tiny.prompts(12, 5, 20, 9, 3, 26, seed=4)
    uids = []
    for prompt, slot, length in list(zip(prompts, slots, lengths, strict=True))[:3]:
        uids += tiny.ask(running, served, [prompt], [tiny.greedy(slot)], length)
    removed = tiny.ask(running, served, [PROMPTS[3]], [tiny.greedy(3)], 30)
    tokens = {uid: [] for uid in uids}
    for _ in range(8):
        for response in running.next()[1]:
            tokens.setdefault(response.uid, []).append(response.token)
    running.remove(removed)
    for prompt, slot, length in list(zip(prompts, slots, lengths, strict=True))[3:]:
        uids += tiny.ask(running, served, [prompt], [tiny.greedy(slot)], length)
    while any(len(tokens.get(uid, [])) < length for uid, length in zip(uids, lengths, strict=True)):
        for response in running.next()[1]:
            tokens.setdefault(response.uid, []).append(response.token)
    for uid, prompt, slot, length in zip(uids, prompts, slots, lengths, strict=True):
        assert tokens[uid] == answer_alone(base, adapters[slot], prompt, length)


ROWS = [(1, 0.7, 1.0, 11), (2, 1.3, 0.8, 12), (0, 0.0, 1.0, 13), (3, 1.0, 0.3, 14)]


def test_sampled_answers_are_those_of_each_row_alone(base, adapters):
    """With temperatures, top_p and seeds mixed, a row draws what it draws alone."""
    _, served = banked(base, adapters)
    together = answers(served, [RowState(*row) for row in ROWS])
    apart = [answers(served, [RowState(*row)], [prompt])[0] for row, prompt in zip(ROWS, PROMPTS, strict=True)]
    assert together == apart
    assert together[2] == answer_alone(base, None, PROMPTS[2])


def test_the_seed_is_the_answer(base, adapters):
    """The same seed gives the same answer again, another seed another one, the same seed by other rows too."""
    _, served = banked(base, adapters)
    rows = [RowState(1, 1.0, 1.0, seed) for seed in (5, 5, 6)]
    first, twin, other = answers(served, rows, [PROMPTS[1]] * 3)
    assert first == twin != other
    assert answers(served, [RowState(1, 1.0, 1.0, 5)], [PROMPTS[1]]) == [first]


class _Fixed(BankModel):
    """Gives the rows of an entry without running a model."""

    def __init__(self, rows):
        super().__init__(tiny.model(num_hidden_layers=1), Bank(tiny.model(), [], 1, 1).rows)
        self.current = RowEntry(rows)


def drawn(logprobs, temperature, top_p, count=4000):
    """How often each token comes, drawn for `count` rows of seeds of their own."""
    sampler = RowSampler(_Fixed([RowState(0, temperature, top_p, seed) for seed in range(count)]))
    tokens = sampler(mx.broadcast_to(logprobs, (count, logprobs.size)))
    return [mx.mean(tokens == token).item() for token in range(logprobs.size)]


def test_tokens_come_as_often_as_they_are_likely():
    """Temperature and top_p mean what they mean in mlx-lm's own sampler."""
    logprobs = mx.log(mx.array([0.5, 0.3, 0.15, 0.05]))
    assert drawn(logprobs, 1.0, 1.0) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.04)
    hot = mx.softmax(logprobs / 2.0)
    assert drawn(logprobs, 2.0, 1.0) == pytest.approx(hot.tolist(), abs=0.04)
    mx.random.seed(0)
    theirs = make_sampler(temp=0.8, top_p=0.7)(mx.broadcast_to(logprobs, (4000, 4)))
    expected = [mx.mean(theirs == token).item() for token in range(4)]
    assert expected[2] == expected[3] == 0.0
    assert drawn(logprobs, 0.8, 0.7) == pytest.approx(expected, abs=0.04)


def test_draws_of_one_row_are_independent():
    """The second token of a seed is not the first again."""
    row = RowState(0, 1.0, 1.0, 3)
    sampler = RowSampler(_Fixed([row]))
    flat = mx.zeros((1, 50)) - mx.log(mx.array(50.0))
    tokens = [sampler(flat).item() for _ in range(40)]
    assert row.drawn == 40
    assert len(set(tokens)) > 20


# --- the stacks ------------------------------------------------------------------------------------


def test_smaller_ranks_are_padded(base):
    """An adapter of a lower rank than the bank's answers as it does alone, beside full ones."""
    targets = find_targets(base, tiny.ATTENTION)
    mixed = [None, *(tiny.random_adapter(base, targets, rank=rank, scale=1.7, seed=rank) for rank in (1, 2, 4))]
    _, served = banked(base, mixed)
    together = answers(served, [tiny.greedy(slot) for slot in range(4)])
    assert together == [answer_alone(base, a, p) for a, p in zip(mixed, PROMPTS, strict=True)]


def test_a_slot_is_overwritten_whole(base, adapters):
    """What was in a slot leaves no trace: a smaller rank and fewer modules take all of its place."""
    small = tiny.random_adapter(base, find_targets(base, ["q_proj"]), rank=2, seed=7)
    bank, served = banked(base, adapters)
    bank.write(2, small)
    assert answers(served, [tiny.greedy(2)], [PROMPTS[1]]) == [answer_alone(base, small, PROMPTS[1])]
    assert answers(served, [tiny.greedy(3)], [PROMPTS[1]]) == [answer_alone(base, adapters[3], PROMPTS[1])]


def test_growing_while_rows_are_active(base, adapters):
    """A wider adapter with more modules joins: rows under way go on as if nothing had been."""
    bank, served = banked(base, adapters, slots=6)
    bigger = tiny.random_adapter(base, find_targets(base, ["all-linear", "lm_head"]), rank=7, seed=8)
    running = tiny.bank_generator(served)
    uids = tiny.ask(running, served, PROMPTS[:2], [tiny.greedy(1), tiny.greedy(0)], 16)
    tokens = {uid: [] for uid in uids}

    def go_on():
        for response in running.next()[1]:
            tokens.setdefault(response.uid, []).append(response.token)

    for _ in range(5):
        go_on()
    assert any(tokens.values())
    covered = len(bank.paths)
    bank.write(5, bigger)
    assert bank.rank == 7
    assert len(bank.paths) == 3 * 7 + 1 > covered
    uids += tiny.ask(running, served, [PROMPTS[2]], [tiny.greedy(5)], 16)
    while any(len(tokens.get(uid, [])) < 16 for uid in uids):
        go_on()
    for uid, adapter, prompt in zip(uids, (adapters[1], None, bigger), PROMPTS[:3], strict=True):
        assert tokens[uid] == answer_alone(base, adapter, prompt)
    assert answers(served, [tiny.greedy(3)], [PROMPTS[3]]) == [answer_alone(base, adapters[3], PROMPTS[3])]


def test_the_base_slot_is_the_base(base, adapters):
    """Slot 0 stays zero, and a batch of base rows alone skips the bank altogether."""
    bank, served = banked(base, adapters)
    bank.rows.slots = None
    tokens = mx.array([PROMPTS[3]])
    plain = base(tokens)
    assert mx.array_equal(served.tree(tokens), plain).item()
    bank.rows.slots = RowSlots([BASE_SLOT])
    assert mx.allclose(served.tree(tokens), plain, atol=1e-5).item()
    stacks = [m for m in served.tree.modules() if isinstance(m, BankLinear)]
    assert len(stacks) == len(bank.paths) == 12
    assert not any(m.a[BASE_SLOT].any().item() or m.b[BASE_SLOT].any().item() for m in stacks)


def test_an_unknown_module_changes_nothing(base, adapters):
    """A path that the model has not is a `KeyError`, and the bank stays as it was."""
    bank, served = banked(base, adapters)
    paths = bank.paths
    with pytest.raises(KeyError, match="wq"):
        bank.write(1, AdapterWeights({"model.layers.0.wq": (mx.zeros((32, 4)), mx.zeros((4, 32)))}, 1.0))
    assert bank.paths == paths
    assert answers(served, [tiny.greedy(1)], [PROMPTS[0]]) == [answer_alone(base, adapters[1], PROMPTS[0])]


def test_the_bank_shares_the_base(base, adapters):
    """A banked tree takes the memory of its stacks and no second base, and `nbytes` counts them."""
    held = mx.get_active_memory()
    bank, _served = banked(base, adapters, slots=8)
    per_slot = sum(a.nbytes + b.nbytes for a, b in adapters[1].weights.values())
    assert bank.nbytes == 8 * per_slot
    assert mx.get_active_memory() - held < bank.nbytes + per_slot


# --- the entry that travels with each sequence -----------------------------------------------------


def entry(*slots, temperature=0.0):
    return RowEntry([RowState(slot, temperature, 1.0, slot) for slot in slots])


def slots_of(rows):
    return None if rows.slots is None else rows.slots.each.tolist()


def test_entries_are_merged_filtered_extended_and_extracted():
    """The rows keep their order through all that the generator does to a cache."""
    merged = RowEntry.merge([entry(1), entry(2), entry(0)])
    assert slots_of(merged) == [1, 2, 0]
    merged.extend(entry(3))
    assert slots_of(merged) == [1, 2, 0, 3]
    merged.filter([3, 1])
    assert slots_of(merged) == [3, 2]
    merged.filter(mx.array([1]))
    assert slots_of(merged) == [2]
    assert slots_of(RowEntry.merge([entry(4), entry(5)]).extract(1)) == [5]


def test_base_rows_alone_need_no_slots():
    """Slots and greediness follow the rows that are there now."""
    rows = RowEntry.merge([entry(0), entry(0)])
    assert slots_of(rows) is None
    rows.extend(entry(2, temperature=0.5))
    assert slots_of(rows) == [0, 0, 2]
    assert not rows.greedy
    rows.filter([0, 1])
    assert slots_of(rows) is None
    assert rows.greedy


def test_a_copied_entry_shares_its_rows():
    """The generator copies a batch to split it: what a row has drawn is counted on in its half."""
    whole = entry(1, 2)
    half = copy.deepcopy(whole)
    half.filter([1])
    half.rows[0].drawn += 1
    assert whole.rows[1].drawn == 1
    assert slots_of(whole) == [1, 2]


def test_an_entry_holds_nothing_that_could_be_trimmed():
    """Prefix reuse trims caches: the entry lets it, and adds no bytes."""
    rows = entry(1)
    assert rows.is_trimmable()
    assert rows.trim(5) == 5
    assert (rows.nbytes, rows.state, rows.size(), rows.empty()) == (0, [], 0, False)


# --- extremes of sampling ---------------------------------------------------------------------------


@pytest.mark.parametrize("top_p", [1e-300, 1e-45, 1e-38, 1e-12, 1e-7, 1e-4])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 10.0])
def test_a_tiny_top_p_is_greedy(top_p, temperature):
    """The likeliest token always stays, also where 32 bits know the bound as 0."""
    logits = mx.random.normal((300,), key=mx.random.key(1))
    best = mx.argmax(logits).item()
    assert drawn(logits, temperature, top_p, count=50)[best] == 1.0


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-5, 1e-4])
def test_next_to_no_heat_is_greedy(temperature):
    """Alone, and with a top_p that cuts."""
    logits = 30.0 * mx.random.normal((300,), key=mx.random.key(1))
    best = mx.argmax(logits).item()
    assert drawn(logits, temperature, 1.0, count=50)[best] == 1.0
    assert drawn(logits, temperature, 0.9, count=50)[best] == 1.0


@pytest.mark.parametrize("temperature", [1e9, 1e30, 1e300])
def test_endless_heat_makes_what_top_p_leaves_equally_likely(temperature):
    """Never what top_p cut off."""
    logits = mx.log(mx.array([0.5, 0.3, 0.15, 0.05]))
    assert drawn(logits, temperature, 1.0) == pytest.approx([0.25] * 4, abs=0.04)
    assert drawn(logits, temperature, 0.7) == pytest.approx([0.5, 0.5, 0, 0], abs=0.04)


@pytest.mark.parametrize("top_p", [0.999999, 1 - 1e-9, 1 - 2**-53])
def test_a_top_p_just_below_1_cuts_next_to_nothing(top_p):
    """Also where 32 bits know it as 1."""
    logits = mx.log(mx.array([0.5, 0.3, 0.15, 0.05]))
    assert drawn(logits, 1.0, top_p) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.04)


def test_a_neighbour_with_top_p_cuts_nothing_off_a_row_without(base):
    """Even the unlikeliest tokens, which 32 bits lose beside the sum, are drawn as alone when it is hot."""
    logits = mx.array([0.0] + [-20.0] * 300)

    def tokens(*neighbours):
        rows = [RowState(0, 10.0, 1.0, seed) for seed in range(200)]
        sampler = RowSampler(_Fixed([*rows, *neighbours]))
        return sampler(mx.broadcast_to(logits, (len(rows) + len(neighbours), logits.size)))[: len(rows)].tolist()

    alone = tokens()
    assert len(set(alone)) > 50
    assert tokens(RowState(0, 1.0, 0.5, 7)) == alone
