"""`serving.fuse`: the stable checkpoint in weights of its own answers what the bank answers."""

import copy
import logging

import mlx.core as mx
import pytest
import tiny
from running import ENDLESS, FACTS, QUICK, running, until

from radiance_mlx.engine.fused import FusedStable
from radiance_mlx.engine.fusing import folded_bytes
from radiance_mlx.engine.rows import BankModel, RowEntry, RowState
from radiance_mlx.engine.training import TrainingTask
from radiance_mlx.errors import CheckpointDamaged
from radiance_mlx.lora.bank import AdapterWeights, Bank
from radiance_mlx.lora.head import install_head, serve_places
from radiance_mlx.lora.targets import find_targets

NAME = "A_2026-02-09_0001"
NAMES = ["q_proj", "down_proj"]
ROOM = 10**9


class Served:
    """A bank with two adapters, and the first of them to be folded."""

    def __init__(self, mode="always", bits=None, room=ROOM):
        self.base = tiny.model(bits=bits)
        self.tree = tiny.alone(self.base, None)
        self.targets = find_targets(self.base, NAMES)
        self.bank = Bank(self.tree, self.targets.paths, slots=3, rank=4)
        self.adapters = [tiny.random_adapter(self.base, self.targets, seed=seed) for seed in (1, 2)]
        for slot, weights in enumerate(self.adapters, 1):
            self.bank.write(slot, weights)
        head = install_head(copy.deepcopy(self.base), tiny.VOCAB)
        self.fused = FusedStable(self.base, self.bank, mode, lambda: room, base_head=head)
        self.model = BankModel(self.tree, self.bank.rows, self.fused, serve_places(self.tree, head))

    def fold(self, seconds=10.0):
        self.fused.follow(NAME, lambda: self.adapters[0])
        turns = 0
        while self.fused.pending:
            self.fused.slice(seconds)
            turns += 1
        return turns

    def logits(self, *rows):
        """What rows of one prompt each give; a row is its slot and its checkpoint."""
        entry = RowEntry.merge([RowEntry([RowState(slot, 0.0, 1.0, 0, name)]) for slot, name in rows])
        prompts = mx.array(tiny.prompts(*[7] * len(rows)))
        return self.model(prompts, [*[None] * len(self.tree.layers), entry])


@pytest.mark.parametrize("bits", [None, 4])
def test_answers_are_the_same_either_way(bits):
    """To rounding; and the folded tree is what was asked."""
    served = Served(bits=bits)
    rows = [(1, NAME), (1, NAME)]
    banked = served.logits(*rows)
    served.fold()
    calls = []
    served.model.tree = lambda *_, **__: calls.append("bank")
    folded = served.logits(*rows)
    assert calls == []
    assert mx.allclose(folded, banked, atol=1e-3 * mx.abs(banked).max().item()).item()
    base = served.fused._base(mx.array(tiny.prompts(7, 7)))
    assert not mx.allclose(base, banked, atol=0.05 * mx.abs(banked).max().item()).item()


@pytest.mark.parametrize("rows", [[(1, NAME), (2, "another")], [(1, NAME), (0, None)], [(0, None)], [(2, "another")]])
def test_whatever_is_not_only_the_stable_checkpoint_is_the_banks(rows):
    """Mixed batches, the base, other checkpoints: bit by bit as without."""
    served = Served()
    before = served.logits(*rows)
    served.fold()
    assert mx.array_equal(served.logits(*rows), before).item()


def test_folding_yields_between_two_weights():
    """A weight at a time when there is no time: whoever waits for a token waits for no more than that."""
    served = Served()
    assert served.fold(seconds=0.0) >= len(served.targets.paths)
    assert served.fused.name == NAME


def test_what_was_folded_goes_as_soon_as_another_is_stable():
    served = Served()
    served.fold()
    kept = mx.get_active_memory()
    assert served.fused.nbytes == sum(
        folded_bytes(dict(served.base.named_modules())[path]) for path in served.targets.paths
    )
    served.fused.follow(None, lambda: None)
    assert (served.fused.tree, served.fused.nbytes, served.fused.pending) == (None, 0, False)
    assert mx.get_active_memory() < kept


