"""Samples of several terms: the likelihood of a sample, units, invariances, and every structure against autograd."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

from curvlab import Problem, estimate
from curvlab.errors import CurvlabError, UnsupportedError
from curvlab.likelihoods import (
    BinaryCrossEntropy,
    CrossEntropy,
    FromFunction,
    HeteroscedasticGaussian,
    Likelihood,
    Poisson,
    SquaredError,
)

N, T, C = 5, 4, 3
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Tagger(nn.Module):
    """A network of tokens, which mixes them: every output depends on all tokens before it."""

    def __init__(self, outputs: int = C, mixing: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.inner, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, outputs)
        self.mixing = mixing
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.inner(self.embed(tokens)).tanh()
        return self.head(x.cumsum(dim=1) if self.mixing else x)


TOKENS = torch.randint(7, (N, T), generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(C, (N, T), generator=torch.Generator().manual_seed(2))
IGNORED = torch.where(numbers(N, T, seed=3) > 0.5, -100, LABELS)
W = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
MASKED = torch.where(numbers(N, T, C) > 0.3, -1.0, (numbers(N, T, C, seed=6) > 0).double())

CASES: list[tuple[Likelihood, Tensor, int]] = [
    (CrossEntropy(), LABELS, C),
    (CrossEntropy(ignore_index=-100, weight=W), IGNORED, C),
    (CrossEntropy(label_smoothing=0.2), LABELS, C),
    (CrossEntropy(), numbers(N, T, C, seed=4).softmax(dim=2), C),
    (SquaredError(variance=0.5), numbers(N, T, C, seed=5), C),
    (SquaredError(), numbers(N, T, seed=5), 1),
    (BinaryCrossEntropy(pos_weight=W, ignore_value=-1), MASKED, C),
    (Poisson(), numbers(N, T, C, seed=7).abs().round(), C),
    (HeteroscedasticGaussian(), numbers(N, T, 2, seed=8), 4),
    (FromFunction(lambda f, y: (f - y).square().sum(dim=1) / 2, natural=True), numbers(N, T, C, seed=5), C),
]  # fmt: skip
IDS = [f"{likelihood}-{tuple(targets.shape)}" for likelihood, targets, _ in CASES]


def rows_of(problem: Problem, targets: Tensor) -> Tensor:
    """Return the targets of all terms."""
    return problem.loss.each.align(targets.reshape(N * T, *targets.shape[2:]))


class Definition:
    """A case and what its matrices are made of: outputs ``(N T, C)``, their Jacobian ``(N T, C, P)``, Hessians."""

    def __init__(self, likelihood: Likelihood, outputs: int) -> None:
        self.model, self.likelihood = Tagger(outputs), likelihood
        self.theta = {name: p.detach() for name, p in self.model.named_parameters()}
        self.f = self.outputs(self.theta)
        self.jacobian = torch.cat([j.flatten(2) for j in jacrev(self.outputs)(self.theta).values()], dim=2)

    def outputs(self, parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(self.model, parameters, (TOKENS,)).flatten(0, 1)

    def dense(self, y: Tensor, quantity: str, unit: str) -> Tensor:
        """Return the matrix as a sum over terms, by its definition."""
        weights = self.likelihood.weights(y)
        units = N if unit == "sample" else float(weights.sum())
        if quantity == "empirical_fisher":
            slopes = torch.einsum("tc,tcp->tp", self.likelihood.gradients(self.f, y), self.jacobian)
            if unit == "sample":
                slopes = slopes.view(N, T, -1).sum(dim=1)
            else:
                slopes = slopes * torch.where(weights > 0, weights.clamp(min=1e-300) ** -0.5, 0.0)[:, None]
            return slopes.mT @ slopes / units
        if quantity == "hessian":
            return self._hessian(y) / units
        if quantity == "ggn":
            inner = hessian(lambda g: self.likelihood.values(g, y).sum())(self.f)
            inner = torch.stack([inner[t, :, t] for t in range(N * T)])
        else:
            factors = self.likelihood.output_factors(self.f, y)
            inner = factors.mT @ factors
        return torch.einsum("tcp,tcd,tdq->pq", self.jacobian, inner, self.jacobian) / units

    def _hessian(self, y: Tensor) -> Tensor:
        flat = torch.cat([p.flatten() for p in self.theta.values()])
        sizes, shapes = [p.numel() for p in self.theta.values()], [p.shape for p in self.theta.values()]

        def total(at: Tensor) -> Tensor:
            parts = [part.view(shape) for part, shape in zip(at.split(sizes), shapes, strict=True)]
            return self.likelihood.values(self.outputs(dict(zip(self.theta, parts, strict=True))), y).sum()

        found: Tensor = hessian(total)(flat)
        return found


@cache
def definition(name: str) -> Definition:
    likelihood, _, outputs = CASES[IDS.index(name)]
    return Definition(likelihood, outputs)


@pytest.mark.parametrize("unit", ["sample", "term"])
@pytest.mark.parametrize("quantity", ["empirical_fisher", "fisher", "ggn", "hessian"])
@pytest.mark.parametrize("name", IDS)
def test_every_structure_against_the_definition(name: str, quantity: str, unit: Any) -> None:
    likelihood, targets, _ = CASES[IDS.index(name)]
    model = definition(name).model
    if quantity == "ggn" and isinstance(likelihood, HeteroscedasticGaussian):
        with pytest.raises(UnsupportedError, match="heteroscedastic_gaussian has no GGN"):
            estimate(Problem(model, likelihood, (TOKENS, targets), unit=unit), quantity, "diag")
        return
    at_once = Problem(model, likelihood, (TOKENS, targets), unit=unit)
    parts = Problem(model, likelihood, [(TOKENS[:2], targets[:2]), (TOKENS[2:], targets[2:])], unit=unit)
    whole = definition(name).dense(rows_of(at_once, targets), quantity, unit)
    vectors = numbers(len(whole), 2, seed=9)
    by_outcomes = quantity == "fisher" and isinstance(likelihood, FromFunction)  # these, the reference needs
    for problem, backend in ((at_once, "auto"), (parts, "auto"), (parts, "torch")):
        if backend == "torch" and by_outcomes:
            continue
        implicit = estimate(problem, quantity, "implicit", backend=backend)
        assert torch.allclose(implicit @ vectors, whole @ vectors, **EXACT)
        matrix = estimate(problem, quantity, "dense", backend=backend)
        assert torch.allclose(matrix.to_dense(), whole, **EXACT)
        entries = estimate(problem, quantity, "diag", backend=backend).diagonal()
        assert torch.allclose(entries, whole.diagonal(), **EXACT)
    if quantity == "hessian" or by_outcomes:
        return
    for structure in ("kfac", "kfac:sharing=reduce", "tkfac", "ekfac"):
        by_hand, *found = (
            estimate(problem, quantity, structure, params=["inner.*", "head.*"], backend=backend).to_dense()
            for problem, backend in ((parts, "torch"), (at_once, "hooks"), (parts, "hooks"))
        )
        for matrix in found:
            if structure == "ekfac":
                assert torch.allclose(matrix.trace(), by_hand.trace(), rtol=1e-8, atol=1e-11)
            else:
                assert torch.allclose(matrix, by_hand, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("quantity", ["empirical_fisher", "fisher", "fisher:samples=2", "ggn", "hessian"])
@pytest.mark.parametrize("structure", ["dense", "kfac"])
def test_term_equals_flattening_where_terms_are_alone(quantity: str, structure: str) -> None:
    if structure == "kfac" and quantity == "hessian":
        pytest.skip("no Kronecker factors of a Hessian")
    model = Tagger(mixing=False)
    whole = Problem(model, "cross_entropy", (TOKENS, LABELS), unit="term")

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: Tensor) -> Tensor:
            return self.model(tokens[:, None])[:, 0]

    flat = Problem(Flat(), "cross_entropy", (TOKENS.flatten(), LABELS.flatten()))
    params = ["*inner.*", "*head.*"]
    found, right = (
        estimate(one, quantity, structure, params=params, backend="torch").to_dense() for one in (whole, flat)
    )
    if quantity == "fisher:samples=2":  # a sample's labels are drawn together
        assert found.shape == right.shape
    else:
        assert torch.allclose(found, right, **EXACT)


def test_monte_carlo_is_unbiased_in_both_units() -> None:
    for unit in ("sample", "term"):
        problem = Problem(Tagger(), CrossEntropy(ignore_index=-100, weight=W), (TOKENS, IGNORED), unit=unit)
        exact = estimate(problem, "fisher", "diag").diagonal()
        draws = torch.stack([estimate(problem, f"fisher:samples=20,seed={s}", "diag").diagonal() for s in range(30)])
        z = (draws.mean(dim=0) - exact) / (draws.std(dim=0) / 30**0.5 + 1e-12)
        assert z.abs().max() < 5
        found = [estimate(problem, "fisher:samples=3", "dense", backend=name).to_dense() for name in ("hooks", "torch")]
        assert torch.allclose(*found, **EXACT)


def padded(tokens: Tensor, labels: Tensor, by: int) -> tuple[Tensor, Tensor]:
    return nn.functional.pad(tokens, (0, by)), nn.functional.pad(labels, (0, by), value=-100)


@pytest.mark.parametrize("unit", ["sample", "term"])
@pytest.mark.parametrize("quantity", ["empirical_fisher", "fisher", "hessian"])
def test_invariances(quantity: str, unit: Any) -> None:
    """Padding, splitting and the order of batches change nothing; an ignored term is a term that is not there."""
    model, loss = Tagger(), CrossEntropy(ignore_index=-100)

    def matrix(data: Any) -> Tensor:
        return estimate(Problem(model, loss, data, unit=unit), quantity, "dense").to_dense()

    whole = matrix((TOKENS, IGNORED))
    more = padded(TOKENS, IGNORED, 3)
    for data in (
        more,
        [(TOKENS[:1], IGNORED[:1]), (TOKENS[1:], IGNORED[1:])],
        [(TOKENS[:2], IGNORED[:2]), tuple(part[2:] for part in more)],  # sequences of different lengths
    ):
        assert torch.allclose(matrix(data), whole, **EXACT)
    last = torch.cat([LABELS[:, :-1], torch.full((N, 1), -100)], dim=1)
    assert torch.allclose(matrix((TOKENS, last)), matrix((TOKENS[:, :-1], LABELS[:, :-1])), **EXACT)


@pytest.mark.parametrize("quantity", ["empirical_fisher", "fisher", "ggn", "hessian"])
def test_a_weight_is_a_number_of_repetitions(quantity: str) -> None:
    model = Tagger(mixing=False)
    weighted = CrossEntropy(weight=torch.tensor([1.0, 2.0, 1.0]).double())
    twice = (LABELS == 1).flatten()
    tokens = torch.cat([TOKENS.flatten(), TOKENS.flatten()[twice]])[:, None]
    labels = torch.cat([LABELS.flatten(), LABELS.flatten()[twice]])[:, None]
    found = estimate(Problem(model, weighted, (TOKENS, LABELS), unit="term"), quantity, "dense").to_dense()
    right = estimate(Problem(model, "cross_entropy", (tokens, labels), unit="term"), quantity, "dense").to_dense()
    assert torch.allclose(found, right, **EXACT)


@pytest.mark.parametrize("make", [nn.CrossEntropyLoss, lambda: nn.CrossEntropyLoss(weight=W, label_smoothing=0.1)])
def test_the_hessian_of_a_loss_of_torch_is_torchs(make: Callable[[], nn.Module]) -> None:
    model, loss = Tagger(), make()
    flat = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    named = {name: p.shape for name, p in model.named_parameters()}

    def mean(at: Tensor) -> Tensor:
        parts = at.split([shape.numel() for shape in named.values()])
        given = {name: part.view(shape) for (name, shape), part in zip(named.items(), parts, strict=True)}
        return loss(functional_call(model, given, (TOKENS,)).movedim(2, 1), IGNORED)

    problem = Problem(model, loss, (TOKENS, IGNORED))
    assert problem.loss.unit == "term"
    assert torch.allclose(estimate(problem, "hessian", "dense").to_dense(), hessian(mean)(flat), **EXACT)
    assert problem.loss_value() == pytest.approx(float(mean(flat)), rel=1e-12)
    assert torch.allclose(problem.gradient(), torch.func.grad(mean)(flat), **EXACT)
    samples = torch.stack(list(problem.per_sample_gradients()))
    assert torch.allclose(samples.sum(dim=0) / problem.num_units, problem.gradient(), **EXACT)


@pytest.mark.parametrize("norm", ["sumsq", "mean", "scaled"])
@pytest.mark.parametrize("unit", ["sample", "term"])
def test_masq(norm: str, unit: Any) -> None:
    problem = Problem(Tagger(), CrossEntropy(ignore_index=-100), (TOKENS, IGNORED), unit=unit)
    quantity = f"masq:batch_size=2,norm={norm}"
    gradients, sizes = torch.stack(list(problem.per_sample_gradients())), (IGNORED != -100).sum(dim=1).double()
    sizes = sizes if unit == "term" else torch.ones(N).double()
    parts = list(zip(gradients.split(2), sizes.split(2), strict=True))
    if norm == "sumsq":
        expected = sum(g.sum(dim=0).square() for g, _ in parts) / sizes.sum()
    else:
        means = [(g.sum(dim=0) / s.sum()).square() for g, s in parts]
        expected = sum(means) / (len(parts) if norm == "mean" else sizes.sum())
    for backend in ("hooks", "torch"):
        found = estimate(problem, quantity, "diag", backend=backend).diagonal()
        assert torch.allclose(found, expected, **EXACT)
    ragged = [(TOKENS[:3, :2], IGNORED[:3, :2]), (TOKENS[3:], IGNORED[3:])]
    with pytest.raises(UnsupportedError, match=r"masq:batch_size=2.*different shapes: pad them"):
        estimate(Problem(Tagger(), CrossEntropy(ignore_index=-100), ragged, unit=unit), "masq:batch_size=2", "diag")


class TestRefused:
    @pytest.mark.parametrize(
        ("loss", "targets", "told"),
        [
            ("cross_entropy", LABELS[:, 0], r"targets of a batch have shape \(5,\).*must be \(N, S\)"),
            ("cross_entropy", LABELS[:, :2], r"shape \(5, 2\), but the model returns 4 terms per sample"),
            ("cross_entropy", IGNORED, "a label is -100"),
            ("squared_error", numbers(N, T, 2), r"shape of the outputs \(20, 3\).*\(20, 2\)"),
            (CrossEntropy(ignore_index=-100), torch.full((N, T), -100), "no term of the data counts"),
        ],
    )
    def test_targets(self, loss: Any, targets: Tensor, told: str) -> None:
        with pytest.raises(CurvlabError, match=told):
            estimate(Problem(Tagger(), loss, (TOKENS, targets), unit="term"), "fisher", "diag")

    @pytest.mark.parametrize("backend", ["backpack", "nngeometry", "curvlinops"])
    def test_other_libraries(self, backend: str) -> None:
        problem = Problem(Tagger(), "cross_entropy", (TOKENS, LABELS))
        with pytest.raises(UnsupportedError, match=r"one input tensor and outputs \(N, C\), unlike Tagger"):
            estimate(problem, "fisher", "kfac:rest=diag", backend=backend)

    def test_a_unit(self) -> None:
        with pytest.raises(CurvlabError, match="unit must be 'sample' or 'term', not 'token'"):
            Problem(Tagger(), "cross_entropy", (TOKENS, LABELS), unit="token")  # type: ignore[arg-type]


def test_images() -> None:
    """Outputs ``(N, C, H, W)`` with ``class_dim=1`` are the same as ``(N, H, W, C)``."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, C, 1)).double()
    images, labels = numbers(N, 2, 3, 4), torch.randint(C, (N, 3, 4))
    found = estimate(Problem(net, "cross_entropy", (images, labels), class_dim=1), "fisher", "dense").to_dense()
    problem = Problem(
        net, "cross_entropy", (images, labels), forward=lambda m, b: m(b[0]).movedim(1, -1), targets=lambda b: b[1]
    )
    assert torch.allclose(found, estimate(problem, "fisher", "dense").to_dense(), **EXACT)
    with pytest.raises(UnsupportedError, match=r"class_dim=7 is not a dimension of outputs"):
        Problem(net, "cross_entropy", (images, labels), class_dim=7).check()


