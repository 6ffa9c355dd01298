#!/usr/bin/env python
"""Measure the running service on nano, and mlx-lm called directly in the same run. Last line: one JSON object.

    .venv/bin/python scripts/bench_service.py

The prompt cache is off throughout, so that nothing is answered from what another measurement left there.

Start of the service, acknowledgement of an update (fsync included), overhead of HTTP and queueing on a
one-token search, searches while a batch trains, and eight searches over four adapters at once.
"""

import argparse
import http.client
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from radiance_mlx.messages import FINAL_STATES
from radiance_mlx.models.nano import world

ROOT = Path(__file__).parent.parent


class Running:
    """The real service in a process of its own, on a free port, in a temporary home."""

    def __init__(self, home: Path) -> None:
        started = time.perf_counter()
        command = [sys.executable, "-m", "radiance_mlx", "run", "--home", str(home), "--port", "0"]
        command += [
            "--base-model",
            "nano",
            "--update-mode",
            "immediate",
            "--log-level",
            "warning",
            "--set",
            "serving.prompt_cache_mb=0",
        ]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        address = home / "state" / "server.json"
        while not address.exists():
            if self.process.poll() is not None:
                raise SystemExit("the service did not start")
            time.sleep(0.01)
        self._local = threading.local()
        self.http = httpx.Client(base_url=json.loads(address.read_text())["url"], timeout=120)
        while self.http.get("/readyz").status_code != 200:
            time.sleep(0.01)
        self.start_s = time.perf_counter() - started

    def search(self, prompt: str, **fields) -> tuple[float, dict]:
        """Seconds and the answer, over a kept-alive connection of this thread.

        By the standard library's client: on two cores, a heavier one would be measured more than the service.
        """
        if not hasattr(self._local, "connection"):
            self._local.connection = http.client.HTTPConnection(self.http.base_url.host, self.http.base_url.port)
        body = json.dumps({"prompt": prompt, "temperature": 0, **fields})
        started = time.perf_counter()
        self._local.connection.request("POST", "/search", body, {"content-type": "application/json"})
        answer = self._local.connection.getresponse()
        text = answer.read()
        seconds = time.perf_counter() - started
        if answer.status != 200:
            raise SystemExit(f"{answer.status}: {text!r}")
        return seconds, json.loads(text)

    def teach(self, pairs) -> tuple[float, str]:
        examples = [{"input": q, "output": a} for q, a in pairs]
        started = time.perf_counter()
        answer = self.http.post("/update", json={"examples": examples})
        seconds = time.perf_counter() - started
        answer.raise_for_status()
        return seconds, answer.json()["job_id"]

    def job(self, job_id: str) -> dict:
        return self.http.get(f"/jobs/{job_id}").json()

    def wait(self, job_id: str) -> dict:
        while (job := self.job(job_id))["state"] not in FINAL_STATES:
            time.sleep(0.05)
        return job

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(15)


def ms(seconds: float) -> float:
    return round(seconds * 1000, 2)


def overhead(service: Running, rounds: int) -> dict:
    """A one-token answer over HTTP against mlx-lm's generator in this process, turn by turn."""
    from radiance_mlx.engine import backend

    backend.select("cpu" if sys.platform == "linux" else "auto", _memory())
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import BatchGenerator

    model, tokenizer = load(str(ROOT / "radiance_mlx/models/nano"))
    generator = BatchGenerator(model, stream=mx.default_stream(mx.default_device()))
    over_http, direct = [], []
    for i in range(rounds):
        prompt = world.ask(*_person(i))
        over_http.append(service.search(prompt, max_tokens=1)[0])
        started = time.perf_counter()
        tokens = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
        generator.insert([tokens], max_tokens=[1])
        while not any(r.finish_reason for r in generator.next()[1]):
            pass
        direct.append(time.perf_counter() - started)
    http, alone = statistics.median(over_http), statistics.median(direct)
    return {"search_1_token_ms": ms(http), "mlx_lm_direct_ms": ms(alone), "overhead_ms": ms(http - alone)}


