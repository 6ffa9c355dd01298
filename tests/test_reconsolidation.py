"""`lineage: reconsolidate`: the whole log anew from the base, when idle; through the service itself."""

import json
import shutil
from types import SimpleNamespace

import pytest
from rich.console import Console
from running import FACTS, QUICK, Gate, died_again, nothing_left, running, until

from radiance_mlx.cli.render import job_view, jobs_table
from radiance_mlx.curation import data_hash
from radiance_mlx.models.nano import world
from radiance_mlx.store import Store

MINUTE = 60.0
REST = {
    **QUICK,
    "lineage": "reconsolidate",
    "reconsolidate.after_updates": 2,
    "reconsolidate.idle_minutes": 10,
}
#: to be met in the middle; what was learnt before keeps its number of steps
ENDLESS = {**REST, "training.max_steps": 1_000_000, "reconsolidate.max_steps": 1_000_000}


class Clock:
    """Time that moves only when a test says so."""

    def __init__(self):
        self.now = 1_770_638_400.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """A home whose stable line has two updates, the last one accepted at the clock's beginning."""
    home = tmp_path_factory.mktemp("learnt")
    with running(home, {**QUICK, "evaluation.anchor_provider": "none"}, clock=Clock()) as service:
        return SimpleNamespace(home=home, first=service.learn(FACTS[0]), second=service.learn(FACTS[1]))


@pytest.fixture
def home(learnt, tmp_path):
    return shutil.copytree(learnt.home, tmp_path / "home")


def later(service, clock, minutes=10):
    clock.now += minutes * MINUTE
    service._thread.loop.call_soon_threadsafe(service.service._scheduler.wake)


def reconsolidations(service):
    """Their jobs, oldest first."""
    found = service.call(service.service.jobs(None, 100, None))
    return [job for job in reversed(found) if job.kind == "reconsolidation"]


def rested(service, state="published"):
    """The newest reconsolidation's job, once it has come to that state."""
    job = until(lambda: reconsolidations(service), "a reconsolidation")[-1]
    return service.wait(job.job_id, state)


def consolidate(service, clock):
    """Let it be idle; the reconsolidated checkpoint's record."""
    before = len(reconsolidations(service))
    later(service, clock)
    until(lambda: len(reconsolidations(service)) > before)
    checkpoint = rested(service).checkpoint
    return service.checkpoints()[checkpoint]


def weights(service, checkpoint):
    return (service.folder(checkpoint) / "adapters.safetensors").read_bytes()


