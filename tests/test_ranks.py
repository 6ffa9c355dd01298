"""Training on several machines: two ranks on one, really, and the arithmetic by itself."""

import contextlib
import json
import shutil
import signal
import socket

import mlx.core as mx
import pytest
import tiny
from running import FACTS, QUICK, REPOSITORY, Process, running, until

from radiance_mlx.lora import halves
from radiance_mlx.lora.batches import batch_stream
from radiance_mlx.lora.head import install_head
from radiance_mlx.lora.ranks import own_part, split_up
from radiance_mlx.lora.step import LossFunction, MicroBatch, own_gradients

NANO = REPOSITORY / "radiance_mlx" / "models" / "nano"
#: rows of two and of one, so that a rank has nothing to do in some micro-batches
SETTINGS = {"training.batch_size": 2, "training.grad_accum": 2, "training.max_steps": 5, "lora.dropout": 0.0}
#: to be met in the middle of training, and to see its end
LONG = {**SETTINGS, "training.max_steps": 150}


def micro_batch(base, *, halved=False):
    tree = tiny.tree(base)
    tree.load({name: value + 0.05 for name, value in tree.parameters().items()})
    return MicroBatch(tree, LossFunction(tree, install_head(tree.module, tiny.VOCAB)), halved=halved)


@pytest.mark.parametrize("halved", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_parts_add_up_to_the_gradient_of_one_machine(ranks, batch_size, halved, monkeypatch):
    """Rows of unlike lengths, fewer of them than ranks: loss and every gradient, but for the order of the sums."""
    monkeypatch.setattr(halves, "FEWEST", 1)
    base = tiny.model()
    micro = micro_batch(base)
    stream = batch_stream(tiny.examples(5), batch_size=batch_size, max_tokens=64, seed=(0, 0))
    batches = [next(stream) for _ in range(2)]
    keys = [mx.random.key(i) for i in range(2)]
    found = []
    tiny.drive(own_gradients(micro, batches, keys, found))
    [(grads, loss)] = found

    parts, theirs = [], micro_batch(base, halved=halved)
    for rank in range(ranks):
        tiny.drive(own_part(theirs, batches, keys, (rank, ranks), parts))
    total = sum(parts[1:], parts[0])
    assert total[0].item() == pytest.approx(loss.item(), rel=1e-6)
    size = max(mx.abs(grad).max().item() for grad in grads.values())
    assert tiny.furthest(split_up(total[1:], grads), grads) <= 1e-5 * size


# --- two processes --------------------------------------------------------------------------------


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def two(tmp_path, settings, other=None):
    """The service, and a worker (with `other` settings)."""
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
    started = []
    try:
        for rank, more in enumerate((settings, other or settings)):
            environment = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts), "OPENBLAS_NUM_THREADS": "1"}
            home = tmp_path / f"rank{rank}"
            started.append(Process(home, environment=environment, **{"training.distributed": "ring", **more}))
        yield started
    finally:
        for process in started:
            process.close()


def metrics(home, checkpoint):
    return json.loads((home / "metrics" / f"{checkpoint}.json").read_text())


def curve(found):
    return [row["loss"] for row in found["curves"]["finetune_loss"]]


def test_two_ranks_learn_what_one_machine_learns(tmp_path):
    """Losses of every step are those of one machine with the same batches; then the worker ends with the service."""
    with two(tmp_path, SETTINGS) as (service, worker):
        service.ready()
        assert service.get("/info")["engine"]["ranks"] == 2
        jobs = [service.wait(service.update(*facts)) for facts in (FACTS[:3], FACTS[3:5])]
        assert all("trained on 2 machines" in job["notes"] for job in jobs)
        together = [metrics(service.home, job["checkpoint"]) for job in jobs]
        service.signal(2)
        assert service.exit_code() == 0
        assert worker.exit_code() == 0
        assert "rank 1 of 2 waits" in worker.log
    with running(tmp_path / "alone", {**QUICK, **SETTINGS}) as alone:
        ids = [alone.learn(*facts) for facts in (FACTS[:3], FACTS[3:5])]
    for shared, name in zip(together, ids, strict=True):
        assert curve(shared) == pytest.approx(curve(metrics(alone.home, name)), rel=1e-4)


def test_a_signal_ends_it_while_it_waits_for_the_others(tmp_path):
    """MLX waits without Python running."""
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
    environment = {"MLX_RANK": "0", "MLX_HOSTFILE": str(hosts)}
    lonely = Process(tmp_path / "lonely", environment=environment, **{"training.distributed": "ring", **SETTINGS})
    try:
        until(lambda: "waiting for the other machines" in lonely.log)
        lonely.signal(signal.SIGTERM)
        assert lonely.exit_code() == -signal.SIGTERM
    finally:
        lonely.close()


def test_machines_with_other_base_models_do_not_train_together(tmp_path):
    base = shutil.copytree(NANO, tmp_path / "other")
    (base / "config.json").write_text((base / "config.json").read_text() + "\n")
    with two(tmp_path, SETTINGS, {**SETTINGS, "base_model": str(base)}) as (service, worker):
        assert service.exit_code() == 2
        assert worker.exit_code() == 2
        assert "rank 1 has another base model" in service.log
        assert "not those of rank 0" in worker.log


def test_started_alone_it_says_how_to_start(tmp_path):
    process = Process(tmp_path, **{**QUICK, "training.distributed": "ring"})
    try:
        assert process.exit_code() == 2
        assert "docs/distributed.md" in process.log
    finally:
        process.close()


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """Two ranks whose training takes a while."""
    with two(tmp_path_factory.mktemp("long"), LONG) as (service, worker):
        yield service.ready(), worker


def test_a_batch_that_is_given_up_in_the_middle_of_a_step_does_not_confuse_the_next(long):
    """The others still compute their part of it: their sum is taken before the next step is told."""
    service, _ = long
    for fact in FACTS[:3]:
        job = service.update(fact)
        service.wait_for_step(job, 1)
        service.client.delete(f"/jobs/{job}").raise_for_status()
        service.wait(job, "cancelled")
    assert service.get("/info")["engine"]["ranks"] == 2


def test_a_rank_that_dies_costs_no_update(long):
    """Its batch trains again from its beginning, here alone, and is published; so does all that comes later.

    Last, since it kills one of the two that are shared.
    """
    service, worker = long
    job = service.update(FACTS[0])
    service.wait_for_step(job, 2)
    worker.kill()
    until(lambda: service.get("/info")["engine"]["ranks"] == 1, "alone")
    assert "gone" in service.get("/info")["engine"]["ranks_lost"]
    done = service.wait(job)
    assert done["attempts"] == 1
    assert len(curve(metrics(service.home, done["checkpoint"]))) == LONG["training.max_steps"]
    assert not any("machines" in note for note in done["notes"])
    assert service.get("/info")["current_checkpoint"] == done["checkpoint"]
    assert service.post("/search", {"prompt": "Hello!"})["response"]
