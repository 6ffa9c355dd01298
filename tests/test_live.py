"""Live weights while a batch trains, until it is published."""

from running import FACTS, running

from radiance_mlx.messages import FINAL_STATES


def test_live_answers_lead_from_the_old_checkpoint_to_the_new_and_never_back(tmp_path):
    """From the first step on the coming checkpoint answers, also while it is being committed, then as stable."""
    flags = {"update_mode": "immediate", "training.max_steps": 25}
    with running(tmp_path, flags) as service:
        job = service.post(FACTS[0])
        seen = []
        while service.job(job).state not in FINAL_STATES:
            answer = service.ask(FACTS[0][0], training=True, max_tokens=12)
            seen.append((answer.checkpoint_status, answer.text))
        last = service.ask(FACTS[0][0], training=True)
        coming = service.current
        assert (last.checkpoint, last.checkpoint_status, last.text) == (coming, "stable", FACTS[0][1])
        statuses = [status for status, _ in seen]
        first = statuses.index("training")
        assert set(statuses[:first]) <= {"base"}
        assert set(statuses[first:]) <= {"training", "stable"}
        texts = [text for _, text in seen]
        assert texts[-1] == FACTS[0][1]
