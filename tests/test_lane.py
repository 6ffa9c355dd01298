"""Training on a lane of its own: the same training, whoever computes it, and nobody waits for it."""

import asyncio
import itertools
import threading

import mlx.core as mx
import pytest
import tiny
from mlx_lm.tuner.trainer import default_loss
from running import FACTS, QUICK, request, running, until

from radiance_mlx import blas
from radiance_mlx.engine.lane import Lane, goes_aside, rest_s
from radiance_mlx.engine.slices import Slices
from radiance_mlx.errors import Cancelled
from radiance_mlx.lora import halves, trainer
from radiance_mlx.lora.batches import as_batch
from radiance_mlx.lora.head import install_head
from radiance_mlx.lora.step import LossFunction, Piece
from radiance_mlx.lora.targets import find_targets
from radiance_mlx.lora.trainer import Trainer
from radiance_mlx.lora.tree import make_tree

pytestmark = pytest.mark.skipif(mx.default_device() != mx.cpu, reason="a lane is a core of the CPU's")
DATA = tiny.examples(7)
ENDLESS = {"logit_bias": ((400, 100.0),), "max_tokens": 120}


@pytest.fixture(scope="module")
def base():
    return tiny.model()


@pytest.fixture
def lane():
    made = Lane()
    yield made
    made.close()


@pytest.fixture
def _two_threads(monkeypatch):
    """As if OpenBLAS had two: a lane is for those."""
    monkeypatch.setattr(blas, "threads", lambda: 2)
    monkeypatch.setattr(blas, "can_use_fewer", lambda: True)


def lanes() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "radiance-lane"]


def nobodys() -> mx.array:
    """An array that no thread that is there can evaluate."""
    made = []
    thread = threading.Thread(target=lambda: (made.append(mx.ones(3, stream=mx.cpu) + 1), mx.clear_streams()))
    thread.start()
    thread.join()
    return made[0]


def ones() -> Piece:
    with halves.shared(aside=True):
        return Piece([mx.ones(3)])


# --- the lane alone ------------------------------------------------------------------------------


class Seen(list):
    """Arrays of a piece that tell when they are asked for."""

    def __init__(self, name, asked):
        super().__init__(ones().arrays)
        self._name, self._asked = name, asked

    def __iter__(self):
        self._asked.append(self._name)
        return super().__iter__()


def test_pieces_are_computed_in_order(lane):
    """One after the other, in the order of `begin`."""
    asked = []
    for name in range(20):
        lane.begin(Piece(Seen(name, asked)))
    lane.finish()
    assert lane.left() == 0
    assert asked == list(range(20))


def test_no_array_is_held_once_it_is_computed(lane):
    """Not while the lane waits for the next piece, nor while it rests."""
    for one in (lane, resting := Lane(1e-6)):
        with halves.shared(aside=True):
            array = mx.ones((500, 500))
        held = mx.get_active_memory()
        one.begin(Piece([array]))
        one.finish()
        del array
        until(lambda held=held: mx.get_active_memory() <= held, "its memory back")
    resting.close()


class Held(Seen):
    """Is being computed until it is opened."""

    def __init__(self):
        super().__init__("held", [])
        self.reached, self.open = threading.Event(), threading.Event()

    def __iter__(self):
        self.reached.set()
        assert self.open.wait(60)
        return super().__iter__()


def test_what_is_not_begun_is_given_back(lane):
    """All of it, in order, once what is begun is done; the lane goes on with what it is given afterwards."""
    held, back = Held(), []
    pieces = [Piece(held), *(ones() for _ in range(5))]
    for piece in pieces:
        lane.begin(piece)
    assert held.reached.wait(60)
    taking = threading.Thread(target=lambda: back.extend(lane.take_back()))
    taking.start()
    until(lambda: lane.left() == 1, "the others to be taken")
    assert not back
    held.open.set()
    taking.join(60)
    assert back == pieces[1:]
    lane.begin(ones())
    lane.finish()
    assert lane.left() == 0


def test_nothing_is_computed_after_a_fault(lane):
    """The lane says what it was, and drops what comes after it."""
    asked = []
    for piece in (ones(), Piece([nobodys()]), Piece(Seen("after", asked))):
        lane.begin(piece)
    lane.finish()
    assert isinstance(lane.fault, RuntimeError)
    assert lane.left() == 0
    assert not asked


