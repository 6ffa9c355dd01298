"""The clients with the real service on a real port, over connections that break: what is applied, and how often."""

import asyncio
import contextlib
import json
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from running import FACTS, QUICK, Running, http, running, until

from radiance_mlx import AsyncClient, Client, RadianceError, Retry, errors
from radiance_mlx.config.bases import NANO_FOLDER

WITH_TOOLS = (
    "<|im_start|>{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{% if m.role != 'assistant' %}{{ m.role }}: {% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}"
    "{% if m.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
)
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}
ROWS = [{"input": question, "output": answer} for question, answer in FACTS]


@contextlib.contextmanager
def served(home: Path, **settings: Any) -> Iterator[tuple[Running, str]]:
    with running(home, QUICK, **settings) as service, http(service.service, service._thread) as client:
        yield service, str(client.base_url)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, str]]:
    with served(tmp_path_factory.mktemp("clients") / "home") as made:
        yield made


@pytest.fixture
def url(service: tuple[Running, str]) -> str:
    return service[1]


class Proxy:
    """Passes bytes on to `target`, one request a connection; the answers of the next `drop` connections are lost.

    By then the service has accepted what was sent.
    """

    def __init__(self, target: str) -> None:
        self.target, self.drop, self.dropped = target, 0, 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._serve(connection)

    def _serve(self, client: socket.socket) -> None:
        host, _, port = self.target.removeprefix("http://").rstrip("/").partition(":")
        with client, contextlib.suppress(OSError), socket.create_connection((host, int(port))) as upstream:
            client.settimeout(10)
            upstream.settimeout(10)
            upstream.sendall(_request(client))
            answer = b""
            while piece := upstream.recv(65536):
                answer += piece
            if self.drop:
                self.drop -= 1
                self.dropped += 1
                return
            client.sendall(answer)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)


def _request(client: socket.socket) -> bytes:
    """One request, which is told to be the connection's last."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += client.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(
        (int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-len")), 0
    )
    while len(body) < length:
        body += client.recv(65536)
    return head.replace(b"keep-alive", b"close") + b"\r\n\r\n" + body


@pytest.fixture
def proxy(url: str) -> Iterator[Proxy]:
    made = Proxy(url)
    yield made
    made.close()


# --- what they do ------------------------------------------------------------------------------------


def test_a_lesson_is_taught_waited_for_asked_and_taken_back(url: str) -> None:
    """The whole circle, in typed words."""
    seen: list[str] = []
    with Client(url) as client:
        known = client.search("Hello!", **GREEDY)
        done = client.update(ROWS[:1], ["t"], wait=True, on_progress=lambda job: seen.append(job.state))
        assert done.job is not None
        job = done.job.require_published()
        assert (job.tags, job.example_count, job.job_id) == (("t",), 1, done.job_id)
        info = client.info()
        assert (info.current_checkpoint, info.base_model, info.ready) == (job.checkpoint, "nano", True)
        assert len(info.loss_curves.finetune_loss) == len(client.checkpoints())
        (checkpoint,) = (c for c in client.checkpoints() if c.current)
        assert checkpoint == client.checkpoint(str(job.checkpoint))
        assert checkpoint.jobs == (job.job_id,)
        assert client.jobs(limit=1).jobs == (client.job(job.job_id),)
        assert client.search(ROWS[0]["input"], **GREEDY).checkpoint == job.checkpoint
        back = client.rollback("base", "test")
        assert (back.checkpoint, back.previous) == ("base", job.checkpoint)
        assert client.search("Hello!", **GREEDY).response == known.response
    assert seen


def test_the_asynchronous_client_says_the_same(url: str) -> None:
    async def with_asyncio() -> list[Any]:
        async with AsyncClient(url) as client:
            stream = client.search_stream("Hello!", **GREEDY)
            pieces = [piece async for piece in stream]
            done = await client.update(ROWS[1:2], wait=60.0)
            assert done.job is not None
            current = await client.rollback("base")
            found = [await client.search("Hello!", checkpoint="base", **GREEDY), "".join(pieces), stream.result]
            found += [await client.job(done.job_id), await client.checkpoint(current.previous), current.checkpoint]
            return [*found, (await client.info()).current_checkpoint, await client.is_ready()]

    def blocking(job_id: str, checkpoint: str) -> list[Any]:
        with Client(url) as client:
            stream = client.search_stream("Hello!", checkpoint="base", **GREEDY)
            pieces = list(stream)
            found = [client.search("Hello!", checkpoint="base", **GREEDY), "".join(pieces), stream.result]
            found += [client.job(job_id), client.checkpoint(checkpoint), "base"]
            return [*found, client.info().current_checkpoint, client.is_ready()]

    def but_for_the_clock(found: list[Any]) -> list[Any]:
        return [*(str(answer) for answer in found[:3]), *found[3:]]

    theirs = asyncio.run(with_asyncio())
    ours = blocking(theirs[3].job_id, theirs[4].checkpoint)
    assert but_for_the_clock(ours) == but_for_the_clock(theirs)
    assert theirs[1] == theirs[2].response


def test_errors_are_typed_and_say_what_to_do(url: str) -> None:
    with Client(url) as client:
        for ask, kind, status, code in (
            (lambda: client.job("job_999999"), errors.NotFound, 404, "not_found"),
            (lambda: client.search("hi", temperature=-1), errors.InvalidRequest, 422, "invalid_request"),
            (lambda: client.update([{"text": ""}]), errors.InvalidRequest, 422, "invalid_request"),
            (lambda: list(client.search_stream("hi", checkpoint="A_x")), errors.NotFound, 404, "not_found"),
        ):
            with pytest.raises(kind) as caught:
                ask()
            assert (caught.value.status, caught.value.code) == (status, code)
            assert caught.value.message
            assert caught.value.hint


def test_tools_that_the_base_cannot_show_are_refused_and_nothing_is_stored(url: str) -> None:
    """nano's chat template has no place for them: learning the rest would be another lesson."""
    tool = {"type": "function", "function": {"name": "f"}}
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    with Client(url) as client:
        before = client.jobs(limit=1).jobs
        with pytest.raises(errors.InvalidRequest, match="no place"):
            client.update([{"messages": chat, "tools": [tool]}])
        assert client.jobs(limit=1).jobs == before


