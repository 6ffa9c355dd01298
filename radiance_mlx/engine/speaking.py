"""What a model says: continuations of prompts, drawn freely or taken greedily, many at a time.

Every function that runs the model is a generator of `Piece`s with nothing left to evaluate: between two of them
whoever drives may do other work. The results are in the list that the caller gives, once the generator is through.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import InvalidRequest
from ..lora.encoding import ChatEncoder, Encoded
from ..lora.step import Piece
from .generation import JoiningGenerator

#: sequences that are decoded together
TOGETHER = 64
#: contents with nothing in common, to see where a user's words begin in a rendered chat
_UNLIKE = ("apple", "7", "Zoo", "(", "\N{GREEK SMALL LETTER OMEGA}")


class _Draw:
    """Draws from the model's own probabilities (temperature 1), with a key that nothing else moves on."""

    def __init__(self, seed: int) -> None:
        self._key = mx.random.key(seed)

    def __call__(self, logits: mx.array) -> mx.array:
        self._key, now = mx.random.split(self._key)
        return mx.random.categorical(logits, key=now)


def speak(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    ends: Iterable[int],
    max_tokens: int,
    out: list[list[int]],
    at_most: int | None = None,
    seed: int | None = None,
) -> Iterator[Piece]:
    """Append to `out`, for each prompt in order, the tokens that follow it, the end token among them.

    Greedy without a `seed`; with one, drawn at temperature 1, the same for the same prompts and seed. A sequence
    ends at one of `ends`, or when it is `max_tokens` long together with its prompt (which must be shorter), or
    `at_most` without.
    """
    if not prompts:
        return
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    options: dict[str, Any] = {"sampler": _Draw(seed)} if seed is not None else {}
    generator = JoiningGenerator(
        model,
        stop_tokens=[[end] for end in sorted(set(ends) - {None})],
        completion_batch_size=TOGETHER,
        prefill_batch_size=TOGETHER,
        stream=mx.default_stream(mx.default_device()),
        **options,
    )
    try:
        rooms = [min(max_tokens - len(prompts[i]), at_most or max_tokens) for i in order]
        uids = generator.insert([list(prompts[i]) for i in order], max_tokens=rooms)
        said: dict[int, list[int]] = {uid: [] for uid in uids}
        left = len(uids)
        while left:
            for response in generator.next()[1]:
                said[response.uid].append(response.token)
                left -= response.finish_reason is not None
            yield Piece([], barrier=True)
    finally:
        generator.close()
    uid_of = dict(zip(order, uids, strict=True))
    out.extend(said[uid_of[i]] for i in range(len(prompts)))


def answer(
    model: nn.Module,
    encoder: ChatEncoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    out: list[Encoded],
    at_most: int | None = None,
) -> Iterator[Piece]:
    """Append to `out` each prompt with the greedy answer to it; the answer's tokens are the targets.

    A row is at most `max_tokens` long, and its answer `at_most`; prompts that leave no room for one are left out.
    """
    fitting = [p for p in prompts if len(p) < max_tokens]
    said: list[list[int]] = []
    ends = encoder.tokenizer.eos_token_ids
    yield from speak(model, fitting, ends=ends, max_tokens=max_tokens, out=said, at_most=at_most)
    out.extend(Encoded((*prompt, *tokens), len(prompt)) for prompt, tokens in zip(fitting, said, strict=True))


def say_anything(
    model: nn.Module, encoder: ChatEncoder, *, count: int, max_tokens: int, seed: int, out: list[Encoded]
) -> Iterator[Piece]:
    """Append to `out` rows that the model makes up, `count` at most, none longer than `max_tokens`.

    It is given the opening of a user's turn and writes the question, then is asked that question and writes the
    answer (Xu et al., Magpie, 2406.08464); questions without an end or without text are left out. Where most are,
    or there is no chat template, it goes on from its own start token; a base that has none either says nothing.
    Every drawn token counts.
    """
    ends = encoder.tokenizer.eos_token_ids
    opening = user_opening(encoder)
    prompts: list[list[int]] = []
    if 0 < len(opening) < max_tokens:
        asked: list[list[int]] = []
        yield from speak(model, [opening] * count, ends=ends, max_tokens=max_tokens, out=asked, seed=2 * seed)
        prompts = [p for p in (_as_prompt(encoder, tokens) for tokens in asked) if 0 < len(p) < max_tokens]
    if 2 * len(prompts) < count:
        start = _start(encoder)
        opening, prompts = start, [start] * count if 0 < len(start) < max_tokens else []
    said: list[list[int]] = []
    yield from speak(model, prompts, ends=ends, max_tokens=max_tokens, out=said, seed=2 * seed + 1)
    out.extend(Encoded((*prompt, *tokens), len(opening)) for prompt, tokens in zip(prompts, said, strict=True))


def user_opening(encoder: ChatEncoder) -> list[int]:
    """The tokens of a chat up to where a user's words begin; empty where there is no template to tell."""
    if not encoder.tokenizer.has_chat_template:
        return []
    try:
        rendered = [encoder.prompt((("user", content),)) for content in _UNLIKE]
    except InvalidRequest:
        return []
    alike = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*rendered, strict=False))
    return [tokens[0] for tokens in alike]


def _as_prompt(encoder: ChatEncoder, tokens: Sequence[int]) -> list[int]:
    """The prompt that asks a drawn question; empty if that has no end, or no text, or holds marks of a chat."""
    tokenizer = encoder.tokenizer
    special = set(tokenizer.all_special_ids)
    if not tokens or tokens[-1] not in tokenizer.eos_token_ids or special.intersection(tokens[:-1]):
        return []
    question = tokenizer.decode(list(tokens[:-1])).strip()
    return encoder.prompt((("user", question),)) if question else []


def _start(encoder: ChatEncoder) -> list[int]:
    """The token that a text begins with: the tokenizer's own, else one that ends the text before it; else none."""
    tokenizer = encoder.tokenizer
    candidates = [tokenizer.bos_token_id, *sorted(set(tokenizer.eos_token_ids) - {None})]
    return [token for token in candidates if token is not None][:1]
