"""The store as a whole: whatever is called in whatever order, it holds what the calls before have said."""

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from stores import BASE, Clock, accept, record

from radiance_mlx.errors import Conflict
from radiance_mlx.store import Store
from radiance_mlx.store.jobs import TRANSITIONS


class AnyOrder(RuleBasedStateMachine):
    """Calls in any order, with restarts between: the store agrees with a model of a few lines."""

    @initialize()
    def start(self) -> None:
        self.home = Path(tempfile.mkdtemp())
        self.clock = Clock()
        self.store = Store(self.home, self.clock)
        self.states: dict[str, str] = {}
        self.given: list[str] = []
        self.lineage: list[str] = []

    def teardown(self) -> None:
        if hasattr(self, "home"):
            self.store.close()
            shutil.rmtree(self.home)

    def those_in(self, *states: str) -> list[str]:
        return [job_id for job_id, state in self.states.items() if state in states]

    @rule(state=st.sampled_from(["queued", "review"]))
    def accept(self, state: str) -> None:
        self.states[accept(self.store, state=state).job_id] = state

    @precondition(lambda self: self.states)
    @rule(data=st.data(), wanted=st.sampled_from(sorted(TRANSITIONS)))
    def set_state(self, data: st.DataObject, wanted: str) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.states)))
        if wanted in TRANSITIONS[self.states[job_id]]:
            self.store.set_state([job_id], wanted)
            self.states[job_id] = wanted
        else:
            with pytest.raises(Conflict):
                self.store.set_state([job_id], wanted)

    @precondition(lambda self: self.those_in("queued"))
    @rule()
    def start_batch(self) -> None:
        ids = self.those_in("queued")
        checkpoint = self.store.start_batch(ids, BASE)
        assert checkpoint not in self.given
        self.given.append(checkpoint)
        self.states |= dict.fromkeys(ids, "training")

    @precondition(lambda self: self.those_in("training", "evaluating"))
    @rule(end=st.sampled_from(["publish", "retry", "requeue"]))
    def go_on(self, end: str) -> None:
        checkpoint, jobs = self.store.interrupted()[0]
        ids = tuple(job.job_id for job in jobs)
        if end == "publish":
            self.store.publish(record(checkpoint, self.store.stable(BASE), ids), events=[])
            self.lineage.append(checkpoint)
            self.states |= dict.fromkeys(ids, "published")
        elif end == "retry":
            self.store.retry_batch(checkpoint, ids)
            self.states |= dict.fromkeys(ids, "training")
        else:
            self.store.requeue(ids)
            self.states |= dict.fromkeys(ids, "queued")

    @precondition(lambda self: self.lineage)
    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        self.lineage = self.lineage[: data.draw(st.integers(0, len(self.lineage)))]
        self.store.move_stable(BASE, self.lineage[-1] if self.lineage else None, "why")

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.clock.now += 86_400
        self.store = Store(self.home, self.clock)

    @invariant()
    def agrees(self) -> None:
        assert {job.job_id: job.state for job in self.store.jobs()} == self.states
        assert [job.job_id for job in self.store.queued()] == self.those_in("queued")
        found = [job.job_id for _, jobs in self.store.interrupted() for job in jobs]
        assert sorted(found) == self.those_in("training", "evaluating")
        chain = self.store.lineage(BASE, self.store.stable(BASE))
        assert [one.checkpoint for one in reversed(chain)] == self.lineage
        trained = [job_id for one in self.store.checkpoints() for job_id in one.jobs]
        assert sorted(trained) == self.those_in("published")


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(
    max_examples=15,
    stateful_step_count=20,
    deadline=None,  # syncing takes as long as the disk takes
    suppress_health_check=[HealthCheck.too_slow],
)
