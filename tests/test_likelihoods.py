"""The likelihoods: against torch's losses, automatic differentiation and the definition of the Fisher information."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import hessian, vmap
from torch.nn import functional as F

from curvlab import Problem, estimate
from curvlab.errors import CurvlabError, UnsupportedError
from curvlab.estimators.covectors import output_covectors
from curvlab.likelihoods import (
    BinaryCrossEntropy,
    CrossEntropy,
    FromFunction,
    HeteroscedasticGaussian,
    Likelihood,
    Poisson,
    SquaredError,
    get_likelihood,
)
from curvlab.quantities import EmpiricalFisher, Fisher

N, C = 6, 4
DRAWS = 20_000
W = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


LABELS = torch.tensor([0, 3, 2, 1, 1, 0])
SOFT = numbers(N, C, seed=1).softmax(dim=1)
REALS = numbers(N, C, seed=2)
UNIT = numbers(N, C, seed=3).sigmoid()
COUNTS = torch.tensor([0.0, 1, 2, 5]).double().repeat(N, 1) + torch.arange(N).double()[:, None]


def cauchy(outputs: Tensor, targets: Tensor) -> Tensor:
    return (1 + (outputs - targets).square()).log().sum(dim=1)


def normal(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum(dim=1) / 2


def draw_normal(outputs: Tensor, count: int, rng: np.random.Generator) -> Tensor:
    return outputs.unsqueeze(1) + torch.from_numpy(rng.standard_normal((len(outputs), count, outputs.shape[1])))


@dataclass(frozen=True)
class Case:
    """A likelihood with targets, and its loss by other means."""

    likelihood: Likelihood
    targets: Tensor
    values: Callable[[Tensor], Tensor]

    def __str__(self) -> str:
        return str(self.likelihood) + ("-soft" if self.targets is SOFT else "")


def torch_case(loss: nn.Module, targets: Tensor) -> Case:
    """A loss of torch, whose mean over outputs is compared term by term."""
    dividing = loss.reduction == "mean" and not isinstance(loss, nn.CrossEntropyLoss)

    def values(f: Tensor) -> Tensor:
        other = type(loss)(
            **{k: getattr(loss, k) for k in ("weight", "pos_weight") if getattr(loss, k, None) is not None}
        )
        vars(other).update({k: v for k, v in vars(loss).items() if k in ("label_smoothing", "ignore_index", "full")})
        other.reduction = "none"
        found: Tensor = other(f, targets)
        return found if found.ndim == 1 else found.mean(dim=1) if dividing else found.sum(dim=1)

    return Case(get_likelihood(loss), targets, values)


CASES = [
    Case(CrossEntropy(), LABELS, lambda f: F.cross_entropy(f, LABELS, reduction="none")),
    Case(CrossEntropy(), SOFT, lambda f: F.cross_entropy(f, SOFT, reduction="none")),
    Case(CrossEntropy(weight=W), LABELS, lambda f: F.cross_entropy(f, LABELS, weight=W, reduction="none")),
    Case(
        CrossEntropy(weight=W, label_smoothing=0.2),
        SOFT,
        lambda f: F.cross_entropy(f, SOFT, weight=W, label_smoothing=0.2, reduction="none"),
    ),
    torch_case(nn.CrossEntropyLoss(weight=W, label_smoothing=0.1, ignore_index=1), LABELS),
    torch_case(nn.CrossEntropyLoss(ignore_index=3, reduction="sum"), LABELS),
    Case(SquaredError(), REALS, lambda f: 0.5 * (f - REALS).square().sum(dim=1)),
    Case(SquaredError(variance=0.3), REALS, lambda f: (f - REALS).square().sum(dim=1) / 0.6),
    Case(SquaredError(variance=W), REALS, lambda f: ((f - REALS).square() / W / 2).sum(dim=1)),
    torch_case(nn.MSELoss(), REALS),
    torch_case(nn.MSELoss(reduction="sum"), REALS),
    Case(
        BinaryCrossEntropy(), UNIT, lambda f: F.binary_cross_entropy_with_logits(f, UNIT, reduction="none").sum(dim=1)
    ),
    torch_case(nn.BCEWithLogitsLoss(pos_weight=W), UNIT),
    torch_case(nn.BCEWithLogitsLoss(pos_weight=W[:1], reduction="none"), UNIT),
    Case(
        BinaryCrossEntropy(ignore_value=-1),
        torch.where(REALS > 0, -1.0, UNIT),
        lambda f: (F.binary_cross_entropy_with_logits(f, UNIT, reduction="none") * (REALS <= 0)).sum(dim=1),
    ),
    Case(Poisson(), COUNTS, lambda f: F.poisson_nll_loss(f, COUNTS, reduction="none").sum(dim=1)),
    torch_case(nn.PoissonNLLLoss(), COUNTS),
    Case(
        HeteroscedasticGaussian(),
        REALS[:, :2],
        lambda f: F.gaussian_nll_loss(f[:, :2], REALS[:, :2], f[:, 2:].exp(), reduction="none").sum(dim=1),
    ),
    Case(FromFunction(normal, draw_normal, natural=True), REALS, lambda f: normal(f, REALS)),
]
OUTPUTS = numbers(N, C, seed=4)


def hessians(case: Case) -> Tensor:
    """The Hessian of every term's loss in its outputs, ``(N, C, C)``, by differentiating torch's loss."""
    whole = hessian(lambda f: case.values(f).sum())(OUTPUTS)
    return torch.stack([whole[n, :, n] for n in range(N)])


def output_fisher(case: Case) -> Tensor:
    """``sum_k m_k E[g_k g_k']`` over entries, by its definition: every outcome, its probability and its gradient."""
    likelihood = case.likelihood
    if isinstance(likelihood, FromFunction):
        return torch.eye(C, dtype=torch.float64).expand(N, C, C)
    masses = likelihood.masses(OUTPUTS, case.targets)
    total = torch.zeros(N, C, C, dtype=torch.float64)
    for targets, probabilities in zip(*likelihood.outcomes(OUTPUTS), strict=True):
        for k in range(masses.shape[1]):
            at = OUTPUTS.clone().requires_grad_()
            (g,) = torch.autograd.grad(likelihood.entry_values(at, targets)[:, k].sum(), at)
            total += (probabilities[:, k] * masses[:, k])[:, None, None] * g[:, :, None] * g[:, None, :]
    return total


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: Case) -> None:
    outputs = OUTPUTS.clone().requires_grad_()
    values = case.values(outputs)
    (gradients,) = torch.autograd.grad(values.sum(), outputs)
    case.likelihood.check(outputs.detach(), case.targets)
    assert torch.allclose(case.likelihood.values(outputs, case.targets), values, rtol=1e-12, atol=1e-14)
    found = case.likelihood.gradients(outputs.detach(), case.targets)
    assert torch.allclose(found, gradients, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_factors_and_products_are_the_output_fisher(case: Case) -> None:
    expected = output_fisher(case)
    factors = case.likelihood.output_factors(OUTPUTS, case.targets)
    assert torch.allclose(factors.mT @ factors, expected, rtol=1e-12, atol=1e-14)
    parts = [
        case.likelihood.some_factors(case.likelihood.factor_scales(OUTPUTS, case.targets), range(k, k + 1))
        for k in range(case.likelihood.num_factors(C))
    ]
    assert torch.equal(torch.cat(parts, dim=1), factors)
    vectors = numbers(N, C, seed=5)
    found = case.likelihood.fisher_product(OUTPUTS, case.targets, vectors)
    assert torch.allclose(found, (expected @ vectors[:, :, None])[:, :, 0], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_hessian_form_is_the_hessian(case: Case) -> None:
    if isinstance(case.likelihood, HeteroscedasticGaussian):
        with pytest.raises(UnsupportedError, match=r"no GGN.*negative eigenvalues; use fisher"):
            _ = case.likelihood.hessian_form
        return
    form, expected = case.likelihood.hessian_form, hessians(case)
    factors = form.output_factors(OUTPUTS, case.targets)
    assert torch.allclose(factors.mT @ factors, expected, rtol=1e-10, atol=1e-13)
    vectors = numbers(N, C, seed=5)
    found = form.fisher_product(OUTPUTS, case.targets, vectors)
    assert torch.allclose(found, (expected @ vectors[:, :, None])[:, :, 0], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_drawn_gradients_have_the_second_moment_of_the_output_fisher(case: Case) -> None:
    drawn = case.likelihood.draw(OUTPUTS, DRAWS, np.random.default_rng(0))
    assert drawn.shape[:2] == (N, DRAWS)
    gradients = case.likelihood.drawn_gradients(OUTPUTS, case.targets, drawn)
    products = gradients.unsqueeze(3) * gradients.unsqueeze(2)
    for sampled, exact in ((gradients, torch.zeros(N, C)), (products, output_fisher(case))):
        z = (sampled.mean(dim=1) - exact) / (sampled.std(dim=1) / DRAWS**0.5 + 1e-12)
        assert z.abs().max() < 4.5


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_of_drawn_targets_are_the_drawn_gradients(case: Case) -> None:
    """For unit masses: what is drawn in place of targets, for precision, must give the gradients at targets."""
    likelihood = case.likelihood
    if not isinstance(likelihood, FromFunction) and bool((likelihood.masses(OUTPUTS, case.targets) != 1).any()):
        pytest.skip("the gradient of a drawn target has the root of the mass")
    targets = likelihood.sample(OUTPUTS, 3, np.random.default_rng(5))
    found = likelihood.drawn_gradients(OUTPUTS, case.targets, likelihood.draw(OUTPUTS, 3, np.random.default_rng(5)))
    expected = torch.stack([likelihood.gradients(OUTPUTS, y) for y in targets.unbind(dim=1)], dim=1)
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_draws_do_not_depend_on_the_batches(case: Case) -> None:
    whole = case.likelihood.sample(OUTPUTS, 3, np.random.default_rng(5))
    rng = np.random.default_rng(5)
    assert torch.equal(torch.cat([case.likelihood.sample(part, 3, rng) for part in OUTPUTS.split([1, 3, 2])]), whole)
    assert not torch.equal(case.likelihood.sample(OUTPUTS, 3, np.random.default_rng(6)), whole)


def test_a_weight_counts_like_repeated_terms() -> None:
    """Two terms of the same kind are one of weight 2: in the loss, the gradient, the Fisher and the number of terms."""
    whole, plain = CrossEntropy(weight=torch.tensor([1.0, 2.0, 1.0, 1.0])), CrossEntropy()
    twice = torch.arange(N).repeat_interleave(torch.where(LABELS == 1, 2, 1))
    for method in ("values", "gradients"):
        found = getattr(whole, method)(OUTPUTS, LABELS).sum(dim=0)
        assert torch.allclose(found, getattr(plain, method)(OUTPUTS[twice], LABELS[twice]).sum(dim=0).to(found))
    assert whole.weights(LABELS).sum() == len(twice)


def test_a_function_that_is_not_convex() -> None:
    likelihood = FromFunction(cauchy)
    far = torch.full((N, C), 9.0, dtype=torch.float64)
    with pytest.raises(UnsupportedError, match="negative eigenvalue"):
        likelihood.hessian_form.output_factors(OUTPUTS + far, REALS)
    with pytest.raises(UnsupportedError, match="natural=True, or use fisher:samples"):
        likelihood.output_factors(OUTPUTS, REALS)
    with pytest.raises(UnsupportedError, match="cannot draw targets: give draw_targets"):
        likelihood.sample(OUTPUTS, 1, np.random.default_rng(0))
    with pytest.raises(CurvlabError, match=r"one number per term, \(6,\), without a reduction; it returned \(\)"):
        FromFunction(lambda f, y: cauchy(f, y).mean()).check(OUTPUTS, REALS)
    problem = Problem(nn.Linear(3, C).double(), likelihood, (numbers(N, 3), REALS))
    for quantity, way_out in (("fisher", "natural=True"), ("fisher:samples=1", "give draw_targets")):
        with pytest.raises(UnsupportedError, match=way_out):
            estimate(problem, quantity, "implicit")  # not only at the first product
    vmapped = vmap(hessian(lambda f, y: cauchy(f[None], y[None])[0]))(OUTPUTS, REALS)
    vectors = numbers(N, C, seed=6)
    found = likelihood.hessian_form.fisher_product(OUTPUTS, REALS, vectors)
    assert torch.allclose(found, (vmapped @ vectors[:, :, None])[:, :, 0])


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
        get_likelihood(name),
        quantity,
        logits.to(dtype),
        targets if name == "cross_entropy" else targets.to(dtype),
        np.random.default_rng(0),
    )[:]
    labels: Tensor | None = targets
    if isinstance(quantity, Fisher):
        labels = get_likelihood(name).sample(logits, 1, np.random.default_rng(0))[:, 0] if quantity.samples else None
        if labels is None and name == "cross_entropy":
            rows = rows.double()
            rows = rows.mT @ rows
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert torch.allclose(
        rows.double(), saturated_rows(name, logits, labels), rtol=tolerance, atol=torch.finfo(dtype).tiny
    )


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.uint8])
def test_labels_of_any_integer_type(dtype: torch.dtype) -> None:
    loss = CrossEntropy()
    loss.check(OUTPUTS, LABELS.to(dtype))
    assert torch.equal(loss.values(OUTPUTS, LABELS.to(dtype)), loss.values(OUTPUTS, LABELS))
    assert torch.equal(loss.gradients(OUTPUTS, LABELS.to(dtype)), loss.gradients(OUTPUTS, LABELS))


