"""mlx-lm's `BatchGenerator`, with less work in each step.

Three things differ. A sequence whose prompt is computed joins the running batch at once: its prompt's last token
goes through the model with everybody's next step, where mlx-lm gives each newcomer's first token a pass over
the weights of its own. A step draws from logits: log-probabilities of the whole vocabulary are computed for
nobody who has not asked for them, and no array is made row by row. Samplers and processors of single rows are
not taken: the one sampler knows the rows (see `rows`), and tells those who asked (see `wishes`). And prompts are
computed in `halves` where that pays, and give their first tokens with their last part where nobody decodes.
Answers are the same.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, GenerationBatch, PromptProcessingBatch
from mlx_lm.models.cache import BatchKVCache

from ..lora.halves import streams
from .products import use_threads

#: tokens by which keys and values grow; whatever rolls, filters or joins them copies the room that is left, too
GROWTH = 64
#: of a pass over prompts, padding included; of fewer, halves are no faster
WORTH_HALVING = 112
#: than what was wished for, a pass may be, if that makes one less
WIDER = 1.25
#: prompt tokens in a pass. On the CPU, more are slower (attention's memory) and a longer wait for everybody else
PREFILL, PREFILL_CPU = 512, 256


def prefill_here() -> int:
    """`prefill_step_size` for the default device."""
    return PREFILL_CPU if mx.default_device() == mx.cpu else PREFILL


class JoiningBatch(GenerationBatch):
    """The sequences that decode. `_fresh` marks those whose next input is still a token of their prompt."""

    _next_tokens: mx.array

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._fresh: list[bool] = []
        self._beside: list[mx.array] = []  # what is to be computed with the tokens that are read next
        self._first_is_next = False  # whether what is read next is somebody's first token
        self.reads_first = False  # before it begins a step, whoever's tokens they are
        self._put_off = mx.default_device() == mx.cpu
        super().__init__(*args, **kwargs)
        self._fresh = [True] * len(self.uids)

    def _step(self) -> tuple[list[int], list[mx.array]]:
        """Start on the next tokens, then read those that were started before: (tokens, no log-probabilities).

        On the CPU, MLX goes on from a start only when most of it is computed: somebody's first token is read before. So
        is every token with `reads_first`: what is read late would wait for the slice between two steps, too.
        """
        if len(self._fresh) < len(self.uids):  # under construction: the first step is everybody's next one
            return [], []
        self.begin()  # if that was put off
        inputs = self._next_tokens
        logits = self.model(inputs[:, None], cache=self.prompt_cache)[:, -1, :]
        self.drawn(self.fallback_sampler(logits))
        if not (self._put_off and (self._first_is_next or self.reads_first)):
            self.begin()
        self._first_is_next = any(self._fresh)
        read = inputs.tolist()
        for tokens, token in zip(self.tokens, read, strict=True):
            tokens.append(token)
        return read, []

    def drawn(self, tokens: mx.array) -> None:
        """What is read next are `tokens`, which the sampler has just drawn; they are not begun yet."""
        beside = getattr(self.fallback_sampler, "beside", [])
        self._next_tokens, self._beside = tokens, [*beside]
        beside.clear()

    def begin(self) -> None:
        """Begin to compute what is read next; what is under way already stays so."""
        mx.async_eval(self._next_tokens, *self._beside)
        self._beside = []

    def gets_first(self) -> None:
        """What is read next is everybody's first token."""
        self._fresh, self._first_is_next = [False] * len(self.uids), True

    def extend(self, batch: "JoiningBatch") -> None:
        """Take in the sequences of `batch`."""
        self._first_is_next = self._first_is_next or batch._first_is_next
        self._beside += batch._beside
        self._fresh.extend(batch._fresh)
        super().extend(batch)
        self._current_tokens = None  # nothing reads it here, and it has another batch's rows

    def filter(self, keep: list[int]) -> None:
        """Keep only the sequences at these places."""
        self._next_logprobs = [None] * len(self.uids)
        if not keep:
            self._beside = []
        super().filter(keep)
        self._next_logprobs = []
        self._fresh = [self._fresh[i] for i in keep]

    def next(self) -> list[GenerationBatch.Response]:
        """One token for each sequence that is not fresh."""
        if not self.uids:
            return []
        tokens, _ = self._step()
        keep, responses = [], []
        for i, token in enumerate(tokens):
            if self._fresh[i]:
                self._fresh[i] = False
                keep.append(i)
                continue
            reason = self._ended(i, token)
            cache, all_tokens = (self.extract_cache(i), self.tokens[i]) if reason else (None, None)
            responses.append(self.Response(self.uids[i], token, None, reason, cache, all_tokens))
            if reason is None:
                keep.append(i)
        if len(keep) < len(self.uids):
            self.filter(keep)
        return responses

    def _ended(self, i: int, token: int) -> str | None:
        self._num_tokens[i] += 1
        if self._matchers[i].advance(token):
            return "stop"
        return "length" if self._num_tokens[i] >= self.max_tokens[i] else None


