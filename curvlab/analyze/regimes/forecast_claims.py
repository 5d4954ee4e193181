"""What the papers take for granted about forecasts of forgetting, as claims that data can refute."""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from curvlab.analyze.frame.published import read_published
from curvlab.analyze.frame.subject import Subject
from curvlab.analyze.frame.values import list_by_seed, number, where
from curvlab.analyze.regimes.claims import CORRELATED, gate
from curvlab.analyze.regimes.options import Record, StreamsConfig
from curvlab.results import Claim

#: Largest share of the quadratic term that a gradient term may have where it "can be left out"; a threshold of ours.
_SMALL = 0.1


def claims(scores: Sequence[Record], points: Sequence[Record], config: StreamsConfig, data: Subject) -> list[Claim]:
    """Return the claims with their verdicts.

    Args:
        scores: Records as ``scores.json`` has them.
        points: Records as ``table.json`` has them.
        config: Configuration of the run.
        data: Subject of the run.
    """
    statements: Mapping[str, Any] = read_published("regimes")["forecast"]["rows"]
    answers = []
    for stream in dict.fromkeys(point["stream"] for point in points):
        mine, pairs = where(scores, stream=stream, gradient=False), where(points, stream=stream)
        seeds = list(dict.fromkeys(point["seed"] for point in pairs))

        def rank(seed: int, structure: str, mine: Sequence[Record] = mine) -> float:
            return next((number(row["rank"]) for row in where(mine, seed=seed, structure=structure)), math.nan)

        def share(seed: int, pairs: Sequence[Record] = pairs) -> float | None:
            shares = [abs(p["gradient"] / p["hessian"]) for p in where(pairs, seed=seed) if p["hessian"]]
            return median(shares) if shares else None

        have = {row["structure"] for row in mine}
        values = {
            "hessian": [rank(seed, "hessian") for seed in seeds],
            "diagonal": [rank(seed, "diag") for seed in seeds] if "diag" in have else [],
            "finer": [rank(seed, "kfac") - rank(seed, "diag") for seed in seeds] if {"kfac", "diag"} <= have else [],
            "corrected": [rank(seed, "ekfac") - rank(seed, "kfac") for seed in seeds]
            if {"kfac", "ekfac"} <= have
            else [],
            "gradient": list_by_seed(pairs, seeds, share),
        }
        tests = {
            "hessian": lambda value: value >= CORRELATED,
            "diagonal": lambda value: value >= CORRELATED,
            "finer": lambda value: value > 0,
            "corrected": lambda value: value > 0,
            "gradient": lambda value: value <= _SMALL,
        }
        answers += [
            Claim.of(
                f"{stream}: {statement['text']}",
                statement["source"],
                values[key],
                tests[key],
                gate=gate(config, data, stream, "hypothesis"),
            )
            for key, statement in statements.items()
        ]
    return answers
