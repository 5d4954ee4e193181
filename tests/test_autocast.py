"""Networks that compute in lower precision: ``torch.autocast`` within the forward pass, and weights in bfloat16."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvlab import Problem, estimate
from curvlab.errors import UnsupportedError

STRUCTURES = ("dense", "block_diag", "diag", "kfac", "ekfac", "tkfac", "implicit")


def in_bfloat16(model: nn.Module, batch: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        output: Tensor = model(batch[0])
    return output


def networks() -> dict[str, tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    return {
        "Linear": (nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(12, 6)),
        "tokens": (nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3)), torch.randn(12, 5, 6)),
        "Conv2d": (
            nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)),
            torch.randn(12, 2, 5, 5),
        ),
        "attention": (
            nn.Sequential(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, dropout=0.0), nn.Linear(6, 3)).eval(),
            torch.randn(12, 5, 6),
        ),
    }


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", networks())
def test_curvature_of_a_network_with_autocast_within(name: str, structure: str) -> None:
    model, x = networks()[name]
    targets = torch.arange(12) % 3 if x.ndim != 3 else torch.arange(60).view(12, 5) % 3
    exact = estimate(Problem(model, "cross_entropy", (x, targets)), "fisher", structure)
    low = Problem(model, "cross_entropy", (x, targets), forward=in_bfloat16, targets=lambda batch: batch[1])
    found = estimate(low, "fisher", structure)
    assert found.dtype == torch.float32
    assert type(found) is type(exact), "no parameter loses its factors"
    if not (structure == "ekfac" and name == "attention"):  # its basis is not unique where eigenvalues are small
        vector = torch.randn(exact.shape[0], generator=torch.Generator().manual_seed(1))
        assert (found @ vector - exact @ vector).norm() <= 0.03 * (exact @ vector).norm()
    if structure != "implicit":  # its trace needs products that are symmetric to the rounding of float32
        torch.testing.assert_close(found.trace(), exact.trace(), rtol=0.03, atol=0.0)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_curvature_of_a_network_in_bfloat16(structure: str) -> None:
    model, x = networks()["Linear"]
    low = Problem(model.bfloat16(), "cross_entropy", (x, torch.arange(12) % 3))
    exact = estimate(Problem(networks()["Linear"][0], "cross_entropy", (x, torch.arange(12) % 3)), "fisher", structure)
    found = estimate(low, "fisher", structure)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.trace(), exact.trace(), rtol=0.03, atol=0.0)


def test_a_wrong_rule_is_still_found_within_autocast() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    first = model[0]
    first.forward = lambda x: nn.functional.linear(x, first.weight + 0.3 * first.weight.tanh(), first.bias)
    data = torch.randn(12, 6), torch.arange(12) % 3
    matrix = estimate(
        Problem(model, "cross_entropy", data, forward=in_bfloat16, targets=lambda batch: batch[1]), "fisher", "kfac"
    )
    assert "0.weight" not in matrix.parts[0].space.names  # type: ignore[attr-defined]


def test_autocast_around_the_call_is_refused() -> None:
    model, x = networks()["Linear"]
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(UnsupportedError, match=r"torch\.autocast is on around this call"),
    ):
        estimate(Problem(model, "cross_entropy", (x, torch.arange(12) % 3)), "fisher", "diag")
