"""The analysis ``natural_gradient``: linear regression against its closed form, the network, claims, figures."""

import pytest
import torch

from curvlab.analyze.frame import subject
from curvlab.analyze.frame.analysis import Results, Workspace
from curvlab.analyze.frame.search import Choice
from curvlab.analyze.frame.subject import Subject
from curvlab.analyze.lecture.natural_gradient import ANALYSIS, draw_regression, measure
from curvlab.analyze.lecture.natural_gradient_options import LABELS, SEARCH, NaturalGradientConfig, candidates
from curvlab.commandline.options import RunOptions
from curvlab.errors import CurvlabError
from curvlab.grid import Place
from curvlab.training import Training, evaluate, fit

CONFIG = NaturalGradientConfig(
    hidden=(4,),
    steps=4,
    every=2,
    batch_size=50,
    sgd_lrs=(0.1, 0.3),
    natural_lrs=(0.1,),
    dampings=(0.1, 1.0),
    seeds=(1,),
)


def run(config, folder):
    return list(measure(config, ANALYSIS.load(config, RunOptions()), Workspace(Place(folder))))


def test_the_regression_is_the_one_of_the_slides(tmp_path):
    config = CONFIG.model_copy(update={"problems": ("regression",)})
    problem, *found = run(config, tmp_path)
    points = [record for record in found if "excess" in record]
    regression = draw_regression(1000, 1)
    assert len(points) == 2 * 3 * 21
    eigenvalues = torch.linalg.eigvalsh(regression.fisher)
    assert eigenvalues.tolist() == pytest.approx([0.17, 5.83], rel=0.1)
    assert [problem["weight"], problem["bias"]] == pytest.approx([2.0, 1.0], abs=0.1)

    def excess(method, rate):
        return [point["excess"] for point in points if (point["method"], point["lr"]) == (method, rate)]

    for rate in (0.15, 0.5):
        values = excess("ngd", rate)
        assert values == pytest.approx([values[0] * (1 - rate) ** (2 * step) for step in range(21)], rel=1e-6)
        # Along each eigenvector gradient descent has its own factor.
        basis = torch.linalg.eigh(regression.fisher).eigenvectors
        start = basis.T @ (torch.tensor([0.0, 5.0], dtype=torch.float64) - regression.solution)
        ends = (0.5 * eigenvalues * (start * (1 - rate * eigenvalues) ** 20) ** 2).sum()
        assert excess("gd", rate)[-1] == pytest.approx(float(ends), rel=1e-6)
    assert excess("gd", 0.15)[-1] > 10 * excess("ngd", 0.15)[-1]
    assert excess("gd", 0.5)[-1] > 1e3 * excess("gd", 0.5)[0]
    assert excess("sgd", 0.15) != excess("gd", 0.15)
    (end,) = (r for r in found if "end_loss" in r and (r["method"], r["lr"]) == ("gd", 0.5))
    assert (end["start_loss"], end["end_loss"]) == (excess("gd", 0.5)[0], excess("gd", 0.5)[-1])
    start = next(point for point in points if point["step"] == 0)
    values = regression.loss(torch.tensor([[0.0, 5.0], regression.solution.tolist()], dtype=torch.float64))
    assert start["excess"] == pytest.approx(float(values[0] - values[1]))


def test_the_network_is_trained_by_the_method(tmp_path):
    config = CONFIG.model_copy(update={"problems": ("network",), "methods": ("diag",), "dampings": (0.1,)})
    data = ANALYSIS.load(config, RunOptions())
    summary, *curve = run(config, tmp_path)
    model = subject.network(config, data, 1)
    before = evaluate(model, data.x_train, data.y_train).loss
    training = Training(optimizer="ngd", structure="diag", damping=0.1, lr=0.1, steps=4, batch_size=50, seed=1)
    fit(model, (data.x_train, data.y_train), training=training, progress=False)
    after = evaluate(model, data.x_train, data.y_train).loss
    assert [(point["step"], point["loss"]) for point in curve] == [(0, before), (2, curve[1]["loss"]), (4, after)]
    assert (summary["end_loss"], summary["lr"], summary["damping"]) == (after, 0.1, 0.1)
    assert summary["validation_loss"] == evaluate(model, *data.held_out).loss


