"""Silent errors of curvlinops and torch; curvlab is correct or refuses with the name of the module."""

from collections.abc import Callable

import curvlinops
import pytest
import torch
from models_under_test import CLASSES, N, case
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from curvlab.errors import CurvlabError, UnsupportedError
from curvlab.estimators import estimate
from curvlab.problem import Problem


def matrix_of(operator: curvlinops.GGNLinearOperator) -> Tensor:
    return operator @ torch.eye(operator.shape[0], dtype=operator.dtype)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def drawn(model: nn.Module, *shape: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Return the model in float64 and eval mode with weights from a seed, inputs and labels."""
    generator = torch.Generator().manual_seed(0)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    return model, torch.randn(N, *shape, dtype=torch.float64, generator=generator), torch.arange(N) % CLASSES


def differences(problem: Problem, step: float = 1e-5) -> Tensor:
    """Return the Hessian of the mean loss by central differences of its gradient."""
    space = problem.space
    at = space.flatten(problem.parameters())

    def slope(vector: Tensor) -> Tensor:
        leaves = {name: p.clone().requires_grad_() for name, p in space.unflatten(vector).items()}
        inputs, targets = next(problem.batches())
        value = problem.loss.values(problem.forward(leaves, inputs), targets).mean()
        gradients = torch.autograd.grad(value, list(leaves.values()))
        return torch.cat([g.reshape(-1) for g in gradients])

    steps = step * torch.eye(space.total, dtype=at.dtype)
    return torch.stack([(slope(at + d) - slope(at - d)) / (2 * step) for d in steps])


class TestMeanSquaredError:
    """M10: the library's GGN uses a mean over outputs without the 1/2, curvlab's the Gaussian log-likelihood."""

    def test_ggn(self) -> None:
        whole = case("mlp squared error")
        parameters = list(whole.model.parameters())
        data = [(whole.inputs, whole.targets)]
        theirs = curvlinops.GGNLinearOperator(whole.model, nn.MSELoss(), parameters, data, check_deterministic=False)
        ours = estimate(whole.problem, "ggn", "implicit", backend="curvlinops").to_dense()
        assert relative(matrix_of(theirs), 2 / CLASSES * ours) < 1e-10
        assert relative(ours, estimate(whole.problem, "fisher", "dense", backend="torch").to_dense()) < 1e-10

    def test_kfac(self) -> None:
        whole = case("mlp squared error")
        theirs = curvlinops.KFACLinearOperator(
            whole.model,
            nn.MSELoss(),
            list(whole.model.parameters()),
            [(whole.inputs, whole.targets)],
            fisher_type="type-2",
            separate_weight_and_bias=False,
            check_deterministic=False,
        )
        ours = estimate(whole.problem, "fisher", "kfac", backend="curvlinops")
        assert relative(matrix_of(theirs), 2 / CLASSES * ours.to_dense()) < 1e-10
        assert relative(ours.to_dense(), estimate(whole.problem, "fisher", "kfac", backend="torch").to_dense()) < 1e-10


class TestModules:
    """M13, and the modules whose factors are silently wrong."""

    def kfac(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> curvlinops.KFACLinearOperator:
        return curvlinops.KFACLinearOperator(
            model,
            nn.CrossEntropyLoss(),
            list(model.parameters()),
            [(inputs, targets)],
            fisher_type="type-2",
            separate_weight_and_bias=False,
            check_deterministic=False,
        )

    def normed(self) -> tuple[nn.Module, Tensor, Tensor]:
        return drawn(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, CLASSES)), 4)

    def test_batch_norm_in_train_mode(self) -> None:
        model, x, y = self.normed()
        model.train()
        theirs = curvlinops.GGNLinearOperator(
            model, nn.CrossEntropyLoss(), list(model.parameters()), [(x, y)], check_deterministic=False
        )
        with pytest.raises(RuntimeError, match="in-place operation"):
            matrix_of(theirs)
        with pytest.raises(UnsupportedError, match=r"1 \(BatchNorm1d\) is in train mode.*call model.eval\(\)"):
            estimate(Problem(model, "cross_entropy", (x, y)), "ggn", "implicit", backend="curvlinops")

    def test_batch_norm_in_evaluation_mode(self) -> None:
        """The library refuses the model; in curvlab the other layers still have factors."""
        model, x, y = self.normed()
        with pytest.raises(NotImplementedError, match="un-supported layers"):
            self.kfac(model, x, y)
        problem = Problem(model, "cross_entropy", (x, y))
        with pytest.raises(UnsupportedError, match=r"1\.weight belongs to BatchNorm1d"):
            estimate(problem, "fisher", "kfac", backend="curvlinops")
        params = ["0.*", "2.*"]
        ours, reference = (
            estimate(problem, "fisher", "kfac", backend=backend, params=params).to_dense()
            for backend in ("curvlinops", "torch")
        )
        assert relative(ours, reference) < 1e-10

    def test_a_tied_layer(self) -> None:
        """A layer is used twice: its factors mix the inputs of both uses."""
        shared = nn.Linear(4, 4)
        model, x, y = drawn(nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(4, CLASSES)), 4)
        wrong = matrix_of(self.kfac(model, x, y))
        problem = Problem(model, "cross_entropy", (x, y))
        exact = estimate(problem, "fisher", "dense", backend="torch").to_dense()
        assert abs(float(wrong.trace() / exact.trace()) - 1) > 0.1
        with pytest.raises(UnsupportedError, match=r"0.weight belongs to Linear 0, which is called 2 times"):
            estimate(problem, "fisher", "kfac", backend="curvlinops")
        assert relative(estimate(problem, "fisher", "implicit").to_dense(), exact) < 1e-10

    def test_circular_padding(self) -> None:
        """With one position and one sample K-FAC is exact, but the library assumes zeros outside the input."""
        conv = nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular", stride=4)
        model, x, y = drawn(nn.Sequential(nn.Unflatten(1, (1, 4, 4)), conv, nn.Flatten(), nn.Linear(1, CLASSES)), 16)
        x, y = x[:1], y[:1]
        problem = Problem(model, "cross_entropy", (x, y))
        exact = estimate(problem, "fisher", "dense", backend="torch", params="1.*").to_dense()
        wrong = matrix_of(self.kfac(model, x, y))[:10, :10]
        assert abs(float(wrong.trace() / exact.trace()) - 1) > 0.1
        with pytest.raises(UnsupportedError, match=r"Conv2d \(1\) assume zero padding, not circular"):
            estimate(problem, "fisher", "kfac", backend="curvlinops")

    def test_groups(self) -> None:
        """The library's A uses inputs averaged over the groups."""
        model, x, y = drawn(
            nn.Sequential(
                nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 2, 2, groups=2), nn.Flatten(), nn.Linear(2, CLASSES)
            ),
            8,
        )
        problem = Problem(model, "cross_entropy", (x[:1], y[:1]))
        exact = estimate(problem, "fisher", "block_diag", backend="torch").blocks["1.weight"]
        wrong = matrix_of(self.kfac(model, x[:1], y[:1]))[:8, :8]
        assert abs(float(wrong.trace() / exact.trace()) - 1) > 0.1
        with pytest.raises(UnsupportedError, match=r"one pair of full factors per module, not a block 1/group=0of2"):
            estimate(problem, "fisher", "kfac", backend="curvlinops")

    @pytest.mark.parametrize("norm", [lambda: nn.LayerNorm(3), lambda: nn.InstanceNorm1d(1, affine=True)])
    def test_the_hessian_of_layer_norm(self, norm: Callable[[], nn.Module]) -> None:
        """torch.func's derivative of the gradient of its weight is wrong; a second backward pass is not."""
        layers = [nn.Linear(4, 3), nn.Unflatten(1, (1, 3)), norm(), nn.Flatten(), nn.Linear(3, CLASSES)]
        model, x, y = drawn(nn.Sequential(*layers), 4)
        problem = Problem(model, "cross_entropy", (x, y))
        expected = differences(problem)
        theirs = curvlinops.HessianLinearOperator(
            model, nn.CrossEntropyLoss(), list(model.parameters()), [(x, y)], check_deterministic=False
        )
        assert relative(matrix_of(theirs), expected) > 0.01
        assert relative(estimate(problem, "hessian", "implicit").to_dense(), expected) < 1e-6
        with pytest.raises(UnsupportedError, match=r"Norm.* \(2\) differs from automatic differentiation.*torch can"):
            estimate(problem, "hessian", "implicit", backend="curvlinops")


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.spread, self.out = nn.Linear(4, 12), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.spread(x).view(-1, 1, 2, 6).split(2, dim=-1)
        return self.out(F.scaled_dot_product_attention(q, k, v).flatten(1))


