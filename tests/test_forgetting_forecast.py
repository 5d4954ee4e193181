"""Expansions of past tasks' losses against dense matrices, and the analysis ``forgetting_forecast``."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from curvlab.analyze.frame.analysis import Results
from curvlab.analyze.frame.subject import Subject
from curvlab.analyze.regimes.forgetting_forecast import (
    EXACT,
    PRESETS,
    report,
    score,
    score_all,
    score_horizons,
)
from curvlab.continual.forecast import expand_loss, load_expansion, loss_and_gradient
from curvlab.errors import CurvlabError
from curvlab.estimators import estimate
from curvlab.problem import Problem

CPU = PRESETS["cpu"].config
MNIST = Subject("mnist", (1, 28, 28), 10, 60_000, 10_000)
DIGITS = Subject("digits", (1, 8, 8), 10, 1437, 360)
STRUCTURES = ("diag", "kfac", "ekfac")


# The expansion.


@pytest.fixture
def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double().eval()
    x = torch.randn(30, 4, dtype=torch.float64)
    return Problem(model, "cross_entropy", [(x[:20], torch.arange(20) % 3), (x[20:], torch.arange(10) % 3)])


def test_the_expansion_is_that_of_dense_matrices(problem, tmp_path):
    expansion = expand_loss(problem, ["dense", *STRUCTURES], "ggn")
    x, y = (torch.cat(parts) for parts in zip(*problem.data, strict=True))
    loss = nn.functional.cross_entropy(problem.model(x), y)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(problem.model.parameters()))])
    torch.testing.assert_close(expansion.gradient, gradient, rtol=1e-10, atol=1e-14)
    assert expansion.loss == pytest.approx(loss.item(), rel=1e-12)
    moved = expansion.weights + torch.randn(len(gradient), dtype=torch.float64)
    d = moved - expansion.weights
    expansion.save(tmp_path / "task")
    for found in (expansion.forecast(moved), load_expansion(tmp_path / "task").forecast(moved)):
        assert found["gradient"] == pytest.approx((gradient @ d).item(), rel=1e-10)
        for name in ("dense", *STRUCTURES):
            dense = estimate(problem, "ggn", name, backend="torch").to_dense()
            assert found[name] == pytest.approx((0.5 * d @ dense @ d).item(), rel=1e-8), name


def test_a_step_of_zero_changes_nothing(problem):
    expansion = expand_loss(problem, ["diag"])
    assert expansion.forecast(expansion.weights) == {"gradient": 0.0, "diag": 0.0}


def test_a_small_step_changes_the_loss_by_the_exact_expansion(problem):
    torch.manual_seed(1)
    expansion = expand_loss(problem, [])
    hessian = estimate(problem, "hessian", "implicit")
    errors = []
    direction = torch.randn(len(expansion.weights), dtype=torch.float64)
    for size in (1e-2, 1e-3):
        d = size * direction
        nn.utils.vector_to_parameters(expansion.weights, problem.model.parameters())
        second = expansion.forecast(expansion.weights + d)["gradient"] + 0.5 * float(hessian.quadratic_form(d))
        nn.utils.vector_to_parameters(expansion.weights + d, problem.model.parameters())
        errors.append(abs(loss_and_gradient(problem)[0] - expansion.loss - second))
    assert errors[1] < errors[0] / 500  # of third order


@pytest.mark.parametrize("structures", [[], ["diag"]])
@pytest.mark.parametrize(
    "change", [lambda w: w[:5], lambda w: w[:1], lambda w: w[0], lambda w: w[:, None], lambda w: w.to("meta"), list]
)
def test_weights_of_another_size_are_refused(problem, structures, change):
    expansion = expand_loss(problem, structures)
    with pytest.raises(
        CurvlabError, match=r"weights must be a tensor \(51,\) on cpu, as the weights of the expansion, not"
    ):
        expansion.forecast(change(expansion.weights))


def test_weights_of_another_dtype(problem):
    expansion = expand_loss(problem, ["diag"])
    moved = (expansion.weights + 1).float()
    other = expand_loss(Problem(problem.model.float(), "cross_entropy", problem.data), ["diag"])
    assert other.forecast(moved.double())["diag"] == pytest.approx(expansion.forecast(moved)["diag"], rel=1e-4)


def test_parameters_without_a_part_in_the_loss_have_no_gradient(problem):
    problem.model.unused = nn.Linear(1, 1).double()
    problem.model.forward = lambda x: problem.model[2](problem.model[1](problem.model[0](x)))
    _, gradient = loss_and_gradient(Problem(problem.model, "cross_entropy", problem.data))
    assert gradient[:-2].all()
    assert not gradient[-2:].any()


def test_an_expansion_of_vectors_that_do_not_fit(problem):
    expansion = expand_loss(problem, ["diag"])
    with pytest.raises(CurvlabError, match=r"the gradient must be a tensor \(51,\)"):
        replace(expansion, gradient=expansion.gradient[:5])
    with pytest.raises(CurvlabError, match="the matrix diag is over 51 parameters, but the expansion over 5"):
        replace(expansion, gradient=expansion.gradient[:5], weights=expansion.weights[:5])
    with pytest.raises(CurvlabError, match="the weights of an expansion must be a tensor"):
        replace(expansion, weights=None)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda problem: expand_loss(problem, "diag"),
            r"structures must be a list, such as \['diag', 'kfac'\], not 'diag'",
        ),
        (lambda problem: expand_loss(problem, None), "structures must be a list"),
        (lambda _: expand_loss(None, ["diag"]), r"problem must be a curvlab\.Problem, not None"),
        (lambda _: load_expansion(None), "None is not a path"),
        (lambda problem: expand_loss(problem, []).save(None), "None is not a path"),
    ],
)
def test_arguments_of_expansions(problem, call, message):
    with pytest.raises(CurvlabError, match=message):
        call(problem)


def test_folders_without_an_expansion(problem, tmp_path):
    with pytest.raises(CurvlabError, match=r"there is no expansion in .*absent, which has no file expansion\.pt"):
        load_expansion(tmp_path / "absent")
    expansion, file = expand_loss(problem, ["diag"]), tmp_path / "expansion.pt"
    expansion.save(str(tmp_path))
    with pytest.raises(CurvlabError, match="is a file, not a folder"):
        expansion.save(file)
    whole = file.read_bytes()
    for content in (whole[:100], b""):
        file.write_bytes(content)
        with pytest.raises(CurvlabError, match=r"expansion\.pt cannot be read \(truncated, or not an expansion\)"):
            load_expansion(tmp_path)
    for content in ([1], {"loss": 0.0}):
        torch.save(content, file)
        with pytest.raises(CurvlabError, match=r"expansion\.pt cannot be read"):
            load_expansion(tmp_path)
    file.write_bytes(whole)
    (tmp_path / "diag.safetensors").unlink()
    with pytest.raises(CurvlabError, match=r"there is no file .*diag\.safetensors"):
        load_expansion(tmp_path)


# Scores.


def make_points(stream="permuted", seeds=(0, 1, 2), gradient=0.0, **forecasts):
    """Return points whose forgetting is 1, 2, 3, ..., and whose forecasts are functions of it."""
    functions = dict.fromkeys((*STRUCTURES, *EXACT), lambda lost: lost) | forecasts
    pairs = [(1, 2), (1, 3), (2, 3), (1, 4), (2, 4), (3, 4)]
    return [
        {"stream": stream, "seed": seed, "method": "naive", "task": task, "after": after}
        | {"forgetting": float(n), "accuracy_lost": n / 10, "gradient": gradient, "distance": 1.0}
        | {name: function(float(n)) for name, function in functions.items()}
        | {f"{name}_seconds": 0.5 for name in EXACT}
        for seed in seeds
        for n, (task, after) in enumerate(pairs, start=1)
    ]


def make_costs(seeds=(0, 1, 2)):
    sizes = {"diag": 1000, "kfac": 3000, "ekfac": 9000, "ggn": 5000, "hessian": 5000}
    return [
        {
            "stream": "permuted",
            "seed": seed,
            "method": "naive",
            "task": 1,
            "structure": name,
            "seconds": 0.1,
            "bytes": size,
        }
        for seed in seeds
        for name, size in sizes.items()
    ]


def test_scores_have_their_closed_forms():
    points = make_points(seeds=(0,))
    perfect = score(points, [point["forgetting"] for point in points])
    assert perfect == {"rank": 1.0, "accuracy_rank": 1.0, "ratio": 1.0, "within": 1.0}
    reversed_ = score(points, [3 * (7 - point["forgetting"]) for point in points])
    assert reversed_["rank"] == pytest.approx(-1)
    tenth = score(points, [0.1 * point["forgetting"] for point in points])
    assert (tenth["rank"], tenth["ratio"], tenth["within"]) == (1.0, pytest.approx(0.1), 0.0)
    none = score([{**point, "forgetting": -1.0} for point in points], [1.0] * len(points))
    assert none["rank"] is None
    assert none["ratio"] is None
    assert none["within"] is None


def test_the_gradient_is_part_of_every_second_score():
    points = make_points(diag=lambda lost: 0.0 * lost)
    for point in points:
        point["gradient"] = point["forgetting"]
    scores = {(row["seed"], row["structure"], row["gradient"]): row["rank"] for row in score_all(points, STRUCTURES)}
    assert scores[0, "diag", False] is None
    assert scores[0, "diag", True] == 1.0
    horizons = score_horizons(points, STRUCTURES)
    assert {row["horizon"] for row in horizons} == {1, 2, 3}
    assert [row["points"] for row in horizons if row["structure"] == "diag" and row["seed"] == 0] == [3, 2, 1]


# The claims.

STATEMENTS = {
    "hessian": ("exact Hessian", {"hessian": lambda lost: -lost}),
    "diagonal": ("diagonal Fisher", {"diag": lambda lost: -lost}),
    "finer": (": K-FAC forecasts", {}),
    "corrected": ("EK-FAC forecasts", {}),
    "gradient": ("left out", {}),
}


def find_claim(points, text, config=CPU, data=MNIST):
    made = report(Results(config, data, {"table": points, "costs": make_costs()}))
    (claim,) = [claim for claim in made.claims if text in claim.text]
    return claim


@pytest.mark.parametrize("name", STATEMENTS)
def test_each_claim_can_hold_and_fail(name):
    text, failing = STATEMENTS[name]
    swapped = {1.0: 2.0, 2.0: 1.0, 3.0: 4.0, 4.0: 3.0, 5.0: 6.0, 6.0: 5.0}  # right but for neighbours
    coarse = {"diag": lambda lost: {2.0: 4.0, 4.0: 2.0}.get(lost, lost), "kfac": swapped.__getitem__}
    assert find_claim(make_points(**coarse), text).verdict == "reproduced"
    failed = make_points(gradient=5.0 if name == "gradient" else 0.0, **failing)
    claim = find_claim(failed, text)
    assert claim.verdict == "not reproduced"
    assert claim.scope.startswith("direction, at training samples per task 10,000")
    assert find_claim(failed, text, data=DIGITS).verdict == "not tested"


def test_what_was_not_run_is_not_tested():
    points = make_points()
    config = CPU.model_copy(update={"structures": ("diag",)})
    claim = find_claim(points, ": K-FAC forecasts", config)
    assert (claim.verdict, claim.reason) == ("not tested", "the runs that the claim compares are missing")
    assert find_claim(make_points(seeds=(0, 1)), "exact Hessian").reason == "2 of at least 3 seeds"


def test_the_note_names_the_smallest_structure_that_is_near_the_best():
    made = report(Results(CPU, MNIST, {"table": make_points(), "costs": make_costs()}))
    assert "the best rank correlation (1.00) is diagonal with 1/2 d'Cd (1 kB per task)" in made.notes[1]
    worse = make_points(diag=lambda lost: -lost)
    made = report(Results(CPU, MNIST, {"table": worse, "costs": make_costs()}))
    assert "is K-FAC with 1/2 d'Cd (3 kB per task)" in made.notes[1]


def test_a_seed_without_all_its_runs_has_no_score():
    points = [*make_points(), *({**point, "method": "ewc"} for point in make_points(seeds=(0, 1)))]
    assert {row["seed"] for row in score_all(points, STRUCTURES)} == {0, 1}


def test_no_structure_is_recommended_where_none_forecasts():
    reverse = dict.fromkeys((*STRUCTURES, *EXACT), lambda lost: -lost)
    made = report(Results(CPU, MNIST, {"table": make_points(**reverse), "costs": make_costs()}))
    assert made.notes[1] == "permuted: no stored curvature forecasts the order of forgetting."


def test_figures_are_drawn_of_negative_and_of_no_forgetting():
    points = make_points(ekfac=lambda lost: -lost) + make_points("rotated", hessian=lambda lost: 0.0 * lost)
    made = report(Results(CPU, MNIST, {"table": points, "costs": make_costs()}))
    for name, draw in made.figures.items():
        figure = draw()
        assert len(figure.axes) == (4 if name == "worth" else 10)
    assert math.isclose(figure.get_figwidth(), 7.2)