def test_candidates_and_runs():
    assert candidates(CONFIG, "sgd") == [{"lr": 0.1}, {"lr": 0.3}]
    assert candidates(CONFIG, "exact") == [{"lr": 0.1, "damping": 0.1}, {"lr": 0.1, "damping": 1.0}]
    trials = SEARCH.trials(CONFIG.model_copy(update={"methods": ("adam", "kfac"), "adam_lrs": (0.1,)}))
    assert [(t.config.methods, t.config.natural_lrs, t.config.dampings) for t in trials] == [
        (("kfac",), (0.1,), (0.1,)),
        (("kfac",), (0.1,), (1.0,)),
    ]
    assert {trial.config.seeds for trial in trials} == {(100,)}
    chosen = [Choice({"method": "kfac"}, {"lr": 0.1, "damping": 1.0})]
    runs = SEARCH.runs(CONFIG, chosen)
    assert [config.problems for config in runs] == [("regression",), ("network",)]
    # A run of these is done as it is, also where it is given as the whole.
    assert SEARCH.runs(runs[1], chosen) == [runs[1]]
    assert (SEARCH.runs(runs[0], []), SEARCH.trials(runs[0])) == ([runs[0]], [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation": 0}, "chosen on held-out samples: set validation"),
        ({"rates": ()}, "rates needs one or more different values"),
        ({"methods": ("sgd", "sgd")}, "methods needs one or more different values"),
        ({"dampings": (0.1, 0.1)}, "dampings needs one or more different values"),
        ({"samples": 100_000}, "samples is 100,000, but there are"),
    ],
)
def test_what_is_refused(changes, message):
    config = CONFIG.model_copy(update=changes)
    with pytest.raises(CurvlabError, match=message):
        ANALYSIS.check(config, ANALYSIS.load(config, RunOptions()))


def report(config=None, seeds=3, data="digits", excess=None, losses=None):
    """Return the report of synthetic records; the last seed has the given values."""
    config = config or NaturalGradientConfig(seeds=tuple(range(seeds)))
    ends = {("gd", 0.15): 10.1, ("ngd", 0.15): 1.0, ("gd", 0.5): 1e3, ("ngd", 0.5): 1e-3}
    table, regressions, points, curves = [], [], [], []
    for seed in range(seeds):
        last, problems = seed == seeds - 1, config.problems
        regressions.append(
            {"seed": seed, "fisher_ww": 5.0, "fisher_wb": 2.0, "fisher_bb": 1.0, "weight": 2.0, "bias": 1.0}
        )
        for (method, rate), end in {**ends, **(excess or {} if last else {})}.items():
            names = {"seed": seed, "problem": "regression", "method": method, "lr": rate}
            if rate in config.rates:
                table.append({**names, "start_loss": 1.0, "end_loss": end})
                points += [
                    {**names, "step": s, "weight": 0.0, "bias": s, "excess": e} for s, e in ((0, 1.0), (20, end))
                ]
        given = {"sgd": 1.0, "exact": 0.9, "kfac": 0.9, **(losses or {} if last else {})}
        for method, loss in given.items():
            if "network" in problems and method in config.methods:
                names = {"seed": seed, "problem": "network", "method": method, "lr": 0.1}
                more = {"start_loss": 2.3, "end_loss": loss, "test_accuracy": 0.9, "seconds": 1.0}
                table.append({**names, **more})
                curves += [{**names, "step": step, "loss": value} for step, value in ((0, 2.3), (100, loss))]
    records = {"table": table, "regressions": regressions, "points": points, "curves": curves}
    return ANALYSIS.report(Results(config, Subject(data, (1, 8, 8), 10, 1, 1), records))


@pytest.mark.parametrize(
    ("place", "changed"),
    [
        (0, {"excess": {("gd", 0.15): 10.0}}),
        (1, {"excess": {("gd", 0.5): 999.0}}),
        (2, {"losses": {"exact": 1.0}}),
        (3, {"losses": {"kfac": 1.1}}),
    ],
)
def test_verdicts(place, changed):
    assert [claim.verdict for claim in report().claims] == ["reproduced"] * 4
    verdicts = ["reproduced"] * 4
    verdicts[place] = "not reproduced"
    assert [claim.verdict for claim in report(**changed).claims] == verdicts
    assert {claim.verdict for claim in report(seeds=2).claims} == {"not tested"}


def test_other_conditions_are_not_tested():
    def reasons(**changes):
        return [claim.reason for claim in report(NaturalGradientConfig(**changes)).claims]

    assert reasons(regression_samples=500)[0] == "regression_samples is 500, published: 1,000"
    assert reasons(steps=10)[2] == "steps is 10, at least 50 is needed"
    assert report(data="cifar10").claims[3].reason == "data is cifar10, digits or mnist is needed"
    assert reasons(methods=("sgd", "kfac"))[2:] == ["the runs that the claim compares are missing", ""]
    assert reasons(rates=(0.15,))[1] == "the runs that the claim compares are missing"


def test_figures():
    figures = report().figures
    regression, network = figures["regression"](), figures["network"]()
    assert (regression.get_figwidth(), network.get_figwidth()) == (6.8, 3.3)
    assert len(regression.axes) == 4
    texts = [text.get_text() for text in network.legends[0].get_texts()]
    assert texts == [LABELS[method] for method in ("sgd", "exact", "kfac")] + ["mean and range, 3 seeds"]
    alone = report(NaturalGradientConfig(problems=("regression",)))
    assert list(alone.figures) == ["regression"]
    assert "digits" not in alone.summary.title
