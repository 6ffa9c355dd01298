"""From chat messages and examples to tokens, by the base's own chat template.

A base without a template gets plain text: the contents one after another, then the answer, then the end
token. Needs only a tokenizer (mlx-lm's `TokenizerWrapper`), no arrays.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import InvalidRequest
from ..messages import Example, Tools, as_chat

Messages = Sequence[tuple[str, str]]
#: messages, and the functions that they may call, as a chat template takes them
Chat = list[dict[str, Any]]
Functions = list[dict[str, Any]] | None


@dataclass(frozen=True, slots=True)
class Encoded:
    """Tokens of one example; targets are the tokens from `offset` on. `cut` tokens were left out."""

    tokens: tuple[int, ...]
    offset: int
    cut: int = 0

    @property
    def targets(self) -> int:
        """How many tokens count in the loss."""
        return len(self.tokens) - max(self.offset, 1)


class ChatEncoder:
    """Renders prompts and examples for one tokenizer; `template_args` reach its chat template."""

    def __init__(self, tokenizer: Any, template_args: dict[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.template_args = dict(template_args or {})
        self._longest = max(map(len, tokenizer.get_vocab()))

    def at_least(self, messages: Messages) -> int:
        """A lower bound of the tokens in `messages`, without encoding them: no token has more characters."""
        return sum(len(content) for _, content in messages) // self._longest

    def prompt(self, messages: Messages, tools: Tools | None = None) -> list[int]:
        """Tokens of `messages` up to where the answer begins. Raises `InvalidRequest` if the template refuses."""
        if self.tokenizer.has_chat_template:
            tools = tools or Tools()
            return self._render(as_chat(messages, tools.beside), list(tools.functions), add_generation_prompt=True)
        return list(self.tokenizer.encode("\n".join(content for _, content in messages)))

    def example(self, example: Example, *, mask_prompt: bool = True, max_tokens: int = 2048) -> Encoded:
        """Tokens of one training pair, cut to `max_tokens`.

        Without `mask_prompt`, and for plain text, every token but the first is a target; for an `answer_only` example
        the answer's tokens are, in any case. Raises `InvalidRequest` if the template refuses the chat, or its tools.
        """
        room = (max_tokens + 1) * self._longest  # characters beyond this cannot be among the kept tokens
        if not example.messages:
            tokens = self._ended(list(self.tokenizer.encode(example.text[:room])))
            return Encoded(tuple(tokens[:max_tokens]), 0, max(0, len(tokens) - max_tokens))
        if example.needs_tools and not self.shows_tools:
            raise InvalidRequest(
                "The model's chat template has no place for tools.", "Leave them out, or change the base."
            )
        *asked, answered = example.chat()
        for message in asked:
            message["content"] = message["content"][-room:]
        answered["content"] = answered["content"][:room]
        prompt, answer = self._split([*asked, answered], json.loads(example.tools) if example.tools else None)
        kept_prompt, kept_answer = _fit(prompt, answer, max_tokens)
        cut = len(prompt) + len(answer) - len(kept_prompt) - len(kept_answer)
        offset = len(kept_prompt) if mask_prompt or example.answer_only else 0
        return Encoded((*kept_prompt, *kept_answer), offset, cut)

    @cached_property
    def shows_tools(self) -> bool:
        """Whether the chat template shows the tools that it is given."""
        if not self.tokenizer.has_chat_template:
            return False
        name = "a_tool_to_be_looked_for"
        function = {"name": name, "description": "", "parameters": {"type": "object", "properties": {}}}
        asked = [{"role": "user", "content": "?"}]
        try:
            said = self._apply(
                asked, [{"type": "function", "function": function}], add_generation_prompt=True, tokenize=False
            )
        except InvalidRequest:
            return False
        return name in said

    @property
    def takes_tools(self) -> bool:
        """Whether the model can be given tools and asked to call them: mlx-lm knows too how it writes calls."""
        return self.shows_tools and bool(self.tokenizer.has_tool_calling)

    def _split(self, chat: Chat, functions: Functions) -> tuple[list[int], list[int]]:
        if not self.tokenizer.has_chat_template:
            prompt = self.prompt([(message["role"], message["content"]) for message in chat[:-1]])
            answer = list(self.tokenizer.encode(chat[-1]["content"], add_special_tokens=False))
            return prompt, self._ended(answer)
        prompt = self._render(chat[:-1], functions, add_generation_prompt=True)
        whole = self._render(chat, functions, add_generation_prompt=False)
        both = zip(prompt, whole, strict=False)
        shared = next((i for i, (p, w) in enumerate(both) if p != w), min(len(prompt), len(whole)))
        if shared < len(prompt) and (rest := self._rest_of_text(chat, functions)) is not None:
            return prompt, rest
        # a template that renders the last turn otherwise than it prompts for it: what differs is learnt
        return whole[:shared], whole[shared:]

    def _rest_of_text(self, chat: Chat, functions: Functions) -> list[int] | None:
        """What follows the prompt's text, as tokens of its own; None if the whole does not begin with it.

        A prompt may end within what becomes one token of the whole (an opened thought and its line break):
        the example is then learnt after the very tokens that will be asked.
        """
        prompt = self._apply(chat[:-1], functions, add_generation_prompt=True, tokenize=False)
        whole = self._apply(chat, functions, add_generation_prompt=False, tokenize=False)
        if not whole.startswith(prompt):
            return None
        return list(self.tokenizer.encode(whole[len(prompt) :], add_special_tokens=False))

    def _render(self, chat: Chat, functions: Functions, *, add_generation_prompt: bool) -> list[int]:
        return list(self._apply(chat, functions, add_generation_prompt=add_generation_prompt, tokenize=True))

    def _apply(self, chat: Chat, functions: Functions, *, add_generation_prompt: bool, tokenize: bool) -> Any:
        args = {**self.template_args, **({"tools": functions} if functions else {})}
        try:
            return self.tokenizer.apply_chat_template(
                chat, add_generation_prompt=add_generation_prompt, tokenize=tokenize, **args
            )
        except Exception as error:  # jinja's errors, and whatever a template raises by itself
            raise InvalidRequest(
                f"The model's chat template refuses these messages: {error}",
                "Check the roles and their order.",
            ) from error

    def _ended(self, tokens: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return tokens if end is None or (tokens and tokens[-1] == end) else [*tokens, end]


def _fit(prompt: list[int], answer: list[int], room: int) -> tuple[list[int], list[int]]:
    """Keep the answer's start and the prompt's end; the prompt yields down to half of the room first."""
    if len(prompt) + len(answer) <= room:
        return prompt, answer
    answer = answer[: room - min(len(prompt), room // 2)]
    return prompt[len(prompt) - (room - len(answer)) :], answer
