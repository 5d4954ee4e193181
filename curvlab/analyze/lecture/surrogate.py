"""How good is the quadratic surrogate of the old loss? Carta's lecture, slide "The Optimization Approach"."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from curvlab import plots
from curvlab.analyze.frame import subject
from curvlab.analyze.frame.analysis import Analysis, Preset, Record, Report, Results, Table, Workspace
from curvlab.analyze.frame.published import read_published
from curvlab.analyze.frame.values import divide, number, where
from curvlab.continual import permuted
from curvlab.continual.forecast import loss_and_gradient
from curvlab.data import Dataset
from curvlab.errors import CurvlabError
from curvlab.estimators import estimate
from curvlab.parameters import ParameterSpace
from curvlab.problem import Problem
from curvlab.results import Claim, Column, aggregate, mean_column, require_direction
from curvlab.training import Training, evaluate, fit
from curvlab.training.state import derive_seed

#: Name -> the label, the quantity and the structure of the curvature.
SURROGATES: Mapping[str, tuple[str, str, str]] = {
    "diag": ("diagonal Fisher", "fisher", "diag"),
    "kfac": ("K-FAC", "fisher", "kfac"),
    "full": ("full Fisher", "fisher", "implicit"),
    "hessian": ("full Hessian", "hessian", "implicit"),
}
LABELS = {name: label for name, (label, *_) in SURROGATES.items()}
LABELS |= {"taylor": "Hessian and gradient", "exact": "exact"}
#: Share of the distance that counts as near.
NEAR = 0.1
_CLOSE = 0.2  # relative error that a surrogate may have there
_FAR = 0.5  # relative error at the end of the way from which on a surrogate is only local
_SMALL = 0.1  # the gradient's part of the expansion, over the quadratic part


class SurrogateConfig(subject.TrainedSubjectConfig):
    """Train on two tasks and expand the loss of the first task along the line between the two solutions."""

    titles: ClassVar[Mapping[str, str]] = {**subject.TrainedSubjectConfig.titles, "points": "line"}

    hidden: tuple[Annotated[int, Field(ge=1)], ...] = (30, 30)
    """Hidden sizes of the mlp; no number for a linear model."""
    points: int = Field(default=46, ge=4)
    """Number of points on the line, with logarithmic spacing from a thousandth of the distance to all of it."""
    steps: int = Field(default=500, ge=1)
    """Training steps (mini-batches) of each task. The second task has the pixels in a different order."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = (0, 1, 2)
    """Seeds; the table has the mean and the standard deviation over them."""


PRESETS = {
    "default": Preset(SurrogateConfig(), minutes=0.3),
    "cpu": Preset(
        SurrogateConfig(data="mnist", hidden=(100, 100), samples=2000, steps=3000), minutes=1, needs=("mnist",)
    ),
}
_VALUES = {
    "quadratic": "1/2 d'Cd",
    "near_error": "relative error, first tenth",
    "end_error": "relative error at the end",
}
_COLUMNS = (Column("label", "curvature"), *(mean_column(key, head) for key, head in _VALUES.items()))
_NETWORK = {
    "distance": "|d|",
    "gradient_term": "g'd",
    "old_loss": "old loss at task 1's solution",
    "old_loss_after": "at task 2's",
    "accuracy": "old accuracy there",
    "accuracy_after": "at task 2's",
}


# A run ----------------------------------------------------------------------------------------------------------------


def measure(config: SurrogateConfig, dataset: Dataset, workspace: Workspace) -> Iterator[Record]:
    """Train on the two tasks; yield the increase of the old loss on the line, its surrogates and their errors."""
    (seed,) = config.seeds
    old, new = permuted(dataset, tasks=2, seed=seed)
    model = subject.network(config, dataset, seed)
    solutions = []
    for number_of_task, task in enumerate((old, new), start=1):
        training = Training(**subject.fit_options(config), seed=derive_seed(seed, number_of_task))
        file = workspace.folder / f"task-{number_of_task}.pt"
        fit(model, task.train, training=training, checkpoint=file, progress=False)
        solutions.append(deepcopy(model).double().eval())  # differences near the solution are small
    x, y = old.take(torch.arange(len(old.train[1]))[: config.samples])
    problem = Problem(solutions[0], "cross_entropy", (x.to(config.device), y.to(config.device)))
    space = ParameterSpace.of(solutions[0])
    start, end = (space.flatten(dict(one.named_parameters())).detach() for one in solutions)
    way = end - start
    start_loss, gradient = loss_and_gradient(problem)
    fractions = torch.logspace(-3, 0, config.points).double().tolist()
    exact = [float(_loss(problem, space, start + a * way) - start_loss) for a in fractions]
    if not any(exact):
        raise CurvlabError("the loss of task 1 is zero on the whole line: give data with two classes or more")
    quadratic = {
        name: float(way @ (estimate(problem, quantity, structure) @ way)) / 2
        for name, (_, quantity, structure) in SURROGATES.items()
    }
    slope = float(gradient @ way)
    curves = {name: [a**2 * value for a in fractions] for name, value in quadratic.items()}
    curves["taylor"] = [slope * a + a**2 * quadratic["hessian"] for a in fractions]
    near = [i for i, a in enumerate(fractions) if a <= NEAR]
    for name, curve in curves.items():
        yield {
            "seed": seed,
            "surrogate": name,
            "quadratic": quadratic.get(name, quadratic["hessian"]),
            "near_error": relative_error([curve[i] for i in near], [exact[i] for i in near]),
            "end_error": relative_error(curve[-1:], exact[-1:]),
        }
    for name, curve in {**curves, "exact": exact}.items():
        yield from (
            {"seed": seed, "surrogate": name, "fraction": a, "increase": value}
            for a, value in zip(fractions, curve, strict=True)
        )
    accuracies = [evaluate(one, old.test[0].double(), old.test[1]).accuracy for one in solutions]
    yield {
        "seed": seed,
        "distance": float(way.norm()),
        "gradient_term": slope,
        "old_loss": start_loss,
        "old_loss_after": start_loss + exact[-1],
        "accuracy": accuracies[0],
        "accuracy_after": accuracies[1],
    }


