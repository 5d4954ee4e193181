"""Laplace's posterior of a trained network: where it is exact, against dense formulas, and against laplace-torch."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal
from torch.func import functional_call, jacrev

from curvlab import CurvlabError, Problem, UnsupportedError, estimate
from curvlab.posterior import Gaussian, laplace, predict_linear

STRUCTURES = ("dense", "block_diag", "diag", "kfac", "ekfac", "tkfac", "implicit")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def network(outputs=3, bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3, bias), nn.Tanh(), nn.Linear(3, outputs, bias)).double()


def classification(outputs=3, samples=20):
    x = draw(samples, 4)
    return Problem(network(outputs), "cross_entropy", (x, x[:, :outputs].argmax(dim=1)))


def flat(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def test_linear_regression_is_exact():
    """Evidence and predictive are those of the Gaussian process with the linear kernel."""
    precision, x, new = 0.7, draw(12, 4), draw(5, 4, seed=1)
    y = x @ draw(4, 1, seed=2) + draw(12, 1, seed=3)
    kernel = x @ x.T / precision + torch.eye(12).double()
    model = nn.Linear(4, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.linalg.solve(x.T @ x + precision * torch.eye(4).double(), x.T @ y).T)
    posterior = laplace(Problem(model, "squared_error", (x, y)), "dense", prior_precision=precision)
    exact = MultivariateNormal(torch.zeros(12).double(), kernel).log_prob(y[:, 0]) + 6 * math.log(2 * math.pi)
    assert posterior.evidence == pytest.approx(float(exact), rel=1e-12)
    mean, covariance = posterior.outputs(new)
    cross = new @ x.T / precision
    torch.testing.assert_close(mean, cross @ torch.linalg.solve(kernel, y))
    expected = (new @ new.T / precision - cross @ torch.linalg.solve(kernel, cross.T)).diagonal()
    torch.testing.assert_close(covariance[:, 0, 0], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("unit", ["sample", "term"])
def test_against_dense_formulas(structure, unit):
    x = draw(6, 2, 4)  # two terms per sample
    y = torch.randint(3, (6, 2), generator=torch.Generator().manual_seed(0))
    problem, precision = Problem(network(), "cross_entropy", (x, y), unit=unit), 0.3
    theta, scale = flat(problem.model), 6 if unit == "sample" else 12
    curvature = scale * estimate(problem, "fisher", structure).to_dense()
    total = curvature + precision * torch.eye(len(theta)).double()
    loss = nn.functional.cross_entropy(problem.model(x).flatten(0, 1), y.flatten(), reduction="sum")
    log_prior = Gaussian.prior(len(theta), precision).log_prob(theta)
    exact = -loss + log_prior + len(theta) / 2 * math.log(2 * math.pi) - torch.logdet(total) / 2
    posterior = laplace(problem, structure, prior_precision=precision)
    assert posterior.evidence == pytest.approx(float(exact.detach()), rel=1e-10)

    space, new = problem.space, draw(3, 2, 4, seed=1)
    jacobian = jacrev(lambda p: functional_call(problem.model, space.unflatten(p), (new,)).flatten(1))(theta)
    mean, covariance = posterior.outputs(new)
    expected = torch.einsum("map,pq,mbq->mab", jacobian, torch.linalg.inv(total), jacobian)
    torch.testing.assert_close(mean, problem.model(new).flatten(1).detach())
    torch.testing.assert_close(covariance, expected, rtol=1e-8, atol=1e-10)


def test_parts_of_the_inputs_do_not_matter(monkeypatch):
    posterior, x = laplace(classification(), prior_precision=1.0), draw(7, 4)
    whole = posterior.outputs(x)
    monkeypatch.setattr("curvlab.posterior.network._BYTES", 3 * 27 * 8 * 2.0)  # two samples
    for a, b in zip(whole, posterior.outputs(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("structure", ["dense", "kfac", "ekfac", "diag"])
def test_the_chosen_prior_has_the_largest_evidence(structure):
    posterior = laplace(classification(), structure)
    chosen = posterior.prior_precision
    grid = torch.logspace(-4, 4, 81).double() * chosen
    values = [posterior.with_prior(float(precision)).evidence for precision in grid]
    assert max(values) <= posterior.evidence + 1e-9
    step = 1e-4  # the derivative is zero there
    up, down = (posterior.with_prior(chosen * math.exp(s)).evidence for s in (step, -step))
    assert abs(up - down) / (2 * step) < 1e-6


def test_a_prior_per_layer_and_a_part_of_the_parameters():
    problem = classification()
    priors = {"0.weight": 2.0, "0.bias": 2.0, "2.weight": 0.5, "2.bias": 0.5}
    diagonal = torch.cat([torch.full((p.numel(),), priors[name]) for name, p in problem.model.named_parameters()])
    for structure in ("kfac", "dense"):
        by_name = laplace(problem, structure, prior_precision=priors)
        total = 20 * estimate(problem, "fisher", structure).to_dense() + diagonal.double().diag()
        theta = flat(problem.model)
        rest = theta.square() @ diagonal.double() + torch.logdet(total) - diagonal.double().log().sum()
        assert by_name.evidence == pytest.approx(-20 * problem.loss_value() - float(rest) / 2, rel=1e-10)
    last = laplace(problem, "dense", prior_precision=1.0, params="2.*")
    x = draw(2, 4, seed=1)
    features = torch.cat([problem.model[:2](x), torch.ones(2, 1).double()], dim=1)
    inverse = torch.linalg.inv(20 * estimate(problem, "fisher", "dense", params="2.*").to_dense() + torch.eye(12))
    jacobian = torch.cat([torch.einsum("ab,md->mabd", torch.eye(3), features[:, :3]).flatten(2),
                          torch.eye(3).double().expand(2, -1, -1)], dim=2)  # fmt: skip
    expected = torch.einsum("map,pq,mbq->mab", jacobian, inverse, jacobian)
    torch.testing.assert_close(last.outputs(x)[1], expected, rtol=1e-9, atol=1e-12)


def test_draws_have_the_mean_and_the_covariance():
    posterior = laplace(classification(), "dense", prior_precision=2.0)
    draws = posterior.sample(40_000, seed=3)
    expected = torch.linalg.inv(posterior.curvature.to_dense() + 2 * torch.eye(27))
    deviation = expected.diagonal().sqrt()
    assert bool(((draws.mean(dim=1) - flat(posterior.problem.model)).abs() < 5 * deviation / 200).all())
    torch.testing.assert_close(draws.cov(), expected, rtol=0, atol=5 * float(expected.max()) / 200)


def test_probabilities_of_classes():
    """The softmax of two logits is the sigmoid of their difference, which has a quadrature."""
    problem, x = classification(outputs=2), draw(6, 4, seed=1)
    posterior = laplace(problem, "dense", prior_precision=0.5)
    mean, covariance = posterior.outputs(x)
    difference = torch.tensor([-1.0, 1.0]).double()
    deviation = torch.einsum("a,mab,b->m", difference, covariance, difference).sqrt()
    nodes = torch.linspace(-9, 9, 4001).double()
    density = torch.exp(-nodes.square() / 2)
    values = (mean @ difference + nodes[:, None] * deviation).sigmoid()
    expected = density @ values / density.sum()
    found = posterior.probabilities(x, samples=20_000)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(6).double())
    spread = (density @ (values - expected).square() / density.sum()).sqrt()
    assert bool(((found[:, 1] - expected).abs() < 4 * spread / 20_000**0.5).all())
    alone, together = (posterior.probabilities(part, samples=50) for part in (x[2:4], x))
    torch.testing.assert_close(alone, together[2:4], rtol=1e-10, atol=0)


def test_probabilities_of_labels_are_those_of_predict_linear():
    x = draw(20, 4)
    model = network(1)
    problem = Problem(model, "binary_cross_entropy", (x, (x[:, :1] > 0).double()))
    posterior = laplace(problem, "dense", prior_precision=0.5)
    total = Gaussian(flat(model), posterior.curvature.to_dense() + 0.5 * torch.eye(19))
    new = draw(6, 4, seed=1)
    torch.testing.assert_close(
        posterior.probabilities(new)[:, 0], predict_linear(model, total, new), rtol=1e-12, atol=0
    )


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, a, b):
        return self.one(a) + self.two(b)


def test_inputs_of_another_form():
    a, b, y = draw(8, 3), draw(8, 2), torch.tensor([0, 1] * 4)
    expected = laplace(Problem(Two().double(), data=((a, b), y)), prior_precision=1.0).outputs((a, b))
    batches = Problem(
        Two().double(),
        data=[{"a": a, "b": b, "y": y}],
        forward=lambda m, d: m(d["a"], d["b"]),
        targets=lambda d: d["y"],
    )
    found = laplace(batches, prior_precision=1.0).outputs({"a": a, "b": b})
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other)


def test_later_training_does_not_change_it():
    problem, x = classification(), draw(3, 4)
    posterior = laplace(problem, prior_precision=1.0)
    before = posterior.outputs(x)
    with torch.no_grad():
        problem.model[0].weight.add_(1)
    for a, b in zip(before, posterior.outputs(x), strict=True):
        assert torch.equal(a, b)
    assert posterior.evidence == laplace(classification(), prior_precision=1.0).evidence


def test_refusals():
    problem = classification()
    with pytest.raises(UnsupportedError, match="no multiple of it is the curvature of the sum of the losses"):
        laplace(problem, quantity="masq")
    for precision in (0.0, -1.0, float("nan"), "1"):
        with pytest.raises(CurvlabError, match="prior_precision must be a finite number above 0"):
            laplace(problem, prior_precision=precision)
    negative = {name: -1.0 if name == "2.bias" else 1.0 for name in problem.space.names}
    with pytest.raises(CurvlabError, match="above 0 for every parameter, but its smallest number is -1"):
        laplace(problem, prior_precision=negative)
    with pytest.raises(CurvlabError, match="negative eigenvalue"):
        laplace(problem, "dense", quantity="hessian")
    x = draw(5, 4)
    regression = Problem(network(), "squared_error", (x, draw(5, 3)))
    with pytest.raises(UnsupportedError, match="not for squared_error: use outputs"):
        laplace(regression).probabilities(x)
    terms = Problem(network(), "cross_entropy", (draw(5, 2, 4), torch.zeros(5, 2).long()))
    with pytest.raises(UnsupportedError, match="for samples of one term"):
        laplace(terms).probabilities(draw(5, 2, 4))
    zero = nn.Linear(4, 3).double()
    nn.init.zeros_(zero.weight), nn.init.zeros_(zero.bias)
    with pytest.raises(CurvlabError, match="because all parameters are 0"):
        laplace(Problem(zero, "cross_entropy", (x, torch.zeros(5).long())))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
@pytest.mark.parametrize(("structure", "theirs"), [("dense", "full"), ("kfac", "kron"), ("diag", "diag")])
def test_against_laplace_torch(loss, structure, theirs):
    """Evidence, and mean and covariance of the outputs; both sums, so that no factor N is between them."""
    package = pytest.importorskip("laplace")
    asdl = pytest.importorskip("laplace.curvature.asdl")
    from torch.utils.data import DataLoader, TensorDataset

    # With a bias, its K-FAC is another approximation: it leaves out the covariance of weight and bias.
    model, x, new = network(bias=theirs != "kron"), draw(20, 4), draw(5, 4, seed=1)
    y = x[:, :3].argmax(dim=1) if loss == "cross_entropy" else x[:, :3].square()
    kind = "classification" if loss == "cross_entropy" else "regression"
    backend = asdl.AsdlGGN if theirs != "full" else None
    other = package.Laplace(
        model, kind, subset_of_weights="all", hessian_structure=theirs, prior_precision=0.3,
        **({"backend": backend} if backend else {}),
    )  # fmt: skip
    other.fit(DataLoader(TensorDataset(x, y), batch_size=20))
    posterior = laplace(Problem(model, loss, (x, y)), structure, prior_precision=0.3)
    constant = 30 * math.log(2 * math.pi) if kind == "regression" else 0.0
    assert posterior.evidence == pytest.approx(float(other.log_marginal_likelihood()) + constant, rel=1e-6)
    mean, covariance = other._glm_predictive_distribution(new)
    found = posterior.outputs(new)
    torch.testing.assert_close(found[0], mean.detach(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found[1], covariance.detach(), rtol=1e-6, atol=1e-8)
