#!/usr/bin/env python
"""Our engine's parts against mlx-lm's, without a server, on whatever device MLX has: Metal, CUDA or CPU.

    .venv/bin/python scripts/bench_engine.py                              # a minute or two on a laptop
    .venv/bin/python scripts/bench_engine.py --size 0.6b --dtype bfloat16
    .venv/bin/python scripts/bench_engine.py --size 8b --bits 4 --steps 5

The model has random weights in Qwen3's shape; nothing is downloaded. Prints as it goes, and one JSON object as its last
line: paste that line where you report it. Tokens/s of decoding at 1, 4 and 8 rows:

- `mlx-lm base`, `mlx-lm adapter`: its batch generator, on the model as it is and with its LoRA layers
- `base`, `bank`, `bank of many`: our generator on the banked tree: all rows the base, one adapter, each row its own
- `fused`: one adapter, in weights of its own

each the median of `--rounds`, in turns; and optimizer steps/s of training, rows of 100 words with answers of 8
(`masked`) and running text (`text`):

- `mlx-lm`: its own training loop
- `sliced`: ours, cut into slices of 50 ms as beside requests (with the longest one); `unsliced`: each step in one go

mlx-lm's parts run with MLX's own defaults (functions compiled, its pool of free buffers without a bound) and with
weights as they are read; ours as the service sets them on this device.
"""

import argparse
import contextlib
import copy
import ctypes
import gc
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
if sys.platform == "linux":
    try:  # before mlx: the wheel's own BLAS is some 30 times slower
        ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
    except OSError:
        print("no OpenBLAS: figures of the CPU backend will be of its slow fallback", file=sys.stderr)

import mlx.core as mx
import mlx.nn as nn
from bench_model import QWEN3_SIZES, SIZES, model_config
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator
from mlx_lm.models import qwen3
from mlx_lm.tuner.lora import LoRALinear

from radiance_mlx import blas
from radiance_mlx.config.schema import MemorySection, TrainingSection
from radiance_mlx.engine import backend
from radiance_mlx.engine.fused import FusedStable
from radiance_mlx.engine.generation import JoiningGenerator
from radiance_mlx.engine.layout import transpose_here, transpose_weights
from radiance_mlx.engine.products import best_here, shape_products
from radiance_mlx.engine.rows import BankModel, RowSampler, RowState
from radiance_mlx.engine.sigmoid import powers_here, use_powers
from radiance_mlx.engine.slices import Slices
from radiance_mlx.lora.bank import AdapterWeights, Bank
from radiance_mlx.lora.encoding import Encoded
from radiance_mlx.lora.halves import halves_here
from radiance_mlx.lora.head import install_head, serve_places
from radiance_mlx.lora.targets import Targets, find_targets, input_dims
from radiance_mlx.lora.trainer import Trainer
from radiance_mlx.lora.tree import adapter_tree, make_tree
from radiance_mlx.lora.whole import run_whole

Figures = dict[str, Any]
ROWS = (1, 4, 8)
RANK, SCALE, BATCH, SLICE_S = 8, 2.0, 4, 0.05
NAME = "A_stable"
#: steps that are not timed: in the first one kernels are made, on a GPU
WARM_UP = 2


def make_model(size: str, dtype: str, bits: int | None) -> nn.Module:
    mx.random.seed(0)
    model = qwen3.Model(qwen3.ModelArgs.from_dict(model_config(size)))
    model.set_dtype(getattr(mx, dtype))
    if bits:
        nn.quantize(model, bits=bits)
    model.freeze()
    model.eval()
    mx.eval(model.parameters())
    return model


def random_adapter(model: nn.Module, targets: Targets, seed: int) -> AdapterWeights:
    """Large enough to be folded into bfloat16 weights without loss to rounding: time does not depend on it."""
    modules = dict(model.named_modules())
    mx.random.seed(seed)
    pairs = {}
    for path in targets.paths:
        linear = modules[path]
        a = mx.random.normal((input_dims(linear), RANK)) * 0.05
        pairs[path] = (a, mx.random.normal((RANK, linear.weight.shape[0])) * 0.05)
    mx.eval(pairs)
    return AdapterWeights(pairs, SCALE)


@contextlib.contextmanager
def as_mlx_lm(cache_limit: int) -> Iterator[None]:
    """MLX and OpenBLAS as they are when nobody has set anything."""
    blas.use()
    use_powers(False)
    ours = mx.set_cache_limit(cache_limit)
    mx.enable_compile()
    try:
        yield
    finally:
        if mx.default_device() == mx.cpu:
            mx.disable_compile()
        use_powers(powers_here())
        mx.set_cache_limit(ours)
        mx.clear_cache()


def as_the_service(model: nn.Module) -> nn.Module:
    """The base as the service keeps it on this device; the arrays are shared where nothing is done to them."""
    base = copy.deepcopy(model)
    if transpose_here():
        transpose_weights(base)
    return base


