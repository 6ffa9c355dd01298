"""What an update cost, and what becomes of one that cost too much: the real service on the embedded model."""

import json

import pytest
from running import FACTS, QUICK, Process, running, until

from radiance_mlx.errors import Conflict
from radiance_mlx.evaluation.metrics import NAMES, UPDATE_NAMES
from radiance_mlx.lora import files
from radiance_mlx.models.nano import world

LOCAL = {**QUICK, "evaluation.anchor_provider": "local"}
#: a threshold that every update is over, and one that none is
ALWAYS, NEVER = -100.0, 100.0


def put_anchors(home, rows=None):
    folder = home / "data" / "anchors"
    folder.mkdir(parents=True, exist_ok=True)
    rows = rows or [{"prompt": q, "completion": a} for q, a in world.facts(world.KNOWN[:3])]
    (folder / "anchors.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def learnt(service, fact):
    """The record of the checkpoint that came of one more fact."""
    name = service.learn(fact)
    return service.checkpoints()[name]


@pytest.fixture
def home(tmp_path):
    put_anchors(tmp_path)
    return tmp_path


def test_three_updates_have_three_points_and_every_metric(home):
    """In /info's curves and summary, in each metrics file, in curves.jsonl, in the checkpoints' rows."""
    with running(home, LOCAL) as service:
        assert service.info()["forgetting_summary"] == {"anchor_ce_delta": 0.0, "retention_score": 1.0}
        made = [service.learn(fact) for fact in FACTS[:3]]
        info = service.info()
        records = service.checkpoints()
    curve = info["loss_curves"]["forgetting_loss"]
    assert len(curve) == 3
    assert all(isinstance(value, float) for value in curve)
    summary = info["forgetting_summary"]
    last = records[made[2]].metrics
    assert summary["anchor_ce_delta"] == last["anchor_ce_delta"]
    assert summary["retention_score"] == last["retention_score"]
    for name in made:
        metrics = json.loads((home / "metrics" / f"{name}.json").read_text())
        assert {k: v for k, v in metrics.items() if k != "curves"} == records[name].metrics
        for metric in NAMES:
            low, high = metrics["intervals"][metric]
            assert low <= metrics[metric] <= high
        assert metrics["update_kl"] > 0
        assert metrics["forgetting_kl"] > 0
        assert metrics["evaluation"]["anchors"]["documents"] == 15
    assert records[made[0]].metrics["update_retention"] is None  # there is no earlier one
    assert set(records[made[2]].metrics["update_retention_by_checkpoint"]) == set(made[:2])
    rows = [json.loads(line) for line in (home / "metrics" / "curves.jsonl").read_text().splitlines()]
    assert [row["checkpoint"] for row in rows] == made
    assert [row["forgetting_loss"] for row in rows] == curve
    assert {*NAMES, *UPDATE_NAMES, "finetune_loss", "eval_loss"} <= set(rows[0])


def test_the_figures_of_one_checkpoint_and_the_next_hang_together(home):
    """The step from the parent is the difference of two ways from the base; the first one's parent is the base."""
    with running(home, LOCAL) as service:
        first, second = (learnt(service, fact).metrics for fact in FACTS[:2])
    assert first["forgetting_loss_delta"] == pytest.approx(first["forgetting_kl"], abs=1e-6)
    assert first["drift_kl"] == pytest.approx(first["forgetting_kl"], abs=1e-6)
    step = second["forgetting_loss"] - first["forgetting_loss"]
    assert second["forgetting_loss_delta"] == pytest.approx(step, abs=1e-5)
    assert second["own_sample"]["loss_after"] < second["own_sample"]["loss_before"]


def test_without_anchors_the_fields_are_null_and_the_work_is_not_done(tmp_path):
    with running(tmp_path, LOCAL, evaluation__anchor_provider="none") as service:
        name = service.learn(FACTS[0])
        info = service.info()
        metrics = service.checkpoints()[name].metrics
    assert info["forgetting_summary"] is None
    assert info["loss_curves"]["forgetting_loss"] is None
    assert all(metrics[metric] is None for metric in (*NAMES, *UPDATE_NAMES))
    assert not (tmp_path / "state" / "anchors").exists()


def test_nano_measures_its_own_anchors_when_nothing_is_set(tmp_path):
    """It brings a set: what it knows, whom it does not know, small talk."""
    with running(tmp_path, {k: v for k, v in LOCAL.items() if "anchor" not in k}) as service:
        metrics = learnt(service, FACTS[0]).metrics
    assert metrics["evaluation"]["anchors"]["documents"] > 100
    assert metrics["retention_score"] < 1


def test_anchors_that_cannot_be_had_are_told_and_hold_nothing_up(tmp_path):
    """The job is published with a note, /info says why; when there are some, the next one is measured."""
    with running(tmp_path, LOCAL) as service:
        job = service.wait(service.post(FACTS[0]), "published")
        assert any("anchors were not measured" in note for note in job.notes)
        assert any("anchors are not measured" in warning for warning in service.info()["warnings"])
        assert service.info()["forgetting_summary"] is None
        put_anchors(tmp_path)
        metrics = learnt(service, FACTS[1]).metrics
        assert metrics["forgetting_kl"] > 0
        assert service.info()["warnings"] == []


def test_anchors_that_must_be_had_fail_the_job(tmp_path):
    """With the reason and what to do; nothing is trained."""
    with running(tmp_path, LOCAL, evaluation__require_anchors=True) as service:
        job = service.wait(service.post(FACTS[0]), "failed")
        assert job.error["code"] == "anchors_unavailable"
        assert service.current == "base"


def test_anchors_that_change_are_read_again(home):
    """And compared with nothing that was measured on the old ones."""
    with running(home, LOCAL) as service:
        first = learnt(service, FACTS[0]).metrics
        put_anchors(home, [{"text": "Hello there, how are you today?"}, {"input": "Hi", "output": "Hello!"}])
        second = learnt(service, FACTS[1]).metrics
    assert first["evaluation"]["anchors"]["hash"] != second["evaluation"]["anchors"]["hash"]
    assert second["evaluation"]["anchors"]["documents"] == 2
    assert second["drift_kl"] is not None  # the parent was measured again


# --- the policy ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "delta", "state", "status"),
    [
        ("off", ALWAYS, "published", "stable"),
        ("warn", ALWAYS, "published", "risky"),
        ("warn", NEVER, "published", "stable"),
        ("auto_rollback", NEVER, "published", "stable"),
        ("auto_rollback", ALWAYS, "rejected", "rolled_back"),
    ],
)
def test_what_the_modes_make_of_an_update(home, mode, delta, state, status, capfd):
    """The verdict with its figures is in the metrics whatever the mode; one that fires is logged."""
    with running(home, LOCAL, evaluation__rollback_mode=mode, evaluation__catastrophic_delta=delta) as service:
        job = service.wait(service.post(FACTS[0]), state)
        record = service.checkpoints()[job.checkpoint]
        assert record.status == status
        verdict = record.metrics["evaluation"]["verdict"]
        assert (verdict["metric"], verdict["threshold"]) == ("forgetting_loss_delta", delta)
        served = (job.checkpoint, status) if state == "published" else ("base", "base")
        answer = service.ask("Hello!")
        assert (answer.checkpoint, answer.checkpoint_status) == served
    said = "".join(capfd.readouterr())
    assert ("over the threshold" in said) == (state == "published" and delta == ALWAYS)


