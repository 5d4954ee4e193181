"""Is forgetting bounded by curvature and distance? Mirzadeh et al. (2020), over training regimes.

What a network forgets of a task when it learns the next one, ``F1 = L1(w2) - L1(w1)``, is to second order
``g'd + 1/2 d'H d`` with ``d = w2 - w1`` and the gradient and Hessian of the old task's loss at its end, and
``1/2 d'H d <= 1/2 lambda_max |d|^2``. The inequality holds of the quadratic form, not of F1.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from statistics import fmean, median
from typing import Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from scipy.stats import rankdata
from torch import Tensor, nn

from curvlab.analyze import gridded
from curvlab.analyze.command import Analysis, GridOptions
from curvlab.analyze.frame import subject
from curvlab.analyze.regimes import options as regimes
from curvlab.analyze.regimes.options import Record, RegimesConfig, by_seed, stable_beside_plastic, where
from curvlab.continual import Task
from curvlab.continual.regimes import Regime
from curvlab.data import Dataset
from curvlab.estimators import estimate
from curvlab.grid import Place
from curvlab.matrices import CurvatureMatrix
from curvlab.problem import Problem
from curvlab.results import (
    Claim,
    Column,
    RunDirectory,
    Stopwatch,
    aggregate,
    render,
    render_claims,
    write_tables,
)
from curvlab.results.scatter import bound_scatter
from curvlab.spectrum import deflated_power_iteration, top_eigenvalues
from curvlab.training import evaluate, fit
from curvlab.training.state import derived_seed


class ForgettingBoundConfig(RegimesConfig):
    """Train a network on one task after another under several regimes, and expand what it forgets to second order."""


PRESETS = {
    # The plastic regime's own rate would leave 1,437 images half learnt.
    "default": ForgettingBoundConfig(hidden=(100, 100), epochs=10, plastic_lr=0.05),
    "cpu": ForgettingBoundConfig(data="mnist", hidden=(100, 100), tasks=5, task_samples=10_000, samples=2000),
    "paper": ForgettingBoundConfig(data="mnist", hidden=(100, 100), tasks=5, seeds=(0, 1, 2, 3, 4)),
}

_VALUES = ["forgetting", "gradient_term", "quadratic", "bound", "lambda_max", "distance", "tightness"]
_NAMES = (Column("stream", "stream"), Column("regime", "regime"))
_EXPANSION = (
    *_NAMES,
    Column("forgetting", "F1", spread="forgetting_std"),
    Column("gradient_term", "g'd", spread="gradient_term_std"),
    Column("quadratic", "1/2 d'Hd", spread="quadratic_std"),
    Column("bound", "1/2 lambda_max |d|²", spread="bound_std"),
    Column("lambda_max", "lambda_max", spread="lambda_max_std"),
    Column("distance", "|d|", spread="distance_std"),
)
_ACCURACY = (
    Column("accuracy", "at the end", spread="accuracy_std"),
    Column("accuracy_lost", "forgetting", spread="accuracy_lost_std"),
    Column("learning_accuracy", "of each task when learnt", spread="learning_accuracy_std"),
)
_TABLE = (*_EXPANSION, *_ACCURACY)
_CORRELATED = ("bound", "quadratic", "second_order", "lambda_max", "distance")
_CORRELATIONS = (
    Column("stream", "stream"),
    Column("bound", "1/2 lambda_max |d|²", spread="bound_std"),
    Column("quadratic", "1/2 d'Hd", spread="quadratic_std"),
    Column("second_order", "g'd + 1/2 d'Hd", spread="second_order_std"),
    Column("lambda_max", "lambda_max", spread="lambda_max_std"),
    Column("distance", "|d|", spread="distance_std"),
)


def run(config: ForgettingBoundConfig, options: GridOptions, console: Console) -> None:
    """Train and measure, a cell a stream, seed and regime, and write the run directory.

    Raises:
        CurvlabError: The configuration, the data or the weights are not usable, and nothing is written; or a cell has
            failed, and what the others gave is written and printed.
    """
    clock = Stopwatch()
    with clock("data"):
        dataset = subject.load_dataset(config, options)
        data_hash = dataset.fingerprint()
    regimes.check(config, dataset)
    with gridded.opened("forgetting_bound", config, options) as directory:
        with clock("cells"):
            records, failed = gridded.run(ANALYSIS.cells(regimes.parts(config)), options, directory)
        found = [record for record in records if "forgetting" in record]
        accuracies = [record for record in records if "accuracy" in record]
        table, correlations = summarise(found, accuracies), correlations_of(found)
        claims = claims_of(found, accuracies, [toy(seed) for seed in config.seeds], config.tol)
        write_tables(directory, found, (*_TABLE, gridded.SEEDS) if failed else _TABLE, summary=table)
        directory.write_json("accuracies.json", accuracies)
        directory.write_json("correlations.json", correlations)
        directory.write_json("claims.json", claims)
        with clock("figures"):
            drawn = figure(found, f"{_title(config, dataset)}: forgetting of a task by the next")
            directory.write_figure("bound_and_factors", gridded.marked(drawn, directory.path))
        gridded.write_provenance(directory, config.seeds, data_hash, clock, config.device)
        _print(console, config, dataset, found, table, correlations, claims, directory)
        gridded.report_failures(console, directory)


def cell(config: ForgettingBoundConfig, place: Place) -> list[Record]:
    """Return the records of a seed, for every stream and regime: accuracies and, with ``forgetting``, expansions.

    Raises:
        CurvlabError: The configuration, the data or the weights are not usable, or a training diverges.
    """
    dataset = subject.load_dataset(config, place)
    regimes.check_values(config, dataset)  # what else there is to refuse is refused when it is made
    return [
        record
        for stream in config.streams
        for regime in config.regimes
        for record in _of_network(config, dataset, stream, regime, place.folder / f"{stream}-{regime}")
    ]


# A network that learns one task after another -------------------------------------------------------------------------


def _of_network(
    config: ForgettingBoundConfig, dataset: Dataset, stream: str, name: str, folder: Path
) -> Iterator[Record]:
    """Yield the records of a stream and regime; a training that is in its checkpoint is not repeated."""
    (seed,) = config.seeds
    keys = {"stream": stream, "regime": name, "seed": seed}
    regime = Regime.of(config, name)
    model = regimes.network(config, dataset, seed, regime)
    tasks = regimes.tasks(config, dataset, stream, seed)
    before: Problem | None = None
    for number, task in enumerate(tasks, start=1):
        fit(
            model,
            task.train,
            optimizer="sgd",
            lr=regime.rate(number),
            momentum=config.momentum,
            epochs=config.epochs,
            batch_size=regime.batch_size,
            seed=derived_seed(seed, number),
            checkpoint=folder / f"task-{number}.pt",
            progress=False,
        )
        after = Problem(deepcopy(model), "cross_entropy", regimes.samples(config, task))
        for i, old in enumerate(tasks[:number], start=1):
            yield {**keys, "after": number, "task": i, "accuracy": _accuracy(model, old)}
        if before is not None:
            pair = expansion(before, after.model, solver=config.solver, tol=config.tol)
            yield {**keys, "task": number - 1, **pair}
        before = after


def _accuracy(model: nn.Module, task: Task) -> float:
    accuracy = evaluate(model, *task.test).accuracy
    assert accuracy is not None
    return accuracy


# The expansion --------------------------------------------------------------------------------------------------------


def expansion(
    old: Problem, new: nn.Module, *, solver: Literal["lanczos", "power_iteration"] = "lanczos", tol: float = 1e-3
) -> Record:
    """Return what is lost of a problem's loss at the weights of another model, and its expansion to second order.

    Keys: ``forgetting`` (F1), ``gradient_term`` (g'd), ``quadratic`` (1/2 d'H d), ``second_order`` (the two
    together), ``bound`` (1/2 lambda_max |d|^2), ``lambda_max``, ``residual`` (of its eigenvector), ``matvecs``,
    ``distance`` (|d|), ``tightness`` (quadratic over bound), ``loss`` (L1(w1)).

    Args:
        old: The old task: its loss and samples, and the model as it was at its end.
        new: The model after it learnt something else.
        solver: Of the largest eigenvalue: ``curvlab.top_eigenvalues``, or deflated power iteration.
        tol: Relative error of the largest eigenvalue, for ``lanczos``.

    Raises:
        CurvlabError: The curvature cannot be computed.
    """
    hessian: CurvatureMatrix = estimate(old, "hessian", "implicit")
    top = top_eigenvalues(hessian, tol=tol) if solver == "lanczos" else deflated_power_iteration(hessian)
    largest = float(top.values[0])
    weights = dict(new.named_parameters())
    d = old.space.flatten({name: weights[name].detach() - w for name, w in old.parameters().items()})
    before, gradient = _loss_and_gradient(old)
    after, _ = _loss_and_gradient(Problem(new, old.loss.name, old.data))
    wide = d.double()
    distance = float(wide.norm())
    quadratic = 0.5 * float(wide @ hessian.matvec(d).double())
    gradient_term = float(wide @ gradient.double())
    bound = 0.5 * largest * distance**2
    return {
        "forgetting": after - before,
        "gradient_term": gradient_term,
        "quadratic": quadratic,
        "second_order": gradient_term + quadratic,
        "bound": bound,
        "lambda_max": largest,
        "residual": float(top.residuals[0]),
        "matvecs": top.matvecs,
        "distance": distance,
        "tightness": quadratic / bound if bound else None,
        "loss": before,
    }


def _loss_and_gradient(problem: Problem) -> tuple[float, Tensor]:
    """Return the mean loss and its gradient ``(P,)``."""
    leaves = {name: value.requires_grad_() for name, value in problem.parameters().items()}
    loss, gradient = 0.0, torch.zeros(problem.space.total, dtype=torch.float64, device=problem.device)
    for inputs, targets in problem.batches():
        with torch.enable_grad():
            values = problem.loss.values(problem.forward(leaves, inputs), targets)
            slopes = torch.autograd.grad(values.sum(), list(leaves.values()))
        loss += float(values.detach().sum(dtype=torch.float64))
        gradient += torch.cat([slope.flatten() for slope in slopes])
    return loss / problem.num_samples, gradient / problem.num_samples


def toy(seed: int) -> float:
    """Return by how much F1 differs from 1/2 d'H d, relative, where the loss is quadratic and w1 its minimum.

    Two tasks of linear regression, each solved exactly, in float64.

    Examples:
        >>> toy(0) < 1e-10
        True
    """
    rng = np.random.default_rng(seed)
    solutions = []
    for _ in range(2):
        x, y = (torch.from_numpy(rng.standard_normal((50, width))) for width in (6, 3))
        model = nn.Linear(6, 3, bias=False, dtype=torch.float64)
        with torch.no_grad():
            model.weight.copy_(torch.linalg.lstsq(x, y).solution.mT)
        solutions.append((Problem(model, "squared_error", (x, y)), model))
    (old, _), (_, new) = solutions
    found = expansion(old, new)
    return float(abs(found["forgetting"] - found["quadratic"]) / abs(found["quadratic"]))


# What is made of them ------------------------------------------------------------------------------------------------


def summarise(found: Sequence[Record], accuracies: Sequence[Record]) -> list[Record]:
    """Return a record a stream and regime: mean over its pairs of tasks, then mean and deviation over the seeds.

    Args:
        found: Records as ``table.json`` has them.
        accuracies: Records as ``accuracies.json`` has them.
    """
    by = ("stream", "regime", "seed")
    units = []
    for names in dict.fromkeys(tuple(record[key] for key in by) for record in found):
        pairs, seen = (where(records, **dict(zip(by, names, strict=True))) for records in (found, accuracies))
        means = {key: fmean(pair[key] for pair in pairs) for key in _VALUES if None not in [p[key] for p in pairs]}
        units.append(dict(zip(by, names, strict=True)) | means | accuracy_metrics(seen))
    return aggregate(units, by[:2], [*_VALUES, "accuracy", "accuracy_lost", "learning_accuracy"])


def accuracy_metrics(accuracies: Sequence[Record]) -> Record:
    """Return what is made of a network's accuracies ``a[t, i]`` on task ``i`` after task ``t``, ``T`` tasks in all.

    Keys: ``accuracy`` (mean of ``a[T, i]``), ``accuracy_lost`` (the forgetting of Chaudhry et al. 2018: the best before
    the end minus ``a[T, i]``, mean over ``i < T``), ``learning_accuracy`` (mean of ``a[i, i]``).
    """
    a = {(record["after"], record["task"]): record["accuracy"] for record in accuracies}
    last = max(after for after, _ in a)
    lost = [max(a[t, i] for t in range(i, last)) - a[last, i] for i in range(1, last)]
    return {
        "accuracy": fmean(a[last, i] for i in range(1, last + 1)),
        "accuracy_lost": fmean(lost),
        "learning_accuracy": fmean(a[i, i] for i in range(1, last + 1)),
    }


def correlations_of(found: Sequence[Record]) -> list[Record]:
    """Return Spearman's rank correlation of F1 with its expansion, bound and factors, a record a stream and seed.

    It is over regimes and pairs of tasks; None where there are fewer than three points, or one does not vary.
    """
    groups = dict.fromkeys((record["stream"], record["seed"]) for record in found)
    return [
        {"stream": stream, "seed": seed, "points": len(points)}
        | {key: _spearman([p["forgetting"] for p in points], [p[key] for p in points]) for key in _CORRELATED}
        for stream, seed in groups
        for points in [where(found, stream=stream, seed=seed)]
    ]


def _spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    if len(x) < 3 or min(x) == max(x) or min(y) == max(y):
        return None
    return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])


def claims_of(
    found: Sequence[Record], accuracies: Sequence[Record], toys: Sequence[float], tol: float = 1e-3
) -> list[Claim]:
    """Return the claims with their verdicts.

    Args:
        found: Records as ``table.json`` has them.
        accuracies: Records as ``accuracies.json`` has them.
        toys: What ``toy`` gave, a number a seed.
        tol: Relative error of ``lambda_max``.
    """
    seeds = list(dict.fromkeys(record["seed"] for record in found))

    def largest_excess(seed: int) -> float:
        worst: float = max(
            (p["quadratic"] - p["bound"]) / max(abs(p["bound"]), 1e-300) for p in where(found, seed=seed)
        )
        return worst

    paper = "Mirzadeh et al. (2020)"
    claims = [
        Claim.of(
            "1/2 d'H d is at most 1/2 λmax |d|² for every pair of tasks (largest relative excess)",
            paper,
            by_seed(found, seeds, largest_excess),
            lambda value: value <= tol,
        ),
        Claim.of(
            "Where the loss is quadratic and the old task at its minimum, F1 is 1/2 d'H d (relative difference at most "
            "1e-10)",
            paper,
            toys,
            lambda value: value <= 1e-10,
        ),
    ]
    for stream in dict.fromkeys(record["stream"] for record in found):
        of_stream, seen = where(found, stream=stream), where(accuracies, stream=stream)
        ranks = {row["seed"]: row["bound"] for row in correlations_of(of_stream)}
        claims.append(
            Claim.of(
                f"{stream}: what is forgotten goes with the bound (Spearman's correlation of F1 and 1/2 λmax |d|² over "
                "regimes and tasks at least 0.5)",
                paper,
                by_seed(of_stream, seeds, ranks.__getitem__),
                lambda value: value >= 0.5,
            )
        )

        def difference(key: str, seen: Sequence[Record] = seen) -> list[float]:
            return stable_beside_plastic(
                seeds, lambda s, r: accuracy_metrics(where(seen, seed=s, regime=r))[key], seen, _minus
            )

        def ratio(key: str, of_stream: Sequence[Record] = of_stream) -> list[float]:
            return stable_beside_plastic(
                seeds, lambda s, r: fmean(p[key] for p in where(of_stream, seed=s, regime=r)), of_stream, _over
            )

        claims += [
            Claim.of(
                f"{stream}: the stable regime forgets less than the plastic one (difference of forgetting in accuracy)",
                paper,
                difference("accuracy_lost"),
                lambda value: value < 0,
            ),
            Claim.of(
                f"{stream}: its Hessian's largest eigenvalue is smaller (stable over plastic, mean over tasks)",
                paper,
                ratio("lambda_max"),
                lambda value: value < 1,
            ),
            Claim.of(
                f"{stream}: it moves less from task to task (|d| of stable over plastic, mean over tasks)",
                paper,
                ratio("distance"),
                lambda value: value < 1,
            ),
            Claim.of(
                f"{stream}: what that costs on each new task is small (difference of learning accuracy at least -0.06)",
                paper,
                difference("learning_accuracy"),
                lambda value: value >= -0.06,
            ),
        ]
    return claims


def _minus(stable: float, plastic: float) -> float:
    return stable - plastic


def _over(stable: float, plastic: float) -> float:
    return stable / plastic


def figure(found: Sequence[Record], title: str) -> Figure:
    """Draw F1 against the bound and against its two factors, a row a stream, regimes marked."""
    return bound_scatter(found, title)


def _title(config: ForgettingBoundConfig, dataset: Dataset) -> str:
    return f"{subject.describe(config, dataset, 'hessian').removeprefix('Hessian of a ')} on {Path(config.data).name}"


def _print(
    console: Console,
    config: ForgettingBoundConfig,
    dataset: Dataset,
    found: Sequence[Record],
    table: Sequence[Record],
    correlations: Sequence[Record],
    claims: Sequence[Claim],
    directory: RunDirectory,
) -> None:
    seeds = () if all(row["seeds"] == len(config.seeds) for row in table) else (gridded.SEEDS,)
    number = "the seeds that did not fail" if seeds else f"{len(config.seeds)} seeds"
    spread = f"mean ± standard deviation over {number}" if len(config.seeds) > 1 else "one seed"
    title = f"What a {_title(config, dataset)} forgets, {config.tasks} tasks; mean over pairs of tasks, {spread}"
    console.print(render(table, (*_EXPANSION, *seeds), title), crop=False)
    console.print(render(table, (*_NAMES, *_ACCURACY, *seeds), "Test accuracy, mean over tasks"), crop=False)
    ranks = aggregate(correlations, ["stream"], list(_CORRELATED))
    console.print(
        render(ranks, (*_CORRELATIONS, *seeds), "Spearman's rank correlation with F1, over regimes and pairs of tasks"),
        crop=False,
    )
    console.print(render_claims(claims), crop=False)
    below = sum(pair["forgetting"] <= pair["bound"] for pair in found)
    tightness = median(pair["tightness"] for pair in found if pair["tightness"] is not None)
    missed = median(abs(pair["forgetting"] - pair["second_order"]) for pair in found)
    for note in (
        "stable-X is the stable regime with the plastic one's X, plastic+X the reverse. d is the step to the weights "
        "after the next task; g, H and λmax are of the old task's training loss at its end. "
        f"F1 is at most 1/2 λmax |d|² for {below} of {len(found)} pairs; 1/2 d'Hd is {tightness:.2g} of that in the "
        f"median, and g'd + 1/2 d'Hd misses F1 by {missed:.2g}.",
        f"Saved in {directory.path}: table (.json .csv .md .tex), accuracies, correlations, claims, provenance, "
        f"figure, {gridded.STORE}.",
    ):
        console.print(note, markup=False, highlight=False, soft_wrap=True)


ANALYSIS = Analysis(
    config=ForgettingBoundConfig,
    presets=PRESETS,
    run=run,
    description="Is forgetting bounded by curvature and distance? Trains a network on one task after another under "
    "several regimes, and sets what it forgets of each task beside 1/2 d'H d and 1/2 λmax |d|², with the Hessian of "
    "the old task's loss at its end and the step d to the weights after the next one.",
    cell=cell,
)