class JoiningPrompts(PromptProcessingBatch):
    """The sequences whose prompts are being computed; with `halved` those of one pass in halves, where it pays."""

    halved = False

    uids: list[int]
    prompt_cache: list[Any]
    tokens: list[list[int]]
    samplers: list[Any]
    logits_processors: list[Any]
    stop_sequences: list[Any]
    max_tokens: list[int]

    def prompt(self, tokens: list[list[int]]) -> None:
        """Compute the next tokens of each sequence."""
        if tokens:
            self._compute(tokens, to_the_end=False)

    def finish(self, tokens: list[list[int]]) -> JoiningBatch:
        """Compute the last tokens of all sequences, of which none is left here, and draw what follows."""
        logits = mx.concatenate(self._compute(tokens, to_the_end=True))
        self.model.draws_next(self.prompt_cache, mx.array([part[-1:] for part in tokens]))
        drawn = self.fallback_sampler(logits).astype(mx.uint32)
        batch = self._become(drawn)
        batch.drawn(drawn)
        batch.gets_first()
        return batch

    def _compute(self, tokens: list[list[int]], *, to_the_end: bool) -> list[mx.array]:
        """With `to_the_end`, the logits after all `tokens`, of one part of the sequences after the other."""
        middle, width = len(tokens) // 2, max(map(len, tokens))
        if not self.halved or not middle or len(tokens) * width < WORTH_HALVING:
            use_threads()
            states, logits = self._begin(tokens, to_the_end)
            mx.eval(states, logits)
            mx.clear_cache()
            return logits
        use_threads(1)
        other, (own, more) = self._take_off(middle, width), streams()
        with mx.stream(own):
            mine, logits = self._begin(tokens[:middle], to_the_end)
        with mx.stream(more):
            others, more_logits = other._begin(tokens[middle:], to_the_end)
        for both in zip(mine, others, strict=True):  # layer by layer: MLX begins only so much at a time
            mx.async_eval(both)
        mx.eval(mine, others, logits, more_logits)
        self.extend(other)
        mx.clear_cache()
        return logits + more_logits

    def _take_off(self, middle: int, width: int) -> "JoiningPrompts":
        """The sequences from the one at `middle` on, which are no longer here: as `split`, with less to wait for.

        Both parts are ready for `width` tokens more.
        """
        rows = len(self.uids)
        caches, self.prompt_cache = self.prompt_cache, []
        other: JoiningPrompts = self.split(list(range(middle, rows)))
        for i, cache in enumerate(caches):
            caches[i] = None  # layer by layer, or all keys and values would be there twice
            other.prompt_cache.append(_rows(cache, middle, rows))
            self.prompt_cache.append(_rows(cache, 0, middle))
            del cache
            mx.eval([_with_room(part.prompt_cache[-1], width) for part in (self, other)])
        return other

    def _begin(self, tokens: list[list[int]], to_the_end: bool) -> tuple[list[Any], list[mx.array]]:
        """The prompt cache's states, layer by layer, and with `to_the_end` the logits after `tokens`; not evaluated."""
        for known, more in zip(self.tokens, tokens, strict=True):
            known += more
        lengths = [len(part) for part in tokens]
        longest = max(lengths)
        padding = [longest - length for length in lengths]
        if any(padding):  # to the right: afterwards the caches turn it to the left
            tokens = [[*part, *[0] * more] for part, more in zip(tokens, padding, strict=True)]
            for cache in self.prompt_cache:
                cache.prepare(lengths=lengths, right_padding=padding)
        logits = []
        if to_the_end:
            places = mx.array([row * longest + length - 1 for row, length in enumerate(lengths)])
            logits.append(self.model.at(mx.array(tokens), self.prompt_cache, places))
        else:
            self.model(mx.array(tokens), cache=self.prompt_cache)
        if any(padding):
            for cache in self.prompt_cache:
                cache.finalize()
        return [cache.state for cache in self.prompt_cache], logits

    def hand_over(self, indices: Sequence[int], last: list[list[int]]) -> JoiningBatch:
        """The sequences at `indices`, whose prompts are done but for the token in `last`, and no longer here."""
        inputs = mx.array([tokens[-1] for tokens in last], dtype=mx.uint32)
        if len(indices) == len(self.uids):  # all of them: no need to copy the keys and values
            return self._become(inputs)
        return self.split(list(indices))._become(inputs)

    def _become(self, inputs: mx.array) -> JoiningBatch:
        batch = JoiningBatch(
            self.model,
            self.uids,
            inputs,
            self.prompt_cache,
            self.tokens,
            self.samplers,
            self.fallback_sampler,
            self.logits_processors,
            self.stop_sequences,
            self.max_tokens,
        )
        self.uids, self.prompt_cache, self.tokens, self.stop_sequences, self.max_tokens = [], [], [], [], []
        self.samplers, self.logits_processors = [], []
        return batch


