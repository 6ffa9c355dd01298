"""What no UTF-8 can hold, and numbers that are none: told, and in nobody's way."""

import os

import numpy as np
import pytest
from running import FACTS, QUICK, http, running

from radiance_mlx.errors import InvalidRequest, NonFinite
from radiance_mlx.evaluation.anchors import AnchorSettings
from radiance_mlx.evaluation.metrics import AnchorSums, anchor_metrics
from radiance_mlx.evaluator import asked_for


def test_a_file_name_of_other_bytes_does_not_stop_the_api(tmp_path):
    """An anchor file that cannot be read is named in notes, warnings and events, its odd byte as a question mark."""
    anchors = tmp_path / "data" / "anchors"
    anchors.mkdir(parents=True)
    with open(os.fsencode(anchors) + b"/n\xfcrnberg.jsonl", "w") as file:
        file.write('{"text": 5}\n')
    flags = {**QUICK, "evaluation.anchor_provider": "local"}
    with running(tmp_path, flags) as service, http(service.service, service._thread) as client:
        service.learn(FACTS[0])
        told = {path: client.get(path) for path in ("/jobs", "/checkpoints", "/info", "/events")}
        assert {path: answer.status_code for path, answer in told.items()} == dict.fromkeys(told, 200)
        assert "n?rnberg.jsonl" in told["/jobs"].json()["jobs"][0]["notes"][0]
        refused = client.post("/eval", json={"checkpoints": ["base"]})
        assert (refused.status_code, "n?rnberg" in refused.text) == (503, True)
        streamed = client.post("/eval", json={"checkpoints": ["base"], "stream": True})
        assert "n?rnberg" in streamed.text


def test_what_is_no_number_is_never_nothing_forgotten():
    """A divergence that is NaN or infinite is an error, not a retention of 1."""
    for odd in (np.nan, np.inf):
        some = np.array([1.0, 2.0])
        sums = AnchorSums(
            tokens=np.array([2, 2]),
            base_entropy=some,
            base_target=-some,
            target=-some,
            base_kl=np.array([0.1, odd]),
            agreement=some,
        )
        with pytest.raises(NonFinite, match="no numbers"):
            list(anchor_metrics(sums, {}))


def test_a_data_set_is_not_the_anchors_of_the_home(tmp_path):
    """`local` with a data set is refused, for one of them would be left out silently."""
    settings = AnchorSettings(provider="none")
    assert asked_for(settings, tmp_path, {"provider": "local"}).folder == tmp_path / "data" / "anchors"
    with pytest.raises(InvalidRequest, match=r"not ./other.jsonl"):
        asked_for(settings, tmp_path, {"provider": "local", "dataset": "./other.jsonl"})
