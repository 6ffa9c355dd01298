"""Checkpoint folders: whole or not there; what may be removed when their number is bounded."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radiance_mlx.checkpoints import folder as folders
from radiance_mlx.checkpoints.retention import removable
from radiance_mlx.errors import CheckpointDamaged

NAME = "A_2026-01-01_0001"


@pytest.fixture
def written(tmp_path):
    """An unfinished folder with two files."""
    folder = folders.unfinished(tmp_path, NAME)
    (folder / "adapters.safetensors").write_bytes(b"weights")
    (folder / "adapter_config.json").write_text("{}")
    return folder


def test_a_committed_folder_tells_its_facts_and_the_hash_of_each_other_file(tmp_path, written):
    files = folders.commit(written, tmp_path / NAME, {"parent": None, "jobs": ["job_000001"]})
    document = folders.read(tmp_path / NAME)
    assert document == {"parent": None, "jobs": ["job_000001"], "files": files}
    assert set(files) == {"adapters.safetensors", "adapter_config.json"}
    folders.verify(tmp_path / NAME, files)
    assert [p.name for p in tmp_path.iterdir()] == [NAME]


def test_committing_again_replaces_the_folder_whole(tmp_path, written):
    folders.commit(written, tmp_path / NAME, {"turn": 1})
    again = folders.unfinished(tmp_path, NAME)
    (again / "other").write_bytes(b"2")
    folders.commit(again, tmp_path / NAME, {"turn": 2})
    assert sorted(p.name for p in (tmp_path / NAME).iterdir()) == ["checkpoint.json", "other"]
    assert [p.name for p in tmp_path.iterdir()] == [NAME]


def test_an_unfinished_folder_starts_empty_whatever_a_crash_left_there(tmp_path, written):
    assert list(folders.unfinished(tmp_path, NAME).iterdir()) == []


@pytest.mark.parametrize("dies_at", [1, 2, 3])
def test_a_crash_at_any_rename_leaves_the_old_folder_or_the_new_one_after_clearing_up(
    tmp_path, written, monkeypatch, dies_at
):
    """`remove_unfinished` at the next start puts back what had been moved out of the way."""
    folders.commit(written, tmp_path / NAME, {"turn": 1})
    again = folders.unfinished(tmp_path, NAME)
    (again / "adapters.safetensors").write_bytes(b"new")
    count = 0
    rename = os.rename

    def dies(*paths):
        nonlocal count
        count += 1
        if count == dies_at:
            raise KeyboardInterrupt
        rename(*paths)

    monkeypatch.setattr(os, "rename", dies)
    try:
        folders.commit(again, tmp_path / NAME, {"turn": 2})
        completed = True
    except KeyboardInterrupt:
        completed = False
    monkeypatch.undo()
    folders.remove_unfinished(tmp_path)
    document = folders.read(tmp_path / NAME)
    assert document["turn"] == (2 if completed else 1)
    folders.verify(tmp_path / NAME, document["files"])
    assert [p.name for p in tmp_path.iterdir()] == [NAME]


def test_nothing_unsynced_is_renamed_into_place(tmp_path, written, monkeypatch):
    """Every file, then the folder, then the rename, then the folder above."""
    events = []
    monkeypatch.setattr(folders, "sync_file", lambda path: events.append(("file", path.name)))
    monkeypatch.setattr(folders, "sync_folder", lambda path: events.append(("folder", path.name)))
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda *paths: (events.append(("rename", NAME)), rename(*paths)))
    folders.commit(written, tmp_path / NAME, {})
    assert sorted(events[:3]) == [
        ("file", "adapter_config.json"),
        ("file", "adapters.safetensors"),
        ("file", "checkpoint.json"),
    ]
    assert events[3:] == [("folder", written.name), ("rename", NAME), ("folder", tmp_path.name)]


def test_a_missing_or_altered_file_is_named(tmp_path, written):
    final = tmp_path / NAME
    files = folders.commit(written, final, {})
    (final / "adapters.safetensors").write_bytes(b"w3ights")
    with pytest.raises(CheckpointDamaged, match=r"adapters\.safetensors differs"):
        folders.verify(final, files)
    (final / "adapters.safetensors").unlink()
    with pytest.raises(CheckpointDamaged, match=r"adapters\.safetensors is missing"):
        folders.verify(final, files)


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{", b"\xff", b"{}", b'{"files": []}'])
def test_a_checkpoint_json_that_cannot_be_used_is_damage(tmp_path, content):
    (tmp_path / NAME).mkdir()
    if content is not None:
        (tmp_path / NAME / "checkpoint.json").write_bytes(content)
    with pytest.raises(CheckpointDamaged):
        folders.read(tmp_path / NAME)


def test_facts_survive_as_they_are(tmp_path, written):
    facts = {"notes": ["Zoë – “übung”"], "metrics": {"finetune_loss": 0.1 + 0.2}}
    folders.commit(written, tmp_path / NAME, facts)
    assert json.loads((tmp_path / NAME / "checkpoint.json").read_text("utf-8"))["notes"] == facts["notes"]
    assert folders.read(tmp_path / NAME)["metrics"] == facts["metrics"]


def test_removing_unfinished_folders_leaves_checkpoints_alone(tmp_path, written):
    (tmp_path / NAME).mkdir()
    folders.remove_unfinished(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [NAME]
    folders.remove_unfinished(tmp_path / "nowhere")


# --- retention -----------------------------------------------------------------------------------


def test_zero_keeps_everything():
    assert removable(["a", "b", "c"], ["c", "b", "a"], 0) == []


def test_the_oldest_go_first():
    assert removable(["a", "b", "c", "d"], ["d", "c", "b", "a"], 3) == ["a"]


def test_what_is_off_the_lineage_goes_before_any_ancestor():
    assert removable(["a", "b", "off", "c"], ["c", "b", "a"], 3) == ["off"]
    assert removable(["a", "off", "b", "c"], ["c", "b", "a"], 2) == ["off", "a"]


def test_the_stable_checkpoint_and_its_parent_stay_however_few_are_to_be_kept():
    assert removable(["a", "b", "c"], ["c", "b", "a"], 1) == ["a"]
    assert removable(["a", "b", "c"], ["b", "a"], 1) == ["c"]


@given(st.integers(1, 12), st.data())
def test_never_more_is_removed_than_must_be_nor_what_serves(count, data):
    names = [f"A_{i:04d}" for i in range(count)]
    stable = data.draw(st.integers(0, count - 1))
    chain = [n for n in reversed(names[: stable + 1]) if n == names[stable] or data.draw(st.booleans())]
    keep = data.draw(st.integers(0, 14))
    gone = removable(names, chain, keep)
    assert not set(gone) & set(chain[:2])
    assert len(gone) == len(set(gone)) <= max(0, count - keep)
    if keep:
        assert count - len(gone) <= max(keep, 2)
