"""Answers: requests in, text out, over one batch generator on the banked serving tree.

A request waits until its adapter has a slot and the batch has room, then shares the batch with all others,
whichever adapters they use. Each `step` admits, prefills a bounded part of prompts and draws one token for
every active sequence.
"""

import functools
import logging
import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import mlx.core as mx

from ..config.schema import MemorySection, ServingSection
from ..errors import Busy, InternalError, NotReady, PromptTooLong, RadianceError
from ..lora.bank import BASE_SLOT, AdapterWeights, Bank
from ..lora.encoding import ChatEncoder
from ..lora.halves import halved
from ..lora.head import TargetRows
from ..messages import BASE, Answer, Generate, TextDelta, TokenLogprob
from .fused import FusedStable
from .generation import JoiningGenerator, prefill_here
from .model import BaseModel
from .products import UNKNOWN, Best
from .prompts import PromptCache
from .rows import BankModel, RowSampler, RowState
from .slots import Slots
from .text import AnswerText
from .tokens import token_bytes
from .wishes import Wishes

log = logging.getLogger(__name__)
#: so many tokens must be new for a finished sequence to be kept: taking its keys and values out costs as much as
#: computing a few
WORTH_KEEPING = 16
Sink = Callable[[TextDelta | Answer | RadianceError], None]


class Weights(Protocol):
    """Where the decoder finds adapters: kept checkpoints, and the live weights while a batch trains."""

    def checkpoint(self, name: str) -> AdapterWeights: ...

    def live(self) -> tuple[str, int, Callable[[], AdapterWeights]] | None: ...


@dataclass
class _Sequence:
    """One request on its way."""

    request: Generate
    sink: Sink
    prompt: list[int]
    text: AnswerText
    wishes: Wishes | None = None
    checkpoint: str = BASE
    status: str = BASE
    live: bool = False
    slot: int = BASE_SLOT
    uid: int = -1
    cached: int = 0
    drawn: int = 0


