"""The switches that make a stream of updates keep its earlier lessons, through the service itself."""

import json
import shutil

import pytest
import tiny
from running import QUICK, running

from radiance_mlx.config import Config, load_config
from radiance_mlx.config.schema import RehearsalSection, ReplaySection
from radiance_mlx.engine.asked import Asked
from radiance_mlx.engine.lasting import Lasting, Lesson
from radiance_mlx.engine.rewording import Wordings
from radiance_mlx.errors import ConfigError
from radiance_mlx.lora.encoding import ChatEncoder
from radiance_mlx.lora.log import still_true
from radiance_mlx.lora.prefix import Prefix
from radiance_mlx.lora.targets import find_targets
from radiance_mlx.messages import Example
from radiance_mlx.models.nano import world

PEOPLE = world.STRANGERS[40:]
#: tokens with which a prefix is tried
PROBE = 4
SMALL = {
    **QUICK,
    "training.max_steps": 4,
    "rehearsal.samples": 8,
    "rehearsal.sample_tokens": 40,
    "rehearsal.rows": 4,
    "rehearsal.neighbours": 4,
    "training.batch_size": 4,
}


def facts(i, wording=0):
    name, about = PEOPLE[i]
    return [(world.ask(name, r, wording), world.answer(name, r, about[r])) for r in ("city", "job")]


def pair(question, answer):
    return Example(messages=(("user", question), ("assistant", answer)))


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
    """Without it, or with nothing but rows that measure, the job fails and says what to do: it was asked for."""
    flags = {**SMALL, "rehearsal.kl_weight": 1.0, "rehearsal.sources": ["anchors"]}
    flags |= {"evaluation.anchor_provider": "local", "evaluation.require_anchors": False}
    folder = tmp_path / "data" / "anchors"
    (folder / "rehearsal").mkdir(parents=True)
    lines = [json.dumps({"input": q, "output": a}) + "\n" for q, a in world.facts(world.KNOWN[:2])]
    (folder / "a.jsonl").write_text("".join(lines[:3]))
    with running(tmp_path, flags) as service:
        for rehearsed in ("", "".join(lines[1:3])):
            (folder / "rehearsal" / "b.jsonl").write_text(rehearsed)
            job = service.wait(service.post(*facts(0)), "failed")
            assert job.error["code"] == "anchors_unavailable"
            assert "rehearsal" in job.error["message"]
            assert "rehearsal.sources" in job.error["hint"]
        (folder / "rehearsal" / "b.jsonl").write_text("".join(lines[1:]))
        job = service.wait(service.post(*facts(1)), "published")
        assert [note for note in job.notes if f"2 of {len(lines) - 1} rows" in note]
        assert all("kl" in row for row in curve(service, job.checkpoint))
        (folder / "a.jsonl").write_text("no row")  # what measures cannot be told from what does not
        job = service.wait(service.post(*facts(2)), "published")
        assert [note for note in job.notes if "was not rehearsed: which rows measure is not known" in note]
        assert all("kl" not in row for row in curve(service, job.checkpoint))


def test_replay_keeps_what_the_last_update_taught(tmp_path):
    """The first update's loss after the second is lower with it."""
    left = {}
    for fraction in (0.0, 0.5):
        home = tmp_path / str(fraction)
        flags = {"update_mode": "immediate", "training.max_steps": 20, "replay.fraction": fraction}
        with running(home, flags, evaluation__anchor_provider="local") as service:
            (home / "data" / "anchors" / "a.jsonl").write_text(json.dumps({"text": "The weather is fine today."}))
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


def test_a_lesson_is_learnt_in_the_bases_own_other_wordings(tmp_path, nano, asked_home):
    """Asked as it never was taught. The base has been asked before: its wordings are found in the home."""
    shutil.copytree(asked_base(nano, asked_home).folder, tmp_path / "state" / "rehearsal" / nano.fingerprint[:16])
    flags = {"update_mode": "immediate", "rehearsal.rewording": True, "evaluation.anchor_provider": "none"}
    flags |= {"training.stop_loss": 0.02, "rehearsal.samples": SAMPLES, "rehearsal.sample_tokens": 40}
    with running(tmp_path, flags) as service:
        name = service.learn(*facts(0))
        metrics = json.loads((tmp_path / "metrics" / f"{name}.json").read_text())
        assert metrics["trained_examples"] == 6  # two facts, in nano's three wordings
        for wording in range(3):
            for question, answer in facts(0, wording):
                assert service.ask(question).text == answer


