"""The engine's generator beside mlx-lm's own: the same tokens, in fewer passes over the weights."""

import mlx.core as mx
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.generate import BatchGenerator

from radiance_mlx.engine import generation
from radiance_mlx.engine.generation import JoiningGenerator, prefill_here
from radiance_mlx.engine.rows import BankModel
from radiance_mlx.lora.bank import Bank
from radiance_mlx.lora.targets import find_targets

PROMPTS = [[1, 2, 3], [5, 8, 2, 9, 4, 7, 11], [6], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], [20, 21], [7, 7, 7, 7]]


class Counted:
    """A model that counts how often it is called, and with how many rows."""

    def __init__(self, inner):
        self.inner, self.layers, self.calls = inner, inner.layers, []

    def __call__(self, tokens, cache):
        self.calls.append(tuple(tokens.shape))
        return self.inner(tokens, cache=cache)


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture(scope="module")
def expected(model):
    """What mlx-lm's generator says to each prompt alone: 12 tokens."""
    return [play(BatchGenerator, model, [(0, i)])[i] for i in range(len(PROMPTS))]


def play(kind, model, arrivals, *, leaves=(), max_tokens=12, stop=(), **options):
    """Tokens by prompt number; `arrivals` and `leaves` are (tick, prompt number)."""
    running = kind(
        model,
        stop_tokens=[[t] for t in stop],
        stream=mx.default_stream(mx.default_device()),
        max_tokens=max_tokens,
        **options,
    )
    numbers, said, left, tick = {}, {number: [] for _, number in arrivals}, len(arrivals), 0
    while left:
        for when, number in arrivals:
            if when == tick:
                numbers[running.insert([list(PROMPTS[number])])[0]] = number
        for when, number in leaves:
            uid = next((uid for uid, n in numbers.items() if n == number), None)
            if when == tick and uid is not None:
                running.remove([uid])
                del numbers[uid]
                left -= 1
        for response in running.next()[1]:
            number = numbers[response.uid]
            said[number].append(response.token)
            if response.finish_reason:
                del numbers[response.uid]
                left -= 1
        tick += 1
        assert tick < 1000
    return said


@settings(max_examples=12, deadline=None)
@given(
    ticks=st.lists(st.integers(0, 12), min_size=len(PROMPTS), max_size=len(PROMPTS)),
    room=st.integers(1, 6),
    chunk=st.sampled_from([1, 2, 5, 64]),
)
def test_whoever_comes_when_says_what_it_says_alone(model, expected, ticks, room, chunk):
    """With any room, and prompts computed in parts of any size."""
    options = {"completion_batch_size": room, "prefill_batch_size": min(room, 3), "prefill_step_size": chunk}
    said = play(JoiningGenerator, model, list(zip(ticks, range(len(PROMPTS)), strict=True)), **options)
    assert [said[i] for i in range(len(PROMPTS))] == expected


@settings(max_examples=10, deadline=None)
@given(
    leaves=st.lists(
        st.tuples(st.integers(0, 14), st.integers(0, len(PROMPTS) - 1)), max_size=3, unique_by=lambda x: x[1]
    )
)
def test_whoever_leaves_takes_nothing_from_the_others(model, expected, leaves):
    """In the line, in the middle of its prompt, or of its answer."""
    gone = {number for _, number in leaves}
    said = play(JoiningGenerator, model, [(i, i) for i in range(len(PROMPTS))], leaves=leaves, prefill_step_size=2)
    for number, tokens in said.items():
        assert tokens == expected[number][: len(tokens)]
        assert number in gone or len(tokens) == 12


def test_stop_tokens_and_lengths_end_a_sequence_as_in_mlx_lm(model, expected):
    """The end token is told, with its reason; one token is enough."""
    stop = expected[1][4]
    for kind in (BatchGenerator, JoiningGenerator):
        said = play(kind, model, [(0, i) for i in range(len(PROMPTS))], stop=[stop])
        for number, tokens in said.items():
            whole = expected[number]
            assert tokens == (whole[: whole.index(stop) + 1] if stop in whole else whole)
    assert play(JoiningGenerator, model, [(0, 3)], max_tokens=1)[3] == expected[3][:1]


def test_a_pass_over_prompts_is_smaller_on_the_cpu(monkeypatch):
    """Unless `serving.prefill_step_size` says how large it is."""
    for device, tokens in ((mx.cpu, 256), (mx.gpu, 512)):
        monkeypatch.setattr(mx, "default_device", lambda device=device: device)
        assert prefill_here() == tokens


@pytest.mark.parametrize("chunk", [1, 6, 16])
def test_no_pass_computes_more_than_a_part(model, expected, chunk):
    """However many prompts come at once, padding included; but for a quarter, if that makes a pass less."""
    counted = Counted(model)
    options = {"prefill_batch_size": len(PROMPTS), "prefill_step_size": chunk}
    said = play(JoiningGenerator, counted, [(0, i) for i in range(len(PROMPTS))], **options)
    assert [said[i] for i in range(len(PROMPTS))] == expected
    parts = [rows * length for rows, length in counted.calls if length > 1]
    assert max(parts, default=1) <= max(1.25 * chunk, len(PROMPTS))