def _memory():
    from radiance_mlx.config import Config

    return Config().memory


def _person(i: int) -> tuple[str, str]:
    return world.KNOWN[i % 80][0], world.RELATIONS[i // 80 % 5]


def while_training(service: Running) -> dict:
    """Searches of 8 tokens, one after another, from the 202 until the job is published."""
    question = world.ask(*_person(3))
    idle = statistics.median(service.search(question, max_tokens=8)[0] for _ in range(20))
    acknowledged, job_id = service.teach(world.facts(world.STRANGERS[4:8]))
    times = []
    done = threading.Event()

    def watch() -> None:
        service.wait(job_id)
        done.set()

    watcher = threading.Thread(target=watch)
    started = time.perf_counter()
    watcher.start()
    while not done.is_set():
        times.append(service.search(question, max_tokens=8)[0])
    watcher.join()
    return {
        "idle_8_tokens_ms": ms(idle),
        "training_8_tokens_p50_ms": ms(statistics.median(times)),
        "training_8_tokens_max_ms": ms(max(times)),
        "searches_while_training": len(times),
        "training_s": round(time.perf_counter() - started, 2),
        "acknowledged_ms": ms(acknowledged),
    }


def mixed(service: Running, rounds: int) -> dict:
    """Eight concurrent searches over base, two older checkpoints and stable, against one alone."""
    checkpoints = [c["checkpoint"] for c in service.http.get("/checkpoints").json()["checkpoints"]]
    over = ["base", checkpoints[0], checkpoints[1], "stable"] * 2
    questions = [world.ask(world.STRANGERS[i % 4][0], world.RELATIONS[i % 5]) for i in range(8)]
    asked = list(zip(questions, over, strict=True))
    fields = {"max_tokens": 16}
    alone_answers = [service.search(q, checkpoint=c, **fields)[1]["response"] for q, c in asked]
    alone, longest, together, equal = [], [], [], True
    with ThreadPoolExecutor(8) as pool:
        for _ in range(rounds):
            times = [service.search(q, checkpoint=c, **fields)[0] for q, c in asked]
            alone += times
            longest.append(max(times))
            started = time.perf_counter()
            answers = list(pool.map(lambda item: service.search(item[0], checkpoint=item[1], **fields)[1], asked))
            together.append(time.perf_counter() - started)
            equal = equal and [a["response"] for a in answers] == alone_answers
    one, eight = statistics.median(alone), statistics.median(together)
    return {
        "one_search_ms": ms(one),
        "eight_mixed_searches_ms": ms(eight),
        "eight_over_one": round(eight / one, 2),
        "eight_over_longest_one": round(eight / statistics.median(longest), 2),
        "mixed_equals_alone": equal,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="searches a measurement takes (default 100)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        service = Running(Path(folder))
        try:
            result: dict = {"start_s": round(service.start_s, 2)}
            service.search("warm up")
            result |= overhead(service, options.rounds)
            acknowledgements = []
            for i in range(2):  # two older checkpoints
                seconds, job_id = service.teach(world.facts(world.STRANGERS[i * 2 : i * 2 + 2])[:4])
                acknowledgements.append(seconds)
                service.wait(job_id)
            result |= while_training(service)
            result |= mixed(service, max(3, options.rounds // 10))
            for i in range(15):  # last: they wait in line and are not trained
                seconds, job_id = service.teach(world.facts(world.STRANGERS[20 + i : 21 + i])[:2])
                acknowledgements.append(seconds)
                service.http.delete(f"/jobs/{job_id}")
            result["update_acknowledged_ms"] = ms(statistics.median(acknowledgements))
        finally:
            service.stop()
    result["where"] = {"cpu": _cpu(), "cores": os.cpu_count(), "python": platform.python_version()}
    for key, value in result.items():
        print(f"{key:28} {value}")
    print(json.dumps(result))


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        return next((x.split(":")[1].strip() for x in info.read_text().splitlines() if "model name" in x), "")
    return platform.processor()


if __name__ == "__main__":
    main()
