"""Held-out rows and early stopping through the service itself: notes, metrics, kept state, later updates."""

import json

import pytest
from running import FACTS, QUICK, running

from radiance_mlx.models.nano import world

PEOPLE = world.STRANGERS[40:]
SMALL = {**QUICK, "training.max_steps": 8, "training.eval_every": 2, "training.eval_fraction": 0.25}


def metrics(service, checkpoint):
    return json.loads((service.home / "metrics" / f"{checkpoint}.json").read_text())


def weights(service, checkpoint):
    return (service.folder(checkpoint) / "adapters.safetensors").read_bytes()


def two_facts(i):
    name, about = PEOPLE[i]
    return [(world.ask(name, r), world.answer(name, r, about[r])) for r in ("city", "job")]


def test_an_updates_metrics_tell_what_was_held_out(tmp_path):
    """`eval_loss` is of the held-out rows before they were learnt; the curves go over both phases."""
    with running(tmp_path, SMALL) as service:
        found = metrics(service, service.learn(*FACTS[:8]))
        assert (found["trained_examples"], found["held_out_examples"]) == (8, 2)
        assert [row["step"] for row in found["curves"]["finetune_loss"]] == list(range(1, 9))
        assert [row["step"] for row in found["curves"]["eval_loss"]] == [2, 4, 6]
        assert found["eval_loss"] == found["curves"]["eval_loss"][-1]["loss"] != found["finetune_loss"]
        assert found["never_trained"] == []
        assert service.info()["loss_curves"]["eval_loss"] == [found["eval_loss"]]


def test_a_single_example_is_trained_and_the_job_says_so(tmp_path):
    """Nothing can be held out of it: `eval_loss` is on the batch itself."""
    with running(tmp_path, SMALL) as service:
        job = service.wait(service.post(FACTS[0]), "published")
        assert sum("nothing was held out" in note for note in job.notes) == 1
        found = metrics(service, job.checkpoint)
        assert (found["trained_examples"], found["held_out_examples"]) == (1, 0)
        assert found["eval_loss"] == found["finetune_loss"]


def test_an_early_stop_is_in_the_notes(tmp_path):
    """A rate that ruins the held-out rows: stopped after one evaluation without improvement, with steps to spare."""
    flags = {**SMALL, "training.lr": 0.05, "training.eval_every": 1, "training.patience": 1, "training.max_steps": 60}
    with running(tmp_path, flags) as service:
        job = service.wait(service.post(*FACTS[:8]), "published")
        note = next(note for note in job.notes if "the held-out loss has not improved for 1 evaluation" in note)
        found = metrics(service, job.checkpoint)
        evals = found["curves"]["eval_loss"]
        assert f"stopped at step {evals[-1]['step']}:" in note
        assert found["eval_loss"] == min(row["loss"] for row in evals) < evals[-1]["loss"]
        assert found["steps"] == len(found["curves"]["finetune_loss"]) == evals[-1]["step"] + -(-evals[-1]["step"] // 3)
        assert found["steps"] < 60


def test_rewordings_go_with_what_they_reword(tmp_path):
    """Of two facts one is held out, in all wordings that nano knows for it: as many rows as the other has."""
    flags = {
        **SMALL,
        "rehearsal.rewording": True,
        "rehearsal.samples": 100,
        "rehearsal.sample_tokens": 40,
        "training.eval_fraction": 0.1,
        "training.eval_holdout": True,
    }
    with running(tmp_path, flags) as service:
        found = metrics(service, service.learn(*two_facts(0)))
        assert found["trained_examples"] == found["held_out_examples"] > 1
        assert len(found["never_trained"]) == 1


@pytest.mark.parametrize("stays_out", [True, False])
def test_what_stays_out_is_not_replayed_by_later_updates(tmp_path, stays_out):
    """Never trained on means by no update; what was only measured first was learnt, and may be replayed."""
    flags = {**SMALL, "replay.fraction": 0.5, "training.eval_holdout": stays_out}
    with running(tmp_path, flags) as service:
        expected = []
        for facts in (FACTS[:3], FACTS[3:7]):
            out = metrics(service, service.learn(*facts))["never_trained"]
            assert len(out) == int(stays_out)
            expected += [question for place, (question, _) in enumerate(facts) if place not in out]
        scheduler = service.service._scheduler
        log = service.call(scheduler._log.rows(service.call(scheduler._line())))
        assert [e.messages[0][1] for _, e in log] == expected
        service.learn(*FACTS[7:9])  # from that log


def test_what_stays_out_does_not_stand_for_its_update(tmp_path):
    """`update_retention` is of what was learnt: measured then, and asked again later, on those examples alone."""
    flags = {**SMALL, "training.eval_holdout": True, "training.eval_fraction": 0.5}
    with running(tmp_path, flags, evaluation__anchor_provider="local") as service:
        anchors = tmp_path / "data" / "anchors" / "a.jsonl"
        anchors.write_text(json.dumps({"text": "The weather is fine today."}) + "\n")
        found = metrics(service, service.learn(*FACTS[:4]))
        assert found["own_sample"]["loss_after"] == pytest.approx(found["finetune_loss"], rel=1e-5)
        scheduler = service.service._scheduler
        line = service.call(scheduler._line())
        (update,) = service.call(scheduler._evaluator._earlier(line, scheduler._examples))
        learnt = [question for place, (question, _) in enumerate(FACTS[:4]) if place not in found["never_trained"]]
        assert [e.messages[0][1] for e in update.examples] == learnt
        assert len(learnt) == 2


def test_an_interrupted_first_phase_goes_on_bit_by_bit(tmp_path):
    """The best weights so far are kept beside the state, and the stop comes where it would have come."""
    flags = {
        **SMALL,
        "training.max_steps": 1000,
        "training.lr": 1e-3,
        "training.eval_every": 1,
        "training.patience": 30,  # enough to be met in the middle
        "training.eval_holdout": True,
    }
    with running(tmp_path / "whole", flags) as service:
        job = service.wait(service.post(*FACTS[:4]), "published")
        whole, notes = weights(service, job.checkpoint), job.notes
    assert any("has not improved for 30" in note for note in notes)
    with running(tmp_path / "cut", flags) as service:
        service.post(*FACTS[:4])
        checkpoint = service.wait_for_step(10)
        assert service.service._scheduler.running.progress.max_steps == 1000
    assert (tmp_path / "cut" / "state" / "training" / checkpoint / "best.safetensors").is_file()
    with running(tmp_path / "cut", flags) as service:
        job = service.wait("job_000001", "published")
        assert any("taken up again" in note for note in job.notes)
        assert set(notes) < set(job.notes)
        assert weights(service, job.checkpoint) == whole
