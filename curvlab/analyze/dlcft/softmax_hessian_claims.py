"""Shon et al. (2022), supplement, Appendix A: identities, and claims about training with their verdicts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from curvlab.analyze.dlcft.softmax_hessian_options import SoftmaxHessianConfig
from curvlab.analyze.frame.analysis import Record
from curvlab.analyze.frame.conditions import describe_differences
from curvlab.analyze.frame.published import read_published
from curvlab.analyze.frame.subject import Subject, describe_network
from curvlab.analyze.frame.values import divide
from curvlab.results import Claim, Gate, Identity, require_direction

_SETTLED = 0.01  # the rate is measured for 1 - p_t below this
_FALLEN = 0.2  # upper bound of end over peak, chosen before the runs

#: Key of the random logits, whose maximum over the probabilities is reported -> statement.
_LARGEST = {
    "autograd_entry": "Equations (20) and (21) agree with automatic differentiation (largest difference of an entry)",
    "factors": "They agree with the output factors that all estimators use (largest relative difference)",
    "above_trace": "The largest eigenvalue is at most 1 - |p|² (largest relative violation; negative if it holds)",
    "above_upper": "1 - |p|² is at most 2 (1 - p_t) (largest relative violation, from rounding)",
    "below_lower": "p_t (1 - p_t) is at most the largest eigenvalue (largest relative violation; negative if it holds)",
    "squared_error": "The Hessian of the squared error with respect to the outputs is the identity (largest "
    "difference of an entry)",
}


def conditions(config: SoftmaxHessianConfig, data: Subject, network: Sequence[Record]) -> dict[str, Any]:
    """Return the conditions of a run, with the names used in ``published.yaml``.

    Args:
        config: The configuration.
        data: Description of the data.
        network: Records of the networks, one per seed and step.
    """
    last = max((record["step"] for record in network), default=0)
    return {
        "data": data.data,
        "classes": config.classes if config.classes == "all" else list(config.classes),
        "network": describe_network(config, data),
        "training samples": data.train,
        "steps": config.steps,
        "mean 1 - p_t at the end": max((r["complement"] for r in network if r["step"] == last), default=None),
    }


def _table() -> Mapping[str, Any]:
    table: Mapping[str, Any] = read_published("dlcft")["appendix_a"]
    return table


def _gate(ours: Mapping[str, Any]) -> Gate:
    return require_direction(ours, _table()["conditions"], _table()["direction"])


def deviations(ours: Mapping[str, Any]) -> list[str]:
    """Return the differences from the published run, with the published values in brackets."""
    differ = "" if _gate(ours).reason else describe_differences(ours, _table()["conditions"])
    return [f"{differ}."] if differ else []


def claims(network: Sequence[Record], ours: Mapping[str, Any]) -> list[Claim]:
    """Return the claim of Appendix A about training, and a claim of ours about the parameters, with verdicts.

    Args:
        network: Records of the networks, one per seed and step.
        ours: Conditions of the run, from ``conditions``.
    """
    trained = _by_seed(network)
    falls = [divide(records[-1]["outputs"], max(record["outputs"] for record in records)) for records in trained]
    fallen = all(value <= _FALLEN for value in falls)
    return [
        Claim.of(
            "During training, the Hessian with respect to the outputs falls to a fifth of its peak or less (mean "
            "largest eigenvalue, end over peak)",
            _table()["source"],
            falls,
            lambda value: value <= _FALLEN,
            "→ 0",
            _gate(ours),
        ),
        Claim.of(
            "The curvature of the parameters does not fall with it, because the Jacobian grows: the largest eigenvalue "
            "of the GGN is at least as large at the end as at the start (end over start)",
            "ours, on any data",
            [divide(records[-1]["ggn"], records[0]["ggn"]) for records in trained],
            lambda value: value >= 1,
            gate=Gate("" if fallen else "the Hessian with respect to the outputs has not fallen"),
        ),
    ]


def identities(logits: Sequence[Record]) -> list[Identity]:
    """Return the statements that hold for every softmax, with their values in floating-point arithmetic.

    Args:
        logits: Records of the random logits, one per seed and probability.
    """
    drawn = _by_seed(logits)
    slope = Identity(
        "The Hessian with respect to the logits vanishes as p_t goes to 1: the largest eigenvalue is proportional to "
        f"1 - p_t (slope in logarithmic scales for 1 - p_t below {_SETTLED}, minus 1)",
        [_slope(records) - 1 for records in drawn],
    )
    return [
        slope,
        *(Identity(text, [max(record[key] for record in one) for one in drawn]) for key, text in _LARGEST.items()),
    ]


def _by_seed(records: Sequence[Record]) -> list[list[Record]]:
    seeds = dict.fromkeys(record["seed"] for record in records)
    return [[record for record in records if record["seed"] == seed] for seed in seeds]


def _slope(records: Sequence[Record]) -> float:
    """Return the slope of log(lambda) over log(1 - p_t); NaN with fewer than two points."""
    settled = [record for record in records if record["complement"] <= _SETTLED]
    if len(settled) < 2:
        return math.nan
    x, y = (np.log([record[key] for record in settled]) for key in ("complement", "lambda_max"))
    return float(np.polyfit(x, y, 1)[0])
