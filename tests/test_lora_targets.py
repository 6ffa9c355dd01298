"""Which modules an adapter touches, and that mlx-lm adapts the very same from our folders."""

import copy

import pytest
import tiny
from architectures import ARCHITECTURES
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.tuner.utils import load_adapters

from radiance_mlx.errors import CheckpointDamaged, ConfigError
from radiance_mlx.lora import files
from radiance_mlx.lora.targets import find_targets, input_dims
from radiance_mlx.lora.tree import make_tree


@pytest.fixture(scope="module")
def llama():
    return tiny.model()


@pytest.fixture(scope="module")
def moe():
    return tiny.model(ARCHITECTURES["qwen3_moe"])


def layers_of(targets):
    return sorted({int(path.split(".layers.")[1].split(".")[0]) for path in targets.paths})


def test_leaf_names_match_every_layer(llama):
    """A leaf name stands for that module in each layer, and mlx-lm is told relative keys."""
    targets = find_targets(llama, ["q_proj", "v_proj"])
    assert set(targets.paths) == {f"model.layers.{i}.self_attn.{name}_proj" for i in range(3) for name in "qv"}
    assert targets.keys == ("self_attn.q_proj", "self_attn.v_proj")
    assert targets.num_layers == 3


def test_dotted_tails_match_whole_parts_only(llama):
    """`mlp.up_proj` is a tail of paths; `p_proj` is a tail of letters only and matches nothing."""
    assert len(find_targets(llama, ["mlp.up_proj"]).paths) == 3
    assert find_targets(llama, ["model.layers.1.self_attn.q_proj"]).paths == ("model.layers.1.self_attn.q_proj",)
    with pytest.raises(ConfigError):
        find_targets(llama, ["p_proj"])


def test_all_linear_takes_the_layers_and_leaves_the_head(llama):
    """`all-linear` is every linear of the layers; the output head is only adapted by name."""
    targets = find_targets(llama, ["all-linear"])
    assert len(targets.paths) == 3 * 7
    assert "lm_head" not in targets.paths
    assert "lm_head" in find_targets(llama, ["all-linear", "lm_head"]).paths


@pytest.mark.parametrize(("num_layers", "layers"), [(-1, [0, 1, 2]), (1, [2]), (2, [1, 2]), (9, [0, 1, 2])])
def test_num_layers_counts_from_the_end(llama, num_layers, layers):
    """The last layers are adapted; more than there are is all of them."""
    targets = find_targets(llama, ["q_proj"], num_layers)
    assert layers_of(targets) == layers
    assert targets.num_layers == len(layers)


def test_a_name_that_matches_nothing_is_refused_with_what_there_is(llama):
    """One wrong name among right ones is an error that lists what the model has."""
    with pytest.raises(ConfigError) as caught:
        find_targets(llama, ["q_proj", "wq", "c_attn"])
    assert "wq, c_attn" in caught.value.message
    assert "k_proj" in caught.value.hint
    assert [fault["key"] for fault in caught.value.details] == ["lora.target_modules"] * 2
    assert "gate_proj" in caught.value.details[0]["has"]


def test_experts_are_refused_by_name(moe):
    """Stacked experts cannot be banked, so naming one is an error that says so."""
    with pytest.raises(ConfigError, match="mixture-of-experts"):
        find_targets(moe, ["q_proj", "up_proj"])


def test_all_linear_leaves_the_experts_out(moe):
    """`all-linear` on a mixture of experts adapts what can be banked."""
    targets = find_targets(moe, ["all-linear"])
    assert "self_attn.q_proj" in targets.keys
    assert not [path for path in targets.paths if "switch_mlp" in path]


@pytest.mark.parametrize("bits", [None, 4])
def test_input_dims_of_packed_weights(bits):
    """The width of a linear's input is right when its weight is packed too."""
    modules = dict(tiny.model(bits=bits).named_modules())
    assert input_dims(modules["model.layers.0.mlp.down_proj"]) == 64
    assert input_dims(modules["model.layers.0.mlp.up_proj"]) == 32


SELECTIONS = {
    "attention": (["q_proj", "o_proj"], -1),
    "last two layers": (["q_proj", "down_proj"], 2),
    "everything": (["all-linear"], -1),
    "head too": (["q_proj", "lm_head"], -1),
    "head, last layer": (["q_proj", "lm_head"], 1),
    "one layer in the middle": (["model.layers.1.mlp.up_proj"], -1),
    "unlike in each layer": (["layers.0.self_attn.q_proj", "layers.2.mlp.up_proj"], -1),
}


@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
def test_mlx_lm_adapts_the_same_modules_from_the_saved_folder(llama, tmp_path, selection):
    """`mlx_lm.tuner.utils.load_adapters` on our folder gives exactly our paths with exactly our weights."""
    targets = find_targets(llama, *selection)
    tree = make_tree(llama, targets, rank=3, scale=1.5, dropout=0.0, seed=2)
    tree.load({name: value + 1 for name, value in tree.parameters().items()})
    config = files.adapter_config(targets, rank=3, scale=1.5, dropout=0.0)
    files.save_adapter(tmp_path, tree.parameters(), config)

    theirs = load_adapters(copy.deepcopy(llama), str(tmp_path))

    adapted = {path: m for path, m in theirs.named_modules() if isinstance(m, LoRALinear)}
    assert set(adapted) == set(targets.paths) == set(files.load_adapter(tmp_path).weights)
    assert {m.scale for m in adapted.values()} == {1.5}
    loaded = {f"{path}.{leaf}": m[leaf] for path, m in adapted.items() for leaf in ("lora_a", "lora_b")}
    assert tiny.equal(loaded, tree.parameters())


def test_lfm2_adapts_attention_where_there_is_any(tmp_path):
    """Layers without the named module are passed over, in our tree and in mlx-lm's."""
    base = tiny.model(ARCHITECTURES["lfm2"])
    targets = find_targets(base, ["q_proj"])
    assert layers_of(targets) == [1, 3]
    assert len(make_tree(base, targets, rank=2, scale=1.0, dropout=0.0, seed=0).adapter().weights) == 2


@pytest.mark.parametrize(
    "document", ["", "[]", "{}", '{"lora_parameters": null}', '{"lora_parameters": {"scale": "x"}}']
)
def test_an_unreadable_adapter_is_damaged(llama, tmp_path, document):
    """Whatever stands in `adapter_config.json`, loading ends in `CheckpointDamaged` or an adapter."""
    targets = find_targets(llama, ["q_proj"])
    tree = make_tree(llama, targets, rank=2, scale=1.0, dropout=0.0, seed=0)
    files.save_adapter(tmp_path, tree.parameters(), {})
    (tmp_path / files.ADAPTER_CONFIG).write_text(document)
    with pytest.raises(CheckpointDamaged):
        files.load_adapter(tmp_path)


def test_cut_weights_are_damaged(llama, tmp_path):
    """A cut safetensors file and one without adapters are refused."""
    targets = find_targets(llama, ["q_proj"])
    tree = make_tree(llama, targets, rank=2, scale=1.0, dropout=0.0, seed=0)
    config = files.adapter_config(targets, rank=2, scale=1.0, dropout=0.0)
    files.save_adapter(tmp_path, tree.parameters(), config)
    whole = (tmp_path / files.ADAPTER_FILE).read_bytes()
    (tmp_path / files.ADAPTER_FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointDamaged):
        files.load_adapter(tmp_path)
    files.save_adapter(tmp_path, {}, config)
    with pytest.raises(CheckpointDamaged):
        files.load_adapter(tmp_path)
