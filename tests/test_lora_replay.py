"""Earlier examples among the new ones: which, how many, and in what order."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import tiny

from radiance_mlx.lora.batches import batch_stream, shuffled, turns
from radiance_mlx.lora.encoding import Encoded
from radiance_mlx.lora.head import install_head
from radiance_mlx.lora.replay import Replay, replay_stream, reservoir
from radiance_mlx.lora.trainer import Trainer


@pytest.fixture(scope="module")
def base():
    return tiny.model()


def numbered(start, count):
    """Examples that can be told apart by their first token."""
    return [Encoded((start + i, *range(2, 6 + i % 5)), 3) for i in range(count)]


NEW, EARLIER = numbered(100, 10), numbered(500, 30)


def stream(fraction, *, size=4, accumulate=2, seed=(0, 1), new=NEW, earlier=EARLIER):
    replay = Replay(earlier, fraction)
    return replay_stream(new, replay, batch_size=size, accumulate=accumulate, max_tokens=64, seed=seed)


def rows_of(batches):
    """The first tokens of all rows."""
    return [int(row[0]) for tokens, _ in batches for row in np.array(tokens)]


def make_trainer(base, section, data, on_step=lambda trainer: None, **options):
    tree = tiny.tree(base, dropout=0.2)
    return Trainer(tree, install_head(tree.module, tiny.VOCAB), data, section, 1, on_step, **options)


@pytest.mark.parametrize(("fraction", "earlier"), [(0.0, EARLIER), (0.5, []), (0.5, [Encoded((1, 2, 3), 3)])])
def test_with_nothing_to_replay_the_stream_is_the_plain_one(fraction, earlier):
    """No share, no earlier examples, or none with a target: the same micro-batches as without replay."""
    plain = batch_stream(NEW, batch_size=4, max_tokens=64, seed=(0, 1))
    for (tokens, spans), (plain_tokens, plain_spans) in itertools.islice(
        zip(stream(fraction, earlier=earlier), plain, strict=True), 9
    ):
        assert (tokens == plain_tokens).all().item()
        assert (spans == plain_spans).all().item()


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.75, 0.9])
@pytest.mark.parametrize(("size", "accumulate"), [(4, 2), (1, 1), (1, 16)])
def test_every_step_has_its_share_of_earlier_rows(fraction, size, accumulate):
    """In each step to less than a row, and over steps of a single row too."""
    batches, rows, replayed = stream(fraction, size=size, accumulate=accumulate), size * accumulate, 0
    for step in range(1, 41):
        drawn = rows_of(itertools.islice(batches, accumulate))
        now = sum(token >= 500 for token in drawn)
        replayed += now
        assert len(drawn) == rows
        assert abs(now - rows * fraction) < 1 + 1e-9
        assert abs(replayed - step * rows * fraction) <= 1


def test_new_and_earlier_examples_come_once_per_epoch_of_their_own():
    """Every new example comes before any comes again, and so does every earlier one."""
    drawn = rows_of(itertools.islice(stream(0.5), 2 * 30))
    for start, count in ((100, 10), (500, 30)):
        own = [token for token in drawn if start <= token < start + 100]
        for epoch in range(len(own) // count):
            assert len(set(own[epoch * count : (epoch + 1) * count])) >= count - 8  # a step's rows are not in order
        counts = Counter(own)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_a_step_takes_no_more_earlier_rows_than_there_are():
    """One earlier example is one row of a step, not half of it."""
    batches = stream(0.5, earlier=EARLIER[:1])
    for _ in range(10):
        drawn = rows_of(itertools.islice(batches, 2))
        assert len(drawn) == 8
        assert drawn.count(500) == 1


def test_the_order_is_that_of_seed_and_number():
    """Another seed or batch number gives another order; other random numbers drawn in between change nothing."""
    once, again = rows_of(itertools.islice(stream(0.5), 12)), []
    for batch in itertools.islice(stream(0.5), 12):
        again += rows_of([batch])
        np.random.seed(3)
        np.random.permutation(5)
    assert once == again
    for other in ((0, 2), (1, 1)):
        assert rows_of(itertools.islice(stream(0.5, seed=other), 12)) != once


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5])
def test_a_share_that_leaves_nothing_for_the_new_is_refused(fraction):
    """All of a step, or less than nothing, is no share."""
    with pytest.raises(ValueError, match="fraction"):
        Replay(EARLIER, fraction)


def test_a_small_update_makes_a_small_step(base):
    """One new example at a half takes one earlier one along, not as many as a step has room for."""
    run = make_trainer(base, tiny.settings(batch_size=8), NEW[:1], replay=Replay(EARLIER, 0.5))
    assert (run.args.batch_size, run.args.grad_accumulation_steps) == (2, 1)
    run = make_trainer(base, tiny.settings(batch_size=8), NEW, replay=Replay(EARLIER, 0.5))
    assert (run.args.batch_size, run.args.grad_accumulation_steps) == (8, 2)


def test_a_run_without_earlier_examples_is_the_plain_run(base):
    """Equal to the last bit: losses, weights, optimizer."""
    plain = make_trainer(base, tiny.settings(), tiny.examples(5))
    empty = make_trainer(base, tiny.settings(), tiny.examples(5), replay=Replay([], 0.5))
    for run in (plain, empty):
        tiny.drive(run.run())
    assert plain.history.as_dict() == empty.history.as_dict()
    assert tiny.equal(plain.tree.parameters(), empty.tree.parameters())
    assert tiny.equal(plain.state()[1], empty.state()[1])


@pytest.mark.parametrize("step", [1, 4])
def test_a_resumed_run_is_the_uninterrupted_one(base, step):
    """The very rows that would have come: losses and weights agree to the last bit."""
    states, section = {}, tiny.settings(max_steps=5)
    replay = Replay(tiny.examples(9, seed=7), 0.4)

    def keep(run):
        weights, optimizer, progress = run.state()
        states[run.step] = weights, optimizer, json.loads(json.dumps(progress))

    whole = make_trainer(base, section, tiny.examples(5), keep, replay=replay)
    tiny.drive(whole.run())
    resumed = make_trainer(base, section, tiny.examples(5), replay=replay)
    resumed.resume(*states[step])
    tiny.drive(resumed.run(), together=3)
    assert resumed.history.as_dict() == whole.history.as_dict()
    assert tiny.equal(resumed.tree.parameters(), whole.tree.parameters())


def test_a_reservoir_is_a_uniform_sample():
    """Old and recent items have the same chance, the size is bounded, and the seed decides."""
    counts = Counter()
    for seed in range(2000):
        kept = reservoir(range(20), 5, (0, seed))
        assert len(set(kept)) == 5
        counts.update(kept)
    assert all(abs(counts[i] / 2000 - 0.25) < 0.05 for i in range(20))
    assert reservoir(range(20), 5, (0, 1)) == reservoir(iter(range(20)), 5, (0, 1))
    assert reservoir(range(3), 5, (0, 1)) == [0, 1, 2]


@pytest.mark.parametrize("shares", [(1.0,), (0.5, 0.5), (3.0, 1.0), (0.2, 0.3, 0.5)])
def test_turns_keep_to_the_shares(shares):
    """After any number of turns each place has had its part, to less than one turn (two places)."""
    taken = Counter()
    for done, place in enumerate(itertools.islice(turns(shares), 500), 1):
        taken[place] += 1
        for i, share in enumerate(shares):
            assert abs(taken[i] - done * share / sum(shares)) < 1.0 + 1e-6


def test_shuffled_places_come_once_per_epoch():
    """Each epoch has an order of its own, and every place once."""
    drawn = list(itertools.islice(shuffled(12, (0, 1)), 36))
    epochs = [drawn[i : i + 12] for i in (0, 12, 24)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
