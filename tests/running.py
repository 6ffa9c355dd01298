"""The real service in a test: in this process with its event loop in a thread, or as a process of its own."""

import asyncio
import contextlib
import faulthandler
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import httpx
import uvicorn

from radiance_mlx.api.app import make_app
from radiance_mlx.config import load_config
from radiance_mlx.messages import FINAL_STATES, STABLE, Answer, Example, Generate, Sampling
from radiance_mlx.models.nano import world
from radiance_mlx.service import Service
from radiance_mlx.store import CheckpointRecord, JobRecord, Store

T = TypeVar("T")
REPOSITORY = Path(__file__).parent.parent
PATIENCE_S = 60.0

#: people that nano does not know, as (question, answer)
FACTS = [(world.ask(n, "city"), world.answer(n, "city", f["city"])) for n, f in world.STRANGERS]
REFUSALS = [world.refusal(n) for n, _ in world.STRANGERS]
#: where learning is not the point
QUICK = {
    "update_mode": "immediate",
    "training.max_steps": 3,
    "training.batch_size": 1,
    "evaluation.anchor_provider": "none",
}
#: updates wait for company
BATCHED = {**QUICK, "update_mode": "batched", "batch.max_examples": 3}
#: for what must be met in the middle of training
ENDLESS = {**QUICK, "training.max_steps": 1_000_000}


def question(i: int) -> str:
    return FACTS[i][0]


def example(question: str, answer: str) -> Example:
    return Example(messages=(("user", question), ("assistant", answer)))


def until(condition: Callable[[], T], what: str = "", patience_s: float = PATIENCE_S) -> T:
    """The first true value of `condition`; fails the test if none comes."""
    deadline = time.monotonic() + patience_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            faulthandler.dump_traceback(sys.__stderr__)  # what every thread waits for
            raise AssertionError(f"never came: {what or condition}")
        time.sleep(0.01)
    return value