# --- decoding -----------------------------------------------------------------------------------------


def prompts(count: int, vocab: int, length: int = 32) -> list[list[int]]:
    rng = random.Random(count)
    return [[rng.randrange(3, vocab) for _ in range(length)] for _ in range(count)]


def decode_rate(generator: BatchGenerator, count: int, tokens: int, vocab: int, caches: Any = None) -> float:
    """Tokens/s over all rows, from the first token that all have to the last."""
    generator.insert(prompts(count, vocab), max_tokens=[tokens + 2] * count, caches=caches)
    drawn, started, at_start = 0, 0.0, 0
    while drawn < count * (tokens + 2):
        drawn += len(generator.next()[1])
        if not started and drawn >= count:
            started, at_start = time.perf_counter(), drawn
    rate = (drawn - at_start) / (time.perf_counter() - started)
    generator.close()
    return rate


class Decoding:
    """Everything that decodes, on one base."""

    def __init__(self, model: nn.Module, targets: Targets, vocab: int, cache_limit: int) -> None:
        self._vocab, self._cache_limit = vocab, cache_limit
        adapters = [random_adapter(model, targets, seed) for seed in range(max(ROWS))]
        base = as_the_service(model)
        tree = copy.deepcopy(base)
        bank = Bank(tree, targets.paths, slots=max(ROWS) + 1, rank=RANK)
        for slot, adapter in enumerate(adapters, 1):
            bank.write(slot, adapter)
        self.bank_mb = bank.nbytes / 2**20
        self._best = shape_products(tree, best_here())
        head = install_head(copy.deepcopy(base), vocab)
        own_head = serve_places(tree, head)
        self._banked = BankModel(tree, bank.rows, head=own_head)
        fused = FusedStable(base, bank, "always", lambda: 2**60, best_here(), head)
        fused.follow(NAME, lambda: adapters[0])
        while fused.pending:
            fused.slice(1.0)
        if fused.tree is None:  # else the bank would be measured by its name
            raise SystemExit(f"the adapter is not folded: {fused.why_not}")
        self.fused_mb = fused.nbytes / 2**20
        self._fused = BankModel(tree, bank.rows, fused, own_head)
        self._plain, self._adapted = model, adapter_tree(model, adapters[0]).module
        for layer in self._adapted.modules():
            if isinstance(layer, LoRALinear):
                layer.__class__ = LoRALinear  # ours does its products in another way
        self._adapted.eval()

    def ways(self) -> dict[str, Callable[[int, int], float]]:
        """Each gives tokens/s of (rows, tokens)."""
        return {
            "mlx-lm base": lambda n, tokens: self._theirs(self._plain, n, tokens),
            "mlx-lm adapter": lambda n, tokens: self._theirs(self._adapted, n, tokens),
            "base": lambda n, tokens: self._ours(self._banked, [0] * n, tokens),
            "bank": lambda n, tokens: self._ours(self._banked, [1] * n, tokens),
            "bank of many": lambda n, tokens: self._ours(self._banked, range(1, n + 1), tokens),
            "fused": lambda n, tokens: self._ours(self._fused, [1] * n, tokens),
        }

    def _theirs(self, model: nn.Module, count: int, tokens: int) -> float:
        with as_mlx_lm(self._cache_limit):
            generator = BatchGenerator(model, stream=mx.default_stream(mx.default_device()))
            return decode_rate(generator, count, tokens, self._vocab)

    def _ours(self, model: BankModel, slots: Sequence[int], tokens: int) -> float:
        stream = mx.default_stream(mx.default_device())
        generator = JoiningGenerator(
            model, stream=stream, sampler=RowSampler(model), threads_for=self._best.threads, halved=halves_here()
        )
        caches = [model.new_cache(RowState(slot, 0.0, 1.0, 0, NAME if slot else None)) for slot in slots]
        return decode_rate(generator, len(caches), tokens, self._vocab, caches)


def decode(decoding: Decoding, tokens: int, rounds: int) -> Figures:
    found: Figures = {"bank_mb": round(decoding.bank_mb, 1), "fused_mb": round(decoding.fused_mb, 1)}
    ways = decoding.ways()
    for count in ROWS:
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):  # in turns: a machine whose pace varies treats all alike
            for name, way in ways.items():
                rates[name].append(way(count, tokens))
        found[f"{count} rows"] = {name: round(statistics.median(values), 1) for name, values in rates.items()}
        found[f"{count} rows, lowest and highest"] = {
            name: [round(min(values), 1), round(max(values), 1)] for name, values in rates.items()
        }
        print(f"{count} rows, tokens/s: {found[f'{count} rows']}", flush=True)
    return found


# --- training -----------------------------------------------------------------------------------------


