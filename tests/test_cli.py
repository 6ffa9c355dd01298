"""The commands and the client: parsing, finding the service, errors, exit codes."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radiance_mlx import client, errors
from radiance_mlx.cli import demo_questions, examples, look, output, render, run
from radiance_mlx.cli.main import main
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


def test_jsonl_rows_keep_their_line_numbers() -> None:
    text = '{"input": "a", "output": "b"}\n\n{"text": "c"}\n'
    rows, tags = examples.parse_rows(text, "x")
    assert [(row.place, row.example) for row in rows] == [
        ("line 1", {"input": "a", "output": "b"}),
        ("line 3", {"text": "c"}),
    ]
    assert tags == []


@pytest.mark.parametrize(
    ("text", "count", "tags"),
    [
        ('[{"prompt": "a", "completion": "b"}, {"text": "c"}]', 2, []),
        ('{"examples": [{"text": "c"}], "tags": ["t"]}', 1, ["t"]),
        ('{\n  "input": "a",\n  "output": "b"\n}', 1, []),
        ('{"messages": [{"role": "user", "content": "a"}]}', 1, []),
    ],
)
def test_json_is_a_list_an_update_body_or_one_example(text: str, count: int, tags: list[str]) -> None:
    rows, found = examples.parse_rows(text, "x")
    assert (len(rows), found) == (count, tags)


def test_every_bad_line_is_named_before_anything_is_sent() -> None:
    text = '{"input": "a"}\n{"input": "a", "output": "b"}\nnot json\n7\n{"text": ""}\n{"q": 1}'
    with pytest.raises(output.BadInput, match="5 bad examples") as caught:
        examples.parse_rows(text, "x")
    assert [fault.partition(":")[0] for fault in caught.value.details] == [f"line {i}" for i in (1, 3, 4, 5, 6)]
    assert "output must be text" in caught.value.details[0]


def test_hundreds_of_bad_lines_are_counted_not_listed() -> None:
    with pytest.raises(output.BadInput, match="300 bad examples") as caught:
        examples.parse_rows("x\n" * 300, "x")
    assert len(caught.value.details) == examples.SHOWN_FAULTS + 1
    assert caught.value.details[-1] == "and 280 more"


@pytest.mark.parametrize("raw", [b"", b"\n \n", b"[]", b'{"examples": []}', b"\xff\xfe", b'{"examples": 3}'])
def test_files_without_examples_are_bad_input(tmp_path: Path, raw: bytes) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(raw)
    with pytest.raises(output.BadInput):
        examples.read_rows(str(file))


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n')
    assert len(examples.read_rows(str(file))[0]) == 2


@given(st.text())
def test_any_text_is_rows_or_bad_input(text: str) -> None:
    """Nothing else can come out, whatever the file holds."""
    with contextlib.suppress(output.BadInput):
        assert examples.parse_rows(text, "x")[0]


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


# --- which service --------------------------------------------------------------------------------------


def server_file(home: Path, url: str, pid: int) -> None:
    (home / "state").mkdir(parents=True, exist_ok=True)
    (home / "state" / "server.json").write_text(json.dumps({"url": url, "pid": pid, "started": "now"}))


def test_the_service_is_the_named_one_then_the_running_one_then_the_configured_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "config.yaml").write_text("server: {port: 8400, token: secret}")
    assert client.locate(home=home).url == "http://127.0.0.1:8400"
    server_file(home, "http://127.0.0.1:9000", os.getpid())
    assert client.locate(home=home).url == "http://127.0.0.1:9000"
    assert client.locate(home=home).token == "secret"
    monkeypatch.setenv("RADIANCE_URL", "http://127.0.0.1:9001/")
    assert client.locate(home=home).url == "http://127.0.0.1:9001"
    assert client.locate("localhost:9002", home=home).url == "http://localhost:9002"
    assert client.locate("localhost:9002", home=home, token="other").token == "other"
    assert "--url" in client.locate("localhost:9002").hint


def test_what_a_dead_process_left_behind_is_ignored(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    server_file(tmp_path, "http://127.0.0.1:9000", dead.pid)
    assert client.locate(home=tmp_path).url == "http://127.0.0.1:8321"
    (tmp_path / "state" / "server.json").write_text("{broken")
    assert client.locate(home=tmp_path).url == "http://127.0.0.1:8321"


def test_the_configured_token_never_goes_to_another_machine(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("server: {token: secret}")
    assert client.locate("https://example.org", home=tmp_path).token is None
    assert client.locate("http://localhost:1", home=tmp_path).token == "secret"


def test_a_server_bound_to_every_address_is_reached_on_loopback() -> None:
    assert client.configured_url("0.0.0.0", 1) == "http://127.0.0.1:1"
    assert client.configured_url("::", 1) == "http://[::1]:1"
    assert client.configured_url("box.local", 1) == "http://box.local:1"


@pytest.mark.parametrize("url", ["", "http://", "ftp://x", "http://x:0x", "http://x:99999", "http://[", "a b"])
def test_what_is_no_address_is_a_configuration_error(url: str) -> None:
    with pytest.raises(errors.ConfigError):
        client.Client(url)


# --- streams and errors ---------------------------------------------------------------------------------


def chunked(raw: bytes, size: int) -> Iterator[bytes]:
    return (raw[i : i + size] for i in range(0, len(raw), size))


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_stream_survives_any_cut_and_unusual_line_separators(size: int) -> None:
    answer = {"response": "ä\u2028b", "checkpoint": "base"}
    raw = f': ping\r\n\r\ndata: {{"text": "ä\u2028b"}}\r\n\r\ndata:{json.dumps(answer)}\n\ndata: [DONE]\n\n'
    events = list(client._events(chunked(raw.encode(), size)))
    assert events == [{"text": "ä\u2028b"}, answer]


def test_an_error_inside_a_stream_is_raised_and_so_is_an_early_end() -> None:
    raw = b'data: {"text": "a"}\n\ndata: {"error": {"code": "busy", "message": "full"}}\n\n'
    with pytest.raises(errors.Busy, match="full"):
        list(client._events(iter([raw])))
    with pytest.raises(errors.ServiceUnreachable, match="before the answer was complete"):
        list(client._events(iter([b'data: {"text": "a"}\n\n'])))


def test_an_error_of_the_service_comes_back_as_its_own_class() -> None:
    known = client.error_from({"code": "conflict", "message": "m", "hint": "h", "details": [1]}, 409)
    assert isinstance(known, errors.Conflict)
    assert (known.message, known.hint, known.details, known.status) == ("m", "h", [1], 409)
    unknown = client.error_from({"code": "internal_error", "message": "m"}, 500)
    assert (type(unknown), unknown.code) == (errors.RadianceError, "internal_error")


def test_no_service_says_which_address_and_how_to_start_one() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with client.Client(url) as c, pytest.raises(errors.ServiceUnreachable) as caught:
        c.info()
    assert url in caught.value.message
    assert "python -m radiance_mlx run" in caught.value.hint
    with client.Client(url) as c:
        assert c.is_ready() is False


@pytest.fixture
def stranger() -> Iterator[str]:
    """Another program's web server."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/info" else 404)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Page)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_another_program_on_the_port_is_recognised(stranger: str) -> None:
    with client.Client(stranger) as c:
        for ask in (c.info, c.jobs):
            with pytest.raises(errors.RadianceError, match="is not this service") as caught:
                ask()
            assert caught.value.code == "bad_answer"


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
        ("demo --name", 2),
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

    monkeypatch.setattr(client, "connect", broken)
    assert main(["info"]) == output.FAILED
    err = capsys.readouterr().err
    assert "ZeroDivisionError: oops" in err
    assert "Traceback" not in err


def test_interrupted_commands_exit_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(client, "connect", interrupted)
    assert main(["info"]) == output.INTERRUPTED


def test_client_commands_never_import_mlx() -> None:
    """They start quickly: neither MLX nor the web framework nor the store is loaded."""
    code = (
        "import sys; from radiance_mlx.cli.main import main; code = main(['info', '--url', 'localhost:1'])\n"
        "bad = {'mlx', 'mlx_lm', 'starlette', 'sqlite3', 'transformers', 'datasets'} & set(sys.modules)\n"
        "print(code, sorted(bad))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "3 []"
