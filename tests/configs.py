"""A configuration in a test: read from a file, variables and flags, or refused."""

import pytest

from radiance_mlx.config import load_config
from radiance_mlx.errors import ConfigError


def load(tmp_path, text="", environ=None, **flags):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    named = {key.replace("__", "."): value for key, value in flags.items()}
    return load_config(config_file=file, environ=environ or {}, flags=named).config


def faults(tmp_path, text="", environ=None, **flags):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, environ, **flags)
    return caught.value
