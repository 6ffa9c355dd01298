"""The service between two starts: what the next one finds, damage among it, and how the one before stopped."""

import asyncio
import shutil

import pytest
from running import ENDLESS, FACTS, QUICK, question, request, running

from radiance_mlx.config.bases import NANO_FOLDER
from radiance_mlx.errors import CheckpointDamaged, Conflict

# --- what is found at a start --------------------------------------------------------------------


def alter(folder):
    file = folder / "adapters.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "altered": alter,
    "gone": shutil.rmtree,
    "no optimizer": lambda folder: (folder / "optimizer.safetensors").unlink(),
    "no hashes": lambda folder: (folder / "checkpoint.json").write_text("{}"),
}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """A home with two checkpoints, at rest."""
    home = tmp_path_factory.mktemp("two")
    with running(home) as service:
        return home, service.learn(FACTS[0]), service.learn(FACTS[1])


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_stable_checkpoint_is_named_and_its_parent_serves(two_checkpoints, tmp_path, damage):
    source, a, b = two_checkpoints
    home = shutil.copytree(source, tmp_path / "home")
    DAMAGES[damage](home / "adapters" / b)
    with running(home) as service:
        answer = service.ask("Hello!")
        assert (answer.checkpoint, answer.checkpoint_status) == (a, "stable")
        info = service.info()
        assert list(info["damaged"]) == [b]
        assert [b in warning for warning in info["warnings"]] == [True]
        assert service.store(lambda s: s.stable(info["base_hash"])) == a
        assert "damaged" in [event["kind"] for event in service.store(lambda s: s.events())]
        with pytest.raises(CheckpointDamaged):
            service.ask("Hello!", checkpoint=b)
        with pytest.raises(CheckpointDamaged):
            service.call(service.service.rollback(b, ""))
        made = service.learn(FACTS[2])
        assert service.checkpoints()[made].parent == a


def test_an_ancestor_that_was_rolled_back_once_is_stable_again_when_it_serves(two_checkpoints, tmp_path):
    source, a, b = two_checkpoints
    home = shutil.copytree(source, tmp_path / "home")
    with running(home) as service:
        for place in ("base", b):
            service.call(service.service.rollback(place, ""))
    alter(home / "adapters" / b)
    with running(home) as service:
        answer = service.ask("Hello!")
        assert (answer.checkpoint, answer.checkpoint_status) == (a, "stable")


def test_when_every_checkpoint_is_damaged_the_base_serves(two_checkpoints, tmp_path):
    source, a, b = two_checkpoints
    home = shutil.copytree(source, tmp_path / "home")
    for name in (a, b):
        shutil.rmtree(home / "adapters" / name)
    with running(home) as service:
        assert service.ask("Hello!").checkpoint == "base"
        assert set(service.info()["damaged"]) == {a, b}


def test_damage_that_is_found_on_the_way_back_leaves_everything_as_it_was(two_checkpoints, tmp_path):
    source, a, b = two_checkpoints
    home = shutil.copytree(source, tmp_path / "home")
    with running(home) as service:
        alter(home / "adapters" / a)
        with pytest.raises(CheckpointDamaged):
            service.call(service.service.rollback(None, ""))
        assert service.current == b
        assert list(service.info()["damaged"]) == [a]


@pytest.mark.parametrize("stream", [False, True])
def test_damage_that_a_request_finds_is_remembered(two_checkpoints, tmp_path, stream):
    source, a, _ = two_checkpoints
    home = shutil.copytree(source, tmp_path / "home")
    with running(home) as service:
        alter(home / "adapters" / a)

        async def ask():
            asked = await service.service.address(request("Hello!", checkpoint=a, stream=stream))
            return [item async for item in service.service.stream(asked)]

        with pytest.raises(CheckpointDamaged) as caught:
            service.call(ask()) if stream else service.ask("Hello!", checkpoint=a)
        assert caught.value.message.count(a) == 1
        assert list(service.info()["damaged"]) == [a]
        with pytest.raises(CheckpointDamaged) as again:
            service.call(service.service.address(request("Hello!", checkpoint=a)))
        assert again.value.message == caught.value.message


def test_settings_without_effect_are_warned_of(tmp_path):
    with running(tmp_path, evaluation__rollback_mode="warn") as service:
        assert ["rollback_mode" in warning for warning in service.info()["warnings"]] == [True]


