"""The commands with a running service: what they ask it, show of it and exit with."""

import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import _clean as _clean

from radiance_mlx import client
from radiance_mlx.cli import demo_service, output
from radiance_mlx.cli.main import main
from radiance_mlx.models.nano import world


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    """The demo's own service on nano; its address."""
    with demo_service.demo_service(keep=False) as (running, _):
        yield running.base_url


@pytest.fixture
def call(service: str, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Any]]:
    """Run a command with --json on the service: its exit code and the JSON on stdout; nothing on stderr."""

    def run_command(*words: str) -> tuple[int, Any]:
        capsys.readouterr()
        code = main([*words, "--json", "--url", service])
        out, err = capsys.readouterr()
        assert err == ""
        return code, json.loads(out)

    return run_command


Call = Callable[..., tuple[int, Any]]
KNOWN = world.facts(world.KNOWN[:1])[0]
NEW = (world.ask("Zelmira Okonjo", "pet"), world.answer("Zelmira Okonjo", "pet", "owl"))


def test_search_answers_on_stdout_and_says_on_stderr_who_answered(
    service: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for way in ("--stream", "--no-stream"):
        assert main(["search", KNOWN[0], "--temperature", "0", way, "--url", service]) == 0
        out, err = capsys.readouterr()
        assert out == KNOWN[1] + "\n"
        assert "tokens" in err


def test_search_with_json_carries_checkpoint_and_status(call: Call) -> None:
    code, answer = call("search", KNOWN[0], "--temperature", "0", "--checkpoint", "base")
    assert code == 0
    assert (answer["response"], answer["checkpoint"], answer["checkpoint_status"]) == (KNOWN[1], "base", "base")


def test_a_streamed_answer_is_the_same_as_a_whole_one(service: str) -> None:
    with client.Client(service) as c:
        stream = c.search_stream(KNOWN[0], temperature=0)
        assert "".join(stream) == stream.result.response == KNOWN[1]
        assert stream.result.usage.completion_tokens == c.search(KNOWN[0], temperature=0).usage.completion_tokens


def test_search_reads_stdin(service: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for raw, code in ((KNOWN[0].encode(), 0), (b"  \n", 2), (b"\xff", 2)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
        assert main(["search", "-", "--temperature", "0", "--url", service]) == code
    assert capsys.readouterr().out == KNOWN[1] + "\n"


def test_update_wait_ends_with_a_checkpoint_that_answers_and_can_be_rolled_back(call: Call) -> None:
    """The whole circle: teach, look at job, checkpoint and info, go back to the base and forth again."""
    code, job = call("update", "--input", NEW[0], "--output", NEW[1], "--tag", "t", "--wait")
    assert (code, job["state"], job["checkpoint_status"], job["tags"]) == (0, "published", "stable", ["t"])
    name = job["checkpoint"]
    answer = call("search", NEW[0], "--temperature", "0")[1]
    assert (answer["response"], answer["checkpoint"]) == (NEW[1], name)
    info = call("info")[1]
    assert (info["current_checkpoint"], info["checkpoint_status"]) == (name, "stable")
    listed = call("checkpoints")[1]
    assert (listed["checkpoint"], listed["checkpoint_status"], listed["current"]) == (name, "stable", name)
    one = call("checkpoints", name)[1]
    assert (one["checkpoint"], one["checkpoint_status"], one["jobs"]) == (name, "stable", [job["job_id"]])
    now = {"checkpoint": name, "checkpoint_status": "stable"}
    jobs = call("jobs")[1]
    assert jobs["jobs"][0]["job_id"] == job["job_id"]
    assert now.items() <= jobs.items()
    shown = call("jobs", job["job_id"])[1]
    assert (shown["checkpoint_status"], shown["serving"]) == ("stable", now)
    assert one["serving"] == job["serving"] == now
    back = call("rollback", "base", "--reason", "test")[1]
    assert (back["checkpoint"], back["checkpoint_status"], back["previous"]) == ("base", "base", name)
    assert call("rollback", name)[1]["checkpoint"] == name


def test_what_is_served_comes_with_each_answer_and_needs_no_second_question(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = call("info")[1]
    serving = {"checkpoint": now["current_checkpoint"], "checkpoint_status": now["checkpoint_status"]}
    monkeypatch.delattr(client.Client, "info")
    queued = call("update", "--input", "a", "--output", "c")[1]
    assert {**serving, "queued": True}.items() <= queued.items()
    code, cancelled = call("jobs", "cancel", queued["job_id"])
    assert (code, cancelled["serving"]) == (0, serving)
    assert serving.items() <= call("jobs")[1].items()
    assert serving.items() <= call("checkpoints")[1].items()


def test_a_cancelled_job_makes_wait_exit_with_4(call: Call) -> None:
    job_id = call("update", "--input", "a", "--output", "b")[1]["job_id"]
    assert call("jobs", "cancel", job_id)[0] == 0
    code, job = call("jobs", job_id, "--wait")
    assert (code, job["state"]) == (output.NOT_PUBLISHED, "cancelled")


def test_an_example_that_the_service_refuses_is_named_by_its_line(
    call: Call, service: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n\n{"messages": [{"role": "user", "content": "a"}]}\n')
    code, body = call("update", str(file))
    assert (code, body["error"]["code"]) == (output.USAGE, "invalid_request")
    assert main(["update", str(file), "--url", service]) == output.USAGE
    assert "- line 3: messages" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("checkpoints A_2000-01-01_0001", "not_found"),
        ("jobs job_999999", "not_found"),
        ("jobs ../info", "not_found"),
        ("search hi --checkpoint A_2000-01-01_0001", "not_found"),
        ("search hi --stream --checkpoint A_2000-01-01_0001", "not_found"),
        ("rollback A_2000-01-01_0001", "not_found"),
    ],
)
def test_errors_of_the_service_exit_with_1_and_keep_their_code(call: Call, command: str, error: str) -> None:
    code, body = call(*command.split())
    assert (code, body["error"]["code"]) == (output.FAILED, error)


@pytest.mark.parametrize(
    "words",
    [
        ["jobs", "--state", "sleeping"],
        ["jobs", "--limit", "100000"],
        ["search", "hi", "--temperature", "99"],
        ["search", "hi", "--max-tokens", "0"],
        ["search", "hi", "--seed", "-1", "--stream"],
        ["search", "hi", "--stop", ""],
        ["update", "--input", "a", "--output", "b", "--tag", ""],
        ["update", "--input", "a", "--output", "b", "--idempotency-key", ""],
        ["rollback", "base", "--reason", "x" * 3000],
        ["eval", "--anchor-split", ""],
    ],
)
def test_what_the_service_refuses_of_what_was_typed_exits_with_2(call: Call, words: list[str]) -> None:
    """As what a command itself refuses; nothing is done."""
    before = call("jobs", "--limit", "1")[1]["jobs"]
    code, body = call(*words)
    assert (code, body["error"]["code"]) == (output.USAGE, "invalid_request")
    assert call("jobs", "--limit", "1")[1]["jobs"] == before


def test_a_text_that_is_too_long_is_no_warning_in_the_log(call: Call) -> None:
    """It is refused, which is told to who asked; transformers' own words about it are none of the log's."""
    code, body = call("search", "Who? " * 600)
    assert (code, body["error"]["code"]) == (output.FAILED, "prompt_too_long")
    log = (Path(call("info")[1]["home"]) / demo_service.LOG).read_text()
    assert "ready" in log
    assert "Token indices" not in log


def test_tables_show_what_is_there(call: Call, service: str, capsys: pytest.CaptureFixture[str]) -> None:
    current = call("info")[1]["current_checkpoint"]
    for command in ("info", "jobs", "checkpoints", "jobs job_000001"):
        assert main([*command.split(), "--url", service]) == 0
        shown = capsys.readouterr()
        assert current in shown.out + shown.err