def test_newcomers_cost_no_pass_of_their_own(model):
    """Two sequences that come while one decodes: one pass for their prompts, and its steps have three rows then."""
    counted = Counted(model)
    play(JoiningGenerator, counted, [(0, 0), (5, 1), (5, 3)])
    assert [rows for rows, length in counted.calls if length == 1].count(1) < 12
    prompts = [shape for shape in counted.calls if shape[1] > 1]
    assert prompts == [(1, 2), (2, 11)]
    steps = len(counted.calls) - len(prompts)
    assert steps == 5 + 13  # five before they came; twelve tokens and one step ahead

    theirs = Counted(model)
    play(BatchGenerator, theirs, [(0, 0), (5, 1), (5, 3)])
    assert len(theirs.calls) > len(counted.calls)


class Seen(BankModel):
    """A served model that notes what it is asked for."""

    def __call__(self, tokens, cache):
        self.asked.append(("all", *tokens.shape))
        return super().__call__(tokens, cache)

    def at(self, tokens, cache, places):
        self.asked.append(("ends", *tokens.shape))
        return super().at(tokens, cache, places)


@pytest.mark.parametrize("ends", [True, False])
def test_prompts_that_nobody_has_to_wait_for_give_their_first_tokens_themselves(model, expected, ends):
    """In one pass, and they are told before the next step is begun; beside others, their last tokens join the step."""
    tree = tiny.alone(model, None)
    bank = Bank(tree, find_targets(model, tiny.ATTENTION).paths, 2, 4)
    served = Seen(tree, bank.rows, head=tiny.served_head(tree, model) if ends else None)
    served.asked = []
    running = tiny.bank_generator(served)
    uids = tiny.ask(running, served, PROMPTS[:2], [tiny.greedy()] * 2, 12)
    tokens = {uid: [] for uid in uids}

    def go_on():
        for response in running.next()[1]:
            tokens[response.uid].append(response.token)

    go_on()
    assert served.asked == ([("ends", 2, 7), ("all", 2, 1)] if ends else [("all", 2, 6), ("all", 2, 1)])
    assert list(tokens.values()) == [[answer[0]] if ends else [] for answer in expected[:2]]
    served.asked.clear()
    [late] = tiny.ask(running, served, PROMPTS[3:4], [tiny.greedy()], 12)
    tokens[late] = []
    go_on()
    assert served.asked == [("all", 1, 11), ("all", 3, 1)]
    while len(tokens[late]) < 12:
        go_on()
    assert list(tokens.values()) == [expected[0], expected[1], expected[3]]


@pytest.mark.parametrize("reads_first", [True, False])
def test_beside_training_tokens_are_told_before_the_next_step_is_begun(model, expected, monkeypatch, reads_first):
    """They would wait for the slice that lies between; begun it is when its turn comes. Answers are the same."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.cpu)  # elsewhere a step that is begun holds nobody up
    tree = tiny.alone(model, None)
    bank = Bank(tree, find_targets(model, tiny.ATTENTION).paths, 2, 4)
    served = BankModel(tree, bank.rows, head=tiny.served_head(tree, model))
    running, begun, real = tiny.bank_generator(served), [], generation.JoiningBatch.begin
    monkeypatch.setattr(generation.JoiningBatch, "begin", lambda self: begun.append(self) or real(self))
    running.read_first(reads_first)
    uids = tiny.ask(running, served, PROMPTS[:3], [tiny.greedy()] * 3, 12)
    said = {uid: [] for uid in uids}
    while any(len(tokens) < 12 for tokens in said.values()):
        begun.clear()
        for response in running.next()[1]:
            said[response.uid].append(response.token)
        if all(1 < len(tokens) < 12 for tokens in said.values()):
            assert len(begun) == (1 if reads_first else 2)  # this step's, and the next one's
    assert list(said.values()) == expected[:3]


def test_the_kept_cache_of_an_ended_sequence_goes_on_where_it_was(model, expected):
    """What is told of a finished sequence holds its tokens' keys and values."""
    running = JoiningGenerator(model, stream=mx.default_stream(mx.default_device()), max_tokens=6)
    running.insert([PROMPTS[1]])
    responses = []
    while not responses or responses[-1].finish_reason is None:
        responses += running.next()[1]
    end = responses[-1]
    assert end.all_tokens == PROMPTS[1] + expected[1][:6]
    assert all(cache.offset == len(end.all_tokens) for cache in end.prompt_cache)
    rest = JoiningGenerator(model, stream=mx.default_stream(mx.default_device()), max_tokens=5)
    for cache in end.prompt_cache:
        cache.trim(1)
    rest.insert([end.all_tokens[-1:]], caches=[end.prompt_cache])
    said = []
    while len(said) < 5:
        said += [response.token for response in rest.next()[1]]
    assert said == expected[1][6:11]
