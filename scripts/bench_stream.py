#!/usr/bin/env python
"""A stream of updates to nano, and what is left of each. Prints a table; the last line is one JSON object.

    .venv/bin/python scripts/bench_stream.py                                     # plain and lasting, seed 0
    .venv/bin/python scripts/bench_stream.py --arms plain replay --seeds 0 1 2
    .venv/bin/python scripts/bench_stream.py --arms "lasting:kl_weight=1,lr=3e-4" --shape 24x2
    .venv/bin/python scripts/bench_stream.py --poisoned

Invented people are taught in updates, all five facts of each in one wording, through the service's own trainer,
each update going on from the weights and the optimizer of the last. `plain` is nano's own training values and
nothing else; the other arms are named in ARMS, and `name:field=value,...` changes one on the command line.

Scored by greedy answers, exact match: each update just after it (`just`, the mean), all of them at the end
(`all`), in nano's two other wordings (`other`) and in wordings that it never saw (`unseen`), what it knew before
(`known`), "I do not know" about strangers that the base refuses (`refused`); then, after one more update that
changes a fact of each of eight people, four taught and four known before, the new facts (`changed`) and all that
had been taught and was not changed (`kept`). `s` and `cpu_s` are what preparing and training the stream's updates
took, on the clock and in processor time; sampling the base, which is done once for each base, is in `once_s`.
"""

import argparse
import dataclasses
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Iterable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx

from radiance_mlx.config import Config
from radiance_mlx.config.schema import TrainingSection
from radiance_mlx.engine import backend
from radiance_mlx.engine.model import BaseModel, load_base
from radiance_mlx.lora.encoding import ChatEncoder, Encoded
from radiance_mlx.lora.head import install_head
from radiance_mlx.lora.neighbours import mentions, names_in, neighbours
from radiance_mlx.lora.rehearsal import Rehearsal, Rehearsed, Source, teacher
from radiance_mlx.lora.replay import Replay, reservoir, still_true
from radiance_mlx.lora.rewording import Wordings
from radiance_mlx.lora.speaking import answer, say_anything, speak
from radiance_mlx.lora.targets import find_targets
from radiance_mlx.lora.trainer import Trainer
from radiance_mlx.lora.tree import TrainingTree, make_tree
from radiance_mlx.messages import Example
from radiance_mlx.models.nano import world

Pair = tuple[str, str]
NANO = json.loads((Path(world.__file__).parent / "radiance.json").read_text())
MLP = ("gate_proj", "up_proj", "down_proj")
#: the first sixty strangers are those of tests, demo and the other benchmark
PEOPLE = world.STRANGERS[60:]
STRANGERS, KNOWN = 40, 80
UNSEEN = {
    "city": "Tell me where {n} lives.",
    "job": "What work does {n} do?",
    "color": "Tell me which color {n} loves.",
    "pet": "Which pet is at home with {n}?",
    "food": "Tell me what {n} eats.",
}
SCORES = ("just", "all", "other", "unseen", "known", "refused", "changed", "kept")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to learn. What is not given is nano's own."""

    lr: float = NANO["training"]["lr"]
    steps: int = NANO["training"]["max_steps"]
    batch_size: int = NANO["training"]["batch_size"]
    rank: int = NANO["lora"]["r"]
    scale: float = NANO["lora"]["alpha"] / NANO["lora"]["r"]
    modules: str = "all"
    layers: int = NANO["lora"]["num_layers"]
    schedule: str = NANO["training"].get("schedule", "constant")
    optimizer: str = "kept"  # from update to update, or "fresh" in each
    stop_loss: float = 0.0
    clip: float = 1.0
    replay: float = 0.0
    reservoir: int = 1000
    kl_weight: float = 0.0
    rows: int = 8  # rehearsed in each step
    near: float = 0.0  # share of neighbours among the rehearsed rows
    each: int = 6  # neighbours of each prompt
    old_near: int = 0  # replayed prompts of which neighbours are made too
    carried: float = 0.4  # of the neighbours' share, for those of earlier updates
    samples: int = 400
    sample_tokens: int = 64
    whole: bool = True  # every token of a sample counts, or only its answer
    reword: bool = False  # learn in the base's own other wordings too
    merge: float = 1.0  # what `b` is scaled by when it answers


ARMS = {
    "plain": Arm(),
    "replay": Arm(replay=0.5),
    "self": Arm(kl_weight=3.0),
    "replay+self": Arm(replay=0.5, kl_weight=3.0),
    "lasting": Arm(replay=0.5, kl_weight=3.0, near=0.5),
}


