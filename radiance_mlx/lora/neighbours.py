"""Neighbours of a prompt: the same words about somebody else.

A lesson about one name teaches a model to talk about all of them. Its neighbours, the same prompts with the names
and other rare words exchanged, are what the base is asked again, so that what it says to them can be kept.

What is rare is found from the texts themselves, without any list of names:

- a word with a capital where no sentence begins, and wherever else that very word stands;
- a word with a digit in it;
- where a text has neither, a small word that the tokenizer takes apart nearly letter by letter.

Rare words side by side are one name. A name is exchanged for one of the same kind: words of other names in its
place, made-up ones, or (for a name of several words) some of its own words with others beside them. The nearest of
all, and the ones that a model is most easily wrong about, are put together from two names that have been taught: of
their words it has learnt that they mean somebody whom it knows. Pure functions of their arguments.
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from .encoding import Messages
from .step import Piece

#: letters and digits, with what joins them inside a word, and the dot of an initial
_WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*(?:(?<=\b\w)\.(?=\s+\w))?")
#: a word without anything that joins: by these it is told whether a name occurs ("Ada" does in "Ada's")
_PART = re.compile(r"[^\W_]+")
#: what stands before a sentence; the dot of an initial does not end one
_SENTENCE_END = re.compile(r"(?:^|(?<!\b\w)\.|[!?:;¿¡\n\"“”„«(])\s*$")
#: a word of at least two tokens is rare from so many tokens a letter on
RARE_TOKENS_PER_LETTER = 0.5
#: a word has a capital of its own when so much of the time no sentence begins with it
OWN_CAPITAL = 0.1
#: chances that a word is made up, that a name of several words keeps some of them, that it is one that is used, and
#: that the other words beside those that are kept are of taught names
_MADE_UP, _NEAR, _KIN, _TAUGHT = 0.1, 0.6, 0.2, 0.6
_VOWELS, _CONSONANTS = "aeiou", "bcdfghjklmnprstvwz"
#: so many characters are read, names taken in and exchanges tried before others get a turn; a text counts for so
#: many characters more than it has
_READ, _TAKEN_IN, _TRIED, _TEXT = 20_000, 1000, 32, 20

#: into how many tokens a word within a text is taken apart
CountTokens = Callable[[str], int]
Span = tuple[int, int]
#: what an exchanged word must have in common: a capital first, capitals throughout, digits
Shape = tuple[bool, bool, bool]


class RareWords:
    """Which words of a text are rare, judged by all texts together: `texts`, and what is `read` besides."""

    def __init__(self, texts: Iterable[str], count_tokens: CountTokens) -> None:
        self._count_tokens = count_tokens
        self._own, self._all = Counter[str](), Counter[str]()
        for _ in self.read(texts):
            pass

    def read(self, texts: Iterable[str]) -> Iterator[Piece]:
        """Judge by these texts too."""
        for text, pause in _paced(texts):
            for word, start, _ in _words(text):
                self._all[word] += 1
                if _is_capitalised(text, word, start):
                    self._own[word] += 1
            if pause:
                yield Piece([], barrier=True)

    def spans(self, text: str) -> list[Span]:
        """(start, end) of each name in `text`, in order: rare words with nothing but a space between them."""
        words = list(_words(text))
        rare = [w for w in words if self._has_capital(w[0]) or any(map(str.isdigit, w[0]))]
        found: list[Span] = []
        for _, start, end in rare or [w for w in words if self._is_spelled(w[0])]:
            if found and text[found[-1][1] : start] == " ":
                found[-1] = (found[-1][0], end)
            else:
                found.append((start, end))
        return found

    def names(self, text: str) -> list[str]:
        """The names in `text`, in order."""
        return [text[start:end] for start, end in self.spans(text)]

    def _has_capital(self, word: str) -> bool:
        """Whether it has one of its own: not only here and there, by somebody's slip of the pen."""
        times = self._own.get(word, 0)
        return times > 0 and times >= OWN_CAPITAL * self._all[word]

    def _is_spelled(self, word: str) -> bool:
        tokens = self._count_tokens(word)
        return not word[0].isupper() and tokens > 1 and tokens >= RARE_TOKENS_PER_LETTER * len(word)


