"""Draws of random numbers in a model: seen, named, and their states given back."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from curvlab.errors import UnsupportedError
from curvlab.problem import Problem
from curvlab.randomness import preserve_random_state

X = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(9) % 3


class Model(nn.Module):
    """Two layers, and anything between them."""

    def __init__(self, between: Callable[["Model", Tensor], Tensor], **held: Any) -> None:
        super().__init__()
        self.first, self.last, self.between = nn.Linear(4, 6), nn.Linear(6, 3), between
        for name, value in held.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self, self.first(x)))


def attention(dropout: float) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(6, 2, dropout=dropout, batch_first=True)


def attended(model: Model, h: Tensor) -> Tensor:
    tokens = h.unsqueeze(1)
    return model.layer(tokens, tokens, tokens)[0].squeeze(1)


def seldom(draw: Callable[[], float]) -> Callable[[Model, Tensor], Tensor]:
    """Change the outputs once in a thousand calls."""
    return lambda _, h: h * 2 if draw() < 1e-3 else h


def through_layer(model: Model, h: Tensor) -> Tensor:
    return model.layer(h)


DRAWING = {
    "functional dropout": (
        lambda _, h: F.dropout(h, 0.05),
        {},
        r"the model \(Model\) draws random numbers \(bernoulli_\)",
    ),
    "stochastic depth": (through_layer, {"layer": StochasticDepth(0.05, "row")}, r"layer \(StochasticDepth\) draws"),
    "attention": (attended, {"layer": attention(0.05)}, r"layer \(MultiheadAttention\) draws"),
    "rrelu": (through_layer, {"layer": nn.Sequential(nn.RReLU())}, r"layer\.0 \(RReLU\) draws"),
    "distribution": (lambda _, h: h + torch.distributions.Normal(0.0, 0.1).sample((6,)), {}, "draws random numbers"),
    "seeded": (lambda _, h: (torch.manual_seed(0), h + torch.rand(1))[1], {}, r"draws random numbers \(rand\)"),
    "vmap": (lambda _, h: torch.vmap(lambda r: r + torch.rand(6), randomness="different")(h), {}, "draws random"),
    "torch, seldom": (seldom(lambda: float(torch.rand(()))), {}, r"draws random numbers \(rand\)"),
    "python, seldom": (seldom(random.random), {}, "draws random numbers from Python's random"),
    "numpy, seldom": (seldom(lambda: np.random.rand()), {}, "from NumPy's global generator"),  # noqa: NPY002
    "own generator, seldom": (
        lambda m, h: h * 2 if m.generator.random() < 1e-3 else h,
        {"generator": np.random.default_rng(0)},
        r"from Model\.generator",
    ),
    "own random, seldom": (
        lambda m, h: h * 2 if m.generator.random() < 1e-3 else h,
        {"generator": random.Random(0)},
        r"from Model\.generator",
    ),
    "own torch generator": (
        lambda m, h: h + 1e-9 * torch.rand((), generator=m.generator),
        {"generator": torch.Generator()},
        r"draws random numbers \(rand\)",
    ),
}


def states() -> list[Any]:
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return [random.getstate(), name, keys.tolist(), rest, torch.get_rng_state().tolist()]


@pytest.mark.parametrize("kind", DRAWING)
def test_a_draw_is_seen(kind: str) -> None:
    between, held, told = DRAWING[kind]
    model = Model(between, **held).train()
    before = states()
    with pytest.raises(UnsupportedError, match=told):
        Problem(model, "cross_entropy", (X, Y)).check()
    assert states() == before


def test_own_generators_are_given_back() -> None:
    numpy_generator, python_generator = np.random.default_rng(0), random.Random(0)
    before = str(numpy_generator.bit_generator.state), python_generator.getstate()
    model = Model(lambda m, h: h + m.a.random() + m.b.random(), a=numpy_generator, b=python_generator)
    with pytest.raises(UnsupportedError, match="draws random numbers"):
        Problem(model, "cross_entropy", (X, Y)).check()
    assert (str(numpy_generator.bit_generator.state), python_generator.getstate()) == before


@pytest.mark.parametrize(
    ("between", "held"),
    [
        (lambda _, h: F.dropout(h, 0.0), {}),
        (lambda _, h: F.scaled_dot_product_attention(*[h[:, None, None]] * 3)[:, 0, 0], {}),
        (attended, {"layer": attention(0.05).eval()}),
        (attended, {"layer": attention(0.0).train()}),
        (through_layer, {"layer": nn.RReLU().eval()}),
        (through_layer, {"layer": nn.AlphaDropout(0.3).eval()}),
        (through_layer, {"layer": StochasticDepth(0.5, "row").eval()}),
        (lambda m, h: m.layer(h[:, None])[0][:, 0], {"layer": nn.LSTM(6, 6, 2, batch_first=True)}),
        (lambda m, h: torch.utils.checkpoint.checkpoint(m.layer, h, use_reentrant=False), {"layer": nn.Linear(6, 6)}),
    ],
)
def test_what_draws_nothing_is_taken(between: Callable[[Model, Tensor], Tensor], held: dict[str, Any]) -> None:
    """In train or eval mode, as given: fused kernels have the tag of drawing also where they do not."""
    Problem(Model(between, **held), "cross_entropy", (X, Y)).check()


def test_a_draw_that_the_model_hides() -> None:
    """No exception is raised inside the model, which might catch it."""

    def between(_: Model, h: Tensor) -> Tensor:
        try:
            return h + torch.rand(1)
        except Exception:
            return h

    with pytest.raises(UnsupportedError, match="draws random numbers"):
        Problem(Model(between), "cross_entropy", (X, Y)).check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_samples_that_mix_a_little(dtype: torch.dtype) -> None:
    """Less than ten times the root of a half precision's epsilon, which would pass for rounding."""
    problem = Problem(Model(lambda _, h: h + 0.5 * h.mean(0)).to(dtype), "cross_entropy", (X, Y))
    with pytest.raises(UnsupportedError, match="depends on the other samples"):
        problem.check()
    Problem(Model(lambda _, h: h.tanh()).to(dtype), "cross_entropy", (X, Y)).check()


def test_half_precision_inside() -> None:
    """Its rounding depends on the batch; that of float32 would not."""

    def rounded(_: Model, h: Tensor) -> Tensor:
        return h + h.to(torch.bfloat16) * 2e-2 * (len(h) > 1)

    Problem(Model(rounded), "cross_entropy", (X, Y)).check()
    with pytest.raises(UnsupportedError, match="depends on the other samples"):
        Problem(Model(lambda _, h: h + h * 2e-2 * (len(h) > 1)), "cross_entropy", (X, Y)).check()


def test_preserved() -> None:
    before = states()
    with preserve_random_state():
        random.random(), np.random.rand(), torch.rand(2)  # noqa: NPY002
    assert states() == before
