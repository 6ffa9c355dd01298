"""Small models, adapters, examples and tokenizers for the tests: real ones, drawn from seeds.

Weights are scaled up and heads untied where that is possible: a tied random model repeats a token or two,
and would hide what these tests look for.
"""

import copy
import importlib
from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map, tree_unflatten
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.lora import LoRALinear
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from radiance_mlx.config.schema import TrainingSection
from radiance_mlx.engine.generation import JoiningGenerator
from radiance_mlx.engine.rows import BankModel, RowEntry, RowSampler, RowState
from radiance_mlx.lora.bank import AdapterWeights
from radiance_mlx.lora.encoding import Encoded
from radiance_mlx.lora.head import TargetRows, install_head, serve_places
from radiance_mlx.lora.targets import Targets, find_targets, input_dims
from radiance_mlx.lora.trainer import Trainer
from radiance_mlx.lora.tree import TrainingTree, make_tree

mx.disable_compile()  # as the engine does on the CPU

VOCAB = 96
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB,
    "tie_word_embeddings": False,
}


def model(config: dict[str, Any] = LLAMA, *, bits: int | None = None, scale: float = 4.0, **changes: Any) -> nn.Module:
    """A random model of mlx-lm's architecture `model_type`; floating matrices are `scale` times as large."""
    config = {**config, **changes}
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    mx.random.seed(1)
    made: nn.Module = module.Model(module.ModelArgs.from_dict(config))
    made.update(tree_map(lambda w: w * scale if w.ndim > 1 else w, made.parameters()))
    if bits:
        nn.quantize(made, group_size=32, bits=bits)
    made.freeze()
    made.eval()
    mx.eval(made.parameters())
    return made


def random_adapter(base: nn.Module, targets: Targets, *, rank: int = 4, scale: float = 2.0, seed: int = 0) -> Any:
    """An adapter whose both factors are drawn, large enough to change what the model says."""
    modules = dict(base.named_modules())
    mx.random.seed(1000 + seed)
    pairs = {}
    for path in targets.paths:
        linear = modules[path]
        a = mx.random.normal((input_dims(linear), rank)) * 0.3
        b = mx.random.normal((rank, linear.weight.shape[0])) * 0.3
        pairs[path] = (a, b)
    mx.eval(list(pairs.values()))
    return AdapterWeights(pairs, scale)


def alone(base: nn.Module, adapter: AdapterWeights | None) -> nn.Module:
    """The base with one adapter, by mlx-lm's own layers: what a bank row must be equal to."""
    twin = copy.deepcopy(base)
    if adapter is None:
        return twin
    modules = dict(twin.named_modules())
    layers = []
    for path, (a, b) in adapter.weights.items():
        layer = LoRALinear.from_base(modules[path], r=a.shape[1], scale=adapter.scale)
        layer.lora_a, layer.lora_b = a, b
        layers.append((path, layer))
    twin.update_modules(tree_unflatten(layers))
    twin.eval()
    return twin


def served_head(tree: nn.Module, base: nn.Module) -> TargetRows | None:
    """The head of a serving tree, which takes single places from now on, if that of the base can be told to."""
    return serve_places(tree, install_head(copy.deepcopy(base), VOCAB))


# --- decoding ------------------------------------------------------------------------------------


def generator(module: nn.Module, **options: Any) -> BatchGenerator:
    """mlx-lm's own generator."""
    return BatchGenerator(module, stream=mx.default_stream(mx.default_device()), **options)


def drain(running: BatchGenerator, uids: Iterable[int]) -> list[list[int]]:
    """Tokens of `uids`, once all of them have finished."""
    tokens: dict[int, list[int]] = {uid: [] for uid in uids}
    left = len(tokens)
    while left:
        for response in running.next()[1]:
            tokens[response.uid].append(response.token)
            left -= response.finish_reason is not None
    return list(tokens.values())


def bank_generator(served: BankModel, **options: Any) -> JoiningGenerator:
    """The engine's generator on a banked model, with the sampler that all rows share."""
    stream = mx.default_stream(mx.default_device())
    return JoiningGenerator(served, stream=stream, sampler=RowSampler(served), **options)


