"""The engine: one base, its banked serving tree, requests, and one batch in training. One thread's affair.

`step()` does one thing that the planner picked: generate for all active requests (and feed training's lane, if it
has one), a slice of background work, or nothing. It knows no HTTP, no database and no event loop.
"""

import copy
import gc
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..checkpoints import folder as folders
from ..config import Config
from ..errors import Cancelled, Conflict, InternalError, Paused, RadianceError, StoreError
from ..evaluation.anchors import AnchorSet
from ..evaluation.plan import Plan, Subject
from ..lora import files
from ..lora.bank import AdapterWeights, Bank
from ..lora.encoding import ChatEncoder
from ..lora.head import install_head, serve_places, unadapted
from ..lora.ranks import Ranks
from ..lora.targets import find_targets
from ..messages import EngineFacts, Generate, Progress, TrainBatch, TrainResult
from . import backend as backends
from .ahead import AskingAhead
from .backend import Backend
from .decoder import Decoder, Sink
from .foundation import Foundation
from .fused import FusedStable
from .measuring import Measurements, MeasuringTask
from .model import load_base
from .planner import Action, Load, Planner
from .probe import decodes_in_batches
from .products import UNKNOWN, best_here, shape_products
from .training import TrainingTask

log = logging.getLogger(__name__)
Done = Callable[[TrainResult | RadianceError], None]