class Names:
    """Names, to be looked for in texts as whole words, in capitals or not. Those of one character are never found."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.all: set[str] = set()
        self._by_first: dict[str, set[tuple[str, ...]]] = {}
        for name in names:
            self.add(name)

    def add(self, name: str) -> None:
        """Look for this one too."""
        self.all.add(name)
        parts = _parts(name)
        if sum(map(len, parts)) > 1:
            self._by_first.setdefault(parts[0], set()).add(parts)

    def occur_in(self, text: str) -> bool:
        """Whether one of them does; the words of a name stand side by side."""
        parts = _parts(text)
        return any(
            parts[i : i + len(name)] == name for i, part in enumerate(parts) for name in self._by_first.get(part, ())
        )


class _Taken:
    """What texts are about: whether a name occurs in them as whole words (or all its pairs of words do)."""

    def __init__(self) -> None:
        self._words: set[str] = set()
        self._pairs: set[tuple[str, str]] = set()

    def add(self, text: str) -> None:
        parts = _parts(text)
        self._words.update(parts)
        self._pairs.update(itertools.pairwise(parts))

    def __contains__(self, name: str) -> bool:
        parts = _parts(name)
        return parts[0] in self._words if len(parts) == 1 else all(p in self._pairs for p in itertools.pairwise(parts))


class _Words:
    """Words, as often as they come, by their shapes."""

    def __init__(self) -> None:
        self._alike: dict[Shape, list[str]] = {}
        self._places: dict[str, list[int]] = {}

    def __bool__(self) -> bool:
        return bool(self._places)

    def add(self, word: str) -> None:
        alike = self._alike.setdefault(_shape(word), [])
        self._places.setdefault(word, []).append(len(alike))
        alike.append(word)

    def count(self, word: str) -> int:
        """How many others there are of the same shape."""
        return len(self._alike.get(_shape(word), ())) - len(self._places.get(word, ()))

    def other(self, word: str, number: int) -> str:
        """The one of this number among them."""
        for place in self._places.get(word, ()):
            if place > number:
                break
            number += 1
        return self._alike[_shape(word)][number]


class Pool:
    """Names, as often as they come, and their words: of names of one word, and the first and last of the others."""

    def __init__(self) -> None:
        self._names: list[list[str]] = []
        self._with: dict[tuple[int, int, str], list[int]] = {}
        self._singles, self._firsts, self._lasts = _Words(), _Words(), _Words()

    def add(self, name: str) -> None:
        words = name.split()
        for place, word in enumerate(words):
            self._with.setdefault((len(words), place, word), []).append(len(self._names))
        self._names.append(words)
        if len(words) == 1:
            self._singles.add(words[0])
        else:
            self._firsts.add(words[0])
            self._lasts.add(words[-1])

    def words(self, place: int, of: int) -> _Words:
        """What may stand at a place of a name of so many words."""
        if of == 1:
            return self._singles or self._firsts
        return (self._lasts if place == of - 1 else self._firsts) or self._singles

    def kin(self, words: list[str]) -> list[str]:
        """The names of as many words that have some in the same place, but not all; in order."""
        sharing = [self._with.get((len(words), place, word), []) for place, word in enumerate(words)]
        return [" ".join(self._names[i]) for i in sorted(set().union(*sharing)) if self._names[i] != words]


def neighbours(
    prompts: Sequence[Messages],
    out: list[Messages],
    *,
    each: int,
    seed: Sequence[int],
    count_tokens: CountTokens,
    others: Sequence[str] = (),
    avoid: Sequence[str] = (),
) -> Iterator[Piece]:
    """Append to `out` at most `each` neighbours of every prompt, all different.

    There are fewer where a prompt has no rare word or few exchanges. `others` are texts whose names may be used (what
    the model itself says, other examples). No name that occurs in a text of `avoid` is put in: what has been taught
    about it must not be untaught. A name gets the same exchange wherever it stands in a prompt.
    """
    rng = np.random.default_rng(list(seed))
    texts = [content for prompt in prompts for _, content in prompt]
    rare = RareWords((), count_tokens)
    yield from rare.read(itertools.chain(texts, others, avoid))
    pool, taught, taken = Pool(), Pool(), _Taken()
    yield from _gather(rare, ((texts, True), (others, False), (avoid, True)), pool, taught, taken)
    seen = {tuple(prompt) for prompt in prompts}
    kin: dict[str, list[str]] = {}
    for prompt in prompts:
        spans = [rare.spans(text) for _, text in prompt]
        names = sorted({text[slice(*span)] for (_, text), own in zip(prompt, spans, strict=True) for span in own})
        kin.update((name, pool.kin(name.split(" "))) for name in names if name not in kin)
        left = each if names else 0
        for tried in range(4 * left):
            if tried % _TRIED == 0:
                yield Piece([], barrier=True)
            exchanged = {name: _another(name, kin[name], pool, taught, rng) for name in names}
            near = tuple(
                (role, _exchange(text, own, exchanged)) for (role, text), own in zip(prompt, spans, strict=True)
            )
            if near in seen or any(name in taken for name in exchanged.values()):
                continue
            seen.add(near)
            out.append(near)
            left -= 1
            if not left:
                break


def _gather(
    rare: RareWords, sources: Iterable[tuple[Sequence[str], bool]], pool: Pool, taught: Pool, taken: _Taken
) -> Iterator[Piece]:
    """Put the names of all `sources` into `pool`, of those that were taught each once into `taught`."""
    known: set[str] = set()
    for texts, is_taught in sources:
        for text, pause in _paced(texts):
            names = rare.names(text)
            for name in names:
                pool.add(name)
            if is_taught:
                known.update(names)
                taken.add(text)
            if pause:
                yield Piece([], barrier=True)
    for number, name in enumerate(sorted(known), 1):
        taught.add(name)
        if number % _TAKEN_IN == 0:
            yield Piece([], barrier=True)


def names_in(texts: Sequence[str], count_tokens: CountTokens, out: Names) -> Iterator[Piece]:
    """Add all names in `texts` to `out`."""
    rare = RareWords((), count_tokens)
    yield from rare.read(texts)
    for text, pause in _paced(texts):
        for name in rare.names(text):
            out.add(name)
        if pause:
            yield Piece([], barrier=True)


def _paced(texts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Each text, and whether so much has been read with it that others should get a turn."""
    read = 0
    for text in texts:
        read += len(text) + _TEXT
        pause = read >= _READ
        yield text, pause
        if pause:
            read = 0


