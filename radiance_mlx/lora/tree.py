"""The training tree: a twin of the base that shares its arrays, with mlx-lm's LoRA layers in place.

`TapedLoRALinear` is mlx-lm's `LoRALinear` that also notes its output on the tree's `Tape` (where a step may
be cut) and draws its dropout from a key of its own, so that the mask depends on nothing but the step: not on
decoding in between, nor on a layer that is computed twice under gradient checkpointing. Where base and adapter
share a dtype and nothing is dropped out, it adds the low-rank product inside the products themselves, forward and
backward, instead of in passes of its own.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.tuner.utils import linear_to_lora_layers

from ..errors import ModelError
from .bank import AdapterWeights
from .targets import LINEAR, Targets, input_dims, layer_paths

if TYPE_CHECKING:
    from .prefix import Prefix


class Tape:
    """Where one forward pass notes its cut points, and the dropout key of the micro-batch."""

    def __init__(self) -> None:
        self.active = False
        self.record_linears = True
        self.outputs: list[mx.array] = []
        self.dear: set[int] = set()
        self.order: list[str] = []
        self.key: mx.array = mx.random.key(0)

    def start(self, key: mx.array) -> None:
        """Begin a forward pass."""
        self.outputs, self.dear, self.order, self.key, self.active = [], set(), [], key, True

    def note(self, path: str, output: mx.array) -> None:
        """Remember an output, in call order."""
        if self.active and self.record_linears:
            self.outputs.append(output)
            self.order.append(path)

    def note_dear(self, output: mx.array) -> None:
        """Remember an output that takes much longer than others do."""
        if self.active:
            self.dear.add(len(self.outputs))
            self.outputs.append(output)


class TapedLoRALinear(LoRALinear):
    """See the module's docstring; `_tape`, `_path`, `_index` and `_rate` are set by `make_tree`."""

    def __call__(self, x: mx.array) -> mx.array:
        dropping = self.training and self._rate > 0.0
        if not dropping and x.dtype == self.lora_a.dtype:
            out = _added(self.linear, self.scale)(x, self.lora_a, self.lora_b)
        else:
            low = self.scale * ((self._dropped(x) if dropping else x) @ self.lora_a)
            out = self.linear(x) + (low @ self.lora_b).astype(x.dtype)
        self._tape.note(self._path, out)
        return out

    def _dropped(self, x: mx.array) -> mx.array:
        key = mx.random.split(self._tape.key, self._count)[self._index]
        keep = mx.random.bernoulli(1.0 - self._rate, x.shape, key=key)
        return x * keep.astype(x.dtype) * (1.0 / (1.0 - self._rate))


