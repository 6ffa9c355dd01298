"""Tokens and the text that they make: each token's own bytes, and which tokens a piece of text came from."""

from collections import deque
from typing import Any

from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, SPMStreamingDetokenizer, _byte_decoder

from ..messages import TokenLogprob

_WORD_MARK = "\u2581".encode()


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """What `token` adds to a text: some tokens are parts of a character."""
    detokenizer = tokenizer.detokenizer
    known = getattr(detokenizer, "tokenmap", ())
    if token < len(known) and isinstance(detokenizer, SPMStreamingDetokenizer):
        return bytes(known[token].replace(_WORD_MARK, b" "))
    if token < len(known) and isinstance(detokenizer, BPEStreamingDetokenizer):
        table = _byte_decoder()
        return b"".join(bytes([table[c]]) if c in table else c.encode() for c in known[token])
    return str(tokenizer.decode([token])).encode()


def untrimmed(detokenizer: Any) -> Any:
    """A new `detokenizer` that keeps a space which the text begins with: mlx-lm's trim it while no text is before."""
    if isinstance(detokenizer, SPMStreamingDetokenizer | BPEStreamingDetokenizer):
        detokenizer.text, detokenizer.offset = "\n", 1  # some text, that was told already
    return detokenizer


class TokenTrail:
    """Which tokens the answer's text came from, while text is held back, cut off or put elsewhere.

    Positions count the characters that the detokenizer gave. A token's are those that it brought to an end: one that
    ends within a character has none, and belongs to what the next one brings.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[int, int, TokenLogprob]] = deque()  # (first position, the one after its last, token)
        self._at = 0
        self._settled: list[TokenLogprob] = []

    def add(self, token: TokenLogprob, characters: int) -> None:
        """`token` came, and so many characters with it."""
        self._pending.append((self._at, self._at + characters, token))
        self._at += characters

    def extend_last(self, characters: int) -> None:
        """More text came, of the tokens that are here already."""
        if self._pending:
            first, after, token = self._pending.pop()
            self._pending.append((first, after + characters, token))
        self._at += characters

    def answered(self, first: int, after: int) -> None:
        """The characters from `first` to before `after` are part of the answer; what stands before is decided."""
        self.passed(first)
        while self._pending:
            group, token = self._next_group()
            if token is None or token[0] >= after:
                return
            self._take(group, keep=True)

    def passed(self, position: int) -> None:
        """What ends by `position` and was not part of the answer never will be."""
        while self._pending:
            group, token = self._next_group()
            if token is None or token[1] > position:
                return
            self._take(group, keep=False)

    def finish(self) -> None:
        """Nothing follows: tokens without text of their own, such as marks, are part of the answer."""
        self._settled += [token for _, _, token in self._pending]
        self._pending.clear()

    def take(self) -> tuple[TokenLogprob, ...]:
        """The tokens that have become part of the answer since this was last asked."""
        settled, self._settled = tuple(self._settled), []
        return settled

    def _next_group(self) -> tuple[int, tuple[int, int, TokenLogprob] | None]:
        """(how many tokens share the next characters, the one of them that has some)."""
        for count, entry in enumerate(self._pending, 1):
            if entry[1] > entry[0]:
                return count, entry
        return len(self._pending), None

    def _take(self, count: int, *, keep: bool) -> None:
        taken = [self._pending.popleft()[2] for _ in range(count)]
        if keep:
            self._settled += taken
