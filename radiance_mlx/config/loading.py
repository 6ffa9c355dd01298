"""Where a configuration comes from: flag over environment over file over the base's own values over default.

Every fault of every source is gathered and raised as one `ConfigError`; each names the path of its key,
where it was set, and the nearest key that exists.
"""

import difflib
import functools
import os
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
import yaml
from pydantic import BaseModel, ValidationError

from ..errors import ConfigError
from . import bases, document
from .schema import Config
from .wording import problem_of

ENV_PREFIX = "RADIANCE_"
#: environment variables of the commands, not of the configuration
OTHER_VARIABLES = {"RADIANCE_URL", "RADIANCE_HOME", "RADIANCE_CONFIG"}
#: what PyYAML raises: also for a day that no calendar has, thousands of digits, or nesting without end
NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)
#: what is told as where a value is from, and its values
Source = tuple[str, Mapping[str, Any]]
#: below this, every key is the user's own
FREE_FORM = "model.chat_template_args."


@dataclass(frozen=True)
class Loaded:
    """A configuration, the home folder it works in, and the file that it was read from (if any)."""

    config: Config
    home: Path
    file: Path | None


def load_config(
    *,
    config_file: Path | None = None,
    home: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Loaded:
    """Find and merge all sources. `flags` are dotted paths, as in `{"server.port": 8000}`.

    Raises `ConfigError` with every fault in `details`.
    """
    environ = os.environ if environ is None else environ
    home = home or _path(environ.get("RADIANCE_HOME"))
    file = _find_file(config_file or _path(environ.get("RADIANCE_CONFIG")), home)
    faults: list[dict[str, str]] = []
    sources: list[Source] = [
        (str(file), _read_file(file, faults) if file else {}),
        ("environment", _read_environment(environ, faults)),
        ("flag", _nested(flags or {}, "flag", faults)),
    ]
    _refuse_outside_the_file(sources[1:], faults)
    set_by_user = _merged(sources)
    base = set_by_user.get("base_model", Config.model_fields["base_model"].default)
    sources = [*_of_the_base(base, set_by_user.get("preset", "none")), *sources]
    config = _validate(_merged(sources), sources, faults)
    return Loaded(config, (home or (file.parent if file else _user_home())).absolute(), file)


def _of_the_base(base: Any, preset: Any) -> list[Source]:
    """What the base and the preset say, weakest first; nothing where their names are none."""
    if not isinstance(base, str):
        return []
    file = str(bases.own_file(base))
    sources: list[Source] = [(file, bases.recommended_values(base))]
    if isinstance(preset, str):
        for_any, for_this = bases.preset_values(base, preset)
        sources += [(f"preset {preset}", for_any), (file, for_this)]
    return sources


def _path(value: str | None) -> Path | None:
    return bases.expanded(value) if value else None


def _user_home() -> Path:
    return Path(platformdirs.user_data_dir("radiance_mlx", appauthor=False))


def _find_file(asked: Path | None, home: Path | None) -> Path | None:
    """`--config`, else `<home>/config.yaml` when a home is given, else `./config.yaml`, else none."""
    if asked is not None:
        if not asked.is_file():
            raise ConfigError(f"There is no configuration file {asked}.", "Check the path given with --config.")
        return asked
    candidate = (home or Path()) / "config.yaml"
    return candidate if candidate.is_file() else None


def _read_file(file: Path, faults: list[dict[str, str]]) -> dict[str, Any]:
    try:
        values, repeated = document.read(file.read_text(encoding="utf-8"))
    except (*NOT_YAML, OSError) as error:
        raise ConfigError(f"{file} cannot be read: {error}", "It must be YAML in UTF-8.") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must hold keys and values, not a {type(values).__name__}.")
    for key, lines in repeated:
        *first, last = map(str, lines)
        problem = f"is set {len(lines)} times, in lines {', '.join(first)} and {last}"
        faults.append({"key": key, "where": str(file), "problem": problem})
    sections = {name for name, info in Config.model_fields.items() if _is_section(info.annotation)}
    # a section whose keys are all commented out
    return {str(key): {} if value is None and key in sections else value for key, value in values.items()}


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _read_environment(environ: Mapping[str, str], faults: list[dict[str, str]]) -> dict[str, Any]:
    """`RADIANCE_BASE_MODEL`, `RADIANCE_TRAINING__LR`, …; lists and objects as YAML, which includes JSON."""
    known, flat = dict(known_paths()), {}
    for name, text in environ.items():
        if not name.upper().startswith(ENV_PREFIX) or name in OTHER_VARIABLES:
            continue
        path = name.upper().removeprefix(ENV_PREFIX).lower().replace("__", ".")
        free = path.startswith(FREE_FORM)
        if path not in known and not free:
            faults.append(_unknown(path, f"environment, {name}"))
            continue
        try:
            flat[path] = yaml.safe_load(text) if free else _value_of(text, known[path])
        except NOT_YAML as error:
            faults.append({"key": path, "where": f"environment, {name}", "problem": f"is not YAML: {error}"})
    return _nested(flat, "environment", faults)


def _value_of(text: str, kind: Any) -> Any:
    """A list or object where the key takes one; any other text stays text, whose numbers the schema reads."""
    kinds = [typing.get_origin(member) or member for member in _members(kind)]
    if not any(k in (list, dict) or _is_section(k) for k in kinds):
        return text
    value = yaml.safe_load(text)
    return value if isinstance(value, list | dict) else text


def _refuse_outside_the_file(sources: list[Source], faults: list[dict[str, str]]) -> None:
    """Code that comes with a model runs only for somebody who can write the configuration file."""
    for name, values in sources:
        section = values.get("model")
        if isinstance(section, dict) and section.get("trust_remote_code"):
            problem = "can only be set in the configuration file"
            faults.append({"key": "model.trust_remote_code", "where": name, "problem": problem})


def _nested(flat: Mapping[str, Any], where: str, faults: list[dict[str, str]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for path, value in flat.items():
        *sections, key = path.split(".")
        level: Any = out
        for section in sections:
            level = level.setdefault(section, {}) if isinstance(level, dict) else None
        if isinstance(level, dict):
            level[key] = value
        else:
            faults.append({"key": path, "where": where, "problem": f"{'.'.join(sections)} has been set to a value"})
    return out


def _merged(sources: list[Source]) -> dict[str, Any]:
    """All sources in one: the later a source, the stronger."""
    start: dict[str, Any] = {}
    return functools.reduce(_merge, (values for _, values in sources), start)


def _merge(low: dict[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(low)
    for key, value in high.items():
        inner = out.get(key)
        out[key] = _merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return out


def _validate(values: dict[str, Any], sources: list[Source], faults: list[dict[str, str]]) -> Config:
    config = None
    strangers = values.keys() - Config.model_fields.keys()  # some, as _env_file, mean something to pydantic-settings
    faults.extend(_unknown(path, _origin(path, sources)) for path in sorted(strangers))
    try:
        config = Config.model_validate({key: value for key, value in values.items() if key not in strangers})
    except ValidationError as error:
        for fault in error.errors():
            key = _key_of(fault["loc"])
            path = ".".join(str(part) for part in key)
            origin = _origin(path, sources)
            if fault["type"] == "extra_forbidden":
                faults.append(_unknown(path, origin))
            else:
                faults.append({"key": path, "where": origin, "problem": problem_of(fault, fault["loc"][len(key) :])})
    if faults or config is None:
        raise _as_error(faults)
    return config


def _key_of(loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Pydantic's path without the names of union members that it appends (`str`, `list[str]`, …)."""
    model: Any = Config
    for depth, part in enumerate(loc):
        if not (isinstance(model, type) and issubclass(model, BaseModel)) or part not in model.model_fields:
            extra_key = isinstance(model, type) and issubclass(model, BaseModel)
            return loc[: depth + 1] if extra_key else loc[:depth]
        model = model.model_fields[str(part)].annotation
    return loc


def _origin(path: str, sources: list[Source]) -> str:
    for name, values in sources[::-1]:
        level: Any = values
        for part in path.split("."):
            if not isinstance(level, dict) or part not in level:
                break
            level = level[part]
        else:
            return name
    return "configuration"


def _unknown(path: str, origin: str) -> dict[str, str]:
    fault = {"key": path, "where": origin, "problem": "there is no such key"}
    nearest = nearest_path(path)
    return {**fault, "nearest": nearest} if nearest else fault


def nearest_path(path: str) -> str | None:
    """The valid key that `path` most likely means: one with its last name, else one like its path, else its name."""
    names = [name for name, _ in known_paths()]
    by_leaf = {name.rsplit(".", 1)[-1]: name for name in reversed(names)}
    last = path.rsplit(".", 1)[-1]
    same = [name for name in names if name.rsplit(".", 1)[-1] == last]
    close = difflib.get_close_matches(path, same, n=1, cutoff=0) or difflib.get_close_matches(path, names, 1, 0.75)
    leaf = difflib.get_close_matches(last, by_leaf, n=1, cutoff=0.7)
    if not close and leaf:
        return by_leaf[leaf[0]]
    far = difflib.get_close_matches(path, names, n=1, cutoff=0.5)
    return next(iter(close or far), None)


def _as_error(faults: list[dict[str, str]]) -> ConfigError:
    lines = []
    for fault in faults:
        line = f"{fault['key'] or 'configuration'}: {fault['problem']} [{fault['where']}]"
        lines.append(line + (f"; did you mean {fault['nearest']}?" if "nearest" in fault else ""))
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    return ConfigError(
        f"The configuration has {count}:\n" + "\n".join(f"  - {line}" for line in lines),
        "Every key is explained in config.yaml.",
        faults,
    )


def _members(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def known_paths(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key as a dotted path, with its type; sections included."""
    for name, info in model.model_fields.items():
        yield prefix + name, info.annotation
        for member in _members(info.annotation):
            if isinstance(member, type) and issubclass(member, BaseModel):
                yield from known_paths(member, f"{prefix}{name}.")