class TestAttention:
    """M18: the fused kernel has neither a second derivative nor one in forward mode."""

    def test_second_derivative(self) -> None:
        model, x, y = drawn(Attentive(), 4)
        parameters = list(model.parameters())
        slope = torch.autograd.grad(F.cross_entropy(model(x), y), parameters, create_graph=True)
        with pytest.raises(RuntimeError, match=r"_scaled_dot_product_flash_attention_for_cpu_backward"):
            torch.autograd.grad(slope, parameters, [torch.ones_like(p) for p in parameters])
        problem = Problem(model, "cross_entropy", (x, y))
        for backend in ("torch", "curvlinops"):
            ours = estimate(problem, "hessian", "implicit", backend=backend).to_dense()
            assert relative(ours, differences(problem)) < 1e-6

    def test_forward_mode(self) -> None:
        model, x, y = drawn(Attentive(), 4)
        theirs = curvlinops.GGNLinearOperator(
            model, nn.CrossEntropyLoss(), list(model.parameters()), [(x, y)], check_deterministic=False
        )
        with pytest.raises(NotImplementedError, match="forward AD with _scaled_dot_product_flash_attention_for_cpu"):
            matrix_of(theirs)
        problem = Problem(model, "cross_entropy", (x, y))
        exact = estimate(problem, "ggn", "dense", backend="torch").to_dense()
        for backend in ("torch", "curvlinops"):
            assert relative(estimate(problem, "ggn", "implicit", backend=backend).to_dense(), exact) < 1e-10


