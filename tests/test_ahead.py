"""The base is asked what every update needs while nothing else is to be done."""

import json

from running import FACTS, QUICK, running, until

from radiance_mlx import offline
from radiance_mlx.config import load_config
from radiance_mlx.engine import asked
from radiance_mlx.engine.asked import Asked

SMALL = {
    **QUICK,
    "rehearsal.kl_weight": 1.0,
    "rehearsal.rewording": True,
    "rehearsal.samples": 32,
    "rehearsal.sample_tokens": 40,
    "rehearsal.rows": 4,
    "rehearsal.neighbours": 2,
}
#: more than is drawn while a test runs
ENDLESS = {**SMALL, "rehearsal.samples": 100_000}


def asking(service):
    return service.engine(lambda engine: engine.status())["asking_ahead"]


def kept(home):
    """What is kept of what the base has said, with the times at which it was written."""
    place = home / "state" / "rehearsal"
    files = [*place.glob("*/self/*"), *place.glob("*/wordings.json")]
    return {file.name: file.stat().st_mtime_ns for file in files}


def marks(home):
    """Of asking that is under way, or was broken off."""
    return list(home.glob("state/rehearsal/*/asking"))


def weights(service, checkpoint):
    return (service.folder(checkpoint) / "adapters.safetensors").read_bytes()


def test_what_every_update_needs_is_there_before_the_first(tmp_path):
    """The update asks none of it again, and becomes what it would have become; `/info` tells when all is asked."""
    with running(tmp_path / "ahead", SMALL) as service:
        until(lambda: not service.info()["engine"]["asking_ahead"], "the base asked")
        before = kept(tmp_path / "ahead")
        assert {"rehearsal.json", "rehearsal.safetensors", "wordings.json"} <= before.keys()
        ahead = weights(service, service.learn(FACTS[0]))
        assert kept(tmp_path / "ahead") == before
    with running(tmp_path / "then", SMALL, rehearsal__ask_ahead=False) as service:
        assert not asking(service)
        assert not kept(tmp_path / "then")
        assert weights(service, service.learn(FACTS[0])) == ahead
        assert kept(tmp_path / "then").keys() == before.keys()
    with running(tmp_path / "ahead", SMALL) as service:  # all is on disk: nothing is written again
        until(lambda: not asking(service), "the base asked")
        assert kept(tmp_path / "ahead") == before


def test_an_update_that_comes_meanwhile_waits_for_it_and_is_learnt(tmp_path, monkeypatch):
    """What has been asked by then is not asked again for it."""
    drawn, say = [], asked.say_anything
    monkeypatch.setattr(
        asked, "say_anything", lambda *args, **named: drawn.append(named["count"]) or say(*args, **named)
    )
    with running(tmp_path, SMALL, rehearsal__samples=150) as service:
        job = service.post(FACTS[0])
        until(lambda: service.job(job).state == "training", "training")
        assert asking(service)
        service.wait(job, "published")
        assert not asking(service)
    assert drawn == [150]


def test_what_cannot_be_learnt_is_refused_without_waiting_for_it(tmp_path, unlimited):
    """Whether the batch fits into memory is looked at before the base would be asked for it."""
    flags = {**ENDLESS, "training.max_seq_length": 512, "memory.limit_gb": 0.05}
    with running(tmp_path, flags, training__batch_size=64) as service:
        facts = [(f"{question} {'x ' * 200}", answer) for question, answer in FACTS[:40]]
        job = service.wait(service.post(*facts), "failed")
        assert "needs about" in job.error["message"]
        assert asking(service)


def test_requests_measuring_and_a_cancelled_update_do_not_wait_for_it(tmp_path):
    """Searches come first, `eval` does too, and an update that nobody wants any more ends at once."""
    flags = {**ENDLESS, "evaluation.anchor_provider": None, "evaluation.anchor_sample": 2}
    with running(tmp_path, flags) as service:
        until(lambda: asking(service), "asking")
        turns = []

        def counted(engine):
            ask, draw = engine._ahead.slice, engine._decoder.step
            engine._ahead.slice = lambda seconds: turns.append("ask") or ask(seconds)
            engine._decoder.step = lambda **how: turns.append("draw") or draw(**how)

        service.engine(counted)
        service.ask(FACTS[0][0], max_tokens=12)
        first, last = turns.index("draw"), len(turns) - turns[::-1].index("draw")
        assert set(turns[first:last]) == {"draw"}
        found = service.call(service.service.evaluate(["base"], None, {}))
        assert len(found["results"]) == 1
        job = service.post(FACTS[0])
        until(lambda: service.job(job).state == "training", "training")
        service.call(service.service.cancel(job))
        service.wait(job, "cancelled")
        assert asking(service)
    assert not kept(tmp_path)  # stopped in the middle: nothing half drawn is there
    assert not marks(tmp_path)


def test_a_process_that_ends_while_it_asks_does_not_try_again_at_every_start(tmp_path, start):
    """The next one answers, and leaves it to the update that needs it, whose attempts are counted."""
    settings = {**ENDLESS, "server.log_level": "warning"}
    process = start(**settings).ready()
    until(lambda: marks(process.home), "asking")
    process.kill()
    flags = {**SMALL, "rehearsal.samples": 16}
    with running(process.home, flags) as service:
        assert not asking(service)
        assert service.ask(FACTS[0][0]).text
        service.learn(FACTS[0])
        assert "wordings.json" in kept(process.home)
        assert not marks(process.home)


def test_where_nothing_can_be_kept_nothing_is_asked_ahead(tmp_path):
    """It would be asked once more by each update."""
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "rehearsal").write_text("no folder")
    with running(tmp_path, SMALL) as service:
        assert not asking(service)
        service.learn(FACTS[0])


def test_nothing_is_asked_where_no_switch_needs_it(tmp_path):
    with running(tmp_path, QUICK, replay__fraction=0.5) as service:
        assert not asking(service)
        assert not (tmp_path / "state" / "rehearsal").exists()


def test_a_fault_while_asking_ahead_costs_no_more_than_that(tmp_path, monkeypatch):
    """It is logged; searches are answered, and the update asks for itself."""
    samples, failed = Asked.samples, []

    def broken(self, settings, out):
        if not failed:
            failed.append(True)
            raise RuntimeError("no memory")
        yield from samples(self, settings, out)

    monkeypatch.setattr(Asked, "samples", broken)
    with running(tmp_path, SMALL) as service:
        until(lambda: not asking(service), "given up")
        assert failed
        assert not marks(tmp_path)
        assert service.ask(FACTS[0][0]).text
        service.learn(FACTS[0])
        assert "wordings.json" in kept(tmp_path)


def test_measuring_without_a_service_asks_nothing(tmp_path):
    (tmp_path / "data" / "anchors").mkdir(parents=True)
    (tmp_path / "data" / "anchors" / "mine.jsonl").write_text(json.dumps({"text": "Rain fell all day."}) + "\n")
    loaded = load_config(home=tmp_path, flags={**SMALL, "evaluation.anchor_provider": "local"}, environ={})
    found = offline.evaluate(loaded, ["base"], None, None, {})
    assert len(found["results"]) == 1
    assert not (tmp_path / "state" / "rehearsal").exists()  # not even a mark that asking has begun
