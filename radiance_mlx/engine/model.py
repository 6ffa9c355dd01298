"""The base model: loaded once through mlx-lm, told apart by a fingerprint."""

import contextlib
import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from mlx_lm import load as mlx_lm_load
from mlx_lm.utils import load_tokenizer

from ..config import Config
from ..config.bases import resolve
from ..errors import ConfigError, ModelError, RadianceError
from ..lora.encoding import ChatEncoder
from .layout import transpose_here, transpose_weights
from .sigmoid import by_powers, use_powers

_SAMPLE = 1 << 20


@dataclass(frozen=True)
class BaseModel:
    """A loaded base. `context` is its longest sequence in tokens, `fingerprint` tells bases apart."""

    module: nn.Module
    tokenizer: Any
    folder: Path
    fingerprint: str
    vocab_size: int
    context: int


def load_base(config: Config, *, cpu: bool) -> BaseModel:
    """Load `config.base_model`; on the CPU floating weights become float32 (half precision is slow there).

    How sigmoids are computed is set for the whole process.
    Raises `ConfigError` if what is configured names no model, else `ModelError`: what was looked for, and where.
    """
    where = resolve(config.base_model)
    if isinstance(where, Path) and not (where / "config.json").is_file():
        raise _wrong(f"{where} is not a model folder: it has no config.json.", "Give a folder in mlx-lm's format.")
    trust = config.model.trust_remote_code
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            module, tokenizer, facts = mlx_lm_load(
                str(where),
                tokenizer_config={"trust_remote_code": trust},
                revision=config.model.revision,
                return_config=True,
                trust_remote_code=trust,
            )
        folder = where if isinstance(where, Path) else _snapshot(where, config.model.revision)
    except Exception as error:  # the hub, safetensors, transformers and mlx-lm raise many kinds
        raise _explain(config.base_model, where, config.model.revision, error) from error
    if cpu:
        module.set_dtype(mx.float32)
        if config.serving.transpose == "auto" and transpose_here():
            transpose_weights(module)
    use_powers(by_powers(config.serving.sigmoid))
    module.freeze()
    module.eval()
    mx.eval(module.parameters())
    return BaseModel(module, tokenizer, folder, fingerprint(folder), _vocab_size(module, facts), _context(facts))


def load_encoder(config: Config) -> ChatEncoder:
    """The tokenizer of `config.base_model` alone, without its weights. Raises as `load_base`."""
    where = resolve(config.base_model)
    try:
        tokenizer = load_tokenizer(str(where), {"trust_remote_code": config.model.trust_remote_code})
    except Exception as error:  # as for `load_base`
        raise _explain(config.base_model, where, config.model.revision, error) from error
    return ChatEncoder(tokenizer, config.model.chat_template_args)


def _snapshot(name: str, revision: str | None) -> Path:
    """Where the hub's cache holds what has just been loaded."""
    return Path(snapshot_download(name, revision=revision, local_files_only=True))


def fingerprint(folder: Path) -> str:
    """A hash of configuration, tokenizer and weights; of large files the size and three samples are taken."""
    digest = hashlib.sha256()
    files = [*folder.glob("*.safetensors"), *folder.glob("config.json"), *folder.glob("tokenizer.json")]
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as handle:
            for start in sorted({0, max(0, size // 2 - _SAMPLE // 2), max(0, size - _SAMPLE)}):
                handle.seek(start)
                digest.update(handle.read(_SAMPLE))
    return digest.hexdigest()


def _wrong(said: str, hint: str, key: str = "base_model") -> ConfigError:
    return ConfigError(f"{key}: {said}", hint, [{"key": key, "problem": said}])


def _explain(name: str, where: Path | str, revision: str | None, error: Exception) -> RadianceError:
    kind = type(error).__name__
    if isinstance(where, Path):
        return ModelError(f"The model in {where} cannot be loaded: {error}", "It must be in mlx-lm's format.")
    if isinstance(error, RevisionNotFoundError):
        return _wrong(f"{where} has no revision {revision}.", "Name a branch, tag or commit.", "model.revision")
    if isinstance(error, RepositoryNotFoundError | HFValidationError) and not isinstance(error, GatedRepoError):
        return _wrong(f"there is no model {where} on the hub.", "Check the name; a private one needs HF_TOKEN.")
    return ModelError(
        f"The model {name} ({where}) cannot be loaded: {kind}: {str(error).splitlines()[0] if str(error) else ''}",
        "Check the name and the network (and HF_TOKEN for gated models), or give a local folder; "
        "nano is built in and needs no network.",
    )


def _vocab_size(module: nn.Module, facts: dict[str, Any]) -> int:
    text = {**facts, **facts.get("text_config", {})}
    embedding = next((m for _, m in module.named_modules() if hasattr(m, "as_linear")), None)
    return int(text.get("vocab_size") or (embedding.weight.shape[0] if embedding is not None else 0))


def _context(facts: dict[str, Any]) -> int:
    text = {**facts, **facts.get("text_config", {})}
    return int(text.get("max_position_embeddings") or text.get("n_ctx") or text.get("n_positions") or 4096)
