"""`fuse`, where the weights of the base have too few digits for what an adapter changes."""

import json
import shutil

import mlx.core as mx
import pytest
import tiny
from mlx_lm import load
from mlx_lm.utils import save_model

from radiance_mlx.cli.main import main
from radiance_mlx.config.bases import NANO_FOLDER
from radiance_mlx.lora.bank import AdapterWeights
from radiance_mlx.lora.files import adapter_config, save_adapter
from radiance_mlx.lora.targets import find_targets


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """nano in bfloat16: (the folder, the model, an adapter of it)."""
    model, _ = load(str(NANO_FOLDER))
    model.set_dtype(mx.bfloat16)
    folder = tmp_path_factory.mktemp("half")
    save_model(folder, model)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(NANO_FOLDER / name, folder)
    targets = find_targets(model, ["q_proj", "down_proj"])
    return folder, targets, tiny.random_adapter(model, targets)


def fused(half, size, tmp_path, capsys):
    """(exit code, JSON on stdout, stderr) of `fuse` with the adapter's change multiplied by `size`."""
    base, targets, adapter = half
    sized = AdapterWeights({path: (a, b * size) for path, (a, b) in adapter.weights.items()}, adapter.scale)
    folder = tmp_path / "adapter"
    folder.mkdir()
    flat = {f"{path}.lora_{x}": w for path, ab in sized.weights.items() for x, w in zip("ab", ab, strict=True)}
    save_adapter(folder, flat, adapter_config(targets, rank=4, scale=2.0, dropout=0.0))
    arguments = ["fuse", "--adapter-path", folder, "--base-model", base, "--out", tmp_path / "out", "--home", tmp_path]
    code = main([*map(str, arguments), "--json"])
    said = capsys.readouterr()
    return code, json.loads(said.out, parse_constant=pytest.fail), said.err


@pytest.mark.parametrize(("size", "least", "most"), [(1.0, 1e-5, 0.05), (1e-4, 0.05, 1.0), (0.0, 0.0, 0.0)])
def test_what_is_lost_is_told_and_too_much_of_it_is_warned_of(half, tmp_path, capsys, size, least, most):
    """The share by its definition, from the two models on the disk; 0 where nothing is changed."""
    code, found, said = fused(half, size, tmp_path, capsys)
    assert code == 0
    assert least <= found["rounding_lost"] <= most
    assert ("warning: " in said and "--adapter-path" in said) is (most == 1.0)

    before, after = (mx.load(str(folder / "model.safetensors")) for folder in (half[0], tmp_path / "out"))
    lost = whole = 0.0
    for path, (a, b) in half[2].weights.items():
        change = 2.0 * (a @ (b * size)).T
        done = after[f"{path}.weight"].astype(mx.float32) - before[f"{path}.weight"].astype(mx.float32)
        lost, whole = lost + mx.square(done - change).sum().item(), whole + mx.square(change).sum().item()
    assert found["rounding_lost"] == pytest.approx((lost / whole) ** 0.5 if whole else 0.0, rel=1e-3)


def test_numbers_that_are_none_are_not_folded(half, tmp_path, capsys):
    """An adapter that overflows would make a model that says nothing."""
    code, found, _ = fused(half, float("inf"), tmp_path, capsys)
    assert code == 1
    assert "cannot be folded" in found["error"]["message"]
    assert not (tmp_path / "out").exists()
