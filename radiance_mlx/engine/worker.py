"""A rank that is not the service: it waits for steps of training, and computes its part of each.

It ends when rank 0 does, or loses one of the others; there is nothing here to be kept.
"""

import json
import logging
import math
from typing import Any

import mlx.core as mx

from ..config import Config
from ..errors import ConfigError, RankLost
from ..lora.halves import halved
from ..lora.head import install_head
from ..lora.ranks import Wire, own_part, split_up
from ..lora.step import LossFunction, MicroBatch
from ..lora.targets import Targets
from ..lora.tree import make_tree
from . import backend as backends
from .model import BaseModel, load_base
from .slices import Slices

log = logging.getLogger(__name__)


def work(config: Config) -> None:
    """Serve rank 0 until it is gone. Raises `RadianceError` if this rank cannot take part."""
    assert config.training.distributed != "off"
    backend = backends.select(config.backend, config.memory)
    base = load_base(config, cpu=backend.name == "cpu")
    wire = Wire(config.training.distributed)
    hello, _ = wire.listen()
    same = hello["base"] == base.fingerprint
    wire.sum(mx.array([int(rank == wire.rank and not same) for rank in range(wire.size)], dtype=mx.int32))
    if not same:
        raise ConfigError(
            f"base_model: the files of {config.base_model} here are not those of rank 0.",
            "All machines need the same files under base_model.",
            [{"key": "base_model", "problem": "not what rank 0 has"}],
        )
    log.info("rank %d of %d waits for steps of training", wire.rank, wire.size)
    steps = _Steps(base)
    try:
        while True:
            steps.one(wire)
    except RankLost as error:
        log.info("rank %d of %d ends: %s", wire.rank, wire.size, error.message)


class _Steps:
    """Computes steps; the tree of the last one is kept for the next."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self._made_as = ""
        self._micro: MicroBatch | None = None

    def one(self, wire: Wire) -> None:
        """Wait for a step, compute this rank's part of it, and add it to the others'."""
        document, arrays = wire.listen()
        count = document["batches"]
        micro = self._prepared(document["lora"])
        micro.tree.load(split_up(arrays[0], micro.tree.parameters()))
        pairs = arrays[1 : 1 + 2 * count]
        batches = list(zip(pairs[::2], pairs[1::2], strict=True))
        part: list[mx.array] = []
        pieces = own_part(micro, batches, arrays[1 + 2 * count :], (wire.rank, wire.size), part)
        Slices(pieces, lambda: None).run(math.inf)
        wire.sum(part[0])

    def _prepared(self, lora: dict[str, Any]) -> MicroBatch:
        made_as = json.dumps(lora, sort_keys=True)
        if self._micro is None or made_as != self._made_as:
            targets = Targets(tuple(lora["paths"]), tuple(lora["keys"]), lora["num_layers"])
            options = {name: lora[name] for name in ("rank", "scale", "dropout", "grad_checkpoint")}
            tree = make_tree(self._base.module, targets, seed=0, **options)
            head = install_head(tree.module, self._base.vocab_size, narrow=not lora["grad_checkpoint"])
            self._micro = MicroBatch(tree, LossFunction(tree, head), halved=halved(lora["halves"]))
            self._made_as = made_as
        return self._micro