def test_its_thread_is_there_from_the_first_piece_to_the_end():
    """None without a piece; none after `close`, which may come twice."""
    unused, used = Lane(), Lane()
    unused.close()
    assert not lanes()
    used.begin(ones())
    assert len(lanes()) == 1
    used.close()
    assert not lanes()
    used.close()


def test_it_rests_so_that_it_works_for_its_part_of_the_time():
    """After each piece, for its `part`; it can be taken back and closed meanwhile."""
    assert rest_s(2.0, 0.5) == 2.0
    assert rest_s(1.0, 0.2) == pytest.approx(4.0)
    assert rest_s(1.0, 1.0) == 0.0
    assert rest_s(1.0, 1e-12) == 3600.0
    resting, pieces = Lane(1e-9), [ones(), ones()]
    for piece in pieces:
        resting.begin(piece)
    until(lambda: resting.left() == 1, "the first piece's end")
    assert resting.take_back() == pieces[1:]
    resting.close()
    assert not lanes()


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize(
    ("changes", "wanted"),
    [({}, True), ({"share": 0.2}, True), ({"aside": "off"}, False), ({"share": 0.6}, False), ({"slice_ms": 0}, False)],
)
def test_when_training_goes_aside(monkeypatch, changes, wanted):
    """With two threads, no more than half of the machine, and in slices; with another number of threads, never."""
    assert goes_aside(tiny.settings(**changes)) is wanted
    monkeypatch.setattr(blas, "threads", lambda: 4)
    assert not goes_aside(tiny.settings(**changes))


# --- a training run ------------------------------------------------------------------------------


def a_run(base, monkeypatch, *, halved=False, with_head=True):
    monkeypatch.setattr(halves, "FEWEST", 1)
    monkeypatch.setattr(trainer, "halved", lambda setting: halved)
    targets = find_targets(base, ["q_proj", "v_proj"])
    tree = make_tree(base, targets, rank=4, scale=2.0, dropout=0.1, seed=0)
    section = tiny.settings(batch_size=3, max_steps=4, eval_every=2)
    head = install_head(tree.module, tiny.VOCAB) if with_head else None
    with halves.shared(aside=False):  # as the engine does, which makes its trainer while it drives the pieces
        return Trainer(tree, head, DATA, section, 1)


def state(run):
    return {name: mx.array(value) for name, value in run.tree.parameters().items()}, run.history


@pytest.mark.parametrize("kind", [{}, {"halved": True}, {"halved": True, "with_head": False}], ids=lambda k: str([*k]))
@pytest.mark.parametrize("pattern", ["f", "fr", "ffb", "rfffb", "fbrb"])
def test_it_is_the_same_training(base, monkeypatch, lane, kind, pattern):
    """Fed to the lane (f), cut into slices (r), taken back in between (b), in any order: equal losses and weights."""
    alone = a_run(base, monkeypatch, **kind)
    tiny.drive(alone.run())
    run = a_run(base, monkeypatch, **kind)
    slices, given = Slices(run.run(), lambda: None, lane), []
    begin = lane.begin
    monkeypatch.setattr(lane, "begin", lambda piece: given.append(1) or begin(piece))
    finished, turn = False, 0
    while not finished:
        what = pattern[turn % len(pattern)]
        turn += 1
        if what == "b":
            slices.take_back()
            assert lane.left() == 0
        else:
            finished = slices.feed() if what == "f" else slices.run(0.002, leave=True)
    assert len(given) > 4
    (weights, history), (expected, losses) = state(run), state(alone)
    for name, weight in weights.items():
        assert mx.allclose(weight, expected[name], rtol=1e-4, atol=1e-6).item(), name
    assert [step["loss"] for step in history.steps] == pytest.approx([step["loss"] for step in losses.steps], rel=1e-4)
    assert [entry["loss"] for entry in history.evals] == pytest.approx([e["loss"] for e in losses.evals], rel=1e-4)


@pytest.mark.parametrize("then", ["feed", "run"])
def test_a_fault_of_the_lane_ends_the_run(base, monkeypatch, lane, then):
    """As one in a slice does, with nothing under way: the next call raises it."""
    slices = Slices(a_run(base, monkeypatch).run(), lambda: None, lane)
    slices.feed()
    lane.begin(Piece([nobodys()]))
    lane.finish()
    with pytest.raises(RuntimeError, match="Stream"):
        slices.feed() if then == "feed" else slices.run(0.01)
    assert lane.left() == 0
    assert not slices._taken


