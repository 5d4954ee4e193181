"""The quadratic penalty: against its definition, task by task, and against automatic differentiation."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from curvlab.errors import CurvlabError
from curvlab.matrices import (
    EKFAC,
    KFAC,
    BlockDiagonal,
    Composite,
    CurvatureMatrix,
    Dense,
    Diagonal,
    Implicit,
    Info,
    Penalty,
)
from curvlab.parameters import ParameterSpace

INFO = Info("fisher", "any", "cross_entropy", "torch", 10)
Make = Callable[[ParameterSpace, int], CurvatureMatrix]


def model() -> nn.Module:
    """A convolution and two Linear layers, one without a bias."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2, bias=False)]
    return nn.Sequential(*layers).double()


def positive(size: int, generator: torch.Generator) -> Tensor:
    rows = torch.randn(size + 1, size, dtype=torch.float64, generator=generator)
    return rows.mT @ rows


def diagonal(space: ParameterSpace, seed: int) -> Diagonal:
    generator = torch.Generator().manual_seed(seed)
    return Diagonal(torch.rand(space.total, dtype=torch.float64, generator=generator), space, INFO)


def dense(space: ParameterSpace, seed: int) -> Dense:
    return Dense(positive(space.total, torch.Generator().manual_seed(seed)), space, INFO)


def block_diagonal(space: ParameterSpace, seed: int) -> BlockDiagonal:
    generator = torch.Generator().manual_seed(seed)
    blocks = {name: positive(size, generator) for name, size in zip(space.names, space.sizes, strict=True)}
    return BlockDiagonal(blocks, space, INFO)


def factors(space: ParameterSpace, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        layer: s for layer, s in {"0": (2, 5), "2": (3, 3), "4": (2, 3)}.items() if f"{layer}.weight" in space.names
    }
    tensors = {f"{layer}|A": positive(d, generator) for layer, (_, d) in sizes.items()}
    return tensors | {f"{layer}|S": positive(o, generator) for layer, (o, _) in sizes.items()}


def kfac(space: ParameterSpace, seed: int) -> KFAC:
    return KFAC.from_tensors(factors(space, seed), space, INFO)


def ekfac(space: ParameterSpace, seed: int) -> EKFAC:
    """Of another basis for every seed."""
    tensors = {}
    for name, factor in factors(space, seed).items():
        tensors[name.replace("|", "|U_")] = torch.linalg.eigh(factor).eigenvectors
    for layer in {name.partition("|")[0] for name in tensors}:
        o, d = len(tensors[f"{layer}|U_S"]), len(tensors[f"{layer}|U_A"])
        tensors[f"{layer}|values"] = torch.arange(1.0, o * d + 1, dtype=torch.float64).view(o, d)
    return EKFAC.from_tensors(tensors, space, INFO)


def composite(space: ParameterSpace, seed: int) -> Composite:
    first = space.restrict(("0.weight", "0.bias"))
    rest = space.restrict(set(space.names) - set(first.names))
    return Composite([diagonal(rest, seed), kfac(first, seed)], space, INFO)


def implicit(space: ParameterSpace, seed: int) -> Implicit:
    matrix = dense(space, seed)
    return Implicit(lambda v: matrix @ v, space, INFO, dtype=torch.float64)


ALL: dict[str, Make] = {f.__name__: f for f in (diagonal, dense, block_diagonal, kfac, ekfac, composite, implicit)}


def anchor(space: ParameterSpace, seed: int) -> Tensor:
    return torch.randn(space.total, dtype=torch.float64, generator=torch.Generator().manual_seed(100 + seed))


def expected(tasks: list[tuple[CurvatureMatrix, Tensor]], theta: Tensor) -> tuple[Tensor, Tensor]:
    """The definition: value and gradient."""
    ways = [(matrix.to_dense(), theta - mu) for matrix, mu in tasks]
    return sum(d @ f @ d for f, d in ways) / 2, sum(f @ d for f, d in ways)


