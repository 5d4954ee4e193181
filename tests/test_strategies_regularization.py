"""Methods with a quadratic penalty, and IMM: against plain loops, their definitions, and cases with a closed form."""

import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvlab import estimate, linearize
from curvlab.continual.drop_transfer import drop_transfer
from curvlab.continual.learner import Learner
from curvlab.continual.loop import Result, run
from curvlab.continual.outputs import Head, Outputs
from curvlab.continual.strategies import EWC, IMM, L2, MAS, OSLA, SI, Naive, Strategy
from curvlab.continual.strategies.mas import sensitivity
from curvlab.continual.tasks import Task, permuted
from curvlab.data import Dataset, load
from curvlab.errors import CurvlabError, UnsupportedError
from curvlab.matrices import KFAC, Composite
from curvlab.models import build
from curvlab.problem import Problem

STRUCTURES = ["dense", "block_diag", "diag", "kfac", "ekfac", "tkfac"]


# What the tests are made of -------------------------------------------------------------------------------------------


def dataset(seed: int, size: int = 12, labels: Sequence[int] = (0, 1, 2), classes: int = 3) -> Dataset:
    """Return random samples of a task, at least one of each label."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, generator=generator)
    y = torch.tensor(labels)[torch.arange(size) % len(labels)]
    return Dataset(f"seed {seed}", x, y, x, y, classes=tuple(map(str, range(classes))))


def tasks(count: int, **options: Any) -> tuple[Task, ...]:
    return tuple(Task(f"task {seed}", dataset(seed, **options)) for seed in range(count))


def split(count: int) -> tuple[Task, ...]:
    """Return tasks of two classes each."""
    of = [(2 * i, 2 * i + 1) for i in range(count)]
    return tuple(
        Task(f"task {i}", dataset(i, labels=labels, classes=2 * count), classes=labels) for i, labels in enumerate(of)
    )


def mlp(outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


def learner_of(
    model: nn.Module, stream: Sequence[Task], head: Head = "single", loss: Any = "cross_entropy", task: int = 0
) -> Learner:
    outputs = Outputs(stream, head, len(list(model.parameters())[-1]), torch.device("cpu"))
    learner = Learner(model, stream, outputs, loss, 1.0, batch_size=10)
    learner.task = task
    return learner


def perturb(model: nn.Module, seed: int = 0) -> None:
    """Change the parameters at random, and clear the gradients."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
            p.grad = None


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def gradient(model: nn.Module) -> Tensor:
    return flat(p.grad for p in model.parameters() if p.grad is not None)


def penalty_gradient(strategy: Strategy, learner: Learner) -> Tensor:
    learner.model.zero_grad()
    for p in learner.model.parameters():
        p.grad = torch.zeros_like(p)
    strategy.after_backward(learner)
    return gradient(learner.model)


def full_batch(stream: Sequence[Task], model: nn.Module, strategy: Strategy, **options: Any) -> Result:
    """Run gradient descent on all samples of a task at once."""
    given = {"lr": 0.1, "steps": 10, "batch_size": 100, "progress": False} | options
    return run(stream, model, strategy, **given)


def losses(model: nn.Module, task: Task) -> Tensor:
    x, y = task.train
    return F.cross_entropy(model(x.double()), y, reduction="none")


Quadratic = Callable[[Tensor], Tensor]


def plain(
    stream: Sequence[Task],
    model: nn.Module,
    penalties_after: Callable[[nn.Module, Task, list[Quadratic]], list[Quadratic]],
    each_step: Callable[[Tensor, Tensor, Tensor], None] = lambda *_: None,
    lr: float = 0.1,
    steps: int = 10,
) -> None:
    """Train by automatic differentiation of the whole objective: loss plus penalties of the flat parameters."""
    parameters = list(model.parameters())
    penalties: list[Quadratic] = []
    for task in stream:
        for _ in range(steps):
            loss = losses(model, task).mean()
            alone = flat(torch.autograd.grad(loss, parameters, retain_graph=True))
            theta = torch.cat([p.reshape(-1) for p in parameters])
            objective = loss + sum(p(theta) for p in penalties)
            before = theta.detach().clone()
            gradients = torch.autograd.grad(objective, parameters)
            with torch.no_grad():
                for p, g in zip(parameters, gradients, strict=True):
                    p -= lr * g
            each_step(alone, before, flat(parameters))
        penalties = penalties_after(model, task, penalties)


def quadratic(matrix: Tensor, model: nn.Module, factor: float) -> Quadratic:
    centre = flat(model.parameters()).clone()
    return lambda theta: factor * (theta - centre) @ matrix @ (theta - centre)


def empirical_fisher(model: nn.Module, task: Task) -> Tensor:
    parameters = list(model.parameters())
    rows = torch.stack([flat(torch.autograd.grad(loss, parameters, retain_graph=True)) for loss in losses(model, task)])
    return rows.mT @ rows / len(rows)


# Elastic weight consolidation -----------------------------------------------------------------------------------------


