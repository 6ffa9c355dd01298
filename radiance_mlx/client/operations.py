"""Every operation once, for both clients: which calls it makes, when again, and what becomes of the answers.

An operation is a generator. It yields what is to be done (a `Call`, or a number of seconds to wait) and is sent the
answer to a call; a client does these things in its own way, blocking or not.
"""

import random
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import httpx

from ..errors import NotReady, RadianceError, RequestTimeout, ServiceUnreachable
from . import arguments, results
from .retrying import BUSY_STATUS, NO_RETRY, Retry, passes, retry_after
from .wire import Json, error_of, fault_of, json_body, object_of, raise_for, search_body, segment, utf8

T = TypeVar("T")
Prompt = str | Sequence[Mapping[str, Any]]
OnProgress = Callable[[results.Job], None]


@dataclass(frozen=True)
class Call:
    """One request. What is `repeatable` does no harm twice; `keyed` is what counts once; a `stream` is not read."""

    method: str
    path: str
    content: bytes | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[bytes, bytes] = field(default_factory=dict)
    repeatable: bool = True
    keyed: bool = False
    stream: bool = False

    def arguments(self) -> dict[str, Any]:
        """For httpx."""
        headers = {**self.headers, **({b"Content-Type": b"application/json"} if self.content is not None else {})}
        return {"content": self.content, "params": dict(self.params) or None, "headers": headers}


Steps = Generator[Call | float, Any, T]


