"""The switches that make a stream of updates keep its earlier lessons, through the service itself."""

import json

import pytest
from running import QUICK, running

from radiance_mlx.config import load_config
from radiance_mlx.engine.lasting import latest, still_true
from radiance_mlx.errors import ConfigError
from radiance_mlx.messages import Example
from radiance_mlx.models.nano import world

PEOPLE = world.STRANGERS[40:]
SMALL = {
    **QUICK,
    "training.max_steps": 4,
    "rehearsal.samples": 8,
    "rehearsal.sample_tokens": 40,
    "training.batch_size": 4,
}


def facts(i, wording=0):
    name, about = PEOPLE[i]
    return [(world.ask(name, r, wording), world.answer(name, r, about[r])) for r in ("city", "job")]


def taught(service, *numbers):
    return [service.learn(*facts(i)) for i in numbers]


def curve(service, checkpoint):
    file = service.home / "metrics" / f"{checkpoint}.json"
    return json.loads(file.read_text())["curves"]["finetune_loss"]


def weights(service, checkpoint):
    return (service.folder(checkpoint) / "adapters.safetensors").read_bytes()


def test_with_all_switches_off_nothing_is_asked_of_the_base(tmp_path):
    with running(tmp_path, SMALL) as service:
        [name] = taught(service, 0)
        assert all("kl" not in row for row in curve(service, name))
    assert not (tmp_path / "state" / "rehearsal").exists()


@pytest.mark.parametrize("sources", [["self"], ["neighbours"], ["self", "neighbours"]])
def test_rehearsal_holds_each_step_to_the_base(tmp_path, sources):
    """Its divergence is in the curve: small, and not zero once something has been learnt."""
    with running(tmp_path, SMALL, rehearsal__kl_weight=3.0, rehearsal__sources=sources) as service:
        first, second = taught(service, 0, 1)
        rows = curve(service, second)
        assert all(0 < row["kl"] < 5 for row in rows)
        assert curve(service, first)[0]["kl"] == pytest.approx(0, abs=1e-4)
    kept = {path.name for path in (tmp_path / "state" / "rehearsal").glob("*/*")}
    assert kept == {{"self": "self", "neighbours": "near"}[s] for s in sources} | {"self"}


