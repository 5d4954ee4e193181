"""How important is the learning-rate schedule in transfer learning? Speed, accuracy and curvature at the end."""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from statistics import fmean
from typing import Any

import numpy as np

from curvlab import plots
from curvlab.analyze.frame import subject
from curvlab.analyze.frame.analysis import Analysis, Record, Report, Results, Table, Workspace
from curvlab.analyze.frame.values import split_config, where
from curvlab.analyze.transfer.claims import claims
from curvlab.analyze.transfer.options import (
    DECAYING,
    PRESETS,
    FineTuningData,
    LrSchedulesConfig,
    check,
    load_data,
    pretrain,
)
from curvlab.data import Dataset
from curvlab.errors import CurvlabError, UnsupportedError
from curvlab.estimators import estimate
from curvlab.results import Column, aggregate, mean_column
from curvlab.spectrum import top_eigenvalues
from curvlab.training import Training, evaluate, fit
from curvlab.training.options import DEFAULTS

_VALUES = ["accuracy", "area", "steps_to_target", "lambda_max"]
_TABLE = (
    Column("schedule", "schedule"),
    Column("lr", "rate"),
    Column("decay", "decay"),
    mean_column("accuracy", "test accuracy"),
    mean_column("area", "mean over the steps"),
    mean_column("steps_to_target", "steps to target"),
    Column("reached", "reached it"),
    mean_column("lambda_max", "lambda_max"),
)
_SHARES = (
    Column("value", "variance of"),
    mean_column("schedule", "schedule"),
    mean_column("lr", "rate"),
    mean_column("both", "both together"),
)


def parts(config: LrSchedulesConfig) -> list[LrSchedulesConfig]:
    """Return the configuration of each run: a schedule and seed, with all rates and decays."""
    return split_config(config, "schedules", "seeds")


def measure(config: LrSchedulesConfig, dataset: Dataset, workspace: Workspace) -> Iterator[Record]:
    """Fine-tune with the one schedule and seed at every rate and decay, and yield records.

    With ``reached``: of a training; the values of one that diverges are None. With ``step``: a test during it.
    """
    assert isinstance(dataset, FineTuningData)
    (schedule,), (seed,) = config.schedules, config.seeds
    source = pretrain(config, dataset, seed)
    points = [(lr, decay) for lr in config.lrs for decay in (config.decays if schedule in DECAYING else (None,))]
    for number, (lr, decay) in enumerate(points):
        keys = {"schedule": schedule, "lr": lr, "decay": decay, "seed": seed}
        training = Training(
            optimizer="sgd",
            lr=lr,
            momentum=config.momentum,
            schedule=schedule,
            schedule_factor=DEFAULTS["schedule_factor"] if decay is None else decay,
            steps=config.steps,
            batch_size=config.batch_size,
            seed=seed,
        )
        model = deepcopy(source)
        try:
            result = fit(
                model,
                (dataset.x_train, dataset.y_train),
                training=training,
                evaluation=(dataset.x_test, dataset.y_test),
                evaluate_every=config.every,
                checkpoint=workspace.folder / f"{number}.pt",
                progress=False,
            )
        except UnsupportedError:
            raise
        except CurvlabError as error:  # The options have been checked: a loss or a weight is not finite.
            yield {**keys, **dict.fromkeys((*_VALUES, "validation_accuracy")), "reached": False, "note": str(error)}
            continue
        curve: list[tuple[int, Any]] = [(int(one["step"] or 0), one["eval_accuracy"]) for one in result.history]
        first = next((step for step, accuracy in curve if accuracy >= config.target), None)
        assert dataset.held_out is not None
        hessian = estimate(subject.problem(config, dataset, model.eval()), "hessian", "implicit")
        yield {
            **keys,
            "accuracy": curve[-1][1],
            "validation_accuracy": evaluate(model, *dataset.held_out).accuracy,
            "area": fmean(accuracy for _, accuracy in curve),
            "steps_to_target": first,
            "reached": first is not None,
            "lambda_max": float(top_eigenvalues(hessian, tol=config.tol).values[0]),
            "note": "",
        }
        for record in result.history:
            yield {**keys, "step": record["step"], "test_accuracy": record["eval_accuracy"], "rate": record["lr"]}


# Summaries of the records ---------------------------------------------------------------------------------------------


