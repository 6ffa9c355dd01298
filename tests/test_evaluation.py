"""Metrics and intervals: by hand on three tokens, by simulation, and against a plain forward pass."""

import math
from dataclasses import astuple, replace

import mlx.core as mx
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from radiance_mlx.evaluation import policy
from radiance_mlx.evaluation.divergence import agreement, kl, log_softmax, reference
from radiance_mlx.evaluation.measuring import Documents, Measured, measure
from radiance_mlx.evaluation.metrics import NAMES, AnchorSums, anchor_metrics, kept_gain, nothing_measured
from radiance_mlx.evaluation.policy import Rule, judge
from radiance_mlx.evaluation.statistics import DRAWN_AT_ONCE, estimates
from radiance_mlx.lora.encoding import Encoded
from radiance_mlx.lora.head import install_head
from radiance_mlx.lora.targets import find_targets
from radiance_mlx.lora.tree import make_tree

#: two documents of two and one tokens over three words: the base, the parent, the new checkpoint, what came
BASE = [[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.25, 0.25, 0.5]]
PARENT = [[0.4, 0.4, 0.2], [0.2, 0.7, 0.1], [0.3, 0.2, 0.5]]
NEW = [[0.2, 0.6, 0.2], [0.2, 0.6, 0.2], [0.1, 0.3, 0.6]]
CAME = [0, 1, 2]


def log(rows):
    return mx.log(mx.array(rows))


def by_hand(of):
    """Token mean of a function of (p0, q, p, y)."""
    return sum(of(p0, q, p, y) for p0, q, p, y in zip(BASE, PARENT, NEW, CAME, strict=True)) / 3


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def entropy(p):
    return -sum(a * math.log(a) for a in p)


def per_document(values):
    values = np.array(values, dtype=np.float64)
    return np.array([values[:2].sum(), values[2:].sum()])


def metrics_of(sums):
    """All metrics of `sums`."""
    out = {}
    for _ in anchor_metrics(sums, out):
        assert not out
    return out


def estimate(sums, tokens, **options):
    """A single estimate."""
    out = {}
    for _ in estimates({"it": sums}, tokens, out, **options):
        pass
    return out["it"]


def three_token_metrics():
    base, parent = reference(log(BASE), mx.array(CAME)), reference(log(PARENT), mx.array(CAME))
    new = log(NEW)
    return metrics_of(
        AnchorSums(
            tokens=np.array([2, 1]),
            base_entropy=per_document(base.entropy),
            base_target=per_document(base.target),
            target=per_document(reference(new, mx.array(CAME)).target),
            base_kl=per_document(kl(base, new)),
            agreement=per_document(agreement(base, new)),
            parent_entropy=per_document(parent.entropy),
            parent_kl=per_document(kl(parent, new)),
            parent_base_kl=per_document(kl(base, log(PARENT))),
        )
    )


def test_each_metric_is_what_a_hand_computes_on_three_tokens():
    """By the definitions in the module's docstring."""
    got = three_token_metrics()
    forgetting = by_hand(lambda p0, q, p, y: divergence(p0, p))
    expected = {
        "forgetting_loss": by_hand(lambda p0, q, p, y: -sum(a * math.log(b) for a, b in zip(p0, p, strict=True))),
        "forgetting_kl": forgetting,
        "forgetting_loss_delta": forgetting - by_hand(lambda p0, q, p, y: divergence(p0, q)),
        "drift_loss": by_hand(lambda p0, q, p, y: entropy(q) + divergence(q, p)),
        "drift_kl": by_hand(lambda p0, q, p, y: divergence(q, p)),
        "anchor_ce_delta": by_hand(lambda p0, q, p, y: math.log(p0[y]) - math.log(p[y])),
        "base_agreement": 2 / 3,
        "retention_score": math.exp(-forgetting),
    }
    assert set(expected) == set(NAMES)
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, abs=1e-6), name
        low, high = got["intervals"][name]
        assert low <= got[name] + 1e-9
        assert got[name] <= high + 1e-9


def test_the_kept_part_of_a_distribution_bounds_its_divergence_from_below():
    """And is all of it when nothing is left out."""
    mx.random.seed(4)
    p, q = log_softmax(mx.random.normal((50, 40)) * 3), log_softmax(mx.random.normal((50, 40)) * 3)
    true = (mx.exp(p) * (p - q)).sum(-1)
    targets = mx.zeros(50, dtype=mx.int32)
    bounds = [kl(reference(p, targets, k), q) for k in (1, 4, 16, 40, 64)]
    for smaller, larger in zip(bounds, [*bounds[1:], true], strict=True):
        assert mx.all(smaller <= larger + 1e-4)
    assert mx.allclose(bounds[-1], true, atol=1e-4)
    assert mx.all(bounds[0] >= -1e-6)


def test_impossible_tokens_do_not_make_it_undefined():
    """A probability of zero contributes nothing to the base's side."""
    p = mx.log(mx.array([[0.5, 0.5, 0.0]]))
    kept = reference(p, mx.array([0]))
    assert kept.entropy.item() == pytest.approx(math.log(2))
    assert kl(kept, mx.log(mx.array([[0.25, 0.25, 0.5]]))).item() == pytest.approx(math.log(2))


