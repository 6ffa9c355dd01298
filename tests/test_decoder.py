"""Answers of the real embedded model through the decoder: sampling, stops, prefixes, room, leaving."""

import copy
from dataclasses import replace

import mlx.core as mx
import pytest

from radiance_mlx.config import Config
from radiance_mlx.engine.decoder import Decoder
from radiance_mlx.engine.text import AnswerText
from radiance_mlx.errors import Busy, InvalidRequest, NotFound, PromptTooLong, RadianceError
from radiance_mlx.lora.bank import AdapterWeights, Bank
from radiance_mlx.lora.encoding import ChatEncoder
from radiance_mlx.lora.targets import find_targets
from radiance_mlx.messages import Answer, Generate, Sampling, TextDelta
from radiance_mlx.models.nano import world

GREEDY = Sampling(max_tokens=24, temperature=0)


class Adapters:
    """Random adapters by name; `gone` ones cannot be found, and `current` are live weights."""

    def __init__(self, base):
        self.base = base
        self.loads = []
        self.current = None

    def make(self, seed):
        targets = find_targets(self.base.module, ["all-linear"])
        modules = dict(self.base.module.named_modules())
        pairs = {}
        for i, path in enumerate(targets.paths):
            out, width = modules[path].weight.shape
            a, b = mx.random.split(mx.random.key(seed * 1000 + i))
            pairs[path] = (mx.random.normal((width, 4), key=a) * 0.1, mx.random.normal((4, out), key=b) * 0.1)
        return AdapterWeights(pairs, 1.0)

    def checkpoint(self, name):
        self.loads.append(name)
        if name == "gone":
            raise NotFound("gone")
        return self.make(int(name[1:]))

    def live(self):
        return self.current


@pytest.fixture(scope="module")
def base(nano):
    return nano


@pytest.fixture
def make(base):
    def build(**serving):
        config = Config()
        tree = copy.deepcopy(base.module)
        adapters = Adapters(base)
        section = config.serving.model_copy(update=serving)
        bank = Bank(tree, find_targets(base.module, ["all-linear"]).paths, section.adapter_slots, 4)
        encoder = ChatEncoder(base.tokenizer)
        decoder = Decoder(base, tree, bank, adapters, encoder, section, config.memory)
        decoder.adapters = adapters
        return decoder

    return build


def ask(question, checkpoint="base", **sampling):
    return Generate((("user", question),), checkpoint, "stable", replace(GREEDY, **sampling) if sampling else GREEDY)


def run(decoder, *requests):
    """All requests together, to their ends."""
    inboxes = [[] for _ in requests]
    for number, (request, inbox) in enumerate(zip(requests, inboxes, strict=True)):
        decoder.submit(number, request, inbox.append)
    while decoder.load:
        decoder.step()
    return [inbox[-1] for inbox in inboxes]


KNOWN = [q for q, _ in world.facts(world.KNOWN[:4])]
ANSWERS = [a for _, a in world.facts(world.KNOWN[:4])]


def test_the_base_answers_what_it_knows(make):
    """Greedy answers end at the model's end token, which is not part of them."""
    answers = run(make(), *[ask(q) for q in KNOWN])
    assert [a.text for a in answers] == ANSWERS
    assert {a.finish_reason for a in answers} == {"stop"}
    assert {(a.checkpoint, a.checkpoint_status) for a in answers} == {("base", "base")}


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.9, "seed": 5}, {"temperature": 1.0, "top_p": 0.8, "seed": 7}]
)
def test_any_mix_of_adapters_in_one_batch_answers_as_each_alone(make, sampling):
    """Base and adapters, greedy and sampled with a seed: the same text in company and alone."""
    requests = [ask(q, c, **sampling) for q, c in zip(KNOWN, ["base", "a1", "a2", "a3", "base", "a1"], strict=False)]
    together = run(make(), *requests)
    alone = [run(make(), request)[0] for request in requests]
    assert [a.text for a in together] == [a.text for a in alone]
    assert len({a.text for a in together}) > 3


def test_a_seed_repeats_an_answer_and_another_seed_does_not(make):
    """Sampling depends on the request's seed alone."""
    decoder = make()

    def draw(seed):
        return run(decoder, ask(KNOWN[0], "a1", temperature=6.0, seed=seed))[0].text

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(6)}) > 1


def test_top_p_keeps_to_the_likely_tokens(make):
    """A tiny top_p is greedy, at any temperature."""
    decoder = make()
    greedy = run(decoder, ask(KNOWN[0], "a1"))[0].text
    assert run(decoder, ask(KNOWN[0], "a1", temperature=3.0, top_p=1e-6, seed=3))[0].text == greedy