def close(actual: Tensor, wanted: Tensor) -> bool:
    return actual.shape == wanted.shape and torch.allclose(
        actual, wanted, rtol=1e-10, atol=1e-10 * float(wanted.abs().max())
    )


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_value_and_gradient(make: Make, tasks: int) -> None:
    net = model()
    parameters = dict(net.named_parameters())
    space = ParameterSpace.of(net)
    past = [(make(space, seed), anchor(space, seed)) for seed in range(tasks)]
    penalty = Penalty()
    for matrix, mu in past:
        penalty.add(matrix, mu)
    theta = space.flatten(parameters).detach()
    value, gradient = expected(past, theta)

    assert close(penalty.value(parameters).detach(), value)
    by_autograd = torch.autograd.grad(penalty.value(parameters), list(parameters.values()))
    assert close(torch.cat([g.flatten() for g in by_autograd]), gradient)

    starts = {name: torch.randn_like(p) for name, p in parameters.items()}
    for name, p in parameters.items():
        p.grad = starts[name].clone()
    held = {name: p.grad for name, p in parameters.items()}
    penalty.add_gradient_(parameters, strength=3.0)
    assert all(p.grad is held[name] and not p.grad.requires_grad for name, p in parameters.items())
    assert close(space.flatten(held), space.flatten(starts) + 3 * gradient)
    assert torch.equal(space.flatten(parameters).detach(), theta)


@pytest.mark.parametrize(("make", "terms"), [(diagonal, 1), (dense, 1), (kfac, 1), (composite, 1), (ekfac, 4)])
def test_tasks_collapse_where_matrices_have_a_sum(make: Make, terms: int) -> None:
    space = ParameterSpace.of(model())
    penalty = Penalty()
    for seed in range(4):
        penalty.add(make(space, seed), anchor(space, seed))
    assert len(penalty._terms) == terms


def test_a_diagonal_costs_the_same_however_many_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    plain = Diagonal.add_product_
    monkeypatch.setattr(Diagonal, "add_product_", lambda *a, **k: (calls.append(1), plain(*a, **k))[1])
    space = ParameterSpace.of(model())
    penalty = Penalty()
    for seed in range(50):
        penalty.add(diagonal(space, seed), anchor(space, seed))
    penalty.add_gradient_(dict(model().named_parameters()))
    assert len(calls) == 1


def test_different_structures_and_spaces_live_together() -> None:
    """As where a strategy changes its mind, or a head comes later."""
    net = model()
    space = ParameterSpace.of(net)
    part = space.restrict(("2.weight", "2.bias"))
    past = [
        (kfac(space, 0), anchor(space, 0)),
        (diagonal(space, 1), anchor(space, 1)),
        (kfac(space, 2), anchor(space, 2)),
    ]
    penalty = Penalty()
    for matrix, mu in past:
        penalty.add(matrix, mu)
    small, mu = dense(part, 3), anchor(part, 3)
    penalty.add(small, part.unflatten(mu))
    parameters = dict(net.named_parameters())
    value, gradient = expected(past, space.flatten(parameters).detach())
    extra = torch.cat([parameters[name].detach().flatten() for name in part.names]) - mu
    assert close(penalty.value(parameters).detach(), value + small.quadratic_form(extra) / 2)
    penalty.add_gradient_(parameters)
    wanted = space.unflatten(gradient.clone())
    for name, g in part.unflatten(small @ extra).items():
        wanted[name] += g
    assert close(torch.cat([p.grad.flatten() for p in parameters.values()]), space.flatten(wanted))


def test_the_anchor_is_a_copy() -> None:
    net = model()
    space = ParameterSpace.of(net)
    penalty = Penalty()
    penalty.add(diagonal(space, 0), dict(net.named_parameters()))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1.0)
    value = penalty.value(dict(net.named_parameters()))
    assert close(value.detach(), diagonal(space, 0).trace() / 2)
    flat = space.flatten(dict(net.named_parameters())).detach()
    penalty.add(diagonal(space, 0), flat)
    before = penalty.value(dict(net.named_parameters()))
    flat.add_(3.0)
    assert torch.equal(penalty.value(dict(net.named_parameters())), before)


def test_other_names_are_ignored_and_missing_ones_refused() -> None:
    net = model()
    space = ParameterSpace.of(net)
    penalty = Penalty()
    parameters = dict(net.named_parameters())
    more = parameters | {"head.weight": nn.Parameter(torch.ones(2))}
    penalty.add(diagonal(space, 0), more)
    penalty.add_gradient_(more)
    assert more["head.weight"].grad is None
    assert penalty.value(more) == 0
    less = {name: p for name, p in parameters.items() if name != "2.bias"}
    for attempt in (penalty.value, penalty.add_gradient_, lambda p: penalty.add(diagonal(space, 0), p)):
        with pytest.raises(CurvlabError, match=r"missing for parameters of the matrix: 2\.bias"):
            attempt(less)
    single = {name: p.float() for name, p in parameters.items()}
    for attempt in (penalty.value, penalty.add_gradient_, lambda p: penalty.add(diagonal(space, 0), p)):
        with pytest.raises(CurvlabError, match=r"0\.weight is torch\.float32"):
            attempt(single)
    for wrong in (torch.ones(3), torch.ones(space.total, 2, dtype=torch.float64)):
        with pytest.raises(CurvlabError, match="vector"):
            penalty.add(diagonal(space, 0), wrong)


