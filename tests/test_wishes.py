"""What single rows ask of the sampler: log-probabilities, penalties, biases; and that nobody else notices."""

import copy

import mlx.core as mx
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from radiance_mlx.config.bases import NANO_FOLDER
from radiance_mlx.engine import rows as rows_module
from radiance_mlx.engine.rows import BankModel, RowState
from radiance_mlx.engine.text import AnswerText
from radiance_mlx.engine.tokens import token_bytes
from radiance_mlx.engine.wishes import Wishes
from radiance_mlx.lora.bank import Bank
from radiance_mlx.lora.targets import find_targets
from radiance_mlx.messages import Sampling, TokenLogprob

PROMPTS = tiny.prompts(5, 9, 17, 30)
LENGTH = 14


@pytest.fixture(scope="module")
def base():
    return tiny.model()


@pytest.fixture(scope="module")
def adapters(base):
    targets = find_targets(base, tiny.ATTENTION)
    return [None, *(tiny.random_adapter(base, targets, seed=seed) for seed in (1, 2, 3))]


@pytest.fixture(scope="module")
def served(base, adapters):
    tree = copy.deepcopy(base)
    bank = Bank(tree, find_targets(base, tiny.ATTENTION).paths, len(adapters), 4)
    for slot, adapter in enumerate(adapters):
        if adapter is not None:
            bank.write(slot, adapter)
    return BankModel(tree, bank.rows, head=tiny.served_head(tree, base))


def row(slot, seed=7, **sampling):
    asked = Sampling(**{"temperature": 0.0, **sampling})
    return RowState(slot, asked.temperature, asked.top_p, seed, wishes=Wishes.of(asked))


def play(served, rows, prompts=PROMPTS, part=6):
    """(tokens, what was told of each) by row; prompts are computed in parts of so many tokens."""
    running = tiny.bank_generator(served, prefill_step_size=part)
    uids = tiny.ask(running, served, prompts, rows, LENGTH)
    said, told, left = {uid: [] for uid in uids}, {uid: [] for uid in uids}, len(uids)
    by_uid = dict(zip(uids, rows, strict=True))
    while left:
        for response in running.next()[1]:
            said[response.uid].append(response.token)
            wishes = by_uid[response.uid].wishes
            if wishes and wishes.logprobs is not None:
                told[response.uid].append(wishes.next_logprobs())
            left -= response.finish_reason is not None
    return [said[uid] for uid in uids], [told[uid] for uid in uids]


def forward(base, adapter, tokens):
    """(length, vocabulary) log-probabilities by mlx-lm's own layers in one pass."""
    logits = tiny.alone(base, adapter)(mx.array([tokens]))[0].astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


# --- log-probabilities ---------------------------------------------------------------------------


@pytest.mark.parametrize("part", [6, 400])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logprobs_are_those_of_a_forward_pass(base, adapters, served, temperature, part):
    """Rows of four adapters in one batch, two of which ask: their tokens' and the likeliest ones', to 1e-4.

    Neither temperature nor top_p nor penalties nor biases are in them; and first tokens have them, too, if they come
    with their prompt's last pass.
    """
    shaping = {"frequency_penalty": 1.0, "logit_bias": ((5, 3.0),), "top_p": 0.8}
    rows = [
        row(0, temperature=temperature, logprobs=3),
        row(1, temperature=temperature),
        row(2, temperature=temperature, logprobs=20, **shaping),
        row(3, temperature=temperature),
    ]
    said, told = play(served, rows, part=part)
    for number, likeliest in ((0, 3), (2, 20)):
        prompt, tokens = PROMPTS[number], said[number]
        expected = forward(base, adapters[number], prompt + tokens)[len(prompt) - 1 : -1]
        assert len(told[number]) == len(tokens) == LENGTH
        for at, (own, top) in enumerate(told[number]):
            assert own == pytest.approx(expected[at][tokens[at]], abs=1e-4)
            best = np.sort(expected[at])[::-1][:likeliest]
            assert [logprob for _, logprob in top] == pytest.approx(list(best), abs=1e-4)
            assert all(logprob == pytest.approx(expected[at][token], abs=1e-4) for token, logprob in top)
    assert told[1] == told[3] == []


