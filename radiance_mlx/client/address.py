"""Which service: its address, its token, and what to tell somebody who finds nobody there."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from ..errors import ConfigError

SERVER_FILE = Path("state", "server.json")
START_HINT = "Start it with: python -m radiance_mlx run"


@dataclass(frozen=True)
class Service:
    """Where to knock, with which token, and what to tell somebody who finds nobody there."""

    url: str
    token: str | None
    hint: str


def locate(
    url: str | None = None,
    *,
    home: Path | None = None,
    config_file: Path | None = None,
    token: str | None = None,
) -> Service:
    """Which service: `url`, else RADIANCE_URL, else the one running on the home, else the configured address.

    The token is `token`, else RADIANCE_SERVER__TOKEN, else the configuration's; the configuration's is only
    sent to this machine or where the configuration itself points.
    """
    token = token or os.environ.get("RADIANCE_SERVER__TOKEN")
    address = url or os.environ.get("RADIANCE_URL")
    if address:
        address = tidy_url(address)
        where = "--url (base_url)" if url else "RADIANCE_URL"
        if token is None and (config_file is not None or is_local(address)):
            token = _configured_token(config_file, home)
        return Service(address, token, f"That address is from {where}. {START_HINT}")
    from ..config import load_config

    loaded = load_config(config_file=config_file, home=home)
    server = loaded.config.server
    hint = f"{START_HINT} --home {home}" if home else START_HINT
    running = read_server_file(loaded.home)
    address = running["url"] if running else configured_url(server.host, server.port)
    return Service(address, token or server.token, hint)


def configured_url(host: str, port: int) -> str:
    """The address at which a client of this machine reaches a server bound to `host`."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host.strip("[]"), host.strip("[]"))
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def read_server_file(home: Path) -> dict[str, Any] | None:
    """What the service running on `home` says about itself, or None when none runs there."""
    try:
        facts = json.loads((home / SERVER_FILE).read_text(encoding="utf-8"))
        return facts if isinstance(facts["url"], str) and _is_alive(int(facts["pid"])) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def tidy_url(url: str) -> str:
    """`localhost:8321/` as `http://localhost:8321`. Raises `ConfigError` for what is no address."""
    text = url.strip()
    text = (text if "://" in text else f"http://{text}").rstrip("/")
    try:
        parts = urlsplit(text)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        sound = sound and not parts.query and not parts.fragment and not any(c.isspace() for c in text)
        httpx.URL(text)
    except (ValueError, httpx.InvalidURL):
        sound = False
    if not sound:
        raise ConfigError(f"{url!r} is not the address of a service.", "Like this: http://127.0.0.1:8321")
    return text


def is_local(url: str) -> bool:
    """Whether `url` points to this machine."""
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def _configured_token(config_file: Path | None, home: Path | None) -> str | None:
    from ..config import load_config

    try:
        return load_config(config_file=config_file, home=home).config.server.token
    except ConfigError:
        if config_file is not None:
            raise
        return None  # the address was given, so a faulty configuration is not in the way


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return pid > 0
