"""`serve`: the service and uvicorn in one process, from start to a clean end.

The first signal only sets flags: it stops in good order with exit code 0. A second one ends the process at once,
with 128 and its number: nothing durable depends on a clean end. uvicorn's own handlers are not installed, since they
raise the signal again after the shutdown.
"""

import asyncio
import contextlib
import gc
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import structlog
import uvicorn

from ..config import Loaded
from ..config.schema import ServerSection
from ..errors import ConfigError, RadianceError
from ..messages import iso
from ..service import Service
from ..store import write_durably
from .app import make_app

Announce = Callable[[str, dict[str, Any]], None]
GRACE_S = 4
ANSWER_S = 1.0  # what can be answered in so long after a signal is
STOP_S = 9
STOPPING = (signal.SIGINT, signal.SIGTERM)
log = structlog.get_logger(__name__)


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(loaded: Loaded, announce: Announce) -> int:
    """Run until a signal; the exit code. `announce` is told "listening", "ready" and "warning".

    Raises `RadianceError` before anything listens: a locked home, a taken port.
    """
    _configure_logging(loaded.config.server.log_level)
    try:
        return asyncio.run(_serve(loaded, announce))
    finally:  # the loop took its handlers with it
        for number in STOPPING:
            signal.signal(number, _exit_at_once)


async def _serve(loaded: Loaded, announce: Announce) -> int:
    started = time.perf_counter()
    failures: list[BaseException] = []
    service = Service(loaded, on_death=lambda error: _end(server, failures, error))
    listener = _listen(loaded.config.server)
    try:
        service.open()
    except BaseException:
        listener.close()
        raise
    server = _Server(
        uvicorn.Config(
            make_app(service),
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=GRACE_S,
            timeout_keep_alive=30,
            lifespan="off",
            server_header=False,
        )
    )
    asked_to_stop = asyncio.Event()
    _handle_signals(server, asked_to_stop)
    url = _write_address(loaded, listener)
    announce(
        "listening",
        {
            "url": url,
            "home": str(loaded.home),
            "base_model": loaded.config.base_model,
            "pid": os.getpid(),
        },
    )
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    starting = asyncio.create_task(_start(service, announce, started))
    ending = asyncio.create_task(_end_requests(service, asked_to_stop))
    try:
        await asyncio.wait({serving, starting}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()  # raises what kept the service from starting
            await serving
    except RadianceError as error:
        failures.append(error)
        raise
    finally:
        starting.cancel()
        ending.cancel()
        await service.stop()
        server.should_exit = True
        with contextlib.suppress(Exception):
            await serving
        (loaded.home / "state" / "server.json").unlink(missing_ok=True)
    return 1 if failures else 0


async def _start(service: Service, announce: Announce, started: float) -> None:
    await service.start()
    gc.collect()
    gc.freeze()  # what is loaded stays loaded: the collection after each batch looks at the rest, 0.1 instead of 40 ms
    facts = service.facts
    assert facts is not None
    checkpoint, status = service.current
    announce(
        "ready",
        {
            "base_model": facts.base_model,
            "checkpoint": checkpoint,
            "checkpoint_status": status,
            "backend": facts.backend,
            "device": facts.device,
            "seconds": round(time.perf_counter() - started, 2),
        },
    )
    for message in (await service.info())["warnings"]:
        announce("warning", {"message": message})


async def _end_requests(service: Service, asked_to_stop: asyncio.Event) -> None:
    """A short answer is finished; who waits for a long one is told, before uvicorn would cut the connection."""
    await asked_to_stop.wait()
    await asyncio.sleep(ANSWER_S)
    await service.stop()


def _end(server: _Server, failures: list[BaseException], error: BaseException) -> None:
    failures.append(error)
    server.should_exit = True


def _handle_signals(server: _Server, asked_to_stop: asyncio.Event) -> None:
    """The first signal is answered on the loop; one more ends the process, however busy the loop is then."""
    loop = asyncio.get_running_loop()
    signals = 0

    def count(number: int, frame: Any) -> None:
        nonlocal signals
        signals += 1
        if signals > 1 or server.should_exit:
            _exit_at_once(number, frame)

    def stop(number: int) -> None:
        log.info("stopping", signal=signal.Signals(number).name)
        server.should_exit = True
        asked_to_stop.set()
        _end_in_time()

    for number in STOPPING:
        loop.add_signal_handler(number, stop, number)  # sees to it that a signal wakes the loop
        signal.signal(number, count)  # in place of asyncio's own, which does nothing
        signal.siginterrupt(number, False)


def _exit_at_once(number: int, _: Any) -> None:
    os._exit(128 + number)


def _end_in_time() -> None:
    """Nothing durable depends on a clean end: one that takes too long (a model that loads) is cut short."""
    timer = threading.Timer(STOP_S, os._exit, (0,))
    timer.daemon = True
    timer.start()


def _listen(settings: ServerSection) -> socket.socket:
    """Bind before anything else is done, so that a taken port is one clear error."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # the protocol must be named: only then does asyncio turn Nagle's algorithm off on accepted connections,
    # and without that each answer on a kept-alive connection waits 40 ms for the client's delayed ACK
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host.strip("[]"), settings.port))
        listener.listen(2048)  # only now is the port surely ours
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"Cannot listen on {settings.host}:{settings.port}: {error.strerror or error}.",
            "Another service may run there: choose a port with --port (0 takes a free one).",
            [{"key": "server.port", "problem": str(error)}],
        ) from error
    return listener


def _write_address(loaded: Loaded, listener: socket.socket) -> str:
    host, port = loaded.config.server.host, listener.getsockname()[1]
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    url = f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"
    document = {"url": url, "pid": os.getpid(), "started": iso(time.time())}
    write_durably(loaded.home / "state" / "server.json", json.dumps(document).encode())
    return url


def _is_news(record: logging.LogRecord) -> bool:
    """All but transformers' remark on a text that is too long: we cut or refuse it, and say so to who sent it."""
    return "Token indices sequence length is longer than" not in record.getMessage()


def _configure_logging(level: str) -> None:
    """One line an event on stderr; libraries' warnings too."""
    number = getattr(logging, level.upper())
    logging.basicConfig(level=max(number, logging.WARNING), stream=sys.stderr, format="%(name)s: %(message)s")
    logging.getLogger("transformers.tokenization_utils_base").addFilter(_is_news)
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(number),
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S"),
            # plain: the boxed ones show local variables, which may be somebody's prompts
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
            ),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
