"""Configuration: the schema, and where its values come from."""

from .loading import Loaded, load_config
from .schema import Config

__all__ = ["Config", "Loaded", "load_config"]