def choose_best(found: Sequence[Record]) -> list[Record]:
    """Return, for each schedule, the records of the rate and decay with the best mean accuracy on held-out samples.

    A training that diverges counts as accuracy 0.

    Args:
        found: Records as ``table.json`` has them.
    """
    best: list[Record] = []
    for schedule in dict.fromkeys(record["schedule"] for record in found):
        mine = where(found, schedule=schedule)
        points = dict.fromkeys((record["lr"], record["decay"]) for record in mine)
        chosen = max(
            (where(mine, lr=lr, decay=decay) for lr, decay in points),
            key=lambda records: fmean(record["validation_accuracy"] or 0.0 for record in records),
        )
        best += chosen
    return best


def share_variance(found: Sequence[Record], key: str, chance: float) -> list[Record]:
    """Return the shares of the variance of a value that the schedule, the rate and both together explain, by seed.

    It is the analysis of variance of the grid schedule x rate, with means over the decays: the sums of squares of the
    two main effects and of their interaction over the total.

    Args:
        found: Records as ``table.json`` has them.
        key: The value.
        chance: The value of a training that diverges.
    """
    shares = []
    schedules, lrs = (list(dict.fromkeys(record[name] for record in found)) for name in ("schedule", "lr"))
    for seed in dict.fromkeys(record["seed"] for record in found):
        grid = np.array(
            [
                [
                    np.mean([chance if r[key] is None else r[key] for r in where(found, seed=seed, schedule=s, lr=lr)])
                    for lr in lrs
                ]
                for s in schedules
            ]
        )
        rows, columns = grid.mean(axis=1, keepdims=True), grid.mean(axis=0, keepdims=True)
        total = float(((grid - grid.mean()) ** 2).sum())
        varies = total > 1e-20 * float((grid**2).sum())  # more than rounding does
        effects = {
            "schedule": rows - grid.mean(),
            "lr": columns - grid.mean(),
            "both": grid - rows - columns + grid.mean(),
        }
        shares.append(
            {"value": key, "seed": seed}
            | {
                name: float((np.broadcast_to(effect, grid.shape) ** 2).sum()) / total if varies else None
                for name, effect in effects.items()
            }
        )
    return shares


def summarise(records: Sequence[Record]) -> list[Record]:
    """Return mean and standard deviation over the seeds, a record a schedule, rate and decay."""
    rows = aggregate(records, ["schedule", "lr", "decay"], _VALUES)
    for row in rows:
        mine = where(records, **{key: row[key] for key in ("schedule", "lr", "decay")})
        row["reached"] = f"{sum(record['reached'] for record in mine)} of {len(mine)}"
    return rows


def report(results: Results[LrSchedulesConfig]) -> Report:
    """Return the schedules at their best, what explains the variance, the claims, and the figures."""
    config, found, curves = results.config, results.records["table"], results.records["curves"]
    best, chance = choose_best(found), 1 / len(config.classes)
    shares = [share for key in ("accuracy", "area") for share in share_variance(found, key, chance)]
    what = f"{subject.describe_network(config, results.subject)} on {results.subject.data}"
    table = summarise(best)
    chosen = {(row["schedule"], row["lr"], row["decay"]) for row in table}
    shown = [record for record in curves if (record["schedule"], record["lr"], record["decay"]) in chosen]
    diverged = sum(bool(record["note"]) for record in found)
    names: Mapping[str, str] = {"accuracy": "test accuracy", "area": "mean accuracy over the steps"}
    return Report(
        Table(f"Fine-tuning a {what}, each schedule at its best; {results.spread}", _TABLE, table),
        [
            Table(f"Fine-tuning a {what}, each schedule at its best; {results.spread}", _TABLE, table),
            Table(
                "Shares of the variance over schedules and rates",
                _SHARES,
                [
                    {**row, "value": names[row["value"]]}
                    for row in aggregate(shares, ["value"], ["schedule", "lr", "both"])
                ],
            ),
        ],
        claims=claims(found, best, shares, config, results.subject),
        figures={
            "schedules": lambda: plots.schedule_curves(shown, config.target, what),
            "rates": lambda: plots.rate_curves(summarise(found), what),
        },
        files={"grid": summarise(found), "shares": shares},
        notes=[
            "Rate and decay are those with the best accuracy on held-out samples. The target is a test accuracy of "
            f"{config.target:g}; {diverged} of {len(found)} trainings diverged, and count as chance in the shares. "
            "λmax is of the Hessian of the training loss at the end.",
        ],
    )


ANALYSIS = Analysis(
    config=LrSchedulesConfig,
    question="How important is the learning-rate schedule in transfer learning? Fine-tunes a pre-trained network with "
    "six schedules, every initial rate and decay: steps to a target, area under the learning curve, final accuracy, "
    "and the curvature at the end.",
    presets=PRESETS,
    check=check,
    load=load_data,
    measure=measure,
    report=report,
    parts=parts,
    kinds={"table": "reached", "curves": "step"},
)