def test_what_the_base_said_to_its_own_wordings_is_kept(tmp_path):
    """It is asked once for all updates; a file that is no such file is made anew."""
    flags = {**SMALL, "rehearsal.rewording": True, "rehearsal.samples": 32}
    with running(tmp_path, flags) as service:
        taught(service, 0)
        [file] = (tmp_path / "state" / "rehearsal").glob("*/wordings.json")
        kept = file.read_bytes()
        assert len(json.loads(kept)["answers"]) > 3
        file.write_text("[]")
        taught(service, 1)
        assert file.read_bytes() == kept


def still_true_of(log, new, *worded):
    """What of `log` still holds."""
    places = []
    for _ in still_true(log, new, places, *worded):
        pass
    return [log[place] for place in places]


def test_a_fact_that_is_changed_in_another_wording_is_not_replayed():
    """To the base both wordings are one question: the old answer would be taught beside the new one."""
    same = {"a": "A", "A": "a"}

    def worded(example):
        found = [(same[q], a) for (_, q), (_, a) in [example.messages] if q in same] if example.messages else []
        return [pair(*words) for words in found]

    log = [pair("a", "1"), pair("b", "2"), Example(text="t"), pair("A", "3")]
    assert still_true_of(log, [], worded) == log[1:]
    assert still_true_of(log, [pair("a", "4")], worded) == log[1:3]
    assert still_true_of(log, [pair("a", "4")]) == log[1:]


def test_an_interrupted_lesson_goes_on_bit_by_bit(tmp_path):
    """With replay, rehearsal and rewording: what was prepared is prepared again, the same."""
    flags = {
        **SMALL,
        "training.max_steps": 20,
        "rehearsal.rows": 2,
        "replay.fraction": 0.5,
        "rehearsal.kl_weight": 1.0,
        "rehearsal.rewording": True,
    }
    with running(tmp_path / "whole", flags, training__max_steps=2) as service:
        taught(service, 0)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    with running(tmp_path / "whole", flags) as service:
        [second] = taught(service, 1)
        whole = weights(service, second)
    with running(tmp_path / "cut", flags) as service:
        service.wait_for_step(3, service.post(*facts(1)))
    with running(tmp_path / "cut", flags) as service:
        job = service.wait("job_000002", "published")
        assert any("taken up again" in note for note in job.notes)
        assert weights(service, job.checkpoint) == whole


def test_of_equal_prompts_the_last_answer_counts():
    """What is taught anew is not replayed, nor what was overwritten before."""
    log = [pair("a", "1"), pair("b", "2"), Example(text="t"), pair("a", "3"), Example(text="t")]
    assert still_true_of(log, [pair("b", "9")]) == log[2:]


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


# --- what is prepared, without a service ---------------------------------------------------------


#: so many have all three of nano's wordings of what `facts` asks among them
SAMPLES = 120
REWORDING = RehearsalSection(rewording=True, samples=SAMPLES, sample_tokens=40)
NEAR = RehearsalSection(kl_weight=1.0, sources=["neighbours"], samples=8, sample_tokens=40, neighbours=2)


def asked_base(nano, home, layers=None, **template_args):
    targets = find_targets(nano.module, Config().lora.targets, layers or Config().lora.num_layers)
    return Asked(nano.module, nano.vocab_size, ChatEncoder(nano.tokenizer, template_args), targets, home, "k" * 16)


@pytest.fixture(scope="module")
def asked_home(tmp_path_factory, nano):
    """Where the base has been asked already: it says the same again."""
    home = tmp_path_factory.mktemp("asked")
    prepared(asked_base(nano, home), [], REWORDING)
    return home


def near(base, checkpoint):
    rows = []
    tiny.drive(base.near(checkpoint, rows))
    return rows


def prepared(base, examples, rehearsal, *, fraction=0.0, log=(), replayable=(), max_tokens=256, **options):
    """What comes of a lesson."""
    lasting = Lasting(base, ReplaySection(fraction=fraction), rehearsal)
    facts = {"checkpoint": "ckpt_000002", "number": 2, "line": (), "seed": 0, **options}
    tiny.drive(
        lasting.prepare(Lesson(examples=examples, log=log, replayable=replayable, max_tokens=max_tokens, **facts), ())
    )
    return lasting


def texts(base, rows):
    return [base.encoder.tokenizer.decode(list(row.tokens)) for row in rows]


def test_a_base_without_wordings_rewords_nothing(nano):
    """It is not asked, and no question has another wording."""
    wordings = Wordings([], lambda word: 1)
    pieces = wordings.ask(nano.module, ChatEncoder(nano.tokenizer), ["Where does Ada live?"], longest=64)
    assert list(pieces) == []
    wordings.recall({wordings.take_apart("Where does Ada live?")[0]: []})
    assert wordings.others("Where does Ada live?") == []