def test_another_one_that_becomes_stable_meanwhile_is_folded_instead():
    served = Served()
    served.fused.follow("A_2026-02-09_0009", lambda: served.adapters[1])
    served.fused.slice(0.0)
    served.fold()
    assert served.fused.name == NAME
    banked = Served().logits((1, NAME))
    assert mx.allclose(served.logits((1, NAME)), banked, atol=1e-3 * mx.abs(banked).max().item()).item()


@pytest.mark.parametrize(("worth", "folded"), [(0.0, False), (1e9, True)])
def test_auto_folds_a_quantised_base_where_that_was_measured_to_be_faster(monkeypatch, worth, folded):
    """Measured once; the bank serves as it did afterwards, and why is told."""
    monkeypatch.setattr("radiance_mlx.engine.fused.WORTH_IT", worth)
    served = Served("auto", bits=4)
    before = served.logits((2, "another"))
    served.fold()
    assert (served.fused.name == NAME) is folded
    assert ("no faster" in served.fused.why_not) is not folded
    assert mx.array_equal(served.logits((2, "another")), before).item()
    served.fused.follow("A_2026-02-09_0002", lambda: served.adapters[1])
    served.fused.slice(10.0)
    assert (served.fused.name == "A_2026-02-09_0002") is folded
    assert ("no faster" in served.fused.why_not) is not folded


def test_auto_folds_plain_linears_without_measuring(monkeypatch):
    """They have less to do then, whatever a busy machine would show."""
    monkeypatch.setattr("radiance_mlx.engine.fused.WORTH_IT", 0.0)
    served = Served("auto")
    served.fold()
    assert served.fused.name == NAME


def test_off_folds_nothing():
    served = Served("off")
    assert served.fold() == 0
    assert served.fused.facts() == {"fused": None, "fused_bytes": 0, "not_fused": "serving.fuse is off"}


def test_without_room_the_bank_goes_on_and_always_says_why(caplog):
    served = Served("always", room=100)
    with caplog.at_level(logging.WARNING):
        served.fold()
    assert served.fused.tree is None
    assert "0.0 MiB may be taken" in caplog.text
    assert served.fused.nbytes == 0


def test_what_is_folded_gives_way_also_while_it_is_being_folded():
    """Its bytes count as soon as folding begins."""
    served = Served()
    served.fused.follow(NAME, lambda: served.adapters[0])
    served.fused.slice(0.0)
    assert served.fused.nbytes > 0
    served.fused.give_way()
    assert (served.fused.pending, served.fused.nbytes) == (False, 0)
    served.fold()
    served.fused.give_way()
    assert (served.fused.tree, served.fused.nbytes) == (None, 0)
    assert "training" in served.fused.why_not


@pytest.mark.parametrize(("size", "folded"), [(1e-4, False), (1.0, True)])
def test_a_change_that_half_precision_cannot_hold_is_not_folded(size, folded):
    """bfloat16 has eight bits: what is small beside a weight would be rounded away."""
    served = Served()
    served.base.set_dtype(mx.bfloat16)
    weights = {path: (a, b * size) for path, (a, b) in served.adapters[0].weights.items()}
    served.adapters[0] = AdapterWeights(weights, 2.0)
    served.fold()
    assert (served.fused.name == NAME) is folded
    assert ("rounding" in served.fused.why_not) is not folded
    assert (served.fused.nbytes > 0) is folded


def test_files_that_cannot_be_read_leave_the_bank_to_answer():
    served = Served()

    def load():
        raise CheckpointDamaged("its files are damaged")

    served.fused.follow(NAME, load)
    served.fused.slice(1.0)
    assert not served.fused.pending
    assert "damaged" in served.fused.why_not


