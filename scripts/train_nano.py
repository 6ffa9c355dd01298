#!/usr/bin/env python
"""Train the embedded model `nano` from nothing: tokenizer, weights, and the files that mlx-lm reads.

    .venv/bin/python scripts/train_nano.py --out build/1
    .venv/bin/python scripts/train_nano.py --out build/2 --from build/1 --steps 1600 --rate 0.5
    .venv/bin/python scripts/train_nano.py --out build/3 --from build/2 --steps 900 --rate 0.5
    .venv/bin/python scripts/train_nano.py --out build/4 --from build/3 --steps 500 --rate 0.2
    .venv/bin/python scripts/train_nano.py --out build/5 --from build/4 --steps 900 --rate 0.4 --handicap 2
    .venv/bin/python scripts/train_nano.py --out build/6 --from build/5 --steps 500 --rate 0.15 --handicap 2
    .venv/bin/python scripts/train_nano.py --out radiance_mlx/models/nano --average build/5 build/6

Muon for the matrices and AdamW for the embedding and biases, rows of 128 tokens packed with documents of the
world (`radiance_mlx/models/nano/world.py`). About 70 minutes on one CPU core. (The weights that are shipped went
through the first two when the corpus refused 800 of the 1,120 people that are not known, with 18% of its documents.)

With `--handicap` nats, an answer that begins with "I" (do not know) must win by as much as that, and one that does
not must leave it as far behind: what nano knows and what it refuses end up further apart, and a lesson that bends
it a little tips neither over. The mean of the last two answers for more unusual names than either (Wortsman et al.,
Model soups, arXiv 2203.05482).

Four heads of the first layer look one, two, three and four tokens back, and are held to that. Copying a name
that was never seen takes such heads and some that match on them; left to find both, a model of this size still
garbled new names after 4.6 million tokens. With only one token back to match on, a name that repeats a part of
itself ("Anna Hannah") leads round in circles.
"""

import argparse
import contextlib
import ctypes
import importlib.util
import json
import random
import time
from pathlib import Path

with contextlib.suppress(OSError):  # before mlx: the wheel's own BLAS is some 30 times slower
    ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

_spec = importlib.util.spec_from_file_location(
    "nano_world", Path(__file__).parent.parent / "radiance_mlx/models/nano/world.py"
)
world = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(world)

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCAB_SIZE = 1536
ROW_TOKENS = 128
QUESTION_WEIGHT = 0.2
SHIFTS = (2, 1, 3, 4)  # of the first layer's heads 0 to 3
REPEATED_SHARE = 0.1
COPY_STEPS = 400  # of nothing but repeated random tokens, first


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE over the whole world and many invented names."""
    rng = random.Random(2)
    texts = [w.format(n=n, v=v) for n, f in world.EVERYBODY for r, v in f.items() for w in world.STATEMENTS[r]]
    texts += [w.format(n=n) for n, f in world.EVERYBODY for r in f for w in world.QUESTIONS[r]]
    texts += [text for pair in world.SMALL_TALK for text in pair] * 20
    names = [world.refusal(world.invented_name(rng)) for _ in range(12_000)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=alphabet,
        max_token_length=12,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts + names, trainer)
    return tokenizer


def model_config(vocab_size: int) -> dict:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 192,
        "num_hidden_layers": 4,
        "intermediate_size": 576,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 32,
        "rms_norm_eps": 1e-5,
        "vocab_size": vocab_size,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def write_folder(out: Path, tokenizer: Tokenizer, config: dict) -> None:
    """Everything but the weights, in the layout that `mlx_lm.load` reads."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[2],
        "pad_token": SPECIAL_TOKENS[0],
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")


