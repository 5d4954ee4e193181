"""Divergences on the line, and the analysis ``kl_gaussians``: closed forms, fits, the Fisher as a Hessian, claims."""

import math

import pytest
import torch
from torch.distributions import Normal, Uniform
from torch.distributions import kl_divergence as closed_form

from curvlab import Problem, estimate
from curvlab.analyze.frame.analysis import Results, Workspace
from curvlab.analyze.frame.subject import Subject
from curvlab.analyze.lecture import kl_gaussians as analysis
from curvlab.analyze.lecture.kl_gaussians import ANALYSIS, KlGaussiansConfig, measure, mixture
from curvlab.divergences import fit_normal, kl_divergence, quadrature_grid
from curvlab.errors import CurvlabError
from curvlab.grid import Place

GRID = quadrature_grid(-40, 40)
CONFIG = KlGaussiansConfig(starts=8, hidden=(3,), points=8)


def normal(mean, std):
    return Normal(*torch.tensor([mean, std], dtype=torch.float64))


@pytest.mark.parametrize("p", [(0.0, 0.5), (2.0, 1.5)])
@pytest.mark.parametrize("q", [(1.0, 0.7), (-1.0, 3.0)])
def test_quadrature_is_the_closed_form(p, q):
    one, other = normal(*p), normal(*q)
    assert float(kl_divergence(one, other, GRID)) == pytest.approx(float(closed_form(one, other)), abs=1e-12)


def test_forward_fit_has_the_moments_and_reverse_fit_a_mode():
    for start in ((-4.0, 2.0), (0.1, 1.0), (5.0, 0.3)):
        q, divergence = fit_normal(mixture(3.0), "forward", *start, GRID)
        assert float(q.loc) == pytest.approx(0, abs=1e-5)
        assert float(q.scale**2) == pytest.approx(10, abs=1e-5)
        assert divergence == pytest.approx(float(kl_divergence(mixture(3.0), q, GRID)), abs=1e-9)
    q, divergence = fit_normal(mixture(3.0), "reverse", -2.0, 0.1, GRID)
    assert (-3.1 < q.loc < -2.9, 0.95 < q.scale < 1.1) == (True, True)
    assert divergence == pytest.approx(float(kl_divergence(q, mixture(3.0), GRID)), abs=1e-9)
    assert divergence == pytest.approx(math.log(2), abs=0.01)
    # Between the modes there is another local minimum, wide.
    wide, higher = fit_normal(mixture(3.0), "reverse", 0.0, 3.0, GRID)
    assert (abs(wide.loc) < 1e-5, wide.scale > 2.5, higher > divergence) == (True, True, True)


def test_a_fit_of_a_normal_is_that_normal():
    for direction in ("forward", "reverse"):
        q, divergence = fit_normal(normal(1.0, 2.0), direction, -3.0, 0.5, GRID)
        assert (float(q.loc), float(q.scale)) == (pytest.approx(1.0, abs=1e-5), pytest.approx(2.0, abs=1e-5))
        assert divergence == pytest.approx(0, abs=1e-10)


def test_a_fit_that_does_not_converge(monkeypatch):
    monkeypatch.setattr("curvlab.divergences._ITERATIONS", 1)
    with pytest.raises(CurvlabError, match="the reverse fit from mean -4 and standard deviation 5 does not converge"):
        fit_normal(mixture(3.0), "reverse", -4.0, 5.0, GRID)


LINE = quadrature_grid(-10, 10)


@pytest.mark.parametrize(
    ("p", "grid", "message"),
    [
        ((0.0, 1.0), torch.logspace(-2, 1, 300), "must be equally spaced, but their distances are between 0.00023"),
        (
            (0.0, 1.0),
            torch.cat([LINE[:900], LINE[901:]]),
            "must be equally spaced, but their distances are between 0.01 and",
        ),
        ((0.0, 1.0), LINE.flip(0), "must be three or more and increase; take a quadrature_grid"),
        ((0.0, 1.0), LINE[[0, -1]], "must be three or more and increase"),
        ((0.0, 1.0), torch.zeros(9), "must be three or more and increase"),
        ((0.0, 1.0), LINE.view(3, -1), r"the grid must be a dense real tensor \(n,\), not .*\(3, 667\)"),
        ((0.0, 1.0), [0.0, 1.0, 2.0], "the grid must be a dense real tensor"),
        ((0.0, 1.0), math.nan * LINE, "the grid must be finite"),
        ((0.0, 1.0), quadrature_grid(0, 1), r"mass of p on the grid is 0\.34.*, not 1: .* too narrow or too coarse"),
        ((0.0, 1.0), quadrature_grid(-10, 10, 5), r"mass of p on the grid is 1\.99.* in steps of 5 "),
        ((20.0, 1.0), LINE, "mass of p on the grid is .*, not 1"),
    ],
)
def test_grids_that_do_not_fit(p, grid, message):
    for call in (
        lambda: kl_divergence(normal(*p), normal(1.0, 1.0), grid),
        lambda: fit_normal(normal(*p), "forward", 1.0, 1.0, grid),
    ):
        with pytest.raises(CurvlabError, match=message):
            call()


