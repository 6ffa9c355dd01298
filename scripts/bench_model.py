#!/usr/bin/env python
"""Make a random-weight Qwen3 and a tokenizer of 16,384 entries for the benchmarks: nothing is downloaded.

    .venv/bin/python scripts/bench_model.py build/bench-model --size small

As in Qwen3-0.6B a quarter of the weights is the embedding, tied to the head. Random weights cost as much time as
trained ones; what they say means nothing.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

VOCAB_SIZE = 16_384
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: hidden size, layers, intermediate size, heads, key-value heads, head dimension
SIZES = {
    "tiny": (128, 2, 384, 4, 2, 32),
    "small": (512, 8, 1536, 8, 4, 64),
    "medium": (768, 12, 2304, 12, 6, 64),
}
#: shapes of Qwen3 itself, whose vocabulary has 151,936 entries
QWEN3_SIZES = {
    "0.6b": (1024, 28, 3072, 16, 8, 128),
    "8b": (4096, 36, 12288, 32, 8, 128),
}
_SYLLABLES = [a + b for a in "b d f g k l m n p r s t v z br st tr".split() for b in "a e i o u an el or".split()]


def words(count: int, seed: int) -> str:
    """That many made-up words; the same for the same seed."""
    rng = random.Random(seed)
    return " ".join("".join(rng.choices(_SYLLABLES, k=rng.choice((1, 2, 2, 3)))) for _ in range(count))


def model_config(size: str) -> dict[str, Any]:
    """What mlx-lm reads as `config.json`."""
    hidden, layers, intermediate, heads, kv_heads, head_dim = (SIZES | QWEN3_SIZES)[size]
    return {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": 1e-6,
        "vocab_size": 151_936 if size in QWEN3_SIZES else VOCAB_SIZE,
        "rope_theta": 1e6,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": size != "8b",
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE over made-up words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((words(1000, seed) for seed in range(200)), trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise SystemExit(f"the made-up words gave {tokenizer.get_vocab_size()} entries, not {VOCAB_SIZE}")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[2],
        "pad_token": SPECIAL_TOKENS[0],
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_model(folder: Path, size: str, dtype: str = "float32") -> float:
    """Everything that `mlx_lm.load` reads; millions of parameters."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import qwen3

    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(model_config(size), indent=2) + "\n")
    mx.random.seed(0)
    model = qwen3.Model(qwen3.ModelArgs.from_dict(model_config(size)))
    model.set_dtype(getattr(mx, dtype))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    return float(sum(w.size for w in weights.values())) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    print(f"{write_model(options.folder, options.size, options.dtype):.1f}M parameters in {options.folder}")


if __name__ == "__main__":
    main()
