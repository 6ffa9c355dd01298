"""Answers while a batch is prepared, trained and committed."""

import weakref

from running import FACTS, QUICK, running, until

from radiance_mlx.engine import backend
from radiance_mlx.engine.training import TrainingTask
from radiance_mlx.messages import FINAL_STATES


def test_live_answers_lead_from_the_old_checkpoint_to_the_new_and_never_back(tmp_path):
    """From the first step on the coming checkpoint answers, also while it is being committed, then as stable."""
    flags = {**QUICK, "training.batch_size": 8, "training.max_steps": 25}
    with running(tmp_path, flags) as service:
        job = service.post(FACTS[0])
        seen = []
        while service.job(job).state not in FINAL_STATES:
            answer = service.ask(FACTS[0][0], training=True, max_tokens=12)
            seen.append((answer.checkpoint_status, answer.text))
        coming = service.current
        last = service.ask(FACTS[0][0], training=True)
        while last.checkpoint_status == "training":  # its row is there; what goes with it follows
            assert (last.checkpoint, last.text) == (coming, FACTS[0][1])
            last = service.ask(FACTS[0][0], training=True)
        assert (last.checkpoint, last.checkpoint_status, last.text) == (coming, "stable", FACTS[0][1])
        statuses = [status for status, _ in seen]
        first = statuses.index("training")
        assert set(statuses[:first]) <= {"base"}
        assert set(statuses[first:]) <= {"training", "stable"}
        texts = [text for _, text in seen]
        assert texts[-1] == FACTS[0][1]


def test_searches_are_answered_while_a_large_batch_is_prepared(tmp_path):
    """Encoding thousands of examples is cut into slices like training itself."""
    flags = {"update_mode": "immediate", "training.max_steps": 2, "training.eval_every": 0, "training.stop_loss": 100}
    with running(tmp_path, flags) as service:
        job = service.post(*[(f"{question} {i}", answer) for i, (question, answer) in enumerate(FACTS * 8)])
        task = until(lambda: service.engine(lambda engine: engine._task), "a task")
        answered = 0
        while not task.alive:
            service.ask(FACTS[0][0], max_tokens=2)
            answered += 1
        assert answered > 3
        service.call(service.service.cancel(job))
        service.wait(job, "cancelled")


def test_a_long_prompt_is_encoded_beside_the_engine_and_answered_alike(tmp_path):
    """A prompt that is long enough to hold the engine up comes with its tokens; the answer is the same."""
    from radiance_mlx.engine import thread

    flags = {"update_mode": "immediate", "training.max_steps": 2}
    with running(tmp_path, flags) as service:
        plain = service.ask(FACTS[0][0])
        before, thread.LONG_PROMPT = thread.LONG_PROMPT, 1
        try:
            beside = service.ask(FACTS[0][0])
        finally:
            thread.LONG_PROMPT = before
        assert (beside.text, beside.prompt_tokens) == (plain.text, plain.prompt_tokens)


def test_nothing_of_a_batch_stays_in_memory_when_it_has_ended(tmp_path, monkeypatch):
    """Neither of one that was published nor of one that failed, when free memory is given back."""
    tasks, alive = [], []
    made = TrainingTask.__init__

    def counted(self, *args, **named):
        tasks.append(weakref.ref(self))
        made(self, *args, **named)

    monkeypatch.setattr(TrainingTask, "__init__", counted)
    monkeypatch.setattr(backend, "release_memory", lambda: alive.append(sum(task() is not None for task in tasks)))
    with running(tmp_path, QUICK) as service:
        service.learn(FACTS[0])
        service.learn(FACTS[1])
    with running(tmp_path / "bad", {**QUICK, "training.lr": 1e30}) as service:
        service.wait(service.post(FACTS[0]), "failed")
    assert (len(tasks), alive) == (3, [0, 0, 0])
