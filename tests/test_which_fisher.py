"""Formulas of other libraries, compared with the quantities that they equal or approximate.

Each formula is written out here in a few lines of plain PyTorch; the table of docs/concepts/which-fisher.md states the
factors that are tested.
"""

from copy import deepcopy

import numpy as np
import pytest
import torch
from models_under_test import CLASSES, Case, N, case
from torch import Tensor, nn
from torch.nn import functional as F

from curvlab.estimators import estimate
from curvlab.problem import Problem
from curvlab.quantities import EmpiricalFisher, Fisher, MaSQ

# Formulas ------------------------------------------------------------------------------------------------------------


def squared_gradient(model: nn.Module, loss: Tensor) -> Tensor:
    gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    return torch.cat([g.reshape(-1) for g in gradients]).square()


def avalanche_importances(model: nn.Module, x: Tensor, y: Tensor, batch_size: int) -> Tensor:
    """Avalanche, EWCPlugin: squares of the gradients of mini-batch means, divided by the number of batches."""
    batches = list(zip(x.split(batch_size), y.split(batch_size), strict=True))
    return sum(squared_gradient(model, F.cross_entropy(model(a), b)) for a, b in batches) / len(batches)


def gmvandeven_fisher(model: nn.Module, x: Tensor, y: Tensor, labels: str, batch_size: int = 1) -> Tensor:
    """GMvandeVen/continual-learning, estimate_fisher: divided by the last index of its loop over batches."""
    total, index = 0, 0
    for index, (a, b) in enumerate(zip(x.split(batch_size), y.split(batch_size), strict=True)):  # noqa: B007
        outputs = model(a)
        if labels == "true":
            total = total + squared_gradient(model, F.cross_entropy(outputs, b))
        else:  # "all"
            weights = outputs.softmax(dim=1)[0].detach()
            for label, weight in enumerate(weights):
                total = total + weight * squared_gradient(model, F.cross_entropy(outputs, torch.tensor([label])))
    return total / index


def mammoth_fisher(model: nn.Module, x: Tensor, y: Tensor, batch_size: int) -> Tensor:
    """Mammoth, ewc_on: squares weighted by the probability of the data's label, divided by batches times batch size."""
    total = 0
    for a, b in zip(x.split(1), y.split(1), strict=True):
        loss = F.cross_entropy(model(a), b)
        total = total + torch.exp(-loss.detach()) * squared_gradient(model, loss)
    return total / (len(x.split(batch_size)) * batch_size)


def pyhessian_trace(hessian: Tensor, seed: int, tolerance: float = 1e-3, most: int = 100) -> tuple[float, int]:
    """PyHessian, trace: Hutchinson's, stopped as soon as a draw moves the running mean by less than the tolerance."""
    generator = torch.Generator().manual_seed(seed)
    draws: list[float] = []
    before = 0.0
    for _ in range(most):
        v = torch.randint(2, (len(hessian),), generator=generator).to(hessian) * 2 - 1
        draws.append(float(v @ hessian @ v))
        now = float(np.mean(draws))
        if abs(now - before) / (before + 1e-6) < tolerance:
            break
        before = now
    return now, len(draws)


# Beside ours ---------------------------------------------------------------------------------------------------------


def close(actual: Tensor, expected: Tensor) -> bool:
    return actual.shape == expected.shape and torch.allclose(actual, expected, rtol=1e-10, atol=0)


def diagonal(problem: Case | Problem, quantity: object) -> Tensor:
    return estimate(problem.problem if isinstance(problem, Case) else problem, quantity, "diag").diagonal()


@pytest.fixture
def whole() -> Case:
    return case("mlp")


