"""Shon et al. (2022), vanishing curvature: summaries of the curves, and the claims with their verdicts."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from curvlab.analyze.dlcft.eigenvalues_options import EigenvaluesConfig
from curvlab.analyze.frame.analysis import Record
from curvlab.analyze.frame.conditions import describe_differences, lowest_accuracy
from curvlab.analyze.frame.published import read_published
from curvlab.analyze.frame.subject import Subject, describe_network
from curvlab.results import Claim, Column, Gate, aggregate, mean_column, require_direction

LOSSES = {"cross_entropy": "softmax cross-entropy", "squared_error": "squared error"}
QUANTITIES = {"fisher": "Fisher", "hessian": "Hessian", "ggn": "GGN", "ekfac": "Fisher by EK-FAC"}
COLUMNS = (
    Column("loss", "loss"),
    Column("quantity", "curvature"),
    Column("layer", "of"),
    mean_column("start", "at the start"),
    mean_column("maximum", "maximum"),
    mean_column("maximum_step", "at step"),
    mean_column("end", "at the end"),
    mean_column("end_of_maximum", "end / maximum"),
    mean_column("end_of_start", "end / start"),
    Column("matvecs", "products"),
)

_VANISHED, _KEPT, _APART = 0.2, 0.5, 3.0  # thresholds, chosen before the runs


# Summaries of the curves ---------------------------------------------------------------------------------------------


def summarise(records: Sequence[Record]) -> list[Record]:
    """Return one record per loss, quantity and layer: mean and standard deviation of its curves over seeds.

    Args:
        records: Records of ``table.json``, one per point.

    Returns:
        Records of ``curvlab.results.aggregate`` with ``start``, ``maximum``, ``maximum_step``, ``end``,
        ``end_of_maximum``, ``end_of_start``, ``points`` (number of points of a curve) and ``matvecs`` (median over
        points and seeds).
    """
    by = ["loss", "quantity", "layer", "points"]
    numbers = ["start", "maximum", "maximum_step", "end", "end_of_maximum", "end_of_start"]
    table = aggregate(summarise_curves(records), by, numbers)
    for row in table:
        taken = [
            r["matvecs"] for r in records if all(r[key] == row[key] for key in by[:3]) and r["matvecs"] is not None
        ]
        row["matvecs"] = median(taken) if taken else None
    return table


def summarise_curves(records: Sequence[Record]) -> list[Record]:
    """Return one record per curve, that is per loss, quantity, layer and seed.

    ``early`` is whether the maximum is at the start or at the first point after it.

    Args:
        records: Records of ``table.json``, one per point.
    """
    curves: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        curves.setdefault(tuple(record[key] for key in ("loss", "quantity", "layer", "seed")), []).append(record)
    found = []
    for (loss, quantity, layer, seed), points in curves.items():
        points = sorted(points, key=lambda point: int(point["step"]))
        start, end = points[0]["value"], points[-1]["value"]
        top = max(points, key=lambda point: float(point["value"]))
        maximum = top["value"]
        found.append(
            {
                "loss": loss,
                "quantity": quantity,
                "layer": layer,
                "seed": seed,
                "start": start,
                "maximum": maximum,
                "maximum_step": top["step"],
                "early": top in points[:2],
                "end": end,
                "end_of_maximum": end / maximum if maximum > 0 else None,
                "end_of_start": end / start if start > 0 else None,
                "points": len(points),
            }
        )
    return found


def describe_early_peaks(records: Sequence[Record]) -> str:
    """Return a sentence about curves of the network with the maximum at one of the first two points; empty if none.

    Args:
        records: Records of ``table.json``, one per point.
    """
    curves = summarise_curves([record for record in records if record["layer"] == "network"])
    names = dict.fromkeys(
        f"{LOSSES[curve['loss']]} ({QUANTITIES.get(curve['quantity'], curve['quantity'])})"
        for curve in curves
        if curve["early"]
    )
    if not names:
        return ""
    return (
        "These curves have their maximum at the start or at the first point after it, and may be higher in between "
        f"(use a smaller --every to check): {', '.join(names)}."
    )


# The conditions -------------------------------------------------------------------------------------------------------


def conditions(config: EigenvaluesConfig, data: Subject, trainings: Sequence[Record]) -> dict[str, Any]:
    """Return the conditions of a run, with the names used in ``published.yaml``.

    Args:
        config: The configuration.
        data: Description of the data.
        trainings: Records of the trained networks, for the test accuracy.
    """
    return {
        "data": data.data,
        "classes": config.classes if config.classes == "all" else list(config.classes),
        "network": describe_network(config, data),
        "weights": "random" if config.weights is None else config.weights.stem,
        "fine-tuned": config.fine_tune,
        "training samples": count_training_samples(config, data),
        "optimizer": config.optimizer,
        "momentum": config.momentum,
        "learning rate of softmax cross-entropy": config.lr,
        "schedule": config.schedule,
        "batch size": config.batch_size,
        "steps": config.steps,
        "target scale": config.alpha,
        "test accuracy": lowest_accuracy(trainings),
    }


def count_training_samples(config: EigenvaluesConfig, data: Subject) -> int:
    """Return the number of training samples."""
    return config.train_samples or data.train - config.validation


def _table(ours: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the published figure on the data of the run; for other data, the one on MNIST."""
    name = "curvature_cifar100" if ours["data"] == "cifar100" else "curvature_mnist"
    table: Mapping[str, Any] = read_published("dlcft")[name]
    return table