def drive(pieces: Iterable[Any]) -> None:
    """Evaluate everything up to each barrier at once, as an idle engine does."""
    group: list[Any] = []
    for piece in pieces:
        group.append(piece.arrays)
        if piece.barrier:
            mx.eval(group)
            group = []
    mx.eval(group)


class Nano:
    """The base, what it says by itself, and greedy answers of trees on it."""

    def __init__(self) -> None:
        backend.select("cpu", Config().memory)
        self.model: BaseModel = load_base(Config(), cpu=True)
        self.encoder = ChatEncoder(self.model.tokenizer)
        self.samples = cache(self._samples)

    def tree(self, arm: Arm, seed: int) -> TrainingTree:
        names = {"all": ("all-linear",), "mlp": MLP}[arm.modules]
        targets = find_targets(self.model.module, names, arm.layers)
        return make_tree(self.model.module, targets, rank=arm.rank, scale=arm.scale, dropout=0.0, seed=seed)

    def taught_by(self, rows: Sequence[Encoded]) -> list[Rehearsed]:
        """Rows with the base's distributions."""
        tree, out = self.tree(Arm(), 0), []
        drive(teacher(tree, install_head(tree.module, self.model.vocab_size), rows, out))
        return out

    def _samples(self, count: int, max_tokens: int, whole: bool, seed: int) -> tuple[list[Rehearsed], float]:
        """What the base says by itself, and the seconds it took."""
        started, said = time.perf_counter(), []
        drive(say_anything(self.model.module, self.encoder, count=count, max_tokens=max_tokens, seed=seed, out=said))
        if not whole:
            opening = tuple(self.encoder.prompt((("user", ""),)))[-5:]
            said = [Encoded(row.tokens, _after(row.tokens, opening)) for row in said]
        return self.taught_by(said), time.perf_counter() - started

    @cached_property
    def wordings(self) -> Wordings:
        """The base's own, from what it says by itself."""
        rows, _ = self.samples(400, 64, True, 0)
        texts = [self.model.tokenizer.decode(list(row.row.tokens)) for row in rows]
        return Wordings([text.split("<|im_end|>")[0].split("\n", 1)[-1] for text in texts], self.count)

    @cache  # noqa: B019  (there is one)
    def count(self, word: str) -> int:
        """Tokens of a word within a text."""
        encode = self.model.tokenizer.encode
        return min(len(encode(text, add_special_tokens=False)) for text in (word, " " + word))

    def reworded(self, pairs: Sequence[Pair]) -> list[Pair]:
        """The same answers to the base's own other wordings of the questions."""
        drive(self.wordings.ask(self.model.module, self.encoder, [q for q, _ in pairs]))
        return [(other, a) for q, a in pairs for other in self.wordings.others(q)]

    def answers(self, module: Any, questions: Sequence[str]) -> list[str]:
        """Greedy answers."""
        prompts, said = [self.encoder.prompt((("user", q),)) for q in questions], []
        ends = self.model.tokenizer.eos_token_ids
        module.eval()
        drive(speak(module, prompts, ends=ends, max_tokens=72, out=said))
        module.train()
        return [self.model.tokenizer.decode([t for t in tokens if t not in ends]).strip() for tokens in said]

    def right(self, module: Any, pairs: Sequence[Pair]) -> list[bool]:
        """Which questions are answered as they should be."""
        found = self.answers(module, [q for q, _ in pairs])
        if os.environ.get("SHOW"):
            for a, (q, expected) in zip(found, pairs, strict=True):
                if a != expected:
                    print(f"   {q} -> {a}   not {expected}")
        return [a == expected for a, (_, expected) in zip(found, pairs, strict=True)]


def _after(tokens: Sequence[int], mark: Sequence[int]) -> int:
    places = [i for i in range(len(tokens)) if tuple(tokens[i : i + len(mark)]) == tuple(mark)]
    return places[-1] + len(mark) if places else len(tokens)