def test_a_rejected_update_never_answers_and_can_be_looked_at(home):
    """The parent stays, the reason is on the job, the curves leave it out, the next update goes on from the parent."""
    with running(home, LOCAL, evaluation__rollback_mode="auto_rollback") as service:
        good = service.learn(FACTS[0])

    with running(
        home, LOCAL, evaluation__rollback_mode="auto_rollback", evaluation__catastrophic_delta=ALWAYS
    ) as service:
        seen = set()
        job_id = service.post(FACTS[1])
        while service.job(job_id).state != "rejected":
            seen.add(service.ask("Hello!", max_tokens=2).checkpoint)
        assert seen == {good}
        job = service.job(job_id)
        assert job.error["code"] == "rejected"
        assert job.error["details"]["value"] > ALWAYS
        assert len(service.store(lambda s: s.examples_of([job_id]))) == 1
        assert service.info()["loss_curves"]["finetune_loss"] == [service.checkpoints()[good].metrics["finetune_loss"]]
        assert service.ask("Hello!", checkpoint=job.checkpoint).checkpoint_status == "rolled_back"
        events = [e for e in service.store(lambda s: s.events(limit=1000)) if e["kind"] == "rejected"]
        assert events[0]["data"]["verdict"]["outcome"] == "rejected"

    with running(home, LOCAL) as service:
        assert service.current == good
        following = service.learn(FACTS[2])
        assert service.checkpoints()[following].parent == good
        service.call(service.service.rollback(job.checkpoint, "I want it all the same"))
        assert service.current == job.checkpoint
        assert (
            service.checkpoints()[job.checkpoint].metrics["finetune_loss"]
            in (service.info()["loss_curves"]["finetune_loss"])
        )


