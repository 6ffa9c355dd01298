"""Sigmoids by powers of two: the same numbers and slopes as MLX's, and only where they are wished for."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from mlx_lm.models import activations

from radiance_mlx.engine import sigmoid as module
from radiance_mlx.engine.sigmoid import powers_here, sigmoid, swiglu, use_powers

OWN, OWN_SWIGLU = module._own, module._own_swiglu
#: among them what overflows a power, and what is no number
VALUES = [-np.inf, -2e4, -130.0, -88.0, -20.0, -1e-4, -0.0, 0.0, 1e-30, 0.3, 17.0, 90.0, 2e4, np.inf, np.nan]


@pytest.fixture
def _restored():
    before = mx.sigmoid
    mx.disable_compile()  # as the service does on the CPU
    yield
    use_powers(before is sigmoid)


def test_it_is_the_sigmoid_to_rounding():
    """Of 100,000 numbers and of the odd ones, as exact as MLX's own against 64 bits."""
    x = np.concatenate([np.random.default_rng(0).normal(0, 6, 100_000), VALUES]).astype(np.float32)
    with np.errstate(over="ignore"):
        exact = 1 / (1 + np.exp(-x.astype(np.float64)))
    found, own = np.array(sigmoid(mx.array(x))), np.array(OWN(mx.array(x)))
    np.testing.assert_allclose(found, exact, rtol=0, atol=2e-7)
    near = np.abs(x) < 30
    off = [np.abs(values - exact)[near] / exact[near] for values in (found, own)]
    assert off[0].max() <= 4 * off[1].max()


def test_its_slope_is_that_of_the_sigmoid():
    """Also where it is flat."""
    x = mx.array(np.array([v for v in VALUES if np.isfinite(v)], dtype=np.float32))
    above = mx.random.normal(x.shape, key=mx.random.key(1))
    [found], [own] = (mx.vjp(lambda x, f=f: x * f(x), [x], [above])[1] for f in (sigmoid, OWN))
    assert mx.allclose(found, own, rtol=1e-5, atol=1e-6)


def test_its_product_and_both_slopes_are_those_of_mlx_lm():
    """Of numbers as they come, and where a sigmoid is flat."""
    mx.random.seed(2)
    odd = mx.array(np.array([v for v in VALUES if np.isfinite(v)], dtype=np.float32))
    gate = mx.concatenate([odd, mx.random.normal((2_000,)) * 4])
    x, above = mx.random.normal(gate.shape), mx.random.normal(gate.shape)
    found, own = (mx.vjp(f, [gate, x], [above]) for f in (swiglu, OWN_SWIGLU))
    for one, other in zip((*found[0], *found[1]), (*own[0], *own[1]), strict=True):
        assert mx.allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("_restored")
def test_training_holds_one_array_less_of_an_mlp():
    """Beside both inputs and the sigmoids; the product is the next layer's. The largest peak of three counts."""
    with mx.stream(mx.cpu):
        gate, x = mx.random.normal((1_000, 1_000)), mx.random.normal((1_000, 1_000))
        mx.eval(gate, x)

        def peak(f):
            def loss(gate, x):
                return (f(gate, x) * f(gate + 1, x) * f(gate + 2, x)).sum()

            mx.reset_peak_memory()
            before = mx.get_active_memory()
            mx.eval(mx.grad(loss, argnums=(0, 1))(gate, x))
            return mx.get_peak_memory() - before

        most = {f: max(peak(f) for _ in range(3)) for f in (swiglu, OWN_SWIGLU)}
    assert most[swiglu] <= most[OWN_SWIGLU] - 2 * gate.nbytes


def test_what_is_not_of_one_shape_is_left_to_mlx():
    """Slopes are summed over what was repeated."""
    gate, x = mx.random.normal((6, 1)), mx.random.normal((6,))
    found, own = (mx.vjp(f, [gate, x], [mx.ones((6, 6))])[1] for f in (swiglu, OWN_SWIGLU))
    assert [slope.shape for slope in found] == [slope.shape for slope in own] == [(6, 1), (6,)]


@pytest.mark.parametrize("kind", [mx.bfloat16, mx.float16])
def test_half_precision_is_left_to_mlx(kind):
    """An exponent rounded to eight bits would be a power that is a percent off."""
    x = mx.arange(-9, 9, 0.25).astype(kind)
    assert mx.array_equal(sigmoid(x), OWN(x))
    assert mx.array_equal(swiglu(x, x + 1), OWN_SWIGLU(x, x + 1))
    assert sigmoid(x).dtype == swiglu(x, x).dtype == kind


@pytest.mark.usefixtures("_restored")
def test_models_use_it_while_it_is_wished_for(monkeypatch):
    """mlx-lm's SiLU is made of it; off is MLX's own."""
    model, tokens, used = tiny.model(), mx.array([[1, 5, 9]]), []
    use_powers(False)
    own = model(tokens)
    real = module._gated
    monkeypatch.setattr(module, "_gated", lambda gate, x: used.append(x.shape) or real(gate, x))
    use_powers(True)
    assert (mx.sigmoid, activations.swiglu) == (sigmoid, swiglu)
    assert mx.allclose(model(tokens), own, rtol=1e-4, atol=1e-5)
    assert len(used) == len(model.layers)
    use_powers(False)
    assert mx.array_equal(model(tokens), own)
    assert (mx.sigmoid, activations.swiglu) == (OWN, OWN_SWIGLU)
    assert mx.array_equal(nn.silu(own), own * OWN(own))


def test_where_it_is_done(monkeypatch):
    """On the CPU of an x86 machine: Apple's have vector code, and so have graphics processors."""
    for machine, device, pays in (
        ("x86_64", mx.cpu, True),
        ("AMD64", mx.cpu, True),
        ("arm64", mx.cpu, False),
        ("aarch64", mx.cpu, False),
        ("x86_64", mx.gpu, False),
    ):
        monkeypatch.setattr(module.platform, "machine", lambda machine=machine: machine)
        monkeypatch.setattr(mx, "default_device", lambda device=device: device)
        assert powers_here() is pays
