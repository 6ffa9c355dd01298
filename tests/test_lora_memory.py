"""The estimate of what a batch needs against what it takes, and the refusal that names what to change."""

import copy
import gc

import mlx.core as mx
import numpy as np
import pytest
import tiny
from architectures import ARCHITECTURES

from radiance_mlx.errors import NotEnoughMemory
from radiance_mlx.lora import memory
from radiance_mlx.lora.encoding import Encoded
from radiance_mlx.lora.head import install_head
from radiance_mlx.lora.head_loss import CHUNK_ON_CPU
from radiance_mlx.lora.targets import find_targets

LLAMA = {**tiny.LLAMA, "hidden_size": 128, "intermediate_size": 384, "vocab_size": tiny.VOCAB}
#: config, tokens of an example, rows, and what else is particular
CASES = {
    "short": (LLAMA, 60, 1, {}),
    "many rows": (LLAMA, 60, 8, {}),
    "long": (LLAMA, 330, 1, {}),
    "checkpointed": (LLAMA, 150, 2, {"grad_checkpoint": True}),
    "long, checkpointed": (LLAMA, 330, 1, {"grad_checkpoint": True}),
    "all linears with dropout": (LLAMA, 150, 2, {"dropout": 0.1, "names": ["all-linear"]}),
    "in one go": (LLAMA, 150, 2, {"together": 10**6}),
    "in one go, checkpointed": (LLAMA, 150, 2, {"together": 10**6, "grad_checkpoint": True}),
    "in one go, accumulated": (LLAMA, 90, 2, {"together": 10**6, "grad_accum": 3}),
    "4 bit": (LLAMA, 150, 2, {"bits": 4}),
    "half precision": (LLAMA, 150, 2, {"dtype": mx.bfloat16}),
    "full head": ({**LLAMA, "vocab_size": 4096}, 120, 2, {"full_head": True}),
    "logits in chunks": ({**LLAMA, "vocab_size": CHUNK_ON_CPU // 16}, 120, 2, {}),
    "experts": (ARCHITECTURES["qwen3_moe"], 150, 2, {}),
    "experts, short rows": (ARCHITECTURES["qwen3_moe"], 30, 16, {}),
    "convolutions": (ARCHITECTURES["lfm2"], 150, 2, {}),
    "windows, checkpointed": (ARCHITECTURES["gemma3_text"], 150, 2, {"grad_checkpoint": True}),
}


def estimate(base, data, section, names=("q_proj", "v_proj"), **options):
    defaults = {"rank": 4, "vocab_size": tiny.VOCAB, "bank_bytes": 0, "head": None}
    return memory.estimate(base, find_targets(base, names), data, section, **{**defaults, **options})


def rows(count, length, vocab=tiny.VOCAB):
    rng = np.random.default_rng(0)
    return [Encoded(tuple(rng.integers(3, vocab, size=length).tolist()), length // 2) for _ in range(count)]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_estimate_is_near_what_training_takes(case):
    """Never under 0.8 of MLX's own peak, however the step is cut, and not over about twice that."""
    config, length, count, particular = case
    options = {"names": ("q_proj", "v_proj"), "dropout": 0.0, "grad_accum": 1, "grad_checkpoint": False} | particular
    base = tiny.model(config, bits=options.get("bits"))
    base.set_dtype(options.get("dtype", mx.float32))
    mx.eval(base.parameters())
    accum, full_head = options["grad_accum"], options.get("full_head", False)
    section = tiny.settings(batch_size=count, grad_accum=accum, max_steps=1, grad_checkpoint=options["grad_checkpoint"])
    data = rows(count * accum, length)
    vocab = config["vocab_size"]
    head = {"head": None if full_head else install_head(copy.deepcopy(base), vocab), "vocab_size": vocab}
    needed = estimate(base, data, section, options["names"], dropout=options["dropout"], **head)

    gc.collect()
    others = mx.get_active_memory() - needed.base
    mx.reset_peak_memory()
    run = tiny.trainer(base, data, section, full_head=full_head, names=options["names"], dropout=options["dropout"])
    tiny.drive(run.run(), together=options.get("together", 1))
    taken = mx.get_peak_memory() - others

    assert 0.8 < needed.total / taken < 2.1
    assert (needed.total - needed.base) / (taken - needed.base) > 0.8


def test_the_estimate_counts_the_largest_micro_batch():
    """Only the longest rows count, as many as a micro-batch has; a bank and a bigger rank add their own."""
    base = tiny.model(LLAMA)
    section = tiny.settings(batch_size=2)
    long, short = rows(2, 200), rows(10, 20)
    both = estimate(base, [*short, *long], section)
    assert both == estimate(base, long, section)
    assert both.activations > 5 * estimate(base, short, section).activations
    assert estimate(base, long, section, bank_bytes=123).total == both.total + 123
    assert estimate(base, long, section, rank=8).adapter == 2 * both.adapter
    assert both.base == memory.model_bytes(base)
    assert estimate(base, short, section, together=400).activations > 0.4 * both.activations  # scores are of the width
    assert estimate(base, long, section, together=100) == both
    kept_twice = estimate(base, long, section, dropout=0.1).activations - both.activations
    assert kept_twice >= 4 * 2 * 200 * len(find_targets(base, ["q_proj", "v_proj"]).paths) * LLAMA["hidden_size"]


def test_a_batch_that_does_not_fit_is_refused_with_the_keys_to_change():
    """The error says how much is needed, of what, and which settings lower it."""
    needed = memory.Estimate(base=2**30, bank=2**20, adapter=0, optimizer=0, activations=2**31, head=0)
    memory.require(needed, needed.total)
    with pytest.raises(NotEnoughMemory) as caught:
        memory.require(needed, needed.total - 1)
    assert "3.00 GiB" in caught.value.message
    for key in (
        "training.batch_size",
        "training.max_seq_length",
        "training.grad_checkpoint",
        "lora.r",
        "serving.adapter_slots",
        "memory.limit_gb",
    ):
        assert key in caught.value.hint
    assert caught.value.details["activations"] == "2.00 GiB"
    assert caught.value.details["bank"] == "1.0 MiB"


def test_what_is_less_than_a_gibibyte_is_told_in_mebibytes():
    """A small model's need is not `0.01 GiB`."""
    small = memory.Estimate(base=10 * 2**20, bank=0, adapter=2**19, optimizer=0, activations=0, head=0)
    with pytest.raises(NotEnoughMemory, match=r"needs about 10\.5 MiB, and there are 10\.0 MiB"):
        memory.require(small, 10 * 2**20)
    assert memory.readable(2**30) == "1.00 GiB"


def test_the_limit_is_the_configured_one_or_the_devices():
    """`memory.limit_gb` is taken at its word; without it the device says what it has."""
    assert memory.device_bytes(1.5) == 3 * 2**29
    assert memory.device_bytes(None) > 2**28