def test_intervals_cover_at_the_nominal_rate():
    """Documents of several tokens that hang together, drawn 400 times: the truth is inside 95% of the intervals."""
    rng, inside, narrow = np.random.default_rng(0), 0, 0
    for trial in range(400):
        tokens = rng.integers(5, 60, size=80)
        level = rng.normal(0.3, 0.5, size=80)  # what a document's tokens have in common
        values = [level[i] + rng.normal(0, 1.0, size=n) for i, n in enumerate(tokens)]
        got = estimate([v.sum() for v in values], tokens, seed=trial, resamples=1000)
        inside += got.low <= 0.3 <= got.high
        alone = np.concatenate(values)
        by_tokens = 1.96 * alone.std() / math.sqrt(len(alone))
        narrow += abs(alone.mean() - 0.3) <= by_tokens
    assert 0.92 <= inside / 400 <= 0.98
    assert narrow / 400 < 0.8  # what one gets by drawing tokens


def test_a_paired_difference_is_surer_than_two_means():
    """What both have in common is not noise of the difference."""
    rng = np.random.default_rng(1)
    tokens, one = np.full(60, 20), rng.normal(40, 30, size=60)
    other = one + rng.normal(2, 1, size=60)
    paired = estimate(other - one, tokens)
    assert paired.low > 0
    assert paired.high - paired.low < 0.1 * (estimate(one, tokens).high - estimate(one, tokens).low)


def test_drawing_gives_others_a_turn(monkeypatch):
    """However much is drawn at once, the estimates are the same."""
    rng = np.random.default_rng(2)
    tokens, sums = rng.integers(1, 9, size=300), {"one": rng.normal(size=300), "other": rng.normal(size=300)}
    found, turns = [], []
    for at_once in (DRAWN_AT_ONCE, 1, 10**9):
        monkeypatch.setattr("radiance_mlx.evaluation.statistics.DRAWN_AT_ONCE", at_once)
        out = {}
        turns.append(sum(1 for _ in estimates(sums, tokens, out)))
        found.append(out)
    assert turns == [7, 2000, 1]
    for name, estimate in found[0].items():
        for other in found[1:]:
            assert astuple(other[name]) == pytest.approx(astuple(estimate), abs=1e-12)


@pytest.mark.parametrize(("sums", "tokens"), [([], []), ([1.0], [0]), ([1.0, 2.0], [1])])
def test_an_estimate_of_nothing_is_refused(sums, tokens):
    with pytest.raises(ValueError, match=r"document|length"):
        estimate(sums, tokens)


def test_the_gain_that_is_left_of_an_earlier_update():
    """All, half, none, worse than none; and nothing to say where nothing was gained."""
    assert [kept_gain(4.0, 2.0, now) for now in (2.0, 3.0, 4.0, 5.0)] == [1.0, 0.5, 0.0, -0.5]
    assert kept_gain(1.0, 1.0, 1.0) is None
    assert nothing_measured()["forgetting_loss"] is None


# --- the policy ----------------------------------------------------------------------------------

RULE = Rule("auto_rollback", "forgetting_loss_delta", 0.25)


def metrics(value, low=0.0):
    return {"forgetting_loss_delta": value, "intervals": {"forgetting_loss_delta": [low, value + 1]}}


@pytest.mark.parametrize(
    ("mode", "value", "outcome"),
    [
        ("off", 0.3, "logged"),
        ("warn", 0.3, "risky"),
        ("auto_rollback", 0.3, "rejected"),
        ("auto_rollback", 0.25, "pass"),
        ("warn", -1.0, "pass"),
        ("auto_rollback", None, "unknown"),
        ("auto_rollback", math.nan, "rejected"),
    ],
)
def test_what_becomes_of_a_checkpoint(mode, value, outcome):
    """Over the threshold, and not at it; what could not be computed is never good."""
    found = metrics(value) if value is not None else {"forgetting_loss_delta": None}
    verdict = judge(replace(RULE, mode=mode), found)
    assert verdict.outcome == outcome
    assert verdict.as_dict()["threshold"] == 0.25


def test_with_the_lower_bound_one_must_be_sure():
    """0.3 ± 0.2 is over 0.25 on average only."""
    sure = replace(RULE, confidence="lower_bound")
    assert judge(sure, metrics(0.3, low=0.1)).outcome == "pass"
    assert judge(sure, metrics(0.5, low=0.26)).outcome == "rejected"
    assert "lower bound" in judge(sure, metrics(0.5, low=0.26)).reason


@given(st.floats(0.01, 1.0))
def test_bisection_finds_the_largest_scale_that_passes(limit):
    """To 2^-12, when what grows with the scale is monotone."""
    passed, failed = 0.0, 1.0
    for _ in range(12):
        middle = policy.next_scale(passed, failed)
        passed, failed = (middle, failed) if middle <= limit else (passed, middle)
    assert passed <= limit <= passed + 2**-11


# --- measuring -----------------------------------------------------------------------------------