def test_a_batch_without_wishes_makes_nothing_for_them(served, monkeypatch):
    """The parts that serve wishes are not even called."""

    def never(*args):
        raise AssertionError("called")

    monkeypatch.setattr(rows_module, "shaped", never)
    monkeypatch.setattr(rows_module, "tell", never)
    rows = [row(slot, temperature=0.7 * (slot % 2)) for slot in range(4)]
    play(served, rows)
    assert all(r.wishes is None for r in rows)


# --- penalties and biases ------------------------------------------------------------------------


def penalised(base, adapter, prompt, frequency, presence, bias):
    """Greedy tokens by OpenAI's formula, each from a whole forward pass."""
    tokens, counts, added = [], np.zeros(tiny.VOCAB), np.zeros(tiny.VOCAB)
    for token, value in bias:
        added[token] = value
    for _ in range(LENGTH):
        logits = forward(base, adapter, prompt + tokens)[-1]
        tokens.append(int(np.argmax(logits + added - counts * frequency - (counts > 0) * presence)))
        counts[tokens[-1]] += 1
    return tokens


@pytest.mark.parametrize(
    ("frequency", "presence", "bias"),
    [(2.0, 0.0, ()), (0.0, 2.0, ()), (-2.0, 0.0, ()), (1.5, 0.5, ((8, 4.0), (11, -100.0))), (0.0, 0.0, ((9, 6.0),))],
)
def test_penalties_and_biases_are_openais(base, adapters, served, frequency, presence, bias):
    """Counted are the tokens that were drawn, not the prompt's; rows beside it have other wishes or none."""
    wishes = {"frequency_penalty": frequency, "presence_penalty": presence, "logit_bias": bias}
    rows = [row(0, presence_penalty=1.0), row(1, **wishes), row(2), row(3, logprobs=0)]
    said, _ = play(served, rows)
    assert said[1] == penalised(base, adapters[1], PROMPTS[1], frequency, presence, bias)
    assert said[0] == penalised(base, adapters[0], PROMPTS[0], 0.0, 1.0, ())


def test_a_token_is_banned_or_forced(base, adapters, served):
    plain = play(served, [row(0)], PROMPTS[:1])[0][0]
    banned = play(served, [row(0, logit_bias=((plain[0], -100.0),))], PROMPTS[:1])[0][0]
    assert plain[0] not in banned
    assert play(served, [row(0, logit_bias=((42, 100.0),), temperature=1.0)], PROMPTS[:1])[0][0] == [42] * LENGTH


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_wishes_change_no_other_row_and_are_the_same_alone(served, temperature):
    """To the last token: seeds, penalties and biases are each row's own."""
    plain = [row(slot, temperature=temperature, seed=slot) for slot in range(4)]
    wishes = {"frequency_penalty": 1.0, "logit_bias": ((3, 2.0),), "logprobs": 5}
    mixed = [row(s, temperature=temperature, seed=s, **(wishes if s == 2 else {})) for s in range(4)]
    before, after = play(served, plain)[0], play(served, mixed)[0]
    assert [after[i] for i in (0, 1, 3)] == [before[i] for i in (0, 1, 3)]
    alone = play(served, [row(2, temperature=temperature, seed=2, **wishes)], PROMPTS[2:3])[0][0]
    assert alone == after[2]


# --- tokens and the text they make ---------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    from mlx_lm.tokenizer_utils import load

    return load(NANO_FOLDER)


