"""Shon et al. (2022), vanishing curvature: what the curves come to, and what becomes of the claims."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from curvlab.analyze.frame.analysis import Record
from curvlab.analyze.frame.conditions import differing
from curvlab.analyze.frame.published import read_published
from curvlab.analyze.frame.subject import Subject, describe_network
from curvlab.results import Claim, Column, Gate, aggregate, require_direction

if TYPE_CHECKING:
    from curvlab.analyze.dlcft.eigenvalues import EigenvaluesConfig

LOSSES = {"cross_entropy": "softmax cross-entropy", "squared_error": "squared error"}
QUANTITIES = {"fisher": "Fisher", "hessian": "Hessian", "ggn": "GGN", "ekfac": "Fisher by EK-FAC"}
COLUMNS = (
    Column("loss", "loss"),
    Column("quantity", "curvature"),
    Column("layer", "of"),
    Column("start", "at the start", spread="start_std"),
    Column("maximum", "maximum", spread="maximum_std"),
    Column("maximum_step", "at step", spread="maximum_step_std"),
    Column("end", "at the end", spread="end_std"),
    Column("end_of_maximum", "end / maximum", spread="end_of_maximum_std"),
    Column("end_of_start", "end / start", spread="end_of_start_std"),
    Column("matvecs", "products"),
)

_VANISHED, _KEPT, _APART = 0.2, 0.5, 3.0  # thresholds, fixed before the runs


# What the curves come to ----------------------------------------------------------------------------------------------


def summarise(records: Sequence[Record]) -> list[Record]:
    """Return what the curves come to, one record a loss, quantity and layer: mean and deviation over the seeds.

    Args:
        records: Points as ``table.json`` has them.

    Returns:
        As ``curvlab.results.aggregate`` makes them: ``start``, ``maximum``, ``maximum_step``, ``end``,
        ``end_of_maximum``, ``end_of_start``; with ``points``, how many a curve has, and ``matvecs``, the median over
        points and seeds.
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
    """Return what each curve comes to, one record a loss, quantity, layer and seed.

    ``early`` says whether its maximum is at the start or the first point after it.

    Args:
        records: Points as ``table.json`` has them.
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
    """Return a sentence about the network's curves whose maximum is at one of their first two points, if there are any.

    Args:
        records: Points as ``table.json`` has them.
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
        "Some curves have their maximum at the start or at the first point after it, and may be higher between the "
        f"two (a smaller --every shows it): {', '.join(names)}."
    )


# The conditions -------------------------------------------------------------------------------------------------------


def conditions(config: "EigenvaluesConfig", data: Subject) -> dict[str, Any]:
    """Return the conditions of a run under the names that the published ones have."""
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
    }


def count_training_samples(config: "EigenvaluesConfig", data: Subject) -> int:
    """Return how many samples the networks are trained on."""
    return config.train_samples or data.train - config.validation


def _table(ours: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the published figure that is nearest to a run."""
    name = "curvature_cifar100" if ours["data"] == "cifar100" else "curvature_mnist"
    table: Mapping[str, Any] = read_published("dlcft")[name]
    return table


def _gate(ours: Mapping[str, Any]) -> Gate:
    table = _table(ours)
    return require_direction(ours, table["conditions"], table["direction"])


def deviations(ours: Mapping[str, Any]) -> list[str]:
    """Return in what a run differs from the published one, with what that had in brackets."""
    differ = "" if _gate(ours).reason else differing(ours, _table(ours)["conditions"])
    return [f"{differ}."] if differ else []


# The claims -----------------------------------------------------------------------------------------------------------


def claims(records: Sequence[Record], ours: Mapping[str, Any]) -> list[Claim]:
    """Return the published claims with their verdicts; all of them are about directions, and their thresholds are ours.

    One about a curve's maximum is judged only of curves with the most points: that of others may lie between theirs.

    Args:
        records: Points as ``table.json`` has them.
        ours: Of ``conditions``.
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
        # The publication speaks of the Fisher in its figures; of the Hessian ("second derivatives") in words alone.
        shown = quantity in ("fisher", "ekfac")
        statements: list[tuple[str, list[float], Callable[[float], bool], str]] = [
            (
                f"softmax cross-entropy's largest eigenvalue vanishes: at the end at most {_VANISHED} of its maximum",
                softmax,
                lambda value: value <= _VANISHED,
                "→ 0",
            ),
            (
                f"squared error's does not: at the end at least {_KEPT} of its maximum",
                squared,
                lambda value: value >= _KEPT,
                "curve",
            ),
            (
                f"at the end, each over its own maximum, squared error's is at least {_APART:g} times as large",
                ratios,
                lambda value: value >= _APART,
                "curve",
            ),
        ]
        answers += [
            Claim.of(
                f"{QUANTITIES.get(quantity, quantity)}: {text}",
                source if shown else "ours, as for the Fisher",
                values,
                test,
                published if shown else None,
                gate,
            )
            for text, values, test, published in statements
        ]
    return answers
