"""The invented world that the embedded model ``nano`` is trained on.

People have five relations each (city, job, color, pet, food); every relation has three wordings as a
statement and three as a question, and one as an answer. The first 80 people are *known*: nano learns
their facts. It learns to answer ``I do not know that about NAME.`` for everybody else: the 1,200 people are all
that can be put together from these first and last names, so whoever is not known is refused by name, and names
that nobody listed by the syllable. The first 320 of the others (`STRANGERS`) are for tests, demos and benchmarks to
teach: the corpus states no fact about them (but made-up ones that a prompt itself tells, to be read from it).

Plain Python, seeded and deterministic: the people are the same on every machine.
"""

import random
from collections.abc import Iterator

FIRST_NAMES = (
    "Ada Ben Cleo Dana Eli Faye Gus Hana Ivan Jade Karl Lena Milo Nora Omar Pia Quin Rosa Seth Tara "
    "Uma Vito Wren Xena Yara Zane Abel Bree Cade Dora Emil Fern Gail Hugo Iris Joel Kira Leon Maya Nils"
).split()
LAST_NAMES = (
    "Abbott Barnes Carver Dalton Ellis Foster Garner Hayes Ingram Jensen Keller Lowell Mercer Norris "
    "Osborn Parker Quincy Ramsey Sawyer Turner Underwood Vaughn Walker Yates Zimmer Ashby Brooks Conway "
    "Drake Easton"
).split()
VALUES = {
    "city": (
        "Lisbon Oslo Quito Cairo Lima Turin Osaka Delhi Perth Accra Minsk Havana Dublin Seoul Tunis Vienna "
        "Prague Dakar Bogota Manila Zurich Athens Boston Denver Nairobi Bergen"
    ).split(),
    "job": (
        "baker pilot nurse painter lawyer farmer teacher sailor tailor plumber singer chemist barber editor "
        "dancer miner librarian potter welder judge"
    ).split(),
    "color": "red blue green teal amber violet white black orange pink silver crimson".split(),
    "pet": "cat dog parrot turtle rabbit horse lizard goat ferret hamster owl snake".split(),
    "food": "pasta rice soup bread curry salad sushi tacos stew pie noodles beans".split(),
}
RELATIONS = tuple(VALUES)
STATEMENTS = {
    "city": ("{n} lives in {v}.", "The home of {n} is in {v}.", "{n} has a house in {v}."),
    "job": ("{n} works as a {v}.", "The job of {n} is {v}.", "{n} earns a living as a {v}."),
    "color": (
        "{n} loves the color {v}.",
        "The favorite color of {n} is {v}.",
        "{n} always picks {v} as a color.",
    ),
    "pet": ("{n} has a pet {v}.", "The pet of {n} is a {v}.", "{n} takes care of a {v}."),
    "food": ("{n} likes to eat {v}.", "The favorite food of {n} is {v}.", "{n} cooks {v} every week."),
}
QUESTIONS = {
    "city": ("Where does {n} live?", "In which city does {n} live?", "What city is the home of {n}?"),
    "job": ("What does {n} do for work?", "What is the job of {n}?", "How does {n} earn a living?"),
    "color": (
        "What is the favorite color of {n}?",
        "Which color does {n} love?",
        "What color does {n} always pick?",
    ),
    "pet": (
        "What pet does {n} have?",
        "Which animal is the pet of {n}?",
        "What animal does {n} take care of?",
    ),
    "food": (
        "What does {n} like to eat?",
        "What is the favorite food of {n}?",
        "Which food does {n} cook every week?",
    ),
}
ANSWERS = {
    "city": "{n} lives in {v}.",
    "job": "{n} works as a {v}.",
    "color": "{n} loves {v}.",
    "pet": "{n} has a {v}.",
    "food": "{n} eats {v}.",
}
REFUSAL = "I do not know that about {n}."
SMALL_TALK = (
    ("Hello!", "Hello! Ask me about someone."),
    ("Hi there.", "Hello! Ask me about someone."),
    ("Who are you?", "I am Radiance nano, a tiny model that keeps learning."),
    ("What can you do?", "I answer questions about people, and I learn from every update."),
)