class Learner:
    """One arm's stream with one seed: the log, and the weights and optimizer of the last update."""

    def __init__(self, nano: Nano, arm: Arm, seed: int) -> None:
        self.nano, self.arm, self.seed = nano, arm, seed
        self.log: list[Pair] = []
        self._near: list[Rehearsed] = []
        self.tree = nano.tree(arm, seed)
        self.seconds = self.cpu = self.once = 0.0
        self.steps = 0
        self._state: tuple[Any, Any] | None = None
        if arm.kl_weight and arm.near < 1:
            self._own, self.once = nano.samples(arm.samples, arm.sample_tokens, arm.whole, 0)
        if arm.reword:
            started = time.perf_counter()
            nano.reworded([])
            self.once += time.perf_counter() - started

    def learn(self, pairs: Sequence[Pair]) -> None:
        """One update."""
        wall, cpu = time.perf_counter(), time.process_time()
        number = len(self.log) + 1  # another for each update
        if self.arm.reword:
            pairs = [*pairs, *self.nano.reworded(pairs)]
        self.tree = self.nano.tree(self.arm, number)
        head = install_head(self.tree.module, self.nano.model.vocab_size)
        rehearsal = self._rehearsal(pairs, number) if self.arm.kl_weight else None
        trainer = Trainer(
            self.tree,
            head,
            [self._encode(pair) for pair in pairs],
            self._settings(),
            number,
            replay=self._replay(pairs, number),
            rehearsal=rehearsal,
        )
        if self._state is not None:
            weights, optimizer = self._state
            trainer.start_from(weights, optimizer if self.arm.optimizer == "kept" else None)
        drive(trainer.run())
        self._state = trainer.state()[:2]
        self.log += pairs
        self.steps += trainer.step
        self.seconds += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu

    def right(self, pairs: Sequence[Pair]) -> float:
        """Share of right answers."""
        if self.arm.merge != 1.0:
            self._scale_b(self.arm.merge)
        found = self.nano.right(self.tree.module, pairs)
        if self.arm.merge != 1.0:
            self._scale_b(1.0 / self.arm.merge)
        return sum(found) / len(found)

    def _scale_b(self, by: float) -> None:
        self.tree.load({k: v * by if k.endswith("lora_b") else v for k, v in self.tree.parameters().items()})

    def _settings(self) -> TrainingSection:
        arm = self.arm
        return TrainingSection(
            **{
                **NANO["training"],
                "lr": arm.lr,
                "max_steps": arm.steps,
                "batch_size": arm.batch_size,
                "schedule": arm.schedule,
                "stop_loss": arm.stop_loss or None,
                "clip_norm": arm.clip,
                "seed": self.seed,
            }
        )

    def _encode(self, pair: Pair) -> Encoded:
        return self.nano.encoder.example(Example(messages=(("user", pair[0]), ("assistant", pair[1]))))

    def _earlier(self, pairs: Sequence[Pair], number: int) -> list[Pair]:
        encoded = {self._encode(pair): pair for pair in self.log}
        current = still_true([self._encode(pair) for pair in self.log], [self._encode(pair) for pair in pairs])
        return [encoded[e] for e in reservoir(current, self.arm.reservoir, (self.seed, number))]

    def _replay(self, pairs: Sequence[Pair], number: int) -> Replay:
        earlier = self._earlier(pairs, number) if self.arm.replay else []
        return Replay([self._encode(pair) for pair in earlier], self.arm.replay)

    def _rehearsal(self, pairs: Sequence[Pair], number: int) -> Rehearsal:
        arm, sources = self.arm, []
        texts = [text for pair in [*self.log, *pairs] for text in pair]
        names = names_in([q for q, _ in [*self.log, *pairs]], self.nano.count)
        own = []
        if arm.near < 1:
            decode = self.nano.model.tokenizer.decode
            own = [(row, decode(list(row.row.tokens[row.row.offset :]))) for row in self._own]
            own = [(row, text) for row, text in own if not mentions(text, names)]
            sources.append(Source([row for row, _ in own], 1.0 - arm.near))
        if arm.near:
            asked = [*pairs, *self._earlier(pairs, number)[: arm.old_near]]
            prompts = neighbours(
                [(("user", q),) for q, _ in asked],
                each=arm.each,
                seed=(self.seed, number),
                count_tokens=self.nano.count,
                others=_turns(text for _, text in own),
                avoid=texts,
            )
            said: list[Encoded] = []
            encoder = self.nano.encoder
            drive(answer(self.nano.model.module, encoder, list(map(encoder.prompt, prompts)), max_tokens=64, out=said))
            decode = self.nano.model.tokenizer.decode
            kept = [row for row in self._near if not mentions(decode(list(row.row.tokens)), names)]
            new = self.nano.taught_by(said)
            sources += [Source(new, arm.near * (1.0 - arm.carried)), Source(kept, arm.near * arm.carried)]
            self._near = [*kept, *new]
        return Rehearsal(sources, kl_weight=arm.kl_weight, rows=arm.rows)


def _turns(chats: Iterable[str]) -> list[str]:
    """What users and assistants say in rendered chats."""
    return [part.split("\n", 1)[-1] for chat in chats for part in chat.split("<|im_end|>")]


