"""What docs/concepts/scale.md says about other libraries, against the libraries themselves."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvlab import Problem, estimate

curvlinops = pytest.importorskip("curvlinops")


class TestLaplace:
    """The empirical Fisher of a regression is twice ours: squared gradients of 2 l, times the factor 1/2 of l."""

    @pytest.mark.parametrize(
        ("kind", "quantity", "ratio"),
        [
            ("regression", "empirical_fisher", 2),
            ("regression", "ggn", 1),
            ("classification", "empirical_fisher", 1),
            ("classification", "ggn", 1),
        ],
    )
    def test_ratio(self, kind: str, quantity: str, ratio: float) -> None:
        curvature = pytest.importorskip("laplace.curvature")
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        x = torch.randn(10, 3).double()
        y = torch.randn(10, 2).double() if kind == "regression" else torch.randint(2, (10,))
        backend = curvature.CurvlinopsEF if quantity == "empirical_fisher" else curvature.CurvlinopsGGN
        _, theirs = backend(model, kind).full(x, y)
        loss = "squared_error" if kind == "regression" else "cross_entropy"
        ours = len(x) * estimate(Problem(model, loss, (x, y)), quantity, "dense").to_dense()
        assert torch.allclose(theirs.double(), ratio * ours, rtol=1e-6, atol=1e-7 * float(ours.abs().max()))


class TestKroneckerFactorsOfCurvlinops:
    """``fisher_type="type-2"`` back-propagates the same column of a root for all terms of a sample at once.

    That is right where a term depends on its own position only; convolutions mix positions.
    """

    def traces(self, model: nn.Module, x: Tensor, y: Tensor, draws: int) -> tuple[float, float, Tensor]:
        """Return the traces of K-FAC with the exact Fisher: ours, theirs, and those of their Monte Carlo."""
        loss = nn.CrossEntropyLoss(reduction="sum")

        def trace(fisher_type: str, seed: int = 0) -> float:
            options: dict[str, Any] = {"separate_weight_and_bias": False, "check_deterministic": False}
            options["mc_samples"] = 5 if fisher_type == "mc" else 1
            parameters = list(model.parameters())
            operator = curvlinops.KFACLinearOperator(
                model, loss, parameters, [(x, y)], fisher_type=fisher_type, seed=seed, **options
            )
            return float(operator.trace)

        ours = len(x) * float(estimate(Problem(model, loss, (x, y)), "fisher", "kfac", backend="torch").trace())
        return ours, trace("type-2"), torch.tensor([trace("mc", seed) for seed in range(draws)])

    def test_positions_mix(self) -> None:
        torch.manual_seed(0)
        down, low = nn.Conv2d(3, 2, 3, padding=1, stride=2), nn.Conv2d(2, 2, 3, padding=1)
        model = nn.Sequential(down, low, nn.Upsample(scale_factor=2), nn.Conv2d(2, 3, 3, padding=1)).double()
        x, y = torch.rand(3, 3, 8, 8).double(), torch.randint(3, (3, 8, 8))
        ours, theirs, drawn = self.traces(model, x, y, draws=20)
        assert abs(float(drawn.mean()) - ours) < 4 * float(drawn.std()) / len(drawn) ** 0.5
        assert theirs > 2 * ours  # 916, 409, and 409 +- 5 by Monte Carlo

    def test_positions_do_not_mix(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 3, 1), nn.Tanh(), nn.Conv2d(3, 5, 1)).double()
        x, y = torch.rand(3, 4, 2, 3).double(), torch.randint(5, (3, 2, 3))
        ours, theirs, _ = self.traces(model, x, y, draws=1)
        assert theirs == pytest.approx(ours, rel=1e-5)
