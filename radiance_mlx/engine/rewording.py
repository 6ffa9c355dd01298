"""The same lesson in the base's own words: other questions that the base itself takes for the same one.

A fact learnt in one wording is often found in that wording only. Which other wordings ask the same is something
the base can be asked, without a list and without another model: two wordings are the same question to it if,
filled with the names of several things that it knows, both get the same answers. Its own wordings come from what
it says by itself (`speaking.say_anything`). A base that never uses a lesson's kind of wording gives none.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import mlx.nn as nn

from ..lora.encoding import ChatEncoder, Encoded
from ..lora.neighbours import CountTokens, RareWords
from ..lora.step import Piece
from .speaking import answer

#: stands for the name in a wording, and in an answer
_NAME = "\N{OBJECT REPLACEMENT CHARACTER}"
#: names that wordings are filled with; of them, those that must get different answers in one wording, and
#: how many wordings of its own are tried, the most frequent first
NAMES, TELLING, WORDINGS = 16, 3, 32


class Wordings:
    """A base's own wordings, and its answers to them; what has been asked once is not asked again.

    `said` are the questions that the base made up. Only single questions about a single name are looked at.
    """

    def __init__(self, said: Sequence[str], count_tokens: CountTokens) -> None:
        self._count_tokens = count_tokens
        rare = RareWords(said, count_tokens)
        taken = [found for text in said if (found := _taken_apart(text, rare))]
        filled: dict[str, set[str]] = {}
        for wording, name in taken:
            filled.setdefault(wording, set()).add(name)
        often = Counter(wording for wording, _ in taken)
        self.own = [wording for wording, _ in often.most_common() if len(filled[wording]) > 1][:WORDINGS]
        known = Counter(name for wording, name in taken if wording in self.own)
        self.names = [name for name, _ in known.most_common(NAMES)]
        self._answers: dict[str, tuple[str, ...]] = {}
        self._others: dict[str, list[str]] = {}

    @property
    def answers(self) -> dict[str, list[str]]:
        """What has been answered so far: for each wording the answers about `names`, with the name marked."""
        return {wording: list(answers) for wording, answers in self._answers.items()}

    def recall(self, answers: Mapping[str, Sequence[str]]) -> None:
        """Put back what `answers` gave, of the same base and questions."""
        whole = {wording: tuple(given) for wording, given in answers.items() if len(given) == len(self.names)}
        self._answers.update(whole)
        self._others.clear()

    def take_apart(self, question: str) -> tuple[str, str] | None:
        """(wording, name) of a question about one name."""
        return _taken_apart(question, RareWords([question], self._count_tokens))

    def ask(
        self, model: nn.Module, encoder: ChatEncoder, questions: Sequence[str], *, longest: int, max_tokens: int = 128
    ) -> Iterator[Piece]:
        """Let the base answer its own wordings, and those of `questions`, about every name; then `others` can tell.

        Nothing is asked where there are no names, nor a wording that makes a prompt of more than `longest` tokens.
        """
        if not self.names:
            return
        wordings = dict.fromkeys(self.own)
        for question in questions:
            if encoder.at_least((("user", question),)) <= longest and (found := self.take_apart(question)):
                wordings[found[0]] = None
            yield Piece([], barrier=True)
        new: list[str] = []
        prompts: list[list[int]] = []
        for wording in (wording for wording in wordings if wording not in self._answers):
            filled = [encoder.prompt((("user", wording.replace(_NAME, name)),)) for name in self.names]
            if max(map(len, filled)) <= longest:
                new.append(wording)
                prompts += filled
            yield Piece([], barrier=True)
        asked = [(wording, name) for wording in new for name in self.names]
        if any(len(prompt) >= max_tokens for prompt in prompts):
            max_tokens += max(map(len, prompts))
        said: list[Encoded] = []
        yield from answer(model, encoder, prompts, max_tokens=max_tokens, out=said)
        texts = [encoder.tokenizer.decode(list(row.tokens[row.offset :])) for row in said]
        answers = [text.replace(name, _NAME) for text, (_, name) in zip(texts, asked, strict=True)]
        for i, wording in enumerate(new):
            self._answers[wording] = tuple(answers[i * len(self.names) : (i + 1) * len(self.names)])
        self._others.clear()

    def others(self, question: str) -> list[str]:
        """The question in the base's own other wordings; empty where it has none (or has not been asked).

        What it answers to most names alike (that it does not know, say) tells nothing. Of the other answers there
        must be `TELLING` different ones, and a wording that is the same question gets nearly all of them too.
        """
        if question not in self._others:
            self._others[question] = self._find_others(question)
        return self._others[question]

    def _find_others(self, question: str) -> list[str]:
        found = self.take_apart(question)
        if found is None:
            return []
        wording, name = found
        mine = self._answers.get(wording)
        if not mine:
            return []
        usual = Counter(mine).most_common(1)[0][0]
        places = [i for i, text in enumerate(mine) if text != usual]
        if len({mine[i] for i in places}) < TELLING:
            return []
        return [
            other.replace(_NAME, name)
            for other in self.own
            if other != wording
            and (theirs := self._answers.get(other))
            and sum(theirs[i] == mine[i] for i in places) >= 0.9 * len(places)
        ]


def _taken_apart(text: str, rare: RareWords) -> tuple[str, str] | None:
    """(text with its only name marked, the name); None unless it has exactly one."""
    names = {text[slice(*span)] for span in rare.spans(text)}
    if len(names) != 1 or _NAME in text:
        return None
    (name,) = names
    return text.replace(name, _NAME), name