class LoopThread:
    """An event loop that runs beside the test."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="test-loop", daemon=True)
        self._thread.start()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(PATIENCE_S)

    def close(self) -> None:
        self.call(self.loop.shutdown_default_executor())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(PATIENCE_S)
        self.loop.close()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@cache
def set_apart_what_is_loaded() -> None:
    """As the server does once it has started: the collection after each batch then looks at the rest alone.

    Libraries only, before there is any engine: what is set apart is never collected.
    """
    importlib.import_module("radiance_mlx.engine.core")
    gc.collect()
    gc.freeze()


class Running:
    """A `Service` that has been started, and plain calls to it."""

    def __init__(self, home: Path, flags: Mapping[str, Any], clock: Callable[[], float] = time.time) -> None:
        set_apart_what_is_loaded()
        self.home = home
        self.deaths: list[BaseException] = []
        self._thread = LoopThread()
        self.service = Service(load_config(home=home, flags=flags, environ={}), self.deaths.append, clock)
        try:
            self.service.open()
            self.call(self.service.start())
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        try:
            self.call(self.service.stop())
        finally:
            self._thread.close()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        return self._thread.call(work)

    def engine(self, task: Callable[[Any], T]) -> T:
        """Run a function of the engine on its thread."""
        return self.call(self.service._engine.call(task))

    def store(self, work: Callable[[Any], T]) -> T:
        """Run a function of the store on its thread."""
        return self.call(self.service._store(work))

    # --- in the words of the API -----------------------------------------------------------------

    def ask(self, question: str, **options: Any) -> Answer:
        return self.call(self.service.search(request(question, **options)))

    def post(self, *facts: tuple[str, str] | Example, tags: Sequence[str] = ()) -> str:
        return self.post_many([facts], tags)[0]

    def post_many(self, updates: Sequence[Sequence[tuple[str, str] | Example]], tags: Sequence[str] = ()) -> list[str]:
        """Several updates, accepted before the scheduler looks at any."""
        return self.call(self._post_many(updates, tags))

    async def _post_many(self, updates: Sequence[Sequence[Any]], tags: Sequence[str]) -> list[str]:
        jobs = []
        wake, self.service._scheduler.wake = self.service._scheduler.wake, lambda: None
        for facts in updates:
            examples = [f if isinstance(f, Example) else example(*f) for f in facts]
            raw = json.dumps([e.as_dict() for e in examples]).encode()
            jobs.append((await self.service.update(examples, tags, raw=raw))[0].job_id)
        self.service._scheduler.wake = wake
        wake()
        return jobs

    def job(self, job_id: str) -> JobRecord:
        return self.call(self.service.job(job_id))

    def wait(self, job_id: str, *states: str) -> JobRecord:
        """The job once it is in one of `states` (by default: ended)."""
        wanted = states or FINAL_STATES

        def there() -> JobRecord | None:
            job = self.job(job_id)
            assert job.state in wanted or job.state not in FINAL_STATES, f"{job.state}: {job.error}"
            return job if job.state in wanted else None

        return until(there, f"{job_id} {'/'.join(sorted(wanted))}")

    def learn(self, *facts: tuple[str, str] | Example) -> str:
        """Post and train; the checkpoint that came of it."""
        job = self.wait(self.post(*facts), "published")
        assert job.checkpoint is not None
        return job.checkpoint

    def wait_for_step(self, step: int = 1, job_id: str | None = None) -> str:
        """The id of the checkpoint that trains (of `job_id`: the one before may still be there), at `step`."""

        def far_enough() -> str | None:
            running = self.service._scheduler.running
            if not running or (job_id and job_id not in running.jobs):
                return None
            return running.checkpoint if running.progress and running.progress.step >= step else None

        return until(far_enough, f"step {step}")

    @property
    def current(self) -> str:
        return self.service.current[0]

    def checkpoints(self) -> dict[str, CheckpointRecord]:
        return {record.checkpoint: record for record in self.call(self.service.checkpoints())}

    def info(self) -> dict[str, Any]:
        return self.call(self.service.info())

    def folder(self, checkpoint: str) -> Path:
        return self.home / "adapters" / checkpoint


def request(
    question: str,
    *,
    checkpoint: str = STABLE,
    training: bool = False,
    stream: bool = False,
    max_tokens: int = 24,
    temperature: float = 0.0,
    **sampling: Any,
) -> Generate:
    drawn = Sampling(max_tokens=max_tokens, temperature=temperature, **sampling)
    return Generate((("user", question),), checkpoint, sampling=drawn, training=training, stream=stream)


@contextlib.contextmanager
def running(
    home: Path, flags: Mapping[str, Any] = QUICK, *, clock: Callable[[], float] = time.time, **more: Any
) -> Iterator[Running]:
    """A started service on `home`; `more` are settings with `__` for the dot: `training__max_steps=5`."""
    service = Running(home, {**flags, **{key.replace("__", "."): value for key, value in more.items()}}, clock)
    try:
        yield service
    finally:
        service.stop()


class Gate:
    """Holds an async method of a real object until it is opened; `reached` tells that somebody waits."""

    def __init__(self, service: Running, owner: Any, name: str, monkeypatch: Any) -> None:
        self.reached = threading.Event()
        self._service, self._open = service, asyncio.Event()
        inner = getattr(owner, name)

        async def held(*args: Any, **kwargs: Any) -> Any:
            result = await inner(*args, **kwargs) if name == "commit" else None
            self.reached.set()
            await self._open.wait()
            return result if name == "commit" else await inner(*args, **kwargs)

        monkeypatch.setattr(owner, name, held)

    def wait(self) -> None:
        assert self.reached.wait(60)

    def open(self) -> None:
        self._service._thread.loop.call_soon_threadsafe(self._open.set)


def nothing_left(service: Running, checkpoint: str) -> bool:
    """No trace of a batch that was given up."""
    home = service.home
    places = [home / "adapters" / checkpoint, home / "state" / "training" / checkpoint]
    return not any(place.exists() for place in [*places, home / "metrics" / f"{checkpoint}.json"])


def died_again(home: Path, times: int) -> None:
    """As if so many more processes had taken up what trained in `home`, and had ended in it."""
    store = Store(home)
    for _ in range(times):
        for checkpoint, jobs in store.interrupted():
            store.retry_batch(checkpoint, [job.job_id for job in jobs])
    store.close()


@contextlib.contextmanager
def http(service: Service, loop: LoopThread) -> Iterator[httpx.Client]:
    """A client of `service` behind uvicorn on a real port."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(make_app(service), log_config=None, lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    serving = asyncio.run_coroutine_threadsafe(server.serve(sockets=[listener]), loop.loop)
    try:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with httpx.Client(base_url=url, timeout=PATIENCE_S, trust_env=False) as client:
            yield client
    finally:
        server.should_exit = True
        serving.result(PATIENCE_S)