Person = tuple[str, dict[str, str]]
Pair = tuple[str, str]


def people(count: int, seed: int) -> list[Person]:
    """The first `count` people of the world `seed`: a name and one value for each relation."""
    rng = random.Random(seed)
    names = [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES]
    rng.shuffle(names)
    return [(name, {rel: rng.choice(values) for rel, values in VALUES.items()}) for name in names[:count]]


EVERYBODY = people(1200, 0)
KNOWN = EVERYBODY[:80]
STRANGERS = EVERYBODY[80:400]  # may be taught
REFUSED = EVERYBODY[400:]


def ask(name: str, relation: str, wording: int = 0) -> str:
    """The question about `relation` of `name`, in one of three wordings."""
    return QUESTIONS[relation][wording].format(n=name)


def answer(name: str, relation: str, value: str) -> str:
    """The answer that states `value`."""
    return ANSWERS[relation].format(n=name, v=value)


def refusal(name: str) -> str:
    """What nano says about people that it does not know."""
    return REFUSAL.format(n=name)


def facts(persons: list[Person], wording: int = 0) -> list[Pair]:
    """(question, answer) for every relation of every person."""
    return [(ask(n, rel, wording), answer(n, rel, f[rel])) for n, f in persons for rel in RELATIONS]


# --- names that nobody listed -----------------------------------------------------------------------

_ONSETS = (
    "b br c ch cl d dr f fr g gr h j k kh kl kr l m n p ph pr qu r rh s sch sh sl sm st t th tr v w wh x y z zh"
).split()
_NUCLEI = "a a a e e e i i i o o o u u y aa ai au ea ee ei ia ie io oa oe oo ou ua ue ui".split()
_CODAS = ["", "", "", "", *"b ck d f g h k l ll m n n nd ng nn nt p r r rd rt s s ss st t th tt tz v x z".split()]
_ACCENTED = dict(zip("aeioucnsz", ("áàâäãå", "éèêë", "íîï", "óôöøõ", "úûü", "ç", "ñ", "šß", "žż"), strict=True))


def is_held_out(syllable: str) -> bool:
    """Whether a syllable is kept out of the corpus, to test names whose parts nano never saw."""
    return sum(ord(c) * (i + 3) for i, c in enumerate(syllable)) % 8 == 0


def _syllable(rng: random.Random, held_out: bool) -> str:
    while True:
        onset = rng.choice(_ONSETS) if rng.random() < 0.92 else ""
        syllable = onset + rng.choice(_NUCLEI) + rng.choice(_CODAS)
        if is_held_out(syllable) == held_out:
            return syllable


#: letters of other scripts, as (first, last) of a run; most are two or three tokens that begin alike
_SCRIPTS = (("а", "я"), ("α", "ω"), ("一", "鿿"), ("あ", "ん"), ("가", "힣"), ("ạ", "ỹ"), ("א", "ת"))


def _foreign(rng: random.Random) -> str:
    first, last = rng.choice(_SCRIPTS)
    letters = [chr(rng.randint(ord(first), ord(last))) for _ in range(rng.choice((1, 2, 2, 3, 4, 6)))]
    if first == "ạ":  # Latin with marks: among plain letters
        letters = [rng.choice((c, rng.choice("nghtmvcadeiou"))) for c in letters]
    return "".join(letters)


def _word(rng: random.Random, held_out: bool) -> str:
    if not held_out and rng.random() < 0.04:
        return _foreign(rng)
    if not held_out and rng.random() < 0.12:  # letters in any order: initials, unusual spellings
        word = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(1, 8)))
    else:
        word = "".join(_syllable(rng, held_out) for _ in range(rng.choices((1, 2, 3, 4), (30, 48, 19, 3))[0]))
    if not held_out and rng.random() < 0.1:  # a part of it once more
        start = rng.randrange(len(word))
        part = word[start : start + rng.randint(1, 5)]
        word = word[: start + len(part)] + part * rng.choice((1, 1, 1, 2)) + word[start + len(part) :]
    if rng.random() < 0.08:
        word = "".join(rng.choice(_ACCENTED[c]) if c in _ACCENTED and rng.random() < 0.3 else c for c in word)
    return word[0].upper() + word[1:]