@pytest.fixture(scope="module")
def trained() -> Case:
    """Return a network close to a minimum, where the mean gradient is small, as at the end of a task."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 4, dtype=torch.float64, generator=generator)
    y = (x @ torch.randn(4, CLASSES, dtype=torch.float64, generator=generator)).argmax(dim=1)
    y = torch.where(torch.rand(512, generator=generator) < 0.2, torch.randint(CLASSES, (512,), generator=generator), y)
    model = case("mlp").model
    optimiser = torch.optim.LBFGS(model.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimiser.step(closure)
    return Case(model, x, y, "cross_entropy")


@pytest.mark.parametrize("batch_size", [1, 2, 3, N])
def test_avalanche_is_masq(whole: Case, batch_size: int) -> None:
    theirs = avalanche_importances(whole.model, whole.inputs, whole.targets, batch_size)
    assert close(theirs, diagonal(whole, MaSQ(batch_size, "mean")))
    assert torch.allclose(theirs, diagonal(whole, EmpiricalFisher()), rtol=1e-10) == (batch_size == 1)


@pytest.mark.parametrize("batch_size", [16, 64])
def test_avalanche_near_a_minimum_is_the_fisher_over_the_batch_size(trained: Case, batch_size: int) -> None:
    """The meaning of a strength depends on the batch size with which it was tuned."""
    theirs = avalanche_importances(trained.model, trained.inputs, trained.targets, batch_size)
    ratio = float(theirs.sum() / diagonal(trained, EmpiricalFisher()).sum())
    assert 0.7 < ratio * batch_size < 1.3
    # Of all partitions into batches, the mean is known; without a gradient of the mean it is this.
    gradient = trained.gradients().mean(dim=0).square().sum()
    fisher = diagonal(trained, EmpiricalFisher()).sum()
    n = len(trained.inputs)
    expected = gradient + (fisher - gradient) * (n - batch_size) / (batch_size * (n - 1))
    assert abs(float(theirs.sum() / expected) - 1) < 0.3


@pytest.mark.parametrize(("labels", "quantity"), [("all", Fisher()), ("true", EmpiricalFisher())])
def test_gmvandeven_divides_by_one_less(whole: Case, labels: str, quantity: object) -> None:
    theirs = gmvandeven_fisher(whole.model, whole.inputs, whole.targets, labels)
    assert close(theirs, N / (N - 1) * diagonal(whole, quantity))


def test_gmvandeven_in_batches_is_masq(whole: Case) -> None:
    theirs = gmvandeven_fisher(whole.model, whole.inputs, whole.targets, "true", batch_size=3)
    batches = -(-N // 3)
    assert close(theirs, batches / (batches - 1) * diagonal(whole, MaSQ(3, "mean")))


def test_mammoth_keeps_one_term_of_the_exact_fisher(whole: Case) -> None:
    theirs = mammoth_fisher(whole.model, whole.inputs, whole.targets, batch_size=3)
    probabilities = whole.model(whole.inputs).softmax(dim=1).detach()
    labels = range(CLASSES)
    terms = [mammoth_fisher(whole.model, whole.inputs, torch.full((N,), c), batch_size=3) for c in labels]
    padded = 3 * -(-N // 3)  # the last batch counts as a full one
    assert close(sum(terms), N / padded * diagonal(whole, Fisher()))
    assert bool((theirs <= N / padded * diagonal(whole, Fisher()) * (1 + 1e-12)).all())
    weights = probabilities.gather(1, whole.targets.unsqueeze(1))
    assert close(theirs, (weights * whole.gradients().square()).sum(dim=0) / padded)
    ratios = theirs / diagonal(whole, EmpiricalFisher())
    assert ratios.max() / ratios.min() > 1.2  # no factor turns it into the empirical Fisher


def test_mammoth_in_train_mode_is_random(whole: Case) -> None:
    """It leaves the network as training had it."""
    model = nn.Sequential(whole.model[0], nn.Dropout(), *whole.model[1:]).train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, second = (mammoth_fisher(model, whole.inputs, whole.targets, 3) for _ in range(2))
    assert not torch.allclose(first, second, rtol=0.01)


def test_pyhessian_stops_early(trained: Case) -> None:
    """The tolerance is 1e-3, but the error is that of a few draws."""
    hessian = estimate(trained.problem, "hessian", "dense").to_dense()
    trace = float(hessian.trace())
    runs = [pyhessian_trace(hessian, seed) for seed in range(100)]
    errors = np.array([abs(value / trace - 1) for value, _ in runs])
    assert np.median(errors) > 10e-3
    assert errors.max() > 0.1
    assert np.median([draws for _, draws in runs]) < 100
    # As many draws as its limit allows would do better: the rule is at fault, not the estimator.
    full = np.array([abs(pyhessian_trace(hessian, seed, tolerance=0.0)[0] / trace - 1) for seed in range(100)])
    assert np.sqrt((full**2).mean()) < 0.7 * np.sqrt((errors**2).mean())


def test_pyhessian_itself(trained: Case) -> None:
    pyhessian = pytest.importorskip("pyhessian")
    exact = float(estimate(trained.problem, "hessian", "diag").trace())
    model = deepcopy(trained.model)
    errors = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = pyhessian.hessian(model, nn.CrossEntropyLoss(), data=(trained.inputs, trained.targets), cuda=False)
        for _ in range(15):
            errors.append(abs(np.mean(theirs.trace()) / exact - 1))
    assert np.median(errors) > 10e-3


# Scales of the libraries ---------------------------------------------------------------------------------------------


def test_scales_of_backpack(whole: Case) -> None:
    backpack = pytest.importorskip("backpack")
    from backpack.extensions import BatchGrad, DiagGGNExact, SumGradSquared

    fisher, ggn = diagonal(whole, EmpiricalFisher()), diagonal(whole, "ggn")
    for reduction, of_squares, of_ggn in (("mean", 1 / N, 1.0), ("sum", float(N), float(N))):
        model = backpack.extend(deepcopy(whole.model))
        loss = backpack.extend(nn.CrossEntropyLoss(reduction=reduction))
        with backpack.backpack(BatchGrad(), SumGradSquared(), DiagGGNExact()):
            loss(model(whole.inputs), whole.targets).backward()
        flat = {
            name: torch.cat([getattr(p, name).reshape(-1) for p in model.parameters()])
            for name in ("sum_grad_squared", "diag_ggn_exact")
        }
        assert close(flat["sum_grad_squared"], of_squares * fisher)
        assert torch.allclose(flat["diag_ggn_exact"], of_ggn * ggn, rtol=1e-8)
        rows = torch.cat([p.grad_batch.flatten(1) for p in model.parameters()], dim=1)
        assert torch.allclose(rows * (N if reduction == "mean" else 1), whole.gradients(), rtol=1e-8)


def test_scale_of_torchs_mean_squared_error() -> None:
    whole = case("mlp squared error")

    def mean_loss(outputs: Tensor) -> Tensor:
        return F.mse_loss(outputs, whole.targets)

    jacobian = torch.stack(
        [
            torch.cat(
                [g.reshape(-1) for g in torch.autograd.grad(f, list(whole.model.parameters()), retain_graph=True)]
            )
            for f in whole.model(whole.inputs).reshape(-1)
        ]
    )
    hessian = torch.func.hessian(lambda f: mean_loss(f.view(N, CLASSES)))(
        whole.model(whole.inputs).detach().reshape(-1)
    )
    theirs = jacobian.mT @ hessian @ jacobian
    assert torch.allclose(theirs, 2 / CLASSES * estimate(whole.problem, "ggn", "dense").to_dense(), rtol=1e-8)
