#!/usr/bin/env python
"""Write the anchors that nano brings: what it knows, whom it does not know, small talk.

    .venv/bin/python scripts/make_nano_anchors.py

Nobody whom tests and benchmarks teach is among them (`world.STRANGERS`).
"""

import json
import random
from pathlib import Path

from radiance_mlx.models.nano import world

FILE = Path(world.__file__).parent / "anchors.jsonl"
KNOWN, REFUSED, INVENTED = 128, 56, 40


def rows() -> list[dict[str, str]]:
    """The same on every machine."""
    rng = random.Random(2026)
    known = [pair for wording in range(3) for pair in world.facts(world.KNOWN, wording)]
    strangers = [name for name, _ in rng.sample(world.REFUSED, REFUSED)]
    strangers += [world.invented_name(rng) for _ in range(INVENTED)]
    refusals = [
        (world.ask(name, rng.choice(world.RELATIONS), rng.randrange(3)), world.refusal(name)) for name in strangers
    ]
    pairs = [*rng.sample(known, KNOWN), *refusals, *world.SMALL_TALK]
    return [{"prompt": question, "completion": answer} for question, answer in pairs]


def text() -> str:
    """What the file holds."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows())


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
    print(f"{FILE}: {len(rows())} anchors")
