"""The commands: what they read, show and exit with, alone and with a running service."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from radiance_mlx import client, errors
from radiance_mlx.cli import demo_questions, demo_service, demo_show, look, output, progress, render, run, sources
from radiance_mlx.cli.main import main
from radiance_mlx.client import Job
from radiance_mlx.models.nano import world


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No RADIANCE_… of the machine, no config.yaml of the repository."""
    for name in [name for name in os.environ if name.startswith("RADIANCE_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    output.out.cache_clear()
    output.err.cache_clear()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


# --- examples from files --------------------------------------------------------------------------------


def test_every_bad_line_is_named_before_anything_is_sent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No service is needed to say so."""
    file = tmp_path / "rows.jsonl"
    file.write_text('{"input": "a"}\n{"input": "a", "output": "b"}\nnot json\n7\n{"text": ""}\n{"q": 1}')
    assert main(["update", str(file)]) == output.USAGE
    err = capsys.readouterr().err
    assert "5 bad examples; nothing was sent" in err
    assert [line.split(":")[0] for line in err.splitlines() if line.startswith("  - ")] == [
        f"  - line {i}" for i in (1, 3, 4, 5, 6)
    ]
    assert "output: is missing" in err


def test_hundreds_of_bad_lines_are_counted_not_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("x\n" * 300)
    assert main(["update", str(file), "--json"]) == output.USAGE
    error = json.loads(capsys.readouterr().out)["error"]
    assert "300 bad examples" in error["message"]
    assert len(error["details"]) == sources.SHOWN_FAULTS + 1
    assert error["details"][-1] == "and 280 more"


@pytest.mark.parametrize("raw", [b"", b"\n \n", b"[]", b'{"examples": []}', b"\xff\xfe", b'{"examples": 3}'])
def test_files_without_examples_are_bad_input(tmp_path: Path, raw: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(raw)
    assert main(["update", str(file)]) == output.USAGE
    assert main(["update", str(file), "--skip-bad"]) == output.USAGE
    assert "Traceback" not in capsys.readouterr().err


# --- small things ---------------------------------------------------------------------------------------


def test_settings_are_yaml() -> None:
    flags = run.parse_settings(["lora.r=16", "training.lr=0.01", "lora.target_modules=[q_proj]", "a=b=c"])
    assert flags == {
        "lora.r": 16,
        "training.lr": 0.01,
        "lora.target_modules": ["q_proj"],
        "a": "b=c",
    }
    for bad in ("lora.r", "=3", "a=[1"):
        with pytest.raises(errors.ConfigError):
            run.parse_settings([bad])


@pytest.mark.parametrize(
    ("words", "cancel", "meant"),
    [
        ([], None, (None, False)),
        (["job_1"], None, ("job_1", False)),
        (["cancel", "job_1"], None, ("job_1", True)),
        ([], "job_1", ("job_1", True)),
    ],
)
def test_which_job(words: list[str], cancel: str | None, meant: tuple[str | None, bool]) -> None:
    assert look.which_job(words, cancel) == meant


@pytest.mark.parametrize(
    ("words", "cancel"), [(["cancel"], None), (["a", "b"], None), (["a"], "b"), (["cancel", "a"], "b")]
)
def test_jobs_refuses_what_names_no_single_job(words: list[str], cancel: str | None) -> None:
    with pytest.raises(output.BadInput):
        look.which_job(words, cancel)


def test_spark_lines() -> None:
    assert render.spark([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert render.spark([1.0, None, 0.0]) == "█ ▁"
    assert render.spark([2.0, 2.0]) == "▄▄"
    assert render.spark([]) == render.spark([None]) == ""
    assert render.spark([float("nan"), 1.0]) == " ▄"
    assert len(render.spark(list(range(1000)), width=40)) == 40


@given(st.lists(st.none() | st.floats(), max_size=200), st.integers(1, 60))
def test_a_spark_line_is_never_wider_than_asked(values: list[float | None], width: int) -> None:
    assert len(render.spark(values, width)) <= width


def test_times_for_people() -> None:
    now = datetime(2026, 2, 9, 21, 0, tzinfo=UTC)
    assert render.ago("2026-02-09T20:58:00Z", now) == "2 min ago"
    assert render.ago("2026-02-09T20:59:59.5Z", now) == "just now"
    assert render.ago("2026-02-05T21:00:00Z", now) == "4 d ago"
    assert render.ago(None) == "–"
    assert render.ago("whenever") == "whenever"


def test_control_characters_never_reach_a_terminal() -> None:
    assert output.printable("a\x1b[31mb\x07\r\n\tc\x9b") == "a[31mb\n\tc"


def test_the_demo_teaches_strangers_only() -> None:
    facts = demo_questions.facts_about("Zelmira  Okonjo ")
    assert [fact.name for fact in facts[2:]] == ["Zelmira Okonjo"] * 2
    assert facts[0].name in dict(world.STRANGERS)
    names = {fact.name for fact in facts}
    assert len(demo_questions.known_probes()) == demo_questions.KNOWN_SAMPLE
    assert len(demo_questions.stranger_probes(names)) == demo_questions.STRANGER_SAMPLE
    assert not any(name in probe.question for probe in demo_questions.stranger_probes(names) for name in names)
    for bad in (world.KNOWN[3][0], " ", "x" * 41):
        with pytest.raises(output.BadInput):
            demo_questions.facts_about(bad)


def test_the_demo_promises_no_curve_that_is_not_measured() -> None:
    effects = {name: {"right": 8, "of": 8} for name in ("known_before", "known_after")}
    effects |= {f"strangers_refused_{when}": {"right": 8, "of": 8} for when in ("before", "after")}
    words = demo_show.forgetting_words(effects)
    assert words == "It forgot nothing of the sample, and guesses about nobody."


# --- exit codes and output ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("--version", 0),
        ("search --help", 0),
        ("nonsense", 2),
        ("search", 2),
        ("search --max-tokens many hello", 2),
        ("update", 2),
        ("update no-such-file.jsonl", 2),
        ("update --input a", 2),
        ("jobs --wait", 2),
        ("run --set lora.rank=8", 2),
        ("run --config no-such-file.yaml", 2),
        ("run --base-model ./no-such-folder", 2),
        ("run --base-model no/such/folder", 2),
        ("demo --name", 2),
        ("run --set server.token=2026-13-45", 2),
        ("run --set serving.adapter_slots=1000000000", 2),
        ("run --set memory.cache_limit_mb=1e300", 2),
        ("search hi --temperature nan", 2),
        ("search \udcff\udcfe", 2),
        ("update --input a --output \udcff", 2),
        ("jobs cancel \udcff", 2),
        ("info --url ftp://x", 2),
    ],
)
def test_exit_codes_of_usage_and_configuration(line: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == code
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert bool(out) == (code == 0)
    assert bool(err) == (code != 0)


@pytest.mark.parametrize("command", ["info", "search hi", "jobs", "checkpoints", "rollback", "jobs cancel x"])
def test_without_a_service_every_command_exits_with_3(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*command.split(), "--url", f"http://127.0.0.1:{free_port()}"]
    assert main(arguments) == output.UNREACHABLE
    assert "error: No service answers" in capsys.readouterr().err
    assert main([*arguments, "--json"]) == output.UNREACHABLE
    out, err = capsys.readouterr()
    assert json.loads(out)["error"]["code"] == "service_unreachable"
    assert err == ""


def test_wrong_usage_with_json_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json", "--wrong"]) == output.USAGE
    out, err = capsys.readouterr()
    assert json.loads(out)["error"]["code"] == "usage"
    assert err == ""


def test_a_bug_shows_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(client, "Client", broken)
    assert main(["info"]) == output.FAILED
    err = capsys.readouterr().err
    assert "ZeroDivisionError: oops" in err
    assert "Traceback" not in err


def test_interrupted_commands_exit_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(client, "Client", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        assert main(["info"]) == output.INTERRUPTED
    finally:
        signal.signal(signal.SIGINT, before)


def test_client_commands_never_import_mlx() -> None:
    """They start quickly: neither MLX nor the web framework nor the store is loaded."""
    code = (
        "import sys; from radiance_mlx.cli.main import main; code = main(['info', '--url', 'localhost:1'])\n"
        "bad = {'mlx', 'mlx_lm', 'starlette', 'sqlite3', 'transformers', 'datasets'} & set(sys.modules)\n"
        "print(code, sorted(bad))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "3 []"


# --- streams that are full or closed --------------------------------------------------------------------


def run_in_a_shell(line: str) -> tuple[int, str]:
    """`line`, in which `%` is the program, as a shell runs it: exit code and stderr."""
    program = f"{sys.executable} -m radiance_mlx"
    done = subprocess.run(
        ["bash", "-c", line.replace("%", program)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    return done.returncode, done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("command", ["--help", "--version", "info --url 127.0.0.1:1 --json"])
@pytest.mark.parametrize("target", [">/dev/full", ">&-"])
def test_a_stdout_that_takes_nothing_is_one_clear_error(command: str, target: str) -> None:
    """Help, results and errors in JSON: never a traceback, and never called a bug."""
    code, err = run_in_a_shell(f"% {command} {target}")
    assert code == output.FAILED
    assert err.startswith("error: The result cannot be written: ")
    assert len(err.splitlines()) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("target", ["2>/dev/full", "2>&-", "<&- >&- 2>&-"])
def test_a_stderr_that_takes_nothing_changes_no_exit_code(target: str) -> None:
    """What is said beside the result may be lost."""
    assert run_in_a_shell(f"% nonsense {target}")[0] == output.USAGE
    assert run_in_a_shell(f"% search hi --url 127.0.0.1:1 {target}")[0] == output.UNREACHABLE


def test_a_closed_stdin_is_empty_input() -> None:
    for command in ("search -", "update -"):
        code, err = run_in_a_shell(f"% {command} <&-")
        assert code == output.USAGE
        assert "bug" not in err


# --- the bar --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("state", "shown"), [("published", "200/200"), ("cancelled", "40/200"), ("failed", "40/200")])
def test_the_bar_of_a_job_that_is_not_published_stays_where_it_was(state: str, shown: str) -> None:
    """Only what was published is complete."""

    class Ending:
        def wait(self, job_id: str, on_progress: Callable[[Job], None]) -> Job:
            steps = {"step": 40, "max_steps": 200, "loss": 1.0, "tokens_per_s": 1.0, "eta_s": 1.0, "phase": "training"}
            on_progress(Job.of({"job_id": job_id, "state": "training", "progress": steps}))
            return Job.of({"job_id": job_id, "state": state, "progress": None})

    console = Console(file=io.StringIO(), width=100)
    client_: Any = Ending()
    assert progress.follow(client_, "job_000001", console=console).job["state"] == state
    assert isinstance(console.file, io.StringIO)
    last = console.file.getvalue().splitlines()[-1]
    assert state in last
    assert shown in last


# --- with a running service -----------------------------------------------------------------------------


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