@pytest.mark.parametrize("between", ["nothing", "taken back"])
def test_nothing_is_asked_for_before_a_barrier_is_done(lane, between):
    """Also one without arrays, after which there may be a pause, and one that was taken back."""
    seen, holds = [], [Held(), Held()]

    def pieces():
        yield Piece(holds[0])
        yield ones()
        yield Piece([], barrier=True)
        seen.append(lane.left())
        yield Piece(holds[1])
        yield Piece([], pause=True)
        seen.append(lane.left())

    slices = Slices(pieces(), lambda: None, lane)
    slices.feed()
    for hold in holds:
        assert hold.reached.wait(60)
        assert not slices.feed()
        if between == "taken back":
            threading.Timer(0.01, hold.open.set).start()
            slices.take_back()
        else:
            hold.open.set()
        until(lambda: slices.feed() or not lane.left() or holds[1].reached.is_set(), "what follows")
    until(slices.feed, "the end of the run")
    assert seen == [0, 0]


def test_whoever_cancels_does_not_wait_for_room(base, monkeypatch, lane):
    """A lane that has enough to do is not what a cancelled run waits for."""
    held, cancelled = Held(), []

    def check():
        if cancelled:
            raise Cancelled("The job was cancelled.")

    def pieces():
        yield Piece(held, barrier=True)
        raise AssertionError("nobody asks for more")

    slices = Slices(pieces(), check, lane)
    slices.feed()
    assert held.reached.wait(60)
    cancelled.append(True)
    threading.Timer(0.01, held.open.set).start()
    with pytest.raises(Cancelled):
        slices.feed()


def test_counts_of_targets_are_no_part_of_a_graph(base):
    """With a head and without one they are plain numbers: to look at them evaluates nothing."""
    tree = make_tree(base, find_targets(base, ["q_proj"]), rank=4, scale=2.0, dropout=0.0, seed=0)
    batch = as_batch(DATA[:3])
    counts = [
        LossFunction(tree, head)(tree.module, *batch)[1] for head in (None, install_head(tree.module, tiny.VOCAB))
    ]
    assert [type(count) for count in counts] == [int, int]
    assert counts[0] == counts[1] == default_loss(tree.module, *batch)[1].item()


def test_pieces_of_one_stream_are_for_all_threads_in_a_slice(base, monkeypatch, lane):
    """Of a micro-batch whose halves lie on one stream, one core would do nothing: its products take both. On two
    streams, each takes one.
    """
    threads = {}
    for aside in (True, False):
        pieces = a_run(base, monkeypatch, halved=True).run()
        with halves.shared(aside=aside):
            threads[aside] = {piece.threads for piece in itertools.islice(pieces, 8) if piece.arrays}
    assert threads == {True: {0}, False: {1}}


def test_a_run_that_is_stopped_leaves_nothing_under_way(base, monkeypatch, lane):
    """`check` raises while the lane works: what it was given is dropped, and it computes nothing any more."""
    run, asked = a_run(base, monkeypatch), [0]

    def check():
        asked[0] += 1
        if asked[0] == 40:
            raise Cancelled("The job was cancelled.")

    slices = Slices(run.run(), check, lane)
    with pytest.raises(Cancelled):
        all(not slices.feed() for _ in itertools.count())
    assert lane.left() == 0
    assert asked[0] == 40


# --- in the service ------------------------------------------------------------------------------

FLAGS = {**QUICK, "training.max_steps": 30, "training.batch_size": 4, "backend": "cpu"}


@pytest.fixture
def fed(monkeypatch):
    """How many pieces any lane has been given."""
    count, begin = [0], Lane.begin

    def counted(self, piece):
        count[0] += 1
        begin(self, piece)

    monkeypatch.setattr(Lane, "begin", counted)
    return count


