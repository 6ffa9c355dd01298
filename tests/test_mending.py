"""What mends itself: restored files, folders left by a crash, homes that cannot be used."""

import pytest
from running import FACTS, QUICK, running

from radiance_mlx.errors import StoreError


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
