"""Names of base models: the embedded one, short names, folders, hub names; and the values a base recommends.

A model folder may hold `radiance.json`: configuration that suits this base (learning rate, modules, steps).
It lies under everything that the user sets.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from ..errors import ConfigError

NANO_FOLDER = Path(__file__).parent.parent / "models" / "nano"
RECOMMENDED_SECTIONS = ("lora", "training", "batch")
#: what a base's own presets may say: a model folder is somebody else's, and may open nothing
PRESET_KEYS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys((*RECOMMENDED_SECTIONS, "replay", "rehearsal"), ()),  # every key
    "evaluation": ("metric", "catastrophic_delta", "confidence"),
    "serving": ("merge_toward_base",),
}

#: a model or somebody's model; what is none of both can only be a path
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
#: short names → hub folders that mlx-lm loads
SHORT_NAMES = {
    "mistral-7b": "mlx-community/Mistral-7B-Instruct-v0.3-4bit",
    "mistral-7b-instruct": "mlx-community/Mistral-7B-Instruct-v0.3-4bit",
    "llama-3.2-1b": "mlx-community/Llama-3.2-1B-Instruct-4bit",
    "llama-3.2-3b": "mlx-community/Llama-3.2-3B-Instruct-4bit",
    "llama-3.1-8b": "mlx-community/Meta-Llama-3.1-8B-Instruct-4bit",
    "qwen3-0.6b": "mlx-community/Qwen3-0.6B-4bit",
    "qwen3-1.7b": "mlx-community/Qwen3-1.7B-4bit",
    "qwen3-4b": "mlx-community/Qwen3-4B-4bit",
    "qwen3-8b": "mlx-community/Qwen3-8B-4bit",
    "gemma-3-1b": "mlx-community/gemma-3-1b-it-4bit",
    "phi-3.5-mini": "mlx-community/Phi-3.5-mini-instruct-4bit",
}


def resolve(name: str) -> Path | str:
    """A local folder as a `Path`, or a hub name as a string."""
    if name == "nano":
        return NANO_FOLDER
    folder = expanded(name)
    if os.path.isdir(folder):  # unlike Path's own, no error for a name that no file can have
        return folder.resolve()
    if os.path.exists(folder):
        raise _no_base(f"{name} is a file, not a folder", "no folder")
    if not HUB_NAME.fullmatch(name):
        raise _no_base(f"there is no folder {name}", "no such folder")
    return SHORT_NAMES.get(name, name)


def _no_base(said: str, problem: str) -> ConfigError:
    return ConfigError(
        f"base_model: {said}.",
        "Check the path; nano is built in, names without a path are looked up on the hub.",
        [{"key": "base_model", "problem": problem}],
    )


def expanded(path: str) -> Path:
    """`path` with the home folder for `~`; `~somebody` stays as it is when there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


#: what a preset turns on for any base; a base's own `radiance.json` may say more under `presets`
PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    "lasting": {"replay": {"fraction": 0.5}, "rehearsal": {"kl_weight": 3.0, "rewording": True}},
}


def recommended_values(name: str) -> dict[str, Any]:
    """The sections of the base's own `radiance.json`, or nothing. Raises `ConfigError` if it is not JSON."""
    return {key: value for key, value in _own_values(name).items() if key in RECOMMENDED_SECTIONS}


def preset_values(name: str, preset: str) -> list[dict[str, Any]]:
    """What a preset means, weakest first: for any base, and for this one. Unknown presets mean nothing here."""
    own = _own_values(name).get("presets")
    values = own.get(preset) if isinstance(own, dict) else None
    return [PRESETS.get(preset, {}), _allowed(values) if isinstance(values, dict) else {}]


def _allowed(values: dict[str, Any]) -> dict[str, Any]:
    """Only the sections, and of some only the keys, that are a preset's affair."""
    return {
        section: {key: value for key, value in given.items() if not PRESET_KEYS[section] or key in PRESET_KEYS[section]}
        for section, given in values.items()
        if section in PRESET_KEYS and isinstance(given, dict)
    }


def own_file(name: str) -> Path | None:
    """Where the base itself says how it likes to be taught, if it does."""
    where = resolve(name)
    file = where / "radiance.json" if isinstance(where, Path) else None
    return file if file is not None and file.is_file() else None


def _own_values(name: str) -> dict[str, Any]:
    file = own_file(name)
    if file is None:
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must hold an object, not a {type(values).__name__}.")
    return values