def put_anchors(home):
    rows = [{"prompt": q, "completion": a} for q, a in world.facts(world.KNOWN[:4])]
    (home / "data" / "anchors" / "anchors.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def wait_s(service):
    """How long the scheduler waits for one: None is until something changes."""
    return service.call(service.service._scheduler._reconsolidation.wait_s())


def taught(batch):
    return [(e.messages[0][1], e.messages[1][1]) for e in batch.examples]


@pytest.fixture
def batches(monkeypatch):
    """`batches(service)`: the list of what its engine is given to train from now on."""

    def watch(service, plans=None):
        seen, engine = [], service.service._engine
        train = engine.train

        async def seeing(batch, report, cancelled, plan):
            seen.append(batch)
            if plans is not None:
                plans.append(plan)
            return await train(batch, report, cancelled, plan)

        monkeypatch.setattr(engine, "train", seeing)
        return seen

    return watch


# --- the whole log, anew ---------------------------------------------------------------------------


def test_when_idle_the_whole_log_is_trained_anew_from_the_base_and_serves(home, learnt, clock, tmp_path):
    """Bit by bit what a fresh training of the same examples gives; replay is off, for the log is the batch."""
    with running(home, {**REST, "replay.fraction": 0.5}, clock=clock) as service:
        later(service, clock, 9)
        assert wait_s(service) == MINUTE
        assert reconsolidations(service) == []
        later(service, clock, 1)
        job = rested(service)
        record = service.checkpoints()[job.checkpoint]
        examples = [e for _, e in service.store(lambda s: s.examples_of(["job_000001", "job_000002"]))]
        assert (job.job_id, job.consolidates, job.example_count) == ("job_000003", learnt.second, 0)
        assert (record.parent, record.jobs, record.status) == (learnt.second, (job.job_id,), "stable")
        assert record.reconsolidated
        assert record.data_hash == data_hash(examples)
        assert (record.metrics["examples"], record.metrics["steps"]) == (2, 6)
        assert record.config["replay"]["fraction"] == 0
        note = "reconsolidated: trained from the base over 2 examples of 2 updates"
        assert note in job.notes
        assert note in record.notes
        answer = service.ask("Hello!")
        assert (answer.checkpoint, answer.checkpoint_status) == (record.checkpoint, "stable")
        facts = json.loads((service.folder(record.checkpoint) / "checkpoint.json").read_text())
        metrics = json.loads((home / "metrics" / f"{record.checkpoint}.json").read_text())
        assert facts["reconsolidated"] is metrics["reconsolidated"] is True
        [event] = [e for e in service.store(lambda s: s.events(limit=1000)) if e["data"].get("reconsolidated")]
        assert (event["kind"], event["data"]["checkpoint"]) == ("published", record.checkpoint)
        assert wait_s(service) is None
        made = weights(service, record.checkpoint)
    again = shutil.copytree(learnt.home, tmp_path / "fresh")
    with running(again, {**QUICK, "lineage": "fresh", "training.max_steps": 6}, clock=clock) as service:
        assert weights(service, service.learn(*FACTS[:2])) == made


def test_an_update_goes_on_from_it_and_the_log_has_everything_once(home, clock, batches):
    """For replay, for the next reconsolidation, and for what is asked again of earlier updates."""
    put_anchors(home)
    measured = {"evaluation.anchor_provider": "local", "evaluation.update_window": 2}
    with running(home, {**REST, **measured, "replay.fraction": 0.5}, clock=clock) as service:
        seen = batches(service, plans := [])
        whole = consolidate(service, clock)
        third, fourth = service.learn(FACTS[2]), service.learn(FACTS[3])
        last = consolidate(service, clock)
        assert [batch.parent for batch in seen] == [whole.parent, whole.checkpoint, third, fourth]
        assert [batch.lineage for batch in seen] == ["fresh", "continue", "continue", "fresh"]
        asked = [[e.messages[0][1] for e in batch.log] for batch in seen]
        assert asked == [[], [q for q, _ in FACTS[:2]], [q for q, _ in FACTS[:3]], []]
        assert taught(seen[-1]) == FACTS[:4]
        assert (seen[-1].max_steps, last.metrics["steps"]) == (12, 12)
        assert service.current == last.checkpoint
        service.learn(FACTS[4])
        assert [update.checkpoint for update in plans[-1].earlier] == [fourth, third]
        assert [len(update.examples) for update in plans[-1].earlier] == [1, 1]


def test_a_fact_that_was_overwritten_is_in_once_with_its_last_answer(home, clock, batches):
    with running(home, REST, clock=clock) as service:
        service.learn((FACTS[0][0], "Somewhere else."))
        seen = batches(service)
        consolidate(service, clock)
        assert taught(seen[0]) == [FACTS[1], (FACTS[0][0], "Somewhere else.")]


def test_its_steps_are_bounded_and_mlx_lms_own_loop_does_it_too(home, clock):
    settings = {**REST, "reconsolidate.max_steps": 5, "training.slice_ms": 0}
    with running(home, settings, clock=clock) as service:
        record = consolidate(service, clock)
        assert (record.metrics["steps"], record.config["training"]["max_steps"]) == (5, 5)


def test_rehearsal_goes_on_and_its_neighbours_are_carried_once(home, clock, batches):
    """Those of a reconsolidation are of all that was before it: the updates before it have no say any more."""
    small = {"rehearsal.kl_weight": 1.0, "rehearsal.samples": 8, "rehearsal.sample_tokens": 40}
    small |= {"rehearsal.rows": 4, "rehearsal.neighbours": 4}
    with running(home, {**REST, **small}, clock=clock) as service:
        seen = batches(service)
        whole = consolidate(service, clock)
        service.learn(FACTS[2])
        curve = json.loads((home / "metrics" / f"{whole.checkpoint}.json").read_text())["curves"]["finetune_loss"]
        assert all("kl" in row for row in curve)
        assert [batch.line for batch in seen] == [(), (whole.checkpoint,)]


@pytest.mark.parametrize("mode", ["continue", "fresh"])
def test_with_another_lineage_there_is_none(home, clock, mode):
    with running(home, {**REST, "lineage": mode}, clock=clock) as service:
        later(service, clock, 1000)
        assert wait_s(service) is None


# --- what it yields to -----------------------------------------------------------------------------


def test_an_update_does_not_wait_for_it(home, learnt, clock):
    """It is put aside at once, and the next idle time begins another."""
    with running(home, ENDLESS, clock=clock) as service:
        later(service, clock)
        checkpoint = service.wait_for_step(2)
        update = service.post(FACTS[2])
        job = rested(service, "cancelled")
        assert any("put aside: an update is due" in note for note in job.notes)
        until(lambda: service.job(update).state == "training" and service.wait_for_step())
        assert service.job(update).attempts == 1
        assert nothing_left(service, checkpoint)
        events = service.store(lambda s: s.events(limit=1000))
        assert [e["data"]["checkpoint"] for e in events if e["kind"] == "put_aside"] == [checkpoint]
    with running(home, REST, clock=clock) as service:
        made = service.wait(update, "published").checkpoint
        assert service.checkpoints()[made].parent == learnt.second
        record = consolidate(service, clock)
        assert (record.parent, record.metrics["examples"]) == (made, 3)


def test_what_waits_for_company_does_not_stop_it_before_it_is_due(home, clock):
    """And as long as something waits, none begins."""
    batched = {"update_mode": "batched", "batch.max_examples": 9, "batch.max_age_minutes": 30}
    with running(home, {**ENDLESS, **batched}, clock=clock) as service:
        later(service, clock)
        checkpoint = service.wait_for_step(1)
        update = service.post(FACTS[2])
        later(service, clock, 29)
        reached = service.service._scheduler.running.progress.step
        assert service.wait_for_step(reached + 5) == checkpoint
        assert service.job(update).state == "queued"
        later(service, clock, 1)
        rested(service, "cancelled")
        service.wait(update, "training")
    patient = {"batch.max_age_minutes": 300, "reconsolidate.idle_minutes": 60}  # longer than `update` is old by now
    with running(home, {**REST, **batched, **patient}, clock=clock) as service:
        service.wait(update, "published")
        waiting = service.post(FACTS[3])
        later(service, clock, 100)
        until(lambda: not service.service._scheduler._wake.is_set())
        assert wait_s(service) == 0
        assert service.job(waiting).state == "queued"
        assert len(reconsolidations(service)) == 1


def test_one_that_is_cancelled_is_not_tried_again_before_something_new_was_learnt(home, clock):
    with running(home, ENDLESS, clock=clock) as service:
        later(service, clock)
        checkpoint = service.wait_for_step(1)
        [job] = reconsolidations(service)
        assert service.call(service.service.cancel(job.job_id)).state == "training"
        assert rested(service, "cancelled").notes == ()
        until(lambda: service.service._scheduler.running is None)
        assert nothing_left(service, checkpoint)
        later(service, clock, 100)
        assert wait_s(service) is None
    with running(home, REST, clock=clock) as service:
        assert wait_s(service) is None
        service.learn(FACTS[2])
        assert consolidate(service, clock).metrics["examples"] == 3


def test_one_that_the_policy_refuses_is_not_tried_again_before_something_new_was_learnt(home, learnt, clock):
    """Judged like any update: the line stays as it was, the job says why."""
    put_anchors(home)
    strict = {"evaluation.rollback_mode": "auto_rollback", "evaluation.catastrophic_delta": -100.0}
    with running(home, {**REST, "evaluation.anchor_provider": "local", **strict}, clock=clock) as service:
        later(service, clock)
        job = rested(service, "rejected")
        assert job.error["code"] == "rejected"
        refused = service.checkpoints()[job.checkpoint]
        assert (refused.status, refused.reconsolidated) == ("rolled_back", True)
        assert service.ask("Hello!").checkpoint == learnt.second
        later(service, clock, 100)
        assert wait_s(service) is None
    with running(home, REST, clock=clock) as service:
        assert wait_s(service) is None
        made = service.learn(FACTS[2])
        assert service.checkpoints()[made].parent == learnt.second
        assert consolidate(service, clock).metrics["examples"] == 3


def test_one_that_fails_is_not_tried_again_before_something_new_was_learnt(home, learnt, clock):
    """Not for less either: going back teaches nothing."""
    with running(home, {**REST, "training.lr": 1e30, "reconsolidate.after_updates": 1}, clock=clock) as service:
        later(service, clock)
        assert rested(service, "failed").error["code"] == "non_finite"
        later(service, clock, 100)
        assert wait_s(service) is None
        service.call(service.service.rollback(learnt.first, "test"))
        assert wait_s(service) is None


# --- the stable checkpoint moves -------------------------------------------------------------------


def test_a_rollback_puts_it_aside(home, learnt, clock):
    """What is left of the line is not enough for another; when it is stable again, it is tried again."""
    with running(home, ENDLESS, clock=clock) as service:
        later(service, clock)
        checkpoint = service.wait_for_step(1)
        service.call(service.service.rollback(learnt.first, "test"))
        assert any("stable checkpoint has moved" in note for note in rested(service, "cancelled").notes)
        until(lambda: service.service._scheduler.running is None)
        assert nothing_left(service, checkpoint)
        assert wait_s(service) is None
        service.call(service.service.rollback(learnt.second, "test"))
        until(lambda: len(reconsolidations(service)) == 2)
        assert service.wait_for_step(1) != checkpoint


def test_after_a_rollback_the_log_is_of_the_line_that_is_left(home, learnt, clock, batches):
    with running(home, REST, clock=clock) as service:
        service.call(service.service.rollback(learnt.first, "test"))
        service.learn(FACTS[2])
        seen = batches(service)
        consolidate(service, clock)
        assert taught(seen[0]) == [FACTS[0], FACTS[2]]


def test_one_that_was_rolled_back_is_not_made_again_before_something_new_was_learnt(home, learnt, clock):
    with running(home, REST, clock=clock) as service:
        consolidate(service, clock)
        service.call(service.service.rollback(None, "I liked it better before"))
        assert service.current == learnt.second
        later(service, clock, 100)
        assert wait_s(service) is None


# --- interruptions ---------------------------------------------------------------------------------


def test_one_that_was_stopped_in_the_middle_goes_on_bit_by_bit(home, clock, tmp_path):
    """After a stop in good order, which counts no attempt."""
    steps = {**REST, "training.max_steps": 25}
    other = shutil.copytree(home, tmp_path / "whole")
    with running(other, steps, clock=clock) as service:
        whole = weights(service, consolidate(service, clock).checkpoint)
    with running(home, steps, clock=clock) as service:
        later(service, clock, 0)
        service.wait_for_step(5)
    with running(home, steps, clock=clock) as service:
        job = rested(service)
        assert any("taken up again at step" in note for note in job.notes)
        assert job.attempts == 1
        assert weights(service, job.checkpoint) == whole


def test_one_that_was_finished_before_a_crash_is_published_as_it_is(home, clock, monkeypatch):
    with running(home, REST, clock=clock) as service:
        gate = Gate(service, service.service._lineage, "publish", monkeypatch)
        later(service, clock)
        gate.wait()
        shutil.copytree(home, copy := home.with_name("copy"))
        gate.open()
        checkpoint = rested(service).checkpoint
    before = (copy / "adapters" / checkpoint).stat().st_mtime_ns
    with running(copy, REST, clock=clock) as service:
        assert rested(service).checkpoint == checkpoint == service.current
        assert service.folder(checkpoint).stat().st_mtime_ns == before
        assert service.checkpoints()[checkpoint].reconsolidated


@pytest.mark.parametrize("change", ["switched off", "rolled back"])
def test_one_that_is_moot_after_a_restart_is_put_aside(home, learnt, clock, change):
    with running(home, ENDLESS, clock=clock) as service:
        later(service, clock)
        checkpoint = service.wait_for_step(1)
        base = service.info()["base_hash"]
        shutil.copytree(home, copy := home.with_name("copy"))
    settings = {**REST, "lineage": "continue"} if change == "switched off" else REST
    if change == "rolled back":  # as by a crash between the rollback and what follows from it
        store = Store(copy, clock)
        store.move_stable(base, learnt.first, "test")
        store.close()
    with running(copy, settings, clock=clock) as service:
        assert any("put aside" in note for note in rested(service, "cancelled").notes)
        until(lambda: nothing_left(service, checkpoint))
        assert len(service.checkpoints()) == 2


#: no waiting in a process, whose clock is the world's
AT_ONCE = {"lineage": "reconsolidate", "reconsolidate.after_updates": 1, "reconsolidate.idle_minutes": 1e-6}
DIES_OF_IT = (
    "import os; from radiance_mlx.engine.training import TrainingTask as Task; whole = Task.slice\n"
    "def slice(self, seconds):\n"
    "    if self.batch.reconsolidated: os._exit(9)\n"
    "    return whole(self, seconds)\n"
    "Task.slice = slice\n"
    "import sys; from radiance_mlx.__main__ import main; sys.exit(main())"
)


def test_a_process_killed_in_the_middle_of_one_goes_on_from_the_last_saved_step(start):
    """It is a job like any other: listed, with its kind and its progress."""
    long = {**AT_ONCE, "training.max_steps": 40, "training.save_every_s": 0.01}
    first = start(**long).ready()
    update = first.wait(first.update(FACTS[0]))
    assert update["kind"] == "update"
    until(lambda: len(first.get("/jobs")["jobs"]) == 2)
    whole = first.get("/jobs")["jobs"][0]
    assert (whole["kind"], whole["example_count"]) == ("reconsolidation", 0)
    shown = first.wait_for_step(whole["job_id"], 3)
    assert shown["progress"]["max_steps"] == 40
    until(lambda: list((first.home / "state" / "training").glob("A_*")))
    first.kill()
    with running(first.home, {**QUICK, **long}) as second:
        done = second.wait(whole["job_id"], "published")
        assert done.attempts == 2
        assert any("taken up again at step" in note for note in done.notes)
        assert [record.reconsolidated for record in second.checkpoints().values()] == [False, True]
        assert second.current == done.checkpoint


def test_one_that_ends_the_process_four_times_is_quarantined_and_not_begun_again(start):
    """Until something new was learnt."""
    first = start(script=DIES_OF_IT, **AT_ONCE).ready()
    update = first.update(FACTS[0])
    assert first.exit_code() == 9
    died_again(first.home, 3)
    with running(first.home, {**QUICK, **AT_ONCE}) as last:
        quarantined = last.wait("job_000002", "quarantined")
        assert (quarantined.kind, quarantined.attempts) == ("reconsolidation", 4)
        assert last.wait(update, "published").checkpoint == last.current
        assert last.wait(last.post(FACTS[1]), "published").job_id == "job_000003"
        until(lambda: len(reconsolidations(last)) == 2)
        assert rested(last).job_id == "job_000004"


# --- how it looks ----------------------------------------------------------------------------------


def test_tables_tell_a_reconsolidation_from_an_update(capsys):
    progress = {"step": 12, "max_steps": 60, "loss": 0.5}
    job = {"job_id": "job_000003", "kind": "reconsolidation", "state": "training", "progress": progress}
    console = Console(width=200)
    console.print(jobs_table([job, {"job_id": "job_000002", "kind": "update", "state": "published"}]))
    console.print(job_view(job))
    said = capsys.readouterr().out
    assert "reconsolidation · step 12/60 · loss 0.500" in said
    assert said.count("reconsolidation") == 2
