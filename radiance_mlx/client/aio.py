"""The client for asyncio: `sync` in other words. What they do is in `operations`."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import httpx

from ..errors import RadianceError
from . import results
from .connecting import CONNECT_TIMEOUT_S, TIMEOUT_S, require, settings
from .operations import Call, OnProgress, Operations, Prompt, Steps
from .retrying import RETRY, Retry
from .wire import EventReader, Json, fault_of

T = TypeVar("T")


class AsyncClient:
    """As `Client`, for asyncio; safe to share between the tasks of one event loop. Use it with `async with`.

    async with AsyncClient() as client:
        await client.update([{"input": "Where is my key?", "output": "Under the mat."}], wait=True)
        print(await client.search("Where is my key?"))
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = TIMEOUT_S,
        retry: Retry = RETRY,
        home: str | Path | None = None,
        config_file: str | Path | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        require(retry, sleep)
        self.base_url, self._hint, arguments = settings(base_url, api_key, timeout, home, config_file)
        self._sleep = sleep
        self._operations = Operations(self.base_url, self._hint, retry)
        self._http = httpx.AsyncClient(**arguments)

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    # --- asking --------------------------------------------------------------------------------------

    async def search(self, prompt: Prompt, **options: Any) -> results.SearchResult:
        """The whole answer. `prompt` is text, or chat messages; `options` are the fields of POST /search."""
        return await self._run(self._operations.search(prompt, options))

    def search_stream(self, prompt: Prompt, **options: Any) -> "AsyncSearchStream":
        """The answer as it comes: pieces of text, and in the end `result`. Closing it ends the generation.

        It is asked for when the stream is entered, or read from.
        """
        return AsyncSearchStream(lambda: self._run(self._operations.stream(prompt, options)), self.base_url, self._hint)

    # --- teaching ------------------------------------------------------------------------------------

    async def update(
        self,
        examples: Iterable[Mapping[str, Any]],
        tags: Iterable[str] = (),
        *,
        wait: bool | float = False,
        idempotency_key: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> results.UpdateResult:
        """Hand in examples to learn; returns when they are safely stored, with `wait` when their job has ended.

        Rows of any form that the service knows (docs/data.md). A number for `wait` is seconds, after which
        `RequestTimeout` is raised; the job goes on. An ended job need not be published: `result.job` tells. Without an
        `idempotency_key` one is made up, so that an update that is sent again is learnt once.
        """
        return await self._run(self._operations.update(examples, tags, idempotency_key, wait, on_progress))

    async def wait(
        self, job_id: str, on_progress: OnProgress | None = None, *, timeout: float | None = None
    ) -> results.Job:
        """The job when it has ended, whatever its end; `on_progress` sees it at every look before that."""
        return await self._run(self._operations.wait(job_id, on_progress, timeout_s=timeout))

    # --- looking and steering ------------------------------------------------------------------------

    async def info(self) -> results.Info:
        """Status, loss curves, forgetting, hardware, configuration."""
        return await self._run(self._operations.info())

    async def jobs(self, state: str | None = None, limit: int | None = None, before: int | None = None) -> results.Jobs:
        """A page of jobs, newest first; `next` of it is the `before` of the next page."""
        return await self._run(self._operations.jobs(state, limit, before))

    async def job(self, job_id: str) -> results.Job:
        """Raises `NotFound`."""
        return await self._run(self._operations.job(job_id))

    async def cancel(self, job_id: str) -> results.Job:
        """Cancel; a job in training comes back in the state of that moment and ends a little later."""
        return await self._run(self._operations.cancel(job_id))

    async def checkpoints(self) -> results.Checkpoints:
        """The lineage, oldest first."""
        return await self._run(self._operations.checkpoints())

    async def checkpoint(self, checkpoint_id: str) -> results.Checkpoint:
        """Raises `NotFound`."""
        return await self._run(self._operations.checkpoint(checkpoint_id))

    async def rollback(self, to: str | None = None, reason: str = "") -> results.RollbackResult:
        """Serve `to` from now on: a checkpoint, "base", or None for the parent of the current one."""
        return await self._run(self._operations.rollback(to, reason))

    async def events(
        self, kind: str | None = None, limit: int | None = None, before: int | None = None
    ) -> results.Events:
        """A page of what happened, newest first: published, rejected, rollback, failed and the like, each with why.

        `kind` asks for one of them; "progress" comes only when it is asked for. `next` of it is the `before` of the
        next page.
        """
        return await self._run(self._operations.events(kind, limit, before))

    async def evaluate(
        self,
        checkpoints: Sequence[str] | None = None,
        against: str | None = None,
        on_progress: Callable[[int, int], None] = lambda done, of: None,
        **anchors: Any,
    ) -> results.Evaluation:
        """Measure checkpoints (None: all) on anchors; `anchors` are the `anchor_…` fields of POST /eval."""
        last: Json = {}
        asked = partial(self._run, self._operations.evaluate(checkpoints, against, anchors))
        async with AsyncEventStream(asked, self.base_url, self._hint) as stream:
            async for event in stream.events():
                if "of" in event:
                    on_progress(event["done"], event["of"])
                last = event
        return results.Evaluation.of(last)

    async def is_ready(self) -> bool:
        """Whether a search can be answered now; False also when nothing answers."""
        try:
            return (await self._http.get("/readyz", timeout=CONNECT_TIMEOUT_S)).status_code == 200
        except httpx.HTTPError:
            return False

    # --- the way there -------------------------------------------------------------------------------

    async def _run(self, steps: Steps[T]) -> T:
        """Do what `steps` yields until it returns."""
        try:
            step = next(steps)
            while True:
                try:
                    done = await self._do(step)
                except httpx.HTTPError as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(done)
        except StopIteration as end:
            value: T = end.value
            return value

    async def _do(self, step: Call | float) -> httpx.Response | None:
        if not isinstance(step, Call):
            await self._sleep(step)
            return None
        request = self._http.build_request(step.method, step.path, **step.arguments())
        response = await self._http.send(request, stream=step.stream)
        if step.stream and response.status_code >= 400:
            try:
                await response.aread()
            finally:
                await response.aclose()
        return response


class AsyncEventStream:
    """Events of one response, which `opening` gets. Ended by reading to the end or by `close`; the service notices."""

    def __init__(self, opening: Callable[[], Awaitable[httpx.Response]], url: str, hint: str) -> None:
        self._opening, self._url, self._hint = opening, url, hint
        self._response: httpx.Response | None = None
        self._reader = EventReader()
        self._events = self._read()

    def events(self) -> AsyncIterator[Json]:
        """What the service sends, event by event. Raises `RadianceError`."""
        return self._events

    async def _open(self) -> httpx.Response:
        if self._response is None:
            self._response = await self._opening()
        return self._response

    async def _read(self) -> AsyncIterator[Json]:
        response = await self._open()
        try:
            async for chunk in response.aiter_bytes():
                for event in self._reader.feed(chunk):
                    yield event
                if self._reader.done:
                    return
            self._reader.finish()
        except httpx.HTTPError as error:
            raise fault_of(error, self._url, self._hint) from error
        finally:
            await response.aclose()

    async def close(self) -> None:
        """Stop reading; what is still being generated ends."""
        if self._response is not None:
            await self._response.aclose()

    async def __aenter__(self) -> "AsyncEventStream":
        await self._open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class AsyncSearchStream(AsyncEventStream):
    """A streamed answer: iterate over its pieces of text, then look at `result`.

        async with client.search_stream("Where is my key?") as stream:
            async for piece in stream:
                print(piece, end="")
        print(stream.result.checkpoint)

    `events()` gives everything as it comes, also what the model thinks before it answers (`{"reasoning": …}`).
    """

    def __init__(self, opening: Callable[[], Awaitable[httpx.Response]], url: str, hint: str) -> None:
        super().__init__(opening, url, hint)
        self._result: results.SearchResult | None = None

    async def __aenter__(self) -> "AsyncSearchStream":
        await self._open()
        return self

    async def __aiter__(self) -> AsyncIterator[str]:
        async for event in self._events:
            if "response" not in event and event.get("text"):
                yield event["text"]

    async def _read(self) -> AsyncIterator[Json]:
        async for event in super()._read():
            if "response" in event:
                self._result = results.SearchResult.of(event)
            yield event

    @property
    def result(self) -> results.SearchResult:
        """The whole answer, once the stream has ended. Raises `RadianceError` before."""
        if self._result is None:
            raise RadianceError("The answer is not complete.", "Read the stream to its end first.")
        return self._result