def test_training_goes_before_folding_that_nobody_waits_for(tmp_path):
    """An update is live the sooner; while somebody is answered, folding goes first, for it makes that faster."""
    flags = {**QUICK, "serving.fuse": "always"}
    with running(tmp_path, flags) as service:
        first = service.learn(FACTS[0])
    with running(tmp_path, {**flags, **ENDLESS}) as service:
        until(lambda: fused(service) == first, "folded")
        job = service.post(FACTS[1])
        until(lambda: service.engine(lambda engine: isinstance(engine._task, TrainingTask)), "it trains")

        def anew(engine):
            engine.follow(None)
            engine.follow(first)
            for _ in range(5):
                engine._background()
            return engine._fused.pending, engine._fused.nbytes

        assert service.engine(anew) == (True, 0)
        until(lambda: service.ask(FACTS[0][0]) and fused(service) == first, "folded while it trains")
        assert service.engine(lambda engine: engine._task) is not None
        service.call(service.service.cancel(job))


def test_what_is_about_to_be_replaced_is_not_folded(tmp_path):
    """From the end of a batch until it is published or given up; whoever asks meanwhile has it folded."""
    with running(tmp_path, {**QUICK, "serving.fuse": "always"}) as service:
        first = service.learn(FACTS[0])

        def awaiting(engine):
            engine.follow(None)
            engine._trained = ("A_new", 1, lambda: None)
            engine.follow(first)
            return engine.step(), engine._fused.pending, engine._fused.nbytes

        assert service.engine(awaiting) == (False, True, 0)
        until(lambda: service.ask(FACTS[0][0]) and fused(service) == first, "folded for who asks")
        assert service.engine(awaiting) == (False, True, 0)
        service.engine(lambda engine: engine.settle())
        until(lambda: fused(service) == first, "folded")


def test_what_is_folded_while_a_batch_trains_leaves_it_its_room(tmp_path):
    """What the batch takes at its highest counts, not what it takes just now; it ends, and there is room again."""
    with running(tmp_path, {**QUICK, "serving.fuse": "always"}) as service:
        first = service.learn(FACTS[0])

        def folded(engine, needed):
            engine.follow(None)
            engine._make_room(needed)
            engine.follow(first)
            while engine._fused.pending:
                engine._fused.slice(1.0)
            return engine._fused.name, engine._fused.nbytes

        limit, needs = service.engine(lambda e: (e._backend.memory_bytes, folded(e, 0)[1]))
        assert needs > 0
        assert service.engine(lambda e: folded(e, limit - needs + 1)) == (None, 0)
        assert service.engine(lambda e: folded(e, limit - needs)) == (first, needs)
        service.learn(FACTS[1])
        assert service.engine(lambda e: e._needed) == 0


def test_an_update_that_needs_the_room_gets_it(tmp_path, unlimited):
    """With room for training or for folded weights, but not for both, every update is published."""
    needed = 12 * 2**20
    limit = {"memory.limit_gb": 0.045, "serving.fuse": "always"}
    with running(tmp_path, {**QUICK, **limit}) as service:
        service.learn(FACTS[0])
        until(lambda: fused(service) is not None, "folded")
        assert service.engine(lambda engine: engine._fused.nbytes) < needed
        service.engine(lambda engine: engine._make_room(int(0.044 * 2**30)))
        assert fused(service) is None
        service.learn(FACTS[1])


def fused(service):
    return service.engine(lambda engine: engine.status())["fused"]


def test_the_service_folds_what_it_publishes_and_lets_go_of_it_when_it_goes_back(tmp_path):
    """Answers of the checkpoint stay what they were; /info names what is folded."""
    with running(tmp_path, {**QUICK, "serving.fuse": "always"}) as service:
        first = service.learn(FACTS[0])
        until(lambda: fused(service) == first, "folded")
        folded = service.ask(FACTS[0][0])
        second = service.learn(FACTS[1])
        until(lambda: fused(service) == second, "folded anew")
        assert service.ask(FACTS[0][0], checkpoint=first).text == folded.text
        service.call(service.service.rollback(None, "back"))
        until(lambda: fused(service) == first, "folded again")
        assert service.ask(FACTS[0][0]).text == folded.text
        service.call(service.service.rollback("base", "all of it"))
        until(lambda: fused(service) is None, "let go")
    with running(tmp_path, {**QUICK, "serving.fuse": "always"}) as service:
        service.call(service.service.rollback(first, "again"))
    with running(tmp_path, {**QUICK, "serving.fuse": "always"}) as service:
        until(lambda: fused(service) == first, "folded at the start")
        assert service.ask(FACTS[0][0]).text == folded.text