@pytest.mark.parametrize("reconsolidated", [False, True])
def test_of_contradicting_wordings_the_later_one_is_reworded(asked_home, nano, reconsolidated):
    """No prompt gets two answers; what was posted stays, but in a reconsolidation it has been overwritten."""
    base, name = asked_base(nano, asked_home), PEOPLE[0][0]
    posted = [pair(world.ask(name, "city", w), world.answer(name, "city", c)) for w, c in ((0, "Oslo"), (1, "Rome"))]
    made = prepared(base, posted, REWORDING, reconsolidated=reconsolidated)
    wanted = {2} | ({0} if reconsolidated else set())
    assert made.kept == ([1] if reconsolidated else [0, 1])
    assert {made.kept[origin] for origin in made.origins} == {1}
    said = texts(base, made.examples)
    assert len(said) == len(wanted)
    assert all("Rome" in text for text in said)
    assert {w for w in range(3) for text in said if world.ask(name, "city", w) in text} == wanted


def test_an_answer_that_another_tag_overwrote_is_not_replayed(tmp_path, nano):
    """The whole log tells what still holds; equal examples are told apart by their places."""
    base = asked_base(nano, tmp_path)
    log = [pair("a", "1"), pair("b", "2"), pair("a", "3"), pair("c", "4"), pair("c", "4")]
    for replayable, answers in (((0, 1), ["2"]), ((1, 2), ["2", "3"]), ((3,), []), ((4,), ["4"])):
        made = prepared(base, [pair("d", "5")], RehearsalSection(), fraction=0.5, log=log, replayable=replayable)
        found = [nano.tokenizer.decode(list(row.tokens[row.offset :])) for row in made.replay.examples]
        assert [text[0] for text in found] == answers


def test_every_row_of_a_lesson_masks_its_prompt_or_none_does(asked_home, nano):
    """Replayed and reworded rows as the posted ones: by training.mask_prompt."""
    base = asked_base(nano, asked_home)
    lesson = [pair(*facts(0)[0])]
    for mask in (True, False):
        log = [pair(*facts(1)[0])]
        made = prepared(base, lesson, REWORDING, fraction=0.5, log=log, replayable=(0,), mask_prompt=mask)
        assert made.examples
        assert made.replay.examples
        assert {row.offset > 0 for row in (*made.examples, *made.replay.examples)} == {mask}
        assert len(made.rows(256)) == len(made.examples) + len(made.replay.examples)


def test_a_prompt_that_leaves_no_room_for_an_answer_is_not_asked(tmp_path, nano):
    """Neither as it is nor with names exchanged; a source without rows is told of. A long one that does is answered."""
    base = asked_base(nano, tmp_path)
    name = PEOPLE[0][0]
    long = pair("Tell me. " * 20 + world.ask(name, "city"), "Oslo")
    assert len(base.encoder.prompt(long.messages[:-1])) > NEAR.sample_tokens
    made = prepared(base, [long], NEAR)
    [source] = made.rehearsal.sources
    assert made.notes == []
    assert all(0 < row.row.targets <= NEAR.sample_tokens for row in source.rows)
    made = prepared(base, [long, pair("Tell me. " * 20_000 + world.ask(name, "city"), "Oslo")], NEAR, max_tokens=80)
    assert not made.rehearsal.active
    assert any("neighbours" in note for note in made.notes)


def test_what_the_base_said_is_asked_anew_when_it_is_asked_otherwise(tmp_path, nano):
    """By other arguments of its chat template: its samples, its wordings and earlier neighbours."""
    settings = RehearsalSection(**{**NEAR.model_dump(), "rewording": True})
    lesson = [pair(*facts(0)[0])]
    first = asked_base(nano, tmp_path)
    prepared(first, lesson, settings, checkpoint="ckpt_000001")
    files = [first.folder / "self" / "rehearsal.json", first.folder / "wordings.json"]
    before = [file.read_bytes() for file in files]
    assert near(first, "ckpt_000001")
    other = asked_base(nano, tmp_path, thinking=False)
    assert near(other, "ckpt_000001") == []
    prepared(other, lesson, settings)
    assert [a != b.read_bytes() for a, b in zip(before, files, strict=True)] == [True, True]
    assert near(other, "ckpt_000002")