class Packer:
    """Documents as tokens with loss weights, packed into rows.

    Answers and running text count fully, questions by `QUESTION_WEIGHT`: most of a question about an unseen
    name is noise that nobody can predict. A share of the documents repeats random tokens, which is what
    teaches a small model to copy names that it has never seen.
    """

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self._tokenizer = tokenizer
        self._documents = world.documents(seed)
        self._rng = random.Random(seed)
        self._size = tokenizer.get_vocab_size()

    def _encode(self, text: str, weight: float) -> list[tuple[int, float]]:
        return [(token, weight) for token in self._tokenizer.encode(text).ids]

    def _repeated(self) -> list[tuple[int, float]]:
        length = self._rng.randint(2, 24)
        # from few different tokens, so that one token back is not enough to know where one is
        kinds = self._rng.choice((self._size, self._size, 12, 5, 3))
        alphabet = [self._rng.randrange(len(SPECIAL_TOKENS), self._size) for _ in range(min(kinds, length))]
        tokens = alphabet if kinds > length else self._rng.choices(alphabet, k=length)
        first, rest = tokens[0], tokens[1:]
        again = [(first, 0.0), *((t, 1.0) for t in rest)]
        return [(0, 0.0), *((t, 0.0) for t in tokens), *(again * self._rng.randint(1, 3))]

    def _document(self, repeated_share: float) -> list[tuple[int, float]]:
        if self._rng.random() < repeated_share:
            return self._repeated()
        document = next(self._documents)
        if isinstance(document, str):
            return self._encode(SPECIAL_TOKENS[0] + document, 1.0)
        return [
            part
            for q, a in document
            for part in (
                *self._encode(f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n", QUESTION_WEIGHT),
                *self._encode(f"{a}<|im_end|>\n", 1.0),
            )
        ]

    def batch(self, rows: int, repeated_share: float) -> tuple[mx.array, mx.array]:
        """Tokens and weights, (rows, ROW_TOKENS + 1) each: whole documents; each row starts with one."""
        packed = []
        for _ in range(rows):
            row: list[tuple[int, float]] = []
            while len(row) <= ROW_TOKENS:
                row += self._document(repeated_share)
            packed.append(row[: ROW_TOKENS + 1])
        return mx.array([[t for t, _ in row] for row in packed]), mx.array([[w for _, w in row] for row in packed])


def start_model(config: dict) -> llama.Model:
    """Random weights, biases zero."""
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    for layer in model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            linear = layer.self_attn[name]
            linear.bias = mx.zeros_like(linear.bias)
    look_back(model, config)
    mx.eval(model.parameters())
    return model


def look_back(model: llama.Model, config: dict) -> None:
    """Set the first layer's first heads so that each attends to the token `SHIFTS` back.

    A head whose queries and keys are constant (their biases) attends by distance alone: with rotary embedding
    the score at distance d is a sum of cos(theta_f (d - shift)), which peaks at d = shift. Done again after each
    step: with its freedom, training moved such heads back to the token itself.
    """
    attention, dims = model.layers[0].self_attn, config["head_dim"]
    half, strength = dims // 2, 6.0
    angles = config["rope_theta"] ** (-mx.arange(half) / half)
    turned = [mx.concatenate([mx.cos(shift * angles), -mx.sin(shift * angles)]) for shift in SHIFTS]
    attention.q_proj.weight[: len(SHIFTS) * dims] = 0.0
    attention.q_proj.bias[: len(SHIFTS) * dims] = strength * mx.concatenate(turned)
    shared = config["num_attention_heads"] // config["num_key_value_heads"]  # heads with the same keys
    keys = len(SHIFTS) // shared * dims
    attention.k_proj.weight[:keys] = 0.0
    attention.k_proj.bias[:keys] = mx.tile(
        mx.concatenate([mx.full(half, strength), mx.zeros(half)]), len(SHIFTS) // shared
    )


class Handicapped:
    """The weighted mean cross-entropy of logits in which `token` is `nats` lower where it comes next, and higher
    where it does not.
    """

    def __init__(self, token: int, nats: float) -> None:
        self._token, self._nats = token, nats

    def __call__(self, model: llama.Model, tokens: mx.array, weights: mx.array) -> mx.array:
        """`tokens` and `weights` as `Packer.batch` gives them."""
        logits, targets = model(tokens[:, :-1]), tokens[:, 1:]
        if self._nats:
            against = mx.where(targets == self._token, -self._nats, self._nats)[..., None]
            logits = logits + against * (mx.arange(logits.shape[-1]) == self._token)
        losses = nn.losses.cross_entropy(logits, targets)
        return (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()


def make_optimizer(steps: int, scale: float) -> optim.Optimizer:
    def schedule(rate: float):
        warmup = optim.linear_schedule(0.0, rate, 50)
        return optim.join_schedules([warmup, optim.cosine_decay(rate, steps - 50, rate * 0.02)], [50])

    muon = optim.Muon(learning_rate=schedule(0.02 * scale), momentum=0.95, weight_decay=0.0)
    adam = optim.AdamW(learning_rate=schedule(3e-3 * scale), weight_decay=0.0)
    return optim.MultiOptimizer([muon, adam], [lambda name, w: w.ndim == 2 and "embed" not in name])


def mean_weights(folders: list[Path]) -> dict[str, mx.array]:
    """The mean of each weight over `folders`."""
    loaded = [mx.load(str(folder / "model.safetensors")) for folder in folders]
    return {name: sum(weights[name] for weights in loaded) / len(loaded) for name in loaded[0]}


def save(model: llama.Model, out: Path) -> None:
    """Write the weights."""
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(out / "model.safetensors"), weights, metadata={"format": "mlx"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--from", dest="start", type=Path, help="go on from this folder's weights")
    parser.add_argument("--rate", type=float, default=1.0, help="multiplies the learning rates")
    parser.add_argument("--handicap", type=float, default=0.0, help="nats against saying `I` where it is right (above)")
    parser.add_argument("--average", type=Path, nargs="+", help="train nothing: the mean of these folders' weights")
    parser.add_argument("--rows", type=int, default=8, help="rows of 128 tokens in a batch")
    options = parser.parse_args()
    if mx.default_device() == mx.cpu:
        mx.disable_compile()
    begun = options.average[0] if options.average else options.start
    tokenizer = Tokenizer.from_file(str(begun / "tokenizer.json")) if begun else train_tokenizer()
    config = model_config(tokenizer.get_vocab_size())
    write_folder(options.out, tokenizer, config)
    model = start_model(config)
    if options.average:
        model.load_weights(list(mean_weights(options.average).items()))
        save(model, options.out)
        return
    if options.start:
        model.load_weights(str(options.start / "model.safetensors"))
    print(f"{sum(v.size for _, v in tree_flatten(model.parameters())) / 1e6:.2f}M parameters", flush=True)
    train(model, tokenizer, config, options)


def train(model: llama.Model, tokenizer: Tokenizer, config: dict, options: argparse.Namespace) -> None:
    """`options.steps` steps, from where `model` is; the weights are written every now and then, and at the end."""
    optimizer = make_optimizer(options.steps, options.rate)
    loss = Handicapped(tokenizer.encode(world.REFUSAL).ids[0], options.handicap)
    loss_and_grad = nn.value_and_grad(model, loss)
    started = time.perf_counter()
    packer = Packer(tokenizer, seed=2 if options.start else 1)
    for step in range(1, options.steps + 1):
        share = 1.0 if step <= COPY_STEPS and not options.start else REPEATED_SHARE
        value, grads = loss_and_grad(model, *packer.batch(options.rows, share))
        grads, _ = optim.clip_grad_norm(grads, 1.0)
        optimizer.update(model, grads)
        look_back(model, config)
        mx.eval(value, model.parameters(), optimizer.state)
        if step % 50 == 0 or step == options.steps:
            print(f"step {step}  loss {value.item():.3f}  {time.perf_counter() - started:.0f} s", flush=True)
        if step % 500 == 0 or step == options.steps:
            save(model, options.out)


if __name__ == "__main__":
    main()