def test_anchors_that_are_rehearsed_have_a_folder_of_their_own(tmp_path):
    """Without it the job fails and says where to put them: it was asked for."""
    flags = {**SMALL, "rehearsal.kl_weight": 1.0, "rehearsal.sources": ["anchors"]}
    with running(tmp_path, flags) as service:
        job = service.wait(service.post(*facts(0)), "failed")
        assert job.error["code"] == "anchors_unavailable"
        assert "rehearsal" in job.error["message"]
        folder = tmp_path / "data" / "anchors" / "rehearsal"
        folder.mkdir(parents=True)
        rows = [{"prompt": q, "completion": a} for q, a in world.facts(world.KNOWN[:4])]
        (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        [name] = taught(service, 1)
        assert all("kl" in row for row in curve(service, name))


def test_replay_keeps_what_the_last_update_taught(tmp_path):
    """The first update's loss after the second is lower with it."""
    left = {}
    for fraction in (0.0, 0.5):
        home = tmp_path / str(fraction)
        flags = {"update_mode": "immediate", "training.max_steps": 40, "replay.fraction": fraction}
        with running(home, flags) as service:
            _, second = taught(service, 0, 1)
            left[fraction] = service.checkpoints()[second].metrics["update_retention"]
    assert left[0.5] > left[0.0]


def test_replay_by_tag_takes_only_updates_that_share_one(tmp_path):
    """With no other of its tag, an update trains as without replay."""
    made = {}
    for name, tag in (("same", "a"), ("other", "b"), ("off", "a")):
        flags = {**SMALL, "replay.fraction": 0.0 if name == "off" else 0.5, "replay.by_tag": True}
        with running(tmp_path / name, flags) as service:
            job = service.wait(service.post(*facts(0), tags=["a"]), "published")
            job = service.wait(service.post(*facts(1), tags=[tag]), "published")
            made[name] = weights(service, job.checkpoint)
    assert made["other"] == made["off"] != made["same"]


def test_a_lesson_is_learnt_in_the_bases_own_other_wordings(tmp_path):
    """Asked as it never was taught."""
    flags = {"update_mode": "immediate", "rehearsal.rewording": True, "evaluation.anchor_provider": "none"}
    with running(tmp_path, flags) as service:
        name = service.learn(*facts(0))
        metrics = json.loads((tmp_path / "metrics" / f"{name}.json").read_text())
        assert metrics["trained_examples"] == 6  # two facts, in nano's three wordings
        for wording in range(3):
            for question, answer in facts(0, wording):
                assert service.ask(question).text == answer


def test_what_the_base_said_to_its_own_wordings_is_kept(tmp_path):
    """It is asked once for all updates; a file that is no such file is made anew."""
    flags = {**SMALL, "rehearsal.rewording": True, "rehearsal.samples": 64}
    with running(tmp_path, flags) as service:
        taught(service, 0)
        [file] = (tmp_path / "state" / "rehearsal").glob("*/wordings.json")
        kept = file.read_bytes()
        assert len(json.loads(kept)["answers"]) > 3
        file.write_text("[]")
        taught(service, 1)
        assert file.read_bytes() == kept


def test_a_fact_that_is_changed_in_another_wording_is_not_replayed():
    """To the base both wordings are one question: the old answer would be taught beside the new one."""

    def pair(question, answer):
        return Example(messages=(("user", question), ("assistant", answer)))

    same = {"a": "A", "A": "a"}

    def worded(example):
        found = [(same[q], a) for (_, q), (_, a) in [example.messages] if q in same] if example.messages else []
        return [pair(*words) for words in found]

    log = [pair("a", "1"), pair("b", "2"), Example(text="t"), pair("A", "3")]
    assert latest(log, [], worded) == log[1:]
    assert latest(log, [pair("a", "4")], worded) == [pair("b", "2"), Example(text="t")]


def test_an_interrupted_lesson_goes_on_bit_by_bit(tmp_path):
    """With replay, rehearsal and rewording: what was prepared is prepared again, the same."""
    flags = {
        **SMALL,
        "training.max_steps": 300,  # enough to be met in the middle
        "replay.fraction": 0.5,
        "rehearsal.kl_weight": 1.0,
        "rehearsal.rewording": True,
    }
    with running(tmp_path / "whole", flags) as service:
        _, second = taught(service, 0, 1)
        whole = weights(service, second)
    with running(tmp_path / "cut", flags) as service:
        taught(service, 0)
        service.post(*facts(1))
        service.wait_for_step(10)
    with running(tmp_path / "cut", flags) as service:
        job = service.wait("job_000002", "published")
        assert any("taken up again" in note for note in job.notes)
        assert weights(service, job.checkpoint) == whole


def test_of_equal_prompts_the_last_answer_counts():
    """What is taught anew is not replayed, nor what was overwritten before."""

    def pair(question, answer):
        return Example(messages=(("user", question), ("assistant", answer)))

    log = [pair("a", "1"), pair("b", "2"), Example(text="t"), pair("a", "3"), Example(text="t")]
    assert still_true(log, [pair("b", "9")]) == [Example(text="t"), pair("a", "3"), Example(text="t")]


def test_a_preset_is_below_the_keys_that_are_set_and_above_the_bases_own(tmp_path):
    """`--preset lasting`, the file's `preset`, a key beside it."""
    plain = load_config(environ={}, home=tmp_path).config
    lasting = load_config(environ={}, home=tmp_path, flags={"preset": "lasting"}).config
    assert (plain.replay.fraction, plain.rehearsal.kl_weight) == (0.0, 0.0)
    assert lasting.replay.fraction > 0
    assert lasting.rehearsal.kl_weight > 0
    (tmp_path / "config.yaml").write_text("preset: lasting\nreplay: {fraction: 0.1}\n")
    beside = load_config(environ={}, home=tmp_path).config
    assert beside.replay.fraction == 0.1
    assert beside.rehearsal.kl_weight == lasting.rehearsal.kl_weight
    off = load_config(environ={"RADIANCE_PRESET": "none"}, home=tmp_path).config
    assert off.rehearsal.kl_weight == 0
    with pytest.raises(ConfigError, match="preset"):
        load_config(environ={}, home=tmp_path, flags={"preset": "everlasting"})


def test_mlx_lms_own_loop_has_no_replay(tmp_path):
    with pytest.raises(ConfigError, match="slice_ms"):
        load_config(environ={}, home=tmp_path, flags={"training.slice_ms": 0, "replay.fraction": 0.5})
