"""Linear regression in closed form, and the analysis ``empirical_fisher_field``: oracles, samples, claims."""

import json

import numpy as np
import pytest
import torch

from curvlab import Problem, estimate
from curvlab.analyze.frame.analysis import Results, Workspace
from curvlab.analyze.frame.subject import Subject
from curvlab.analyze.lecture.empirical_fisher_field import (
    ANALYSIS,
    FIELDS,
    PRESETS,
    EmpiricalFisherFieldConfig,
    draw_regression,
    make_fields,
    measure,
)
from curvlab.grid import Place
from curvlab.least_squares import LeastSquares, angles, descend


def regression(precision=0.0):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(30, 3, dtype=torch.float64, generator=generator)
    return LeastSquares(x, torch.randn(30, dtype=torch.float64, generator=generator), precision)


@pytest.mark.parametrize("precision", [0.0, 4.0])
def test_gradient_and_hessian_are_those_of_the_loss(precision):
    problem = regression(precision)
    thetas = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for index in np.ndindex(2, 5):
        theta = thetas[index].requires_grad_()
        (gradient,) = torch.autograd.grad(problem.loss(theta), theta)
        torch.testing.assert_close(problem.gradient(thetas)[index], gradient)
    torch.testing.assert_close(torch.func.hessian(problem.loss)(thetas[0, 0].detach()), problem.hessian)
    assert problem.gradient(problem.solution).norm() < 1e-12


def test_the_fishers_are_those_of_the_estimators():
    problem, theta = regression(4.0), torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    model = torch.nn.Linear(3, 1, bias=False).double()
    model.weight.data.copy_(theta)
    data = Problem(model, "squared_error", (problem.x, problem.y[:, None]))
    torch.testing.assert_close(estimate(data, "fisher", "dense", backend="torch").to_dense(), problem.fisher)
    empirical = estimate(data, "empirical_fisher", "dense", backend="torch").to_dense()
    torch.testing.assert_close(problem.empirical_fisher(theta), empirical)
    torch.testing.assert_close(problem.empirical_fisher(theta.expand(2, 4, 3))[1, 2], empirical)


def test_descent_is_gradient_descent():
    problem, starts = regression(), torch.eye(3, dtype=torch.float64)[:2]
    path = descend(lambda theta: -problem.gradient(theta), starts, 0.1, 7)
    assert path.shape == (8, 2, 3)
    for start, end in zip(starts, path[-1], strict=True):
        theta = start.clone().requires_grad_()
        optimizer = torch.optim.SGD([theta], lr=0.1)
        for _ in range(7):
            optimizer.zero_grad()
            problem.loss(theta).backward()
            optimizer.step()
        torch.testing.assert_close(end, theta.detach())


def test_angles():
    one, other = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]), torch.tensor([[2.0, 2.0], [-3.0, 0.0], [1.0, 0.0]])
    torch.testing.assert_close(angles(one, other), torch.tensor([45.0, 180.0, torch.nan]), equal_nan=True)


def test_the_published_regression():
    """The first numbers that NumPy's legacy generator draws of seed 0, in the order of the authors' code."""
    problem = draw_regression(1000, 0)
    legacy = np.random.RandomState(0)
    feature, noise = legacy.lognormal(0, 0.75, (1000, 1)), legacy.standard_normal((1000, 1))
    assert feature[0, 0] == pytest.approx(np.exp(0.75 * 1.764052345967664))  # its first normal number
    assert np.array_equal(problem.x.numpy()[:, 1:], feature)
    assert np.allclose(problem.y.numpy(), (2 + 2 * feature + noise)[:, 0])
    assert problem.loss(torch.tensor([1.0, 3.0], dtype=torch.float64)).item() == pytest.approx(
        np.mean((1 + 3 * feature - 2 - 2 * feature - noise) ** 2) / 2 + 10 / (2 * 0.1 * 1000)
    )


def test_the_fields():
    problem = draw_regression(50, 3)
    theta = torch.tensor([0.5, 4.0], dtype=torch.float64)
    fields = {name: field(theta) for name, field in make_fields(problem).items()}
    gradient = problem.gradient(theta)
    assert list(fields) == list(FIELDS)
    torch.testing.assert_close(fields["gd"], -gradient / 3)
    torch.testing.assert_close(fields["ngd"], problem.solution - theta, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(fields["ef"], -3 * problem.empirical_fisher(theta).inverse() @ gradient)


def test_a_run(tmp_path):
    config = EmpiricalFisherFieldConfig(samples=200, steps=20_000, step_size=0.002, seeds=(0,))
    records = {record["field"]: record for record in measure(config, None, Workspace(Place(tmp_path)))}
    assert records["ngd"]["largest_angle"] < 1e-3
    assert records["ngd"]["end_distance"] < 1e-6
    assert records["ngd"]["detour"] == pytest.approx(1)
    assert records["ef"]["median_angle"] > 10
    assert records["ef"]["largest_angle"] > records["gd"]["largest_angle"]
    drawing = json.loads((tmp_path / "drawing.json").read_text())
    paths = np.asarray(drawing["trajectories"]["gd"])
    assert paths[:, 0].tolist() == [[2.0, 4.5], [1.0, 0.0], [4.5, 3.0], [-0.5, 3.0]]
    assert np.linalg.norm(paths[:, -1] - drawing["solution"], axis=1).max() == pytest.approx(
        records["gd"]["end_distance"]
    )
    panels = report(artifacts=[drawing]).figures["fields"]().axes
    assert [axes.get_title() for axes in panels] == ["data and fit", *FIELDS.values()]


def report(config=PRESETS["default"].config, seeds=3, artifacts=(), changed_field="ef", **changed):
    usual = {"median_angle": 10.1, "largest_angle": 90.0, "end_distance": 0.0, "detour": 1.0}
    table = [
        {"seed": seed, "field": field, **usual, **(changed if field == changed_field and seed == seeds - 1 else {})}
        for seed in range(seeds)
        for field in FIELDS
    ]
    return ANALYSIS.report(Results(config, Subject.of(None), {"table": table}, artifacts={"drawing": artifacts}))


def test_verdicts():
    assert [claim.verdict for claim in report().claims] == ["reproduced", "reproduced"]
    assert [claim.verdict for claim in report(median_angle=9.9).claims] == ["not reproduced", "reproduced"]
    far = report(changed_field="ngd", end_distance=4.2)
    assert [claim.verdict for claim in far.claims] == ["reproduced", "not reproduced"]
    assert far.notes == [
        f"Seed 2: after the last step, a trajectory of the field {FIELDS['ngd']} is still 4.2 from the solution."
    ]
    assert [claim.verdict for claim in report(seeds=2).claims] == ["not tested", "not tested"]
    claim, _ = report(EmpiricalFisherFieldConfig(samples=999)).claims
    assert (claim.verdict, claim.reason) == ("not tested", "samples is 999, published: 1,000")
    assert report().notes == []
    (note,) = report(end_distance=3.0).notes
    assert note.startswith("Seed 2: after the last step")
    assert report().figures == {}
