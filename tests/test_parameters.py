"""The parameter space: names, order, selection, flat vectors."""

import pytest
import torch
from models_under_test import case
from torch import Tensor, nn

from curvlab.errors import CurvlabError
from curvlab.parameters import ParameterSpace


def test_order_is_that_of_named_parameters() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1, bias=False))
    space = ParameterSpace.of(model)
    assert space.names == ("0.weight", "0.bias", "1.weight")
    assert space.shapes == ((3, 2), (3,), (1, 3))
    assert space.total == 12
    assert space.slices == {"0.weight": slice(0, 6), "0.bias": slice(6, 9), "1.weight": slice(9, 12)}


def test_tied_once_frozen_never() -> None:
    assert [n for n in ParameterSpace.of(case("tied").model).names if "weight" in n] == ["first.weight", "out.weight"]
    assert ParameterSpace.of(case("frozen").model).names == ("0.bias", "4.weight")


def test_selection_keeps_the_models_order() -> None:
    model = nn.ModuleDict({"fc1": nn.Linear(2, 2), "fc2": nn.Linear(2, 2), "out": nn.Linear(2, 1)})
    assert ParameterSpace.of(model, "fc*.weight").names == ("fc1.weight", "fc2.weight")
    assert ParameterSpace.of(model, ["out.*", "fc1.bias"]).names == ("fc1.bias", "out.weight", "out.bias")


def test_flatten_and_unflatten_are_inverse() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    space = ParameterSpace.of(model)
    flat = torch.arange(float(space.total))
    named = space.unflatten(flat)
    assert torch.equal(named["0.weight"], torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]))
    assert torch.equal(space.flatten(dict(reversed(named.items()))), flat)
    columns = torch.stack([flat, -flat], dim=1)
    assert torch.equal(space.flatten(columns), columns)
    assert torch.equal(space.unflatten(columns[:, 1])["1.bias"], torch.tensor([-12.0]))


@pytest.mark.parametrize(
    ("vectors", "told"),
    [
        (torch.zeros(8), r"\(9,\) or \(9, K\).*\(8,\)"),
        (torch.zeros(9, 1, 1), r"\(9, 1, 1\)"),
        ({"weight": torch.zeros(3, 2)}, "missing.*bias"),
        ({"weight": torch.zeros(3, 2), "bias": torch.zeros(3), "scale": torch.zeros(1)}, "unknown.*scale"),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(3)}, r"weight must have shape \(3, 2\).*\(2, 3\)"),
    ],
)
def test_vectors_of_another_space_are_refused(vectors: object, told: str) -> None:
    with pytest.raises(CurvlabError, match=told):
        ParameterSpace.of(nn.Linear(2, 3)).flatten(vectors)


@pytest.mark.parametrize("vector", [torch.zeros(8), torch.zeros(10), torch.zeros(9, 1), torch.zeros(()), None])
def test_parts_of_a_vector_of_another_size_are_refused(vector: Tensor) -> None:
    with pytest.raises(CurvlabError, match=r"a vector of this space has shape \(9,\), not"):
        ParameterSpace.of(nn.Linear(2, 3)).unflatten(vector)


def test_bad_selections_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    with pytest.raises(CurvlabError, match=r"'1\.wieght'.*did you mean '1\.weight'"):
        ParameterSpace.of(model, ["0.*", "1.wieght"])
    with pytest.raises(CurvlabError, match="params is empty"):
        ParameterSpace.of(model, [])
    with pytest.raises(CurvlabError, match="Sequential has no trainable parameter"):
        ParameterSpace.of(model.requires_grad_(False))