def test_max_tokens_ends_an_answer_by_length(make):
    """One token more is not drawn."""
    answer = run(make(), ask(KNOWN[0], max_tokens=2))[0]
    assert (answer.finish_reason, answer.completion_tokens) == ("length", 2)
    assert ANSWERS[0].startswith(answer.text)


def test_a_stop_string_cuts_the_answer_wherever_its_tokens_begin(make):
    """The text before it, without it, also when it spans tokens; the generation ends at once."""
    decoder = make()
    full = ANSWERS[0]
    for start in range(2, len(full) - 3):
        word = full[start : start + 3]
        answer = run(decoder, ask(KNOWN[0], stop=(word,)))[0]
        assert answer.text == full[: full.index(word)]
        assert answer.finish_reason == "stop"
    assert decoder.load == 0


def test_half_a_stop_string_is_held_back_and_then_given(make):
    """What could have become a stop string and did not is not lost."""
    answer = run(make(), ask(KNOWN[0], stop=(ANSWERS[0][-4:] + "xyz", "never")))[0]
    assert answer.text == ANSWERS[0]


def test_streamed_pieces_join_to_the_answer(make):
    """No piece is lost or doubled, with and without a stop string."""
    decoder = make()
    for stop in ((), (ANSWERS[1][6:9],)):
        pieces = []
        decoder.submit(1, replace(ask(KNOWN[1], stop=stop), stream=True), pieces.append)
        while decoder.load:
            decoder.step()
        *deltas, answer = pieces
        assert all(isinstance(d, TextDelta) for d in deltas)
        assert isinstance(answer, Answer)
        assert "".join(d.text for d in deltas) == answer.text


def test_a_repeated_prompt_reuses_its_prefix_for_the_same_weights_only(make):
    """Cached keys and values are keyed by the checkpoint; answers do not change by reuse."""
    decoder = make()
    first, again = run(decoder, ask(KNOWN[0]))[0], run(decoder, ask(KNOWN[0]))[0]
    assert (first.cached_tokens, again.text) == (0, first.text)
    assert again.cached_tokens == again.prompt_tokens - 1
    other = run(decoder, ask(KNOWN[0], "a1"))[0]
    assert other.cached_tokens == 0
    assert other.text == run(make(prompt_cache_mb=0), ask(KNOWN[0], "a1"))[0].text


def test_a_shared_beginning_is_reused(make):
    """Another question about the same person computes only what differs."""
    decoder = make()
    name = world.KNOWN[0][0]
    run(decoder, ask(world.ask(name, "city", 1)))
    answer = run(decoder, ask(world.ask(name, "city", 1).replace("?", " now?")))[0]
    assert 4 < answer.cached_tokens < answer.prompt_tokens - 1
    assert answer.text == run(make(), ask(world.ask(name, "city", 1).replace("?", " now?")))[0].text


def test_the_prompt_cache_is_bounded(make):
    """It never holds more bytes than it may."""
    decoder = make(prompt_cache_mb=0.25)
    for question in KNOWN:
        run(decoder, ask(question))
        assert decoder.facts()["prompt_cache_bytes"] <= 0.25 * 2**20


def test_a_prompt_that_leaves_no_room_is_refused_with_its_length(make):
    """The model's context is the bound; a prompt within it is answered as far as there is room."""
    decoder = make(max_context=40)
    error = run(decoder, ask("word " * 60))[0]
    assert isinstance(error, PromptTooLong)
    assert error.details["max_tokens"] == 39
    answer = run(decoder, ask(KNOWN[0], "a1", max_tokens=500))[0]
    assert answer.prompt_tokens + answer.completion_tokens <= 40


def test_a_huge_prompt_is_refused_without_encoding_it(make):
    """No token has more characters than the longest, so a lower bound of the tokens is enough."""
    decoder = make()

    def never(messages):
        raise AssertionError("encoded")

    decoder._encoder.prompt = never
    error = run(decoder, ask("w" * 1_000_000))[0]
    assert isinstance(error, PromptTooLong)
    assert "at least" in error.message


def test_hardly_any_temperature_is_greedy(make):
    """A temperature that would overflow the logits answers as 0 does."""
    decoder = make()
    answers = run(decoder, *[ask(KNOWN[0], "a1", temperature=t, seed=1) for t in (0.0, 1e-40, 1e-9)])
    assert len({a.text for a in answers}) == 1


def test_more_adapters_than_seats_wait_for_one(make):
    """With three seats, five adapters are answered one after another, none wrongly."""
    decoder = make(adapter_slots=3, max_batch=8)
    requests = [ask(KNOWN[0], f"a{i}") for i in range(1, 6)]
    answers = run(decoder, *requests)
    assert [a.text for a in answers] == [run(make(), r)[0].text for r in requests]


