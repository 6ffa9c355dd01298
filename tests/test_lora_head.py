"""The output head at target rows only: the same numbers for less work, and only where that is certain."""

import copy

import mlx.core as mx
import mlx.nn as nn
import pytest
import tiny
from architectures import ARCHITECTURES, GEMMA2
from mlx.utils import tree_flatten

from radiance_mlx.lora.batches import batch_stream
from radiance_mlx.lora.head import install_found, install_head
from radiance_mlx.lora.step import LossFunction

MODELS = {
    "llama": tiny.LLAMA,
    "llama tied": {**tiny.LLAMA, "tie_word_embeddings": True},
    **{name: ARCHITECTURES[name] for name in ("qwen3_moe", "mistral3", "phi3", "cohere", "lfm2")},
    "gemma2": GEMMA2,
}


def loss_and_grads(tree, head, batch):
    value_and_grad = nn.value_and_grad(tree.module, LossFunction(tree, head))
    (loss, count), grads = value_and_grad(tree.module, *batch)
    return loss.item(), int(count), dict(tree_flatten(grads))


def trained_a_bit(base, names):
    tree = tiny.tree(base, names)
    tree.load({name: value + 0.05 for name, value in tree.parameters().items()})
    return tree


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_loss_and_gradients_are_those_of_the_full_head(config, bits):
    """Rows of unlike lengths and offsets: loss, target count and every gradient agree with mlx-lm's loss."""
    base = tiny.model(config, bits=bits)
    names = ["qkv_proj"] if config["model_type"] == "phi3" else ["q_proj", "v_proj"]
    batch = next(batch_stream(tiny.examples(3), batch_size=3, max_tokens=64, seed=(0, 0)))
    loss, count, grads = loss_and_grads(trained_a_bit(base, names), None, batch)

    tree = trained_a_bit(base, names)
    head = install_head(tree.module, tiny.VOCAB)
    assert head is not None
    same_loss, same_count, same_grads = loss_and_grads(tree, head, batch)

    assert same_loss == pytest.approx(loss, rel=1e-6)
    assert same_count == count
    size = max(mx.abs(grad).max().item() for grad in grads.values())
    assert size > 1e-4
    assert tiny.furthest(same_grads, grads) <= 1e-5 * size


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_the_last_layer_works_on_target_rows_too(config):
    """What it does to each position by itself is done to the wanted ones; other layers see all of them."""
    base = tiny.model(config)
    before = {path: type(module) for path, module in base.named_modules()}
    install_head(base, tiny.VOCAB)
    after = {path: type(module) for path, module in base.named_modules()}
    changed = [path for path in before if after[path] is not before[path] and ".layers." in path]
    last, name = len(base.layers) - 1, "feed_forward" if config["model_type"] == "lfm2" else "mlp"
    assert [path.partition(".layers.")[2] for path in changed] == [f"{last}.{name}"]


def test_layers_that_are_computed_twice_do_not():
    """The gradient's second pass knows no rows any more."""
    base = tiny.model()
    kinds = [type(module) for layer in base.layers for module in layer.modules()]
    assert install_head(base, tiny.VOCAB, narrow=False) is not None
    assert [type(module) for layer in base.layers for module in layer.modules()] == kinds


