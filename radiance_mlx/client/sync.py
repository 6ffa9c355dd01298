"""The blocking client."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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


class Client:
    """Speaks to a running service; safe to share between threads. Use it as a context manager.

        with Client() as client:
            client.update([{"input": "Where is my key?", "output": "Under the mat."}], wait=True)
            print(client.search("Where is my key?"))

    `base_url` is RADIANCE_URL if not given, else what runs on the home, else the configured address; `api_key` is the
    service's token: RADIANCE_SERVER__TOKEN, or for this machine the configuration's. `timeout` bounds the wait for each
    part of an answer, in seconds. Calls that failed are made again as `retry` says, where that does no harm. Every
    fault is a `RadianceError` with `status`, `code`, `message`, and in `hint` what to do.
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
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        require(retry, sleep)
        self.base_url, self._hint, arguments = settings(base_url, api_key, timeout, home, config_file)
        self._sleep = sleep
        self._operations = Operations(self.base_url, self._hint, retry)
        self._http = httpx.Client(**arguments)

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    # --- asking --------------------------------------------------------------------------------------

    def search(self, prompt: Prompt, **options: Any) -> results.SearchResult:
        """The whole answer. `prompt` is text, or chat messages; `options` are the fields of POST /search."""
        return self._run(self._operations.search(prompt, options))

    def search_stream(self, prompt: Prompt, **options: Any) -> "SearchStream":
        """The answer as it comes: pieces of text, and in the end `result`. Closing it ends the generation."""
        return SearchStream(self._run(self._operations.stream(prompt, options)), self.base_url, self._hint)

    # --- teaching ------------------------------------------------------------------------------------

    def update(
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
        return self._run(self._operations.update(examples, tags, idempotency_key, wait, on_progress))

    def wait(self, job_id: str, on_progress: OnProgress | None = None, *, timeout: float | None = None) -> results.Job:
        """The job when it has ended, whatever its end; `on_progress` sees it at every look before that."""
        return self._run(self._operations.wait(job_id, on_progress, timeout_s=timeout))

    # --- looking and steering ------------------------------------------------------------------------

    def info(self) -> results.Info:
        """Status, loss curves, forgetting, hardware, configuration."""
        return self._run(self._operations.info())

    def jobs(self, state: str | None = None, limit: int | None = None, before: int | None = None) -> results.Jobs:
        """A page of jobs, newest first; `next` of it is the `before` of the next page."""
        return self._run(self._operations.jobs(state, limit, before))

    def job(self, job_id: str) -> results.Job:
        """Raises `NotFound`."""
        return self._run(self._operations.job(job_id))

    def cancel(self, job_id: str) -> results.Job:
        """Cancel; a job in training comes back in the state of that moment and ends a little later."""
        return self._run(self._operations.cancel(job_id))

    def checkpoints(self) -> results.Checkpoints:
        """The lineage, oldest first."""
        return self._run(self._operations.checkpoints())

    def checkpoint(self, checkpoint_id: str) -> results.Checkpoint:
        """Raises `NotFound`."""
        return self._run(self._operations.checkpoint(checkpoint_id))

    def rollback(self, to: str | None = None, reason: str = "") -> results.RollbackResult:
        """Serve `to` from now on: a checkpoint, "base", or None for the parent of the current one."""
        return self._run(self._operations.rollback(to, reason))

    def events(self, kind: str | None = None, limit: int | None = None, before: int | None = None) -> results.Events:
        """A page of what happened, newest first: published, rejected, rollback, failed and the like, each with why.

        `kind` asks for one of them; "progress" comes only when it is asked for. `next` of it is the `before` of the
        next page.
        """
        return self._run(self._operations.events(kind, limit, before))

    def evaluate(
        self,
        checkpoints: Sequence[str] | None = None,
        against: str | None = None,
        on_progress: Callable[[int, int], None] = lambda done, of: None,
        **anchors: Any,
    ) -> results.Evaluation:
        """Measure checkpoints (None: all) on anchors; `anchors` are the `anchor_…` fields of POST /eval."""
        response = self._run(self._operations.evaluate(checkpoints, against, anchors))
        last: Json = {}
        with EventStream(response, self.base_url, self._hint) as stream:
            for event in stream.events():
                if "of" in event:
                    on_progress(event["done"], event["of"])
                last = event
        return results.Evaluation.of(last)

    def is_ready(self) -> bool:
        """Whether a search can be answered now; False also when nothing answers."""
        try:
            return self._http.get("/readyz", timeout=CONNECT_TIMEOUT_S).status_code == 200
        except httpx.HTTPError:
            return False

    # --- the way there -------------------------------------------------------------------------------

    def _run(self, steps: Steps[T]) -> T:
        """Do what `steps` yields until it returns."""
        try:
            step = next(steps)
            while True:
                try:
                    done = self._do(step)
                except httpx.HTTPError as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(done)
        except StopIteration as end:
            value: T = end.value
            return value

    def _do(self, step: Call | float) -> httpx.Response | None:
        if not isinstance(step, Call):
            self._sleep(step)
            return None
        request = self._http.build_request(step.method, step.path, **step.arguments())
        response = self._http.send(request, stream=step.stream)
        if step.stream and response.status_code >= 400:
            try:
                response.read()
            finally:
                response.close()
        return response


class EventStream:
    """Events of one response. Ended by reading to the end or by `close`, which the service notices."""

    def __init__(self, response: httpx.Response, url: str, hint: str) -> None:
        self._response, self._url, self._hint = response, url, hint
        self._reader = EventReader()
        self._events = self._read()

    def events(self) -> Iterator[Json]:
        """What the service sends, event by event. Raises `RadianceError`."""
        return self._events

    def _read(self) -> Iterator[Json]:
        try:
            for chunk in self._response.iter_bytes():
                yield from self._reader.feed(chunk)
                if self._reader.done:
                    return
            self._reader.finish()
        except httpx.HTTPError as error:
            raise fault_of(error, self._url, self._hint) from error
        finally:
            self._response.close()

    def close(self) -> None:
        """Stop reading; what is still being generated ends."""
        self._response.close()

    def __enter__(self) -> "EventStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class SearchStream(EventStream):
    """A streamed answer: iterate over its pieces of text, then look at `result`.

        with client.search_stream("Where is my key?") as stream:
            for piece in stream:
                print(piece, end="")
        print(stream.result.checkpoint)

    `events()` gives everything as it comes, also what the model thinks before it answers (`{"reasoning": …}`).
    """

    def __init__(self, response: httpx.Response, url: str, hint: str) -> None:
        super().__init__(response, url, hint)
        self._result: results.SearchResult | None = None

    def __enter__(self) -> "SearchStream":
        return self

    def __iter__(self) -> Iterator[str]:
        for event in self._events:
            if "response" not in event and event.get("text"):
                yield event["text"]

    def _read(self) -> Iterator[Json]:
        for event in super()._read():
            if "response" in event:
                self._result = results.SearchResult.of(event)
            yield event

    @property
    def result(self) -> results.SearchResult:
        """The whole answer, once the stream has ended. Raises `RadianceError` before."""
        if self._result is None:
            raise RadianceError("The answer is not complete.", "Read the stream to its end first.")
        return self._result
