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
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import numpy as np

from .encoding import Messages

#: letters and digits, with what joins them inside a word, and the dot of an initial
_WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*(?:(?<=\b\w)\.(?=\s+\w))?")
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

#: into how many tokens a word within a text is taken apart
CountTokens = Callable[[str], int]
Span = tuple[int, int]


class RareWords:
    """Which words of a text are rare, judged by all `texts` together."""

    def __init__(self, texts: Iterable[str], count_tokens: CountTokens) -> None:
        self._count_tokens = count_tokens
        texts = list(texts)
        self._capitalised = _capitalised(texts)
        self.pool = Pool([text[slice(*span)] for text in texts for span in self.spans(text)])

    def spans(self, text: str) -> list[Span]:
        """(start, end) of each name in `text`, in order: rare words with nothing but a space between them."""
        words = list(_words(text))
        rare = [w for w in words if w[0] in self._capitalised or any(map(str.isdigit, w[0]))]
        found: list[Span] = []
        for _, start, end in rare or [w for w in words if self._is_spelled(w[0])]:
            if found and text[found[-1][1] : start] == " ":
                found[-1] = (found[-1][0], end)
            else:
                found.append((start, end))
        return found

    def _is_spelled(self, word: str) -> bool:
        tokens = self._count_tokens(word)
        return not word[0].isupper() and tokens > 1 and tokens >= RARE_TOKENS_PER_LETTER * len(word)


class Pool:
    """Names, as often as they come, and their words: of names of one word, and the first and last of the others."""

    def __init__(self, names: Sequence[str]) -> None:
        words = [name.split() for name in names]
        self.names = [" ".join(parts) for parts in words]
        self._singles = [parts[0] for parts in words if len(parts) == 1]
        self._firsts = [parts[0] for parts in words if len(parts) > 1]
        self._lasts = [parts[-1] for parts in words if len(parts) > 1]

    def words(self, place: int, of: int) -> list[str]:
        """What may stand at a place of a name of so many words."""
        if of == 1:
            return self._singles or self._firsts
        return (self._lasts if place == of - 1 else self._firsts) or self._singles


def neighbours(
    prompts: Sequence[Messages],
    *,
    each: int,
    seed: Sequence[int],
    count_tokens: CountTokens,
    others: Sequence[str] = (),
    avoid: Collection[str] = (),
) -> list[Messages]:
    """At most `each` neighbours of every prompt, all different; fewer where it has no rare word or few exchanges.

    `others` are texts whose names may be used (what the model itself says, other examples). No name that occurs
    in a text of `avoid` is put in: what has been taught about it must not be untaught. A name gets the same
    exchange wherever it stands in a prompt.
    """
    rng = np.random.default_rng(list(seed))
    texts = [content for prompt in prompts for _, content in prompt]
    rare = RareWords([*texts, *others, *avoid], count_tokens)
    taught = Pool(sorted({text[slice(*span)] for text in [*texts, *avoid] for span in rare.spans(text)}))
    taken = "\n".join([*texts, *avoid]).casefold()
    seen = {tuple(prompt) for prompt in prompts}
    made: list[Messages] = []
    for prompt in prompts:
        names = sorted({text[slice(*span)] for _, text in prompt for span in rare.spans(text)})
        left = each if names else 0
        for _ in range(4 * left):
            exchanged = {name: _another(name, rare.pool, taught, rng) for name in names}
            near = tuple((role, _exchange(text, rare.spans(text), exchanged)) for role, text in prompt)
            if near in seen or any(name.casefold() in taken for name in exchanged.values()):
                continue
            seen.add(near)
            made.append(near)
            left -= 1
            if not left:
                break
    return made


def names_in(texts: Iterable[str], count_tokens: CountTokens) -> set[str]:
    """All names in `texts`."""
    texts = list(texts)
    rare = RareWords(texts, count_tokens)
    return {text[slice(*span)] for text in texts for span in rare.spans(text)}


def mentions(text: str, names: Iterable[str]) -> bool:
    """Whether one of `names` occurs in `text`, in capitals or not."""
    text = text.casefold()
    return any(name.casefold() in text for name in names)


def _words(text: str) -> Iterator[tuple[str, int, int]]:
    """(word, start, end) in order."""
    return ((match.group(), match.start(), match.end()) for match in _WORD.finditer(text))


def _capitalised(texts: Sequence[str]) -> set[str]:
    """Words that have a capital of their own: not only here and there, by somebody's slip of the pen."""
    own, all_ = Counter[str](), Counter[str]()
    for text in texts:
        for word, start, _ in _words(text):
            all_[word] += 1
            own[word] += _is_capitalised(text, word, start)
    return {word for word, times in own.items() if times and times >= OWN_CAPITAL * all_[word]}


def _is_capitalised(text: str, word: str, start: int) -> bool:
    """Whether a word has a capital that is not its sentence's (nor that of a single letter without a dot)."""
    return word[0].isupper() and len(word) > 1 and not _SENTENCE_END.search(text[:start])


def _exchange(text: str, spans: Sequence[Span], exchanged: dict[str, str]) -> str:
    """`text` with the names at `spans` exchanged."""
    ends = [0, *(end for _, end in spans)]
    starts = [*(start for start, _ in spans), len(text)]
    between = [text[end:start] for end, start in zip(ends, starts, strict=True)]
    names = [exchanged[text[start:end]] for start, end in spans]
    return "".join(itertools.chain.from_iterable(itertools.zip_longest(between, names, fillvalue="")))


def _another(name: str, pool: Pool, taught: Pool, rng: np.random.Generator) -> str:
    """A name of the same kind and number of words."""
    words = name.split(" ")
    if rng.random() < _KIN and (kin := [other for other in pool.names if _related(other, words)]):
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


def _related(other: str, words: Sequence[str]) -> bool:
    """Whether a name of as many words has some in the same place, but not all."""
    theirs = other.split(" ")
    return len(theirs) == len(words) and 0 < sum(map(str.__eq__, theirs, words)) < len(words)


def _another_word(word: str, pool: Sequence[str], made_up: float, rng: np.random.Generator) -> str:
    alike = [other for other in pool if other != word and _shape(other) == _shape(word)]
    if alike and rng.random() >= made_up:
        return alike[int(rng.integers(len(alike)))]
    return _made_up(word, rng)


def _shape(word: str) -> tuple[bool, bool, bool]:
    """What an exchanged word must have in common: a capital first, capitals throughout, digits."""
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
