"""For the benchmarks: two servers as processes, and clients that stream answers and keep the time of every piece."""

import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def environment() -> dict[str, str]:
    """This process's, with OpenBLAS for mlx-lm as well where there is one (our package loads it by itself)."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("RADIANCE_")}
    if sys.platform == "linux":
        environ |= {"LD_PRELOAD": "libopenblas.so.0"} if _openblas() else {}
    return environ


def _openblas() -> bool:
    listed = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=False).stdout
    return "libopenblas.so.0" in listed


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which that share of `values` lies; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


@dataclass
class Heard:
    """One streamed answer: seconds to its first piece, between pieces, in all; and its tokens by `usage`."""

    first_s: float = 0.0
    gaps: list[float] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0


@dataclass
class Load:
    """What some clients heard together."""

    heard: list[Heard]
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens a second over all clients."""
        return sum(one.tokens for one in self.heard) / self.seconds

    @staticmethod
    def figures(*loads: "Load") -> dict[str, float]:
        """Of several: the median of their tokens a second, the lowest, the highest; milliseconds of all pieces."""
        gaps = [gap for load in loads for one in load.heard for gap in one.gaps]
        rates = [load.rate for load in loads]
        return {
            "tokens_per_s": round(statistics.median(rates), 1),
            **({"lowest": round(min(rates), 1), "highest": round(max(rates), 1)} if len(rates) > 1 else {}),
            "first_ms": round(1e3 * statistics.median(one.first_s for load in loads for one in load.heard), 1),
            "gap_p50_ms": round(1e3 * percentile(gaps, 0.5), 1),
            "gap_p99_ms": round(1e3 * percentile(gaps, 0.99), 1),
            "gap_max_ms": round(1e3 * max(gaps, default=0), 1),
        }


class Server:
    """A process that answers on a port; `request` and `read` know its own words."""

    def __init__(self, command: Sequence[str], port: int, log: Path) -> None:
        self.port = port
        self._log = log.open("ab")
        self.started = time.perf_counter()
        self.process = subprocess.Popen(command, stdout=self._log, stderr=self._log, env=environment(), cwd=ROOT)
        self._local = threading.local()

    def request(self, prompt: str, max_tokens: int, adapter: str | None) -> tuple[str, dict[str, Any]]:
        raise NotImplementedError

    def read(self, event: dict[str, Any]) -> tuple[bool, int]:
        """Whether an event has text, and the answer's tokens if it tells."""
        raise NotImplementedError

    def wait(self, path: str) -> None:
        """Until `path` is answered with 200."""
        while True:
            if self.process.poll() is not None:
                raise SystemExit("a server did not start:\n" + Path(self._log.name).read_text()[-2000:])
            try:
                if self.get(path)[0] == 200:
                    return
            except OSError:
                time.sleep(0.02)

    def get(self, path: str) -> tuple[int, Any]:
        return self._call("GET", path, None)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        status, answer = self._call("POST", path, body)
        if status >= 300:
            raise SystemExit(f"{path}: {status}: {answer}")
        return answer

    def _call(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        try:
            headers = {"content-type": "application/json"} if body is not None else {}
            connection.request(method, path, json.dumps(body) if body is not None else None, headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read() or b"null")
        finally:
            connection.close()

    def stream(self, prompt: str, max_tokens: int, adapter: str | None = None) -> Heard:
        """Ask on this thread's own connection and listen to the end."""
        connection = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        path, body = self.request(prompt, max_tokens, adapter)
        heard, last = Heard(), None
        started = time.perf_counter()
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise SystemExit(f"{path}: {answer.status}: {answer.read()!r}")
        for event in _events(answer):
            text, tokens = self.read(event)
            heard.tokens = tokens or heard.tokens
            now = time.perf_counter()
            if text and last is None:
                heard.first_s = now - started
            elif text and last is not None:
                heard.gaps.append(now - last)
            last = now if text else last
        heard.seconds = time.perf_counter() - started
        if answer.will_close:
            connection.close()
        return heard

    def load(
        self,
        clients: int,
        prompts: Callable[[], str],
        max_tokens: int,
        *,
        rounds: int = 1,
        adapters: Sequence[str | None] = (None,),
        until: threading.Event | None = None,
    ) -> Load:
        """`clients` at once, each asking `rounds` times, or until the event; adapters in turn."""

        def client(number: int) -> list[Heard]:
            adapter = adapters[number % len(adapters)]
            heard = []
            while (len(heard) < rounds) if until is None else not until.is_set():
                heard.append(self.stream(prompts(), max_tokens, adapter))
            return heard

        started = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            heard = [one for some in pool.map(client, range(clients)) for one in some]
        return Load(heard, time.perf_counter() - started)

    def peak_mb(self) -> float:
        return peak_mb(self.process.pid)

    @contextmanager
    def alone(self, others: Iterable["Server"]) -> Iterator[None]:
        """Hold the other servers meanwhile, so that they take nothing of the machine."""
        held = [other for other in others if other is not self]
        for other in held:
            other.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            for other in held:
                other.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGCONT)  # who is held hears of nothing else
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()