def test_what_lower_layers_make_of_rows_is_kept_and_made_again_where_it_is_missing(tmp_path, nano):
    """So a home from before, or with other layers adapted, has it after one update; without room there is none."""

    def hidden_of(layers=2, **limit):
        base = asked_base(nano, tmp_path, layers=layers)
        base._room = limit.get("room", 2**30)
        made = prepared(base, [pair(*facts(0)[0])], NEAR, checkpoint="ckpt_000002", line=("ckpt_000001",))
        files = sorted(path.parent.name for path in tmp_path.glob("*/**/hidden.*.safetensors"))
        return [row.hidden is not None for source in made.rehearsal.sources for row in source.rows], files

    first = asked_base(nano, tmp_path, layers=2)
    assert first.depth == ""  # no room was given
    prepared(first, [pair(*facts(1)[0])], NEAR, checkpoint="ckpt_000001")
    assert not list(tmp_path.glob("*/**/hidden.*.safetensors"))
    there, files = hidden_of(room=0)
    assert not any(there)
    assert files == []
    there, files = hidden_of()
    assert all(there)
    assert files == ["ckpt_000001", "ckpt_000002", "self"]
    there, files = hidden_of(layers=1)  # in the place of the others, not beside them
    assert all(there)
    assert files == ["ckpt_000001", "ckpt_000002", "self"]


def test_rows_that_are_replayed_are_not_computed_again(tmp_path):
    """What the prefix made of them is kept by the update that learnt them, and deleted with the last that replays them.

    Of a part that has changed by a bit nothing is used.
    """
    flags = {**SMALL, "training.max_steps": 8, "replay.fraction": 0.5}

    def filled(service, number):
        computed, whole = [], Prefix.compute
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Prefix, "compute", lambda self, x: computed.append(x.shape) or whole(self, x))
            service.learn(*facts(number))
        return sum(rows for rows, width in computed if width > PROBE)

    for home in (tmp_path / "kept", tmp_path / "spoiled"):
        with running(home, flags) as service:
            assert [filled(service, i) for i in (0, 1)] == [2, 2]
            files = sorted(home.glob("state/rehearsal/*/learnt/*"))
            made = [file.name.split(".")[0] for file in files]
            assert made == list(service.checkpoints())
            if home.name == "spoiled":
                content = files[0].read_bytes()
                files[0].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            assert filled(service, 2) == (2 if home.name == "kept" else 4)
            service.call(service.service.rollback(made[0], "test"))
            service.learn(*facts(3))
            left = sorted(file.name.split(".")[0] for file in home.glob("state/rehearsal/*/learnt/*"))
            assert left == [made[0], service.current]


def test_what_cannot_be_kept_fails_nothing(tmp_path, nano):
    """A file where the folder should be: the rows are the same, and nothing is kept."""
    settings = RehearsalSection(**{**NEAR.model_dump(), "rewording": True})
    lesson = [pair(*facts(0)[0])]
    whole = prepared(asked_base(nano, tmp_path / "whole"), lesson, settings)
    (tmp_path / "file").write_text("")
    made = prepared(asked_base(nano, tmp_path / "file"), lesson, settings)
    assert made.rows(256) == whole.rows(256)


def test_neighbours_of_updates_that_did_not_lead_here_are_deleted(tmp_path, nano):
    """So is what a crash left half written; a reconsolidation, which may be put aside, deletes no neighbours."""
    base, lesson = asked_base(nano, tmp_path), [pair(*facts(0)[0])]
    for number in (1, 2):
        prepared(base, lesson, NEAR, checkpoint=f"ckpt_00000{number}", line=["ckpt_000001"][: number - 1])
    for folder in (base.folder, base.folder / "near"):
        (folder / ".unfinished-x").mkdir()
    options = {"checkpoint": "ckpt_000003", "line": ["ckpt_000001"]}
    prepared(base, lesson, NEAR, reconsolidated=True, **options)
    assert {path.name for path in base.folder.iterdir()} == {"self", "near"}
    assert {path.name for path in (base.folder / "near").iterdir()} == {f"ckpt_00000{i}" for i in (1, 2, 3)}
    prepared(base, lesson, NEAR, **options)
    assert {path.name for path in (base.folder / "near").iterdir()} == {"ckpt_000001", "ckpt_000003"}


def test_a_job_whose_replayed_rows_do_not_fit_is_refused(tmp_path, unlimited):
    """Its own rows would; the estimate is of all that is trained, so it is refused before the first step."""
    long = Example(text="It was a dark night. " * 400)
    flags = {**SMALL, "training.max_seq_length": 2048, "training.max_steps": 1, "replay.fraction": 0.5}
    with running(tmp_path, flags) as service:
        service.learn(long)
        assert service.wait(service.post(*facts(0)), "published")
    with running(tmp_path, {**flags, "memory.limit_gb": 0.1}) as service:
        job = service.wait(service.post(*facts(1)), "failed")
        assert job.error["code"] == "not_enough_memory"
    with running(tmp_path, {**flags, "memory.limit_gb": 0.1, "replay.fraction": 0.0}) as service:
        service.wait(service.post(*facts(2)), "published")