def ask(running: BatchGenerator, served: BankModel, prompts: Sequence[Sequence[int]], rows: list[RowState], n: int):
    """Put one sequence for each row into the running batch; its uids."""
    caches = [served.new_cache(row) for row in rows]
    return running.insert([list(p) for p in prompts], max_tokens=[n] * len(rows), caches=caches)


def greedy(slot: int = 0) -> RowState:
    """A row that takes the likeliest token."""
    return RowState(slot, 0.0, 1.0, 0)


def bank_logits(served: BankModel, prompt: Sequence[int], slots: Sequence[int]) -> mx.array:
    """(rows, length, vocabulary): the same prompt, each row by another slot."""
    cache = [c.merge([c] * len(slots)) for c in make_prompt_cache(served.tree)]
    return served(mx.array([list(prompt)] * len(slots)), cache=[*cache, RowEntry([greedy(s) for s in slots])])


def prompts(*lengths: int, vocab: int = VOCAB, seed: int = 0) -> list[list[int]]:
    """Random prompts."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocab, size=length).tolist() for length in lengths]


# --- training ------------------------------------------------------------------------------------


def examples(count: int, *, vocab: int = VOCAB, seed: int = 0, longest: int = 40) -> list[Encoded]:
    """Random training pairs of different lengths, prompts masked."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        length = int(rng.integers(8, longest))
        offset = int(rng.integers(2, length - 2))
        made.append(Encoded(tuple(rng.integers(3, vocab, size=length).tolist()), offset))
    return made


def settings(**changes: Any) -> TrainingSection:
    """A few quick steps of two micro-batches."""
    quick = {"batch_size": 2, "grad_accum": 2, "lr": 1e-2, "max_steps": 3, "eval_every": 0, "clip_norm": None}
    return TrainingSection(**{**quick, **changes})


def tree(base: nn.Module, names: Sequence[str] = ATTENTION, **options: Any) -> TrainingTree:
    """A training tree of rank 4."""
    return make_tree(
        base,
        find_targets(base, names),
        **{"rank": 4, "scale": 2.0, "dropout": 0.0, "seed": 5, **options},
    )


def trainer(base: nn.Module, data: Sequence[Encoded], section: TrainingSection, **options: Any) -> Trainer:
    """A trainer as the engine prepares it: the head on targets unless `full_head`; the rest goes to `tree`."""
    full_head = options.pop("full_head", False)
    narrow = options.pop("narrow", not section.grad_checkpoint)
    on_step = options.pop("on_step", lambda trainer: None)
    made = tree(base, grad_checkpoint=section.grad_checkpoint, **options)
    head = None if full_head else install_head(made.module, base.args.vocab_size, narrow=narrow)
    return Trainer(made, head, data, section, 1, on_step)


def drive(pieces: Iterable[Any], *, together: int = 1, between: Any = None) -> None:
    """Evaluate `together` pieces at once; `between` is called after each evaluation."""
    group: list[Any] = []
    for piece in pieces:
        group.append(piece)
        if len(group) == together or piece.barrier:
            mx.eval([p.arrays for p in group])
            group = []
            if between:
                between()
    mx.eval([p.arrays for p in group])


def losses(run: Trainer) -> list[float]:
    """The loss of each step."""
    return [row["loss"] for row in run.history.steps]


def equal(left: dict[str, mx.array], right: dict[str, mx.array]) -> bool:
    """Whether two flat trees are equal to the last bit."""
    return left.keys() == right.keys() and all(mx.array_equal(left[name], right[name]).item() for name in left)


def furthest(left: dict[str, mx.array], right: dict[str, mx.array]) -> float:
    """The largest difference of two flat trees."""
    assert left.keys() == right.keys()
    return max(mx.abs(left[name] - right[name]).max().item() for name in left)


# --- tokenizers ----------------------------------------------------------------------------------

SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "[UNK]")


def tokenizer(template: str | None = None) -> TokenizerWrapper:
    """One token for each printable character, newlines and pairs of them, and chat marks."""
    characters = [*map(chr, range(32, 127)), "\n", "\n\n"]
    words = {word: number for number, word in enumerate([*SPECIAL, *characters])}
    made = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = Split(Regex(r"\n\n|[\s\S]"), "isolated")
    made.decoder = Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="[UNK]",
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<think>", "</think>"],
    )
    fast.chat_template = template
    return TokenizerWrapper(fast)