def ask_on(service, *questions, **options):
    """Answers that take a while, to several at a time."""

    async def ask_all():
        requests = [request(question, **{**ENDLESS, **options}) for question in questions]
        return await asyncio.gather(*(service.service.search(one) for one in requests))

    return service.call(ask_all())


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize("wanted", ["auto", "off"])
def test_a_service_trains_beside_those_who_decode(tmp_path, fed, wanted):
    """`training.aside`: the lane learns while answers are drawn, both end well, and its thread is gone; off is off."""
    with running(tmp_path, FLAGS, training__aside=wanted) as service:
        job = service.post(*FACTS[:4])
        service.wait_for_step()
        answers = []
        while service.job(job).state == "training" and len(answers) < 40:
            answers += ask_on(service, "Hello!", "Who are you?")
        service.wait(job, "published")
        assert {answer.completion_tokens for answer in answers} == {120}
        assert bool(fed[0]) is (wanted == "auto")
        assert service.ask(FACTS[0][0]).text == FACTS[0][1]
        until(lambda: not lanes(), "the end of the lane's thread")


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize(
    "changes",
    [
        {"preset": "lasting", "rehearsal.samples": 8, "rehearsal.sample_tokens": 40, "rehearsal.neighbours": 4},
        {"replay.fraction": 0.5, "replay.refocus": 2, "training.eval_fraction": 0.3, "training.eval_every": 5},
        {"training.grad_accum": 2, "training.grad_checkpoint": True, "lora.dropout": 0.0},
        {"training.share": 0.3, "lora.num_layers": 2, "training.extensions": 1, "training.learnt_loss": 1e-9},
    ],
    ids=["lasting", "replay and held-out rows", "micro-batches", "a lower share"],
)
def test_whatever_it_does_the_lane_can_compute(tmp_path, fed, monkeypatch, changes):
    """Two updates with each kind of step, beside answers."""
    monkeypatch.setattr(halves, "FEWEST", 64)
    with running(tmp_path, {**FLAGS, "training.max_steps": 12, **changes}) as service:
        for lesson in (FACTS[:4], FACTS[4:8]):
            job = service.post(*lesson)
            service.wait_for_step(1, job)
            while service.job(job).state == "training":
                ask_on(service, "Hello!", max_tokens=60)
            service.wait(job, "published")
    assert fed[0]


@pytest.mark.usefixtures("_two_threads")
def test_answers_from_live_weights_take_turns_with_it(tmp_path, fed):
    """Whoever asks for what is in training gets each step's weights: meanwhile they take turns, and nothing is fed."""
    with running(tmp_path, FLAGS, training__max_steps=60) as service:
        job = service.post(*FACTS[:4])
        coming = service.wait_for_step(3)
        [live, other] = ask_on(service, "Hello!", "Who are you?", training=True)
        assert live.checkpoint == other.checkpoint == coming
        assert live.checkpoint_status == "training"
        assert not fed[0]
        service.wait(job, "published")


@pytest.mark.usefixtures("_two_threads")
def test_a_fault_of_the_lane_ends_the_job_and_no_request(tmp_path, monkeypatch):
    """Those who decode get their answers, and the next update is learnt."""
    real, faults = Slices._ask, []

    def ask(self, *, aside=False):
        piece = real(self, aside=aside)
        if aside and piece is not None and piece.arrays and not faults:
            faults.append(nobodys())
            return Piece([faults[0]])
        return piece

    monkeypatch.setattr(Slices, "_ask", ask)
    with running(tmp_path, FLAGS, training__max_steps=60) as service:
        job = service.post(*FACTS[:4])
        service.wait_for_step()
        answers = ask_on(service, "Hello!", "Who are you?")
        assert [answer.completion_tokens for answer in answers] == [120, 120]
        assert faults
        assert service.wait(job, "failed").error
        assert service.learn(FACTS[5]) == service.current


@pytest.mark.usefixtures("_two_threads")
def test_a_service_that_stops_keeps_what_the_lane_has_learnt(tmp_path, fed):
    """Stopped while both go on: the next one goes on from a step that was done, also without a lane, and publishes."""
    with running(tmp_path, FLAGS, training__max_steps=60) as service:
        job = service.post(*FACTS[:4])
        service.wait_for_step()
        asyncio.run_coroutine_threadsafe(service.service.search(request("Hello!", **ENDLESS)), service._thread.loop)
        until(lambda: fed[0] > 30, "pieces on the lane")
    assert not lanes()
    with running(tmp_path, FLAGS, training__max_steps=60, training__aside="off") as service:
        done = service.wait(job, "published")
        assert any("taken up again at step" in note for note in done.notes)


@pytest.mark.usefixtures("_two_threads")
def test_a_job_is_cancelled_while_the_lane_works(tmp_path, fed):
    """It ends, and so does the lane; whoever decodes goes on."""
    with running(tmp_path, FLAGS, training__max_steps=600) as service:
        job = service.post(*FACTS[:4])
        service.wait_for_step()
        asked = asyncio.run_coroutine_threadsafe(
            service.service.search(request("Hello!", **ENDLESS)), service._thread.loop
        )
        until(lambda: fed[0] > 30, "pieces on the lane")
        service.call(service.service.cancel(job))
        service.wait(job, "cancelled")
        assert asked.result(60).completion_tokens == 120
        until(lambda: not lanes(), "the end of the lane's thread")