@contextlib.contextmanager
def a_hub(monkeypatch: Any, status: int | None = None) -> Iterator[list[str]]:
    """A hub that answers everything with `status`, or accepts connections and is silent."""
    import datasets

    asked: list[str] = []
    silence = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            if status is None:
                silence.wait(10)
                return
            self.send_response(status)
            self.send_header("content-length", "0")
            if status == 404:
                self.send_header("x-error-code", "RepoNotFound")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield asked
        silence.set()
        server.shutdown()


# --- a process of its own ------------------------------------------------------------------------


class Process:
    """`python -m radiance_mlx run` (or a script that does the same, with faults) on `home`."""

    def __init__(
        self,
        home: Path,
        *arguments: str,
        script: str | None = None,
        environment: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> None:
        self.home = home
        given = {"server.port": 0, **QUICK, **settings}
        flags = [part for key, value in given.items() for part in ("--set", f"{key}={json.dumps(value)}")]
        start = ["-m", "radiance_mlx"] if script is None else ["-c", script]
        command = [sys.executable, *start, "run", "--home", str(home), *arguments, *flags]
        environ = {name: value for name, value in os.environ.items() if not name.startswith("RADIANCE_")}
        environ["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), environ.get("PYTHONPATH", "")])
        environ |= environment or {}
        home.mkdir(parents=True, exist_ok=True)
        self._log = (home / "test.log").open("ab")
        self._popen = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, env=environ, start_new_session=True
        )
        self.client = httpx.Client(timeout=PATIENCE_S, trust_env=False)

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def log(self) -> str:
        return (self.home / "test.log").read_text(errors="replace")

    def ready(self) -> "Process":
        """Wait until a search can be answered."""
        self.client.base_url = until(self._url, "server.json")

        def answers() -> bool:
            assert self._popen.poll() is None, self.log
            with contextlib.suppress(httpx.TransportError):
                return self.client.get("/readyz").status_code == 200
            return False

        until(answers, "ready")
        return self

    def _url(self) -> str | None:
        assert self._popen.poll() is None, self.log
        try:
            facts = json.loads((self.home / "state" / "server.json").read_text())
        except (OSError, ValueError):
            return None
        return str(facts["url"]) if facts["pid"] == self._popen.pid else None

    def get(self, path: str) -> Any:
        return self.client.get(path).raise_for_status().json()

    def post(self, path: str, body: Any) -> Any:
        return self.client.post(path, json=body).raise_for_status().json()

    def update(self, *facts: tuple[str, str]) -> str:
        body = {"examples": [{"input": question, "output": answer} for question, answer in facts]}
        return str(self.post("/update", body)["job_id"])

    def wait(self, job_id: str, state: str = "published") -> dict[str, Any]:
        def there() -> Any:
            job = self.get(f"/jobs/{job_id}")
            assert job["state"] == state or job["state"] not in FINAL_STATES, job
            return job if job["state"] == state else None

        return until(there, f"{job_id} {state}")

    def wait_for_step(self, job_id: str, step: int = 1) -> dict[str, Any]:
        def far_enough() -> Any:
            job = self.get(f"/jobs/{job_id}")
            # an attempt is counted once it has begun: before, the progress is that of the process before
            trains = job["state"] == "training" and job["attempts"] > 0
            return job if trains and (job["progress"] or {}).get("step", 0) >= step else None

        return until(far_enough, f"{job_id} step {step}")

    def signal(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)

    def exit_code(self, patience_s: float = PATIENCE_S) -> int:
        """Wait for the end."""
        return self._popen.wait(patience_s)

    def kill(self) -> None:
        """`kill -9`, and gone."""
        self._popen.kill()
        self._popen.wait(PATIENCE_S)

    def close(self) -> None:
        self.client.close()
        if self._popen.poll() is None:
            self.kill()
        self._log.close()
