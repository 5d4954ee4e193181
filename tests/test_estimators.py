"""Tests of the reference estimator against closed forms, definitions and plain loops, never against itself."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from math import sqrt
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from models_under_test import CLASSES, ZOO, Case, N, case, plain_loss
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from curvlab import estimators
from curvlab.errors import CurvlabError, UnsupportedError
from curvlab.estimators.covectors import label_stream, output_covectors
from curvlab.estimators.verification import kronecker_layers
from curvlab.problem import BatchSource, Pair, Problem
from curvlab.quantities import GGN, EmpiricalFisher, Fisher, Hessian, MaSQ, Quantity

estimate = partial(estimators.estimate, backend="torch")

LOSSES = ("cross_entropy", "squared_error", "binary_cross_entropy")
ROWS = (EmpiricalFisher(), Fisher(), Fisher(samples=2, seed=1), GGN())
ALL = (*ROWS, MaSQ(3), Hessian())


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-10) -> bool:
    """Return whether tensors agree relative to the largest entry."""
    return actual.shape == expected.shape and bool((actual - expected).abs().max() <= rtol * expected.abs().max())


def linear_model(loss: str) -> Case:
    """Return a linear model, whose curvature is known in closed form."""
    generator = torch.Generator().manual_seed(3)
    model = nn.Linear(4, CLASSES).double()
    inputs = torch.randn(N, 4, dtype=torch.float64, generator=generator)
    targets = {
        "cross_entropy": torch.randint(CLASSES, (N,), generator=generator),
        "squared_error": torch.randn(N, CLASSES, dtype=torch.float64, generator=generator),
        "binary_cross_entropy": torch.rand(N, CLASSES, dtype=torch.float64, generator=generator),
    }[loss]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    return Case(model, inputs, targets, loss)


def mlp_case(loss: str) -> Case:
    return case(
        {"cross_entropy": "mlp", "squared_error": "mlp squared error", "binary_cross_entropy": "mlp binary"}[loss]
    )


class TestLinearModel:
    """With ``J_n = [I (x) x_n', I]`` (rows of the weight, then the bias) all matrices have a closed form."""

    def jacobians(self, problem: Case) -> list[np.ndarray]:
        eye = np.eye(CLASSES)
        return [np.hstack([np.kron(eye, x[None]), eye]) for x in problem.inputs.numpy()]

    def output_fisher(self, loss: str, f: np.ndarray) -> np.ndarray:
        if loss == "cross_entropy":
            p = np.exp(f) / np.exp(f).sum()
            return np.diag(p) - np.outer(p, p)
        if loss == "squared_error":
            return np.eye(CLASSES)
        p = 1 / (1 + np.exp(-f))
        return np.diag(p * (1 - p))

    @pytest.mark.parametrize("loss", LOSSES)
    @pytest.mark.parametrize("quantity", [Fisher(), GGN(), Hessian()])
    def test_fisher_ggn_and_hessian_agree_with_the_closed_form(self, loss: str, quantity: Quantity) -> None:
        problem = linear_model(loss)
        outputs = problem.model(problem.inputs).detach().numpy()
        expected = np.mean(
            [j.T @ self.output_fisher(loss, f) @ j for j, f in zip(self.jacobians(problem), outputs, strict=True)],
            axis=0,
        )
        assert close(estimate(problem.problem, quantity, "dense").to_dense(), torch.from_numpy(expected))

    @pytest.mark.parametrize("loss", LOSSES)
    def test_empirical_fisher(self, loss: str) -> None:
        problem = linear_model(loss)
        outputs, targets = problem.model(problem.inputs).detach().numpy(), problem.targets.numpy()
        if loss == "cross_entropy":
            p = np.exp(outputs)
            errors = p / p.sum(axis=1, keepdims=True) - np.eye(CLASSES)[targets]
        else:
            errors = (outputs if loss == "squared_error" else 1 / (1 + np.exp(-outputs))) - targets
        gradients = np.stack([j.T @ e for j, e in zip(self.jacobians(problem), errors, strict=True)])
        expected = torch.from_numpy(gradients.T @ gradients / N)
        assert close(estimate(problem.problem, "empirical_fisher", "dense").to_dense(), expected)

    def test_squared_error_is_kronecker(self) -> None:
        problem = linear_model("squared_error")
        second_moment = problem.inputs.mT @ problem.inputs / N
        weight = estimate(problem.problem, "fisher", "block_diag").blocks["weight"]
        assert close(weight, torch.kron(torch.eye(CLASSES, dtype=torch.float64), second_moment))


@pytest.mark.parametrize("loss", LOSSES)
class TestDefinitions:
    """A small MLP, with another computation than the estimator's."""

    def test_ggn_is_the_exact_fisher(self, loss: str) -> None:
        problem = mlp_case(loss)
        fisher, ggn = (estimate(problem.problem, q, "dense").to_dense() for q in ("fisher", "ggn"))
        jacobian = torch.func.jacrev(lambda p: functional_call(problem.model, p, problem.inputs))(
            {n: p.detach() for n, p in problem.model.named_parameters()}
        )
        flat = torch.cat([j.flatten(2) for j in jacobian.values()], dim=2)
        outputs = problem.model(problem.inputs).detach()
        curvature = torch.stack(
            [
                torch.func.hessian(lambda f, y=y: plain_loss(loss, f[None], y[None]).sum())(f)
                for f, y in zip(outputs, problem.targets, strict=True)
            ]
        )
        expected = torch.einsum("nci,ncd,ndj->ij", flat, curvature, flat) / N
        assert close(ggn, expected)
        assert close(fisher, expected)

    def test_hessian(self, loss: str) -> None:
        problem = mlp_case(loss)
        space = problem.problem.space
        flat = space.flatten({n: p.detach() for n, p in problem.model.named_parameters()})

        def mean_loss(vector: Tensor) -> Tensor:
            outputs = functional_call(problem.model, space.unflatten(vector), problem.inputs)
            return plain_loss(loss, outputs, problem.targets).mean()

        hessian = estimate(problem.problem, "hessian", "dense", batch_size=3).to_dense()
        assert close(hessian, torch.func.hessian(mean_loss)(flat))
        slope = torch.func.grad(mean_loss)
        step = 1e-5 * torch.eye(space.total, dtype=flat.dtype)[7]
        assert close(hessian[7], (slope(flat + step) - slope(flat - step)) / 2e-5, rtol=1e-7)

    def test_monte_carlo_fisher_is_unbiased(self, loss: str) -> None:
        samples = 3 if loss == "squared_error" else 1
        problem = linear_model(loss)
        problem = Problem(problem.model, loss, (problem.inputs[:3], problem.targets[:3]))
        exact = estimate(problem, "fisher", "dense").to_dense()
        seeds = 200
        draws = torch.stack([estimate(problem, Fisher(samples, seed), "dense").to_dense() for seed in range(seeds)])
        traces = draws.diagonal(dim1=1, dim2=2).sum(dim=1)
        entries = [(0, 0), (1, 1), (0, 5), (13, 2), (14, 14)]
        for values, truth in [(traces, exact.trace()), *((draws[:, i, j], exact[i, j]) for i, j in entries)]:
            z = (values.mean() - truth) / (values.std() / sqrt(seeds))
            assert abs(z) < 4
        assert draws[0].ne(draws[1]).any()


class TestMaSQ:
    def squares(self, gradients: Tensor, batch: int, norm: str) -> Tensor:
        """The definitions, with the last batch uneven."""
        n, parts = len(gradients), gradients.split(batch)
        if norm == "sumsq":
            return torch.stack([g.sum(dim=0).square() for g in parts]).sum(dim=0) / n
        squares = torch.stack([g.mean(dim=0).square() for g in parts])
        return squares.mean(dim=0) if norm == "mean" else squares.sum(dim=0) / n

    @pytest.mark.parametrize("norm", ["sumsq", "mean", "scaled"])
    @pytest.mark.parametrize("batch", [1, 3, 5, N, 1000])
    def test_definition(self, batch: int, norm: str) -> None:
        problem = case("mlp")
        actual = estimate(problem.problem, MaSQ(batch, norm), "diag").diagonal()
        assert close(actual, self.squares(problem.gradients(), batch, norm))

    @pytest.mark.parametrize("norm", ["sumsq", "mean", "scaled"])
    def test_batches_of_one_are_the_empirical_fisher(self, norm: str) -> None:
        problem = case("mlp").problem
        masq, fisher = estimate(problem, MaSQ(1, norm), "dense"), estimate(problem, "empirical_fisher", "dense")
        assert close(masq.to_dense(), fisher.to_dense())

    def test_one_batch_is_the_squared_gradient(self) -> None:
        problem = case("mlp")
        gradient = problem.gradients().mean(dim=0)
        assert close(estimate(problem.problem, MaSQ(N, "mean"), "dense").to_dense(), gradient.outer(gradient))
        assert close(estimate(problem.problem, MaSQ(N, "sumsq"), "diag").diagonal(), N * gradient.square())

    def test_mean_over_random_partitions(self) -> None:
        """``E F^(B) = J^2 + (FIM - J^2) (N - B) / (B (N - 1))``."""
        whole = linear_model("cross_entropy")
        n, batch = 6, 2
        gradients = whole.gradients()[:n]
        square, fisher = gradients.mean(dim=0).square(), gradients.square().mean(dim=0)
        expected = square + (fisher - square) * (n - batch) / (batch * (n - 1))
        generator = torch.Generator().manual_seed(0)
        values = []
        for _ in range(400):
            order = torch.randperm(n, generator=generator)
            shuffled = Problem(whole.model, whole.loss, (whole.inputs[order], whole.targets[order]))
            values.append(estimate(shuffled, MaSQ(batch, "mean"), "diag").diagonal())
        drawn = torch.stack(values)
        z = (drawn.mean(dim=0) - expected) / (drawn.std(dim=0) / sqrt(len(values)))
        assert z.abs().max() < 4
        assert (expected / fisher).max() < 0.95  # the formula says something here


def uneven(x: Tensor, y: Tensor) -> BatchSource:
    return list(zip(x.split([3, 1, 3]), y.split([3, 1, 3]), strict=True))


def singles(x: Tensor, y: Tensor) -> BatchSource:
    return [[a, b] for a, b in zip(x.split(1), y.split(1), strict=True)]


def loader(x: Tensor, y: Tensor) -> BatchSource:
    return DataLoader(TensorDataset(x, y), batch_size=2)


class TestBatches:
    @pytest.mark.parametrize("split", [uneven, singles, loader])
    @pytest.mark.parametrize("quantity", ALL, ids=str)
    def test_the_split_changes_nothing(
        self, quantity: Quantity, split: Callable[[Tensor, Tensor], BatchSource]
    ) -> None:
        whole = case("mlp")
        expected = estimate(whole.problem, quantity, "dense")
        problem = Problem(whole.model, whole.loss, split(whole.inputs, whole.targets))
        actual = estimate(problem, quantity, "dense", batch_size=4)
        assert close(actual.to_dense(), expected.to_dense())
        assert close(estimate(problem, quantity, "dense").to_dense(), expected.to_dense())
        assert actual.info.num_samples == expected.info.num_samples == N

    @pytest.mark.parametrize("quantity", ROWS, ids=str)
    def test_the_split_changes_no_factor(self, quantity: Quantity) -> None:
        whole = case("mlp")
        for split in (uneven, loader):
            problem = Problem(whole.model, whole.loss, split(whole.inputs, whole.targets))
            for structure in ("kfac", "ekfac", "tkfac"):
                actual, expected = (estimate(p, quantity, structure).to_dense() for p in (problem, whole.problem))
                assert close(actual, expected)

    @pytest.mark.parametrize("quantity", [EmpiricalFisher(), MaSQ(3, "mean"), Fisher(samples=1)], ids=str)
    @pytest.mark.parametrize("generator", [None, torch.Generator().manual_seed(0)])
    def test_a_shuffling_loader_gives_the_same_twice(self, quantity: Quantity, generator: torch.Generator) -> None:
        whole = case("mlp")
        data = DataLoader(TensorDataset(whole.inputs, whole.targets), 2, shuffle=True, generator=generator)
        problem = Problem(whole.model, whole.loss, data)
        first, second = (estimate(problem, quantity, "dense").to_dense() for _ in range(2))
        assert torch.equal(first, second)
        if isinstance(quantity, EmpiricalFisher):
            assert close(first, estimate(whole.problem, quantity, "dense").to_dense())

    @pytest.mark.parametrize("quantity", [EmpiricalFisher(), MaSQ(3), MaSQ(3, "mean"), Hessian()], ids=str)
    def test_dropped_samples_do_not_count(self, quantity: Quantity) -> None:
        whole = case("mlp")
        data = DataLoader(TensorDataset(whole.inputs, whole.targets), batch_size=4, drop_last=True)
        actual = estimate(Problem(whole.model, whole.loss, data), quantity, "dense")
        seen = Problem(whole.model, whole.loss, (whole.inputs[:4], whole.targets[:4]))
        assert actual.info.num_samples == 4
        assert close(actual.to_dense(), estimate(seen, quantity, "dense").to_dense())


class TestZoo:
    @pytest.mark.parametrize("name", ZOO)
    def test_empirical_fisher_is_that_of_a_plain_loop(self, name: str) -> None:
        problem = case(name)
        gradients = problem.gradients()
        actual = estimate(problem.problem, "empirical_fisher", "diag", backend="torch")
        assert close(actual.diagonal(), gradients.square().mean(dim=0))

    # A step of finite differences may cross the kink of a ReLU; that of ResNet-20 takes long.
    @pytest.mark.parametrize("name", [name for name in ZOO if "relu" not in name and name != "resnet-20"])
    def test_hessian_is_the_derivative_of_the_gradient(self, name: str) -> None:
        problem = case(name)
        problem = Case(problem.model, problem.inputs[:3], problem.targets[:3], problem.loss)
        hessian = estimate(problem.problem, "hessian", "dense").to_dense()
        parameters = [p for p in problem.model.parameters() if p.requires_grad]
        for index in (0, len(parameters) - 1):
            start = sum(p.numel() for p in parameters[:index])
            entry, gradients = parameters[index].data.view(-1), []
            for step in (1e-5, -1e-5):
                entry[0] += step
                gradients.append(problem.gradients().mean(dim=0))
                entry[0] -= step
            column = (gradients[0] - gradients[1]) / 2e-5
            assert (hessian[start] - column).abs().max() < 1e-8


class LayerSample(NamedTuple):
    """A layer for one sample: inputs ``(T, d)``, output gradients ``(R, T, o)``, weight gradients ``(R, o, d)``."""

    inputs: Tensor
    slopes: Tensor
    gradients: Tensor


def layer_samples(whole: Case, quantity: Quantity) -> dict[str, list[LayerSample]]:
    """Return the factors by plain automatic differentiation on a copy, one sample, position and row at a time.

    The input at a position is the derivative of the first output channel there in that channel's weights. The positions
    of all calls are positions.
    """
    model, problem = deepcopy(whole.model), whole.problem
    layers = {name: model.get_submodule(name) for name in whole.kronecker}
    calls_of: dict[str, list[tuple[Tensor, Tensor]]] = {}  # output, and output of the layer alone

    def keep(name: str, arguments: Any, output: Tensor) -> Tensor:
        alone = layers[name].forward(next(iter(arguments)).detach().clone())
        calls_of.setdefault(name, []).append((output.requires_grad_(), alone))
        return output.clone()  # which may be changed in place

    for name, layer in layers.items():
        layer.register_forward_hook(
            lambda _, given, keywords, output, name=name: keep(name, [*given, *keywords.values()], output),
            with_kwargs=True,
        )
    samples: dict[str, list[LayerSample]] = {name: [] for name in layers}
    rng = label_stream(quantity)
    for x, y in zip(whole.inputs.clone().split(1), whole.targets.split(1), strict=True):
        calls_of.clear()
        outputs = model(x)
        rows = output_covectors(problem.loss, quantity, outputs.detach(), y, rng)[:][0]
        for name, layer in layers.items():

            def by_position(t: Tensor, layer: nn.Module = layer) -> Tensor:
                return t.movedim(-1 if isinstance(layer, nn.Linear) else 1, -1).flatten(0, -2)

            own = [p for p in (layer.weight, layer.bias) if p is not None and p.requires_grad]
            inputs = torch.stack([derivatives(f, own)[0] for _, t in calls_of[name] for f in by_position(t)[:, 0]])
            every = [output for output, _ in calls_of[name]]
            slopes = [
                torch.cat([by_position(g) for g in torch.autograd.grad(outputs[0] @ row, every, retain_graph=True)])
                for row in rows
            ]
            gradients = [derivatives(outputs[0] @ row, own) for row in rows]
            samples[name].append(LayerSample(inputs, torch.stack(slopes), torch.stack(gradients)))
    return samples


def derivatives(value: Tensor, parameters: list[Tensor]) -> Tensor:
    """In the homogeneous weight, ``(o, d)``."""
    gradients = torch.autograd.grad(value, parameters, retain_graph=True)
    return torch.cat([g.reshape(len(g), -1) for g in gradients], dim=1)


def mean(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).mean(dim=0)


def kronecker_tensors(whole: Case, quantity: Quantity, structure: str) -> dict[str, Tensor]:
    inside = [name for name in whole.problem.space.names if name.rpartition(".")[0] in whole.kronecker]
    return estimate(whole.problem, quantity, structure, params=inside).tensors()


KRONECKER = [name for name in ZOO if case(name).kronecker]


class TestKronecker:
    """Against the definitions, in plain loops."""

    @pytest.mark.parametrize("name", ZOO)
    def test_the_layers(self, name: str) -> None:
        problem = case(name).problem
        layers, reasons = kronecker_layers(problem, problem.space)
        assert {key for key in layers if "/" not in key} == case(name).kronecker
        inside = [parameter for layer in layers.values() for parameter in layer.parameters]
        assert sorted([*inside, *reasons]) == sorted(problem.space.names)

    @pytest.mark.parametrize("quantity", [EmpiricalFisher(), Fisher(samples=2, seed=1)], ids=str)
    @pytest.mark.parametrize("name", KRONECKER)
    def test_factors(self, name: str, quantity: Quantity) -> None:
        whole = case(name)
        whole = replace(whole, inputs=whole.inputs[:4], targets=whole.targets[:4])
        expand, reduce, gao, rescaled, ekfac = (
            kronecker_tensors(whole, quantity, structure)
            for structure in ("kfac", "kfac:sharing=reduce", "tkfac", "tkfac:variant=rescaled", "ekfac")
        )
        for layer, samples in layer_samples(whole, quantity).items():
            a_n = [mean(a.outer(a) for a in s.inputs) for s in samples]
            s_n = [sum(g.outer(g) for row in s.slopes for g in row) for s in samples]
            assert close(expand[f"{layer}|A"][0], mean(a_n))
            assert close(expand[f"{layer}|S"][0], mean(s_n))
            assert close(reduce[f"{layer}|A"][0], mean(s.inputs.mean(0).outer(s.inputs.mean(0)) for s in samples))
            assert close(reduce[f"{layer}|S"][0], mean(sum(g.outer(g) for g in s.slopes.sum(1)) for s in samples))
            trace = mean(s.gradients.square().sum() for s in samples)
            of_inputs = mean(s.trace() * a for a, s in zip(a_n, s_n, strict=True))
            of_slopes = mean(a.trace() * s for a, s in zip(a_n, s_n, strict=True))
            assert close(gao[f"{layer}|A"][0], of_inputs / of_inputs.trace())
            assert close(gao[f"{layer}|S"][0], of_slopes * trace / of_slopes.trace())
            assert close(rescaled[f"{layer}|A"][0], mean(a_n))
            assert close(rescaled[f"{layer}|S"][0], mean(s_n) * trace / (mean(a_n).trace() * mean(s_n).trace()))
            u_a, u_s = ekfac[f"{layer}|U_A"], ekfac[f"{layer}|U_S"]
            for basis, factor in ((u_a, mean(a_n)), (u_s, mean(s_n))):
                rotated = basis.mT @ factor @ basis
                assert close(rotated, rotated.diagonal().diag())
                assert close(basis.mT @ basis, torch.eye(len(basis), dtype=basis.dtype))
            moments = mean((u_s.mT @ s.gradients @ u_a).square().sum(dim=0) for s in samples)
            assert close(ekfac[f"{layer}|values"], moments)

    @pytest.mark.parametrize("quantity", [Fisher(), GGN()], ids=str)
    @pytest.mark.parametrize("loss", LOSSES)
    @pytest.mark.parametrize("name", ["mlp", "tokens", "batch norm"])
    def test_exact_expectations(self, name: str, loss: str, quantity: Quantity) -> None:
        """Covectors in closed form, not the eigenvectors from which the GGN's rows are computed."""
        whole = case(name, loss=loss)
        tensors, ekfac = (kronecker_tensors(whole, quantity, structure) for structure in ("kfac", "ekfac"))
        for layer, samples in layer_samples(whole, Fisher()).items():
            s = mean(sum(g.outer(g) for row in s.slopes for g in row) for s in samples)
            assert close(tensors[f"{layer}|S"][0], s)
            trace = mean(s.gradients.square().sum() for s in samples)
            assert close(ekfac[f"{layer}|values"].sum(), trace)


class TestStructures:
    @pytest.mark.parametrize("quantity", ALL, ids=str)
    def test_structures_are_parts_of_the_dense_matrix(self, quantity: Quantity) -> None:
        problem = case("mlp").problem
        dense, blocks, diagonal = (estimate(problem, quantity, s) for s in ("dense", "block_diag", "diag"))
        assert close(diagonal.diagonal(), dense.diagonal())
        for name, part in problem.space.slices.items():
            assert close(blocks.blocks[name], dense.to_dense()[part, part])
        assert close(dense.to_dense(), dense.to_dense().mT, rtol=1e-14)

    @pytest.mark.parametrize("quantity", ALL, ids=str)
    def test_selected_parameters(self, quantity: Quantity) -> None:
        problem = case("mlp").problem
        whole, part = estimate(problem, quantity, "dense"), estimate(problem, quantity, "dense", params=["2.*", "0.b*"])
        index = torch.cat([torch.arange(whole.shape[0])[whole.space.slices[name]] for name in part.space.names])
        assert part.space.names == ("0.bias", "2.weight", "2.bias")
        assert close(part.to_dense(), whole.to_dense()[index][:, index])

    @pytest.mark.parametrize("loss", LOSSES)
    @pytest.mark.parametrize("quantity", ALL, ids=str)
    def test_float32(self, loss: str, quantity: Quantity) -> None:
        problem = mlp_case(loss)
        double = estimate(problem.problem, quantity, "dense").to_dense()
        single = estimate(Problem(problem.model.float(), loss, (problem.inputs, problem.targets)), quantity, "dense")
        assert single.dtype == torch.float32
        assert close(single.to_dense().double(), double, rtol=1e-5)

    def test_info(self) -> None:
        problem = case("mlp").problem
        info = estimate(problem, "fisher:samples=2,seed=7", "diag", batch_size=3).info
        assert (info.quantity, info.structure, info.loss) == ("fisher:samples=2,seed=7", "diag", "cross_entropy")
        assert (info.backend, info.num_samples, info.samples, info.seed, info.batch_size) == ("torch", N, 2, 7, 3)
        assert info.seconds > 0
        exact, masq = estimate(problem, "fisher", "diag").info, estimate(problem, "masq:batch_size=2", "diag").info
        assert (exact.samples, exact.seed, masq.batch_size) == (None, None, 2)

    @pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
    @pytest.mark.parametrize("quantity", ["empirical_fisher", "masq:batch_size=2", "hessian"])
    def test_where_gradients_are_switched_off(self, off: Callable[[], object], quantity: str) -> None:
        problem = case("mlp")
        with off():
            inner = Problem(problem.model, problem.loss, (problem.inputs.clone(), problem.targets))
            actual = estimate(inner, quantity, "dense")
        assert close(actual.to_dense(), estimate(problem.problem, quantity, "dense").to_dense())

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    @pytest.mark.parametrize("quantity", ALL, ids=str)
    def test_gpu(self, quantity: Quantity) -> None:
        expected = estimate(case("mlp").problem, quantity, "dense").to_dense()
        problem = case("mlp")
        problem.model.cuda()
        actual = estimate(problem.problem, quantity, "dense")
        assert actual.device.type == "cuda"
        assert close(actual.to_dense().cpu(), expected, rtol=1e-9)
        assert close(
            actual.solve(actual.diagonal(), 1.0).cpu(), actual.to(device="cpu").solve(expected.diagonal(), 1.0)
        )


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            ({"quantity": "fischer"}, "did you mean 'fisher'"),
            ({"structure": "diagonal"}, "no structure 'diagonal'; did you mean 'diag'"),
            ({"backend": "torhc"}, "no backend 'torhc'; did you mean 'torch'"),
            ({"params": "2.weigth"}, "did you mean '2.weight'"),
            ({"batch_size": 0}, "batch_size must be a whole number from 1, not 0"),
        ],
    )
    def test_unknown_names(self, arguments: dict[str, object], told: str) -> None:
        with pytest.raises(CurvlabError, match=told):
            estimate(case("mlp").problem, **{"quantity": "hessian", "structure": "dense"} | arguments)

    def test_what_no_backend_computes(self) -> None:
        with pytest.raises(UnsupportedError, match=r"computes hessian as kfac; available structures: .*dense"):
            estimate(case("mlp").problem, "hessian", "kfac")

    def test_overflow(self) -> None:
        problem = case("mlp squared error")
        huge = (1e200 * problem.inputs, 1e200 * problem.targets)
        with pytest.raises(CurvlabError, match="empirical_fisher of entries is not finite"):
            estimate(Problem(problem.model, problem.loss, huge), "empirical_fisher", "diag")

    def test_wrong_second_derivative(self) -> None:
        class Wrong(torch.autograd.Function):
            """A product whose second derivative omits the dependence on one factor."""

            @staticmethod
            def forward(ctx: object, x: Tensor, w: Tensor) -> Tensor:
                ctx.save_for_backward(x, w)
                return x * w.square()

            @staticmethod
            def backward(ctx: object, slope: Tensor) -> tuple[Tensor, Tensor]:
                x, w = ctx.saved_tensors
                return slope * w.square(), 2 * slope * x.detach() * w

        class Fused(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(4, CLASSES)
                self.w = nn.Parameter(torch.ones(CLASSES))

            def forward(self, x: Tensor) -> Tensor:
                return Wrong.apply(self.fc(x), self.w)

        whole = case("mlp")
        problem = Problem(Fused().double(), whole.loss, (whole.inputs, whole.targets))
        with pytest.raises(UnsupportedError, match=r"second derivative of Fused.*not symmetric"):
            estimate(problem, "hessian", "dense")

    def test_a_batch_is_checked_before_any_is_computed(self) -> None:
        whole = case("mlp")
        batches: list[Pair] = [(whole.inputs, whole.targets), (whole.inputs, whole.targets + 1)]
        with pytest.raises(CurvlabError, match="label is 3, but the model has 3 outputs"):
            estimate(Problem(whole.model, whole.loss, batches), "empirical_fisher", "diag")


class _WithUnused(nn.Module):
    """A layer on which the outputs do not depend: its vectorised rows are an expanded zero."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2).double()
        self.used = nn.Linear(3, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@pytest.mark.parametrize("quantity", ["empirical_fisher", "fisher:samples=1", "fisher"])
@pytest.mark.parametrize("structure", ["diag", "dense"])
def test_a_layer_that_is_not_used_has_no_curvature(quantity: str, structure: str) -> None:
    problem = Problem(_WithUnused(), "cross_entropy", (torch.randn(5, 3), torch.tensor([0, 1, 2, 3, 0])))
    found = estimate(problem, quantity, structure, backend="hooks").diagonal()
    assert (found[:6] == 0).all()
    assert (found[6:] > 0).any()
