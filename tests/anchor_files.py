"""Anchors in a test: rows in files, settings that name them, and no hub.

The fixture is imported by name, and serves every test of the file: `from anchor_files import _no_hub as _no_hub`.
"""

import json
from pathlib import Path

import pytest

from radiance_mlx.evaluation.anchors import AnchorSettings
from radiance_mlx.messages import Example

PAIR = Example((("user", "Hi?"), ("assistant", "Yes.")))
TEXT = Example(text="Rain fell on the town.")


@pytest.fixture(autouse=True)
def _no_hub(tmp_path, monkeypatch):
    """`datasets` keeps its copies in the test's folder, and no hub can be reached."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:1")


def jsonl(file: Path, *rows) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def hf(dataset, **values):
    return AnchorSettings("hf", str(dataset), **values)


def local(folder, **values):
    return AnchorSettings("local", folder=folder, **values)


def texts(count):
    return [{"text": f"Text number {i}."} for i in range(count)]