@pytest.mark.parametrize("change", [{"lora.r": 4}, {"lora.r": 16}, {"lora.target_modules": ["q_proj"]}])
def test_another_shape_of_adapters_starts_fresh_and_says_so(two_checkpoints, tmp_path, change):
    """The old checkpoint goes on answering as before until then."""
    source, _, b = two_checkpoints
    home = shutil.copytree(source, tmp_path / "home")
    with running(home) as service:
        before = service.ask(question(1)).text
    with running(home, {**QUICK, **change}) as service:
        answer = service.ask(question(1))
        assert (answer.text, answer.checkpoint) == (before, b)
        job = service.wait(service.post(FACTS[2]), "published")
        record = service.checkpoints()[job.checkpoint]
        assert record.parent == b
        for notes in (job.notes, record.notes):
            assert any("started fresh from the base" in note and "lora" in note for note in notes)


def test_another_base_on_the_same_home_has_a_lineage_of_its_own(two_checkpoints, tmp_path):
    """And the first one's is there again when it comes back."""
    import mlx.core as mx

    source, a, b = two_checkpoints
    home = shutil.copytree(source, tmp_path / "home")
    other = shutil.copytree(NANO_FOLDER, tmp_path / "other", ignore=shutil.ignore_patterns("__pycache__"))
    weights = mx.load(str(other / "model.safetensors"))
    name = next(name for name in weights if name.endswith("norm.weight"))
    mx.save_safetensors(str(other / "model.safetensors"), {**weights, name: weights[name] * 1.01})
    with running(home, base_model=str(other)) as service:
        assert (service.current, service.checkpoints()) == ("base", {})
        assert any("another base model" in warning for warning in service.info()["warnings"])
        for name in (a, b):
            with pytest.raises(Conflict, match="another base"):
                service.ask("Hello!", checkpoint=name)
            with pytest.raises(Conflict, match="another base"):
                service.call(service.service.rollback(name, ""))
        own = service.learn(FACTS[0])
        assert own not in (a, b)
        assert service.checkpoints()[own].parent is None
    with running(home) as service:
        assert service.current == b
        assert list(service.checkpoints()) == [a, b]


# --- stopping ------------------------------------------------------------------------------------


def stop_after_update(engine):
    """End the engine's work at the first look between two pieces after an optimizer's update."""
    task = engine._task
    before = int(task._trainer.optimizer.step.item())
    while int(task._trainer.optimizer.step.item()) == before:
        task.slice(0.0)
    engine.stop()


def test_stopping_in_the_middle_of_training_and_going_on_gives_the_same_adapter(tmp_path):
    """Wherever it is stopped, right after an update too: not a bit differs, and no attempt is counted."""
    steps = {**QUICK, "training.max_steps": 80}
    with running(tmp_path / "whole", steps) as service:
        whole = service.learn(FACTS[0], FACTS[1], FACTS[2])
    with running(tmp_path / "cut", steps) as service:
        job = service.post(FACTS[0], FACTS[1], FACTS[2])
        service.wait_for_step(2)
    for step in (5, 10):
        with running(tmp_path / "cut", steps) as service:
            service.wait_for_step(step)
            assert service.job(job).attempts == 1
            service.engine(stop_after_update)
    with running(tmp_path / "cut", steps) as service:
        ended = service.wait(job, "published")
        assert any("taken up again at step" in note for note in ended.notes)
        assert ended.attempts == 1
    adapters = [tmp_path / kind / "adapters" / name for kind, name in (("whole", whole), ("cut", ended.checkpoint))]
    assert len({(folder / "adapters.safetensors").read_bytes() for folder in adapters}) == 1


def test_stopping_while_mlx_lm_trains_the_whole_step_by_itself_ends_after_a_step(tmp_path):
    """`training.slice_ms: 0` answers nobody meanwhile, but it stops."""
    with running(tmp_path, ENDLESS, training__slice_ms=0) as service:
        job = service.post(FACTS[0])
        service.wait_for_step(2)
    with running(tmp_path) as service:
        assert service.wait(job, "published").attempts == 1


def test_a_service_that_stops_refuses_new_work_and_lets_go_of_its_home(tmp_path):
    with running(tmp_path) as service:
        pass
    with pytest.raises(Exception, match="stopping"):
        asyncio.run(service.service.search(request("Hello!")))
    with running(tmp_path) as again:
        assert again.ask("Hello!").text