class TestLayoutOfCrossEntropyLoss:
    """``nn.CrossEntropyLoss`` takes the classes in dimension 1; the targets tell where a model has them."""

    def problem(self, terms: tuple[int, ...], *, last: bool, classes: int = C, **more: Any) -> Problem:
        torch.manual_seed(0)
        net = nn.Linear(2, classes).double()
        x, labels = numbers(N, *terms, 2), torch.randint(classes, (N, *terms))
        forward = (lambda m, b: m(b[0])) if last else (lambda m, b: m(b[0]).movedim(-1, 1))
        return Problem(net, nn.CrossEntropyLoss(), (x, labels), forward=forward, targets=lambda b: b[1], **more)

    @pytest.mark.parametrize("terms", [(5,), (4, 5), (C + 1, C)])
    def test_both_layouts(self, terms: tuple[int, ...]) -> None:
        second, last = (self.problem(terms, last=last) for last in (False, True))
        (x, y), net = second.data, second.model
        expected = nn.functional.cross_entropy(net(x).movedim(-1, 1), y).detach()
        assert second.loss_value() == pytest.approx(float(expected), rel=1e-12)
        found, right = (estimate(problem, "empirical_fisher", "dense").to_dense() for problem in (second, last))
        assert torch.allclose(found, right, **EXACT)
        assert not second.is_plain

    def test_neither_layout_is_sure(self) -> None:
        with pytest.raises(UnsupportedError, match=r"outputs \(3, 3\) of a sample with targets \(3,\).*class_dim=1 or"):
            self.problem((3,), last=False, classes=3).check()
        assert self.problem((3,), last=False, classes=3, class_dim=1).loss_value() == pytest.approx(
            self.problem((3,), last=True, classes=3, class_dim=-1).loss_value(), rel=1e-12
        )

    def test_one_term_is_plain(self) -> None:
        net, x, y = nn.Linear(2, C), numbers(N, 2), torch.randint(C, (N,))
        assert Problem(net, nn.CrossEntropyLoss(), (x, y)).is_plain


