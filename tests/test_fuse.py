"""`fuse`: what the folder that it writes says, loaded by mlx-lm alone."""

import json
import shutil

import mlx.core as mx
import pytest
from mlx_lm import load
from mlx_lm.utils import quantize_model, save_model
from running import FACTS, QUICK, running

from radiance_mlx import offline
from radiance_mlx.cli.main import main
from radiance_mlx.config import load_config
from radiance_mlx.config.bases import NANO_FOLDER
from radiance_mlx.errors import CheckpointDamaged, InvalidRequest, NotFound

STRONG = {**QUICK, "training.lr": 5e-3, "training.max_steps": 6}


def mixed(path, module):
    """Some linears in 4 bits, the others in 8: each is named in the configuration."""
    return {"group_size": 32, "bits": 4 if "q_proj" in path else 8} if hasattr(module, "to_quantized") else False


#: ways to quantise nano: in 8 bits; by floats of 4 bits, whose scales are bare exponents; each linear in its own way
WAYS = {"quantised": {"bits": 8}, "mxfp4": {"bits": 4, "mode": "mxfp4"}, "mixed": {"bits": 8, "quant_predicate": mixed}}


def quantised(folder, way):
    """nano, quantised."""
    model, _, config = load(str(NANO_FOLDER), return_config=True)
    model, config = quantize_model(model, config, group_size=32, **WAYS[way])
    folder.mkdir()
    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(NANO_FOLDER / name, folder)
    return str(folder)


@pytest.fixture(scope="module", params=["nano", *WAYS])
def taught(request, tmp_path_factory):
    """(base model, home, checkpoint) of a lesson that changes what the model says."""
    folder = tmp_path_factory.mktemp("fuse")
    base = "nano" if request.param == "nano" else quantised(folder / "base", request.param)
    with running(folder / "home", {**STRONG, "base_model": base}) as service:
        return base, folder / "home", service.learn(FACTS[0])


def loaded(taught):
    base, home, _ = taught
    return load_config(home=home, flags={"base_model": base}, environ={})


def logits(folder, adapter=None):
    model, tokenizer = load(str(folder), adapter_path=adapter and str(adapter))
    model.set_dtype(mx.float32)
    return model(mx.array([tokenizer.encode(FACTS[0][0])]))


def test_the_fused_model_says_what_base_and_adapter_say(taught, tmp_path):
    """Bit by bit but for rounding, of a quantised base too, whose other weights stay quantised; mlx-lm reads it."""
    base, home, checkpoint = taught
    found = offline.fuse(loaded(taught), "stable", None, tmp_path / "model")
    assert (found["adapter"], found["modules"] > 1) == (checkpoint, True)
    where = NANO_FOLDER if base == "nano" else base
    both = logits(where, home / "adapters" / checkpoint)
    fused = logits(tmp_path / "model")
    rounded = base != "nano" and "mxfp4" in (home.parent / "base" / "config.json").read_text()  # to bfloat16
    assert mx.allclose(fused, both, atol=0.15 if rounded else 2e-3).item()
    assert not mx.allclose(fused, logits(where), atol=0.1).item()
    names = set(mx.load(str(tmp_path / "model" / "model.safetensors")))
    assert any(name.endswith(".scales") for name in names) == (base != "nano")


def test_nothing_is_overwritten_and_nothing_is_left_half_written(taught, tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(InvalidRequest, match="there already"):
        offline.fuse(loaded(taught), "stable", None, tmp_path / "model")
    with pytest.raises(NotFound):
        offline.fuse(loaded(taught), "A_2020-01-01_0001", None, tmp_path / "other")
    with pytest.raises(InvalidRequest, match="nothing to fold"):
        offline.fuse(loaded(taught), "base", None, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_any_adapter_of_mlx_lms_form_can_be_fused_by_the_command(taught, tmp_path, capsys, monkeypatch):
    base, home, checkpoint = taught
    monkeypatch.chdir(tmp_path)
    arguments = ["fuse", "--adapter-path", str(home / "adapters" / checkpoint), "--base-model", base]
    assert main([*arguments, "--out", "made", "--home", str(tmp_path / "new"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["out"] == "made"
    assert (tmp_path / "made" / "config.json").is_file()
    assert main([*arguments, "stable", "--out", "other"]) == 2


def test_an_adapter_of_another_kind_is_refused(taught, tmp_path):
    """Folding half of one would be another model than it makes."""
    _, home, checkpoint = taught
    other = shutil.copytree(home / "adapters" / checkpoint, tmp_path / "dora")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "fine_tune_type": "dora"}))
    with pytest.raises(CheckpointDamaged, match="dora"):
        offline.fuse(loaded(taught), "stable", other, tmp_path / "model")
    assert not (tmp_path / "model").exists()