def test_a_base_that_shows_tools_is_taught_calls_of_them(tmp_path: Path) -> None:
    """nano with another chat template: what is learnt is the call, and mlx-lm's row has it all."""
    base = tmp_path / "base"
    shutil.copytree(NANO_FOLDER, base)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings["chat_template"] = WITH_TOOLS
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    (base / "chat_template.jinja").unlink(missing_ok=True)
    tool = {"type": "function", "function": {"name": "add", "parameters": {"b": {}, "a": {}}}}
    call = {"type": "function", "function": {"name": "add", "arguments": {"b": 4, "a": 3}}}
    chat = [{"role": "user", "content": "3 + 4?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    with served(tmp_path / "home", base_model=str(base)) as (service, url), Client(url) as client:
        done = client.update([{"messages": chat, "tools": [tool]}], wait=True)
        assert done.job is not None
        assert done.job.require_published().example_count == 1
        trained = (service.home / "data" / "curated" / done.job_id / "train.jsonl").read_text()
        assert json.loads(trained) == {"messages": [chat[0], {**chat[1], "content": ""}], "tools": [tool]}
        (example,) = (e for _, e in service.store(lambda s: s.examples_of([done.job_id])))
        tokens = service.engine(lambda engine: engine._encoder.example(example).tokens)
        said = service.engine(lambda engine: engine._encoder.tokenizer.decode(list(tokens)))
        assert said == f'<|im_start|>{json.dumps([tool])}user: 3 + 4?add({{"b": 4, "a": 3}})<|im_end|>'


def drawing(service: Running) -> Any:
    """The one answer that is being generated, or None; `drawn` of it are its tokens so far."""
    return service.engine(lambda engine: next(iter(engine._decoder._active.values()), None))


def test_closing_a_stream_ends_its_generation(service: tuple[Running, str]) -> None:
    """Long before its 490 tokens are there."""
    endless = {"max_tokens": 490, "temperature": 8, "seed": 3}
    with Client(service[1]) as client:
        with client.search_stream("Hello!", **endless) as stream:
            next(iter(stream))
            drawn = until(lambda: drawing(service[0]))
        until(lambda: drawing(service[0]) is None)
        assert drawn.drawn < 490
        with pytest.raises(RadianceError, match="not complete"):
            _ = stream.result

    async def closed() -> Any:
        async with AsyncClient(service[1]) as client:
            async with client.search_stream("Hello!", **endless) as stream:
                async for _ in stream:
                    break
                drawn = until(lambda: drawing(service[0]))
            until(lambda: drawing(service[0]) is None)
            return drawn

    assert asyncio.run(closed()).drawn < 490


def test_one_client_serves_many_threads_and_many_tasks(url: str) -> None:
    with Client(url) as client, ThreadPoolExecutor(8) as pool:
        answers = set(pool.map(lambda _: client.search("Hello!", **GREEDY).response, range(16)))

    async def tasks() -> set[str]:
        async with AsyncClient(url) as shared:
            return {a.response for a in await asyncio.gather(*(shared.search("Hello!", **GREEDY) for _ in range(16)))}

    assert len(answers) == 1
    assert asyncio.run(tasks()) == answers


# --- over connections that break ---------------------------------------------------------------------


def test_an_update_whose_answer_is_lost_is_sent_again_and_learnt_once(
    service: tuple[Running, str], proxy: Proxy
) -> None:
    """By both clients, and however often: the key makes one job of it."""
    waits: list[float] = []

    async def nap(seconds: float) -> None:
        waits.append(seconds)

    def count() -> int:
        return len(service[0].call(service[0].service.jobs(None, 1000, None)))

    before = count()
    proxy.drop = 2
    with Client(proxy.url, sleep=waits.append) as client:
        done = client.update(ROWS[2:3])
        assert (count(), proxy.dropped) == (before + 1, 2)
        assert client.job(done.job_id).example_count == 1
        assert client.update(ROWS[2:3], idempotency_key=done.idempotency_key).job_id == done.job_id
        with pytest.raises(errors.IdempotencyMismatch, match=done.job_id):
            client.update(ROWS[3:4], idempotency_key=done.idempotency_key)
    assert 0.125 <= waits[0] <= 0.25 <= waits[1] <= 0.5

    async def asynchronous() -> str:
        async with AsyncClient(proxy.url, sleep=nap) as client:
            return (await client.update(ROWS[3:4])).job_id

    proxy.drop = 1
    asyncio.run(asynchronous())
    assert (count(), proxy.dropped, len(waits)) == (before + 2, 3, 3)


def test_a_service_that_is_started_anew_in_between_knows_the_update(tmp_path: Path) -> None:
    """Its answer was lost with it; the key is on its disk."""
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(contextlib.ExitStack())
        _, url = first.enter_context(served(tmp_path / "home", update_mode="batched"))
        proxy = Proxy(url)
        stack.callback(proxy.close)

        def restart(seconds: float) -> None:
            first.close()
            _, proxy.target = stack.enter_context(served(tmp_path / "home", update_mode="batched"))

        proxy.drop = 1
        with Client(proxy.url, sleep=restart) as client:
            done = client.update(ROWS)
            assert [job.job_id for job in client.jobs()] == [done.job_id] == ["job_000001"]
            assert client.job(done.job_id).example_count == len(ROWS)


def test_what_may_have_been_done_and_would_do_harm_twice_is_not_repeated(
    service: tuple[Running, str], proxy: Proxy
) -> None:
    """Back to the parent, and to its parent, is not what was asked for; reading is."""
    waits: list[float] = []
    with Client(proxy.url, sleep=waits.append) as client:
        proxy.drop = 1
        with pytest.raises(errors.ServiceUnreachable, match="before its answer was complete"):
            client.rollback()
        assert waits == []
        proxy.drop = 1
        assert client.rollback("base").checkpoint == "base"
        proxy.drop = 1
        assert client.info().current_checkpoint == "base"
        assert len(waits) == 2


def test_a_service_that_is_not_there_yet_is_waited_for_unless_that_is_not_wanted(url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    waits: list[float] = []

    def start_late(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            client._http.base_url = url  # the same client finds it, where it is by now

    with Client(f"http://127.0.0.1:{port}", sleep=start_late) as client:
        assert client.rollback("base").checkpoint == "base"
    with (
        Client(f"http://127.0.0.1:{port}", sleep=waits.append, retry=Retry(absent=False)) as client,
        pytest.raises(errors.ServiceUnreachable),
    ):
        client.update(ROWS)
    with (
        Client(f"http://127.0.0.1:{port}", sleep=waits.append, retry=Retry(attempts=3)) as client,
        pytest.raises(errors.ServiceUnreachable),
    ):
        client.search("hi")
    assert len(waits) == 4


@pytest.fixture
def refusing() -> Iterator[Callable[..., str]]:
    """`refusing(*answers)`: a server that gives one of (status, code, Retry-After) after the other, then is well."""
    servers: list[ThreadingHTTPServer] = []

    def make(*answers: tuple[int, str, str | None]) -> str:
        left = list(answers)

        class Page(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                status, code, after = left.pop(0) if left else (200, "", None)
                self.send_response(status)
                if after is not None:
                    self.send_header("retry-after", after)
                self.end_headers()
                fault = b'{"error": {"code": "%s", "message": "m"}}' % code.encode()
                well = b'{"response": "a", "checkpoint": "base", "checkpoint_status": "base", "previous": "base"}'
                self.wfile.write(fault if code else well)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_busy_service_is_asked_again_when_it_says(refusing: Callable[..., str]) -> None:
    """Even what would do harm twice: what is refused was not done. What will not pass is told at once."""
    waits: list[float] = []
    with Client(refusing((503, "busy", "3"), (429, "rate_limited", None)), sleep=waits.append) as client:
        assert client.rollback().checkpoint == "base"
    assert waits[0] == 3.0
    assert 0.25 <= waits[1] <= 0.5
    for refusal, kind in (
        ((503, "anchors_unavailable", "1"), errors.AnchorsUnavailable),
        ((503, "busy", "3600"), errors.Busy),
        ((500, "internal_error", None), errors.InternalError),
    ):
        with Client(refusing(refusal), sleep=waits.append) as client, pytest.raises(kind):
            client.search("hi")
    with Client(refusing(*[(503, "busy", None)] * 9), sleep=waits.append) as client, pytest.raises(errors.Busy):
        client.search("hi")
    assert len(waits) == 2 + 5


def test_a_wait_ends_in_time_and_the_job_goes_on(url: str) -> None:
    with Client(url) as client:
        queued = client.update(ROWS[:1], wait=False)
        with pytest.raises(errors.RequestTimeout, match="goes on"):
            client.wait(queued.job_id, timeout=0)
        assert client.wait(queued.job_id, timeout=60).ended
