"""Does the natural gradient converge faster? Carta's lecture on regularization priors, the slides on NGD."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvlab import plots
from curvlab.analyze.frame import subject
from curvlab.analyze.frame.analysis import Analysis, Record, Report, Results, Table, Workspace
from curvlab.analyze.frame.published import read_published
from curvlab.analyze.frame.values import list_by_seed, number, where
from curvlab.analyze.lecture.natural_gradient_options import (
    LABELS,
    PRESETS,
    SEARCH,
    STRUCTURES,
    NaturalGradientConfig,
    candidates,
    check,
)
from curvlab.least_squares import Field as VectorField
from curvlab.least_squares import LeastSquares, descend
from curvlab.results import Claim, Column, Identity, aggregate, mean_column, require, require_direction
from curvlab.text import write_count
from curvlab.training import Training, evaluate, fit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_START = (0.0, 5.0)  # weight and bias; the error is mainly in the slow direction
_SGD_BATCH = 50


# Linear regression ----------------------------------------------------------------------------------------------------


def draw_regression(samples: int, seed: int) -> LeastSquares:
    """Return the regression ``y = 2 x + 1 + noise``, with ``x ~ N(2, 1)`` and noise of standard deviation 0.5."""
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, samples, dtype=torch.float64, generator=generator)
    x = x + 2
    return LeastSquares(torch.stack([x, torch.ones_like(x)], 1), 2 * x + 1 + 0.5 * noise)


def make_fields(regression: LeastSquares, seed: int) -> dict[str, VectorField]:
    """Return the steps of gradient descent, of SGD with random batches, and of the natural gradient."""
    generator = torch.Generator().manual_seed(seed)
    inverse = torch.linalg.inv(regression.fisher)

    def sgd(theta: Tensor) -> Tensor:
        batch = torch.randint(len(regression.x), (_SGD_BATCH,), generator=generator)
        return -LeastSquares(regression.x[batch], regression.y[batch]).gradient(theta)

    return {
        "gd": lambda theta: -regression.gradient(theta),
        "sgd": sgd,
        "ngd": lambda theta: -regression.gradient(theta) @ inverse,
    }


def regression_records(config: NaturalGradientConfig, seed: int) -> Iterator[Record]:
    """Yield the Fisher and the solution of the regression, and every step of every method at every rate."""
    regression = draw_regression(config.regression_samples, seed)
    solution, fisher = regression.solution, regression.fisher
    yield {
        "seed": seed,
        "fisher_ww": float(fisher[0, 0]),
        "fisher_wb": float(fisher[0, 1]),
        "fisher_bb": float(fisher[1, 1]),
        "weight": float(solution[0]),
        "bias": float(solution[1]),
    }
    start = torch.tensor([_START], dtype=torch.float64)
    for rate in config.rates:
        for method, field in make_fields(regression, seed).items():
            path = descend(field, start, rate, config.regression_steps)[:, 0]
            excess = regression.excess(path).tolist()
            names: Record = {"seed": seed, "problem": "regression", "method": method, "lr": rate}
            yield {**names, "start_loss": excess[0], "end_loss": excess[-1]}
            for step, ((weight, bias), height) in enumerate(zip(path.tolist(), excess, strict=True)):
                yield {**names, "step": step, "weight": weight, "bias": bias, "excess": height}


# The network ----------------------------------------------------------------------------------------------------------


def network_records(config: NaturalGradientConfig, data: subject.SubjectData, workspace: Workspace) -> Iterator[Record]:
    """Train the network with a single method and candidate, and yield the result and the loss during training.

    Raises:
        CurvlabError: The training diverges.
    """
    (method,), (seed,) = config.methods, config.seeds
    (candidate,) = candidates(config, method)
    training = Training(
        lr=candidate["lr"], steps=config.steps, batch_size=config.batch_size, seed=seed, optimizer="sgd"
    )
    if method == "adam":
        training = replace(training, optimizer="adam")
    elif method in STRUCTURES:
        training = replace(training, optimizer="ngd", structure=STRUCTURES[method], damping=candidate["damping"])
    model, samples = subject.network(config, data, seed), subject.samples(config, data)
    before = evaluate(model, *samples).loss
    result = fit(
        model,
        samples,
        training=training,
        evaluation=samples,
        evaluate_every=config.every,
        checkpoint=workspace.folder / "checkpoint.pt",
        progress=False,
    )
    names: Record = {"seed": seed, "problem": "network", "method": method, "lr": candidate["lr"]}
    yield {
        **names,
        "damping": candidate.get("damping"),
        "start_loss": before,
        "end_loss": result.history[-1]["eval_loss"],
        "validation_loss": None if data.held_out is None else evaluate(model, *data.held_out).loss,
        "test_accuracy": evaluate(model, data.x_test, data.y_test).accuracy,
        "seconds": result.seconds,
    }
    yield {**names, "step": 0, "loss": before}
    yield from ({**names, "step": point["step"], "loss": point["eval_loss"]} for point in result.history)


def measure(config: NaturalGradientConfig, dataset: subject.SubjectData, workspace: Workspace) -> Iterator[Record]:
    """Yield the records of the linear regression, or of the network with a single method."""
    if config.problems == ("regression",):
        yield from regression_records(config, *config.seeds)
    else:
        yield from network_records(config, dataset, workspace)


# The report -----------------------------------------------------------------------------------------------------------

_COLUMNS = (
    Column("problem", "problem"),
    Column("label", "method"),
    Column("lr", "learning rate", format=lambda value: f"{value:g}"),
    mean_column("start_loss", "loss, start"),
    mean_column("end_loss", "loss, end"),
    mean_column("test_accuracy", "test accuracy"),
    Column("seconds", "seconds"),
)
_VALUES = ("start_loss", "end_loss", "test_accuracy", "seconds")


def report(run: Results[NaturalGradientConfig]) -> Report:
    """Return the table of both problems, the claims of the slides, and the figures."""
    config, records = run.config, run.records["table"]
    rows = [{**row, "label": LABELS[row["method"]]} for row in aggregate(records, ["problem", "method", "lr"], _VALUES)]
    names = {
        "regression": f"linear regression, {write_count(config.regression_steps, 'step')} (loss above the smallest)",
        "network": f"{subject.describe_network(config, run.subject)} on {run.subject.data}, "
        f"{write_count(config.steps, 'step')}",
    }
    figures: dict[str, Callable[[], Figure]] = {}
    if problems := run.records["regressions"]:
        first = problems[0]
        points = where(run.records["points"], seed=first["seed"])
        figures["regression"] = lambda: plots.descent_panels(points, first, LABELS)
    if curves := run.records["curves"]:
        figures["network"] = lambda: plots.loss_curves(curves, LABELS)
    return Report(
        Table(f"{'; '.join(names[problem] for problem in config.problems)}; {run.spread}", _COLUMNS, rows),
        claims=[*_regression_claims(run), *_network_claims(run)],
        identities=[
            Identity(
                f"Natural gradient at {rate:g}: its excess loss shrinks by (1 - rate)² a step (relative difference)",
                [ratio / (1 - rate) ** (2 * config.regression_steps) - 1 for ratio in _shrink(run, "ngd", rate)],
            )
            for rate in config.rates
            if rate != 1 and problems
        ],
        figures=figures,
    )


def _values(run: Results[NaturalGradientConfig], key: str, **names: object) -> list[float]:
    """Return one value per seed for a problem and method, NaN for failed runs; an empty list if there was no run."""
    mine = [row for row in run.records["table"] if all(row[name] == value for name, value in names.items())]
    return list_by_seed(mine, run.seeds, lambda seed: number(where(mine, seed=seed)[0][key])) if mine else []


def _divide(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(one, other, strict=True)] if one and other else []


def _shrink(run: Results[NaturalGradientConfig], method: str, rate: float) -> list[float]:
    names = {"problem": "regression", "method": method, "lr": rate}
    return _divide(_values(run, "end_loss", **names), _values(run, "start_loss", **names))


def _regression_claims(run: Results[NaturalGradientConfig]) -> list[Claim]:
    slides = read_published("lecture")["natural_gradient"]
    gate = require({key: getattr(run.config, key) for key in slides["conditions"]}, slides["conditions"])
    return [
        Claim.of(
            "NGD converges much faster: at 0.15 gradient descent ends above 10 times the excess loss of NGD",
            slides["source"],
            _divide(_shrink(run, "gd", 0.15), _shrink(run, "ngd", 0.15)),
            lambda ratio: ratio > 10,
            None,
            gate,
        ),
        Claim.of(
            "NGD is also more stable: at 0.5 gradient descent diverges, to 1,000 times its excess loss or more",
            slides["source"],
            _shrink(run, "gd", 0.5),
            lambda ratio: ratio >= 1e3,
            None,
            gate,
        ),
    ]


def _network_claims(run: Results[NaturalGradientConfig]) -> list[Claim]:
    slides = read_published("lecture")["natural_gradient_network"]
    ours = {"data": run.subject.data, "steps": run.config.steps}
    gate = require_direction(ours, slides["conditions"], slides["direction"])
    sgd = _values(run, "end_loss", problem="network", method="sgd")
    return [
        Claim.of(
            f"NGD speeds up training: a network ends at a lower training loss than with SGD, {text}",
            slides["source"],
            _divide(_values(run, "end_loss", problem="network", method=method), sgd),
            lambda ratio: ratio < 1,
            None,
            gate,
        )
        for method, text in (("exact", "exact Fisher"), ("kfac", "K-FAC"))
    ]


ANALYSIS = Analysis(
    config=NaturalGradientConfig,
    question="Does the natural gradient converge faster? A linear regression at two learning rates, and a network with "
    "the exact Fisher, K-FAC and its diagonal.",
    presets=PRESETS,
    check=check,
    measure=measure,
    report=report,
    search=SEARCH,
    kinds={"table": "end_loss", "regressions": "fisher_ww", "points": "excess", "curves": "loss"},
)