def examples(kind: str, vocab: int) -> list[Encoded]:
    """Forty rows of 140 to 170 tokens."""
    rng = random.Random(7)
    lengths = [rng.randrange(140, 170) for _ in range(10 * BATCH)]
    return [
        Encoded(tuple(rng.randrange(3, vocab) for _ in range(n)), n - rng.randrange(8, 16) if kind == "masked" else 0)
        for n in lengths
    ]


class Training:
    """Makes trainers for the same rows and settings."""

    def __init__(self, model: nn.Module, targets: Targets, kind: str, steps: int, vocab: int, cache_limit: int) -> None:
        self._model, self._base = model, as_the_service(model)
        self._targets, self._vocab, self._cache_limit = targets, vocab, cache_limit
        self._rows, self._steps = examples(kind, vocab), steps
        self._times: list[float] = []

    def _trainer(self, plain: bool) -> Trainer:
        settings = TrainingSection(
            batch_size=BATCH, grad_accum=1, lr=1e-9, max_steps=self._steps + WARM_UP, eval_every=0, clip_norm=None
        )
        model = self._model if plain else self._base
        tree = make_tree(model, self._targets, rank=RANK, scale=SCALE, dropout=0.0, seed=0, plain=plain)
        head = None if plain else install_head(tree.module, self._vocab)
        self._times = []
        return Trainer(tree, head, self._rows, settings, 1, self._timed)

    def _timed(self, _: Trainer) -> None:
        self._times.append(time.perf_counter())

    def _drive(self, pieces: Iterator[Any], seconds: float) -> Figures:
        mx.clear_cache()
        gc.collect()
        mx.reset_peak_memory()
        slices, longest, finished = Slices(pieces, lambda: None), 0.0, False
        while not finished:
            counts, started = len(self._times) >= WARM_UP, time.perf_counter()
            finished = slices.run(seconds)
            longest = max(longest, time.perf_counter() - started) if counts else 0.0
        rate = self._steps / (self._times[-1] - self._times[-1 - self._steps])
        found = {"steps_per_s": round(rate, 3), "peak_mb": round(mx.get_peak_memory() / 2**20)}
        return found | ({"longest_slice_ms": round(1e3 * longest)} if longest else {})

    def sliced(self) -> Figures:
        return self._drive(self._trainer(False).run(), SLICE_S)

    def unsliced(self) -> Figures:
        return self._drive(self._trainer(False).run(), 1e9)

    def theirs(self) -> Figures:
        with as_mlx_lm(self._cache_limit):
            trainer = self._trainer(True)
            return self._drive(run_whole(trainer, self._timed), 1e9)


def train(make: Callable[[str], Training]) -> Figures:
    found: Figures = {}
    for kind in ("masked", "text"):
        training = make(kind)
        found[kind] = {
            "mlx-lm": training.theirs(),
            "sliced": training.sliced(),
            "unsliced": training.unsliced(),
        }
        print(f"{kind}: {found[kind]}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*SIZES, *QWEN3_SIZES], default="small")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: float32 on the CPU")
    parser.add_argument("--bits", type=int, choices=[4, 8], help="quantise the base")
    parser.add_argument("--tokens", type=int, default=64, help="decoded in each row (default 64)")
    parser.add_argument("--rounds", type=int, default=6, help="of decoding; their median counts (default 6)")
    parser.add_argument("--steps", type=int, default=20, help="training steps that are timed (default 20)")
    parser.add_argument("--backend", choices=["auto", "metal", "cuda", "cpu"], default="auto")
    parser.add_argument("--only", choices=["decode", "train"])
    options = parser.parse_args()
    cache_limit = mx.set_cache_limit(2**30)  # MLX's own
    device = backend.select(options.backend, MemorySection())
    use_powers(powers_here())
    dtype = options.dtype or ("float32" if device.name == "cpu" else "bfloat16")
    model = make_model(options.size, dtype, options.bits)
    vocab = model_config(options.size)["vocab_size"]
    targets = find_targets(model, ["all-linear"])
    size = sum(v.nbytes for _, v in tree_flatten(model.parameters())) / 2**20
    print(
        f"{options.size}, {dtype}{f', {options.bits} bit' if options.bits else ''}, {size:.0f} MiB on {device.device}"
    )
    found: Figures = {}
    if options.only != "train":
        found["decode"] = decode(Decoding(model, targets, vocab, cache_limit), options.tokens, options.rounds)
    if options.only != "decode":
        found["train"] = train(lambda kind: Training(model, targets, kind, options.steps, vocab, cache_limit))
    about = {"size": options.size, "dtype": dtype, "bits": options.bits, "model_mb": round(size)}
    where = {"backend": device.name, "device": device.device, "system": platform.platform()}
    where |= {"blas": blas.described()} | {name: version(name) for name in ("mlx", "mlx-lm")}
    print(json.dumps({**about, **found, "where": where}))


if __name__ == "__main__":
    main()