class Engine:
    """Constructing it loads the base model; raises `RadianceError` if that cannot be done."""

    def __init__(self, config: Config, home: Path) -> None:
        started = time.perf_counter()
        self._config, self._home = config, home
        self._backend: Backend = backends.select(config.backend, config.memory)
        self._base = load_base(config, cpu=self._backend.name == "cpu")
        module = self._base.module
        distributed = config.training.distributed
        self._ranks = Ranks(distributed, self._base.fingerprint) if distributed != "off" else None
        self._targets = find_targets(module, config.lora.targets, config.lora.num_layers)
        self._head = install_head(copy.deepcopy(module), self._base.vocab_size)
        tree = copy.deepcopy(module)
        self._bank = Bank(tree, self._targets.paths, config.serving.adapter_slots, config.lora.r)
        self._encoder = ChatEncoder(self._base.tokenizer, config.model.chat_template_args)
        batched = decodes_in_batches(tree)
        products = best_here(pads=config.serving.pad_rows == "auto", columns=config.serving.column_blocks == "auto")
        best = shape_products(tree, products)
        head = unadapted(self._head, self._targets.paths)
        self._fused = FusedStable(module, self._bank, config.serving.fuse, self._room, products, head)
        self._decoder = Decoder(
            self._base,
            tree,
            self._bank,
            self,
            self._encoder,
            config.serving,
            config.memory,
            batched=batched,
            best=best if config.serving.decode_threads == "auto" else UNKNOWN,
            fused=self._fused,
            head=serve_places(tree, head),
        )
        self._planner = Planner(config.training.share, config.training.slice_ms / 1000)
        self._left_s = 0.0  # what the last slice of training has left under way will still take
        self._needed = 0  # bytes that the batch in training takes at its highest, as soon as that is known
        self._foundation = Foundation(self._base, self._targets, self._encoder, home)
        self._ahead = AskingAhead(self._foundation, config)
        self._task: TrainingTask | MeasuringTask | None = None
        self._done: Callable[[Any], None] | None = None
        self._trained: tuple[str, int, Callable[[], AdapterWeights]] | None = None
        self.facts = self._describe(batched, time.perf_counter() - started)

    def _describe(self, batched: bool, seconds: float) -> EngineFacts:
        warnings = []
        if not batched:
            warnings.append("this model cannot decode in batches with mlx-lm: requests are answered one by one")
        if self._head is None:
            warnings.append("the output head was not found: training computes logits for prompts too")
        return EngineFacts(
            base_model=self._config.base_model,
            base_hash=self._base.fingerprint,
            backend=self._backend.name,
            device=self._backend.device,
            memory_bytes=self._backend.memory_bytes,
            context=self._base.context,
            vocab_size=self._base.vocab_size,
            targets=self._targets.paths,
            chat_template=bool(self._base.tokenizer.has_chat_template),
            tools=self._encoder.takes_tools,
            warnings=tuple(warnings),
            seconds=round(seconds, 3),
        )

    # --- requests --------------------------------------------------------------------------------

    @property
    def requests(self) -> int:
        """How many there are, active or waiting."""
        return self._decoder.load

    def submit(self, number: int, request: Generate, sink: Sink) -> None:
        """Take a request; its pieces and its end go to `sink`."""
        self._decoder.submit(number, request, sink)

    def cancel(self, number: int) -> None:
        """The client of request `number` has gone."""
        self._decoder.cancel(number)

    def warm(self, checkpoint: str) -> bool:
        """Load a checkpoint into the bank. Raises `CheckpointDamaged`."""
        return self._decoder.warm(checkpoint)

    def follow(self, stable: str | None) -> None:
        """`stable` (None: the base) is what most will ask from now on."""
        self._fused.follow(stable, lambda: self.checkpoint(str(stable)))

    def _room(self) -> int:
        """Bytes for folded weights: half of the memory stays free for training and prompts, or what a batch needs."""
        if self._needed:
            return self._backend.memory_bytes - self._needed
        return self._backend.memory_bytes // 2 - mx.get_active_memory()

    def _make_room(self, needed: int) -> None:
        """A batch needs so much: what is folded gives way if not both fit."""
        self._needed = needed
        if self._fused.nbytes and needed + self._fused.nbytes > self._backend.memory_bytes:
            self._fused.give_way()
            backends.release_memory()

    def prompt_encoder(self) -> ChatEncoder:
        """An encoder for another thread: it shares nothing with this one (fast tokenizers are not for two at once)."""
        return ChatEncoder(copy.deepcopy(self._base.tokenizer), self._config.model.chat_template_args)

    def status(self) -> dict[str, Any]:
        """Numbers for `/info`."""
        return {
            **self._decoder.facts(),
            **self._fused.facts(),
            **(self._ranks.facts() if self._ranks else {}),
            "asking_ahead": self._ahead.pending,
            "active_memory_bytes": mx.get_active_memory(),
            "peak_memory_bytes": mx.get_peak_memory(),
            "cache_memory_bytes": mx.get_cache_memory(),
        }

    # --- where the decoder finds adapters ----------------------------------------------------------

    def checkpoint(self, name: str) -> AdapterWeights:
        """A kept adapter, verified. Raises `CheckpointDamaged`."""
        folder = self._home / "adapters" / name
        folders.verify(folder, {files.ADAPTER_FILE: folders.read(folder)["files"][files.ADAPTER_FILE]})
        return files.load_adapter(folder)

    def live(self) -> tuple[str, int, Callable[[], AdapterWeights]] | None:
        """(coming id, step, weights) of the batch in training, or of the one that waits to be published."""
        task = self._task
        if not isinstance(task, TrainingTask) or not task.alive:
            return self._trained
        return task.batch.checkpoint, task.step, task.live

    # --- training --------------------------------------------------------------------------------

    def train(
        self,
        batch: TrainBatch,
        report: Callable[[Progress], None],
        cancelled: threading.Event,
        done: Done,
        plan: Plan | None = None,
    ) -> None:
        """Begin to train `batch` in the background; `done` gets the result or the error. Measures what `plan` says."""
        if self._task is not None:
            done(Conflict("A batch is in training already."))
            return
        try:
            self._task = TrainingTask(
                self._foundation,
                self._config,
                batch,
                bank_bytes=self._bank.nbytes,
                make_room=self._make_room,
                base_head=self._head,
                ranks=self._ranks,
                backend=self._backend,
                report=report,
                cancelled=cancelled,
                plan=plan,
            )
        except RadianceError as error:
            done(error)
            return
        self._done = done

    def measure(
        self,
        anchors: AnchorSet,
        subjects: tuple[Subject, ...],
        report: Callable[[int, int], None],
        cancelled: threading.Event,
        done: Callable[[Measurements | RadianceError], None],
    ) -> None:
        """Begin to measure adapters in the background; `done` gets the results or the error."""
        if self._task is not None:
            done(Conflict("Something is trained or measured already."))
            return
        self._task = MeasuringTask(self._foundation, anchors, subjects, report, cancelled)
        self._done = done

    def _finish(self, outcome: TrainResult | Measurements | RadianceError) -> None:
        task, done = self._task, self._done
        self._task = self._done = None
        self._needed = 0
        if isinstance(task, TrainingTask):
            self._finish_training(task, outcome)
        if isinstance(outcome, RadianceError):
            outcome.__traceback__ = None  # its frames hold the task
        del task
        gc.collect()  # layers, their classes and what those refer to go round in circles
        backends.release_memory()
        if done is not None:
            done(outcome)

    def pause(self) -> None:
        """Stop the batch in training, if there is one; it can be gone on with from where it stands."""
        if isinstance(self._task, TrainingTask):
            self._task.keep_state(wait=True)
            self._finish(Paused("The job was paused."))

    def _finish_training(self, task: TrainingTask, outcome: Any) -> None:
        # what was stopped may be gone on from, also if that came before its first step: who stopped it decides
        failed = isinstance(outcome, RadianceError) and not isinstance(outcome, StoreError | Cancelled)
        task.close(forget_state=failed)
        if isinstance(outcome, TrainResult):
            weights = task.live()
            self._trained = (task.batch.checkpoint, task.step, lambda: weights)
        else:
            self._decoder.forget_live(task.batch.checkpoint)

    def settle(self) -> None:
        """The trained batch has been published or given up: its live weights answer no more."""
        if self._trained is not None:
            self._decoder.forget_live(self._trained[0])
            self._trained = None

    # --- one step --------------------------------------------------------------------------------

    def step(self) -> bool:
        """Do one thing; False if there was nothing to do."""
        requests, decoding = self._decoder.load, self._decoder.decoding
        aside = self._goes_aside(requests, decoding)
        if not aside and isinstance(self._task, TrainingTask):
            self._task.take_back()
        training = self._task is not None and not aside
        background = training or self._folds or (self._ahead.pending and not requests)
        action = self._planner.next(Load(requests, decoding, background))
        if action is Action.WAIT:
            return False
        started = time.perf_counter()
        self._left_s = 0.0
        if aside:
            self._feed()
        self._act(action, aside)
        self._planner.charge(action, time.perf_counter() - started, self._left_s)
        return True

    @property
    def _folds(self) -> bool:
        """Whether to fold now: whoever asks for the stable checkpoint gains by it, and it is soon done.

        While nobody asks, an update (or what measures) goes first, and is live the sooner; and what is about to be
        replaced is not folded.
        """
        return self._fused.pending and (self._decoder.load > 0 or (self._task is None and self._trained is None))

    def _goes_aside(self, requests: int, decoding: int) -> bool:
        """Whether the lane trains beside this step: not while anybody joins, or uses live weights, which it changes."""
        task = self._task
        if not isinstance(task, TrainingTask) or not task.goes_aside:
            return False
        return requests == decoding > 0 and not (self._fused.pending or self._decoder.answers_live)

    def _act(self, action: Action, aside: bool) -> None:
        """A bug ends what it hit, all requests or the batch in training, and nothing else."""
        try:
            if action is Action.BACKGROUND:
                self._background()
            else:
                beside = self._task is not None
                self._decoder.step(newcomers=action is Action.GENERATE, beside=beside, aside=aside)
        except Exception as error:
            log.exception("the engine failed in a step")
            if action is Action.BACKGROUND:
                self._finish(InternalError.of(error))
            else:
                self._decoder.fail_all(InternalError.of(error))

    def _background(self) -> None:
        task, seconds = self._task, self._planner.slice_s
        if self._folds:
            self._fused.slice(seconds)
            return
        if self._ahead.pending and (task is None or task.needs_base_asked):
            self._ahead.slice(seconds)
            return
        del task
        self._go_on(seconds)

    def _feed(self) -> None:
        failed = None
        try:
            self._go_on(None)
        except Exception as error:
            log.exception("training failed beside a step")
            failed = InternalError.of(error)
        if failed is not None:  # here, where the error holds nothing any more
            self._finish(failed)

    def _go_on(self, seconds: float | None) -> None:
        """With the task, for about so long; None: beside those who decode."""
        task = self._task
        assert task is not None
        before = task.step if isinstance(task, TrainingTask) else 0
        outcome: Any
        try:
            if seconds is None:
                assert isinstance(task, TrainingTask)
                outcome = task.feed()
            else:
                outcome = task.slice(seconds)
        except RadianceError as error:
            outcome = error
        stepped = isinstance(task, TrainingTask) and task.step != before
        if isinstance(task, TrainingTask) and not stepped:  # else the live weights may have been waited for
            self._left_s = task.under_way_s
        del task  # nobody may hold it when it ends
        if outcome is not None:
            self._finish(outcome)
        elif stepped:
            self._decoder.refresh_live()

    def stop(self) -> None:
        """Keep the state of the batch in training, end all requests."""
        self._decoder.drain()
        self._ahead.stop()
        if isinstance(self._task, TrainingTask):
            if self._config.training.slice_ms > 0:
                self._task.keep_state(wait=True)
            self._task.close(forget_state=False)
        self._task = self._done = None
