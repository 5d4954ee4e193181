"""The parameter space: names, order, selection, flat vectors."""

import re
from functools import partial

import pytest
import torch
from models_under_test import case
from torch import Tensor, nn

from curvlab.errors import CurvlabError
from curvlab.estimators import estimate
from curvlab.parameters import ParameterSpace, Selection, to_plain_selection
from curvlab.problem import Problem


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


@pytest.mark.parametrize(
    ("select", "names"),
    [
        (re.compile(r"fc\d\.weight"), ("fc1.weight", "fc2.weight")),
        (re.compile("FC1.*", re.IGNORECASE), ("fc1.weight", "fc1.bias")),
        (lambda name, parameter: parameter.ndim == 1, ("fc1.bias", "fc2.bias", "out.bias")),
        (lambda name, parameter: name == "out.bias" and isinstance(parameter, nn.Parameter), ("out.bias",)),
        (partial(lambda key, name, parameter: key in name, "fc2"), ("fc2.weight", "fc2.bias")),
        (["out.bias", re.compile("fc1.*"), lambda name, parameter: "2.b" in name],) * 2,
        ((re.compile("out.*"), "*.bias"), ("fc1.bias", "fc2.bias", "out.weight", "out.bias")),
    ],
)
def test_selection_by_regular_expressions_and_functions(select: Selection, names: tuple[str, ...]) -> None:
    model = nn.ModuleDict({"fc1": nn.Linear(2, 2), "fc2": nn.Linear(2, 2), "out": nn.Linear(2, 1)})
    if isinstance(select, list):
        names = ("fc1.weight", "fc1.bias", "fc2.bias", "out.bias")
    assert ParameterSpace.of(model, select).names == names
    plain = to_plain_selection(select, model)
    assert list(plain) == list(names)
    assert ParameterSpace.of(model, plain).names == names


def test_a_function_sees_the_parameters_of_the_model_once_each_and_only_trainable_ones() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model[0].weight.requires_grad_(False)
    seen = []
    ParameterSpace.of(model, lambda name, parameter: seen.append((name, parameter)) is None)
    expected = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert [name for name, _ in seen] == [name for name, _ in expected]
    assert all(a is b for (_, a), (_, b) in zip(seen, expected, strict=True))


def test_names_in_place_of_functions_have_their_special_characters_escaped() -> None:
    model = nn.Module()
    model.register_parameter("w[0]", nn.Parameter(torch.ones(1)))
    model.register_parameter("w0", nn.Parameter(torch.ones(1)))
    plain = to_plain_selection(lambda name, parameter: "[" in name, model)
    assert ParameterSpace.of(model, plain).names == ("w[0]",)
    for other in ("w*", ["w0", "w*"], None, {}, 3, [torch.ones(1)], nn.Linear(1, 1)):
        assert to_plain_selection(other, model) is other


def test_estimates_take_every_selection() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    problem = Problem(model, "cross_entropy", (torch.randn(5, 2).double(), torch.tensor([0, 1, 1, 0, 1])))
    expected = estimate(problem, "fisher", "dense", params=["0.weight", "2.weight"])
    for select in (re.compile(r".*\.weight"), lambda name, parameter: parameter.ndim == 2):
        found = estimate(problem, "fisher", "dense", params=select)
        assert found.space == expected.space
        assert torch.equal(found.to_dense(), expected.to_dense())


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
    for wrong in (3, [None], b"0.*", re.compile(b"0.*"), nn.Linear, model, {0: "0.*"}, ["0.*", 1.5]):
        with pytest.raises(CurvlabError, match=r"params must be patterns of names.*regular expressions or functions"):
            ParameterSpace.of(model, wrong)
    with pytest.raises(CurvlabError, match=r"regular expression 'weight', which .* whole name, not a part of '0\.wei"):
        ParameterSpace.of(model, re.compile("weight"))
    with pytest.raises(CurvlabError, match=r"matches the regular expression 'fc'; the first one is '0\.weight'"):
        ParameterSpace.of(model, ["*", re.compile("fc")])
    with pytest.raises(CurvlabError, match=r"function in params selects none of the 4 .* first one is '0\.weight'"):
        ParameterSpace.of(model, ["*", lambda name, parameter: False])
    with pytest.raises(CurvlabError, match=r"must return a bool .* for 0\.weight it returned a .* tensor"):
        ParameterSpace.of(model, lambda name, parameter: parameter.sum() > 0)
    with pytest.raises(CurvlabError, match=r"takes two arguments, .*: too many positional"):
        ParameterSpace.of(model, lambda name: True)
    with pytest.raises(CurvlabError, match="Sequential has no trainable parameter"):
        ParameterSpace.of(model.requires_grad_(False))
