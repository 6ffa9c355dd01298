"""The commands by themselves: what they read, show and exit with."""

import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from commands import _clean as _clean
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from running import free_port

from radiance_mlx import client, errors
from radiance_mlx.cli import demo_questions, demo_show, look, output, progress, render, run, sources
from radiance_mlx.cli.main import main
from radiance_mlx.client import Job
from radiance_mlx.models.nano import world

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


@pytest.mark.parametrize("command", ["info", "search hi", "jobs", "checkpoints", "rollback", "events", "jobs cancel x"])
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