class TestWeightNorm:
    """M21: the second backward pass of torch's fused kernel is wrong."""

    def problem(self) -> Problem:
        normed = parametrizations.weight_norm(nn.Linear(4, 3))
        model, x, y = drawn(nn.Sequential(normed, nn.Tanh(), nn.Linear(3, CLASSES)), 4)
        return Problem(model, "cross_entropy", (x, y))

    def test_torch_is_wrong(self) -> None:
        problem = self.problem()
        leaves = {name: p.requires_grad_() for name, p in problem.parameters().items()}
        inputs, targets = next(problem.batches())
        value = problem.loss.values(problem.forward(leaves, inputs), targets).mean()
        slope = torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, list(leaves.values()), create_graph=True)])
        rows = [torch.autograd.grad(s, list(leaves.values()), retain_graph=True) for s in slope]
        hessian = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
        assert relative(hessian, hessian.mT) > 0.1
        assert relative(hessian, differences(problem)) > 0.1

    @pytest.mark.parametrize("backend", ["auto", "torch"])
    @pytest.mark.parametrize("structure", ["implicit", "dense"])
    def test_the_hessian_is_refused(self, structure: str, backend: str) -> None:
        with pytest.raises(CurvlabError, match="weight_norm"):
            estimate(self.problem(), "hessian", structure, backend=backend)

    def test_the_fisher_is_right(self) -> None:
        problem = self.problem()
        exact = estimate(problem, "fisher", "dense", backend="torch").to_dense()
        assert relative(estimate(problem, "fisher", "implicit").to_dense(), exact) < 1e-10

    def test_curvlinops_has_no_derivative(self) -> None:
        with pytest.raises(UnsupportedError, match=r"fails on Sequential.*_weight_norm_interface"):
            estimate(self.problem(), "fisher", "implicit", backend="curvlinops")
