"""From tokens to the text of an answer: detokenizing, reasoning apart, stop strings.

mlx-lm's streaming detokenizer and its text state machine do the work; stop strings are matched on text, with
hold-back, since the tokens of a stop string depend on what stands before it.
"""

from collections.abc import Sequence
from typing import Any

from mlx_lm.generate import TextStateMachine

from ..messages import TextDelta


class AnswerText:
    """One answer as it grows. `stopped` is true once a stop string has come."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._detokenizer = tokenizer.detokenizer
        self._state = self._machine(tokenizer, stop).make_state(_initial_state(tokenizer, prompt))
        self.text = ""
        self.reasoning = ""
        self.stopped = False

    @staticmethod
    def _machine(tokenizer: Any, stop: Sequence[str]) -> TextStateMachine:
        answer = [(word, None) for word in stop]
        thinking: list[tuple[str, str | None]] = []
        if tokenizer.has_thinking:
            answer.append((tokenizer.think_start, "reasoning"))  # type: ignore[arg-type]
            thinking.append((tokenizer.think_end, "normal"))
        return TextStateMachine({"normal": answer, "reasoning": thinking})

    def add(self, token: int) -> TextDelta:
        """Take one token; the text that is now certain."""
        self._detokenizer.add_token(token)
        return self._take(self._detokenizer.last_segment)

    def finish(self) -> TextDelta:
        """No token follows: what was held back."""
        if self.stopped:
            return TextDelta()
        self._detokenizer.finalize()
        delta = self._take(self._detokenizer.last_segment)
        if self.stopped:
            return delta
        self._state, rest, name = TextStateMachine.flush(self._state)
        return _joined(delta, self._append(name, rest))

    def _take(self, text: str) -> TextDelta:
        if self.stopped or not text:
            return TextDelta()
        self._state, segments = TextStateMachine.split(self._state, text)
        delta = TextDelta()
        for name, piece in segments:
            if name is None:
                self.stopped = True
            else:
                delta = _joined(delta, self._append(name, piece))
        return delta

    def _append(self, state: str, piece: str) -> TextDelta:
        if state == "reasoning":
            self.reasoning += piece
            return TextDelta(reasoning=piece)
        if self.reasoning and not self.text:
            piece = piece.lstrip("\n")  # templates put blank lines between reasoning and answer
        self.text += piece
        return TextDelta(text=piece)


def _joined(a: TextDelta, b: TextDelta) -> TextDelta:
    return TextDelta(a.text + b.text, a.reasoning + b.reasoning)


def _initial_state(tokenizer: Any, prompt: Sequence[int]) -> str:
    """A template may have opened the reasoning in the prompt already."""
    if not tokenizer.has_thinking:
        return "normal"
    opened = tokenizer.rfind_think_start(prompt)
    return "reasoning" if opened > tokenizer.rfind_think_end(prompt) else "normal"
