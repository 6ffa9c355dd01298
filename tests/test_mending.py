"""What mends itself: restored files, folders left by a crash, homes that cannot be used."""

import shutil

import pytest
from running import FACTS, QUICK, request, running

from radiance_mlx.errors import CheckpointDamaged, StoreError


def test_a_checkpoint_whose_files_are_restored_serves_again(tmp_path):
    """Damaged, an ancestor answers; with the file back, a rollback to it is possible and the mark is gone."""
    with running(tmp_path, QUICK) as service:
        first, second = service.learn(FACTS[0]), service.learn(FACTS[1])
    file = tmp_path / "adapters" / second / "adapters.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-8] + b"damaged!")
    with running(tmp_path, QUICK) as service:
        assert service.current == first
        assert second in service.info()["damaged"]
        file.write_bytes(whole)
        service.call(service.service.rollback(second, "the backup is back"))
        assert service.current == second
        assert service.info()["damaged"] == {}
        assert service.ask(FACTS[0][0]).checkpoint == second


def test_a_pruned_folder_that_a_crash_left_is_removed_at_the_next_start(tmp_path):
    """The row says pruned, the folder is still there: the start takes it away."""
    with running(tmp_path, QUICK) as service:
        names = [service.learn(fact) for fact in FACTS[:3]]
        service.store(lambda s: s.mark_pruned(names[:1]))
    assert (tmp_path / "adapters" / names[0]).is_dir()
    with running(tmp_path, QUICK) as service:
        assert service.current == names[2]
        assert not (tmp_path / "adapters" / names[0]).exists()


def test_a_home_that_cannot_be_made_is_a_clear_error(tmp_path):
    """A path below a file names itself in the error."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file"), running(tmp_path / "file" / "home", QUICK):
        pass


@pytest.mark.parametrize("gone", [False, True])
def test_an_update_never_trains_on_damaged_files(tmp_path, gone):
    """The stable checkpoint's file is altered, or removed, under the running service: the update is learnt from
    the newest sound ancestor, which serves from then on; /info names what was found."""
    with running(tmp_path, QUICK) as service:
        first, second = service.learn(FACTS[0]), service.learn(FACTS[1])
        file = tmp_path / "adapters" / second / "adapters.safetensors"
        if gone:
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:-8] + b"damaged!")
        third = service.learn(FACTS[2])
        assert service.checkpoints()[third].parent == first
        assert service.job("job_000003").attempts == 1
        assert list(service.info()["damaged"]) == [second]
        assert service.current == third


def test_a_damaged_optimizer_counts_too(tmp_path):
    """It is part of what the next update goes on from."""
    with running(tmp_path, QUICK) as service:
        first = service.learn(FACTS[0])
        (tmp_path / "adapters" / first / "optimizer.safetensors").write_bytes(b"nonsense")
        second = service.learn(FACTS[1])
        assert service.checkpoints()[second].parent is None
        assert list(service.info()["damaged"]) == [first]


@pytest.mark.parametrize("stream", [False, True])
def test_when_the_stable_checkpoint_cannot_be_read_its_ancestor_answers(tmp_path, stream):
    """The very request that finds it is answered; only who asks for the damaged one by name hears of it."""
    with running(tmp_path, QUICK, serving__adapter_slots=3) as service:
        names = [service.learn(fact) for fact in FACTS[:3]]
        shutil.rmtree(tmp_path / "adapters" / names[2])
        for name in names[:2]:  # the bank has room for two
            service.ask("Hello!", checkpoint=name)

        async def streamed():
            asked = request("Hello!", checkpoint="stable", stream=True)
            return [item async for item in service.service.stream(asked)][-1]

        answer = service.call(streamed()) if stream else service.ask("Hello!", checkpoint="stable")
        assert (answer.checkpoint, answer.checkpoint_status) == (names[1], "stable")
        assert service.current == names[1]
        with pytest.raises(CheckpointDamaged):
            service.ask("Hello!", checkpoint=names[2])
        assert service.ask("Hello!", checkpoint="stable").checkpoint == names[1]
