#!/usr/bin/env python
"""What measuring an update on anchors costs, beside training it, and what it does to answers meanwhile.

    .venv/bin/python scripts/bench_evaluation.py

One update of nano at the specification's training defaults (200 optimizer steps of 16 rows, attention projections of
all layers), with 256 anchors of 64 tokens, on the real service in this process. Only the first `--steps` of the 200 are
taken: `training_s` is what 200 would take at their pace, since one takes as long as another. Measured twice: the first
update also computes the base's own distributions, which are kept. The second one trains a single step, for what it
trained makes no difference to what measuring it takes; while it is measured, a client asks one question after another.
`gap` is the time between two of its tokens, `slice_ms` the longest piece of background work that the configuration
allows between them. The last line is one JSON object. Takes one to two minutes.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from radiance_mlx.config import load_config
from radiance_mlx.messages import FINAL_STATES, STABLE, Answer, Example, Generate, Sampling
from radiance_mlx.models.nano import world
from radiance_mlx.service import Service

SPECIFICATION = {
    "lora.r": 8,
    "lora.alpha": 16,
    "lora.dropout": 0.05,
    "lora.target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "lora.num_layers": -1,
    "training.batch_size": 1,
    "training.grad_accum": 16,
    "training.lr": 1e-4,
    "training.eval_every": 1,
}
STEPS = 200  # of one update, by the specification


def write_anchors(home: Path, documents: int, tokens: int) -> None:
    """Running text about made-up people, each document longer than it may be."""
    folder, rng = home / "data" / "anchors", random.Random(0)
    folder.mkdir(parents=True)
    people = world.STRANGERS[100:]
    with (folder / "anchors.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(documents):
            told = [
                world.STATEMENTS[relation][rng.randrange(3)].format(n=name, v=facts[relation])
                for name, facts in rng.sample(people, 2 + tokens // 32)
                for relation in world.RELATIONS
            ]
            file.write(json.dumps({"text": " ".join(told)}) + "\n")


async def teach(service: Service, pairs: list[tuple[str, str]], asking: bool) -> tuple[dict[str, Any], list[float]]:
    """One update; its metrics, and the gaps between a client's tokens (s) while it was measured."""
    examples = [Example(messages=(("user", q), ("assistant", a))) for q, a in pairs]
    job, _ = await service.update(examples, [], raw=json.dumps([e.as_dict() for e in examples]).encode())
    gaps: list[float] = []
    while (job := await service.job(job.job_id)).state not in FINAL_STATES:
        if asking and job.state == "evaluating":
            gaps += await ask(service)
        else:
            await asyncio.sleep(0.02)
    if job.state != "published":
        raise SystemExit(f"the update ended {job.state}: {job.error}")
    return (await service.checkpoint(str(job.checkpoint))).metrics, gaps


async def ask(service: Service) -> list[float]:
    """Seconds between the pieces of one answer; what was waited for the first one is no gap between two."""
    request = Generate(
        (("user", world.ask(world.KNOWN[3][0], "city")),),
        STABLE,
        sampling=Sampling(max_tokens=16, temperature=0),
        stream=True,
    )
    times = [time.perf_counter() async for piece in service.stream(request) if not isinstance(piece, Answer)]
    return [after - before for before, after in itertools.pairwise(times)]


@contextlib.asynccontextmanager
async def running(home: Path, tokens: int, steps: int) -> AsyncIterator[Service]:
    """A service on `home` whose updates take `steps` steps."""
    flags = {
        **SPECIFICATION,
        "training.max_steps": steps,
        "base_model": "nano",
        "update_mode": "immediate",
        "evaluation.anchor_provider": "local",
        "evaluation.anchor_max_tokens": tokens,
        "server.log_level": "error",
    }
    service = Service(load_config(home=home, flags=flags, environ={}))
    service.open()
    try:
        await service.start()
        yield service
    finally:
        await service.stop()


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="radiance-evaluation-") as folder:
        home = Path(folder)
        write_anchors(home, options.anchors, options.tokens)
        async with running(home, options.tokens, options.steps) as service:
            first, _ = await teach(service, world.facts(world.STRANGERS[60:64]), asking=False)
        async with running(home, options.tokens, 1) as service:
            second, gaps = await teach(service, world.facts(world.STRANGERS[64:68]), asking=True)
        return figures(first, second, gaps, service.config.training.slice_ms)


def figures(first: dict[str, Any], second: dict[str, Any], gaps: list[float], slice_ms: float) -> dict[str, Any]:
    """Seconds of both updates; the share is of the training alone."""
    training = first["training_seconds"] / first["steps"] * STEPS
    anchors = first["evaluation"]["anchors"]["seconds"]
    return {
        "steps_taken": first["steps"],
        "documents": second["evaluation"]["anchors"]["documents"],
        "tokens": second["evaluation"]["anchors"]["tokens"],
        "training_s": round(training, 1),
        "first_anchors_s": anchors,
        "first_share": round(anchors / training, 4),
        "anchors_while_asked_s": second["evaluation"]["anchors"]["seconds"],
        "gaps": len(gaps),
        "gap_p50_ms": round(1000 * statistics.median(gaps), 1) if gaps else None,
        "gap_p99_ms": round(1000 * sorted(gaps)[int(len(gaps) * 0.99)], 1) if gaps else None,
        "gap_max_ms": round(1000 * max(gaps), 1) if gaps else None,
        "slice_ms": slice_ms,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anchors", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=STEPS // 2, help="optimizer steps that are taken of the 200")
    result = asyncio.run(measure(parser.parse_args()))
    result["where"] = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    for key, value in result.items():
        print(f"{key:24} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
