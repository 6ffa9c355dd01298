#!/usr/bin/env python
"""The service against mlx-lm's own server and trainer: same machine, same random model, same clients, in one run.

    .venv/bin/python scripts/bench_vs_mlx_lm.py                        # everything: a quarter of an hour on two cores
    .venv/bin/python scripts/bench_vs_mlx_lm.py --rows decode both     # some of it

Prints a table of both and their ratio (ours over theirs), and one JSON object as its last line. Rows:

- `decode`: tokens/s, time to the first piece and gaps between pieces at 1, 4 and 8 clients, base and one adapter
- `adapters`: eight clients over 1, 4 and 8 different adapters (mlx-lm's server loads the model anew for each; ours has
  `serving.adapter_slots: 10`)
- `first`: time to the first piece of the base, after prompts of 16, 256 and 1,024 words, and with a shared prefix
- `train`: steps/s and tokens/s alone: prompts of 100 words with answers of 8, masked; and text, unmasked
- `both`: four clients while a batch trains, against a server beside `mlx_lm.lora`; and what memory that took
- `live`: from the examples to the first answer that has learnt from them, against `mlx_lm.lora` and a new server
"""

import argparse
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from bench_clients import ROOT, Heard, Load, Ours, Theirs, environment, peak_mb
from bench_model import SIZES, words, write_model

ROWS = ("decode", "adapters", "first", "train", "both", "live")
LORA = {"r": 8, "scale": 2.0}
BATCH = 4

Figures = dict[str, Any]


class Prompts:
    """Made-up prompts, none twice, so that no cache knows them."""

    def __init__(self, seed: int = 1) -> None:
        self._seeds = itertools.count(seed * 1_000_000)
        self._lock = threading.Lock()

    def __call__(self, tokens: int = 16, prefix: str = "") -> str:
        with self._lock:
            seed = next(self._seeds)
        return (prefix + " " if prefix else "") + words(tokens, seed)


class Bench:
    """A model, a folder for everything, and how long things go on."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder = folder
        self.model = folder / "model"
        self.size = write_model(self.model, options.size)
        self.tokens, self.steps, self.rounds = options.tokens, options.steps, options.rounds
        self.prompts = Prompts()
        self.adapters: list[str] = []

    def settings(self, **more: Any) -> dict[str, Any]:
        """Ours, as mlx-lm's trainer is called below; learning changes next to nothing, so that answers stay as long."""
        return {
            "update_mode": "immediate",
            "evaluation.anchor_provider": "none",
            "lineage": "fresh",
            "lora.r": LORA["r"],
            "lora.alpha": LORA["r"] * LORA["scale"],
            "lora.dropout": 0.0,
            "lora.num_layers": -1,
            "lora.target_modules": ["all-linear"],
            "training.batch_size": BATCH,
            "training.grad_accum": 1,
            "training.lr": 1e-9,
            "training.max_steps": self.steps,
            "training.eval_every": 0,
            "training.max_seq_length": 1024,
            **more,
        }

    def ours(self, **more: Any) -> Ours:
        return Ours(self.model, self.folder / "home", self.settings(**more))

    def theirs(self, adapter: Path | None = None) -> Theirs:
        return Theirs(self.model, self.folder / "mlx_lm.log", adapter)

    def adapter(self, number: int = 0) -> Path:
        return self.folder / "home" / "adapters" / self.adapters[number]

    def make_adapters(self, count: int = 8) -> None:
        """Checkpoints of ours, which both sides read: what they change is small, but no less than rounding."""
        server = self.ours(**{"training.max_steps": 1, "training.lr": 1e-4})
        try:
            for _ in range(count):
                self.adapters.append(server.published(server.teach([pair(self.prompts, 8, 2)])))
        finally:
            server.stop()


def pair(prompts: Prompts, prompt_words: int = 100, answer_words: int = 8) -> dict[str, str]:
    return {"prompt": prompts(prompt_words), "completion": prompts(answer_words)}


def text(prompts: Prompts) -> dict[str, str]:
    return {"text": prompts(108)}


# --- answering ----------------------------------------------------------------------------------------


def loads(bench: Bench, server: Any, adapters: tuple[str | None, ...]) -> Figures:
    """At 1, 4 and 8 clients, after one to warm up."""
    server.load(1, bench.prompts, 8, adapters=adapters)
    return {
        f"{clients} clients": server.load(
            clients, bench.prompts, bench.tokens, rounds=bench.rounds, adapters=adapters
        ).figures()
        for clients in (1, 4, 8)
    }


def decode(bench: Bench) -> Figures:
    found: Figures = {}
    with_adapter = bench.adapter(-1)  # the stable one
    for who, make in (("ours", bench.ours), ("mlx-lm", bench.theirs)):
        server = make()
        try:
            found[who] = {"base": loads(bench, server, ("base",) if who == "ours" else (None,))}
            if who == "ours":
                found[who]["adapter"] = loads(bench, server, ("stable",))
        finally:
            server.stop()
    server = bench.theirs(with_adapter)
    try:
        found["mlx-lm"]["adapter"] = loads(bench, server, (None,))
    finally:
        server.stop()
    return found


