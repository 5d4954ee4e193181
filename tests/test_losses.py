"""The losses: against torch's own, automatic differentiation and the definition of the Fisher information."""

import numpy as np
import pytest
import torch
from models_under_test import plain_loss
from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.estimators.covectors import output_covectors
from curvlab.losses import LOSSES, get_loss
from curvlab.quantities import EmpiricalFisher, Fisher

N, C = 6, 4
DRAWS = 20_000


def outputs_and_targets(name: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    outputs = 2 * torch.randn(N, C, dtype=torch.float64, generator=generator)
    if name == "cross_entropy":
        return outputs, torch.randint(C, (N,), generator=generator)
    if name == "squared_error":
        return outputs, torch.randn(N, C, dtype=torch.float64, generator=generator)
    return outputs, torch.rand(N, C, dtype=torch.float64, generator=generator)


def output_fisher(name: str, outputs: Tensor) -> Tensor:
    """``E_y[grad l grad l']`` in closed form, ``(N, C, C)``."""
    if name == "cross_entropy":
        p = outputs.softmax(dim=1)
        return p.diag_embed() - p.unsqueeze(2) * p.unsqueeze(1)
    if name == "squared_error":
        return torch.eye(C, dtype=outputs.dtype).expand(N, C, C)
    p = outputs.sigmoid()
    return (p * (1 - p)).diag_embed()


@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients(name: str) -> None:
    outputs, targets = outputs_and_targets(name)
    outputs.requires_grad_()
    values = plain_loss(name, outputs, targets)
    (gradients,) = torch.autograd.grad(values.sum(), outputs)
    assert torch.allclose(get_loss(name).values(outputs, targets), values, rtol=1e-12, atol=0)
    assert torch.allclose(get_loss(name).gradients(outputs.detach(), targets), gradients, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", LOSSES)
def test_factors_sum_to_the_output_fisher(name: str) -> None:
    outputs, _ = outputs_and_targets(name)
    factors = get_loss(name).output_factors(outputs)
    assert torch.allclose(factors.mT @ factors, output_fisher(name, outputs), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", LOSSES)
def test_drawn_targets_have_the_models_distribution(name: str) -> None:
    """The mean of the gradients over drawn targets is zero, and their second moment the output Fisher."""
    loss = get_loss(name)
    outputs, _ = outputs_and_targets(name)
    drawn = loss.sample(outputs, DRAWS, np.random.default_rng(0))
    assert drawn.shape[:2] == (N, DRAWS)
    gradients = torch.stack([loss.gradients(outputs[n].expand(DRAWS, C), drawn[n]) for n in range(N)])
    products = gradients.unsqueeze(3) * gradients.unsqueeze(2)
    for sampled, exact in ((gradients, torch.zeros(N, C)), (products, output_fisher(name, outputs))):
        z = (sampled.mean(dim=1) - exact) / (sampled.std(dim=1) / DRAWS**0.5 + 1e-12)
        assert z.abs().max() < 4


@pytest.mark.parametrize("name", LOSSES)
def test_draws_do_not_depend_on_the_batches(name: str) -> None:
    loss = get_loss(name)
    outputs, _ = outputs_and_targets(name)
    whole = loss.sample(outputs, 3, np.random.default_rng(5))
    rng = np.random.default_rng(5)
    assert torch.equal(torch.cat([loss.sample(part, 3, rng) for part in outputs.split([1, 3, 2])]), whole)
    assert not torch.equal(loss.sample(outputs, 3, np.random.default_rng(6)), whole)


def saturated_rows(name: str, logits: Tensor, targets: Tensor | None) -> Tensor:
    """Rows at saturated float64 logits, each probability from its own exponential: no difference of near-equals.

    Those of the given targets, or, for None, of the exact Fisher.
    """
    if name == "binary_cross_entropy":
        p, q = 1 / (1 + (-logits).exp()), 1 / (1 + logits.exp())
        if targets is None:
            return (p * q).sqrt().diag_embed()
        return ((1 - targets) * p - targets * q).unsqueeze(1)
    p = (logits - logits.logsumexp(dim=1, keepdim=True)).exp()
    others = torch.ones(p.shape[1], p.shape[1], dtype=p.dtype).fill_diagonal_(0)
    by_label = p.unsqueeze(1) * others - ((p @ others).diag_embed())
    if targets is None:  # the matrix, whose factors are not unique: p_i (1 - p_i), and - p_i p_j off the diagonal
        return (p * (p @ others)).diag_embed() - p.unsqueeze(2) * p.unsqueeze(1) * others
    return by_label[torch.arange(len(targets)), targets].unsqueeze(1)


@pytest.mark.parametrize("name", ["cross_entropy", "binary_cross_entropy"])
@pytest.mark.parametrize("quantity", [EmpiricalFisher(), Fisher(), Fisher(samples=1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saturated_outputs_keep_their_precision(
    name: str, quantity: EmpiricalFisher | Fisher, dtype: torch.dtype
) -> None:
    logits = torch.tensor([[60.0, -60, 0], [-60, 60, -60], [60, 60, -60], [0.5, -60, -1]], dtype=torch.float64)
    targets = torch.tensor([0, 0, 2, 1]) if name == "cross_entropy" else (logits > 0).double()
    rows = output_covectors(
        get_loss(name),
        quantity,
        logits.to(dtype),
        targets if name == "cross_entropy" else targets.to(dtype),
        np.random.default_rng(0),
    )[:]
    labels: Tensor | None = targets
    if isinstance(quantity, Fisher):
        labels = get_loss(name).sample(logits, 1, np.random.default_rng(0))[:, 0] if quantity.samples else None
        if labels is None and name == "cross_entropy":
            rows = rows.double()
            rows = rows.mT @ rows
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert torch.allclose(
        rows.double(), saturated_rows(name, logits, labels), rtol=tolerance, atol=torch.finfo(dtype).tiny
    )


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.uint8])
def test_labels_of_any_integer_type(dtype: torch.dtype) -> None:
    loss = get_loss("cross_entropy")
    outputs, labels = outputs_and_targets("cross_entropy")
    loss.check(outputs, labels.to(dtype))
    assert torch.equal(loss.values(outputs, labels.to(dtype)), loss.values(outputs, labels))
    assert torch.equal(loss.gradients(outputs, labels.to(dtype)), loss.gradients(outputs, labels))


@pytest.mark.parametrize(
    ("name", "targets", "told"),
    [
        ("cross_entropy", torch.zeros(N), "class indices.*float32"),
        ("cross_entropy", torch.zeros(N, C, dtype=torch.int64), r"class indices.*\(6, 4\)"),
        ("cross_entropy", torch.full((N,), 4), r"label is 4.*4 outputs \(labels 0 to 3\)"),
        ("cross_entropy", torch.full((N,), -100), "label is -100"),
        ("squared_error", torch.zeros(N, dtype=torch.int64), "floating-point targets.*int64"),
        ("squared_error", torch.zeros(N, 1), r"outputs \(6, 4\).*\(6, 1\)"),
        ("binary_cross_entropy", torch.full((N, C), 1.5), "between 0 and 1"),
        ("binary_cross_entropy", torch.full((N, C), -0.5), "between 0 and 1"),
    ],
)
def test_targets_of_another_loss_are_refused(name: str, targets: Tensor, told: str) -> None:
    with pytest.raises(CurvlabError, match=told):
        get_loss(name).check(torch.zeros(N, C), targets)


def test_unknown_loss() -> None:
    with pytest.raises(CurvlabError, match=r"no loss 'hinge'.*cross_entropy, squared_error, binary_cross_entropy"):
        get_loss("hinge")
