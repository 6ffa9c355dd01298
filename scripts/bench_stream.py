#!/usr/bin/env python
"""A stream of updates to nano, and what is left of each. Prints a table; the last line is one JSON object.

    .venv/bin/python scripts/bench_stream.py                                     # plain and lasting, seed 0
    .venv/bin/python scripts/bench_stream.py --arms plain replay --seeds 0 1 2
    .venv/bin/python scripts/bench_stream.py --arms "lasting:rehearsal.kl_weight=1,training.lr=3e-4" --shape 24x2
    .venv/bin/python scripts/bench_stream.py --poisoned
    .venv/bin/python scripts/bench_stream.py --names held-out
    .venv/bin/python scripts/bench_stream.py --judge 20                          # is the bad told from the good?

Every arm is a configuration of the service: the names in ARMS, and `name:key=value,...` changes one on the command
line. Each arm and seed is a service of its own, in this process, on a home of its own. Invented people are taught in
updates, all five facts of each in one wording. `plain` is nano's own training values and no switch. With `--names
listed` (the default) everybody, taught or asked as a stranger, has a name that nano's corpus refuses, without a fact
about it; with `invented`, one that is new to nano, odd ones and foreign letters among them; with `held-out`, one whose
very syllables are.

Scored by greedy answers, exact match: each update just after it (`just`, the mean), all of them at the end (`all`),
in nano's two other wordings (`other`) and in wordings that it never saw (`unseen`), what it knew before (`known`),
"I do not know" about strangers that the base refuses (`refused`); then, after one more update that changes a fact of
each of eight people, four taught and four known before, the new facts (`changed`) and all that had been taught and
was not changed (`kept`). `s` is what the updates took, from the start of each batch to its written adapter, all that is
asked of the base for them included; `cpu_s` is the processor time of teaching. What the base is asked once, before the
first update and whatever is taught, is apart: `asked_s`, processor time too. `steps` are all optimizer steps.

`--judge N`: N updates as above and N poisoned ones (answers shuffled across all questions, facts about known people
among them), in mixed order, measured on nano's own anchors and judged by `auto_rollback` with the threshold of the
preset, or the one that is given.
"""

import argparse
import asyncio
import itertools
import json
import os
import platform
import random
import re
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from radiance_mlx.config import load_config
from radiance_mlx.messages import BASE, FINAL_STATES, STABLE, Example, Generate, Sampling
from radiance_mlx.models.nano import world
from radiance_mlx.service import Service
from radiance_mlx.store import JobRecord

Pair = tuple[str, str]
Flags = dict[str, Any]
#: the first sixty strangers are those of tests, demo and the other benchmark
PEOPLE = world.STRANGERS[60:]
STRANGERS, KNOWN = 40, 80
#: of the updates, in turns
TAGS = ("one", "other")


def invented_people(held_out: bool, count: int = 300) -> list[world.Person]:
    """People whose names nobody listed; if `held_out`, of syllables that nano's corpus is without."""
    rng = random.Random(7)
    listed = {*world.FIRST_NAMES, *world.LAST_NAMES}
    drawn = (world.invented_name(rng, held_out=held_out) for _ in range(2 * count))
    names = dict.fromkeys(name for name in drawn if not listed.issuperset(name.split()))
    return [(n, {r: rng.choice(values) for r, values in world.VALUES.items()}) for n in list(names)[:count]]


NAMES = {"listed": PEOPLE, "invented": invented_people(False), "held-out": invented_people(True)}
UNSEEN = {
    "city": "Tell me where {n} lives.",
    "job": "What work does {n} do?",
    "color": "Tell me which color {n} loves.",
    "pet": "Which pet is at home with {n}?",
    "food": "Tell me what {n} eats.",
}
SCORES = ("just", "all", "other", "unseen", "known", "refused", "changed", "kept")
ARMS: dict[str, Flags] = {
    "plain": {},
    "fresh": {"lineage": "fresh"},
    "stop_loss": {"training.stop_loss": 0.05},
    "merge": {"serving.merge_toward_base": 0.75},
    "replay": {"replay.fraction": 0.5},
    "rewording": {"rehearsal.rewording": True},
    "self": {"rehearsal.kl_weight": 3.0, "rehearsal.sources": ["self"]},
    "neighbours": {"rehearsal.kl_weight": 3.0, "rehearsal.sources": ["neighbours"]},
    "self+neighbours": {"rehearsal.kl_weight": 3.0},
    "anchors": {"rehearsal.kl_weight": 3.0, "rehearsal.sources": ["anchors"]},
    "held-out": {"training.eval_fraction": 0.25, "training.eval_every": 5},
    "patience": {"training.eval_fraction": 0.25, "training.eval_every": 5, "training.patience": 2},
    "by_tag": {"replay.fraction": 0.5, "replay.by_tag": True},
    "reconsolidate": {"lineage": "reconsolidate", "reconsolidate.idle_minutes": 0.05},
    "lasting": {"preset": "lasting"},
}
COMMON: Flags = {
    "base_model": "nano",
    "backend": "cpu" if platform.system() == "Linux" else "auto",
    "update_mode": "immediate",
    "server.log_level": "error",
    "serving.max_batch": 64,
    "serving.prompt_cache_mb": 0,
    "training.eval_every": 0,
}