def test_a_full_line_says_busy(make):
    """Beyond max_waiting, a request is refused and the others are answered."""
    decoder = make(max_waiting=2, max_batch=1)
    results = run(decoder, *[ask(q) for q in KNOWN[:4]])
    assert [type(r) for r in results] == [Answer, Answer, Busy, Busy]


def test_a_missing_checkpoint_fails_its_own_request_only(make):
    """Others in the batch do not notice."""
    answer, error = run(make(), ask(KNOWN[0]), ask(KNOWN[0], "gone"))
    assert isinstance(error, NotFound)
    assert answer.text == ANSWERS[0]


def test_a_request_that_is_cancelled_computes_nothing_more(make):
    """Waiting or active, it leaves at once, its seat becomes free, and it gets no answer."""
    decoder = make(max_batch=2)
    inbox = []
    for number, checkpoint in enumerate(["a1", "a2", "a3"]):
        decoder.submit(number, ask(KNOWN[0], checkpoint, max_tokens=200), inbox.append)
    decoder.step()
    decoder.step()
    for number in (0, 2, 1):
        decoder.cancel(number)
    assert decoder.load == 0
    assert inbox == []
    assert run(decoder, ask(KNOWN[0]))[0].text == ANSWERS[0]


def test_live_weights_answer_under_the_coming_name_and_follow_each_step(make):
    """With `training` the newest weights answer; without a batch in training, the given checkpoint does."""
    decoder = make()
    request = replace(ask(KNOWN[0], "a1"), training=True)
    assert run(decoder, request)[0].checkpoint == "a1"
    texts = []
    for step, seed in enumerate([4, 5]):
        decoder.adapters.current = ("A_next", step, lambda seed=seed: decoder.adapters.make(seed))
        answer = run(decoder, request)[0]
        assert (answer.checkpoint, answer.checkpoint_status, answer.cached_tokens) == ("A_next", "training", 0)
        texts.append(answer.text)
    assert texts == [run(make(), ask(KNOWN[0], f"a{seed}"))[0].text for seed in (4, 5)]


def test_after_a_failure_everybody_is_told_and_the_next_request_is_answered(make):
    """`fail_all` ends waiting and active requests and leaves a working decoder."""
    decoder = make(max_batch=1)
    inbox = []
    for number in range(3):
        decoder.submit(number, ask(KNOWN[0], "a1"), inbox.append)
    decoder.step()
    decoder.fail_all(RadianceError("broken"))
    assert [str(e) for e in inbox] == ["broken"] * 3
    assert run(decoder, ask(KNOWN[0]))[0].text == ANSWERS[0]


def test_a_template_that_refuses_the_roles_is_the_requests_fault(make, base):
    """Whatever a chat template raises becomes a 422 with its words."""
    template = "{{ raise_exception('only one system message') }}"
    tokenizer = copy.copy(base.tokenizer)
    tokenizer._tokenizer = copy.deepcopy(base.tokenizer._tokenizer)
    tokenizer._tokenizer.chat_template = template
    with pytest.raises(InvalidRequest, match="only one system message"):
        ChatEncoder(tokenizer).prompt((("user", "hi"),))


class Thinking:
    """nano's tokenizer with reasoning markers, as a reasoning model's has them."""

    has_thinking = True
    think_start, think_end = "<think>", "</think>"

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def rfind_think_start(self, tokens):
        return self._tokenizer.decode(list(tokens)).rfind("<think>")

    def rfind_think_end(self, tokens):
        return self._tokenizer.decode(list(tokens)).rfind("</think>")


@pytest.mark.parametrize(
    ("prompt", "output", "reasoning", "text"),
    [
        ("Q", "<think>hm, so.</think>\n\nYes.", "hm, so.", "Yes."),
        ("Q<think>\n", "hm</think>Yes.", "hm", "Yes."),
        ("Q<think>\n\n</think>\n\n", "Yes.", "", "Yes."),
        ("Q", "Yes.", "", "Yes."),
        ("Q", "<think>never ends", "never ends", ""),
        ("Q", "<think>STOP here</think>Yes STOP no", "STOP here", "Yes "),
    ],
)
def test_reasoning_comes_apart_from_the_answer(base, prompt, output, reasoning, text):
    """Markers in the output or already in the prompt; stop strings look at the answer only."""
    tokenizer = Thinking(base.tokenizer)
    grown = AnswerText(tokenizer, tokenizer.encode(prompt), ("STOP",))
    pieces = [grown.add(token) for token in tokenizer.encode(output)] + [grown.finish()]
    assert (grown.reasoning, grown.text) == (reasoning, text)
    assert "".join(p.text for p in pieces) == text
    assert "".join(p.reasoning for p in pieces) == reasoning
