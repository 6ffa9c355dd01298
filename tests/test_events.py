"""The journal as a user reads it: over HTTP, by the clients and by the command."""

import asyncio
from types import SimpleNamespace

import pytest
from rich.console import Console
from running import FACTS, QUICK, http, running

from radiance_mlx import AsyncClient, Client
from radiance_mlx.cli.main import main
from radiance_mlx.cli.render import events_table

LOCAL = {**QUICK, "evaluation.metric": "finetune_loss"}


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


def test_a_change_of_bases_is_told_by_the_first_digits():
    """Of a base, which has a hash for a name; of the base itself as part of a lineage by that word."""
    table = events_table(
        [
            {"at": None, "kind": "base_changed", "data": {"from": "a" * 64, "to": "b" * 64}},
            {"at": None, "kind": "rollback", "data": {"from": "A_2026-02-09_0012", "to": None}, "reason": "no\x1b"},
        ]
    )
    console = Console(width=120, record=True)
    console.print(table)
    text = console.export_text()
    assert f"{'a' * 12} → {'b' * 12}" in text
    assert "A_2026-02-09_0012 → base" in text
    assert "\x1b" not in text