class Ours(Server):
    """`python -m radiance_mlx run`."""

    def __init__(self, model: Path, home: Path, settings: dict[str, Any]) -> None:
        port = free_port()
        flags = [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
        command = [sys.executable, "-m", "radiance_mlx", "run", "--home", str(home), "--port", str(port)]
        command += ["--base-model", str(model), "--log-level", "warning", *flags]
        super().__init__(command, port, home.parent / "ours.log")
        self.wait("/readyz")

    def request(self, prompt: str, max_tokens: int, adapter: str | None) -> tuple[str, dict[str, Any]]:
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
        return "/search", {**body, "checkpoint": adapter or "stable"}

    def read(self, event: dict[str, Any]) -> tuple[bool, int]:
        if "error" in event:
            raise SystemExit(f"/search: {event}")
        return "text" in event, event.get("usage", {}).get("completion_tokens", 0)

    def teach(self, rows: Sequence[dict[str, str]]) -> str:
        examples = [
            {"text": r["text"]} if "text" in r else {"input": r["prompt"], "output": r["completion"]} for r in rows
        ]
        return str(self.post("/update", {"examples": examples})["job_id"])

    def published(self, job_id: str) -> str:
        """Wait for the checkpoint that comes of it; asked every 20 ms at first, and less often the longer it takes."""
        started = time.perf_counter()
        while (job := self.get(f"/jobs/{job_id}")[1])["state"] != "published":
            if job["error"]:
                raise SystemExit(f"{job_id}: {job['error']}")
            time.sleep(min(0.5, max(0.02, 0.02 * (time.perf_counter() - started))))
        return str(job["checkpoint"])


class Theirs(Server):
    """`python -m mlx_lm.server`."""

    def __init__(self, model: Path, log: Path, adapter: Path | None = None) -> None:
        port = free_port()
        command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(model), "--port", str(port)]
        command += ["--log-level", "WARNING", "--decode-concurrency", "8", "--prompt-concurrency", "8"]
        super().__init__([*command, *(["--adapter-path", str(adapter)] if adapter else [])], port, log)
        self._model = str(model)
        self.wait("/v1/models")

    def request(self, prompt: str, max_tokens: int, adapter: str | None) -> tuple[str, dict[str, Any]]:
        body: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens}
        body |= {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
        # without the model's name it answers with what it was started with, whatever adapter is asked for
        return "/v1/chat/completions", body | ({"model": self._model, "adapters": adapter} if adapter else {})

    def read(self, event: dict[str, Any]) -> tuple[bool, int]:
        text = any((c.get("delta") or {}).get("content") for c in event.get("choices", []))
        return text, (event.get("usage") or {}).get("completion_tokens", 0)


def _events(answer: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in answer:
        if line.startswith(b"data: ") and (data := line[6:].strip()) != b"[DONE]":
            yield json.loads(data)


def peak_mb(pid: int) -> float:
    """The most that a process has held in memory so far, where the system tells; else what it holds now."""
    status = Path(f"/proc/{pid}/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    told = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True)
    return int(told.stdout) / 1024
