"""Copies that are trained side by side, against one training after another in plain PyTorch."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from curvlab.continual.copies import train_copies
from curvlab.errors import CurvlabError
from curvlab.models import mlp
from curvlab.randomness import derive_seed

X, Y = torch.rand(23, 4, dtype=torch.float64), torch.arange(23) % 3
OPTIONS = {"lr": 0.01, "steps": 12, "every": 5, "batch_size": 10, "seed": 3}


@pytest.fixture
def model():
    return mlp(4, (6, 5), 3).double()


def train_alone(model, weights):
    """Return the parameters after a training with the penalty in the loss, and the accuracy after some steps."""
    start = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    optimizer = torch.optim.Adam(model.parameters(), lr=OPTIONS["lr"])
    order, accuracies = [], []
    for step in range(1, OPTIONS["steps"] + 1):
        if not len(order):
            order = torch.randperm(len(X), generator=torch.Generator().manual_seed(derive_seed(3, step)))
        batch, order = order[:10], order[10:]
        moved = nn.utils.parameters_to_vector(model.parameters()) - start
        loss = F.cross_entropy(model(X[batch]), Y[batch]) + 0.5 * (weights * moved**2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (5, 10, 12):
            accuracies.append(float((model(X).argmax(1) == Y).double().mean()))
    return nn.utils.parameters_to_vector(model.parameters()).detach(), accuracies


def test_every_copy_is_what_a_training_alone_gives(model):
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    total = sum(p.numel() for p in model.parameters())
    weights = torch.stack([torch.zeros(total), 10 * torch.rand(total), torch.full((total,), 1e4)]).double()
    trained = train_copies(model, (X, Y), weights, evaluation={"all": (X, Y)}, **OPTIONS)
    assert trained.steps == [5, 10, 12]
    assert all(torch.equal(p, start[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    ends = []
    for copy, row in enumerate(weights):
        model.load_state_dict(start)
        end, accuracies = train_alone(model, row)
        mine = torch.cat([tensor[copy].flatten() for tensor in trained.parameters.values()])
        assert torch.allclose(mine, end, rtol=0, atol=1e-10)
        assert trained.accuracy["all"][:, copy].tolist() == pytest.approx(accuracies)
        ends.append(end)
    assert not torch.allclose(ends[0], ends[1], atol=1e-3)


def test_a_copy_that_diverges_has_no_accuracy_and_spoils_no_other(model):
    total = sum(p.numel() for p in model.parameters())
    weights = torch.zeros(2, total, dtype=torch.float64)
    alone = train_copies(model, (X, Y), weights[:1], evaluation={"all": (X, Y)}, **OPTIONS)
    weights[1] = math.nan
    both = train_copies(model, (X, Y), weights, evaluation={"all": (X, Y)}, **OPTIONS)
    assert both.accuracy["all"][:, 0].tolist() == alone.accuracy["all"][:, 0].tolist()
    assert bool(both.accuracy["all"][:, 1].isnan().all())


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"lr": 0.0}, "lr must be above 0"),
        ({"steps": 0}, "steps must be a whole number from 1"),
        ({"every": 0.5}, "every must be a whole number from 1"),
        ({"batch_size": 0}, "batch_size must be a whole number from 1"),
        ({"weights": torch.zeros(7)}, r"weights must have shape \(copies, 83\), not \(7,\)"),
    ],
)
def test_what_is_refused(model, changed, words):
    given = {"weights": torch.zeros(1, 83), **OPTIONS} | changed
    with pytest.raises(CurvlabError, match=words):
        train_copies(model, (X, Y), evaluation={}, **given)
