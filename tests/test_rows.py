"""Tests of vectorised rows: equal to the reference's, one sample at a time, for every model and quantity."""

import pytest
import torch
from models_under_test import CLASSES, ZOO, AlsoFunctional, N, case
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from curvlab.errors import UnsupportedError
from curvlab.estimators.covectors import label_stream, output_covectors
from curvlab.estimators.rows import linear_factors, linear_layers, row_batches
from curvlab.estimators.torch_func import per_sample_rows
from curvlab.likelihoods import get_likelihood
from curvlab.parameters import ParameterSpace
from curvlab.problem import Problem
from curvlab.quantities import GGN, EmpiricalFisher, Fisher, Hessian, MaSQ, Quantity

PER_SAMPLE = (EmpiricalFisher(), Fisher(), Fisher(samples=3, seed=1), GGN())
QUANTITIES = (*PER_SAMPLE, MaSQ(3, "sumsq"), MaSQ(3, "mean"), MaSQ(3, "scaled"))


def reference(problem: Problem, quantity: Quantity, names: list[str]) -> Tensor:
    return torch.cat(list(per_sample_rows(problem, quantity, ParameterSpace.of(problem.model, names))))


def assert_same(actual: Tensor, expected: Tensor, quantity: Quantity) -> None:
    """Compare row by row, or, if the rows are not unique, their Gram matrix."""
    if isinstance(quantity, GGN) or quantity == Fisher():
        actual, expected = actual.mT @ actual, expected.mT @ expected
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize("quantity", QUANTITIES, ids=str)
@pytest.mark.parametrize("name", ZOO)
def test_rows_are_those_of_the_reference(name: str, quantity: Quantity) -> None:
    problem = case(name).problem
    names = list(problem.space.names)
    rows = torch.cat(list(row_batches(problem, quantity, names)))
    assert_same(rows, reference(problem, quantity, names), quantity)


@pytest.mark.parametrize("quantity", PER_SAMPLE, ids=str)
@pytest.mark.parametrize("name", ZOO)
def test_factors_make_the_rows(name: str, quantity: Quantity) -> None:
    problem = case(name).problem
    for layer, module in linear_layers(problem).items():
        factors = linear_factors(problem, quantity, layer, module)
        assert factors.inputs.shape == (N, module.in_features)
        rows = torch.einsum("nro,ni->nroi", factors.gradients, factors.inputs).flatten(2).flatten(0, 1)
        prefix = f"{layer}." if layer else ""
        if prefix + "weight" in problem.space.names:
            assert_same(rows, reference(problem, quantity, [prefix + "weight"]), quantity)
        if prefix + "bias" in problem.space.names:
            assert_same(factors.gradients.flatten(0, 1), reference(problem, quantity, [prefix + "bias"]), quantity)


@pytest.mark.parametrize("name", ZOO)
def test_only_rank_one_layers_are_listed(name: str) -> None:
    assert set(linear_layers(case(name).problem)) == _trainable(name)


def _trainable(name: str) -> set[str]:
    problem = case(name).problem
    return {layer for layer in case(name).linear if any(n.rpartition(".")[0] == layer for n in problem.space.names)}


def test_a_second_use_shows_also_where_the_model_fits_its_targets() -> None:
    """There the gradients of the loss are zero."""
    problem = case("also functional")
    fitted = Problem(problem.model, problem.loss, (problem.inputs, problem.model(problem.inputs).detach()))
    assert set(linear_layers(fitted)) == {"out"}


@pytest.mark.parametrize("quantity", QUANTITIES, ids=str)
@pytest.mark.parametrize("memory", [1.0, 5000.0])
def test_rows_of_some_parameters_in_small_pieces(quantity: Quantity, memory: float) -> None:
    """The parameters have the requested order; memory limit and batches do not matter."""
    whole = case("mlp")
    split = [3, 1, 3]
    problem = Problem(
        whole.model, whole.loss, list(zip(whole.inputs.split(split), whole.targets.split(split), strict=True))
    )
    pieces = list(row_batches(problem, quantity, ["2.bias", "0.weight"], max_bytes=memory))
    expected = torch.cat([reference(whole.problem, quantity, [name]) for name in ("2.bias", "0.weight")], dim=1)
    if not isinstance(quantity, GGN):
        assert_same(torch.cat(pieces), expected, quantity)
    if memory == 1.0 and not isinstance(quantity, MaSQ):
        assert all(len(piece) == 1 for piece in pieces)


