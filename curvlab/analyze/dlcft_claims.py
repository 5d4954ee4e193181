"""Shon et al. (2022), DLCFT: what is published, and what becomes of its claims."""

import math
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from statistics import fmean
from typing import Any

import yaml

from curvlab.analyze.dlcft_methods import METHODS, SETTINGS
from curvlab.results import Claim

Record = dict[str, Any]

#: Above this mean accuracy of EWC in task-IL too little is forgotten to judge methods by it.
_SATURATED = 0.97


@cache
def published() -> dict[str, Any]:
    """Return what is printed: ``source``, and ``rows`` by setting and method, in percent."""
    text = files("curvlab.analyze").joinpath("published/dlcft.yaml").read_text()
    table: dict[str, Any] = yaml.safe_load(text)
    return table


def beside_published(table: Sequence[Record]) -> list[Record]:
    """Return the rows of a summary with the published accuracy and backward transfer, as shares, where there are some.

    A ``published_acc`` whose row has lost its name in the copy of the poster has ``published_read``.
    """
    rows = []
    for row in table:
        printed = published()["rows"][row["setting"]].get(row["method"], {})
        shares = {f"published_{key}": value / 100 for key, value in printed.items() if key != "read"}
        rows.append({**row, **shares, "published_read": "our reading" if printed.get("read") else None})
    return rows


def claims(found: Sequence[Record]) -> list[Claim]:
    """Return the claims with their verdicts.

    Args:
        found: A record a setting, method and seed, with ``acc`` and ``bwt``, as ``table.json`` has them.
    """
    answers = []
    for setting in ("data", "data_long"):
        answers += _of_data(_Values(found, setting))
    return [*answers, *_of_tasks(_Values(found, "task")), *_of_classes(_Values(found, "class"))]


class _Values:
    """The values of a setting, and claims about them."""

    def __init__(self, found: Sequence[Record], setting: str) -> None:
        self.seeds = list(dict.fromkeys(record["seed"] for record in found))
        self.records = {(r["method"], r["seed"]): r for r in found if r["setting"] == setting}
        self.name = SETTINGS[setting][0]  # type: ignore[index]
        self.printed = published()["rows"][setting]

    def of(self, method: str, key: str = "acc") -> list[float]:
        """Return a value a seed, NaN where there is none."""
        values = [self.records.get((method, seed), {}).get(key) for seed in self.seeds]
        return [math.nan if value is None else value for value in values]

    def ran(self, *methods: str) -> bool:
        return all(any(name == method for name, _ in self.records) for method in methods)

    def above(
        self,
        text: str,
        source: str,
        better: str,
        worse: str,
        key: str = "acc",
        by: Callable[[float], bool] = lambda difference: difference > 0,
        judged: bool = True,
    ) -> Claim:
        """Return the claim that one method is above another in every seed."""
        differences = [a - b for a, b in zip(self.of(better, key), self.of(worse, key), strict=True)]
        known = [self.printed.get(method, {}).get(key) for method in (better, worse)]
        printed = None if None in known else round((known[0] - known[1]) / 100, 4)
        values = differences if judged and self.ran(better, worse) else []
        return Claim.of(f"{self.name}: {text}", source, values, by, printed)


def _of_data(values: _Values) -> list[Claim]:
    if not values.records:
        return []
    long = values.name != SETTINGS["data"][0]
    pairs = [
        ("diagonal", "dlcft_diag", "ewc"),
        ("K-FAC", "dlcft_kfac", "osla"),
        ("TK-FAC", "dlcft_tkfac", "osla_tkfac"),
    ]
    answers = [
        values.above(
            f"with {name} curvature the linear network with squared error is above the non-linear one with "
            "cross-entropy (difference of accuracy)",
            "poster, ablation" if long or name == "TK-FAC" else "Table 5",
            better,
            worse,
        )
        for name, better, worse in pairs[1 if long else 0 :]
    ]
    if long:
        return answers
    best = [max(pair) for pair in zip(values.of("joint"), values.of("joint_linear"), strict=True)]
    others = [
        [a - b for a, b in zip(values.of(method), best, strict=True)]
        for method in METHODS
        if values.ran(method) and not method.startswith("joint")
    ]
    most = [max(of_seed) for of_seed in zip(*others, strict=True)] if values.ran("joint", "joint_linear") else []
    answers.append(
        Claim.of(
            f"{values.name}: no method is more than half a point above joint training (largest difference)",
            "poster, data-IL",
            most,
            lambda difference: difference <= 0.005,
            -0.0087,
        )
    )
    return answers


def _of_tasks(values: _Values) -> list[Claim]:
    if not values.records:
        return []
    ewc = values.of("ewc")
    judged = not fmean(ewc) > _SATURATED
    gate = "" if judged else f" (EWC is at {fmean(ewc):.3f}: nothing to judge)"
    forgotten = values.of("lwf", "bwt") if judged and values.ran("lwf") else []
    return [
        values.above(f"DLCFT is above OSLA{gate}", "Table 6", "dlcft_tkfac", "osla", judged=judged),
        values.above(
            f"OSLA is not below EWC{gate}",
            "Table 6",
            "osla",
            "ewc",
            by=lambda difference: difference >= 0,
            judged=judged,
        ),
        values.above(
            f"DLCFT forgets less than EWC (backward transfer more than 2 points higher){gate}",
            "Table 6",
            "dlcft_tkfac",
            "ewc",
            "bwt",
            lambda difference: difference > 0.02,
            judged,
        ),
        Claim.of(
            f"{values.name}: LwF forgets next to nothing (backward transfer at least -3 points){gate}",
            "Table 6",
            forgotten,
            lambda value: value >= -0.03,
            0.0004,
        ),
    ]


def _of_classes(values: _Values) -> list[Claim]:
    if not values.records:
        return []

    def five_points(difference: float) -> bool:
        return difference >= 0.05

    linear = "the linear network with squared error is above the non-linear one with cross-entropy, both with replay"
    return [
        values.above(
            "regularising the classifier gives 5 points or more, with replay",
            "poster, class-IL (no number)",
            "dlcft_tkfac",
            "dlcft_no_regularization",
            by=five_points,
        ),
        values.above(
            "regularising the classifier gives 5 points or more, without replay",
            "poster, class-IL (no number)",
            "dlcft_no_replay",
            "dlcft_neither",
            by=five_points,
        ),
        values.above(f"with K-FAC {linear}", "poster, ablation", "dlcft_kfac", "osla"),
        values.above(f"with TK-FAC {linear}", "poster, ablation", "dlcft_tkfac", "osla_tkfac"),
        values.above(
            "DLCFT with replay is at most 2 points below DER",
            "poster, replay",
            "dlcft_tkfac",
            "der",
            by=lambda difference: difference >= -0.02,
        ),
    ]