class Operations:
    """Of the service at `url`; `hint` says what to do if nobody is there."""

    def __init__(
        self,
        url: str,
        hint: str,
        retry: Retry,
        draw: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.url, self.hint = url, hint
        self._retry, self._draw, self._clock = retry, draw, clock

    # --- one call, again if need be ------------------------------------------------------------------

    def answered(self, call: Call, retry: Retry | None = None) -> Steps[httpx.Response]:
        """The answer, if it is none of an error. Raises `RadianceError`."""
        policy = retry or self._retry
        attempt = 1
        while True:
            after_s: float | None = None
            try:
                response: httpx.Response = yield call
            except httpx.HTTPError as error:
                again = policy.may_follow(error, attempt, repeatable=call.repeatable, keyed=call.keyed)
                fault = fault_of(error, self.url, self.hint)
                fault.__cause__ = error
            else:
                if response.status_code not in BUSY_STATUS:
                    raise_for(response)
                    return response
                fault = error_of(response)
                again, after_s = passes(fault), retry_after(response)
            wait_s = policy.wait_s(attempt, after_s, self._draw) if again else None
            if wait_s is None:
                raise fault
            yield wait_s
            attempt += 1

    def _got(self, path: str, **params: Any) -> Steps[Json]:
        given = {name: value for name, value in params.items() if value is not None}
        return object_of((yield from self.answered(Call("GET", path, params=given))))

    # --- asking --------------------------------------------------------------------------------------

    def search(self, prompt: Prompt, options: Mapping[str, Any]) -> Steps[results.SearchResult]:
        call = Call("POST", "/search", json_body(search_body(prompt, options)))
        return results.SearchResult.of(object_of((yield from self.answered(call))))

    def stream(self, prompt: Prompt, options: Mapping[str, Any]) -> Steps[httpx.Response]:
        """The response whose events are the answer."""
        body = {**search_body(prompt, {**options, "stream": None}), "stream": True}
        return (yield from self.answered(Call("POST", "/search", json_body(body), stream=True)))

    # --- teaching ------------------------------------------------------------------------------------

    def update(
        self,
        examples: Iterable[Mapping[str, Any]],
        tags: Iterable[str],
        key: str | None,
        wait: bool | float,
        on_progress: OnProgress | None,
    ) -> Steps[results.UpdateResult]:
        """However often it is sent, the key makes one job of it."""
        key = uuid.uuid4().hex if key is None else arguments.text("idempotency_key", key)
        headers = {b"Idempotency-Key": utf8(key, "idempotency key").encode()}
        rows = arguments.mappings("examples", examples, arguments.ROWS)
        body = json_body({"examples": rows, "tags": arguments.listed("tags", tags, "a list of texts")})
        timeout_s = None if isinstance(wait, bool) else arguments.seconds("wait", wait, "True, False")
        arguments.called("on_progress", on_progress)
        call = Call("POST", "/update", body, headers=headers, keyed=True)
        accepted = results.UpdateResult.of(object_of((yield from self.answered(call))), key)
        if wait is False:
            return accepted
        try:
            job = yield from self.wait(accepted.job_id, on_progress, timeout_s=timeout_s)
        except RadianceError as error:
            error.details = {"job_id": accepted.job_id, "idempotency_key": key}
            error.hint = f"{error.hint} The update was accepted as {accepted.job_id}; wait for that.".strip()
            raise
        return replace(accepted, job=job)

    def wait(
        self,
        job_id: str,
        on_progress: OnProgress | None = None,
        *,
        poll_s: float = 0.2,
        patience_s: float = 15.0,
        timeout_s: float | None = None,
    ) -> Steps[results.Job]:
        """The job when it has ended; a service that does not answer for less than `patience_s` is waited for."""
        call = Call("GET", f"/jobs/{segment(job_id)}")
        timeout_s = None if timeout_s is None else arguments.seconds("timeout", timeout_s, "None")
        arguments.called("on_progress", on_progress)
        started, silent_since = self._clock(), None
        while True:
            try:
                job = results.Job.of(object_of((yield from self.answered(call, NO_RETRY))))
            except (ServiceUnreachable, NotReady):
                silent_since = silent_since or self._clock()
                if self._clock() - silent_since > patience_s:
                    raise
            else:
                silent_since = None
                if job.ended:
                    return job
                if on_progress:
                    on_progress(job)
            if timeout_s is not None and self._clock() - started >= timeout_s:
                raise RequestTimeout(
                    f"{job_id} has not ended within {timeout_s:g} s.", "It goes on by itself.", {"job_id": job_id}
                )
            yield poll_s

    # --- looking and steering ------------------------------------------------------------------------

    def info(self) -> Steps[results.Info]:
        return results.Info.of((yield from self._got("/info")))

    def jobs(self, state: str | None, limit: int | None, before: int | None) -> Steps[results.Jobs]:
        wanted = None if state is None else utf8(state, "state")
        return results.Jobs.of((yield from self._got("/jobs", state=wanted, limit=limit, before=before)))

    def job(self, job_id: str) -> Steps[results.Job]:
        return results.Job.of((yield from self._got(f"/jobs/{segment(job_id)}")))

    def cancel(self, job_id: str) -> Steps[results.Job]:
        call = Call("DELETE", f"/jobs/{segment(job_id)}", repeatable=False)
        return results.Job.of(object_of((yield from self.answered(call))))

    def checkpoints(self) -> Steps[results.Checkpoints]:
        return results.Checkpoints.of((yield from self._got("/checkpoints")))

    def checkpoint(self, checkpoint_id: str) -> Steps[results.Checkpoint]:
        return results.Checkpoint.of((yield from self._got(f"/checkpoints/{segment(checkpoint_id)}")))

    def rollback(self, to: str | None, reason: str) -> Steps[results.RollbackResult]:
        """To the parent is not repeated: the second time it would go to the parent's parent."""
        call = Call("POST", "/rollback", json_body({"to": to, "reason": reason}), repeatable=to is not None)
        return results.RollbackResult.of(object_of((yield from self.answered(call))))

    def events(self, kind: str | None, limit: int | None, before: int | None) -> Steps[results.Events]:
        wanted = None if kind is None else utf8(kind, "kind")
        return results.Events.of((yield from self._got("/events", kind=wanted, limit=limit, before=before)))

    def evaluate(
        self, checkpoints: Sequence[str] | None, against: str | None, anchors: Mapping[str, Any]
    ) -> Steps[httpx.Response]:
        """The response whose events tell how far it is, and at last what was measured."""
        takes = "a list of checkpoints, or None for all"
        listed = None if checkpoints is None else arguments.listed("checkpoints", checkpoints, takes)
        body = json_body({"checkpoints": listed, "against": against, **anchors, "stream": True})
        return (yield from self.answered(Call("POST", "/eval", body, repeatable=False, stream=True)))