def test_a_process_killed_between_the_verdict_and_its_record_rejects_after_the_next_start(home, start):
    """The folder was whole; what it is was decided before."""
    settings = {
        "evaluation.anchor_provider": "local",
        "evaluation.rollback_mode": "auto_rollback",
        "evaluation.catastrophic_delta": ALWAYS,
    }
    dies = """
import os
from radiance_mlx.lineage import Lineage
async def publish(self, record): os.kill(os.getpid(), 9)
Lineage.publish = publish
import sys
from radiance_mlx.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
    first: Process = start(home=home, script=dies, **settings).ready()
    job_id = first.update(FACTS[0])
    assert first.exit_code() == -9
    with running(home, {**QUICK, **settings}) as again:
        job = again.wait(job_id, "rejected")
        assert again.current == "base"
        assert job.attempts == 1
        assert job.error["code"] == "rejected"


def test_the_largest_strength_that_passes_is_published(home):
    """`scale_first`: half-way between doing nothing and doing all; the file holds the smaller `b`."""
    with running(home, LOCAL, training__max_steps=12) as service:
        whole = learnt(service, FACTS[0])
    delta = whole.metrics["forgetting_loss_delta"]
    other = home / "second"
    put_anchors(other)
    with running(
        other,
        LOCAL,
        training__max_steps=12,
        evaluation__rollback_mode="auto_rollback",
        evaluation__catastrophic_delta=delta / 3,
        evaluation__scale_first=True,
    ) as service:
        name = service.learn(FACTS[0])
        record = service.checkpoints()[name]
        scale = record.metrics["evaluation"]["scale"]
        assert 0.2 < scale < 0.9
        assert record.status == "stable"
        assert delta / 6 < record.metrics["forgetting_loss_delta"] <= delta / 3
        assert any("of its strength" in note for note in service.job("job_000001").notes)
    before = files.load_arrays(home / "adapters" / whole.checkpoint / files.ADAPTER_FILE)
    after = files.load_arrays(other / "adapters" / name / files.ADAPTER_FILE)
    for key, value in after.items():
        expected = before[key] * scale if key.endswith("lora_b") else before[key]
        assert abs(value - expected).max().item() < 1e-6


def test_going_on_after_an_interruption_keeps_what_the_loss_was_before(home):
    """The examples' loss before the update is that of the parent, not of the interrupted training."""
    settings = {**LOCAL, "training.max_steps": 40}
    with running(home, settings) as service:
        service.post(FACTS[0])
        service.wait_for_step(5)
    with running(home, settings) as service:
        job = service.wait("job_000001", "published")
        assert any("taken up again" in note for note in job.notes)
        interrupted = service.checkpoints()[job.checkpoint].metrics["own_sample"]
    other = home / "second"
    put_anchors(other)
    with running(other, settings) as service:
        whole = learnt(service, FACTS[0]).metrics["own_sample"]
    assert interrupted == pytest.approx(whole, abs=1e-5)


