"""Shon et al. (2022), supplement, Appendix A: its identities, and what becomes of its statement in a training."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from curvlab.analyze.frame.analysis import Record
from curvlab.analyze.frame.conditions import differing
from curvlab.analyze.frame.published import read_published
from curvlab.analyze.frame.subject import Subject, describe_network
from curvlab.analyze.frame.values import divide
from curvlab.results import Claim, Gate, Identity, require_direction

if TYPE_CHECKING:
    from curvlab.analyze.dlcft.softmax_hessian import SoftmaxHessianConfig

_SETTLED = 0.01  # 1 - p_t below which the rate is measured
_FALLEN = 0.2  # end over peak, at most: fixed before the runs

#: Numbers of the random logits, the largest over the probabilities, and what they are of.
_LARGEST = {
    "autograd_entry": "Equations (20) and (21) are what automatic differentiation gives (largest difference of an "
    "entry)",
    "factors": "So are the output factors that all estimators here start from (largest relative difference)",
    "above_trace": "The largest eigenvalue is at most 1 - |p|² (largest relative excess; negative where it holds)",
    "above_upper": "1 - |p|² is at most 2 (1 - p_t) (largest relative excess, rounding)",
    "below_lower": "p_t (1 - p_t) is at most the largest eigenvalue (largest relative excess; negative where it holds)",
    "squared_error": "The squared error's Hessian with respect to the outputs is the identity at every output "
    "(largest difference of an entry)",
}


def conditions(config: "SoftmaxHessianConfig", data: Subject) -> dict[str, Any]:
    """Return the conditions of a run under the names that the published ones have."""
    return {
        "data": data.data,
        "classes": config.classes if config.classes == "all" else list(config.classes),
        "network": describe_network(config, data),
        "training samples": data.train,
        "steps": config.steps,
    }


def _table() -> Mapping[str, Any]:
    table: Mapping[str, Any] = read_published("dlcft")["appendix_a"]
    return table


def _gate(ours: Mapping[str, Any]) -> Gate:
    return require_direction(ours, _table()["conditions"], _table()["direction"])


def deviations(ours: Mapping[str, Any]) -> list[str]:
    """Return in what a run differs from the published one, with what that had in brackets."""
    differ = "" if _gate(ours).reason else differing(ours, _table()["conditions"])
    return [f"{differ}."] if differ else []


def claims(network: Sequence[Record], ours: Mapping[str, Any]) -> list[Claim]:
    """Return what Appendix A says of a training and what it leaves open for the parameters, with verdicts.

    Args:
        network: Records of the networks, one a seed and step.
        ours: Of ``conditions``.
    """
    trained = _by_seed(network)
    return [
        Claim.of(
            "In training, the Hessian with respect to a network's outputs falls to a fifth of its peak, or less (mean "
            "largest eigenvalue, end over peak)",
            _table()["source"],
            [divide(records[-1]["outputs"], max(record["outputs"] for record in records)) for records in trained],
            lambda value: value <= _FALLEN,
            "→ 0",
            _gate(ours),
        ),
        Claim.of(
            "The curvature of the parameters need not fall with it, since the Jacobian grows: the GGN's largest "
            "eigenvalue is no less at the end than at the start (end over start)",
            "ours, on any data",
            [divide(records[-1]["ggn"], records[0]["ggn"]) for records in trained],
            lambda value: value >= 1,
        ),
    ]


def identities(logits: Sequence[Record]) -> list[Identity]:
    """Return what is true of every softmax, with what it comes to in floating-point arithmetic.

    Args:
        logits: Records of the random logits, one a seed and probability.
    """
    drawn = _by_seed(logits)
    slope = Identity(
        "The Hessian with respect to the logits vanishes as p_t goes to 1: the largest eigenvalue is proportional to "
        f"1 - p_t (slope of their logarithms below {_SETTLED}, minus 1)",
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
    """Return the slope of log lambda over log (1 - p_t); NaN with less than two points."""
    settled = [record for record in records if record["complement"] <= _SETTLED]
    if len(settled) < 2:
        return math.nan
    x, y = (np.log([record[key] for record in settled]) for key in ("complement", "lambda_max"))
    return float(np.polyfit(x, y, 1)[0])
