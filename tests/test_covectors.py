"""Tests of covectors: the same for every way of access, with bounded memory; products with the output Fisher."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from curvlab.estimators import covectors as module
from curvlab.estimators.covectors import label_stream, output_covectors, output_product, suggest_sampling
from curvlab.likelihoods import LIKELIHOODS, get_likelihood
from curvlab.quantities import GGN, EmpiricalFisher, Fisher, MaSQ, Quantity

QUANTITIES = (Fisher(), GGN(), EmpiricalFisher(), MaSQ(2), Fisher(samples=3, seed=1))
N, C = 6, 5
NAMES = [name for name in LIKELIHOODS if name != "heteroscedastic_gaussian"]  # two outputs per target


def outputs_and_targets(loss: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    outputs = (3 * torch.randn(N, C, dtype=torch.float64, generator=generator)).to(dtype)
    if loss == "cross_entropy":
        return outputs, torch.randint(C, (N,), generator=generator)
    return outputs, torch.rand(N, C, dtype=torch.float64, generator=generator).to(dtype)


def make_covectors(loss: str, quantity: Quantity, dtype: torch.dtype = torch.float64) -> module.Covectors:
    return output_covectors(get_likelihood(loss), quantity, *outputs_and_targets(loss, dtype), label_stream(quantity))


@pytest.mark.parametrize("quantity", QUANTITIES, ids=str)
@pytest.mark.parametrize("loss", NAMES)
def test_every_way_to_ask_gives_the_same(loss: str, quantity: Quantity, monkeypatch: pytest.MonkeyPatch) -> None:
    covectors = make_covectors(loss, quantity)
    whole = covectors[:]
    assert whole.shape == (N, len(covectors), C)
    monkeypatch.setattr(module, "_BYTES", 2 * N * C * 8)  # two at once
    same = partial(torch.testing.assert_close, rtol=1e-14, atol=0)  # torch's vectorised kernels differ in the last bit
    same(torch.stack(list(covectors), dim=1), whole)
    same(torch.cat([covectors[:1], covectors[1:2], covectors[2:]], dim=1), whole)
    same(covectors.select(slice(2, 5))[1:], whole[2:5, 1:])
    with pytest.raises(ValueError, match="step"):
        covectors[::2]


@pytest.mark.parametrize("samples", [slice(0, 1), slice(1, 4), slice(4, 6)])
@pytest.mark.parametrize("loss", NAMES)
def test_drawn_covectors_do_not_depend_on_the_batches(loss: str, samples: slice) -> None:
    """The stream is used in the order of the samples: the draws of a batch are a part of all draws."""
    quantity = Fisher(samples=2, seed=4)
    outputs, targets = outputs_and_targets(loss)
    whole = output_covectors(get_likelihood(loss), quantity, outputs, targets, label_stream(quantity))[:]
    rng = label_stream(quantity)
    before = output_covectors(get_likelihood(loss), quantity, outputs[: samples.start], targets[: samples.start], rng)
    assert len(before[:]) == samples.start
    here = output_covectors(get_likelihood(loss), quantity, outputs[samples], targets[samples], rng)
    torch.testing.assert_close(here[:], whole[samples], rtol=1e-14, atol=0)


@pytest.mark.parametrize("quantity", QUANTITIES, ids=str)
@pytest.mark.parametrize("loss", NAMES)
def test_the_product_is_that_of_the_covectors(loss: str, quantity: Quantity) -> None:
    outputs, targets = outputs_and_targets(loss)
    vectors = torch.randn(N, C, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    rows = make_covectors(loss, quantity)[:]
    multiply = output_product(get_likelihood(loss), quantity, outputs, targets, label_stream(quantity))
    expected = torch.einsum("nrc,nr->nc", rows, torch.einsum("nrc,nc->nr", rows, vectors))
    assert torch.allclose(multiply(vectors), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_product_of_a_saturated_sample_keeps_its_precision(dtype: torch.dtype) -> None:
    """A probability rounds to one, but the entries agree with float64."""
    logits = torch.tensor([[60.0, -20, 0], [-30, 40, -10], [0, 0, 0.5]], dtype=torch.float64)
    vectors = torch.tensor([[3.0, 1, -2], [1, 1, 5], [1, 2, 3]], dtype=torch.float64)
    p = (logits - logits.logsumexp(dim=1, keepdim=True)).exp()
    # p_i sum_j p_j (u_i - u_j): no difference of near-equals
    expected = p * (p.unsqueeze(1) * (vectors.unsqueeze(2) - vectors.unsqueeze(1))).sum(dim=2)
    for loss, right in (
        ("cross_entropy", expected),
        ("binary_cross_entropy", vectors / (1 + logits.exp()) / (1 + (-logits).exp())),
    ):
        found = get_likelihood(loss).fisher_product(logits.to(dtype), logits, vectors.to(dtype)).double()
        assert torch.allclose(found, right, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-37)


class Largest(TorchDispatchMode):
    """Mode that records the size of the largest tensor that an operation creates."""

    bytes = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to skip it, torch would import all of its compiler

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.bytes = max([self.bytes, *(t.untyped_storage().nbytes() for t in made)])
        return result


@pytest.mark.parametrize("quantity", [Fisher(), Fisher(samples=50)], ids=str)
@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy", "squared_error"])
def test_memory_does_not_grow_with_the_square_of_the_outputs(loss: str, quantity: Quantity) -> None:
    outputs = torch.zeros(8, 2000)
    targets = torch.zeros(8, dtype=torch.int64) if loss == "cross_entropy" else outputs
    with Largest() as largest:
        covectors = output_covectors(get_likelihood(loss), quantity, outputs, targets, label_stream(quantity))
        assert sum(1 for _ in covectors) == len(covectors)
        output_product(get_likelihood(loss), Fisher(), outputs, targets, label_stream(quantity))(outputs)
    assert largest.bytes <= 1.6e7  # all of them would take 128 MB


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", NAMES)
def test_half_precision_is_computed_in_float32(loss: str, dtype: torch.dtype) -> None:
    outputs, targets = outputs_and_targets(loss, dtype)
    single = outputs.float(), targets.float() if targets.is_floating_point() else targets
    of = get_likelihood(loss)
    assert torch.equal(of.values(outputs, targets), of.values(*single))
    assert torch.equal(of.gradients(outputs, targets), of.gradients(*single))
    assert torch.equal(of.output_factors(outputs, targets), of.output_factors(*single))
    assert torch.equal(of.fisher_product(outputs, targets, outputs).float(), of.fisher_product(*single, single[0]))
    drawn = [of.draw(some, 2, np.random.default_rng(0)) for some in (outputs, single[0])]
    assert torch.equal(of.drawn_gradients(outputs, targets, drawn[0]), of.drawn_gradients(*single, drawn[1]))
    assert make_covectors(loss, Fisher(), dtype)[:].dtype == dtype


def test_one_class() -> None:
    covectors = output_covectors(
        get_likelihood("cross_entropy"), Fisher(), torch.ones(3, 1), torch.zeros(3), label_stream(Fisher())
    )
    assert covectors[:].shape == (3, 1, 1)
    assert not covectors[:].any()


@pytest.mark.parametrize(
    ("quantity", "outputs", "start"),
    [
        (Fisher(), 101, "fisher needs 100 backward passes"),
        (GGN(), 4001, "ggn needs 4,000 backward passes"),
        (Fisher(), 100, None),
        (Fisher(samples=200), 1000, None),
        (EmpiricalFisher(), 1000, None),
    ],
    ids=str,
)
def test_suggest_sampling(quantity: Quantity, outputs: int, start: str | None) -> None:
    suggestion = suggest_sampling(get_likelihood("cross_entropy"), quantity, outputs)
    assert suggestion is None if start is None else suggestion is not None and suggestion.startswith(start)
