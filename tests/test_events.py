"""The journal as a user reads it: over HTTP, by the clients and by the command."""

import asyncio
import io
from types import SimpleNamespace

import pytest
from rich.console import Console
from running import ENDLESS, FACTS, QUICK, http, running, until

from radiance_mlx import AsyncClient, Client
from radiance_mlx.api.responses import event_body
from radiance_mlx.cli.main import main
from radiance_mlx.cli.render import events_table

LOCAL = {**QUICK, "evaluation.metric": "finetune_loss", "evaluation.catastrophic_delta": 100.0}


@pytest.fixture(scope="module")
def lived(tmp_path_factory):
    """A service that has published twice, has been rolled back with a reason, and has refused a third update."""
    home = tmp_path_factory.mktemp("lived")
    with running(home, LOCAL) as service:
        first, second = service.learn(FACTS[0]), service.learn(FACTS[1])
        service.call(service.service.rollback(first, "too chatty"))
    refusing = {**LOCAL, "evaluation.rollback_mode": "auto_rollback", "evaluation.catastrophic_delta": -1.0}
    with running(home, refusing) as service, http(service.service, service._thread) as client:
        refused = service.wait(service.post(FACTS[2]), "rejected")
        yield SimpleNamespace(
            client=client, url=str(client.base_url), first=first, second=second, third=refused.checkpoint
        )


def test_what_was_served_when_and_why_is_listed_newest_first(lived):
    """A rollback with its reason, a refusal with the policy's; the progress of training only if it is asked for."""
    body = lived.client.get("/events").json()
    events = body["events"]
    assert [event["kind"] for event in events] == ["rejected", "rollback", "published", "published"]
    refused, moved, second, first = events
    assert moved["reason"] == "too chatty"
    assert (moved["data"]["from"], moved["data"]["to"]) == (lived.second, lived.first)
    assert refused["data"]["checkpoint"] == lived.third
    assert "finetune_loss" in refused["reason"]
    assert (first["data"]["checkpoint"], first["data"]["parent"], first["reason"]) == (lived.first, None, "")
    assert (second["data"]["checkpoint"], second["data"]["parent"]) == (lived.second, lived.first)
    assert [event["id"] for event in events] == sorted((event["id"] for event in events), reverse=True)
    assert all(event["at"].endswith("Z") for event in events)
    assert (body["next"], body["checkpoint"], body["checkpoint_status"]) == (None, lived.first, "stable")
    told = lived.client.get("/events?kind=progress").json()["events"]
    assert {event["kind"] for event in told} == {"progress"}


def test_events_come_in_pages_and_of_one_kind(lived):
    page = lived.client.get("/events?limit=3").json()
    rest = lived.client.get(f"/events?limit=3&before={page['next']}").json()
    everything = lived.client.get("/events").json()["events"]
    assert page["events"] + rest["events"] == everything
    assert rest["next"] is None
    assert [e["kind"] for e in lived.client.get("/events?kind=rollback").json()["events"]] == ["rollback"]
    assert lived.client.get("/events?kind=failed").json()["events"] == []


@pytest.mark.parametrize(("query", "named"), [("kind=x", "no kind x"), ("limit=0", "limit"), ("before=-1", "before")])
def test_a_question_that_makes_no_sense_is_refused(lived, query, named):
    answer = lived.client.get(f"/events?{query}")
    assert answer.status_code == 422
    assert named in answer.json()["error"]["message"]


def test_the_clients_give_the_same(lived):
    async def with_asyncio():
        async with AsyncClient(lived.url) as client:
            return await client.events("rollback"), await client.events(limit=1)

    with Client(lived.url) as client:
        found = client.events("rollback"), client.events(limit=1)
    assert found == asyncio.run(with_asyncio())
    [moved], newest = found
    assert (moved.kind, moved.reason, moved.data["to"]) == ("rollback", "too chatty", lived.first)
    assert [event.kind for event in newest] == ["rejected"]
    assert newest.next == newest.events[0].id


def test_the_command_shows_when_what_and_why(lived, capsys):
    assert main(["events", "--url", lived.url]) == 0
    shown = capsys.readouterr()
    line = next(line for line in shown.out.splitlines() if "rollback" in line)
    assert f"{lived.second} → {lived.first}" in line
    assert "too chatty" in line
    assert f"serving {lived.first} · stable" in shown.err
    assert main(["events", "--kind", "nonsense", "--url", lived.url]) == 2
    assert "There are published, rejected, rollback" in capsys.readouterr().err


