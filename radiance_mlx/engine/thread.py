"""The engine's thread, and the only way to it: tasks in, callbacks out.

A task is a function of the engine with a place for its reply; the thread runs it between two steps. Replies
and pieces of answers are collected during a step and handed to the event loop with one `call_soon_threadsafe`.
This module does not import MLX: the thread does, when it starts.
"""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..config import Config
from ..errors import Cancelled, InternalError, NotReady, PromptTooLong, RadianceError
from ..messages import Answer, EngineFacts, Generate, Progress, TextDelta, TrainBatch, TrainResult

if TYPE_CHECKING:
    from ..evaluation.anchors import AnchorSet
    from ..evaluation.plan import Plan, Subject
    from ..lora.encoding import ChatEncoder
    from .core import Engine
    from .measuring import Measurements

log = logging.getLogger(__name__)
T = TypeVar("T")
#: without a sign of life for so long, the engine does not count as working
STALL_S = 60.0
#: characters; what is shorter takes the engine's thread a few milliseconds to encode
LONG_PROMPT = 8_000
STATUS_S = 0.2
#: between two looks at whether what waits for its turn is still wished for
WISH_S = 0.1
#: after a pause, how long to wait for another request with the first; and where the last ones came together, too
GATHER_S, GATHER_MORE_S = 0.001, 0.004