class JoiningGenerator(BatchGenerator):
    """See the module's docstring."""

    _currently_processing: list[list[Any]]

    def __init__(
        self, *args: Any, threads_for: Callable[[int], int] = lambda rows: 0, halved: bool = False, **kwargs: Any
    ) -> None:
        """As mlx-lm's; `threads_for` tells how many threads of OpenBLAS decode so many rows, 0: all.

        With `halved` prompts of one pass are computed in `halves`, where that pays.
        """
        super().__init__(*args, **kwargs)
        self._threads_for = threads_for
        self._prompt_batch = JoiningPrompts.empty(self.model, self.sampler, self.prefill_step_size)
        self._prompt_batch.halved = halved
        self._generation_batch = JoiningBatch.empty(self.model, self.sampler)

    @property
    def decoding(self) -> int:
        """Sequences whose prompts are computed."""
        return len(self._generation_batch)

    def begin(self) -> None:
        """Begin the step that was put off, if one was."""
        if len(self._generation_batch):
            self._generation_batch.begin()

    def read_first(self, wanted: bool) -> None:
        """Whether tokens are read before the step after them is begun: sooner, but with nothing computed meanwhile."""
        self._generation_batch.reads_first = wanted

    def decode(self) -> list[GenerationBatch.Response]:
        """As `next`, for those alone that are `decoding`: prompts stay where they are."""
        with mx.stream(self._stream):
            return self._decode()

    def _next(self) -> tuple[list[Any], list[GenerationBatch.Response]]:
        room = self.completion_batch_size - len(self._generation_batch)
        new = min(self.prefill_batch_size - len(self._prompt_batch), room, len(self._unprocessed_sequences))
        if new > 0:
            self._prompt_batch.extend(self._make_batch(new))
        self._join()
        if self._currently_processing:
            lengths = [len(segments[0]) for segments, *_ in self._currently_processing]
            if self._all_end(lengths):
                parts = [[*part, *last] for (part, last), *_ in self._currently_processing]
                self._currently_processing = []
                self._generation_batch.extend(self._prompt_batch.finish(parts))
            else:
                width = self._width(lengths)
                self._prompt_batch.prompt([_take(sequence, width) for sequence in self._currently_processing])
                self._join()
        return [], self._decode()

    def _all_end(self, lengths: list[int]) -> bool:
        """Whether the next pass, with the last tokens in it, gives all sequences their first; `lengths` are without.

        With others that decode, those last tokens go through the model in their next step, for nothing.
        """
        fits = (max(lengths) + 1) * len(lengths) <= WIDER * self.prefill_step_size
        there = all(len(segments) == 2 and len(segments[1]) == 1 for segments, *_ in self._currently_processing)
        return fits and there and not len(self._generation_batch) and getattr(self.model, "takes_places", False)

    def _width(self, lengths: list[int]) -> int:
        """Tokens that the next pass takes of each prompt, of which so many are left.

        Shorter parts are padded to the longest. Passes are as wide as each other, and a quarter wider than was wished
        rather than one more: a pass for what little is left reads all weights once more.
        """
        most = max(1, int(WIDER * self.prefill_step_size) // len(lengths))
        return -(-max(lengths) // -(-max(lengths) // most))

    def _decode(self) -> list[GenerationBatch.Response]:
        use_threads(self._threads_for(len(self._generation_batch)))
        return self._generation_batch.next()

    def _make_batch(self, n: int) -> PromptProcessingBatch:
        batch = super()._make_batch(n)
        for cache in batch.prompt_cache:
            if isinstance(cache, BatchKVCache):
                cache.step = GROWTH
        return batch

    def _join(self) -> None:
        """Move the sequences that lack only their prompt's last token to the decoding batch."""
        done = [i for i, (segments, *_) in enumerate(self._currently_processing) if _only_last(segments)]
        if not done:
            return
        last = [self._currently_processing[i][0][0] for i in done]
        self._currently_processing = [s for i, s in enumerate(self._currently_processing) if i not in done]
        self._generation_batch.extend(self._prompt_batch.hand_over(done, last))


def _rows(cache: Any, start: int, end: int) -> Any:
    """A batch's cache of some rows. Of a batch that is at its beginning, nothing has to be looked at for it."""
    if type(cache) is BatchKVCache and cache.keys is None:
        part = copy.copy(cache)
        part.left_padding, part.offset = cache.left_padding[start:end], cache.offset[start:end]
    else:
        part = copy.deepcopy(cache)
        part.filter(list(range(start, end)))
    return part


def _with_room(cache: Any, width: int) -> list[mx.array]:
    """What is to be evaluated of a batch's cache: with keys from before, it gets the room that `width` tokens need.

    What joins and copies them is for both halves, and many operations: their streams would wait for each other.
    """
    if type(cache) is not BatchKVCache or cache.keys is None:
        return []
    missing = -(-max(0, cache._idx + width - cache.keys.shape[2]) // GROWTH) * GROWTH
    if missing:
        room = ((0, 0), (0, 0), (0, missing), (0, 0))
        cache.keys, cache.values = mx.pad(cache.keys, room), mx.pad(cache.values, room)
    return [cache.keys, cache.values, cache.offset, cache.left_padding]


def _take(sequence: list[Any], width: int) -> list[int]:
    """The next part of a prompt, at most `width` tokens; its last token is never among them."""
    segments = sequence[0]
    part, segments[0] = segments[0][:width], segments[0][width:]
    if not segments[0]:
        segments.pop(0)
    return part


def _only_last(segments: list[list[int]]) -> bool:
    return len(segments) == 1 and len(segments[0]) == 1