def _added(linear: nn.Module, scale: float) -> Any:
    """`linear(x) + scale * x @ a @ b` of (x, a, b), for a frozen `linear` and arrays of one dtype."""

    def forward(x: mx.array, a: mx.array, b: mx.array) -> mx.array:
        return mx.addmm(linear(x), scale * (x @ a), b)

    def backward(primals: tuple[mx.array, ...], above: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        x, a, b = primals
        _, [into_linear] = mx.vjp(linear, [x], [above])
        low = scale * (above @ b.T)
        x, above = x.reshape(-1, x.shape[-1]), above.reshape(-1, above.shape[-1])
        flat = low.reshape(-1, low.shape[-1])
        return mx.addmm(into_linear, low, a.T), x.T @ flat, (scale * (x @ a)).T @ above

    function = mx.custom_function(forward)
    function.vjp(backward)
    return function


class TrainingTree:
    """One batch's module tree. `module` is what mlx-lm's losses and trainer take."""

    def __init__(self, module: nn.Module, tape: Tape, targets: Targets) -> None:
        self.module = module
        self.tape = tape
        self.targets = targets
        self.prefix: Prefix | None = None  # see `install_prefix`

    @contextlib.contextmanager
    def forward(self, key: mx.array, hidden: mx.array | None = None) -> Iterator[None]:
        """While a graph is built: the tape notes, `key` is the dropout's, `hidden` what the prefix gave, if it did.

        Afterwards the module holds its own parameters again: gradient checkpointing leaves in their place
        arrays that hang on the backward pass, and whoever read those would run it in one go.
        """
        own = self.module.trainable_parameters()
        self.tape.start(key)
        if self.prefix is not None:
            self.prefix.given = hidden
        try:
            yield
        finally:
            if self.prefix is not None:
                self.prefix.given = None
            self.tape.active = False
            self.module.update(own)

    @contextlib.contextmanager
    def quiet(self, hidden: mx.array | None = None) -> Iterator[None]:
        """`forward` without dropout; the tree trains on afterwards as if nothing had been."""
        self.module.eval()
        try:
            with self.forward(mx.random.key(0), hidden):
                yield
        finally:
            self.module.train()

    def adapter(self) -> AdapterWeights:
        """The live weights (not copied: arrays never change in place)."""
        modules = dict(self.module.named_modules())
        pairs = {path: (modules[path].lora_a, modules[path].lora_b) for path in self.targets.paths}
        return AdapterWeights(pairs, modules[self.targets.paths[0]].scale)

    def set_scale(self, scale: float) -> None:
        """Multiply the low-rank products by `scale` from now on."""
        modules = dict(self.module.named_modules())
        for path in self.targets.paths:
            modules[path].scale = scale

    def parameters(self) -> dict[str, mx.array]:
        """Flat trainable parameters, under mlx-lm's adapter names."""
        return dict(tree_flatten(self.module.trainable_parameters()))

    def fits(self, weights: Mapping[str, mx.array]) -> bool:
        """Whether an adapter's names and shapes are the tree's."""
        mine = self.parameters()
        return {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in weights.items()}

    def load(self, weights: Mapping[str, mx.array]) -> None:
        """Take over an adapter's flat parameters. Raises `ModelError` unless names and shapes are the tree's."""
        mine = self.parameters()
        if not self.fits(weights):
            raise ModelError("The adapter's tensors are not those of this LoRA configuration.")
        self.module.load_weights([(k, v.astype(mine[k].dtype)) for k, v in weights.items()], strict=False)


def make_tree(
    base: nn.Module,
    targets: Targets,
    *,
    rank: int,
    scale: float,
    dropout: float,
    seed: int,
    grad_checkpoint: bool = False,
    plain: bool = False,
) -> TrainingTree:
    """A training tree on `base`'s arrays; `a` is drawn from `seed`, `b` is zero.

    With `plain`, mlx-lm's own layers are left as they are (its trainer compiles them).
    Raises `ModelError` if mlx-lm adapted other modules than `targets` names.
    """
    module = copy.deepcopy(base)
    module.freeze()
    mx.random.seed(seed)
    parameters: dict[str, Any] = {"rank": rank, "scale": scale, "dropout": dropout, "keys": set(targets.keys)}
    linear_to_lora_layers(module, targets.num_layers, parameters)
    adapted = [(path, m) for path, m in module.named_modules() if isinstance(m, LoRALinear)]
    if {path for path, _ in adapted} != set(targets.paths):
        raise ModelError("mlx-lm adapted other modules than were asked for.", details=sorted(targets.paths))
    tape = Tape()
    if not plain:
        for index, (path, linear) in enumerate(adapted):
            linear.__class__ = TapedLoRALinear
            linear._tape, linear._path, linear._rate = tape, path, dropout
            linear._index, linear._count = index, len(adapted)
        if grad_checkpoint:
            _checkpoint_layers(module, tape)
    module.train()
    mx.eval(module.trainable_parameters())
    return TrainingTree(module, tape, targets)


def adapter_tree(base: nn.Module, adapter: AdapterWeights) -> TrainingTree:
    """A tree on `base`'s arrays with `adapter` in place, to be measured, not trained.

    Raises `ModelError` for a module that the base has not, or whose shape is another.
    """
    module = copy.deepcopy(base)
    module.freeze()
    modules, tape, layers = dict(module.named_modules()), Tape(), []
    for path, (a, b) in adapter.weights.items():
        linear = modules.get(path)
        if not isinstance(linear, LINEAR) or (a.shape[0], b.shape[1]) != (input_dims(linear), linear.weight.shape[0]):
            raise ModelError(f"The adapter does not fit this model at {path}.", "It was made for another base model.")
        layer = LoRALinear.from_base(linear, r=a.shape[1], scale=adapter.scale)
        layer.lora_a, layer.lora_b = a, b
        layer.__class__ = TapedLoRALinear
        layer._tape, layer._path, layer._rate = tape, path, 0.0
        layers.append((path, layer))
    module.update_modules(tree_unflatten(layers))
    return TrainingTree(module, tape, Targets(tuple(adapter.weights), (), 0))


def idle_adapter(base: nn.Module, targets: Targets) -> AdapterWeights:
    """An adapter of rank 1 that changes nothing: the base, with places where a pass may be cut."""
    modules = dict(base.named_modules())
    return AdapterWeights(
        {
            path: (mx.zeros((input_dims(modules[path]), 1)), mx.zeros((1, modules[path].weight.shape[0])))
            for path in targets.paths
        },
        1.0,
    )


def _checkpoint_layers(module: nn.Module, tape: Tape) -> None:
    """Recompute each layer in the backward pass.

    mlx-lm's `grad_checkpoint` patches the class, which the serving tree shares, and nests at each call; here
    the instances get a class of their own. The tape notes layers instead of linears: what is inside a
    checkpointed function exists twice.
    """
    tape.record_linears = False
    for path, layer in zip(layer_paths(module), module.layers, strict=True):
        layer.__class__ = _checkpointed(type(layer), tape, path)


def _checkpointed(kind: type, tape: Tape, path: str) -> type:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        def inner(parameters: Any, *args: Any, **kwargs: Any) -> Any:
            self.update(parameters)
            return kind.__call__(self, *args, **kwargs)

        out = mx.checkpoint(inner)(self.trainable_parameters(), *args, **kwargs)
        if tape.active:
            tape.outputs.append(out[0] if isinstance(out, tuple) else out)
            tape.order.append(path)
        return out

    return type(kind.__name__, (kind,), {"__call__": call})