def test_one_number_per_sample() -> None:
    torch.manual_seed(0)
    net, x, y = nn.Linear(3, 1).double(), numbers(N, 3), numbers(N, seed=1)
    flat = Problem(net, "squared_error", (x, y), forward=lambda m, b: m(b[0])[:, 0])
    whole = Problem(net, "squared_error", (x, y[:, None]))
    for quantity in ("fisher", "empirical_fisher", "hessian"):
        found, right = (estimate(one, quantity, "dense").to_dense() for one in (flat, whole))
        assert torch.allclose(found, right, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("structure", ["diag", "dense"])
def test_terms_of_weight_zero_in_the_reference(structure: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(3, 4).to(dtype), torch.randn(6, 3, dtype=dtype)
    loss = CrossEntropy(weight=torch.tensor([1.0, 0.3, 2.5, 0.0]), label_smoothing=0.2, ignore_index=2)
    problem = Problem(model, loss, (x, torch.tensor([0, 1, 2, 3, 3, 0])), unit="term")
    matrices = [estimate(problem, "empirical_fisher", structure, backend=name) for name in ("hooks", "torch")]
    ours, reference = (matrix.to_dense() for matrix in matrices)
    assert torch.allclose(ours, reference, rtol=1e-5, atol=0 if dtype == torch.float64 else 1e-7)