def many_adapters(bench: Bench) -> Figures:
    found: Figures = {}
    many = {"serving.adapter_slots": 10}
    for who, make in (("ours", lambda: bench.ours(**many)), ("mlx-lm", bench.theirs)):
        server = make()
        try:
            found[who] = {}
            names = [name if who == "ours" else str(bench.adapter(i)) for i, name in enumerate(bench.adapters)]
            server.load(8, bench.prompts, 4, adapters=names)  # each has been there once
            for count in (1, 4, 8):
                load = server.load(8, bench.prompts, bench.tokens, rounds=bench.rounds, adapters=names[:count])
                found[who][f"{count} adapters"] = load.figures()
        finally:
            server.stop()
    return found


def first(bench: Bench) -> Figures:
    found: Figures = {}
    prefix = bench.prompts(1000)
    for who, make in (("ours", bench.ours), ("mlx-lm", bench.theirs)):
        server, base = make(), "base" if who == "ours" else None
        try:
            server.stream(bench.prompts(), 4, base)
            found[who] = {}
            for length in (16, 256, 1024):
                heard = [server.stream(bench.prompts(length), 2, base) for _ in range(3 * bench.rounds)]
                found[who][f"{length} words"] = _first(heard)
            server.stream(bench.prompts(16, prefix), 2, base)
            heard = [server.stream(bench.prompts(16, prefix), 2, base) for _ in range(3 * bench.rounds)]
            found[who]["16 after a shared 1000"] = _first(heard)
        finally:
            server.stop()
    return found


def _first(heard: list[Heard]) -> Figures:
    return {"first_ms": round(1e3 * statistics.median(one.first_s for one in heard), 1)}


# --- learning -----------------------------------------------------------------------------------------