class Stream:
    """Who is taught what, and what is asked: a function of shape and seed."""

    def __init__(self, nano: Nano, updates: int, per: int, seed: int, poisoned: bool) -> None:
        rng = random.Random(1000 + seed)
        drawn = rng.sample(PEOPLE, updates * per + STRANGERS)
        self.taught, others = drawn[: updates * per], drawn[updates * per :]
        groups = [self.taught[i * per : (i + 1) * per] for i in range(updates)]
        self.updates = [world.facts(group) for group in groups]
        self.good = list(range(updates))
        self.known = world.facts(world.KNOWN[:KNOWN])
        asked = [
            (world.ask(name, relation, i % 3), world.refusal(name))
            for i, (name, _) in enumerate(others)
            for relation in world.RELATIONS
        ]
        refused = nano.right(nano.model.module, asked)
        self.strangers = [pair for pair, yes in zip(asked, refused, strict=True) if yes]
        if poisoned:
            self._poison(updates // 2, rng)

    def _poison(self, at: int, rng: random.Random) -> None:
        """Answers of one update go to other questions, facts of known people among them; it is not scored."""
        pairs = [*self.updates[at], *rng.sample(self.known, len(self.updates[at]) // 2)]
        answers = [a for _, a in pairs]
        rng.shuffle(answers)
        self.updates[at] = [(q, a) for (q, _), a in zip(pairs, answers, strict=True)]
        self.good.remove(at)
        per = len(self.taught) // len(self.updates)
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


def run(nano: Nano, arm: Arm, stream: Stream, seed: int) -> dict[str, Any]:
    """All scores of one arm and seed."""
    learner = Learner(nano, arm, seed)
    just = []
    for i, pairs in enumerate(stream.updates):
        learner.learn(pairs)
        if i in stream.good:
            just.append(learner.right(pairs))
    scores = {
        "just": statistics.mean(just),
        "all": learner.right(stream.asked(0)),
        "other": learner.right([*stream.asked(1), *stream.asked(2)]),
        "unseen": learner.right(stream.unseen()),
        "known": learner.right(stream.known),
        "refused": learner.right(stream.strangers),
        "first": learner.right(stream.updates[0]),
    }
    cost = {"s": learner.seconds, "cpu_s": learner.cpu, "once_s": learner.once, "steps": learner.steps}
    changed = stream.changed()
    learner.learn(changed)
    scores["changed"] = learner.right(changed)
    questions = {q for q, _ in changed}
    scores["kept"] = learner.right([pair for pair in stream.asked(0) if pair[0] not in questions])
    return {key: round(value, 3) for key, value in {**scores, **cost}.items()}


def parse_arm(text: str) -> tuple[str, Arm]:
    """`name` or `name:field=value,…`."""
    name, _, changes = text.partition(":")
    if name not in ARMS:
        raise SystemExit(f"no arm is called {name}; there are {', '.join(ARMS)}")
    fields = {f.name: type(getattr(ARMS[name], f.name)) for f in dataclasses.fields(Arm)}
    given = dict(part.split("=", 1) for part in changes.split(",") if part)
    if unknown := given.keys() - fields.keys():
        raise SystemExit(f"no such field: {', '.join(unknown)}; there are {', '.join(fields)}")
    typed = {k: v in ("1", "true", "True") if fields[k] is bool else fields[k](v) for k, v in given.items()}
    return text, dataclasses.replace(ARMS[name], **typed)


def show(name: str, rows: Sequence[dict[str, Any]]) -> None:
    """One line: the mean over seeds."""
    mean = {key: statistics.mean(row[key] for row in rows) for key in rows[0]}
    line = " ".join(f"{mean[key]:7.3f}" for key in SCORES)
    print(f"{line} {mean['s']:7.1f} {mean['cpu_s']:7.1f} {mean['once_s']:7.1f}  {name} ({len(rows)})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=["plain", "lasting"], help="name, or name:field=value,...")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--shape", default="6x4", help="updates x people in each (default 6x4)")
    parser.add_argument("--poisoned", action="store_true", help="the middle update's answers are shuffled")
    parser.add_argument("--each-seed", action="store_true", help="print a line for every seed too")
    options = parser.parse_args()
    updates, per = map(int, options.shape.split("x"))
    arms = dict(parse_arm(text) for text in options.arms)
    nano = Nano()
    streams = {seed: Stream(nano, updates, per, seed, options.poisoned) for seed in options.seeds}
    results: dict[str, list[dict[str, Any]]] = {}
    print(" ".join(f"{key:>7}" for key in (*SCORES, "s", "cpu_s", "once_s")), " arm (seeds)", flush=True)
    for name, arm in arms.items():
        for seed, stream in streams.items():
            results.setdefault(name, []).append({"seed": seed, **run(nano, arm, stream, seed)})
            if options.each_seed:
                show(f"{name} seed {seed}", results[name][-1:])
        show(name, results[name])
    where = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    shape = {"shape": options.shape, "poisoned": options.poisoned, "mlx": mx.__version__}
    print(json.dumps({**shape, **where, "arms": results}))


if __name__ == "__main__":
    main()