class TestEWC:
    @pytest.mark.parametrize("quantity", ["fisher", "empirical_fisher", "masq:batch_size=5"])
    @pytest.mark.parametrize("structure", STRUCTURES)
    def test_the_gradient_is_strength_times_curvature_times_way(self, quantity: str, structure: str) -> None:
        if quantity.startswith("masq") and "kfac" in structure:
            return
        model, stream = mlp(), tasks(1)
        learner, x = learner_of(model, stream), stream[0].train[0].double()
        strategy = EWC(3.0, quantity=quantity, structure=structure)
        strategy.start(learner)
        strategy.after_task(learner)
        problem = Problem(model, "cross_entropy", (x, stream[0].train[1]))
        oracle = estimate(problem, quantity, structure, backend="torch").to_dense()
        before = flat(model.parameters())
        perturb(model)
        expected = 3.0 * oracle @ (flat(model.parameters()) - before)
        found = penalty_gradient(strategy, learner)
        assert found.abs().max() > 1e-3
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)

    def test_separate_is_a_plain_loop_with_a_penalty_a_task(self) -> None:
        mine, theirs, stream = mlp(), mlp(), tasks(3)
        full_batch(stream, mine, EWC(5.0))
        plain(
            stream,
            theirs,
            lambda model, task, penalties: [
                *penalties,
                quadratic(empirical_fisher(model, task).diag().diag(), model, 5.0 / 2),
            ],
        )
        torch.testing.assert_close(flat(mine.parameters()), flat(theirs.parameters()), rtol=1e-10, atol=1e-10)

    def test_online_is_a_plain_loop_with_one_penalty(self) -> None:
        mine, theirs, stream = mlp(), mlp(), tasks(3)
        full_batch(stream, mine, EWC(5.0, structure="dense", mode="online", gamma=0.7))
        matrix = torch.zeros(())

        def consolidate(model: nn.Module, task: Task, _: Any) -> list[Quadratic]:
            nonlocal matrix
            matrix = 0.7 * matrix + empirical_fisher(model, task)
            return [quadratic(matrix, model, 5.0 / 2)]

        plain(stream, theirs, consolidate)
        torch.testing.assert_close(flat(mine.parameters()), flat(theirs.parameters()), rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize(
        ("strategy", "weights"),
        [
            (EWC(5.0, structure="dense", mode="average"), lambda t: ((t - 1) / t, 1 / t)),
            (EWC(5.0, structure="dense", mode="moving_average", gamma=0.7), lambda t: (0.7, 0.3) if t > 1 else (0, 1)),
        ],
    )
    def test_averages_are_a_plain_loop_with_one_penalty(
        self, strategy: EWC, weights: Callable[[int], tuple[float, float]]
    ) -> None:
        mine, theirs, stream = mlp(), mlp(), tasks(3)
        full_batch(stream, mine, strategy)
        matrix, count = torch.zeros(()), 0

        def consolidate(model: nn.Module, task: Task, _: Any) -> list[Quadratic]:
            nonlocal matrix, count
            count += 1
            old, new = weights(count)
            matrix = old * matrix + new * empirical_fisher(model, task)
            return [quadratic(matrix, model, 5.0 / 2)]

        plain(stream, theirs, consolidate)
        torch.testing.assert_close(flat(mine.parameters()), flat(theirs.parameters()), rtol=1e-10, atol=1e-10)

    def test_plain_l2_is_a_plain_loop_with_the_identity(self) -> None:
        mine, theirs, stream = mlp(), mlp(), tasks(3)
        full_batch(stream, mine, L2(0.3))
        identity = torch.eye(len(flat(theirs.parameters()))).double()
        plain(stream, theirs, lambda model, *_: [quadratic(identity, model, 0.3 / 2)])
        torch.testing.assert_close(flat(mine.parameters()), flat(theirs.parameters()), rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("structure", ["dense", "diag", "kfac", "tkfac", "block_diag"])
    def test_online_without_decay_and_separate_agree_around_one_centre(self, structure: str) -> None:
        model, stream = mlp(), tasks(3)
        found = []
        for strategy in (EWC(2.0, structure=structure), EWC(2.0, structure=structure, mode="online")):
            learner = learner_of(model, stream)
            strategy.start(learner)
            for learner.task in range(3):
                strategy.after_task(learner)
            here = [p.detach().clone() for p in model.parameters()]
            perturb(model)
            found.append(penalty_gradient(strategy, learner))
            with torch.no_grad():
                for p, value in zip(model.parameters(), here, strict=True):
                    p.copy_(value)
        torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)

    def test_online_without_memory_keeps_the_factors_of_one_task(self) -> None:
        model, stream = mlp(), tasks(3)
        held = [r["bytes"] for r in full_batch(stream, model, EWC(5.0, structure="kfac", mode="online", gamma=0)).tasks]
        assert held[0] == held[1] == held[2]

    def test_parameters_that_are_not_selected_are_free(self) -> None:
        model, stream = mlp(), tasks(1)
        learner = learner_of(model, stream)
        strategy = EWC(1.0, params="0.*")
        strategy.start(learner)
        strategy.after_task(learner)
        perturb(model)
        found = penalty_gradient(strategy, learner)
        assert bool(found[:25].any())
        assert not bool(found[25:].any())

    def test_a_limit_of_samples_draws_them(self) -> None:
        model, stream = mlp(), tasks(1, size=50)
        learner = learner_of(model, stream)
        strategy = EWC(1.0, samples=7, mode="online")
        strategy.start(learner)
        learner.generator.manual_seed(3)
        strategy.after_task(learner)
        rows = torch.randperm(50, generator=torch.Generator().manual_seed(3))[:7]
        x, y = stream[0].train
        oracle = estimate(Problem(model, "cross_entropy", (x[rows].double(), y[rows])), "empirical_fisher", "diag")
        assert strategy.matrix is not None
        torch.testing.assert_close(strategy.matrix.diagonal(), oracle.diagonal(), rtol=1e-10, atol=1e-12)


# Learning one after another as if together ----------------------------------------------------------------------------


def joint_least_squares(stream: Sequence[Task]) -> Tensor:
    """Return the weight and the bias of the best linear model of all samples, ``(3, 5)``."""
    x = torch.cat([task.train[0] for task in stream]).double()
    y = F.one_hot(torch.cat([task.train[1] for task in stream]), 3).double()
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    return torch.linalg.lstsq(x, y).solution.mT


def linear_weights(model: nn.Module) -> Tensor:
    return torch.cat([model.weight.detach(), model.bias.detach()[:, None]], dim=1)


def least_squares(strategy: Strategy, count: int = 3) -> float:
    """Return the relative error of a linear model after training on tasks one after another."""
    torch.manual_seed(0)
    model, stream = nn.Linear(4, 3).double(), tasks(count, size=30)
    full_batch(stream, model, strategy, loss="squared_error", lr=0.4, steps=200)
    together = joint_least_squares(stream)
    return float((linear_weights(model) - together).norm() / together.norm())


class TestExactness:
    @pytest.mark.parametrize(
        "strategy",
        [
            EWC(1.0, quantity="hessian", structure="dense", mode="online"),
            EWC(1.0, quantity="ggn", structure="dense", mode="online"),
            OSLA(1.0, quantity="hessian", structure="dense"),
            # The factor S of a linear model with this loss is the identity: K-FAC and all of its sums are exact.
            *(OSLA(1.0, structure="kfac", merge=merge) for merge in ("exact", "average", "nearest")),
            *(OSLA(1.0, structure="tkfac:variant=rescaled", merge=merge) for merge in ("exact", "average", "nearest")),
            *(OSLA(1.0, structure="tkfac", merge=merge) for merge in ("exact", "nearest")),
        ],
    )
    def test_quadratic_tasks_one_after_another_give_the_joint_solution(self, strategy: Strategy) -> None:
        assert least_squares(strategy) < 1e-9

    def test_separate_is_exact_for_two_tasks_only(self) -> None:
        separate = EWC(1.0, quantity="ggn", structure="dense")
        assert least_squares(separate, count=2) < 1e-9
        assert least_squares(separate, count=3) > 1e-3

    def test_the_finer_the_curvature_the_nearer(self) -> None:
        errors = [
            least_squares(EWC(1.0, quantity="ggn", structure=s, mode="online")) for s in ("kfac", "block_diag", "diag")
        ]
        assert errors[0] < 1e-9 < errors[1] < errors[2] < least_squares(Naive())

    def test_a_linearized_network_learns_as_if_together(self) -> None:
        from curvlab.linearize import linearize

        stream = tasks(3, size=60)
        model = linearize(mlp())
        learner = learner_of(model, stream, loss="squared_error")
        strategy = OSLA(1.0, quantity="ggn", structure="dense")
        strategy.start(learner)
        for learner.task in range(3):
            for _ in range(2):  # a Newton step, and one that corrects rounding errors
                newton_step(learner, strategy)
            strategy.after_task(learner)
        problems = [learner_of(model, stream, loss="squared_error", task=t) for t in range(3)]
        slopes = []
        for one in problems:
            model.zero_grad()
            batch = one.samples()
            one.loss(model(batch.x), batch.y, batch.task).backward()
            slopes.append(gradient(model))
        # The gradient of the sum of all losses is zero; the gradients of single tasks are not.
        assert min(float(slope.norm()) for slope in slopes) > 1e-3
        assert float(torch.stack(slopes).sum(dim=0).norm()) < 1e-9


def newton_step(learner: Learner, strategy: OSLA) -> None:
    model = learner.model
    model.zero_grad()
    batch = learner.samples()
    learner.loss(model(batch.x), batch.y, batch.task).backward()
    strategy.after_backward(learner)
    with learner.problem() as problem:
        hessian = estimate(problem, "ggn", "dense").to_dense()
    if strategy.precision is not None:
        hessian = hessian + strategy.precision.to_dense()
    step = torch.linalg.lstsq(hessian, gradient(model)[:, None], driver="gelsd").solution[:, 0]
    with torch.no_grad():
        for p, part in zip(model.parameters(), step.split([p.numel() for p in model.parameters()]), strict=True):
            p -= part.view_as(p)


# Online structured Laplace --------------------------------------------------------------------------------------------


class TestOSLA:
    def learnt(self, merge: Any, structure: str = "kfac", model: nn.Module | None = None) -> Any:
        model = mlp() if model is None else model
        learner = learner_of(model, tasks(3))
        strategy = OSLA(2.0, structure=structure, merge=merge)
        strategy.start(learner)
        matrices = []
        for learner.task in range(3):
            perturb(model, seed=learner.task)
            with learner.problem() as problem:
                matrices.append(2.0 * estimate(problem, "fisher", structure))
            strategy.after_task(learner)
        return strategy, matrices, learner

    @pytest.mark.parametrize("structure", ["kfac", "tkfac"])
    def test_exact_is_the_sum(self, structure: str) -> None:
        strategy, (a, b, c), _ = self.learnt("exact", structure)
        expected = a.to_dense() + b.to_dense() + c.to_dense()
        torch.testing.assert_close(strategy.precision.to_dense(), expected, rtol=1e-10, atol=1e-12)

    def test_average_is_that_of_all_tasks(self) -> None:
        strategy, (a, b, c), _ = self.learnt("average")
        expected = (a + b + c).average_factors()
        assert all(len(f.A) == 1 for f in strategy.precision.factors.values())
        torch.testing.assert_close(strategy.precision.to_dense(), expected.to_dense(), rtol=1e-10, atol=1e-12)

    def test_nearest_is_that_of_the_last_one_and_the_new_one(self) -> None:
        strategy, (a, b, c), _ = self.learnt("nearest")
        expected = ((a + b).nearest() + c).nearest()
        assert all(len(f.A) == 1 for f in strategy.precision.factors.values())
        torch.testing.assert_close(strategy.precision.to_dense(), expected.to_dense(), rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("merge", ["exact", "average", "nearest"])
    def test_the_penalty_is_around_the_last_solution(self, merge: str) -> None:
        strategy, _, learner = self.learnt(merge)
        here = flat(learner.model.parameters())
        assert penalty_gradient(strategy, learner).abs().max() == 0
        perturb(learner.model, seed=9)
        expected = strategy.precision.to_dense() @ (flat(learner.model.parameters()) - here)
        torch.testing.assert_close(penalty_gradient(strategy, learner), expected, rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("merge", ["average", "nearest"])
    def test_parts_without_factors_are_added(self, merge: str) -> None:
        model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()
        strategy, matrices, _ = self.learnt(merge, "kfac:rest=diag", model)
        assert isinstance(strategy.precision, Composite)
        merged = [p for p in strategy.precision.parts if isinstance(p, KFAC)]
        rest = [p for p in strategy.precision.parts if not isinstance(p, KFAC)]
        assert all(len(factors.A) == 1 for factors in merged[0].factors.values())
        expected = sum(part.diagonal() for m in matrices for part in m.parts if not isinstance(part, KFAC))
        torch.testing.assert_close(rest[0].diagonal(), expected, rtol=1e-10, atol=1e-12)

    def test_weights_are_one_a_pair(self) -> None:
        _, (a, b, _), _ = self.learnt("exact")
        torch.testing.assert_close((a + b).average_factors((2, 2)).to_dense(), (a + b).average_factors().to_dense())
        with pytest.raises(
            CurvlabError, match="weights must have one number for each of the 2 pairs of factors, not 3"
        ):
            (a + b).average_factors((1, 1, 1))


# Synaptic intelligence ------------------------------------------------------------------------------------------------


class Recorded(SI):
    """SI that stores the path integrals of every task."""

    sums: list[float]

    def after_task(self, learner: Learner) -> None:
        self.sums.append(float(sum(part.sum() for part in self.path.values())))
        super().after_task(learner)


class TestSI:
    @staticmethod
    def path(lr: float) -> tuple[float, float]:
        """Return the path integral over a fixed time, and the decrease of the loss."""
        torch.manual_seed(0)
        model, stream = nn.Linear(4, 3).double(), tasks(1, size=30)
        x, y = stream[0].train[0].double(), F.one_hot(stream[0].train[1], 3).double()

        def loss() -> float:
            return float((model(x) - y).square().sum().detach() / (2 * len(x)))

        before = loss()
        Recorded.sums = []
        full_batch(stream, model, Recorded(1.0), loss="squared_error", lr=lr, steps=round(4 / lr))
        return Recorded.sums[0], before - loss()

    def test_the_path_integral_is_the_fall_of_the_loss_as_steps_shrink(self) -> None:
        errors = []
        for lr in (0.1, 0.05, 0.025):
            path, fall = self.path(lr)
            errors.append(path - fall)
            assert path == pytest.approx(fall, rel=3 * lr)
        # It is half the sum of the steps' quadratic forms, which is linear in the step.
        assert errors[0] / errors[1] == pytest.approx(2, abs=0.1)
        assert errors[1] / errors[2] == pytest.approx(2, abs=0.05)

    def test_it_is_a_plain_loop(self) -> None:
        mine, theirs, stream = mlp(), mlp(), tasks(3)
        full_batch(stream, mine, SI(0.5, xi=0.01))
        omega, path, start = torch.zeros(()), torch.zeros(()), flat(theirs.parameters()).clone()

        def step(alone: Tensor, before: Tensor, after: Tensor) -> None:
            nonlocal path
            path = path - alone * (after - before)

        def consolidate(model: nn.Module, _: Task, __: Any) -> list[Quadratic]:
            nonlocal omega, path, start
            end = flat(model.parameters()).clone()
            omega = (omega + path / ((end - start) ** 2 + 0.01)).clamp(min=0)
            path, start = torch.zeros(()), end
            return [quadratic(omega.diag(), model, 0.5)]

        plain(stream, theirs, consolidate, step)
        assert bool(omega.any())
        torch.testing.assert_close(flat(mine.parameters()), flat(theirs.parameters()), rtol=1e-10, atol=1e-10)

    def test_steps_up_the_loss_give_no_negative_importance(self) -> None:
        model, stream = nn.Linear(4, 3).double(), tasks(1, size=30)
        best = joint_least_squares(stream)
        with torch.no_grad():
            model.weight.copy_(best[:, :4])
            model.bias.copy_(best[:, 4])
        kept: list[Tensor] = []

        class Kept(SI):
            def after_task(self, learner: Learner) -> None:
                kept.append(self.space.flatten(self.path))
                super().after_task(learner)
                kept.append(self.omega)

        # At the minimum of the loss, weight decay increases the loss.
        full_batch(stream, model, Kept(1.0), loss="squared_error", weight_decay=1.0)
        path, omega = kept
        assert bool((path < 0).any())
        assert bool((path > 0).any())
        assert torch.equal(omega > 0, path > 0)
        assert float(omega.min()) == 0.0

    def test_clipping_and_weight_decay_have_no_part_in_the_gradient_of_the_path(self) -> None:
        torch.manual_seed(0)
        model, stream = mlp(), tasks(1)
        Recorded.sums = []
        before = flat(model.parameters()).clone()
        loss = losses(model, stream[0]).mean()
        slope = flat(torch.autograd.grad(loss, list(model.parameters())))
        full_batch(stream, model, Recorded(1.0), steps=1, clip_norm=0.01, weight_decay=0.3)
        change = flat(model.parameters()) - before
        assert Recorded.sums[0] == pytest.approx(float(-(slope * change).sum()), rel=1e-10)


# Memory aware synapses ------------------------------------------------------------------------------------------------


def slow_sensitivity(model: nn.Module, x: Tensor) -> Tensor:
    parameters = list(model.parameters())
    rows = [flat(torch.autograd.grad(model(sample[None]).square().sum(), parameters)).abs() for sample in x]
    return torch.stack(rows).mean(dim=0)


class TestMAS:
    @pytest.mark.parametrize(
        "layers",
        [
            [nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)],
            [nn.Linear(16, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 3)],
            [nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)],
            [nn.Unflatten(1, (4, 4)), nn.Linear(4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)],
        ],
    )
    def test_sensitivity_is_that_of_one_sample_after_another(self, layers: list[nn.Module]) -> None:
        model, x = nn.Sequential(*layers).double(), torch.randn(7, 16, dtype=torch.float64)
        problem = Problem(model, "cross_entropy", [(x[:5], torch.zeros(5).long()), (x[5:], torch.ones(2).long())])
        found = sensitivity(problem, problem.space)
        torch.testing.assert_close(found, slow_sensitivity(model, x), rtol=1e-10, atol=1e-12)

    def test_sensitivity_of_a_linearized_network_is_had_layer_by_layer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, x = linearize(mlp()), torch.randn(7, 4, dtype=torch.float64)
        perturb(model)
        monkeypatch.delattr("curvlab.continual.strategies.mas.row_batches")  # forces the slow implementation
        problem = Problem(model, "cross_entropy", (x, torch.zeros(7).long()))
        expected = slow_sensitivity(model, x)
        torch.testing.assert_close(sensitivity(problem, problem.space), expected, rtol=1e-10, atol=1e-12)

    def test_it_is_a_plain_loop(self) -> None:
        mine, theirs, stream = mlp(), mlp(), tasks(3)
        full_batch(stream, mine, MAS(0.3))
        omega = torch.zeros(())

        def consolidate(model: nn.Module, task: Task, _: Any) -> list[Quadratic]:
            nonlocal omega
            omega = omega + slow_sensitivity(model, task.train[0].double())
            return [quadratic(omega.diag(), model, 0.3)]

        plain(stream, theirs, consolidate)
        torch.testing.assert_close(flat(mine.parameters()), flat(theirs.parameters()), rtol=1e-10, atol=1e-10)

    def test_outputs_that_do_not_count_have_no_part(self) -> None:
        model, stream = mlp(4), split(2)
        learner = learner_of(model, stream, "masked", task=1)
        strategy = MAS(1.0)
        strategy.start(learner)
        strategy.after_task(learner)
        of_task = nn.Sequential(model, nn.Identity())
        x = stream[1].train[0].double()
        of_task[1] = type("Last", (nn.Module,), {"forward": lambda _, outputs: outputs[:, 2:]})()
        assert strategy.omega is not None
        torch.testing.assert_close(strategy.omega, slow_sensitivity(of_task, x), rtol=1e-10, atol=1e-12)

    def test_a_limit_of_samples_draws_them(self) -> None:
        model, stream = mlp(), tasks(1, size=50)
        learner = learner_of(model, stream)
        strategy = MAS(1.0, samples=7)
        strategy.start(learner)
        learner.generator.manual_seed(3)
        strategy.after_task(learner)
        rows = torch.randperm(50, generator=torch.Generator().manual_seed(3))[:7]
        expected = slow_sensitivity(model, stream[0].train[0][rows].double())
        assert strategy.omega is not None
        torch.testing.assert_close(strategy.omega, expected, rtol=1e-10, atol=1e-12)

    def test_only_selected_parameters_are_held(self) -> None:
        model, stream = mlp(), tasks(1)
        learner = learner_of(model, stream)
        strategy = MAS(1.0, params=["2.bias", "0.weight"])
        strategy.start(learner)
        strategy.after_task(learner)
        whole = slow_sensitivity(model, stream[0].train[0].double())
        assert strategy.omega is not None
        torch.testing.assert_close(strategy.omega, torch.cat([whole[:20], whole[-3:]]), rtol=1e-10, atol=1e-12)


# Incremental moment matching ------------------------------------------------------------------------------------------


def axes(seed: int) -> Dataset:
    """Return samples on the coordinate axes, whose least squares problem has a diagonal Hessian."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.eye(4).repeat(3, 1) * (0.5 + torch.rand(12, 1, generator=generator))
    y = torch.randint(3, (12,), generator=generator)
    y[:3] = torch.arange(3)
    return Dataset(f"axes {seed}", x, y, x, y, classes=("0", "1", "2"))


class TestIMM:
    def test_mode_is_exact_on_quadratics(self) -> None:
        model = nn.Linear(4, 3, bias=False).double()
        stream = [Task(str(seed), axes(seed)) for seed in range(3)]
        full_batch(stream, model, IMM("mode", quantity="ggn"), loss="squared_error", lr=1.0, steps=300)
        x = torch.cat([task.train[0] for task in stream]).double()
        y = F.one_hot(torch.cat([task.train[1] for task in stream]), 3).double()
        joint = torch.linalg.lstsq(x, y).solution.mT
        # 1e-8 is added to entries of about 0.25.
        torch.testing.assert_close(model.weight.detach(), joint, rtol=1e-6, atol=1e-7)
        other = nn.Linear(4, 3, bias=False).double()
        full_batch(stream, other, IMM("mean"), loss="squared_error", lr=1.0, steps=300)
        assert (other.weight - joint).abs().max() > 1e-2

    @pytest.mark.parametrize("mode", ["mean", "mode"])
    def test_training_is_naive_and_the_network_the_merged_one(self, mode: Any) -> None:
        mine, theirs, stream = mlp(), mlp(), tasks(3)
        solutions: list[Tensor] = []
        weights: list[Tensor] = []
        merged: list[Tensor] = []

        def keep(learner: Learner) -> dict[str, Any]:
            solutions.append(flat(learner.model.parameters()).clone())
            with learner.problem() as problem:
                weights.append(estimate(problem, "fisher", "diag", backend="torch").diagonal() + 1e-8)
            return {}

        full_batch(stream, theirs, Naive(), observe=keep)

        def see(learner: Learner) -> dict[str, Any]:
            merged.append(flat(learner.model.parameters()).clone())
            return {}

        full_batch(stream, mine, IMM(mode), observe=see)
        for count in (1, 2, 3):
            of = torch.stack(weights[:count]) if mode == "mode" else torch.ones(count, 1).double()
            expected = (of * torch.stack(solutions[:count])).sum(dim=0) / of.sum(dim=0)
            torch.testing.assert_close(merged[count - 1], expected, rtol=1e-10, atol=1e-12)
        assert torch.equal(flat(mine.parameters()), merged[-1])

    def test_l2_transfer_is_a_plain_loop(self) -> None:
        mine, theirs, stream = mlp(), mlp(), tasks(2)
        solutions: list[Tensor] = []

        def consolidate(model: nn.Module, _: Task, __: Any) -> list[Quadratic]:
            solutions.append(flat(model.parameters()).clone())
            return [quadratic(torch.eye(len(solutions[-1]), dtype=torch.float64), model, 0.4)]

        full_batch(stream, mine, IMM("mean", l2=0.4))
        plain(stream, theirs, consolidate)
        torch.testing.assert_close(flat(mine.parameters()), sum(solutions) / 2, rtol=1e-10, atol=1e-12)

    def test_drop_transfer_drops_inputs_to_earlier_weights(self) -> None:
        layer, earlier, x = nn.Linear(5, 3).double(), torch.randn(3, 5).double(), torch.randn(7, 5).double()
        with drop_transfer(layer, {"weight": earlier}, 0.3):
            torch.manual_seed(1)
            found = layer(x)
            layer.eval()
            assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        layer.train()
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))  # the hooks are gone
        torch.manual_seed(1)
        kept = F.dropout(torch.ones(7, 5).double(), 0.3) > 0
        for row, mask, output in zip(x, kept, found, strict=True):
            weight = torch.where(mask, (layer.weight - 0.3 * earlier) / 0.7, earlier)
            torch.testing.assert_close(output, weight @ row + layer.bias, rtol=1e-12, atol=1e-12)

    def test_drop_transfer_changes_the_second_task_alone(self) -> None:
        ends: list[list[Tensor]] = []
        for drop in (0.0, 0.5):
            seen: list[Tensor] = []

            def see(learner: Learner, seen: list[Tensor] = seen) -> dict[str, Any]:
                seen.append(flat(learner.model.parameters()).clone())
                return {}

            full_batch(tasks(2), mlp(), IMM("mean", drop=drop), observe=see)
            ends.append(seen)
        assert torch.equal(ends[0][0], ends[1][0])
        assert not torch.equal(ends[0][1], ends[1][1])

    def test_drop_transfer_needs_a_linear_layer(self) -> None:
        with (
            pytest.raises(CurvlabError, match="drop-transfer is for linear layers"),
            drop_transfer(nn.Conv1d(1, 1, 1), {"weight": torch.ones(1, 1, 1)}, 0.5),
        ):
            pass

    @pytest.mark.parametrize(
        ("earlier", "rate", "message"),
        [
            (
                {"weight": torch.ones(1, 2)},
                float("nan"),
                "rate of drop-transfer must be at least 0 and below 1, not nan",
            ),
            ({"weight": torch.ones(1, 2)}, None, "rate of drop-transfer must be at least 0 and below 1, not None"),
            ({"weight": torch.ones(1, 3)}, 0.5, r"the earlier weight must be a .* shape \(1, 2\) .* shape \(1, 3\)"),
            ({"weight": torch.ones(1, 2).double()}, 0.5, r"the earlier weight must be .*float32 .* not .*float64"),
            ({"weight": None}, 0.5, "the earlier weight must be .* not None"),
            (None, 0.5, "earlier must be a dict of tensors by parameter name, not None"),
        ],
    )
    def test_arguments_of_drop_transfer(self, earlier: Any, rate: Any, message: str) -> None:
        with pytest.raises(CurvlabError, match=message), drop_transfer(nn.Linear(2, 1), earlier, rate):
            pass

    def test_heads_that_are_not_merged_stay(self) -> None:
        mine, theirs, stream = mlp(4), mlp(4), split(2)
        full_batch(stream, mine, IMM("mean", params="0.*"), head="multi")
        full_batch(stream, theirs, Naive(), head="multi")
        assert torch.equal(mine[2].weight, theirs[2].weight)
        assert not torch.equal(mine[0].weight, theirs[0].weight)

    def test_negative_weights_are_refused(self) -> None:
        with pytest.raises(CurvlabError, match=r"the diagonal of hessian has negative entries.*use fisher"):
            full_batch(tasks(1), mlp(), IMM("mode", quantity="hessian"), steps=1)


# All of them ----------------------------------------------------------------------------------------------------------

ALL: dict[str, Strategy] = {
    "ewc": EWC(3.0),
    "ewc kfac": EWC(3.0, quantity="fisher", structure="kfac"),
    "ewc ekfac": EWC(3.0, quantity="fisher:samples=1", structure="ekfac", samples=8),
    "ewc tkfac": EWC(3.0, structure="tkfac"),
    "ewc masq": EWC(3.0, quantity="masq:batch_size=4"),
    "ewc online": EWC(3.0, structure="kfac", mode="online", gamma=0.5),
    "ewc average": EWC(3.0, mode="average"),
    "ewc moving average": EWC(3.0, mode="moving_average", gamma=0.5),
    "l2": L2(0.1, params="*weight"),
    "si": SI(1.0),
    "mas": MAS(0.1, samples=9),
    "imm mean": IMM("mean", l2=0.01),
    "imm mode": IMM("mode"),
    "imm drop": IMM("mode", drop=0.3),
    "osla": OSLA(1.0),
    "osla average": OSLA(1.0, merge="average"),
    "osla nearest": OSLA(1.0, structure="tkfac", merge="nearest"),
}


class TestAll:
    @pytest.mark.parametrize(
        "strategy",
        [EWC(0.0), EWC(0.0, structure="kfac", mode="online"), SI(0.0), L2(0.0), MAS(0.0), OSLA(0.0, merge="nearest")],
    )
    def test_without_strength_they_are_naive_to_the_bit(self, strategy: Strategy) -> None:
        mine, theirs = mlp().float(), mlp().float()
        options = {"batch_size": 5, "momentum": 0.9, "weight_decay": 0.01, "clip_norm": 1.0}
        results = [full_batch(tasks(3), m, s, **options) for m, s in ((mine, strategy), (theirs, Naive()))]
        assert torch.equal(flat(mine.parameters()), flat(theirs.parameters()))
        assert torch.equal(*(result.accuracy.nan_to_num(-1) for result in results))

    @pytest.mark.parametrize("name", ALL)
    def test_a_run_that_stopped_goes_on_to_the_same_bits(self, name: str, tmp_path: Path) -> None:
        options: dict[str, Any] = {"optimizer": "adam", "lr": 0.01, "batch_size": 5}

        def dropping() -> nn.Module:
            model = mlp().float()
            model[1] = nn.Sequential(nn.Tanh(), nn.Dropout(0.2))
            return model

        class StoppedError(Exception):
            pass

        def stop(learner: Learner) -> dict[str, Any]:
            if learner.task == 2:
                raise StoppedError
            return {}

        whole, parts = dropping(), dropping()
        expected = full_batch(tasks(4), whole, ALL[name], **options)
        file = tmp_path / "run.pt"
        with pytest.raises(StoppedError):
            full_batch(tasks(4), parts, ALL[name], observe=stop, checkpoint=file, **options)
        again = dropping()
        found = full_batch(tasks(4), again, ALL[name], checkpoint=file, **options)
        assert found.resumed_at == 2
        assert torch.equal(flat(again.parameters()), flat(whole.parameters()))
        assert torch.equal(found.accuracy.nan_to_num(-1), expected.accuracy.nan_to_num(-1))
        held = [[record["bytes"] for record in result.tasks] for result in (found, expected)]
        assert held[0] == held[1]

    @pytest.mark.parametrize("make", [partial(L2, 0.1), partial(EWC, 3.0), partial(MAS, 0.1), partial(IMM, "mode")])
    def test_a_run_with_another_selection_does_not_go_on(self, make: Callable[..., Strategy], tmp_path: Path) -> None:
        """A checkpoint keeps names in place of functions and regular expressions, and compares them."""
        options: dict[str, Any] = {"batch_size": 5}
        selections = (lambda name, p: p.ndim == 2, re.compile(".*weight"), lambda name, p: p.ndim == 1)
        file = tmp_path / "run.pt"
        models = [mlp().float() for _ in range(4)]
        full_batch(tasks(2), models[0], make(params=["0.weight", "2.weight"]), **options)
        for model, select in zip(models[1:3], selections[:2], strict=True):  # the second run ends where the first did
            full_batch(tasks(2), model, make(params=select), checkpoint=file, **options)
            assert torch.equal(flat(model.parameters()), flat(models[0].parameters()))
        with pytest.raises(CurvlabError, match=r"0\.weight.*0\.bias|0\.bias.*0\.weight"):
            full_batch(tasks(2), models[3], make(params=selections[2]), checkpoint=file, **options)

    @pytest.mark.parametrize("head", ["masked", "multi", "growing"])
    @pytest.mark.parametrize("name", ALL)
    def test_they_learn_with_every_head(self, name: str, head: Head) -> None:
        model = mlp(6)
        before = model[2].weight.detach().clone()
        result = full_batch(split(3)[:2] if head == "masked" else split(3), model, ALL[name], head=head, lr=0.02)
        assert bool(result.accuracy.diagonal().isfinite().all())
        assert float((model[2].weight.detach() - before).abs().max()) < 10
        if head == "masked":  # rows of inactive outputs
            assert torch.equal(model[2].weight[4:], before[4:])

    @pytest.mark.parametrize(
        ("strategy", "vectors"),
        [
            (EWC(1.0), 3),
            (EWC(1.0, mode="online"), 2),
            (EWC(1.0, mode="average"), 2),
            (EWC(1.0, mode="moving_average", gamma=0.5), 2),
            (L2(1.0), 1),
            (SI(1.0), 2),
            (MAS(1.0), 2),
            (IMM("mean"), 2),
            (IMM("mode"), 3),
        ],
    )
    def test_they_hold_what_they_say(self, strategy: Strategy, vectors: int) -> None:
        model = mlp()
        size = 8 * len(flat(model.parameters()))
        for record in full_batch(tasks(3), model, strategy).tasks[1:]:
            assert vectors * size <= record["bytes"] <= vectors * size + 100

    @pytest.mark.parametrize(
        "strategy",
        [
            EWC(2.0, quantity="fisher"),
            EWC(2.0, quantity="masq:batch_size=100"),
            EWC(2.0, quantity="fisher", structure="kfac"),
            EWC(2.0, quantity="fisher", structure="ekfac"),
            EWC(2.0, quantity="fisher", structure="tkfac"),
            OSLA(2.0, merge="nearest"),
            SI(0.1),
            MAS(0.01),
            IMM("mode"),
        ],
        ids=lambda strategy: type(strategy).__name__,
    )
    def test_they_forget_less_than_naive_fine_tuning(self, strategy: Strategy) -> None:
        assert digits(strategy) > naive_on_digits() + 0.05


def digits(strategy: Strategy) -> float:
    """Return the mean accuracy after four permutations of the digits."""
    torch.manual_seed(0)
    model = build("mlp", (1, 8, 8), 10, hidden=(32,))
    stream = permuted(load("digits"), tasks=4)
    return float(run(stream, model, strategy, epochs=6, lr=0.1, batch_size=32, progress=False).accuracy[-1].mean())


@cache
def naive_on_digits() -> float:
    return digits(Naive())


class TestHeads:
    """The matrix has all parameters of the network, and is zero for rows of inactive outputs."""

    @pytest.mark.parametrize("head", ["single", "masked", "multi", "growing"])
    @pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
    def test_it_is_that_of_the_loss_that_is_minimised(self, head: Head, loss: str) -> None:
        stream, model = split(3), mlp(6)
        learner = learner_of(model, stream, head, loss, task=1)
        batch = learner.samples()
        rows = [
            flat(
                torch.autograd.grad(
                    learner.loss(model(batch.x[n : n + 1]), batch.y[n : n + 1], 1),
                    list(model.parameters()),
                )
            )
            for n in range(len(batch.x))
        ]
        oracle = torch.stack(rows).mT @ torch.stack(rows) / len(rows)
        strategy = EWC(1.0, structure="dense", mode="online")
        strategy.start(learner)
        strategy.after_task(learner)
        assert strategy.matrix is not None
        torch.testing.assert_close(strategy.matrix.to_dense(), oracle, rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("backend", ["hooks", "torch", "backpack", "nngeometry", "curvlinops", "auto"])
    @pytest.mark.parametrize("head", ["single", "masked", "multi", "growing"])
    def test_kronecker_factors_have_the_size_of_the_whole_head(self, head: Head, backend: str) -> None:
        stream, model = split(3), nn.Linear(4, 6).double()
        learner = learner_of(model, stream, head, "squared_error", task=1)
        counting = {"single": range(6), "masked": (2, 3), "multi": (2, 3), "growing": range(4)}[head]
        counts = torch.zeros(6, dtype=torch.float64)
        counts[list(counting)] = 1
        x = torch.cat([stream[1].train[0].double(), torch.ones(12, 1)], dim=1)
        strategy = EWC(1.0, quantity="fisher", structure="kfac", backend=backend, mode="online")
        try:
            strategy.start(learner)
        except UnsupportedError:
            assert backend not in ("auto", "hooks", "torch")
            return
        strategy.after_task(learner)
        assert isinstance(strategy.matrix, KFAC)
        moment = x.mT @ x / len(x)
        # S (x) A over (row, column and bias), which is exact here; flat vectors have the bias last.
        dense = torch.kron(counts.diag(), moment).view(6, 5, 6, 5)
        found = strategy.matrix.to_dense()
        weights = found[:24, :24].view(6, 4, 6, 4)
        torch.testing.assert_close(weights, dense[:, :4, :, :4], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found[24:, 24:], dense[:, 4, :, 4], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found[:24, 24:].view(6, 4, 6), dense[:, :4, :, 4], rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("backend", ["hooks", "backpack", "nngeometry", "curvlinops"])
    @pytest.mark.parametrize("structure", STRUCTURES)
    def test_every_backend_is_right_or_refuses(self, backend: str, structure: str) -> None:
        stream, model = split(3), mlp(6)
        learner = learner_of(model, stream, "masked", task=1)
        try:
            strategy = EWC(1.0, quantity="fisher", structure=structure, backend=backend)
            strategy.start(learner)
        except UnsupportedError:
            assert backend != "hooks"
            return
        with learner.problem() as problem:
            found = estimate(problem, "fisher", structure, backend=backend)
            oracle = estimate(problem, "fisher", structure, backend="torch")
        torch.testing.assert_close(found.to_dense(), oracle.to_dense(), rtol=1e-10, atol=1e-10)


class TestRefusals:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: EWC(-1.0), "strength must be a number of at least 0, not -1.0"),
            (lambda: EWC(float("nan")), "strength must be a number of at least 0, not nan"),
            (lambda: EWC(float("inf")), "strength must be a number of at least 0, not inf"),
            (lambda: EWC(1.0, mode="both"), "mode must be separate, online, average or moving_average, not 'both'"),
            (lambda: EWC(1.0, mode="moving_average"), "set gamma below 1"),
            (lambda: L2(-1.0), "strength must be a number of at least 0"),
            (lambda: EWC(1.0, gamma=0.5), "gamma belongs to mode='online' and mode='moving_average'"),
            (lambda: EWC(1.0, mode="average", gamma=0.5), "gamma belongs to mode='online'"),
            (lambda: EWC(1.0, mode="online", gamma=1.5), "gamma must be a number of at least 0 and at most 1, not 1.5"),
            (lambda: EWC("1"), "strength must be a number of at least 0, not '1'"),  # type: ignore[arg-type]
            (lambda: EWC(None), "strength must be a number of at least 0, not None"),  # type: ignore[arg-type]
            (lambda: EWC(1.0, samples=0), "samples must be a whole number from 1, not 0"),
            (lambda: EWC(1.0, samples=1.5), r"samples must be a whole number from 1, not 1\.5"),
            (lambda: EWC(1.0, structure="implicit"), "an implicit matrix .* use a structure that is stored"),
            (lambda: EWC(1.0, structure="ekfac", mode="online"), "is not an ekfac matrix: use kfac"),
            (lambda: EWC(1.0, structure="full"), "full"),
            (lambda: EWC(1.0, quantity="fischer"), "fischer"),
            (lambda: EWC(1.0, quantity="masq", structure="kfac"), "no backend computes masq as kfac"),
            (lambda: EWC(1.0, backend="numpy"), "numpy"),
            (lambda: OSLA(-0.1), "strength must be a number of at least 0"),
            (lambda: OSLA(1.0, merge="sum"), "merge must be exact, average or nearest, not 'sum'"),
            (lambda: OSLA(1.0, structure="ekfac"), "is not an ekfac matrix"),
            (lambda: OSLA(1.0, structure="diag", merge="average"), "diag does not have: its sums are exact"),
            (lambda: SI(-1.0), "strength must be a number of at least 0"),
            (lambda: SI(1.0, xi=0.0), "xi must be a positive number, not 0.0"),
            (lambda: MAS(-1.0), "strength must be a number of at least 0"),
            (lambda: MAS(1.0, samples=-3), "samples must be a whole number from 1"),
            (lambda: IMM("median"), "mode must be mean or mode, not 'median'"),
            (lambda: IMM(l2=-1.0), "l2 must be a number of at least 0"),
            (lambda: IMM(drop=1.0), "drop must be below 1, not 1.0"),
        ],
    )
    def test_invalid_options(self, make: Callable[[], Strategy], message: str) -> None:
        with pytest.raises(CurvlabError, match=message):
            make()

    @pytest.mark.parametrize(
        ("strategy", "message"),
        [
            (EWC(1.0, structure="kfac:rest=none"), "kfac:rest=none needs"),
            (OSLA(1.0, structure="kfac:rest=none"), "kfac:rest=none needs"),
            (IMM("mode", structure="kfac:rest=none"), "kfac:rest=none needs"),
            (EWC(1.0, params="fc*"), r"no trainable parameter matches 'fc\*'"),
            (L2(1.0, params="fc*"), r"no trainable parameter matches 'fc\*'"),
            (SI(1.0, params="fc*"), r"no trainable parameter matches 'fc\*'"),
            (MAS(1.0, params="fc*"), r"no trainable parameter matches 'fc\*'"),
            (IMM("mean", params="fc*"), r"no trainable parameter matches 'fc\*'"),
            (IMM("mean", params="1.*", drop=0.5), "drop-transfer is for linear layers; .*: set drop to 0"),
        ],
    )
    def test_what_does_not_fit_the_network_is_refused_before_the_first_step(
        self, strategy: Strategy, message: str
    ) -> None:
        model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()
        before = flat(model.parameters()).clone()
        with pytest.raises(CurvlabError, match=message):
            full_batch(tasks(2), model, strategy)
        assert torch.equal(flat(model.parameters()), before)

    def test_drop_transfer_of_convolutions_is_refused_before_the_first_step(self) -> None:
        model = nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 3, 4), nn.Flatten()).double()
        before = flat(model.parameters()).clone()
        with pytest.raises(
            UnsupportedError, match="Sequential has no linear layer with earlier weights: set drop to 0"
        ):
            full_batch(tasks(2), model, IMM("mean", drop=0.5))
        assert torch.equal(flat(model.parameters()), before)
        full_batch(tasks(2), model, IMM("mean"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "strategy",
    [
        *(lambda structure=structure: EWC(1.0, structure=structure) for structure in STRUCTURES),
        *(lambda: EWC(1.0, mode="online"), lambda: SI(1.0), lambda: MAS(1.0), lambda: OSLA(1.0), lambda: IMM("mode")),
        *(lambda: EWC(1.0, mode="average"), lambda: L2(1.0)),
    ],
)
def test_networks_in_half_precision(strategy: Callable[[], Strategy], dtype: torch.dtype) -> None:
    """A run equals the run in float32 up to rounding."""
    finals = []
    for of in (dtype, torch.float32):
        model = mlp().to(of)
        run(tasks(2), model, strategy(), steps=4, lr=0.05, progress=False)
        assert all(p.dtype == of for p in model.parameters())
        finals.append(flat(model.parameters()).float())
    assert torch.allclose(*finals, rtol=0, atol=8 * torch.finfo(dtype).eps)
