"""What both clients are made of: the service they speak to, and httpx's settings for it."""

from pathlib import Path
from typing import Any

import httpx

from .address import is_local, locate, tidy_url
from .wire import authorization

TIMEOUT_S = 300.0
CONNECT_TIMEOUT_S = 5.0


def settings(
    base_url: str | None, api_key: str | None, timeout: float, home: Path | None, config_file: Path | None
) -> tuple[str, str, dict[str, Any]]:
    """(address, what to do if nobody is there, httpx's arguments). Raises `ConfigError`."""
    if base_url is not None:
        base_url = tidy_url(base_url)
    service = locate(base_url, home=home, config_file=config_file, token=api_key)
    url = tidy_url(service.url)
    arguments = {
        "base_url": url,
        "headers": authorization(service.token),
        "timeout": httpx.Timeout(timeout, connect=min(CONNECT_TIMEOUT_S, timeout)),
        "trust_env": not is_local(url),  # a proxy for the web must not take requests to this machine
        "verify": url.startswith("https"),  # plain HTTP needs no certificates: saves reading them
    }
    return url, service.hint, arguments