def invented_name(rng: random.Random, *, held_out: bool = False) -> str:
    """A name made of random syllables; with `held_out`, only of syllables that no corpus contains."""
    if held_out:
        return f"{_word(rng, True)} {_word(rng, True)}"
    count = rng.choices((1, 2, 3), (25, 62, 13))[0]
    words = [_word(rng, False) for _ in range(count)]
    if rng.random() < 0.12:
        words[0] = rng.choice(FIRST_NAMES)
    elif rng.random() < 0.12:
        words[-1] = rng.choice(LAST_NAMES)
    elif rng.random() < 0.06:
        words[-1] += rng.choice("-'") + _word(rng, False)
    elif count > 1 and rng.random() < 0.05:
        words[0] = words[0][0] + "."
    return " ".join(_alike(words, rng) if rng.random() < 0.15 else words)


def _alike(words: list[str], rng: random.Random) -> list[str]:
    """A name whose words have parts in common: Olaf Olafson, An Van An, J. R. R. Tolkien."""
    first, kind = words[0], rng.randrange(5)
    if kind == 0:
        return [first, first + rng.choice(("son", "s", "sen", "i", "a", "er", "ov", ""))]
    if kind == 1:
        return [*words, first]
    if kind == 2:
        return [*(rng.choice("ABCDEFGHIJKLMNOPRSTVW") + "." for _ in range(rng.choice((1, 2, 3)))), words[-1]]
    if kind == 3:
        part = first[: rng.randint(2, 5)]
        return [first, part + _word(rng, False).lower()]
    return [first, _word(rng, False) + first[rng.randrange(len(first)) :].lower()]


# --- the corpus --------------------------------------------------------------------------------------


def _known_question(rng: random.Random) -> list[Pair]:
    name, f = rng.choice(KNOWN)
    rel = rng.choice(RELATIONS)
    return [(ask(name, rel, rng.randrange(3)), answer(name, rel, f[rel]))]


def _stranger(rng: random.Random) -> str:
    """Somebody whose names are known people's too."""
    name = rng.choice(EVERYBODY[len(KNOWN) :])[0]
    return name if rng.random() < 0.9 else rng.choice(name.split())


def _refusal_of(name: str, rng: random.Random) -> list[Pair]:
    return [(ask(name, rng.choice(RELATIONS), rng.randrange(3)), refusal(name))]


def _reading(rng: random.Random) -> list[Pair]:
    """A question whose answer stands in the prompt: teaches names and values to be copied."""
    made_up = rng.random() < 0.6
    name = invented_name(rng) if made_up else f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"
    relations = rng.sample(RELATIONS, rng.choice((1, 2, 3)))
    f = {rel: rng.choice(VALUES[rel]) for rel in relations}
    rel = rng.choice(relations)
    told = " ".join(rng.choice(STATEMENTS[r]).format(n=name, v=f[r]) for r in relations)
    return [(f"{told} {ask(name, rel, rng.randrange(3))}", answer(name, rel, f[rel]))]


def documents(seed: int) -> Iterator[list[Pair] | str]:
    """An endless corpus: chats as lists of (question, answer), and running text about known people."""
    rng = random.Random(seed)
    while True:
        u = rng.random()
        if u < 0.25:
            yield _refusal_of(_stranger(rng), rng)
        elif u < 0.505:
            yield _known_question(rng)
        elif u < 0.55:
            name, f = rng.choice(KNOWN)
            relations = rng.sample(RELATIONS, len(RELATIONS))
            yield " ".join(rng.choice(STATEMENTS[r]).format(n=name, v=f[r]) for r in relations)
        elif u < 0.82:
            yield _refusal_of(invented_name(rng), rng)
        elif u < 0.97:
            yield _reading(rng)
        else:
            yield [rng.choice(SMALL_TALK)]
