"""What is kept of bases that are not in use any more."""

import os

import structlog
from running import FACTS, QUICK, running, until

from radiance_mlx.engine.former import leave_former

ASKING = {**QUICK, "rehearsal.kl_weight": 1.0, "rehearsal.samples": 8, "rehearsal.sample_tokens": 40}
NAMES = [character * 16 for character in "abcde"]


def used(folder, seconds):
    """As if it had been used so long after the epoch."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "wordings.json").touch()
    os.utime(folder, (seconds, seconds))
    return folder


def names(place):
    return sorted(folder.name for folder in place.iterdir())


def test_a_base_is_asked_ahead_and_those_of_long_ago_go(tmp_path):
    """Two others stay; what is kept of the one in use is not asked again, although it is the oldest."""
    place = tmp_path / "state" / "rehearsal"
    with running(tmp_path, ASKING) as service:
        until(lambda: not service.info()["engine"]["asking_ahead"], "the base asked")
    [own] = place.iterdir()
    before = {file: file.stat().st_mtime_ns for file in own.glob("self/*")}
    assert before
    for number, name in enumerate(NAMES):
        used(place / name, 1000 + number)
    used(place / "notes", 10)
    os.utime(own, (1, 1))
    with structlog.testing.capture_logs() as logged, running(tmp_path, ASKING) as service:
        until(lambda: not service.info()["engine"]["asking_ahead"], "the base asked")
    assert names(place) == sorted([own.name, *NAMES[-2:], "notes"])
    assert [line["bases"] for line in logged if "former bases" in line["event"]] == [NAMES[2::-1]]
    assert {file: file.stat().st_mtime_ns for file in own.glob("self/*")} == before


def test_an_update_uses_a_base_too(tmp_path):
    """Where nothing is asked ahead."""
    place = tmp_path / "state" / "rehearsal"
    for number, name in enumerate(NAMES):
        used(place / name, 1000 + number)
    with running(tmp_path, ASKING, rehearsal__ask_ahead=False) as service:
        assert names(place) == NAMES
        service.learn(FACTS[0])
    assert len(names(place)) == 3
    assert {*NAMES[-2:]} < {*names(place)}


def test_a_base_that_is_used_again_counts_as_used_now(tmp_path):
    for number, name in enumerate(NAMES[:3]):
        used(tmp_path / name, 1000 + number)
    leave_former(tmp_path / NAMES[0])
    assert names(tmp_path) == NAMES[:3]
    leave_former(tmp_path / NAMES[3])  # not there yet
    assert names(tmp_path) == [NAMES[0], NAMES[2]]