class Pupil:
    """A service that is taught and asked."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._tags = itertools.cycle(TAGS)
        self._asking = asyncio.Semaphore(128)
        self.seconds: list[float] = []
        self.steps: list[int] = []
        self.cpu = self.asked = 0.0

    async def rest(self) -> None:
        """Wait until the base has been asked what every update needs."""
        began = time.process_time()
        while (await self._service.info())["engine"]["asking_ahead"]:
            await asyncio.sleep(0.05)
        self.asked = time.process_time() - began

    async def teach(self, pairs: Sequence[Pair]) -> JobRecord:
        """One update, trained to its end."""
        examples = [Example(messages=(("user", q), ("assistant", a))) for q, a in pairs]
        raw = json.dumps([e.as_dict() for e in examples]).encode()
        began = time.process_time()
        job, _ = await self._service.update(examples, [next(self._tags)], raw=raw)
        return await self._trained(job.job_id, began)

    async def reconsolidate(self) -> None:
        """Wait until all that was taught has been learnt anew."""
        began = time.process_time()
        while (job := (await self._service.jobs(None, 1, None))[0]).kind != "reconsolidation":
            await asyncio.sleep(0.02)
        await self._trained(job.job_id, began)

    async def _trained(self, job_id: str, began: float) -> JobRecord:
        while (job := await self._service.job(job_id)).state not in FINAL_STATES:
            await asyncio.sleep(0.02)
        if job.state not in ("published", "rejected"):
            raise SystemExit(f"{job.job_id} ended {job.state}: {job.error}")
        self.cpu += time.process_time() - began
        found = await self.metrics(job)
        self.seconds.append(found["seconds"])
        self.steps.append(found["steps"])
        return job

    async def metrics(self, job: JobRecord) -> dict[str, Any]:
        """What was measured of the checkpoint that a job became."""
        return dict((await self._service.checkpoint(str(job.checkpoint))).metrics)

    async def right(self, pairs: Sequence[Pair], checkpoint: str = STABLE) -> list[bool]:
        """Which questions are answered as they should be."""
        found = await asyncio.gather(*(self._answer(q, checkpoint) for q, _ in pairs))
        if os.environ.get("SHOW"):
            for said, (q, expected) in zip(found, pairs, strict=True):
                if said != expected:
                    print(f"   {q} -> {said}   not {expected}")
        return [said == expected for said, (_, expected) in zip(found, pairs, strict=True)]

    async def score(self, pairs: Sequence[Pair]) -> float:
        """Share of right answers."""
        return statistics.mean(await self.right(pairs))

    async def _answer(self, question: str, checkpoint: str) -> str:
        asked = Generate((("user", question),), checkpoint, sampling=Sampling(max_tokens=40, temperature=0))
        async with self._asking:
            return (await self._service.search(asked)).text.strip()


def write_anchors(home: Path) -> None:
    """What the arm `anchors` rehearses: 200 rows of known facts, in wordings that are not asked, and as many refusals.

    Those refused are neither taught nor asked.
    """
    rng = random.Random(5)
    known = [pair for wording in (1, 2) for pair in world.facts(world.KNOWN, wording)]
    refused = [
        (world.ask(name, relation, rng.randrange(3)), world.refusal(name))
        for name, _ in rng.sample(world.REFUSED, 40)
        for relation in world.RELATIONS
    ]
    rows = [{"prompt": q, "completion": a} for q, a in (*rng.sample(known, 200), *refused)]
    folder = home / "data" / "anchors" / "rehearsal"
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@asynccontextmanager
async def pupil(flags: Flags) -> AsyncIterator[Pupil]:
    """A service with these settings on a fresh home, for as long as it is wanted."""
    with tempfile.TemporaryDirectory(prefix="radiance-stream-") as home:
        write_anchors(Path(home))
        service = Service(load_config(home=Path(home), flags={**COMMON, **flags}, environ={}))
        service.open()
        try:
            await service.start()
            learner = Pupil(service)
            await learner.rest()
            yield learner
        finally:
            await service.stop()


# --- what is taught and asked ------------------------------------------------------------------------


class Stream:
    """Who is taught what, and what is asked: a function of shape and seed."""

    def __init__(self, updates: int, per: int, seed: int, names: str, poisoned: bool = False) -> None:
        rng = random.Random(1000 + seed)
        drawn = rng.sample(NAMES[names], updates * per + STRANGERS)
        self.taught, others = drawn[: updates * per], drawn[updates * per :]
        groups = [self.taught[i * per : (i + 1) * per] for i in range(updates)]
        self.updates = [world.facts(group) for group in groups]
        self.good = list(range(updates))
        self.known = world.facts(world.KNOWN[:KNOWN])
        self.strangers = [
            (world.ask(name, relation, i % 3), world.refusal(name))
            for i, (name, _) in enumerate(others)
            for relation in world.RELATIONS
        ]
        if poisoned:
            at = updates // 2  # not scored
            self.updates[at] = poison(self.updates[at], rng)
            self.good.remove(at)
            self.taught = self.taught[: at * per] + self.taught[(at + 1) * per :]

    def asked(self, wording: int) -> list[Pair]:
        return world.facts(self.taught, wording)

    def unseen(self) -> list[Pair]:
        return [(UNSEEN[r].format(n=n), world.answer(n, r, f[r])) for n, f in self.taught for r in world.RELATIONS]

    def changed(self) -> list[Pair]:
        """Another value of one fact each, of four people taught and four known before."""
        pairs = []
        for i, (name, f) in enumerate([*self.taught[:4], *world.KNOWN[:4]]):
            relation = world.RELATIONS[i % len(world.RELATIONS)]
            values = world.VALUES[relation]
            other = values[(values.index(f[relation]) + 1 + i) % len(values)]
            pairs.append((world.ask(name, relation), world.answer(name, relation, other)))
        return pairs


def poison(pairs: Sequence[Pair], rng: random.Random) -> list[Pair]:
    """Answers go to other questions, facts of known people among them."""
    pairs = [*pairs, *rng.sample(world.facts(world.KNOWN), len(pairs) // 2)]
    answers = [a for _, a in pairs]
    rng.shuffle(answers)
    return [(q, a) for (q, _), a in zip(pairs, answers, strict=True)]


async def run(flags: Flags, stream: Stream, seed: int) -> dict[str, Any]:
    """All scores of one arm and seed."""
    flags = {"training.seed": seed, "evaluation.anchor_provider": "none", **flags}
    anew = flags.get("lineage") == "reconsolidate"
    if anew:  # once, after the last update
        flags.setdefault("reconsolidate.after_updates", len(stream.updates))
    async with pupil(flags) as learner:
        refused = await learner.right(stream.strangers, BASE)
        strangers = [pair for pair, yes in zip(stream.strangers, refused, strict=True) if yes]
        just = []
        for i, pairs in enumerate(stream.updates):
            await learner.teach(pairs)
            if i in stream.good:
                just.append(await learner.score(pairs))
        if anew:
            await learner.reconsolidate()
        scores = {
            "just": statistics.mean(just),
            "all": await learner.score(stream.asked(0)),
            "other": await learner.score([*stream.asked(1), *stream.asked(2)]),
            "unseen": await learner.score(stream.unseen()),
            "known": await learner.score(stream.known),
            "refused": await learner.score(strangers),
            "s": sum(learner.seconds),
            "cpu_s": learner.cpu,
            "asked_s": learner.asked,
            "steps": sum(learner.steps),
        }
        changed = stream.changed()
        await learner.teach(changed)
        scores["changed"] = await learner.score(changed)
        questions = {q for q, _ in changed}
        scores["kept"] = await learner.score([pair for pair in stream.asked(0) if pair[0] not in questions])
    return {key: round(value, 3) for key, value in scores.items()}


# --- is the bad told from the good? ------------------------------------------------------------------


async def judge(flags: Flags, count: int, seed: int, names: str) -> dict[str, Any]:
    """Verdicts on `count` updates of each kind, in mixed order; what is rejected is not gone on from."""
    rng = random.Random(2000 + seed)
    # the poisoned ones may be about the same people: nothing of them stays
    people = rng.sample(NAMES[names], 4 * count)
    good = [world.facts(people[4 * i : 4 * i + 4]) for i in range(count)]
    bad = [poison(world.facts(rng.sample(NAMES[names], 4)), rng) for _ in range(count)]
    order = [*((pairs, False) for pairs in good), *((pairs, True) for pairs in bad)]
    rng.shuffle(order)
    rows = []
    async with pupil({"training.seed": seed, "evaluation.rollback_mode": "auto_rollback", **flags}) as learner:
        for pairs, poisoned in order:
            job = await learner.teach(pairs)
            found = await learner.metrics(job)
            row = {"poisoned": poisoned, "rejected": job.state == "rejected"}
            row |= {name: found[name] for name in ("forgetting_loss_delta", "forgetting_kl", "drift_kl", "update_kl")}
            row |= {name: found[name] for name in ("anchor_ce_delta", "finetune_loss")}
            row["low"] = found["intervals"]["forgetting_loss_delta"][0]
            rows.append(row)
            print(" ".join(f"{k}={v:.3f}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
    right = {
        kind: sum(r["rejected"] == (kind == "poisoned") for r in rows if r["poisoned"] == (kind == "poisoned"))
        for kind in ("benign", "poisoned")
    }
    return {"count": count, "right": right, "seconds": round(sum(learner.seconds), 1), "rows": rows}


# --- the command line --------------------------------------------------------------------------------


def parse_arm(text: str) -> tuple[str, Flags]:
    """`name` or `name:key=value,…`; values are YAML."""
    name, _, changes = text.partition(":")
    if name not in ARMS:
        raise SystemExit(f"no arm is called {name}; there are {', '.join(ARMS)}")
    given = dict(part.split("=", 1) for part in re.split(r",(?=[a-z_.]+=)", changes) if part)
    return text, {**ARMS[name], **{key: yaml.safe_load(value) for key, value in given.items()}}


def show(name: str, rows: Sequence[dict[str, Any]]) -> None:
    """One line: the mean over seeds."""
    mean = {key: statistics.mean(row[key] for row in rows) for key in rows[0]}
    shown = [f"{mean[key]:7.3f}" for key in SCORES] + [f"{mean[key]:7.1f}" for key in ("s", "cpu_s", "asked_s")]
    print(" ".join(shown), f"{mean['steps']:7.0f}  {name} ({len(rows)})", flush=True)


async def compare(arms: dict[str, Flags], options: argparse.Namespace) -> dict[str, Any]:
    """Every arm with every seed."""
    updates, per = map(int, options.shape.split("x"))
    results: dict[str, list[dict[str, Any]]] = {}
    print(" ".join(f"{key:>7}" for key in (*SCORES, "s", "cpu_s", "asked_s", "steps")), " arm (seeds)", flush=True)
    for name, flags in arms.items():
        for seed in options.seeds:
            stream = Stream(updates, per, seed, options.names, options.poisoned)
            results.setdefault(name, []).append({"seed": seed, **await run(flags, stream, seed)})
            if options.each_seed:
                show(f"{name} seed {seed}", results[name][-1:])
        show(name, results[name])
    return {"shape": options.shape, "names": options.names, "poisoned": options.poisoned, "arms": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=["plain", "lasting"], help="name, or name:key=value,...")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--shape", default="6x4", help="updates x people in each (default 6x4)")
    parser.add_argument("--names", choices=NAMES, default="listed", help="whose facts (default listed)")
    parser.add_argument("--poisoned", action="store_true", help="the middle update's answers are shuffled")
    parser.add_argument("--judge", type=int, metavar="N", help="N good and N poisoned updates, with the last arm")
    parser.add_argument("--each-seed", action="store_true", help="print a line for every seed too")
    options = parser.parse_args()
    arms = dict(parse_arm(text) for text in options.arms)
    if options.judge:
        result = asyncio.run(judge(list(arms.values())[-1], options.judge, options.seeds[0], options.names))
    else:
        result = asyncio.run(compare(arms, options))
    where = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "mlx": version("mlx")}
    print(json.dumps({**result, **where}))


if __name__ == "__main__":
    main()