def test_without_tasks_there_is_no_penalty() -> None:
    net = model()
    penalty = Penalty()
    assert penalty.value(dict(net.named_parameters())) == 0
    penalty.add_gradient_(dict(net.named_parameters()))
    assert all(p.grad is None for p in net.parameters())


def test_gradients_that_are_not_there_are_made() -> None:
    net = model()
    space = ParameterSpace.of(net)
    penalty = Penalty()
    penalty.add(kfac(space, 0), anchor(space, 0))
    penalty.add_gradient_(dict(net.named_parameters()))
    _, gradient = expected([(kfac(space, 0), anchor(space, 0))], space.flatten(dict(net.named_parameters())).detach())
    assert close(torch.cat([p.grad.flatten() for p in net.parameters()]), gradient)


@pytest.mark.parametrize("make", [diagonal, kfac])
def test_near_the_last_anchor_float32_keeps_its_digits(make: Make) -> None:
    """There the sums of F and of F mu are each far larger than what they leave."""
    space = ParameterSpace.of(model())
    past = [(make(space, seed), anchor(space, seed)) for seed in (0, 1)]
    past[0] = (1e-6 * past[0][0], past[0][1])  # so that the penalty is small at the last anchor
    way = 1e-3 * anchor(space, 5).float().double()
    last = past[-1][1].float()
    theta = space.unflatten((last + way.float()).double())
    penalty = Penalty()
    for matrix, mu in past:
        penalty.add(matrix.to(dtype=torch.float32), mu.float())
    exact = [(matrix.to(dtype=torch.float32).to(dtype=torch.float64), mu.float().double()) for matrix, mu in past]
    value, gradient = expected(exact, space.flatten(theta))
    parameters = {name: nn.Parameter(t.float()) for name, t in theta.items()}
    assert torch.allclose(penalty.value(parameters).double(), value, rtol=1e-5)
    penalty.add_gradient_(parameters)
    actual = torch.cat([parameters[name].grad.flatten() for name in space.names]).double()
    assert (actual - gradient).norm() <= 1e-5 * gradient.norm()


def test_training_is_that_with_the_penalty_in_the_loss() -> None:
    x, y = torch.randn(8, 1, 2, 2, dtype=torch.float64), torch.randint(2, (8,))
    nets = [model(), deepcopy(model())]
    space = ParameterSpace.of(nets[0])
    penalty = Penalty()
    for seed in range(3):
        penalty.add(kfac(space, seed), anchor(space, seed))
    for net, in_place in zip(nets, (False, True), strict=True):
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
        parameters = dict(net.named_parameters())
        for _ in range(5):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            (loss if in_place else loss + 0.1 * penalty.value(parameters)).backward()
            if in_place:
                penalty.add_gradient_(parameters, strength=0.1)
            optimizer.step()
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        assert close(a.detach(), b.detach())


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision(make: Make, dtype: torch.dtype) -> None:
    """What is computed is that of the same weights in the matrix's dtype; the gradient is rounded at the end."""
    net = model().to(dtype)
    space = ParameterSpace.of(net)
    half = dict(net.named_parameters())
    wide = {name: p.detach().double().requires_grad_() for name, p in half.items()}
    of_half, of_wide = Penalty(), Penalty()
    for seed in range(2):
        mu = {name: t.to(dtype) for name, t in space.unflatten(anchor(space, seed)).items()}
        of_half.add(make(space, seed), mu)
        of_wide.add(make(space, seed), {name: t.double() for name, t in mu.items()})
    assert torch.equal(of_half.value(half), of_wide.value(wide))
    of_wide.add_gradient_(wide)
    eps = torch.finfo(dtype).eps
    for way in (lambda: of_half.value(half).backward(), lambda: of_half.add_gradient_(half)):
        net.zero_grad()
        way()
        for name, p in half.items():
            right = wide[name].grad
            assert p.grad.dtype == dtype
            assert (p.grad.double() - right).abs().max() <= 2 * eps * right.abs().max()  # a rounding a term