def test_factors_over_several_batches_draw_the_same_labels() -> None:
    whole = case("mlp")
    quantity = Fisher(samples=2, seed=4)
    problem = Problem(whole.model, whole.loss, DataLoader(TensorDataset(whole.inputs, whole.targets), batch_size=3))
    layers = linear_layers(problem)
    factors = linear_factors(problem, quantity, "2", layers["2"])
    assert_same(factors.gradients.flatten(0, 1), reference(whole.problem, quantity, ["2.bias"]), quantity)


class Sometimes(nn.Module):
    """Network that calls its layer a second time for large inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc(x).tanh()
        return self.out(self.fc(hidden) if x.abs().max() > 100 else hidden)


def test_a_layer_that_is_used_twice_only_later_is_refused() -> None:
    model, x, y = Sometimes().double(), torch.ones(4, 4), torch.tensor([0, 1, 2, 0])
    batches = [(x, y)] * 12
    batches[10] = (1000 * x, y)  # where the verification does not look
    problem = Problem(model, "cross_entropy", batches)
    layers = linear_layers(problem)
    with pytest.raises(UnsupportedError, match="fc is not called exactly once"):
        linear_factors(problem, EmpiricalFisher(), "fc", layers["fc"])


def test_control_flow_that_cannot_be_vectorised_is_looped() -> None:
    model = Sometimes().double()
    x, y = torch.randn(3, 4) * torch.tensor([[1.0], [1000.0], [1.0]]), torch.tensor([0, 1, 2])
    problem = Problem(model, "cross_entropy", (x, y))
    single = Problem(model, "cross_entropy", list(zip(x.split(1), y.split(1), strict=True)))
    names = list(single.space.names)
    rows = torch.cat(list(row_batches(single, EmpiricalFisher(), names)))
    assert_same(rows, reference(single, EmpiricalFisher(), names), EmpiricalFisher())
    with pytest.raises(UnsupportedError, match="depends on the other samples"):
        problem.check()


def test_where_gradients_are_switched_off() -> None:
    for name in ("mlp", "lstm"):
        problem = case(name).problem
        names = list(problem.space.names)
        for quantity in (EmpiricalFisher(), MaSQ(3)):
            with torch.no_grad():
                rows = torch.cat(list(row_batches(problem, quantity, names)))
                assert set(linear_layers(problem)) == _trainable(name)
            assert_same(rows, reference(problem, quantity, names), quantity)


def test_float32_rows_of_a_saturated_model() -> None:
    """If the probabilities round to zero and one, the rows still agree with float64."""
    model = nn.Linear(2, 3)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[60.0, 0], [0, 60], [30, 30]]))
        model.bias.zero_()
    data = (torch.tensor([[1.0, 0], [0, 1], [0.5, 0.4]]), torch.tensor([0, 1, 2]))
    for quantity in (EmpiricalFisher(), Fisher()):
        single = torch.cat(list(row_batches(Problem(model.float(), "cross_entropy", data), quantity, ["weight"])))
        double = torch.cat(list(row_batches(Problem(model.double(), "cross_entropy", data), quantity, ["weight"])))
        assert single.dtype == torch.float32
        assert torch.allclose(single.double(), double, rtol=1e-5, atol=torch.finfo(torch.float32).tiny)
        assert (double != 0).sum() > 10


def test_the_hessian_has_no_rows() -> None:
    with pytest.raises(UnsupportedError, match="hessian is not a sum of outer products"):
        next(row_batches(case("mlp").problem, Hessian(), ["0.bias"]))


def test_the_scale_of_monte_carlo_rows() -> None:
    outputs, targets = torch.zeros(2, 3), torch.zeros(2, 3)
    for samples in (1, 4):
        quantity = Fisher(samples=samples)
        rows = output_covectors(
            get_likelihood("binary_cross_entropy"), quantity, outputs, targets, label_stream(quantity)
        )[:]
        # At logit zero every gradient is one half in size, whatever the label.
        assert torch.allclose(rows.square().sum(dim=1), torch.full((2, 3), 0.25))


def test_listing_layers_leaves_no_hook() -> None:
    model = AlsoFunctional().double()
    problem = Problem(model, "cross_entropy", (torch.randn(5, 4), torch.zeros(5, dtype=torch.int64)))
    linear_layers(problem)
    assert not any(module._forward_hooks or module._forward_hooks_with_kwargs for module in model.modules())