class EngineThread:
    """Owns the thread. All methods but `_main` and what it calls belong to the event loop's thread."""

    def __init__(self, config: Config, home: Path, on_death: Callable[[BaseException], None]) -> None:
        self._config, self._home, self._on_death = config, home, on_death
        self._inbox: queue.SimpleQueue[Callable[[Engine], None] | None] = queue.SimpleQueue()
        self._outbox: list[Callable[[], None]] = []
        self._thread = threading.Thread(target=self._main, name="radiance-engine")
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[EngineFacts] = self._loop.create_future()
        self._pending: set[asyncio.Future[Any]] = set()
        self._open: set[asyncio.Queue[Any]] = set()
        self._numbers = 0
        self._encoder: ChatEncoder | None = None
        self._encoding = asyncio.Lock()
        self._in_background = asyncio.Lock()
        self._context = 0
        #: numbers for `/info`, as of the engine's last steps; asking the engine would mean to wait for it
        self.status: dict[str, Any] = {}
        self._beat = time.monotonic()
        self._alive = False
        self._stopping = threading.Event()

    # --- life ------------------------------------------------------------------------------------

    async def start(self) -> EngineFacts:
        """Start the thread and load the base. Raises `RadianceError` if that fails."""
        self._thread.start()
        return await self._started

    async def stop(self) -> None:
        """Keep the training's state, end all requests, join the thread."""
        self._stopping.set()
        self._inbox.put(None)
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

    @property
    def working(self) -> bool:
        """Whether the engine is loaded and shows signs of life."""
        return self._alive and time.monotonic() - self._beat < STALL_S

    # --- tasks -----------------------------------------------------------------------------------

    async def call(self, task: "Callable[[Engine], Any]") -> Any:
        """Run `task` on the engine's thread and give its result. Raises what it raises."""
        self._require()
        reply: asyncio.Future[Any] = self._loop.create_future()
        self._pending.add(reply)
        reply.add_done_callback(self._pending.discard)
        self._post(
            lambda engine: self._send(_resolve, reply, task(engine), None),
            lambda error: self._send(_resolve, reply, None, error),
        )
        return await reply

    async def generate(self, request: Generate) -> AsyncIterator[TextDelta | Answer]:
        """Pieces (if `request.stream`) and the answer. Leaving the iterator early ends the generation.

        Raises `RadianceError`.
        """
        self._require()
        self._numbers += 1
        number = self._numbers
        pieces: asyncio.Queue[TextDelta | Answer | RadianceError] = asyncio.Queue()
        finished = False
        self._open.add(pieces)
        sink = self._sink(pieces)
        try:
            asked = await self._encoded(request)
            self._post(lambda engine: engine.submit(number, asked, sink), sink)
            while not finished:
                item = await pieces.get()
                if isinstance(item, RadianceError):
                    finished = True
                    raise item
                finished = isinstance(item, Answer)
                yield item
        finally:
            self._open.discard(pieces)
            if not finished:
                self._post(lambda engine: engine.cancel(number), lambda error: None)

    async def _encoded(self, request: Generate) -> Generate:
        """A long prompt is encoded on a thread of its own: on the engine's, everybody would wait for it."""
        assert self._encoder is not None
        too_long = self._encoder.at_least(request.messages) >= self._context  # the engine refuses it unencoded
        if too_long or sum(len(content) for _, content in request.messages) < LONG_PROMPT:
            return request
        tokens = await self.encode(lambda encoder: encoder.prompt(request.messages, request.tools))
        return replace(request, prompt=tuple(tokens))

    async def encode(self, work: "Callable[[ChatEncoder], T]") -> T:
        """Run `work` with the base's encoder on a thread of its own, one after another."""
        self._require()
        assert self._encoder is not None
        async with self._encoding:
            return await asyncio.to_thread(work, self._encoder)

    async def tokens(self, text: str) -> tuple[int, ...]:
        """Bare text as the base's tokens, with what the tokenizer puts in front. Raises `PromptTooLong`."""

        def work(encoder: "ChatEncoder") -> tuple[int, ...]:
            least = encoder.at_least((("", text),))
            if least >= self._context:
                raise PromptTooLong(
                    f"The prompt has at least {least} tokens; this model takes {self._context - 1}.", "Shorten it."
                )
            return tuple(encoder.tokenizer.encode(text))

        return await self.encode(work)

    async def answer(self, request: Generate) -> Answer:
        """The whole answer. Cancelling the awaiting task ends the generation."""
        pieces = self.generate(request)
        try:
            async for item in pieces:
                if isinstance(item, Answer):
                    return item
        finally:
            await pieces.aclose()  # type: ignore[attr-defined]
        raise NotReady("The engine gave no answer.")

    async def train(
        self,
        batch: TrainBatch,
        report: Callable[[Progress], None],
        cancelled: threading.Event,
        plan: "Plan | None" = None,
    ) -> TrainResult:
        """Train `batch` to its end, measuring what `plan` says.

        Raises `RadianceError`; `NotReady` if the service stops meanwhile.
        """

        def tell(progress: Progress) -> None:
            self._send(report, progress)
            self._flush()  # with slice_ms 0 nothing else would, until the end
            self._beat = time.monotonic()
            if self._stopping.is_set() and self._config.training.slice_ms == 0:
                raise NotReady("The service is stopping.")  # mlx-lm's loop would go on to its last step

        return await self._background(lambda engine, done: engine.train(batch, tell, cancelled, done, plan), cancelled)

    async def measure(
        self,
        anchors: "AnchorSet",
        subjects: "tuple[Subject, ...]",
        report: Callable[[int, int], None],
        cancelled: threading.Event,
    ) -> "Measurements":
        """Measure adapters on anchors, after what is trained or measured now. Raises `RadianceError`.

        Cancelling the awaiting task ends it.
        """

        def tell(finished: int, of: int) -> None:
            self._send(report, finished, of)

        return await self._background(
            lambda engine, done: engine.measure(anchors, subjects, tell, cancelled, done), cancelled
        )

    async def _background(
        self, begin: "Callable[[Engine, Callable[[Any], None]], None]", cancelled: threading.Event
    ) -> Any:
        """One at a time: `begin` is handed the engine and who hears of the end."""
        async with self._turn(cancelled):
            self._require()
            reply: asyncio.Future[Any] = self._loop.create_future()
            self._pending.add(reply)
            reply.add_done_callback(self._pending.discard)

            def done(outcome: Any) -> None:
                failed = isinstance(outcome, RadianceError)
                self._send(_resolve, reply, None if failed else outcome, outcome if failed else None)

            self._post(lambda engine: begin(engine, done), done)
            try:
                return await asyncio.shield(reply)
            except asyncio.CancelledError:  # the engine must be free before the next one has its turn
                cancelled.set()
                await asyncio.wait({reply})
                if not reply.cancelled():
                    reply.exception()  # looked at, or asyncio logs it as never retrieved
                raise

    @contextlib.asynccontextmanager
    async def _turn(self, cancelled: threading.Event) -> AsyncIterator[None]:
        """Inside, nothing else is in the background. Raises `Cancelled` if that is wished before it has come so far."""
        turn = asyncio.ensure_future(self._in_background.acquire())
        try:
            while not turn.done():
                await asyncio.wait({turn}, timeout=WISH_S)
                if not turn.done() and cancelled.is_set():
                    raise Cancelled("It was cancelled before it had begun.")
            yield
        finally:
            if not turn.cancel():
                self._in_background.release()

    def _post(self, task: "Callable[[Engine], None]", refused: Callable[[RadianceError], None]) -> None:
        """Have `task` run on the engine's thread; `refused` hears what it raises, a bug without its text."""

        def run(engine: "Engine") -> None:
            try:
                task(engine)
            except RadianceError as error:
                refused(error)
            except Exception as error:
                log.exception("the engine failed in a task")
                refused(InternalError.of(error))

        self._inbox.put(run)

    def _require(self) -> None:
        if not self._alive:
            raise NotReady("The model is still loading, or the service is stopping.", "Try again in a moment.")

    def _sink(self, pieces: "asyncio.Queue[Any]") -> Callable[[Any], None]:
        return lambda item: self._send(pieces.put_nowait, item)

    # --- the engine's thread ---------------------------------------------------------------------

    def _send(self, function: Callable[..., Any], *args: Any) -> None:
        self._outbox.append(lambda: function(*args))

    def _flush(self) -> None:
        if not self._outbox:
            return
        batch, self._outbox = self._outbox, []
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_run_all, batch)

    def _main(self) -> None:
        try:
            self._run()
        except BaseException as error:
            self._loop.call_soon_threadsafe(self._die, error)
        finally:
            _release_streams()

    def _run(self) -> None:
        from .core import Engine

        try:
            engine = Engine(self._config, self._home)
        except RadianceError as error:
            self._loop.call_soon_threadsafe(_resolve, self._started, None, error)
            return
        self._beat = time.monotonic()
        self.status = engine.status()
        self._loop.call_soon_threadsafe(self._live, engine.facts, engine.prompt_encoder())
        busy, told, together = False, self._beat, 0
        while not self._stopping.is_set():
            self._beat = time.monotonic()
            self._drain(engine, block=not busy, gather_s=GATHER_MORE_S if together > 1 else GATHER_S)
            together = max(engine.requests, together if busy or not engine.requests else 0)
            busy = engine.step()
            self._flush()
            if not busy or self._beat - told >= STATUS_S:
                told = self._beat
                try:
                    self.status = engine.status()
                except Exception:  # numbers for /info: nothing may end by them
                    log.exception("the engine's status could not be read")
        engine.stop()
        self._flush()
        self._loop.call_soon_threadsafe(self._die, None)

    def _drain(self, engine: "Engine", *, block: bool, gather_s: float) -> None:
        """Run the tasks that wait; with `block`, wait for one (a second at most: the beat goes on).

        After a pause, wait `gather_s` longer for what comes with the first: requests that are prefilled together
        share all their steps, and one that comes a step later costs two passes over the weights.
        """
        try:
            task = self._inbox.get(block, 1.0) if block else self._inbox.get_nowait()
            while True:
                if task is not None:
                    task(engine)
                task = self._inbox.get(block, gather_s) if block else self._inbox.get_nowait()
        except queue.Empty:
            return

    # --- back on the loop ------------------------------------------------------------------------

    def _live(self, facts: EngineFacts, encoder: "ChatEncoder") -> None:
        self._encoder, self._context = encoder, facts.context
        self._alive = True
        _resolve(self._started, facts, None)

    def _die(self, error: BaseException | None) -> None:
        self._alive = False
        for reply in list(self._pending):
            _resolve(reply, None, NotReady("The service is stopping."))
        for pieces in self._open:
            pieces.put_nowait(NotReady("The service is stopping.", "Ask again when it is back."))
        if error is not None:
            log.error("the engine's thread has ended", exc_info=error)
            _resolve(self._started, None, NotReady(f"The engine could not start: {error}"))
            self._on_death(error)


def _resolve(reply: "asyncio.Future[Any]", value: Any, error: BaseException | None) -> None:
    if reply.done():
        return
    if error is not None:
        reply.set_exception(error)
    else:
        reply.set_result(value)


def _run_all(batch: list[Callable[[], None]]) -> None:
    for callback in batch:
        callback()


def _release_streams() -> None:
    """MLX's streams belong to threads: one that ends with its streams open aborts the process at exit."""
    import mlx.core as mx

    from ..lora.halves import forget

    forget()
    mx.clear_streams()
