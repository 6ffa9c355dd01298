#!/usr/bin/env python
"""The service against mlx-lm's own server and trainer: same machine, same random model, same clients, in one run.

    .venv/bin/python scripts/bench_vs_mlx_lm.py                        # everything: some 20 minutes on two cores
    .venv/bin/python scripts/bench_vs_mlx_lm.py --rows decode both     # some of it

Prints a table of both and their ratio (ours over theirs), and one JSON object as its last line. In the first three
rows and in `train` the sides take turns, on the same prompts or rows, and whoever has not its turn is stopped; the
others are of one go each, ours first. Rows:

- `decode`: tokens/s, time to the first piece and gaps between pieces at 1, 4 and 8 clients, base and one adapter
- `adapters`: eight clients over 1, 4 and 8 different adapters (mlx-lm's server loads the model anew for each; ours has
  `serving.adapter_slots: 10`)
- `first`: time to the first piece of the base, after prompts of 16, 256 and 1,024 words, and with a shared prefix
- `long`: gaps between the pieces of one answer while prompts of 1,024 words come one after the other
- `train`: steps/s and tokens/s alone: prompts of 100 words with answers of 8, masked; and text, unmasked
- `both`: four clients while a batch trains, against a server beside `mlx_lm.lora`; and what memory that took
- `live`: from the examples to the first answer that has learnt from them, in 1, 10 and 30 steps, against
  `mlx_lm.lora` and a new server
"""

import argparse
import contextlib
import itertools
import json
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench_clients import Load, Ours, Server, Theirs
from bench_lora import Lora
from bench_model import SIZES, words, write_model

from radiance_mlx import blas

ROWS = ("decode", "adapters", "first", "long", "train", "both", "live")
LORA = {"r": 8, "scale": 2.0}
BATCH = 4

Figures = dict[str, Any]


class Prompts:
    """Made-up prompts, none twice, so that no cache knows them, but for a `turn` that both sides take."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._turns = itertools.count(1)
        self.begin(self.turn())

    def turn(self) -> int:
        """Of a set of prompts that has not been."""
        return next(self._turns)

    def begin(self, turn: int) -> None:
        """From now on the prompts of that turn, from its first."""
        self._seeds = itertools.count(1_000_000 * turn)

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
            "training.clip_norm": None,
            "training.max_seq_length": 1024,
            **more,
        }

    def ours(self, **more: Any) -> Ours:
        return Ours(self.model, self.folder / "home", self.settings(**more))

    def theirs(self, adapter: Path | None = None) -> Theirs:
        return Theirs(self.model, self.folder / "mlx_lm.log", adapter)

    @contextlib.contextmanager
    def servers(self, *make: Callable[[], Server]) -> Iterator[list[Server]]:
        """All of them started, and stopped in the end."""
        with contextlib.ExitStack() as stack:
            started = []
            for one in make:
                started.append(one())
                stack.callback(started[-1].stop)
            yield started

    def lora(self, rows: Sequence[dict[str, str]], steps: int) -> Lora:
        """mlx-lm's trainer at its work."""
        parameters = {"rank": LORA["r"], "scale": LORA["scale"], "dropout": 0.0}
        return Lora(self.model, self.folder, rows, steps, batch=BATCH, parameters=parameters).run()

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

#: who asks which server for which adapter
Way = tuple[str, Server, Sequence[str | None]]


def in_turns(
    bench: Bench, ways: Sequence[Way], clients: int, *, rounds: int = 0, tokens: int = 0
) -> dict[str, Figures]:
    """The figures of each way. In every round each has its turn, another one first each time."""
    loads: dict[str, list[Load]] = {name: [] for name, _, _ in ways}
    everyone = {server for _, server, _ in ways}
    for number in range(rounds or bench.rounds):
        turn = bench.prompts.turn()
        for name, server, adapters in (*ways[number % len(ways) :], *ways[: number % len(ways)]):
            bench.prompts.begin(turn)
            with server.alone(everyone):
                loads[name].append(
                    server.load(clients, bench.prompts, tokens or bench.tokens, rounds=2, adapters=adapters)
                )
    return {name: Load.figures(*some) for name, some in loads.items()}


