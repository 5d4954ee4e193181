"""Shon et al. (2022), DLCFT: what is published, and what becomes of its claims."""

import math
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from statistics import fmean
from typing import Any

from curvlab import yaml_file
from curvlab.analyze.dlcft.methods import METHODS, SETTINGS
from curvlab.results import Claim

Record = dict[str, Any]

#: Above this mean accuracy too little is left to judge methods by.
_SATURATED = 0.97


@cache
def published() -> dict[str, Any]:
    """Return what is printed: ``source``, ``conditions``, and ``rows`` by setting and method, in percent."""
    text = files("curvlab.analyze").joinpath("published/dlcft.yaml").read_text()
    table: dict[str, Any] = yaml_file.loads(text)
    return table


def beside_published(table: Sequence[Record]) -> list[Record]:
    """Return the rows of a summary with the published accuracy and backward transfer, as shares, where there are some.

    A ``published_acc`` whose row does not bear the method's name has ``published_read``.
    """
    rows = []
    for row in table:
        printed = published()["rows"][row["setting"]].get(row["method"], {})
        shares = {f"published_{key}": value / 100 for key, value in printed.items() if key != "read"}
        rows.append({**row, **shares, "published_read": "our reading" if printed.get("read") else None})
    return rows


def claims(found: Sequence[Record], images: int) -> list[Claim]:
    """Return the claims with their verdicts: one is reproduced if it holds for every seed.

    Not tested is, with the reason in the text, where two methods differ by less than one test image on average, or all
    that is compared is above 0.97.

    Args:
        found: A record a setting, method and seed, with ``acc`` and ``bwt``, as ``table.json`` has them.
        images: Samples that the accuracies are measured on.
    """
    answers = []
    for setting in ("data", "data_long"):
        answers += _of_data(_Values(found, setting, images))
    return [*answers, *_of_tasks(_Values(found, "task", images)), *_of_classes(_Values(found, "class", images))]


def _above(difference: float) -> bool:
    return difference > 0


class _Values:
    """The values of a setting, and claims about them."""

    def __init__(self, found: Sequence[Record], setting: str, images: int) -> None:
        self.seeds = list(dict.fromkeys(record["seed"] for record in found))
        self.records = {(r["method"], r["seed"]): r for r in found if r["setting"] == setting}
        self.name = SETTINGS[setting][0]  # type: ignore[index]
        self.printed = published()["rows"][setting]
        self.images = images

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
        by: Callable[[float], bool] = _above,
        nothing: str = "",
    ) -> Claim:
        """Return the claim that one method is above another in every seed.

        Args:
            text: The claim, without the setting.
            source: Where it stands.
            better: The method that is to be above.
            worse: The other one.
            key: Of what.
            by: The test of a difference.
            nothing: Why there is nothing to judge, if that is so.
        """
        pair = self.of(better, key), self.of(worse, key)
        differences = [a - b for a, b in zip(*pair, strict=True)]
        rows = [self.printed.get(method, {}).get(key) for method in (better, worse)]
        known = None if None in rows else round((rows[0] - rows[1]) / 100, 4)
        nothing = nothing or self.nothing(*pair, close=by is _above)
        values = differences if not nothing and self.ran(better, worse) else []
        return Claim.of(f"{self.name}: {text}{nothing and f' ({nothing})'}", source, values, by, known)

    def nothing(self, one: Sequence[float], other: Sequence[float], close: bool) -> str:
        """Return why two methods cannot be told apart, or nothing.

        Args:
            one: A value a seed.
            other: The same of the other.
            close: Whether they are to differ at all.
        """
        a, b = fmean(one), fmean(other)
        if a > _SATURATED and b > _SATURATED:  # not of the smaller one, which of NaN is either
            return f"both are above {_SATURATED}: nothing to judge"
        if close and abs(a - b) < (1 - 1e-9) / self.images:
            return f"they differ by less than one of {self.images:,} test images: nothing to judge"
        return ""


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
    return answers if long else [*answers, _not_above_joint(values)]


def _not_above_joint(values: _Values) -> Claim:
    """Return the claim about the method that is highest on average: the largest difference of a seed would be noise."""
    margin = 0.005
    joint = [max(pair) for pair in zip(values.of("joint"), values.of("joint_linear"), strict=True)]
    others = [values.of(method) for method in METHODS if values.ran(method) and not method.startswith("joint")]
    able = [of_method for of_method in others if math.isfinite(fmean(of_method))]
    text = f"{values.name}: no method is more than half a point above joint training"
    differences = []
    if able and values.ran("joint", "joint_linear"):
        best = max(able, key=fmean)
        text += f" (the best of {len(able)} on average, less the better of the two joint ones)"
        nothing = values.nothing(best, joint, close=False)
        if margin * values.images < 1:
            nothing = f"half a point is less than one of {values.images:,} test images: nothing to judge"
        text += nothing and f" ({nothing})"
        differences = [] if nothing else [a - b for a, b in zip(best, joint, strict=True)]
    return Claim.of(text, "poster, data-IL", differences, lambda difference: difference <= margin, -0.0087)


def _of_tasks(values: _Values) -> list[Claim]:
    if not values.records:
        return []
    ewc = fmean(values.of("ewc"))
    gate = f"EWC is at {ewc:.3f}: nothing to judge" if ewc > _SATURATED else ""
    if math.isnan(ewc):
        gate = "no value of EWC, which says whether there is something to judge"
    forgotten = values.of("lwf", "bwt") if not gate and values.ran("lwf") else []
    return [
        values.above("DLCFT is above OSLA", "Table 6", "dlcft_tkfac", "osla", nothing=gate),
        values.above(
            "OSLA is not below EWC, by one test image or more",
            "Table 6",
            "osla",
            "ewc",
            by=lambda difference: difference > -(1 - 1e-9) / values.images,
            nothing=gate,
        ),
        values.above(
            "DLCFT forgets less than EWC (backward transfer more than 2 points higher)",
            "Table 6",
            "dlcft_tkfac",
            "ewc",
            "bwt",
            lambda difference: difference > 0.02,
            gate,
        ),
        Claim.of(
            f"{values.name}: LwF forgets next to nothing (backward transfer at least -3 points){gate and f' ({gate})'}",
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

    answers = [
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
    ]
    linear = "the linear network with squared error is above the non-linear one with cross-entropy, both with replay"
    for name, better, alike, worse in (
        ("K-FAC", "dlcft_kfac", "dlcft_kfac_no_regularization", "osla"),
        ("TK-FAC", "dlcft_tkfac", "dlcft_no_regularization", "osla_tkfac"),
    ):
        answers += [
            values.above(f"with {name} {linear}; its classifier alone regularised", "poster, ablation", better, worse),
            values.above(f"with {name} {linear}; no classifier regularised", "(like with like)", alike, worse),
        ]
    return [
        *answers,
        values.above(
            "DLCFT with replay is at most 2 points below DER",
            "poster, replay",
            "dlcft_tkfac",
            "der",
            by=lambda difference: difference >= -0.02,
        ),
    ]
