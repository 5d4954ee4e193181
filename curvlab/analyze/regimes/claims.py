"""Claims of Mirzadeh et al. (2020) about stable and plastic training over five tasks, and their conditions."""

from collections.abc import Callable, Mapping, Sequence
from operator import sub, truediv
from typing import Any

import numpy as np
from scipy.stats import rankdata

from curvlab.analyze.frame.conditions import differing
from curvlab.analyze.frame.published import read_published
from curvlab.analyze.frame.subject import Subject, describe_network
from curvlab.analyze.frame.values import by_seed
from curvlab.analyze.regimes.options import Record, RegimesConfig
from curvlab.continual.regimes import Regime
from curvlab.results import Claim, Gate, require_direction

#: From which rank correlation on two quantities go together; a threshold of ours, the same for all of them.
CORRELATED = 0.5
#: How much accuracy on a new task a stable training may cost; a threshold of ours.
_COST = 0.06


def conditions(config: RegimesConfig, data: Subject, stream: str) -> dict[str, Any]:
    """Return the conditions of a run under the names that the published ones have.

    Args:
        config: Of an analysis of regimes.
        data: The data.
        stream: Name of the stream.
    """
    regimes = {f"{name} regime": _describe(Regime.of(config, name)) for name in ("stable", "plastic")}
    return {
        "data": data.data,
        "tasks": config.tasks,
        "training samples a task": config.task_samples or data.train,
        "passes": config.epochs,
        "network": describe_network(config, data),
        "momentum": config.momentum,
        **regimes,
        "seeds": len(config.seeds),
        **({"degrees a task": config.degrees} if stream == "rotated" else {}),
    }


def _describe(regime: Regime) -> str:
    return f"lr {regime.lr:g}, decay {regime.decay:g}, batch size {regime.batch_size:g}, dropout {regime.dropout:g}"


def gate(config: RegimesConfig, data: Subject, stream: str, table: str) -> Gate:
    """Return whether a run has the conditions under which a direction of a published table is judged."""
    known = read_published("regimes")[table]
    return require_direction(conditions(config, data, stream), known["conditions"][stream], known["direction"][stream])


def deviations(config: RegimesConfig, data: Subject) -> list[str]:
    """Return in what a run on the published data differs from the published one, with what that had in brackets."""
    lines = []
    for stream in config.streams:
        theirs = read_published("regimes")["figure3"]["conditions"][stream]
        differ = differing(conditions(config, data, stream), theirs)
        lines += [f"{stream}: {differ}."] if differ and data.data == theirs["data"] else []
    return lines


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return Spearman's correlation; None of fewer than three points, or where one of the two does not vary.

    Examples:
        >>> f"{rank_correlation([1, 2, 3], [10, 30, 20]):.2f}"
        '0.50'
    """
    if len(x) < 3 or min(x) == max(x) or min(y) == max(y):
        return None
    return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])


def judge_correlation(text: str, stream: str, ranks: Sequence[float], gate: Gate) -> Claim:
    """Return the claim that two quantities go together over regimes and tasks, judged by their correlation a seed."""
    source: str = read_published("regimes")["hypothesis"]["source"]
    return Claim.of(
        f"{stream}: {text} over regimes and tasks at least {CORRELATED:g})",
        source,
        ranks,
        lambda value: value >= CORRELATED,
        gate=gate,
    )


def compare_regimes(
    seeds: Sequence[int],
    records: Sequence[Record],
    value: Callable[[int, str], float],
    compare: Callable[[float, float], float],
) -> list[float]:
    """Return a number for every seed, of stable and of plastic; none if one of the two was not run.

    Args:
        seeds: All of them.
        records: What the values are made of.
        value: Of a seed and regime.
        compare: Makes a number of that of ``stable`` and that of ``plastic``.
    """
    if not {"stable", "plastic"} <= {record["regime"] for record in records}:
        return []
    return by_seed(records, seeds, lambda seed: compare(value(seed, "stable"), value(seed, "plastic")))


def judge_stability(
    stream: str, compare_metric: Callable[[str, Callable[[float, float], float]], Sequence[float]], gate: Gate
) -> dict[str, Claim]:
    """Return the claims about stable beside plastic training, by what they are about.

    Args:
        stream: Name of the stream.
        compare_metric: Takes ``forgetting``, ``lambda_max``, ``distance`` or ``learning_accuracy``, and how to make a
            number of that of stable and of plastic; returns the number of every seed, as ``compare_regimes`` does.
        gate: Of the claims.
    """
    source: str = read_published("regimes")["figure3"]["source"]
    statements: Mapping[str, tuple[str, Callable[[float, float], float], Callable[[float], bool]]] = {
        "forgetting": (
            "the stable regime forgets less than the plastic one (difference of forgetting in accuracy)",
            sub,
            lambda value: value < 0,
        ),
        "lambda_max": (
            "the stable regime's Hessian has the smaller largest eigenvalue (over that of plastic, mean over tasks)",
            truediv,
            lambda value: value < 1,
        ),
        "distance": (
            "the stable regime moves less from task to task (step over that of plastic, mean over tasks)",
            truediv,
            lambda value: value < 1,
        ),
        "learning_accuracy": (
            f"stability costs little on each new task (difference of learning accuracy at least -{_COST:g})",
            sub,
            lambda value: value >= -_COST,
        ),
    }
    return {
        key: Claim.of(f"{stream}: {text}", source, compare_metric(key, compare), test, gate=gate)
        for key, (text, compare, test) in statements.items()
    }