def _loss(problem: Problem, space: ParameterSpace, theta: Tensor) -> Tensor:
    total = torch.zeros((), dtype=theta.dtype, device=theta.device)
    for inputs, targets in problem.batches():
        total = total + problem.loss.values(problem.forward(space.unflatten(theta), inputs), targets).sum()
    return total / problem.num_samples


def relative_error(curve: Sequence[float], exact: Sequence[float]) -> float:
    """Return the sum of absolute differences over the sum of absolute values of the exact curve.

    Examples:
        >>> relative_error([1.0, 3.0], [2.0, 2.0])
        0.5
    """
    return divide(sum(abs(a - b) for a, b in zip(curve, exact, strict=True)), sum(map(abs, exact)))


# Summaries of the records ---------------------------------------------------------------------------------------------


def claims(found: Sequence[Record], networks: Sequence[Record], config: SurrogateConfig) -> list[Claim]:
    """Return the claims with their verdicts.

    Args:
        found: Records as ``table.json`` has them.
        networks: Records as ``networks.json`` has them.
        config: Configuration of the run.
    """
    slides = read_published("lecture")["surrogate"]
    gate = require_direction({"steps": config.steps}, slides["conditions"], slides["direction"])

    def values(name: str, key: str) -> list[float]:
        mine = where(found, surrogate=name)
        return [number(row[key]) for seed in config.seeds for row in where(mine, seed=seed)]

    def judge(text: str, source: str, ours: Sequence[float], test: Callable[[float], bool]) -> Claim:
        return Claim.of(text, slides["sources"][source], ours, test, None, gate)

    def over_diagonal(name: str) -> list[float]:
        pairs = zip(values(name, "near_error"), values("diag", "near_error"), strict=True)
        return [divide(one, other) for one, other in pairs]

    terms = zip(networks, values("hessian", "quadratic"), strict=False)
    return [
        judge(
            f"The second-order expansion gives the old loss near its solution (Hessian and gradient, within {NEAR:g} "
            f"of the distance: relative error at most {_CLOSE:g})",
            "taylor",
            values("taylor", "near_error"),
            lambda x: x <= _CLOSE,
        ),
        judge(
            f"The gradient can be ignored: over the whole distance its term is at most {_SMALL:g} of the quadratic one",
            "minimize",
            [divide(abs(row["gradient_term"]), abs(quadratic)) for row, quadratic in terms],
            lambda x: x <= _SMALL,
        ),
        *(
            judge(
                f"Near the old solution the {LABELS[name]} is closer to the old loss than the diagonal one (relative "
                f"error within {NEAR:g} of the distance, divided by that of the diagonal)",
                "ours",
                over_diagonal(name),
                lambda x: x < 1,
            )
            for name in ("kfac", "full")
        ),
        judge(
            f"The surrogate is only a local approximation (full Fisher, relative error at the new solution at least "
            f"{_FAR:g})",
            "local",
            values("full", "end_error"),
            lambda x: x >= _FAR,
        ),
    ]


def report(run: Results[SurrogateConfig]) -> Report:
    """Return the table, the claims, and the figures: the curves on the line, and their errors."""
    found, path, networks = (run.records[kind] for kind in ("table", "path", "networks"))
    rows = [{**row, "label": LABELS[row["surrogate"]]} for row in aggregate(found, ["surrogate"], list(_VALUES))]
    what = f"{subject.describe_network(run.config, run.subject)} on permuted {run.subject.data}"
    summary = Table(f"Surrogates of the old loss between two solutions of a {what}; {run.spread}", _COLUMNS, rows)
    columns = [mean_column(key, head) for key, head in _NETWORK.items()]
    network = [{**row, "what": what} for row in networks]
    return Report(
        summary,
        [summary, Table("The two solutions", columns, aggregate(network, ["what"], list(_NETWORK)))],
        claims(found, networks, run.config),
        figures={
            "surrogates": lambda: plots.line_panels(
                path,
                "fraction",
                "increase",
                line="surrogate",
                labels=LABELS,
                reference={"exact": "-"},
                axis_labels=("share of the distance to task 2's solution", "increase of task 1's loss (nats)"),
                title=what,
                markers=False,
                width=3.3,
            ),
            "errors": lambda: plots.line_panels(
                _errors(path),
                "fraction",
                "error",
                line="surrogate",
                labels=LABELS,
                axis_labels=("share of the distance to task 2's solution", "error of the increase (nats)"),
                title=what,
                log="xy",
                markers=False,
                width=3.3,
            ),
        },
    )


def _errors(path: Sequence[Record]) -> list[Record]:
    exact = {(row["seed"], row["fraction"]): row["increase"] for row in where(path, surrogate="exact")}
    return [
        {**row, "error": abs(row["increase"] - exact[row["seed"], row["fraction"]])}
        for row in path
        if row["surrogate"] != "exact"
    ]


ANALYSIS = Analysis(
    config=SurrogateConfig,
    question="How good is the quadratic surrogate of the old loss? Diagonal, K-FAC, full Fisher and Hessian against "
    "the exact loss, along the line from one task's solution to the next one's.",
    presets=PRESETS,
    check=subject.check_network,
    measure=measure,
    report=report,
    kinds={"table": "near_error", "path": "increase", "networks": "gradient_term"},
)