class Decoder:
    """See the module's docstring. All methods belong to the engine's thread."""

    def __init__(
        self,
        base: BaseModel,
        tree: Any,
        bank: Bank,
        weights: Weights,
        encoder: ChatEncoder,
        serving: ServingSection,
        memory: MemorySection,
        *,
        batched: bool = True,
        best: Best = UNKNOWN,
        fused: FusedStable | None = None,
        head: TargetRows | None = None,
    ) -> None:
        self._base, self._weights, self._encoder = base, weights, encoder
        self._bank, self._serving, self._memory, self._best = bank, serving, memory, best
        self._batch = serving.max_batch if batched else 1
        self._model = BankModel(tree, bank.rows, fused, head)
        self._context = min(base.context, serving.max_context or base.context)
        self._slots = Slots(bank.slots)
        self._prompts = PromptCache(int(serving.prompt_cache_mb * 2**20))
        self._bytes = functools.cache(functools.partial(token_bytes, base.tokenizer))
        self._waiting: deque[tuple[int, _Sequence]] = deque()
        self._active: dict[int, _Sequence] = {}  # by the generator's uid
        self._uid_of: dict[int, int] = {}  # request number → uid
        self._live_version: tuple[str, int] | None = None
        self._beside = self._aside = False
        self._generator = self._new_generator()

    def _new_generator(self) -> JoiningGenerator:
        generator = JoiningGenerator(
            self._model,
            stop_tokens=[[token] for token in sorted(self._base.tokenizer.eos_token_ids)],
            sampler=RowSampler(self._model),
            completion_batch_size=self._batch,
            prefill_batch_size=min(8, self._batch),
            prefill_step_size=self._serving.prefill_step_size or prefill_here(),
            threads_for=self._threads,
            halved=halved(self._serving.halves),
            stream=mx.default_stream(mx.default_device()),
        )
        if not self._memory.wired:
            generator.close()  # gives back the wired limit that its construction has set
        return generator

    # --- requests --------------------------------------------------------------------------------

    @property
    def load(self) -> int:
        """Requests active or waiting."""
        return len(self._waiting) + len(self._active)

    @property
    def decoding(self) -> int:
        """Requests whose prompts are computed; and those for which the batch has no room, while nobody joins it."""
        joining = len(self._active) > self._generator.decoding
        if joining or (self._waiting and len(self._active) < self._batch):
            return self._generator.decoding
        return self.load

    def submit(self, number: int, request: Generate, sink: Sink) -> None:
        """Take a request; every fault goes to its sink."""
        try:
            if len(self._waiting) >= self._serving.max_waiting:
                raise Busy(f"{len(self._waiting)} requests are waiting.", "Try again in a moment.")
            self._require_room(self._encoder.at_least(request.messages), "at least ")
            prompt = list(request.prompt or self._encoder.prompt(request.messages, request.tools))
            self._require_room(len(prompt))
            stop, tokenizer = request.sampling.stop, self._base.tokenizer
            text = AnswerText(tokenizer, prompt, stop, plain=request.plain, tools=request.tools)
        except RadianceError as error:
            sink(error)
            return
        self._waiting.append((number, _Sequence(request, sink, prompt, text)))

    def _require_room(self, tokens: int, about: str = "") -> None:
        if tokens >= self._context:
            raise PromptTooLong(
                f"The prompt has {about}{tokens} tokens; this model takes {self._context - 1}.",
                "Shorten it.",
                {"prompt_tokens": tokens, "max_tokens": self._context - 1},
            )

    def cancel(self, number: int) -> None:
        """Forget a request: nothing more is computed for it. Unknown numbers are finished ones."""
        self._waiting = deque(item for item in self._waiting if item[0] != number)
        uid = self._uid_of.get(number)
        if uid is not None:
            self._generator.remove([uid])
            self._leave(uid)

    def fail_all(self, error: RadianceError) -> None:
        """End every request with `error` and start with an empty batch."""
        sequences = [s for _, s in self._waiting] + list(self._active.values())
        for uid in list(self._active):
            self._leave(uid)
        self._waiting.clear()
        self._generator = self._new_generator()
        for sequence in sequences:
            sequence.sink(error)

    def drain(self) -> None:
        """The service stops: tell everybody."""
        if self.load:
            self.fail_all(NotReady("The service is stopping.", "Ask again when it is back."))

    # --- adapters --------------------------------------------------------------------------------

    def warm(self, checkpoint: str) -> bool:
        """Fill a slot with `checkpoint`, so that the next request finds it; False while all are in use."""
        slot = self._slots.acquire(checkpoint, self._loader(checkpoint))
        if slot is None:
            return False
        self._slots.release(slot)
        return True

    def forget_live(self, checkpoint: str) -> None:
        """The live weights of `checkpoint` are no more; who is using them ends on what the slot holds."""
        self._slots.forget(_live_key(checkpoint))
        self._live_version = None

    def _loader(self, checkpoint: str) -> Callable[[int], None]:
        return lambda slot: self._write(slot, self._weights.checkpoint(checkpoint))

    def _write(self, slot: int, weights: AdapterWeights) -> None:
        self._generator.begin()  # a step that is not begun holds the bank's stacks: they would be copied
        self._bank.write(slot, weights)

    @property
    def answers_live(self) -> bool:
        """Whether anybody is using the live weights."""
        live = self._weights.live()
        return live is not None and bool(self._slots.users(_live_key(live[0])))

    def refresh_live(self) -> None:
        """After an optimizer step: give the live weights to whoever is using them."""
        live = self._weights.live()
        if live is None or not self.answers_live:
            return
        slot = self._slots.find(_live_key(live[0]))
        if slot is not None and self._live_version != live[:2]:
            self._write(slot, live[2]())
            self._live_version = (live[0], live[1])

    # --- one step --------------------------------------------------------------------------------

    def step(self, *, newcomers: bool = True, beside: bool = False, aside: bool = False) -> None:
        """Admit, prefill, draw; without `newcomers` draw only. A fault in the model ends the requests it hit.

        `beside`: there is something to be computed in the background, too; `aside`: meanwhile, by the other core.
        """
        self._beside, self._aside = beside, aside
        self._generator.read_first(beside and not aside)
        if newcomers:
            self._admit()
        if not self._active:
            return
        for response in self._generator.next()[1] if newcomers else self._generator.decode():
            sequence = self._active.get(response.uid)
            if sequence is not None:
                self._advance(response, sequence)

    def _threads(self, rows: int) -> int:
        return 1 if self._aside else self._best.threads(rows, beside=self._beside)

    def _admit(self) -> None:
        held: deque[tuple[int, _Sequence]] = deque()
        while self._waiting and len(self._active) < self._batch:
            number, sequence = self._waiting.popleft()
            try:
                if self._seat(sequence):
                    self._insert(number, sequence)
                else:
                    held.append((number, sequence))
            except RadianceError as error:
                sequence.sink(error)
            except Exception as error:
                log.exception("a request could not be taken in")
                self._slots.release(sequence.slot)
                sequence.sink(InternalError.of(error))
        self._waiting.extendleft(reversed(held))

    def _seat(self, sequence: _Sequence) -> bool:
        request = sequence.request
        live = self._weights.live() if request.training else None
        if live is not None:
            slot = self._seat_live(live)
            sequence.checkpoint, sequence.status, sequence.live = live[0], "training", True
        elif request.checkpoint == BASE:
            slot = BASE_SLOT
            sequence.checkpoint, sequence.status = BASE, BASE
        else:
            slot = self._slots.acquire(request.checkpoint, self._loader(request.checkpoint))
            sequence.checkpoint, sequence.status = request.checkpoint, request.checkpoint_status
        if slot is None:
            return False
        sequence.slot = slot
        return True

    def _seat_live(self, live: tuple[str, int, Callable[[], AdapterWeights]]) -> int | None:
        name, step, weights = live
        if self._live_version != (name, step):
            present = self._slots.find(_live_key(name))
            if present is not None:
                self._write(present, weights())
                self._live_version = (name, step)
        slot = self._slots.acquire(_live_key(name), lambda slot: self._write(slot, weights()))
        if slot is not None:
            self._live_version = (name, step)
        return slot

    def _insert(self, number: int, sequence: _Sequence) -> None:
        sampling = sequence.request.sampling
        seed = sampling.seed if sampling.seed is not None else secrets.randbits(32)
        kept = None if sequence.live or sequence.slot == BASE_SLOT else sequence.checkpoint
        sequence.wishes = Wishes.of(sampling)
        row = RowState(sequence.slot, sampling.temperature, sampling.top_p, _fold(seed), kept, sequence.wishes)
        cache, rest = (None, sequence.prompt)
        if not sequence.live:
            cache, rest = self._prompts.take(sequence.checkpoint, sequence.prompt)
        sequence.cached = len(sequence.prompt) - len(rest)
        fresh = self._model.new_cache(row)
        room = self._context - len(sequence.prompt)
        [uid] = self._generator.insert(
            [list(rest)],
            max_tokens=[min(sampling.max_tokens, room)],
            caches=[fresh if cache is None else [*cache, fresh[-1]]],
            all_tokens=[sequence.prompt[: sequence.cached]],
        )
        sequence.uid = uid
        self._active[uid] = sequence
        self._uid_of[number] = uid

    def _advance(self, response: Any, sequence: _Sequence) -> None:
        ended = response.finish_reason
        if ended != "stop":  # the end token itself is not part of the answer
            sequence.drawn += 1
            delta = sequence.text.add(response.token, self._told(sequence, response.token))
            if sequence.text.stopped and ended is None:
                self._stop_early(sequence)
                ended = "stop"
            elif ended is None:
                self._deliver(sequence, delta)
                return
            self._deliver(sequence, delta)
        if ended == "length" and sequence.text.stopped:
            ended = "stop"
        self._deliver(sequence, sequence.text.finish())
        if response.prompt_cache is not None:
            self._remember(sequence, response.all_tokens, response.prompt_cache)
        self._leave(sequence.uid)
        sequence.sink(self._answer(sequence, ended))

    def _told(self, sequence: _Sequence, token: int) -> TokenLogprob | None:
        """What `sequence` wants to know of the token that it has just drawn."""
        if sequence.wishes is None or sequence.wishes.logprobs is None:
            return None
        own, likeliest = sequence.wishes.next_logprobs()
        top = tuple(TokenLogprob(other, self._bytes(other), logprob) for other, logprob in likeliest)
        return TokenLogprob(token, self._bytes(token), own, top)

    def _stop_early(self, sequence: _Sequence) -> None:
        kept = self._generator.remove([sequence.uid], return_prompt_caches=True)
        if sequence.uid in kept:
            cache, tokens = kept[sequence.uid]
            self._remember(sequence, tokens, cache)

    def _remember(self, sequence: _Sequence, tokens: list[int], cache: list[Any]) -> None:
        """Keep the prefix, unless the weights were live or nearly all of it came from a kept one."""
        if not sequence.live and len(tokens) - sequence.cached >= WORTH_KEEPING:
            self._prompts.keep(sequence.checkpoint, tokens, cache[:-1])

    def _deliver(self, sequence: _Sequence, delta: TextDelta) -> None:
        if sequence.request.stream and delta:
            sequence.sink(replace(delta, checkpoint=sequence.checkpoint, checkpoint_status=sequence.status))

    def _answer(self, sequence: _Sequence, finish_reason: Any) -> Answer:
        text = sequence.text
        return Answer(
            text=text.text,
            reasoning=text.reasoning.strip(),
            checkpoint=sequence.checkpoint,
            checkpoint_status=sequence.status,
            finish_reason=finish_reason,
            prompt_tokens=len(sequence.prompt),
            completion_tokens=sequence.drawn,
            cached_tokens=sequence.cached,
            tool_calls=text.tool_calls,
            logprobs=text.logprobs,
        )

    def _leave(self, uid: int) -> None:
        sequence = self._active.pop(uid, None)
        if sequence is not None:
            self._slots.release(sequence.slot)
            self._uid_of = {number: u for number, u in self._uid_of.items() if u != uid}

    def facts(self) -> dict[str, Any]:
        """For `/info`."""
        return {
            "active": len(self._active),
            "waiting": len(self._waiting),
            "prompt_cache_bytes": self._prompts.nbytes,
            "bank_bytes": self._bank.nbytes,
            "batched": self._batch > 1,
        }


def _live_key(checkpoint: str) -> str:
    return f"training:{checkpoint}"


def _fold(seed: int) -> int:
    """Any integer as 32 bits that differ for seeds that differ nearby."""
    return (seed ^ (seed >> 32)) & 0xFFFFFFFF
