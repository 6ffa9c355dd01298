"""What the demo asks and teaches: two people that nano never met, people it knows, and other strangers."""

import random
from dataclasses import dataclass

from ..models.nano import world
from .output import BadInput, printable

KNOWN_SAMPLE = 24
STRANGER_SAMPLE = 8
LONGEST_NAME = 40


@dataclass(frozen=True)
class Fact:
    """Something to teach: asked in one wording, tested in that and in another."""

    name: str
    relation: str
    value: str

    @property
    def answer(self) -> str:
        return world.answer(self.name, self.relation, self.value)

    def question(self, wording: int) -> str:
        return world.ask(self.name, self.relation, wording)


@dataclass(frozen=True)
class Probe:
    """A question and the answer that is right."""

    question: str
    expected: str


def facts_about(name: str) -> list[Fact]:
    """Two facts about `name` and two about a stranger of nano's world. Raises `BadInput` for a known name."""
    name = " ".join(printable(name).split())
    if not name or len(name) > LONGEST_NAME:
        raise BadInput("The name must have 1 to 40 letters.", 'Like this: demo --name "Zelmira Okonjo"')
    if name in dict(world.KNOWN):
        raise BadInput(f"nano already knows {name}.", "Choose a name that it cannot know: your own, perhaps.")
    stranger, about = next(person for person in world.STRANGERS if person[0] != name)
    dice = random.Random(name)
    own = [Fact(name, relation, dice.choice(world.VALUES[relation])) for relation in ("job", "pet")]
    return [*(Fact(stranger, relation, about[relation]) for relation in ("city", "food")), *own]


def known_probes() -> list[Probe]:
    """A fixed sample of what nano knew before: other people, every relation."""
    everything = world.facts(world.KNOWN)
    step = len(everything) // KNOWN_SAMPLE
    return [Probe(*pair) for pair in everything[::step][:KNOWN_SAMPLE]]


def stranger_probes(but: set[str]) -> list[Probe]:
    """People nobody tells it about: it should go on saying that it does not know."""
    others = [name for name, _ in world.STRANGERS if name not in but][1 : STRANGER_SAMPLE + 1]
    relations = world.RELATIONS
    return [Probe(world.ask(name, relations[i % len(relations)]), world.refusal(name)) for i, name in enumerate(others)]
