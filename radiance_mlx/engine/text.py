"""From tokens to the text of an answer: detokenizing, reasoning and tool calls apart, stop strings.

mlx-lm's streaming detokenizer, its text state machine and its parsers of tool calls do the work; stop strings are
matched on text, with hold-back, since the tokens of a stop string depend on what stands before it.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from mlx_lm.generate import TextStateMachine

from ..messages import TextDelta, TokenLogprob, ToolCall, Tools
from .tokens import TokenTrail, untrimmed

log = logging.getLogger(__name__)


class AnswerText:
    """One answer as it grows. `stopped` is true once a stop string has come.

    With `plain`, all that comes is text, a space at its beginning too. With `tools`, what the model writes as a call
    becomes one; what cannot be read as a call stays text.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: Sequence[int],
        stop: Sequence[str],
        *,
        plain: bool = False,
        tools: Tools | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = untrimmed(tokenizer.detokenizer) if plain else tokenizer.detokenizer
        self._tools = tools if tools and tools.functions and tokenizer.has_tool_calling else None
        thinking = tokenizer.has_thinking and not plain
        machine = TextStateMachine(self._transitions(stop, thinking))
        self._state = machine.make_state(_initial_state(tokenizer, prompt) if thinking else "normal")
        self._trail: TokenTrail | None = None
        self._raw = 0  # characters that came
        self._call = ""
        self.text = ""
        self.reasoning = ""
        self.tool_calls: tuple[ToolCall, ...] = ()
        self.logprobs: tuple[TokenLogprob, ...] = ()
        self.stopped = False

    def _transitions(self, stop: Sequence[str], thinking: bool) -> dict[str, list[tuple[str, str | None]]]:
        tokenizer = self._tokenizer
        states: dict[str, list[tuple[str, str | None]]] = {"normal": [(word, None) for word in stop], "reasoning": []}
        if thinking:
            states["normal"].append((tokenizer.think_start, "reasoning"))
            states["reasoning"].append((tokenizer.think_end, "normal"))
        if self._tools:
            states["normal"].append((tokenizer.tool_call_start, "tool"))
            states["tool"] = [(tokenizer.tool_call_end, "normal")] if tokenizer.tool_call_end else []
        return states

    def add(self, token: int, told: TokenLogprob | None = None) -> TextDelta:
        """Take one token; the text that is now certain."""
        self._detokenizer.add_token(token)
        piece = self._detokenizer.last_segment
        if told is not None:
            self._trail = self._trail or TokenTrail()
            self._trail.add(told, len(piece))
        return self._with_logprobs(self._take(piece))

    def finish(self) -> TextDelta:
        """No token follows: what was held back."""
        if self.stopped:
            return TextDelta()
        self._detokenizer.finalize()
        piece = self._detokenizer.last_segment
        if self._trail:
            self._trail.extend_last(len(piece))
        delta = self._take(piece)
        if not self.stopped:
            self._state, rest, name = TextStateMachine.flush(self._state)
            delta = _joined(delta, self._append(name, rest, self._raw - len(rest)))
            if name == "tool":
                delta = _joined(delta, self._end_call(ended=False))
            if self._trail and name == "normal":
                self._trail.passed(self._raw)
                self._trail.finish()
        return self._with_logprobs(delta)

    def _with_logprobs(self, delta: TextDelta) -> TextDelta:
        if self._trail is None:
            return delta
        told = self._trail.take()
        self.logprobs += told
        return _joined(delta, TextDelta(logprobs=told))

    def _take(self, text: str) -> TextDelta:
        delta = TextDelta()
        # a character at a time where each one's place must be known: two marks in one token would blur it
        for part in text if self._trail else [text] if text else []:
            if self.stopped:
                break
            for name, piece, position, last in self._split(part):
                if name is None:
                    self.stopped = True
                    break
                delta = _joined(delta, self._append(name, piece, position))
                if name == "tool" and not last:
                    delta = _joined(delta, self._end_call())
        return delta

    def _split(self, text: str) -> Iterator[tuple[str | None, str, int, bool]]:
        """(state, its piece, the position of its first character, whether it goes on) as `text` comes."""
        first = self._raw - len(self._state[3])
        self._raw += len(text)
        self._state, segments = TextStateMachine.split(self._state, text)
        decided = self._raw - len(self._state[3])
        for number, (name, piece) in enumerate(segments):
            last = number == len(segments) - 1
            yield name, piece, first if number == 0 else decided - len(piece), last

    def _append(self, state: str, piece: str, position: int) -> TextDelta:
        if state == "tool":
            self._call += piece
            return TextDelta()
        if state == "reasoning":
            self.reasoning += piece
            return TextDelta(reasoning=piece)
        if self._trail and piece:
            self._trail.answered(position, position + len(piece))
        if self.reasoning and not self.text:
            piece = piece.lstrip("\n")  # templates put blank lines between reasoning and answer
        if self.tool_calls and piece.isspace():  # and between calls
            return TextDelta()
        self.text += piece
        return TextDelta(text=piece)

    def _end_call(self, *, ended: bool = True) -> TextDelta:
        """The call has been written: read it, or it is text like any other."""
        written, self._call = self._call, ""
        assert self._tools is not None
        try:
            parsed = self._tokenizer.tool_parser(written, list(self._tools.functions))
            calls = tuple(_call(one) for one in (parsed if isinstance(parsed, list) else [parsed]))
        except Exception as error:  # each parser has its own; none is a fault of ours
            log.info("a tool call could not be read: %s", type(error).__name__)
            text = self._tokenizer.tool_call_start + written + (self._tokenizer.tool_call_end if ended else "")
            self.text += text
            return TextDelta(text=text)
        self.tool_calls += calls
        return TextDelta(tool_calls=calls)


def _call(parsed: dict[str, Any]) -> ToolCall:
    arguments = parsed.get("arguments", {})
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    name, given = parsed["name"], parsed.get("id")
    if not isinstance(name, str):
        raise TypeError("a call names its function")
    return ToolCall(name, written, given if isinstance(given, str) else None)


def _joined(a: TextDelta, b: TextDelta) -> TextDelta:
    return TextDelta(a.text + b.text, a.reasoning + b.reasoning, a.tool_calls + b.tool_calls, a.logprobs + b.logprobs)


def _initial_state(tokenizer: Any, prompt: Sequence[int]) -> str:
    """A template may have opened the reasoning in the prompt already."""
    if not tokenizer.has_thinking:
        return "normal"
    opened = tokenizer.rfind_think_start(prompt)
    return "reasoning" if opened > tokenizer.rfind_think_end(prompt) else "normal"