def encoded(count, seed=3):
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        length = int(rng.integers(3, 30))
        made.append(
            Encoded(tuple(int(t) for t in rng.integers(1, tiny.VOCAB, size=length)), int(rng.integers(0, length)))
        )
    return made


def tree_and_head(model, *, grown, with_head=True):
    targets = find_targets(model, list(tiny.ATTENTION))
    tree = make_tree(model, targets, rank=4, scale=2.0, dropout=0.5, seed=1)
    if grown:
        mx.random.seed(9)
        tree.load({name: mx.random.normal(value.shape) * 0.2 for name, value in tree.parameters().items()})
    return tree, install_head(tree.module, tiny.VOCAB) if with_head else None


def run(pieces):
    """Evaluate; the most arrays that came together."""
    most = 0
    for piece in pieces:
        mx.eval(piece.arrays)
        most = max(most, len(piece.arrays))
    return most


@pytest.mark.parametrize("with_head", [True, False])
@pytest.mark.parametrize("pass_tokens", [1, 64, 512])
def test_measuring_in_pieces_is_a_plain_forward_pass(monkeypatch, with_head, pass_tokens):
    """Whatever shares a pass; each document's tokens in their place; dropout is off; nothing comes in one go."""
    monkeypatch.setattr("radiance_mlx.evaluation.measuring.PASS_TOKENS", pass_tokens)
    model = tiny.model(scale=2.0)
    documents = Documents(encoded(12))
    base_tree, base_head = tree_and_head(model, grown=False, with_head=with_head)
    base = Measured.empty(documents)
    run(measure(base_tree, base_head, documents, {}, base, keep=True, k=tiny.VOCAB))
    tree, head = tree_and_head(model, grown=True, with_head=with_head)
    found = Measured.empty(documents, ["base"])
    assert run(measure(tree, head, documents, {"base": base.own}, found)) == 1
    tree.module.eval()
    for number, document in enumerate(documents.encoded):
        tokens = mx.array([document.tokens])
        p0, p = log_softmax(model(tokens[:, :-1])[0]), log_softmax(tree.module(tokens[:, :-1])[0])
        first = max(document.offset, 1) - 1
        true = (mx.exp(p0) * (p0 - p)).sum(-1)[first:]
        place = slice(documents.starts[number], documents.starts[number] + documents.counts[number])
        assert np.allclose(found.kl["base"][place], np.array(true), atol=1e-3)
        came = [p[i - 1, document.tokens[i]].item() for i in range(max(document.offset, 1), len(document.tokens))]
        assert np.allclose(found.target[place], came, atol=1e-4)
        same = np.array(mx.argmax(p0, -1) == mx.argmax(p, -1))[first:]
        assert found.agreement["base"][place].tolist() == same.tolist()


def test_an_adapter_that_does_nothing_has_forgotten_nothing():
    """A = 0: every divergence is 0 to 1e-5, the agreement 1, the intervals without width."""
    model = tiny.model(scale=2.0)
    documents = Documents(encoded(20))
    tree, head = tree_and_head(model, grown=False)
    base, again = Measured.empty(documents), Measured.empty(documents, ["base"])
    run(measure(tree, head, documents, {}, base, keep=True, k=16))
    run(measure(tree, head, documents, {"base": base.own}, again))
    sums = documents.sums
    entropies = sums(np.array(base.own.entropy))
    got = metrics_of(
        AnchorSums(
            tokens=documents.counts,
            base_entropy=entropies,
            base_target=sums(base.target),
            target=sums(again.target),
            base_kl=sums(again.kl["base"]),
            agreement=sums(again.agreement["base"]),
            parent_entropy=entropies,
            parent_kl=sums(again.kl["base"]),
            parent_base_kl=np.zeros(20),
        )
    )
    for name in ("forgetting_kl", "drift_kl", "forgetting_loss_delta", "anchor_ce_delta"):
        assert abs(got[name]) < 1e-5
        assert max(map(abs, got["intervals"][name])) < 1e-5
    assert got["forgetting_loss"] == pytest.approx(entropies.sum() / documents.tokens, abs=1e-5)
    assert got["base_agreement"] == 1.0
    assert got["retention_score"] == pytest.approx(1.0, abs=1e-5)


def test_documents_without_a_token_that_counts_are_refused():
    with pytest.raises(ValueError, match="token that counts"):
        Documents([Encoded((1,), 0)])


def test_a_tail_that_is_nearly_nothing_is_still_told():
    """Summed up from its own tokens: the divergence over what is kept is never more than the whole one."""
    for was, now in ((1e-2, 1e-8), (1e-3, 1e-7), (0.1, 1e-12)):
        rest = 200
        p = [(1 - was) / 2, (1 - was) / 2, *[was / rest] * rest]
        q = [(1 - now) / 2, (1 - now) / 2, *[now / rest] * rest]
        kept = reference(mx.log(mx.array([p])), mx.array([0]), k=2)
        whole = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        assert kl(kept, log_softmax(mx.log(mx.array([q])))).item() == pytest.approx(whole, rel=1e-3)
