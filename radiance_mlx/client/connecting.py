"""What both clients are made of: the service they speak to, and httpx's settings for it."""

from pathlib import Path
from typing import Any

import httpx

from ..errors import ConfigError
from . import arguments
from .address import is_local, locate, tidy_url
from .retrying import Retry
from .wire import authorization

TIMEOUT_S = 300.0
CONNECT_TIMEOUT_S = 5.0
LONGEST_TIMEOUT_S = 366 * 86400.0  # no socket takes any number


def settings(
    base_url: str | None, api_key: str | None, timeout: float, home: str | Path | None, config_file: str | Path | None
) -> tuple[str, str, dict[str, Any]]:
    """(address, what to do if nobody is there, httpx's arguments). Raises `ConfigError` that names the argument."""
    if base_url is not None:
        base_url = _address(base_url)
    if api_key is not None and not isinstance(api_key, str):
        raise ConfigError("api_key is no text.", "api_key takes the service's token, or None.")  # never shown
    if not arguments.is_number(timeout) or not 0 < timeout <= LONGEST_TIMEOUT_S:
        raise arguments.unfit("timeout", timeout, "seconds: a number above 0, a year's at most")
    home, config_file = arguments.path("home", home), arguments.path("config_file", config_file)
    service = locate(base_url, home=home, config_file=config_file, token=api_key)
    url = tidy_url(service.url)
    options = {
        "base_url": url,
        "headers": authorization(service.token),
        "timeout": httpx.Timeout(float(timeout), connect=min(CONNECT_TIMEOUT_S, float(timeout))),
        "trust_env": not is_local(url),  # a proxy for the web must not take requests to this machine
        "verify": url.startswith("https"),  # plain HTTP needs no certificates: saves reading them
    }
    return url, service.hint, options


def require(retry: object, sleep: object) -> None:
    """Raises `ConfigError` unless they are what clients make calls again with."""
    if not isinstance(retry, Retry):
        raise arguments.unfit("retry", retry, "a Retry, such as Retry(attempts=3)")
    if not callable(sleep):
        raise arguments.unfit("sleep", sleep, "a function of seconds")


def _address(base_url: object) -> str:
    name, takes = "base_url (--url)", "the address of a service, such as http://127.0.0.1:8321"
    if not isinstance(base_url, str):
        raise arguments.unfit(name, base_url, takes)
    try:
        return tidy_url(base_url)
    except ConfigError:
        raise arguments.unfit(name, base_url, takes) from None