def grown(tokenizer, tokens, stop=()):
    """(the text, its pieces, the logprobs by piece) as tokens come; what comes after a stop is not taken."""
    text = AnswerText(tokenizer, [], stop)
    deltas = []
    for token in tokens:
        deltas.append(text.add(token, TokenLogprob(token, token_bytes(tokenizer, token), -1.0)))
        if text.stopped:
            break
    deltas.append(text.finish())
    assert "".join(delta.text for delta in deltas) == text.text
    assert tuple(told for delta in deltas for told in delta.logprobs) == text.logprobs
    return text


NUL = 191  # mlx-lm's detokenizer shows it as another character
#: of nano's tokens, many are parts of characters
SOME = st.lists(st.one_of(st.integers(3, 260), st.integers(3, 1535)).filter(lambda token: token != NUL), max_size=24)
FRENCH = "Ça, c'est l'été à Zürich: 東京 🎉."


@settings(max_examples=150, deadline=None)
@given(tokens=SOME, stop=st.lists(st.text("abe .é", min_size=1, max_size=3), max_size=2))
def test_logprobs_are_told_of_the_tokens_that_the_text_came_from(tokenizer, tokens, stop):
    """Their bytes are the text's; after a stop string, the last one's begin before the text's end."""
    text = grown(tokenizer, tokens, stop)
    joined = b"".join(told.data for told in text.logprobs)
    shown = joined.decode("utf-8", "replace")
    if text.stopped:
        assert shown.removeprefix(" ").startswith(text.text) or shown.startswith(text.text)
        without = b"".join(told.data for told in text.logprobs[:-1]).decode("utf-8", "ignore")
        assert len(without.removeprefix(" ")) <= max(len(text.text), 0)
        assert bool(text.logprobs) == bool(text.text)
    else:
        assert [told.token for told in text.logprobs] == tokens
        assert text.text in (shown, shown.removeprefix(" "))  # the detokenizer drops a first space


def test_characters_of_many_tokens_come_whole_with_all_their_tokens(tokenizer):
    """A piece never ends within a character, and the tokens of one come with it."""
    tokens = tokenizer.encode(FRENCH, add_special_tokens=False)
    assert len(tokens) > len(FRENCH)  # many of them are parts of characters
    text = AnswerText(tokenizer, [], ())
    for token in tokens:
        delta = text.add(token, TokenLogprob(token, token_bytes(tokenizer, token), -1.0))
        assert "\ufffd" not in delta.text
        assert b"".join(told.data for told in delta.logprobs).decode() == delta.text
    text.finish()
    assert text.text == FRENCH
    assert b"".join(told.data for told in text.logprobs).decode() == FRENCH


def test_tokens_that_a_stop_string_cut_off_are_not_told(tokenizer):
    """Wherever it begins and ends: told are those that begin before the text's end, as soon as they are certain."""
    full = "Rosa Mercer lives in Oslo and likes tea."
    tokens = tokenizer.encode(full, add_special_tokens=False)
    starts = [len(tokenizer.decode(tokens[:i])) for i in range(len(tokens))]
    for begin in range(1, len(full) - 4):
        text = grown(tokenizer, tokens, [full[begin : begin + 4]])
        assert text.stopped
        expected = [token for token, start in zip(tokens, starts, strict=True) if start < len(text.text)]
        assert [told.token for told in text.logprobs] == expected, full[begin : begin + 4]


def test_reasoning_is_not_told_as_the_answer():
    """Nor are the marks around it."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    thinking = tiny.tokenizer(template)
    tokens = thinking.encode("<think>why</think>so<think>or</think>be it", add_special_tokens=False)
    text = grown(thinking, tokens)
    assert (text.text, text.reasoning) == ("sobe it", "whyor")
    assert b"".join(told.data for told in text.logprobs) == b"sobe it"


def test_a_stop_string_that_begins_twice_takes_its_own_tokens_only():
    """What is given back when the first beginning comes to nothing takes none of the second one's tokens along."""
    letters = tiny.tokenizer()
    text = grown(letters, letters.encode("aaab", add_special_tokens=False), ["aab"])
    assert (text.text, [told.data for told in text.logprobs]) == ("a", [b"a"])
