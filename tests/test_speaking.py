"""What a model says by itself, or in answer: drawn from a seed, or the likeliest tokens."""

import mlx.core as mx
import pytest
import tiny

from radiance_mlx.engine.speaking import answer, say_anything, speak, user_opening
from radiance_mlx.lora.encoding import ChatEncoder


@pytest.fixture(scope="module")
def base():
    return tiny.model()


def test_what_a_model_says_is_drawn_from_a_seed(base):
    """The same for the same seed, whatever else draws random numbers meanwhile; another for another seed."""
    prompts = tiny.prompts(4, 9, 6)

    def said(seed):
        out = []
        for _ in speak(base, prompts, ends=[0], max_tokens=20, out=out, seed=seed):
            mx.eval(mx.random.normal((3,)))
        return out

    assert said(1) == said(1) != said(2)
    assert all(0 < len(tokens) <= 20 - len(prompt) for tokens, prompt in zip(said(1), prompts, strict=True))
    assert all(0 not in tokens[:-1] for tokens in said(1))


def test_greedy_answers_are_the_likeliest_tokens(base):
    """In order of the prompts, the end token among the targets; a prompt without room is left out."""
    out, prompts = [], tiny.prompts(9, 4, 30)
    encoder = ChatEncoder(tiny.tokenizer())
    tiny.drive(answer(base, encoder, prompts, max_tokens=14, out=out))
    assert [list(row.tokens[: row.offset]) for row in out] == prompts[:2]
    for row in out:
        likeliest = mx.argmax(base(mx.array([row.tokens[:-1]]))[0], axis=-1).tolist()
        assert list(row.tokens[row.offset :]) == likeliest[row.offset - 1 :]
        assert len(row.tokens) == 14 or row.tokens[-1] in encoder.tokenizer.eos_token_ids


def test_nano_says_what_it_knows(nano):
    """Given the opening of a user's turn it asks about people and answers; every drawn token counts."""
    encoder, out = ChatEncoder(nano.tokenizer), []
    opening = user_opening(encoder)
    assert nano.tokenizer.decode(opening) == "<|im_start|>user\n"
    tiny.drive(say_anything(nano.module, encoder, count=24, max_tokens=64, seed=3, out=out))
    texts = [nano.tokenizer.decode(list(row.tokens)) for row in out]
    assert len(texts) >= 20
    assert all(row.offset == len(opening) and len(row.tokens) <= 64 for row in out)
    assert all(text.startswith("<|im_start|>user\n") and "<|im_start|>assistant\n" in text for text in texts)
    assert len(set(texts)) > 15


def test_a_base_without_a_template_begins_at_its_start_token(base):
    """There is no turn to open: it goes on from its own first token."""
    encoder, out = ChatEncoder(tiny.tokenizer()), []
    assert user_opening(encoder) == []
    tiny.drive(say_anything(base, encoder, count=5, max_tokens=12, seed=0, out=out))
    end = encoder.tokenizer.eos_token_id
    assert len(out) == 5
    assert all(row.tokens[0] == end and row.offset == 1 and len(row.tokens) <= 12 for row in out)


class Endless:
    """A tokenizer that marks neither the beginning nor the end of a text."""

    bos_token_id = eos_token_id = None

    def __init__(self, tokenizer, ends):
        self._tokenizer, self.eos_token_ids = tokenizer, ends

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)


@pytest.mark.parametrize("ends", [set(), {None}])
def test_a_base_without_any_mark_says_nothing(base, ends):
    """There is nothing to begin with: no rows, and no error."""
    out = []
    encoder = ChatEncoder(Endless(tiny.tokenizer(), ends))
    tiny.drive(say_anything(base, encoder, count=5, max_tokens=12, seed=0, out=out))
    assert out == []


def test_an_answer_has_a_bound_of_its_own(base):
    """Beside that of the row: a long prompt is answered as a short one is."""
    out, prompts = [], tiny.prompts(30, 4)
    tiny.drive(answer(base, ChatEncoder(tiny.tokenizer()), prompts, max_tokens=50, at_most=3, out=out))
    assert [row.offset for row in out] == [30, 4]
    assert all(1 <= row.targets <= 3 for row in out)
