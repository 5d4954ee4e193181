"""Tests that an estimate changes no state: not the random state, the warning filters or the model."""

import warnings
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from curvlab.errors import CurvlabError
from curvlab.estimators import BACKENDS, estimate, registry
from curvlab.problem import Problem
from curvlab.quantities import QUANTITIES

Y = torch.arange(5) % 3
COMBINATIONS = [
    (b, q, s) for b, backend in BACKENDS.items() for q in QUANTITIES for s in backend.structures.get(QUANTITIES[q], ())
]


def pooled():
    return nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8, 3))


def hooked():
    model = pooled()
    model[0].register_forward_hook(lambda _, __, output: output * 2)
    model[4].register_forward_pre_hook(lambda _, given: (given[0] + 1,))
    model[4].register_full_backward_hook(lambda *_: None)
    return model


def pruned():
    model = pooled()
    prune.l1_unstructured(model[4], "weight", 0.5)
    return model


def parametrised():
    model = pooled()
    parametrizations.orthogonal(model[4])
    return model


class Wrapped(nn.Module):
    """Names of parameters as with DataParallel, without its devices."""

    def __init__(self):
        super().__init__()
        self.module = pooled()

    def forward(self, *given, **named):
        return self.module(*given, **named)


class Failing(nn.Module):
    """Function whose backward pass fails."""

    def forward(self, x):
        return _Fails.apply(x)


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(_, x):
        return x * 1

    @staticmethod
    def backward(_, __):
        raise ZeroDivisionError("in the backward pass")


def failing():
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 4), Failing(), nn.Linear(4, 3))


MODELS = {f.__name__: f for f in (pooled, hooked, pruned, parametrised, Wrapped, failing)}


def attributes(model):
    """Return all attributes of the modules and parameters of a model, except the values of the parameters."""

    def describe_value(value):
        if isinstance(value, torch.Tensor):  # what pruning sets at every call
            return value.is_leaf, value.requires_grad
        return dict(value) if isinstance(value, dict) else value

    found = {name: {k: describe_value(v) for k, v in vars(module).items()} for name, module in model.named_modules()}
    own = {name: (id(p), sorted(vars(p)), p.requires_grad, p.grad) for name, p in model.named_parameters()}
    return found, own


def copies(model):
    try:
        return bool(deepcopy(model))
    except RuntimeError:
        return False


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_left(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    problem = Problem(model, "cross_entropy", (torch.randn(5, 1, 6, 6), Y))
    weights, copied = deepcopy(model.state_dict()), copies(model)
    before, random, filters = attributes(model), torch.get_rng_state(), list(warnings.filters)
    done = 0
    for backend, quantity, structure in COMBINATIONS:
        try:
            matrix = estimate(problem, quantity, structure, backend=backend)
            if structure == "implicit":
                matrix @ torch.ones(matrix.shape[1])
            done += 1
        except CurvlabError as error:
            told = str(error)
            assert "\n" not in told
        except ZeroDivisionError:  # the user's own
            assert name == "failing"
        where = (backend, quantity, structure)
        assert torch.equal(random, torch.get_rng_state()), where
        assert warnings.filters == filters, where
        assert attributes(model) == before, where
    assert name == "failing" or done > 20
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key]), key
    assert copies(model) == copied


def test_filters_that_a_library_adds_do_not_stay(monkeypatch):
    def adding(*arguments):
        warnings.simplefilter("once", FutureWarning)
        return BACKENDS["hooks"].compute(*arguments)

    monkeypatch.setattr(registry, "BACKENDS", BACKENDS | {"hooks": replace(BACKENDS["hooks"], compute=adding)})
    filters = list(warnings.filters)
    estimate(Problem(nn.Linear(4, 3), "cross_entropy", (torch.randn(5, 4), Y)), "fisher", "diag", backend="hooks")
    assert warnings.filters == filters
