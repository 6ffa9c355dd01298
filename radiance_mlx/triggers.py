"""When waiting jobs train, and which together; when the whole log does. Pure: facts and the time in, a decision out."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol


class Waiting(Protocol):
    """What is asked of a queued job."""

    @property
    def job_id(self) -> str: ...
    @property
    def created(self) -> float: ...
    @property
    def example_count(self) -> int: ...


@dataclass(frozen=True)
class Decision:
    """`jobs` to train now as one batch, or how many seconds until age alone decides (None: no job waits)."""

    jobs: tuple[str, ...] = ()
    wait_s: float | None = None


def decide(
    queued: Sequence[Waiting],
    mode: Literal["immediate", "batched"],
    *,
    max_examples: int,
    max_age_s: float,
    now: float,
    alone: Collection[str] = (),
    own: Collection[str] = (),
    due: Collection[str] = (),
) -> Decision:
    """`immediate`: the oldest job by itself. `batched`: all jobs, once examples or age suffice.

    `queued` is oldest first. Jobs in `alone` failed in company, those in `own` have terms of their own: each is a
    batch of its own, at once. Jobs in `due` were in training already, and their batch was given up: all jobs that
    wait train with them now.
    """
    if not queued:
        return Decision()
    by_itself = next((job.job_id for job in queued if job.job_id in alone), None)
    if by_itself is not None:
        return Decision((by_itself,))
    if mode == "immediate":
        return Decision((queued[0].job_id,))
    by_itself = next((job.job_id for job in queued if job.job_id in own), None)
    if by_itself is not None:
        return Decision((by_itself,))
    enough = sum(job.example_count for job in queued) >= max_examples
    age = now - min(job.created for job in queued)
    begun = any(job.job_id in due for job in queued)
    if enough or begun or age >= max_age_s:
        return Decision(tuple(job.job_id for job in queued))
    return Decision(wait_s=max_age_s - age)


def reconsolidation_due(
    *,
    learnt: int,
    after_updates: int,
    done: bool,
    last_accepted: float,
    idle_s: float,
    now: float,
) -> float | None:
    """Seconds until the whole log is to be trained anew, when nothing is queued: 0 is now, None not as things are.

    `learnt` checkpoints have been published in the stable line since the last time; `done`: that was tried, with
    whatever end, and nothing new has been learnt since. The last update was accepted at `last_accepted`.
    """
    if done or learnt < after_updates:
        return None
    return max(0.0, last_accepted + idle_s - now)
