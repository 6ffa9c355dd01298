"""The order of the data, and which positions count."""

import itertools
from collections import Counter

import mlx.core as mx
import numpy as np
import pytest
import tiny

from radiance_mlx.lora.batches import batch_stream, batches_once, fit_to_data, target_positions
from radiance_mlx.lora.encoding import Encoded


def numbered(count, length=6):
    """Examples that can be told apart by their first token."""
    return [Encoded((i + 1, *range(2, length + i % 5)), 3) for i in range(count)]


def stream(data, size, seed=(0, 1)):
    return batch_stream(data, batch_size=size, max_tokens=64, seed=seed)


def firsts(batches):
    """The examples in a run of batches, by their first tokens."""
    return [int(row[0]) for tokens, _ in batches for row in np.array(tokens)]


@pytest.mark.parametrize(("count", "size"), [(8, 2), (7, 2), (5, 4), (4, 4), (1, 1)])
def test_every_example_comes_in_every_epoch(count, size):
    """An epoch holds each example once; a last, short batch is filled up with some of the others."""
    per_epoch = -(-count // size)
    batches = stream(numbered(count), size)
    for _ in range(3):
        seen = Counter(firsts(itertools.islice(batches, per_epoch)))
        assert set(seen) == set(range(1, count + 1))
        assert seen.total() == per_epoch * size
        assert max(seen.values()) <= 2


def test_the_order_is_that_of_seed_and_number():
    """Seed and batch number fix the order, whatever else draws random numbers in between; epochs differ."""
    data = numbered(12)
    once = firsts(itertools.islice(stream(data, 2), 12))
    again = []
    for batch in itertools.islice(stream(data, 2), 12):
        again += firsts([batch])
        np.random.seed(3)
        np.random.permutation(5)
    assert once == again
    assert once[:12] != once[12:]
    for other in ((0, 2), (1, 1)):
        assert firsts(itertools.islice(stream(data, 2, other), 12)) != once


def test_fewer_examples_than_a_step_takes():
    """Batch size and accumulation shrink to the data: no step repeats rows only to fill itself."""
    fitted = fit_to_data(tiny.settings(batch_size=4, grad_accum=8, max_steps=5), 3)
    assert (fitted.batch_size, fitted.grad_accumulation_steps, fitted.iters) == (3, 1, 5)
    fitted = fit_to_data(tiny.settings(batch_size=2, grad_accum=8, max_steps=5), 5)
    assert (fitted.batch_size, fitted.grad_accumulation_steps, fitted.iters) == (2, 3, 15)


@pytest.mark.parametrize("length", [5, 31, 32, 33, 63, 64])
def test_spans_hold_targets_and_no_padding(length):
    """Exactly the tokens from `offset` on are targets, also where a row fills its bucket or the longest length."""
    example = Encoded(tuple(range(1, length + 1)), 3)
    short = Encoded((7, 8, 9, 10), 2)
    batch = next(stream([example, short], 2))
    positions, targets = target_positions(batch)
    assert sorted(targets.tolist()) == sorted([*example.tokens[3:], *short.tokens[2:]])
    inputs = np.array(batch[0])[:, :-1].reshape(-1)
    before = dict(itertools.pairwise(example.tokens)) | {8: 9} | {9: 10}
    for position, target in zip(positions, targets, strict=True):
        assert target in (before[int(inputs[position])], int(inputs[position]) + 1)


@pytest.mark.parametrize("offset", [0, 1])
def test_the_first_token_is_never_a_target(offset):
    """Nothing precedes it that could predict it."""
    example = Encoded((5, 6, 7), offset)
    _, targets = target_positions(next(stream([example], 1)))
    assert targets.tolist() == [6, 7]
    assert example.targets == 2


def test_evaluation_takes_every_example_once():
    """No filling up and no dropping, whatever the batch size."""
    data = numbered(7)
    batches = list(batches_once(data, batch_size=3, max_tokens=64))
    assert [tokens.shape[0] for tokens, _ in batches] == [3, 3, 1]
    assert sorted(firsts(batches)) == list(range(1, 8))
    assert sum(len(target_positions(b)[1]) for b in batches) == sum(e.targets for e in data)


def test_a_micro_batch_is_no_wider_than_it_must_be():
    """Its inputs are as long as its longest row's, rounded up to a multiple of four."""
    data = tiny.examples(20, longest=60)
    for tokens, spans in itertools.islice(stream(data, 4), 10):
        inputs = int(spans[:, 1].max())
        assert tokens.shape[1] == 1 + 4 * -(-inputs // 4)
    assert all(tokens.dtype == mx.int32 for tokens, _ in itertools.islice(stream(data, 4), 1))