@pytest.mark.parametrize(
    ("loss", "targets", "told"),
    [
        ("cross_entropy", torch.zeros(N), "class indices.*float32"),
        ("cross_entropy", torch.zeros(N, C, dtype=torch.int64), r"class indices.*\(6, 4\)"),
        ("cross_entropy", torch.full((N,), 4), r"label is 4.*4 outputs \(labels 0 to 3\)"),
        ("cross_entropy", torch.full((N,), -100), "label is -100"),
        (CrossEntropy(ignore_index=-1), torch.full((N,), -100), "label is -100"),
        ("cross_entropy", torch.zeros(N, C), "must be probabilities"),
        ("cross_entropy", torch.zeros(N, 2), r"one probability per class, \(6, 4\)"),
        (CrossEntropy(weight=torch.ones(3)), torch.zeros(N).long(), "3 class weights, but the model has 4 outputs"),
        ("squared_error", torch.zeros(N, dtype=torch.int64), "floating-point targets.*int64"),
        ("squared_error", torch.zeros(N, 1), r"outputs \(6, 4\).*\(6, 1\)"),
        (SquaredError(variance=torch.ones(2)), torch.zeros(N, C), "2 variances, but the model has 4 outputs"),
        ("binary_cross_entropy", torch.full((N, C), 1.5), "between 0 and 1"),
        ("binary_cross_entropy", torch.full((N, C), -0.5), "between 0 and 1"),
        ("poisson", torch.full((N, C), -1.0), "counts as targets, from 0"),
        ("heteroscedastic_gaussian", torch.zeros(N, C), r"2 K outputs.*the model has 4 outputs"),
    ],
)
def test_targets_of_another_loss_are_refused(loss: Any, targets: Tensor, told: str) -> None:
    with pytest.raises(CurvlabError, match=told):
        get_likelihood(loss).check(torch.zeros(N, C), targets)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: get_likelihood("hinge"), r"no loss 'hinge'.*cross_entropy, squared_error, binary_cross_entropy"),
        (lambda: get_likelihood(nn.CrossEntropyLoss), "loss of torch.nn, not the class CrossEntropyLoss"),
        (lambda: get_likelihood(nn.NLLLoss()), "return logits, without log_softmax, and give nn.CrossEntropyLoss"),
        (lambda: get_likelihood(nn.GaussianNLLLoss()), "give HeteroscedasticGaussian"),
        (lambda: get_likelihood(nn.HuberLoss()), "give FromFunction"),
        (lambda: get_likelihood(nn.BCEWithLogitsLoss(weight=W)), "by position: leave it out"),
        (lambda: get_likelihood(nn.PoissonNLLLoss(full=True)), "full=False only"),
        (lambda: CrossEntropy(label_smoothing=1), "from 0 to below 1, not 1"),
        (lambda: CrossEntropy(weight=-W), "finite weights from 0"),
        (lambda: CrossEntropy(weight=W.long()), "floating-point vector"),
        (lambda: CrossEntropy(ignore_index=0.5), "ignore_index of cross_entropy must be a whole number"),
        (lambda: SquaredError(variance=0), "must be above 0, not 0"),
        (lambda: SquaredError(variance=-W), "must be above 0"),
        (lambda: BinaryCrossEntropy(pos_weight=float("nan")), "finite numbers from 0"),
        (lambda: FromFunction(None), "nll of FromFunction must be a function, not NoneType"),
    ],
)
def test_options_out_of_range_are_refused(make: Callable[[], object], told: str) -> None:
    with pytest.raises(CurvlabError, match=told):
        make()
