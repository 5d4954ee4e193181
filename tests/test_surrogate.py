"""The analysis ``surrogate``: curves and curvature by other means, its claims both ways, its figures."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from curvlab.analyze.frame.analysis import Results, Workspace
from curvlab.analyze.frame.subject import Subject
from curvlab.analyze.lecture.surrogate import ANALYSIS, SurrogateConfig, measure, relative_error, report
from curvlab.commandline.options import RunOptions
from curvlab.continual import permuted
from curvlab.grid import Place
from curvlab.models import build

DIGITS = Subject("digits", (1, 8, 8), 10, 1437, 360)
SMALL = SurrogateConfig(hidden=(4,), steps=8, samples=40, points=7, seeds=(1,))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("surrogate")
    data = ANALYSIS.load(SMALL, RunOptions())
    found = list(measure(SMALL, data, Workspace(Place(folder))))
    solutions = []
    for task in (1, 2):
        model = build("mlp", data.sample_shape, 10, hidden=(4,))
        saved = torch.load(folder / f"task-{task}.pt", weights_only=True)["model"]
        model.load_state_dict({name.removeprefix("parameter "): tensor for name, tensor in saved.items()})
        solutions.append(model.double())
    old = permuted(data, tasks=2, seed=1)[0]
    return found, solutions, (old.train[0][:40].double(), old.train[1][:40])


def flat(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def loss_at(model, theta, data):
    nn.utils.vector_to_parameters(theta, model.parameters())
    return float(F.cross_entropy(model(data[0]), data[1]).detach())


def test_the_exact_curve_and_the_hessian_by_differences(small):
    found, (first, second), data = small
    start, end = flat(first), flat(second)
    first = deepcopy(first)
    way = end - start
    base = loss_at(first, start, data)
    path = {(row["surrogate"], row["fraction"]): row["increase"] for row in found if "fraction" in row}
    assert len(path) == 6 * 7
    for (name, fraction), increase in path.items():
        if name == "exact":
            assert increase == pytest.approx(loss_at(first, start + fraction * way, data) - base, abs=1e-12)
    step = 1e-3
    up, down = (loss_at(first, start + sign * step * way, data) for sign in (1, -1))
    network = next(row for row in found if "gradient_term" in row)
    quadratic = {row["surrogate"]: row["quadratic"] for row in found if "near_error" in row}
    assert network["gradient_term"] == pytest.approx((up - down) / (2 * step), rel=1e-3)
    assert quadratic["hessian"] == pytest.approx((up + down - 2 * base) / (2 * step**2), rel=1e-3)
    assert network["distance"] == pytest.approx(float(way.norm()))
    assert path["hessian", 1.0] == pytest.approx(quadratic["hessian"])
    assert path["taylor", 1.0] == pytest.approx(quadratic["hessian"] + network["gradient_term"])
    assert network["old_loss_after"] == pytest.approx(loss_at(first, end, data))
    for name in ("diag", "kfac", "full"):
        for a in [fraction for one, fraction in path if one == name]:
            assert path[name, a] == pytest.approx(a**2 * quadratic[name])
    near = [a for name, a in path if name == "exact" and a <= 0.1]
    expected = relative_error([path["diag", a] for a in near], [path["exact", a] for a in near])
    assert next(row["near_error"] for row in found if row.get("surrogate") == "diag") == pytest.approx(expected)


def test_the_fishers_by_loops(small):
    found, (first, second), (x, _) = small
    way = flat(second) - flat(first)
    quadratic = {row["surrogate"]: row["quadratic"] for row in found if "near_error" in row}
    fisher = torch.zeros(len(way), len(way)).double()
    for sample in x:
        log_p = F.log_softmax(first(sample[None]), 1)[0]
        for value in log_p:
            rows = torch.autograd.grad(value, list(first.parameters()), retain_graph=True)
            row = torch.cat([part.flatten() for part in rows])
            fisher += float(value.detach().exp()) * torch.outer(row, row) / len(x)
    assert quadratic["full"] == pytest.approx(float(way @ fisher @ way) / 2, rel=1e-8)
    assert quadratic["diag"] == pytest.approx(float(fisher.diagonal() @ way.square()) / 2, rel=1e-8)


# Claims: with these numbers every claim holds.
GOOD = {
    "diag": {"near_error": 0.5, "end_error": 0.9},
    "kfac": {"near_error": 0.4, "end_error": 0.9},
    "full": {"near_error": 0.3, "end_error": 0.5},
    "hessian": {"near_error": 0.3, "end_error": 0.5},
    "taylor": {"near_error": 0.2, "end_error": 0.5},
}


def results(last_seed=(), gradient=0.1, steps=500):
    table, path = [], []
    for seed in range(3):
        for name, values in GOOD.items():
            values = values | (dict(last_seed).get(name, {}) if seed == 2 else {})
            table.append({"seed": seed, "surrogate": name, "quadratic": 1.0, **values})
        for place, name in enumerate((*GOOD, "exact")):
            path += [
                {"seed": seed, "surrogate": name, "fraction": a, "increase": place * a**2} for a in (0.01, 0.1, 1.0)
            ]
    network = {"distance": 1.0, "old_loss": 0.1, "old_loss_after": 1.0, "accuracy": 0.9, "accuracy_after": 0.5}
    networks = [{"seed": seed, "gradient_term": gradient if seed == 2 else 0.1, **network} for seed in range(3)]
    config = SurrogateConfig(steps=steps)
    return Results(config, DIGITS, {"table": table, "path": path, "networks": networks}, total=3)


def missed(**changes):
    return [claim.text for claim in report(results(**changes)).claims if claim.verdict != "reproduced"]


def test_claims_that_hold():
    assert missed() == []
    assert missed(gradient=-0.1) == []


@pytest.mark.parametrize(
    ("changes", "begins"),
    [
        ({"last_seed": {"taylor": {"near_error": 0.21}}}, "The second-order expansion"),
        ({"gradient": -0.11}, "The gradient can be ignored"),
        ({"last_seed": {"kfac": {"near_error": 0.51}}}, "Near the old solution the K-FAC"),
        ({"last_seed": {"full": {"near_error": 0.51}}}, "Near the old solution the full Fisher"),
        ({"last_seed": {"full": {"end_error": 0.4}}}, "The surrogate is only a local"),
    ],
)
def test_claims_that_fail(changes, begins):
    (text,) = missed(**changes)
    assert text.startswith(begins)


def test_a_network_that_is_hardly_trained_says_nothing():
    (reason,) = {claim.reason for claim in report(results(steps=50)).claims}
    assert reason == "steps is 50, at least 100 is needed"


def test_the_figures():
    figures = report(results()).figures
    lines = figures["surrogates"]().axes[0].lines
    assert sum(line.get_color() == "black" for line in lines) == 1
    axes = figures["errors"]().axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