def test_other_grids_of_equal_spacing():
    expected = pytest.approx(0.5, abs=1e-5)
    for grid in (LINE.float(), torch.arange(-10, 11), torch.linspace(990, 1010, 2001)):
        centre = float(grid.double().mean())
        assert float(kl_divergence(normal(centre, 1.0), normal(centre + 1, 1.0), grid)) == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quadrature_grid(1, 0), "low must be below high, not 1 with high 0"),
        (lambda: quadrature_grid(0, math.inf), "high must be a finite real number, not inf"),
        (lambda: quadrature_grid(0, 1, 2), "points must be a whole number from 3, not 2"),
        (lambda: kl_divergence(None, normal(0.0, 1.0), LINE), "p must be one distribution on the real line, not None"),
        (
            lambda: kl_divergence(normal(0.0, 1.0), Normal(torch.zeros(3), 1.0), LINE),
            r"q must be one .* a batch \(3,\)",
        ),
        (
            lambda: kl_divergence(normal(0.0, 1.0), Uniform(0.0, 1.0), LINE),
            "q has no density at some points of the grid",
        ),
        (
            lambda: kl_divergence(Uniform(0.0, 1.0), normal(0.0, 1.0), LINE),
            "p has no density at some points of the grid",
        ),
        (
            lambda: fit_normal(normal(0.0, 1.0), "forward", 0.0, math.inf, LINE),
            "std must be a finite number above 0, not inf",
        ),
        (
            lambda: fit_normal(normal(0.0, 1.0), "reverse", None, 1.0, LINE),
            "mean must be a finite real number, not None",
        ),
        (lambda: fit_normal(None, "reverse", 0.0, 1.0, LINE), "p must be one distribution on the real line"),
    ],
)
def test_arguments_of_divergences(call, message):
    with pytest.raises(CurvlabError, match=message):
        call()


def run(config=CONFIG, seeds=3, **changed):
    """Return results of synthetic fits; ``changed`` of the last seed, by direction and key."""
    table = [
        {"seed": seed, "p": "P", "q": "Q", "mean": 0, "std": 1, "kl": 1.0, "reverse_kl": 1.0} for seed in range(seeds)
    ]
    table = [{**row, "other_mean": 1, "other_std": 1} for row in table]
    usual = {"forward": {"distance": 0.1, "variance": 10.1}, "reverse": {"distance": 2.9, "fit_std": 1.1}}
    fits = [
        {"seed": seed, "direction": direction, "fit_mean": 1.0, "fit_std": 1.0, "variance": 1.0, "divergence": 0.5}
        | {"worst": 0.5, "found": 1.0, **values, **(changed.get(direction, {}) if seed == seeds - 1 else {})}
        for seed in range(seeds)
        for direction, values in usual.items()
    ]
    identities = [{"seed": s, "identity": n, "difference": 0.0} for s in range(seeds) for n in analysis._DIFFERENCES]
    records = {"table": table, "fits": fits, "identities": identities}
    return ANALYSIS.report(Results(config, Subject.of(None), records))


@pytest.mark.parametrize(
    ("place", "direction", "missed"),
    [
        (0, "forward", {"variance": 10.2}),
        (0, "forward", {"variance": 9.8}),
        (1, "forward", {"distance": 0.2}),
        (2, "reverse", {"distance": 0.0}),
        (2, "reverse", {"distance": 3.2}),
        (3, "reverse", {"fit_std": 2.7}),
    ],
)
def test_verdicts(place, direction, missed):
    assert [claim.verdict for claim in run().claims] == ["reproduced"] * 4
    verdicts = ["reproduced"] * 4
    verdicts[place] = "not reproduced"
    assert [claim.verdict for claim in run(**{direction: missed}).claims] == verdicts
    assert {claim.verdict for claim in run(seeds=2).claims} == {"not tested"}
    other = run(CONFIG.model_copy(update={"separation": 2.0})).claims[0]
    assert (other.verdict, other.reason) == ("not tested", "separation is 2, published: 3")


def test_a_run(tmp_path):
    records = list(measure(CONFIG.model_copy(update={"seeds": (1,)}), None, Workspace(Place(tmp_path))))
    panels = [record["kl"] for record in records if "kl" in record]
    assert panels == pytest.approx([2.0, 0.5, 0.125, 0.318, 0.128], abs=1e-3)
    forward, reverse = (record for record in records if "direction" in record)
    assert forward["variance"] == pytest.approx(10, rel=0.01)
    assert forward["found"] == 1
    assert 2.9 <= reverse["distance"] <= 3.1
    assert 0.95 <= reverse["fit_std"] <= 1.1
    assert reverse["worst"] >= reverse["divergence"]
    differences = {record["identity"]: record["difference"] for record in records if "identity" in record}
    assert set(differences) == set(analysis._DIFFERENCES)
    assert max(differences.values()) < 1e-10


def test_another_matrix_is_not_the_hessian(monkeypatch):
    """The difference would show, had the estimate been of the labels of the data."""

    def empirical(problem: Problem, quantity: str, structure: str):
        return estimate(problem, "empirical_fisher", structure)

    monkeypatch.setattr(analysis, "estimate", empirical)
    assert analysis.network_difference(CONFIG, 0) > 0.1


def test_figures():
    report = run(reverse={"found": 0.5, "worst": 0.84})
    (note,) = report.notes
    assert "(0.840 nats against 0.500)" in note
    assert len(report.figures["panels"]().axes) == 1
    figure = report.figures["fits"]()
    assert figure.get_figwidth() == 3.3
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["P", "Q, KL(P‖Q)", "Q, KL(Q‖P)"]


def test_an_unknown_direction_is_refused():
    grid = torch.linspace(-5, 5, 101, dtype=torch.float64)
    with pytest.raises(CurvlabError, match="direction must be forward or reverse, not 'Forward'"):
        fit_normal(Normal(0.0, 1.0), "Forward", 0.0, 1.0, grid)
    with pytest.raises(CurvlabError, match="std must be a finite number above 0, not 0"):
        fit_normal(Normal(0.0, 1.0), "reverse", 0.0, 0.0, grid)
