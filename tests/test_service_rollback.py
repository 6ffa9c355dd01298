"""Going back to an earlier checkpoint and forward again, and what is kept to go back to."""

import pytest
from running import ENDLESS, FACTS, Gate, nothing_left, running, until

from radiance_mlx.errors import Conflict, NotFound


def test_rollback_to_the_parent_to_a_named_one_to_the_base_and_forward_again(tmp_path):
    with running(tmp_path) as service:
        a, b, c = (service.learn(fact) for fact in FACTS[:3])

        def rollback(to):
            previous = service.call(service.service.rollback(to, "test"))
            return previous, service.current, {n: r.status for n, r in service.checkpoints().items()}

        assert rollback(None) == (c, b, {a: "stable", b: "stable", c: "rolled_back"})
        assert service.ask("Hello!").checkpoint == b
        assert rollback("base")[:2] == (b, "base")
        answer = service.ask("Hello!")
        assert (answer.checkpoint, answer.checkpoint_status) == ("base", "base")
        with pytest.raises(Conflict):
            rollback(None)
        with pytest.raises(NotFound):
            rollback("A_2000-01-01_0001")
        assert rollback(c)[:2] == ("base", c)
        answer = service.ask("Hello!")
        assert (answer.checkpoint, answer.checkpoint_status) == (c, "stable")
    with running(tmp_path) as service:
        assert service.current == c


def test_after_a_rollback_the_next_update_trains_on_what_is_stable_now(tmp_path):
    with running(tmp_path) as service:
        a, b = service.learn(FACTS[0]), service.learn(FACTS[1])
        service.call(service.service.rollback(a, ""))
        c = service.learn(FACTS[2])
        assert service.checkpoints()[c].parent == a
        assert service.checkpoints()[b].status == "rolled_back"


def test_a_rollback_during_training_begins_the_batch_again_from_the_new_stable_one(tmp_path):
    with running(tmp_path) as service:
        service.learn(FACTS[0])
    with running(tmp_path, ENDLESS) as service:
        job = service.post(FACTS[1])
        first = service.wait_for_step()
        service.call(service.service.rollback("base", ""))
        second = until(
            lambda: (now := service.service._scheduler.running) and now.checkpoint != first and now.checkpoint
        )
        assert nothing_left(service, first)
        assert service.job(job).checkpoint == second
        assert service.job(job).attempts == 1


def test_a_rollback_between_training_and_publication_is_not_overruled(tmp_path, monkeypatch):
    """The batch was trained on what is not stable any more: it trains again."""
    with running(tmp_path) as service:
        service.learn(FACTS[0])
        gate = Gate(service, service.service._lineage, "commit", monkeypatch)
        job = service.post(FACTS[1])
        gate.wait()
        service.call(service.service.rollback("base", ""))
        gate.open()
        made = service.wait(job, "published").checkpoint
        assert service.checkpoints()[made].parent is None
        assert len(service.checkpoints()) == 2
        assert service.current == made


def test_only_so_many_checkpoints_are_kept(tmp_path):
    with running(tmp_path, storage__keep_checkpoints=2) as service:
        names = [service.learn(fact) for fact in FACTS[:4]]
        until(lambda: service.checkpoints()[names[1]].pruned)
        until(lambda: len(list((tmp_path / "adapters").glob("A_*"))) == 2)
        assert [record.pruned for record in service.checkpoints().values()] == [True, True, False, False]
        with pytest.raises(Conflict, match="removed to save room"):
            service.ask("Hello!", checkpoint=names[0])
        with pytest.raises(Conflict):
            service.call(service.service.rollback(names[0], ""))
        assert service.call(service.service.rollback(None, "")) == names[3]
        assert len(service.info()["loss_curves"]["finetune_loss"]) == 4