def test_a_rollback_while_an_update_is_measured_trains_it_again_from_there(home):
    """Its parent is not served any more, so neither its figures nor its verdict would mean anything."""
    with running(home, LOCAL, training__max_steps=12) as service:
        first = service.learn(FACTS[0])
        second = service.learn(FACTS[1])
        job_id = service.post(FACTS[2])
        until(lambda: service.job(job_id).state in ("training", "evaluating"))
        service.call(service.service.rollback(first, "back"))
        job = service.wait(job_id, "published")
        assert service.checkpoints()[job.checkpoint].parent == first
        with pytest.raises(Conflict):
            service.call(service.service.cancel(job_id))
        assert service.checkpoints()[second].status == "rolled_back"


def test_merging_toward_the_base_answers_with_part_of_what_was_learnt(home):
    """The adapter's file says so, for mlx-lm too; figures are of what answers; training goes on from the whole."""
    merged = home / "merged"
    put_anchors(merged)
    with running(home, LOCAL, training__max_steps=12) as service:
        whole = learnt(service, FACTS[0])
    with running(merged, LOCAL, training__max_steps=12, serving__merge_toward_base=0.5) as service:
        part = learnt(service, FACTS[0])
        second = learnt(service, FACTS[1])
        notes = [note for job in ("job_000001", "job_000002") for note in service.job(job).notes]
    assert 0 < part.metrics["forgetting_kl"] < whole.metrics["forgetting_kl"]
    assert part.metrics["finetune_loss"] > whole.metrics["finetune_loss"]
    one = files.load_adapter(home / "adapters" / whole.checkpoint)
    half = files.load_adapter(merged / "adapters" / part.checkpoint)
    assert half.scale == one.scale / 2
    assert all((half.weights[path][1] == one.weights[path][1]).all().item() for path in one.weights)
    assert second.parent == part.checkpoint
    assert not any("fresh" in note for note in notes)


def test_what_could_not_be_learnt_is_refused_without_any_anchors(tmp_path):
    """`metric: finetune_loss` looks at the batch itself."""
    flags = {**QUICK, "evaluation.rollback_mode": "auto_rollback", "evaluation.metric": "finetune_loss"}
    with running(tmp_path, flags, evaluation__catastrophic_delta=1e-6) as service:
        job = service.wait(service.post(FACTS[0]), "rejected")
        assert "finetune_loss" in job.error["message"]
        assert service.current == "base"
        assert not any("no effect" in warning for warning in service.info()["warnings"])


def test_going_back_and_forth_makes_nothing_of_a_risky_checkpoint(home):
    """It serves as risky again; the curves say so too."""
    flags = {**LOCAL, "evaluation.rollback_mode": "warn", "evaluation.catastrophic_delta": ALWAYS}

    def in_curves():
        lines = (home / "metrics" / "curves.jsonl").read_text().splitlines()
        return [json.loads(line)["status"] for line in lines]

    with running(home, flags) as service:
        first, second = service.learn(FACTS[0]), service.learn(FACTS[1])
        service.call(service.service.rollback(first, "back"))
        assert service.checkpoints()[second].status == "rolled_back"
        assert in_curves() == ["risky", "rolled_back"]
        service.call(service.service.rollback(second, "and forth"))
        assert service.checkpoints()[second].status == "risky"
        assert in_curves() == ["risky", "risky"]
        assert service.service.current == (second, "risky")


def test_a_cache_that_cannot_be_kept_is_no_fault_of_the_update(home):
    """A file lies where the folder should be: what is measured is measured again next time."""
    (home / "state").mkdir()
    (home / "state" / "anchors").write_text("in the way")
    with running(home, LOCAL) as service:
        assert learnt(service, FACTS[0]).metrics["forgetting_kl"] > 0


def test_an_adapter_that_cannot_be_written_waits_until_it_can(tmp_path, monkeypatch):
    """The update was accepted: a fault of the disk does not end it."""
    monkeypatch.setattr("radiance_mlx.scheduler.LOOK_S", 0.05)
    with running(tmp_path) as service:
        (tmp_path / "adapters").rmdir()
        (tmp_path / "adapters").write_text("in the way")
        job_id = service.post(FACTS[0])
        until(lambda: any("training waits" in warning for warning in service.info()["warnings"]))
        assert service.job(job_id).state in ("training", "evaluating")
        (tmp_path / "adapters").unlink()
        assert service.wait(job_id, "published").attempts == 1