def decode(bench: Bench) -> Figures:
    found: Figures = {who: {"base": {}, "adapter": {}} for who in ("ours", "mlx-lm")}
    with bench.servers(bench.ours, bench.theirs, lambda: bench.theirs(bench.adapter(-1))) as (ours, base, adapted):
        ways: list[Way] = [("ours base", ours, ["base"]), ("ours adapter", ours, ["stable"])]  # the last adapter
        ways += [("mlx-lm base", base, [None]), ("mlx-lm adapter", adapted, [None])]
        in_turns(bench, ways, 1, rounds=1, tokens=8)  # to warm up
        for clients in (1, 4, 8):
            for name, figures in in_turns(bench, ways, clients).items():
                who, what = name.split()
                found[who][what][f"{clients} clients"] = figures
    return found


def many_adapters(bench: Bench) -> Figures:
    found: Figures = {"ours": {}, "mlx-lm": {}}
    with bench.servers(lambda: bench.ours(**{"serving.adapter_slots": 10}), bench.theirs) as (ours, theirs):
        folders = [str(bench.adapter(i)) for i in range(len(bench.adapters))]
        ours.load(8, bench.prompts, 4, adapters=bench.adapters)  # each has been there once
        theirs.load(8, bench.prompts, 4, adapters=folders)
        ways: list[Way] = [(f"ours {count} adapters", ours, bench.adapters[:count]) for count in (1, 4, 8)]
        ways += [(f"mlx-lm {count} adapters", theirs, folders[:count]) for count in (1, 4, 8)]
        for name, figures in in_turns(bench, ways, 8, rounds=max(2, bench.rounds // 2)).items():
            who, _, what = name.partition(" ")
            found[who][what] = figures
    return found


def first(bench: Bench) -> Figures:
    found: Figures = {"ours": {}, "mlx-lm": {}}
    prefix = bench.prompts(1000)
    asked = {f"{length} words": (length, "") for length in (16, 256, 1024)} | {"16 after a shared 1000": (16, prefix)}
    with bench.servers(bench.ours, bench.theirs) as servers:
        sides = list(zip(found, servers, ("base", None), strict=True))
        for name, (length, before) in asked.items():
            heard: dict[str, list[float]] = {who: [] for who in found}
            for number in range(bench.rounds + 1):
                turn = bench.prompts.turn()
                for who, server, adapter in sides[:: 1 - 2 * (number % 2)]:
                    bench.prompts.begin(turn)
                    with server.alone(servers):
                        heard[who].append(server.stream(bench.prompts(length, before), 2, adapter).first_s)
            for who, seconds in heard.items():  # the first one warmed up
                found[who][name] = {"first_ms": round(1e3 * statistics.median(seconds[1:]), 1)}
    return found


def long_prompts(bench: Bench) -> Figures:
    found: Figures = {}
    with bench.servers(bench.ours, bench.theirs) as servers:
        for who, server, adapter in zip(("ours", "mlx-lm"), servers, ("base", None), strict=True):
            with server.alone(servers):
                server.load(1, bench.prompts, 8, adapters=[adapter])
                alone = server.load(1, bench.prompts, bench.tokens, rounds=2, adapters=[adapter])
                beside, firsts = _beside_long(bench, server, adapter)
            found[who] = {"alone": Load.figures(alone), "beside": Load.figures(beside)}
            found[who]["long"] = {"first_ms": round(1e3 * statistics.median(firsts), 1)}
    return found


def _beside_long(bench: Bench, server: Server, adapter: str | None) -> tuple[Load, list[float]]:
    """One client's answers while four long prompts come, and how long those take to their first token."""
    done, heard = threading.Event(), list[Load]()

    def listen() -> None:
        heard.append(server.load(1, bench.prompts, bench.tokens, adapters=[adapter], until=done))

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        firsts = [server.stream(bench.prompts(1024), 1, adapter).first_s for _ in range(4)]
    finally:
        done.set()
        thread.join()
    return heard[0], firsts


# --- learning -----------------------------------------------------------------------------------------


def trained(bench: Bench, server: Ours, rows: Sequence[dict[str, str]]) -> Figures:
    """Teach `rows`; the metrics of the checkpoint that comes of it."""
    checkpoint = server.published(server.teach(rows))
    metrics: Figures = json.loads((bench.folder / "home" / "metrics" / f"{checkpoint}.json").read_text())
    return metrics


def steps_per_s(metrics: Figures) -> float:
    return float(metrics["steps"] / metrics["training_seconds"])


def train(bench: Bench) -> Figures:
    found: Figures = {"ours": {}, "mlx-lm": {}}
    for name, make in (("masked", pair), ("text", text)):
        rows = [make(bench.prompts) for _ in range(10 * BATCH)]
        rates: dict[str, list[float]] = {who: [] for who in found}
        for _ in range(2):
            with bench.servers(bench.ours) as [server]:
                metrics = trained(bench, server, rows)
            rates["ours"].append(steps_per_s(metrics))
            rates["mlx-lm"].append(bench.lora(rows, bench.steps).steps_per_s)
        tokens = metrics["trained_tokens"] / metrics["steps"]  # prompts and padding too, of the same rows
        for who, some in rates.items():
            rate = statistics.mean(some)
            found[who][name] = {"steps_per_s": round(rate, 3), "tokens_per_s": round(rate * tokens)}
            found[who][name] |= {"lowest": round(min(some), 3), "highest": round(max(some), 3)}
    return found


# --- both at once -------------------------------------------------------------------------------------


def during(bench: Bench, server: Server, adapter: str | None, work: Callable[[], float]) -> Figures:
    """Four clients without and with `work` beside them, which tells its steps/s."""
    server.load(1, bench.prompts, 8, adapters=[adapter])
    alone = server.load(4, bench.prompts, bench.tokens, rounds=bench.rounds, adapters=[adapter])
    done = threading.Event()
    beside: list[Load] = []

    def clients() -> None:
        beside.append(server.load(4, bench.prompts, bench.tokens, adapters=[adapter], until=done))

    thread = threading.Thread(target=clients)
    thread.start()
    try:
        rate = work()
    finally:
        done.set()
        thread.join()
    return {"idle": Load.figures(alone), "training": Load.figures(*beside) | {"steps_per_s": round(rate, 3)}}


def both(bench: Bench) -> Figures:
    rows = [pair(bench.prompts) for _ in range(10 * BATCH)]
    # one copy of the base, about as many kept prompts as mlx-lm's server keeps (ten), and room for a token in a slice
    settings = {"serving.fuse": "off", "serving.prompt_cache_mb": 16, "training.slice_ms": 40}
    with bench.servers(lambda: bench.ours(**settings)) as [ours]:
        alone = steps_per_s(trained(bench, ours, rows))
        found = {"ours": during(bench, ours, "base", lambda: steps_per_s(trained(bench, ours, rows)))}
        found["ours"] |= {"peak_mb": round(ours.peak_mb()), "training alone": {"steps_per_s": round(alone, 3)}}
    alone, memory = bench.lora(rows, bench.steps).steps_per_s, 0.0

    def lora() -> float:
        nonlocal memory
        ran = bench.lora(rows, bench.steps)
        memory = ran.peak_mb
        return ran.steps_per_s

    with bench.servers(bench.theirs) as [theirs]:
        found["mlx-lm"] = during(bench, theirs, None, lora)
        found["mlx-lm"] |= {"peak_mb": round(theirs.peak_mb() + memory)}
        found["mlx-lm"] |= {"training alone": {"steps_per_s": round(alone, 3)}}
    for one in found.values():
        one["shares"] = {
            "decode": round(one["training"]["tokens_per_s"] / one["idle"]["tokens_per_s"], 3),
            "training": round(one["training"]["steps_per_s"] / one["training alone"]["steps_per_s"], 3),
        }
        one["shares"]["sum"] = round(sum(one["shares"].values()), 3)
    return found


def live(bench: Bench) -> Figures:
    rows = [pair(bench.prompts, 12) for _ in range(BATCH)]
    found: Figures = {"ours": {}, "mlx-lm": {}}
    for steps in (1, 10, 30):
        with bench.servers(lambda steps=steps: bench.ours(**{"training.max_steps": steps})) as [ours]:
            ours.load(1, bench.prompts, 4, adapters=["base"])
            started = time.perf_counter()
            ours.load(1, bench.prompts, 1, adapters=[ours.published(ours.teach(rows))])
            found["ours"][f"{steps} steps"] = {"s": round(time.perf_counter() - started, 2)}
        started = time.perf_counter()
        adapter = bench.lora(rows, steps).adapter
        with bench.servers(lambda adapter=adapter: bench.theirs(adapter)) as [theirs]:
            theirs.load(1, bench.prompts, 1)
            found["mlx-lm"][f"{steps} steps"] = {"s": round(time.perf_counter() - started, 2)}
    return found


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
    about = {"cpu": cpu, "cores": os.cpu_count(), "blas": blas.described(), "python": platform.python_version()}
    return about | {name: version(name) for name in names}


MEASURES = dict(zip(ROWS, (decode, many_adapters, first, long_prompts, train, both, live), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer (default 64)")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each side (default 6)")
    parser.add_argument("--steps", type=int, default=20, help="training steps, twice (default 20)")
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
