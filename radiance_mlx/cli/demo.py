"""`demo`: the whole promise in less than a minute, with the embedded model and a real service.

Ask about two people that the model cannot know, tell it, watch it train, ask again, and see what that did
to what it knew before.
"""

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import RadianceError, TrainingFailed
from . import output
from .options import AsJson, examples

if TYPE_CHECKING:
    from ..client import Client
    from .demo_questions import Fact, Probe
    from .demo_show import Show

EXAMPLES = examples("% demo", '% demo --name "Your Name"', "% demo --json | jq .ok", "% demo --keep")
ASK = {"temperature": 0, "max_tokens": 24}
AT_ONCE = 8  # questions
MEANWHILE_PAUSE_S = 0.4


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(epilog=EXAMPLES)(demo)


def demo(
    name: Annotated[
        str, typer.Option(help="Somebody of your own to teach it about.", metavar="TEXT")
    ] = "Zelmira Okonjo",
    keep: Annotated[bool, typer.Option("--keep", help="Keep the demo's home folder.")] = False,
    as_json: AsJson = False,
) -> int:
    """Watch a small model learn about two people: offline, on any machine, in less than a minute.

    Starts a service of its own in a temporary folder and stops it at the end. The exit code is 0 only if
    the model learnt what it was told.
    """
    from .demo_questions import facts_about
    from .demo_show import Show

    facts = facts_about(name)
    show = Show(quiet=as_json)
    _stop_like_ctrl_c()
    result = _play(facts, show, keep)
    if as_json:
        output.print_json(result)
    return output.OK if result["ok"] else output.FAILED


def _stop_like_ctrl_c() -> None:
    """SIGTERM ends the demo as Ctrl-C does: the service is stopped first."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, interrupt)


def _play(facts: "list[Fact]", show: "Show", keep: bool) -> dict[str, Any]:
    """The story from beginning to end; what it found, as plain JSON data."""
    from .demo_service import demo_service

    began = time.monotonic()
    show.opening()
    with show.waiting("starting the service …"):
        service = demo_service(keep)
        client, home = service.__enter__()
    try:
        result = _story(client, facts, show)
    finally:
        with show.waiting("stopping the service …"):
            service.__exit__(None, None, None)
    result["seconds"] = round(time.monotonic() - began, 1)
    result["home"] = str(home) if keep else None
    show.closing(result, home if keep else None)
    return result


def _story(client: "Client", facts: "list[Fact]", show: "Show") -> dict[str, Any]:
    from .demo_questions import known_probes, stranger_probes

    info = client.info()
    show.service(info.raw, client.base_url)
    probes, strangers = known_probes(), stranger_probes({fact.name for fact in facts})
    before = ask_all(client, [fact.question(0) for fact in facts])
    show.before(facts, before)
    known_before, refused_before = score(client, probes), score(client, strangers)
    lesson = teach(client, facts, show)
    wordings = [(fact, wording) for wording in (0, 1) for fact in facts]
    after = ask_all(client, [fact.question(wording) for fact, wording in wordings])
    learnt = [
        Learnt(fact.question(wording), wording, fact.answer, answer)
        for (fact, wording), answer in zip(wordings, after, strict=True)
    ]
    show.after(learnt)
    effects = {
        "known_before": known_before,
        "known_after": score(client, probes),
        "strangers_refused_before": refused_before,
        "strangers_refused_after": score(client, strangers),
        "forgetting_summary": client.info().forgetting_summary,
    }
    show.effects(effects)
    return {
        "ok": all(item.right for item in learnt),
        "checkpoint": lesson["checkpoint"],
        "checkpoint_status": lesson["checkpoint_status"],
        "base_model": info.base_model,
        "hardware": info.hardware,
        "learnt": [item.as_dict() for item in learnt],
        "before": dict(zip([fact.question(0) for fact in facts], before, strict=True)),
        "training": lesson,
        **effects,
    }


@dataclass(frozen=True)
class Learnt:
    """One question after the training, and whether its answer is the one that was taught."""

    question: str
    wording: int
    expected: str
    answer: str

    @property
    def right(self) -> bool:
        return self.answer.strip() == self.expected

    def as_dict(self) -> dict[str, Any]:
        return {
            "question": self.question,
            "wording": "same" if self.wording == 0 else "other",
            "expected": self.expected,
            "answer": self.answer,
            "right": self.right,
        }


def ask_all(client: "Client", questions: list[str]) -> list[str]:
    """The answers, asked at the same time, in the order of the questions."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda question: client.search(question, **ASK).response, questions))


def score(client: "Client", probes: "list[Probe]") -> dict[str, int]:
    """How many of the probes are answered exactly."""
    answers = ask_all(client, [probe.question for probe in probes])
    right = sum(answer.strip() == probe.expected for answer, probe in zip(answers, probes, strict=True))
    return {"right": right, "of": len(probes)}


def teach(client: "Client", facts: "list[Fact]", show: "Show") -> dict[str, Any]:
    """Post the facts, show the training, ask on meanwhile.

    Raises `TrainingFailed` if nothing is published.
    """
    from .demo_questions import known_probes
    from .progress import follow

    show.teaching(facts)
    queued = client.update([{"input": f.question(0), "output": f.answer} for f in facts], tags=["demo"])
    with Meanwhile(client, [probe.question for probe in known_probes()]) as meanwhile:
        followed = follow(client, queued.job_id, quiet=show.quiet, console=show.console)
    job = followed.job
    if job["state"] != "published":
        fault = (job.get("error") or {}).get("message") or f"The job ended {job['state']}."
        raise TrainingFailed(f"The demo's job was not published: {fault}")
    checkpoint = client.checkpoint(job["checkpoint"])
    lesson = {
        "job_id": queued.job_id,
        "checkpoint": job["checkpoint"],
        "checkpoint_status": checkpoint.status,
        "metrics": checkpoint.metrics,
        "losses": followed.losses,
        "answered_meanwhile": len(meanwhile.latencies_ms),
        "slowest_meanwhile_ms": max(meanwhile.latencies_ms, default=None),
    }
    show.lesson(lesson)
    return lesson


class Meanwhile:
    """Asks a question now and then while something else goes on: the service answers during training."""

    def __init__(self, client: "Client", questions: list[str]) -> None:
        self._client, self._questions = client, questions
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self.latencies_ms: list[int] = []

    def __enter__(self) -> "Meanwhile":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(10)

    def _ask(self) -> None:
        for question in self._questions * 100:
            if self._over.wait(MEANWHILE_PAUSE_S):
                return
            with suppress(RadianceError):
                self.latencies_ms.append(self._client.search(question, **ASK).latency_ms)