class _Smoothed(nn.Module):
    """Looks like an MLP, and mixes positions."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __call__(self, x):
        return self.inner(x) + mx.cumsum(x, axis=1)


def test_what_mixes_positions_is_left_alone():
    base = tiny.model()
    base.layers[-1].mlp = _Smoothed(base.layers[-1].mlp)
    assert install_head(base, tiny.VOCAB) is not None
    assert type(base.layers[-1].mlp) is _Smoothed


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_what_was_found_out_about_a_base_holds_for_its_trees(config):
    """Loss and gradients of a tree are those of one on which everything was tried."""
    base = tiny.model(config)
    names = ["qkv_proj"] if config["model_type"] == "phi3" else ["q_proj", "v_proj"]
    batch = next(batch_stream(tiny.examples(3), batch_size=3, max_tokens=64, seed=(0, 0)))
    found = install_head(copy.deepcopy(base), tiny.VOCAB).found
    one, other = trained_a_bit(base, names), trained_a_bit(base, names)
    heads = install_head(one.module, tiny.VOCAB), install_found(other.module, tiny.VOCAB, found)
    assert heads[0].found == heads[1].found
    assert (heads[0].project is None) is (heads[1].project is None)
    kinds = [[type(module).__mro__[1] for _, module in tree.module.named_modules()] for tree in (one, other)]
    assert kinds[0] == kinds[1]
    loss, count, grads = loss_and_grads(one, heads[0], batch)
    same_loss, same_count, same_grads = loss_and_grads(other, heads[1], batch)
    assert (same_loss, same_count) == (loss, count)
    assert tiny.equal(same_grads, grads)


def test_only_target_rows_reach_the_head():
    """While positions are set, the model's logits are those rows; afterwards all are there again."""
    base = tiny.model()
    head = install_head(base, tiny.VOCAB)
    tokens = mx.array(tiny.prompts(6, 6))
    full = base(tokens)
    head.positions = mx.array([1, 4, 9])
    part = base(tokens)
    head.positions = None
    assert part.shape == (1, 3, tiny.VOCAB)
    assert mx.allclose(part[0], full.reshape(-1, tiny.VOCAB)[mx.array([1, 4, 9])], atol=1e-4).item()
    assert base(tokens).shape == (2, 6, tiny.VOCAB)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_does_not_hide_the_head(dtype):
    """Products of other shapes round otherwise in half precision: that is no reason for doubt."""
    base = tiny.model()
    base.set_dtype(dtype)
    assert install_head(base, tiny.VOCAB) is not None


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_logits_that_are_bent_after_the_head_are_seen_however_slightly(dtype):
    """Gemma 2 caps them at 30: at a few units that is less than half precision's rounding elsewhere."""
    base = tiny.model(GEMMA2)
    base.set_dtype(dtype)
    assert install_head(base, tiny.VOCAB).project is None


def test_another_tree_on_the_same_base_keeps_its_head():
    """Only the instances of one tree change: the serving tree beside it computes all logits."""
    base = tiny.model()
    training = copy.deepcopy(base)
    head = install_head(training, tiny.VOCAB)
    head.positions = mx.array([0])
    tokens = mx.array(tiny.prompts(5))
    assert training(tokens).shape == (1, 1, tiny.VOCAB)
    assert base(tokens).shape == (1, 5, tiny.VOCAB)


class _TwoHeads(nn.Module):
    """Logits are the sum of two heads."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.second = nn.Linear(inner.args.hidden_size, tiny.VOCAB)

    @property
    def layers(self):
        return self.inner.layers

    def __call__(self, tokens, cache=None):
        return self.inner(tokens, cache) + self.second(self.inner.model(tokens, cache))


class _ReversedHead(_TwoHeads):
    """Positions change their places after the head."""

    def __call__(self, tokens, cache=None):
        return self.second(self.inner.model(tokens, cache))[:, ::-1]


@pytest.mark.parametrize("kind", [_TwoHeads, _ReversedHead])
def test_where_it_is_not_certain_nothing_changes(kind):
    """Two heads, or logits that are not where their rows were: no head is taken and the model is left as it was."""
    base = kind(tiny.model())
    before = {path: type(module) for path, module in base.named_modules()}
    assert install_head(base, tiny.VOCAB) is None
    assert {path: type(module) for path, module in base.named_modules()} == before


def test_an_adapted_head_is_the_full_one():
    """With LoRA on the head itself it is not certain which rows it takes: the full head is used."""
    assert install_head(tiny.tree(tiny.model(), ["q_proj", "lm_head"]).module, tiny.VOCAB) is None