def test_the_command_names_the_way_to_older_events(lived, capsys):
    """Also at a limit of its own and of one kind; at the end there is no way further."""
    with Client(lived.url) as client:
        newest = client.events(limit=3)
    assert main(["events", "--limit", "3", "--url", lived.url]) == 0
    shown = capsys.readouterr()
    assert f"older events: events --before {newest.next}" in shown.err
    assert main(["events", "--before", str(newest.next), "--url", lived.url]) == 0
    shown = capsys.readouterr()
    assert (lived.first in shown.out, lived.third in shown.out, "older" in shown.err) == (True, False, False)
    assert main(["events", "--limit", "1", "--kind", "published", "--url", lived.url]) == 0
    assert f"older events: events --kind published --before {newest.next}" in capsys.readouterr().err


@pytest.mark.parametrize(("mode", "status"), [("warn", "risky"), ("off", "stable")])
def test_what_is_over_the_threshold_is_published_with_its_status_and_the_policys_reason(tmp_path, mode, status):
    """What is under it with its status alone."""
    with running(tmp_path, LOCAL) as service:
        service.learn(FACTS[0])
    strict = {**LOCAL, "evaluation.rollback_mode": mode, "evaluation.catastrophic_delta": -1.0}
    with running(tmp_path, strict) as service:
        second = service.learn(FACTS[1])
        with http(service.service, service._thread) as client:
            over, under = client.get("/events").json()["events"]
    assert (over["kind"], over["data"]["checkpoint"], over["data"]["status"]) == ("published", second, status)
    assert over["reason"] == over["data"]["verdict"]["reason"]
    assert "is over" in over["reason"]
    assert (under["data"]["status"], under["reason"], "verdict" in under["data"]) == ("stable", "", False)


def test_a_job_that_is_cancelled_alone_in_training_is_told_as_that_and_nothing_else(tmp_path):
    """Nothing began anew: no job was left to."""
    with running(tmp_path, ENDLESS) as service:
        job = service.post(FACTS[0])
        service.wait_for_step(1)
        service.call(service.service.cancel(job))
        service.wait(job, "cancelled")
        until(lambda: service.service.in_training is None)
        told = [(event["kind"], event["data"]["jobs"]) for event in service.store(lambda s: s.events())]
    assert [event for event in told if event[0] != "progress"] == [("cancelled", [job])]


@pytest.mark.parametrize("data", [{"verdict": None}, {"error": None}, {"reason": None, "verdict": None, "error": None}])
def test_what_is_null_in_an_event_is_no_reason(data):
    assert event_body({"id": 1, "at": 0.0, "kind": "rejected", "data": data})["reason"] == ""


def shown_at(width, *events):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(events_table(list(events)))
    return console.export_text()


@pytest.mark.parametrize("checkpoint", [None, "A_2026-02-09_0012"])
def test_the_reason_is_readable_beside_many_jobs(checkpoint):
    """At the width of a plain terminal, and beside a move: several jobs are a number."""
    reason = "The process ended 4 times while this job trained."
    data = {"checkpoint": checkpoint, "jobs": [f"job_{n:06d}" for n in range(8)]}
    moved = {"at": None, "kind": "rollback", "data": {"from": "A_2026-02-09_0012", "to": "A_2026-02-09_0011"}}
    text = shown_at(80, {"at": None, "kind": "quarantined", "reason": reason, "data": data}, moved)
    head, *rows = text.splitlines()
    what, notes = head.index("what"), head.index("notes")
    assert "quarantined" in rows[0]
    assert rows[0][what:notes].strip() == (f"{checkpoint} · 8 jobs" if checkpoint else "8 jobs")
    assert " ".join(" ".join(row[notes:] for row in rows).split()) == reason


def test_a_job_alone_is_told_by_its_name():
    """And not beside the checkpoint that it became."""
    alone = {"at": None, "kind": "cancelled", "data": {"jobs": ["job_000001"]}}
    assert "job_000001" in shown_at(80, alone)
    published = {"at": None, "kind": "published", "data": {"jobs": ["job_000001"], "checkpoint": "A_2026-02-09_0012"}}
    text = shown_at(80, published)
    assert ("A_2026-02-09_0012" in text, "job" in text) == (True, False)


def test_a_change_of_bases_is_told_by_the_first_digits():
    """Of a base, which has a hash for a name; of the base itself as part of a lineage by that word."""
    text = shown_at(
        120,
        {"at": None, "kind": "base_changed", "data": {"from": "a" * 64, "to": "b" * 64}},
        {"at": None, "kind": "rollback", "data": {"from": "A_2026-02-09_0012", "to": None}, "reason": "no\x1b"},
    )
    assert f"{'a' * 12} → {'b' * 12}" in text
    assert "A_2026-02-09_0012 → base" in text
    assert "\x1b" not in text