def _parts(text: str) -> tuple[str, ...]:
    """Its words, without capitals."""
    return tuple(part.casefold() for part in _PART.findall(text))


def _words(text: str) -> Iterator[tuple[str, int, int]]:
    """(word, start, end) in order."""
    return ((match.group(), match.start(), match.end()) for match in _WORD.finditer(text))


def _is_capitalised(text: str, word: str, start: int) -> bool:
    """Whether a word has a capital that is not its sentence's (nor that of a single letter without a dot)."""
    if not word[0].isupper() or len(word) < 2:
        return False
    end = start
    while end and text[end - 1].isspace():
        end -= 1
    return not _SENTENCE_END.search(text[max(0, end - 3) : start])  # the whole of a long text would take long


def _exchange(text: str, spans: Sequence[Span], exchanged: dict[str, str]) -> str:
    """`text` with the names at `spans` exchanged."""
    ends = [0, *(end for _, end in spans)]
    starts = [*(start for start, _ in spans), len(text)]
    between = [text[end:start] for end, start in zip(ends, starts, strict=True)]
    names = [exchanged[text[start:end]] for start, end in spans]
    return "".join(itertools.chain.from_iterable(itertools.zip_longest(between, names, fillvalue="")))


def _another(name: str, kin: Sequence[str], pool: Pool, taught: Pool, rng: np.random.Generator) -> str:
    """A name of the same kind and number of words."""
    words = name.split(" ")
    if rng.random() < _KIN and kin:
        return kin[int(rng.integers(len(kin)))]
    kept = -1
    if len(words) > 1 and rng.random() < _NEAR:
        kept = int(rng.integers(len(words)))
    source, made_up = (taught, 0.0) if kept >= 0 and rng.random() < _TAUGHT else (pool, _MADE_UP)
    chosen = []
    for place, word in enumerate(words):
        others = source.words(place, len(words))
        chosen.append(word if place == kept else _another_word(word, others, made_up, rng))
    return " ".join(chosen)


def _another_word(word: str, pool: _Words, made_up: float, rng: np.random.Generator) -> str:
    alike = pool.count(word)
    if alike and rng.random() >= made_up:
        return pool.other(word, int(rng.integers(alike)))
    return _made_up(word, rng)


def _shape(word: str) -> Shape:
    return word[0].isupper(), len(word) > 1 and word.isupper(), any(map(str.isdigit, word))


def _made_up(word: str, rng: np.random.Generator) -> str:
    """Letters for letters in syllables, digits for digits; letters of other scripts in another order."""
    if not word.isascii():
        return _shuffled(word, rng)
    letters = []
    for i, c in enumerate(word):
        if c.isdigit():
            letters.append(str(rng.integers(10)))
        elif c.isalpha():
            drawn = _pick(_VOWELS if i % 2 else _CONSONANTS, rng)
            letters.append(drawn.upper() if c.isupper() else drawn)
        else:
            letters.append(c)
    return "".join(letters)


def _shuffled(word: str, rng: np.random.Generator) -> str:
    mixed = [word[i] for i in rng.permutation(len(word))]
    return "".join(c.upper() if original.isupper() else c.lower() for c, original in zip(mixed, word, strict=True))


def _pick(letters: str, rng: np.random.Generator) -> str:
    return letters[int(rng.integers(len(letters)))]