def _gate(ours: Mapping[str, Any]) -> Gate:
    table = _table(ours)
    return require_direction(ours, table["conditions"], table["direction"])


def deviations(ours: Mapping[str, Any]) -> list[str]:
    """Return the differences from the published run, with the published values in brackets."""
    differ = "" if _gate(ours).reason else describe_differences(ours, _table(ours)["conditions"])
    return [f"{differ}."] if differ else []


# The claims -----------------------------------------------------------------------------------------------------------


def claims(records: Sequence[Record], ours: Mapping[str, Any]) -> list[Claim]:
    """Return the published claims with their verdicts; all are judged as directions, with thresholds of ours.

    Only the curves with the largest number of points are judged: with fewer points, the maximum may be missed.

    Args:
        records: Records of ``table.json``, one per point.
        ours: Conditions of the run, from ``conditions``.
    """
    points = [record for record in records if record["layer"] == "network"]
    curves = {(curve["loss"], curve["quantity"], curve["seed"]): curve for curve in summarise_curves(points)}
    seeds = sorted({record["seed"] for record in points})
    most = max((curve["points"] for curve in curves.values()), default=0)
    gate, source = _gate(ours), _table(ours)["source"]

    def ends(loss: str, quantity: str) -> list[float]:
        found = [curves.get((loss, quantity, seed), {}) for seed in seeds]
        if not any(found):
            return []
        values = [curve.get("end_of_maximum") if curve.get("points") == most else None for curve in found]
        return [math.nan if value is None else value for value in values]

    answers = []
    for quantity in dict.fromkeys(record["quantity"] for record in points):
        softmax, squared = (ends(loss, quantity) for loss in LOSSES)
        pairs = zip(softmax, squared, strict=True) if softmax and squared else ()
        ratios = [other / mine if mine > 0 else math.nan for mine, other in pairs]
        # The published figures show the Fisher; the Hessian ("second derivatives") is only mentioned in the text.
        shown = quantity in ("fisher", "ekfac")
        statements: list[tuple[str, list[float], Callable[[float], bool], str]] = [
            (
                f"with softmax cross-entropy the largest eigenvalue vanishes (end over maximum at most {_VANISHED})",
                softmax,
                lambda value: value <= _VANISHED,
                "→ 0",
            ),
            (
                f"with squared error it does not vanish (end over maximum at least {_KEPT})",
                squared,
                lambda value: value >= _KEPT,
                "curve",
            ),
            (
                f"end over maximum is at least {_APART:g} times as large with squared error as with cross-entropy",
                ratios,
                lambda value: value >= _APART,
                "curve",
            ),
        ]
        answers += [
            Claim.of(
                f"{QUANTITIES.get(quantity, quantity)}: {text}",
                source if shown else "ours, by analogy with the Fisher",
                values,
                test,
                published if shown else None,
                gate,
            )
            for text, values, test, published in statements
        ]
    return answers