class Lora:
    """`mlx_lm lora` as a process."""

    def __init__(self, bench: Bench, rows: list[dict[str, str]], steps: int) -> None:
        data = bench.folder / "data"
        data.mkdir(exist_ok=True)
        for name in ("train", "valid"):
            (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = data / "lora.yaml"
        parameters = {"rank": LORA["r"], "scale": LORA["scale"], "dropout": 0.0}
        config.write_text(yaml.safe_dump({"lora_parameters": parameters, "mask_prompt": "text" not in rows[0]}))
        self.adapter = bench.folder / "lora"
        command = [sys.executable, "-m", "mlx_lm", "lora", "--train", "--model", str(bench.model), "-c", str(config)]
        command += ["--data", str(data), "--adapter-path", str(self.adapter), "--iters", str(steps)]
        command += ["--batch-size", str(BATCH), "--learning-rate", "1e-9", "--num-layers", "-1"]
        command += ["--steps-per-report", "5", "--val-batches", "0", "--steps-per-eval", "1000000"]
        command += ["--save-every", "1000000", "--max-seq-length", "1024"]
        environ = environment() | {"PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ, cwd=ROOT
        )
        self.peak_mb = 0.0
        self.said: list[tuple[float, str]] = []

    def lines(self) -> None:
        """Read to the end, keeping when each line came and the highest memory seen."""
        assert self.process.stdout
        for line in self.process.stdout:
            self.said.append((time.perf_counter(), re.sub(r"\x1b\[[0-9;]*m", "", line)))
            if self.process.poll() is None:
                self.peak_mb = max(self.peak_mb, peak_mb(self.process.pid))
        if self.process.wait():
            raise SystemExit("mlx_lm lora failed:\n" + "".join(line for _, line in self.said[-20:]))

    def figures(self) -> Figures:
        """Between its first report, which has the warming up in it, and its last."""
        found = [(t, re.match(r"\s*(\d+)\s+[\d.]+\D+[\d.]+", line)) for t, line in self.said]
        reports = [(t, int(m[1])) for t, m in found if m]
        (start, before), (end, after) = reports[0], reports[-1]
        return {"steps_per_s": round((after - before) / (end - start), 2)}


def published(bench: Bench, server: Ours, job: str) -> Figures:
    """The metrics of the checkpoint that comes of a job."""
    checkpoint = server.published(job)
    metrics: Figures = json.loads((bench.folder / "home" / "metrics" / f"{checkpoint}.json").read_text())
    return metrics


def trained(bench: Bench, server: Ours, rows: list[dict[str, str]]) -> Figures:
    """Teach `rows`: steps in the time of its steps."""
    metrics = published(bench, server, server.teach(rows))
    return {"steps_per_s": round(metrics["steps"] / metrics["training_seconds"], 2)}


def train(bench: Bench) -> Figures:
    found: Figures = {"ours": {}, "mlx-lm": {}}
    for name, make in (("masked", pair), ("text", text)):
        rows = [make(bench.prompts) for _ in range(10 * BATCH)]
        server = bench.ours()
        try:
            metrics = published(bench, server, server.teach(rows))
        finally:
            server.stop()
        lora = Lora(bench, rows, bench.steps)
        lora.lines()
        found["ours"][name] = {"steps_per_s": round(metrics["steps"] / metrics["training_seconds"], 2)}
        found["mlx-lm"][name] = lora.figures()
        tokens = metrics["trained_tokens"] / metrics["steps"]  # prompts and padding too, of the same rows
        for one in found.values():
            one[name]["tokens_per_s"] = round(one[name]["steps_per_s"] * tokens)
    return found


# --- both at once -------------------------------------------------------------------------------------


def during(bench: Bench, server: Any, adapters: tuple[str | None, ...], work: Callable[[], Figures]) -> Figures:
    """Four clients without and with `work` beside them."""
    server.load(1, bench.prompts, 8, adapters=adapters)
    alone = server.load(4, bench.prompts, bench.tokens, rounds=bench.rounds, adapters=adapters).figures()
    done = threading.Event()
    beside: list[Load] = []

    def clients() -> None:
        beside.append(server.load(4, bench.prompts, bench.tokens, adapters=adapters, until=done))

    thread = threading.Thread(target=clients)
    thread.start()
    try:
        training = work()
    finally:
        done.set()
        thread.join()
    return {"idle": alone, "training": beside[0].figures() | training}


def both(bench: Bench) -> Figures:
    rows = [pair(bench.prompts) for _ in range(10 * BATCH)]
    found: Figures = {}
    # one copy of the base, about as many kept prompts as mlx-lm's server keeps (ten), and room for a token in a slice
    server = bench.ours(**{"serving.fuse": "off", "serving.prompt_cache_mb": 16, "training.slice_ms": 40})
    try:
        alone = trained(bench, server, rows)
        found["ours"] = during(bench, server, ("base",), lambda: trained(bench, server, rows))
        found["ours"]["peak_mb"] = round(server.peak_mb())
    finally:
        server.stop()
    found["ours"]["training alone"] = alone
    lora = Lora(bench, rows, bench.steps)
    lora.lines()
    alone = lora.figures()
    other = bench.theirs()
    memory = 0.0

    def work() -> Figures:
        nonlocal memory
        lora = Lora(bench, rows, bench.steps)
        lora.lines()
        memory = lora.peak_mb
        return lora.figures()

    try:
        found["mlx-lm"] = during(bench, other, (None,), work)
        found["mlx-lm"]["peak_mb"] = round(other.peak_mb() + memory)
    finally:
        other.stop()
    found["mlx-lm"]["training alone"] = alone
    for one in found.values():
        one["shares"] = {
            "decode": round(one["training"]["tokens_per_s"] / one["idle"]["tokens_per_s"], 3),
            "training": round(one["training"]["steps_per_s"] / one["training alone"]["steps_per_s"], 3),
        }
        one["shares"]["sum"] = round(sum(one["shares"].values()), 3)
    return found


def live(bench: Bench) -> Figures:
    rows, steps = [pair(bench.prompts, 12) for _ in range(BATCH)], 10
    server = bench.ours(**{"training.max_steps": steps})
    try:
        server.stream(bench.prompts(), 4, "base")
        started = time.perf_counter()
        server.stream(bench.prompts(), 1, server.published(server.teach(rows)))
        ours = time.perf_counter() - started
    finally:
        server.stop()
    started = time.perf_counter()
    lora = Lora(bench, rows, steps)
    lora.lines()
    other = bench.theirs(lora.adapter)
    try:
        other.stream(bench.prompts(), 1)
        theirs = time.perf_counter() - started
    finally:
        other.stop()
    return {
        "ours": {"update to answer": {"s": round(ours, 2)}},
        "mlx-lm": {"update to answer": {"s": round(theirs, 2)}},
    }


# --- telling ------------------------------------------------------------------------------------------


def flat(tree: Any, path: str = "") -> dict[str, float]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {k: v for key, value in tree.items() for k, v in flat(value, f"{path} {key}".strip()).items()}


def show(name: str, found: Figures) -> None:
    print(f"\n{name:38}{'ours':>12}{'mlx-lm':>12}{'ratio':>9}")
    ours, theirs = flat(found["ours"]), flat(found["mlx-lm"])
    for key, value in ours.items():
        other = theirs.get(key)
        ratio = f"{value / other:9.2f}" if other else ""
        print(f"  {key:36}{value:12.6g}{other if other is not None else '-':>12}{ratio}", flush=True)


def where() -> Figures:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    names = ("radiance-mlx", "mlx", "mlx-lm")
    return {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version()} | {n: version(n) for n in names}


MEASURES = dict(zip(ROWS, (decode, many_adapters, first, train, both, live), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer (default 64)")
    parser.add_argument("--rounds", type=int, default=2, help="answers a client asks for (default 2)")
    parser.add_argument("--steps", type=int, default=40, help="training steps (default 40)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options)
        print(f"{bench.size:.1f}M parameters")
        bench.make_adapters()
        found = {}
        for name in options.rows:
            found[name] = MEASURES[name](bench)
            show(name, found[name])
    print(json.dumps({"size": options.size, "million_parameters": round(bench.size, 1), **found, "where": where()}))


if __name__ == "__main__":
    main()
