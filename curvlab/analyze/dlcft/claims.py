"""Shon et al. (2022), DLCFT: the claims and their verdicts."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from curvlab.analyze.dlcft.conditions import direction_gate, measured_samples, published_tables
from curvlab.analyze.dlcft.methods import BOUNDS, METHODS, SETTINGS
from curvlab.analyze.dlcft.options import DlcftConfig, MethodName, Setting
from curvlab.analyze.frame.subject import Subject
from curvlab.analyze.frame.values import number
from curvlab.results import Claim, Gate

Record = Mapping[str, Any]

#: Above this mean accuracy, methods cannot be told apart.
_SATURATED = 0.97
_HALF_A_POINT = 0.005
#: Above this difference of joint training with all and with half of its steps, networks are compared too early.
RISING = 0.01
_LINEAR = "the linear network with squared error has higher accuracy than the non-linear one with cross-entropy"
_ROUNDING = 1 - 1e-9


def list_claims(found: Sequence[Record], config: DlcftConfig, data: Subject) -> list[Claim]:
    """Return the claims about the settings that were run; a claim is reproduced if it holds for every seed.

    A claim is not tested, with a reason, if the conditions of the run are outside the ``direction`` of the published
    table, if two methods differ by less than one test image on average, or if both accuracies are above 0.97. A claim
    that compares the linear network with the non-linear one is not tested either if joint training of one of them still
    rises: its mean accuracy with all steps is more than a point above that with half of them.

    Args:
        found: One record per setting, method and seed, with ``acc`` and ``bwt``.
        config: The configuration.
        data: Description of the data of the streams.
    """
    samples = measured_samples(config, data)
    runs = {
        setting: _Runs.select(
            found,
            setting,
            direction_gate(config, data, setting),
            samples,
            published_tables(setting, data),
        )
        for setting in SETTINGS
    }
    answers: dict[Setting, Callable[[], list[Claim]]] = {
        "data": lambda: [*_data_claims(runs["data"], runs["data"]), _joint_claim(runs["data"])],
        "data_long": lambda: _data_claims(runs["data_long"], runs["data"]),
        "task": lambda: _task_claims(runs["task"]),
        "class": lambda: _class_claims(runs["class"]),
    }
    return [claim for setting, make in answers.items() if runs[setting].records for claim in make()]


def list_rises(found: Sequence[Record], setting: Setting) -> dict[MethodName, float]:
    """Return how much joint training still rises: the mean accuracy with all steps, minus that with half of them.

    Args:
        found: Records with ``acc`` and, for joint methods, ``acc_half``.
        setting: The setting; ``data_long`` has the joint training of ``data``.
    """
    place = "data" if setting == "data_long" else setting
    rises: dict[MethodName, float] = {}
    for name in ("joint", "joint_linear"):
        mine = [r for r in found if (r["setting"], r["method"]) == (place, name) and r.get("acc_half") is not None]
        if mine:
            rises[name] = fmean(number(r["acc"]) - r["acc_half"] for r in mine)
    return rises


def _explain_rise(rises: Mapping[MethodName, float]) -> str:
    """Return why networks are compared too early; an empty string if joint training does not rise."""
    words = [
        f"joint training of the {'linear' if METHODS[name].linear else 'non-linear'} network still rises by {rise:.3f}"
        for name, rise in rises.items()
        if rise > RISING
    ]
    return f"{' and '.join(words)} from half of its steps to all of them" if words else ""


def _is_positive(difference: float) -> bool:
    return difference > 0


@dataclass(frozen=True)
class _Runs:
    """The runs of one setting, from which claims are judged."""

    setting: Setting
    seeds: Sequence[int]
    records: Mapping[tuple[str, int], Record]
    gate: Gate
    samples: int
    tables: Sequence[Mapping[str, Any]]
    rising: str  # why the linear and the non-linear network cannot be compared; empty if they can

    @classmethod
    def select(
        cls, found: Sequence[Record], setting: Setting, gate: Gate, samples: int, tables: Sequence[Mapping[str, Any]]
    ) -> "_Runs":
        """Select the runs of a setting."""
        records = {(r["method"], r["seed"]): r for r in found if r["setting"] == setting}
        seeds = list(dict.fromkeys(record["seed"] for record in found))
        return cls(setting, seeds, records, gate, samples, tables, _explain_rise(list_rises(found, setting)))

    def values(self, method: MethodName, key: str = "acc") -> list[float]:
        """Return one value per seed; NaN if there is none."""
        return [number(self.records.get((method, seed), {}).get(key)) for seed in self.seeds]

    def has_runs(self, *methods: MethodName) -> bool:
        """Return whether each of the methods was run."""
        return all(any(name == method for name, _ in self.records) for method in methods)

    def claim(
        self,
        text: str,
        source: str,
        values: Sequence[float],
        by: Callable[[float], bool],
        published: float | None = None,
    ) -> Claim:
        """Return a claim, judged from one value per seed of this setting."""
        return Claim.of(f"{SETTINGS[self.setting][0]}: {text}", source, values, by, published, self.gate)

    def require(self, reason: str) -> "_Runs":
        """Return the same runs with a closed gate; an empty reason or a closed gate changes nothing."""
        return replace(self, gate=Gate(reason)) if reason and not self.gate.reason else self

    def compare(
        self,
        text: str,
        source: str,
        better: MethodName,
        worse: MethodName,
        key: str = "acc",
        by: Callable[[float], bool] = _is_positive,
    ) -> Claim:
        """Return the claim that one method is better than another for every seed.

        Args:
            text: The claim, without the setting.
            source: The published table.
            better: The method that is claimed to be better.
            worse: The other method.
            key: Key of the value.
            by: Test that the difference of the values must pass.
        """
        pair = self.values(better, key), self.values(worse, key)
        differences = [a - b for a, b in zip(*pair, strict=True)] if self.has_runs(better, worse) else []
        runs = self.require(self.explain_tie(*pair, close=by is _is_positive))
        if METHODS[better].linear != METHODS[worse].linear:
            runs = runs.require(self.rising)
        return runs.claim(text, source, differences, by, self.published_difference(source, better, worse, key))

    def compare_linear(
        self, text: str, source: str, better: MethodName, worse: MethodName, joint: "_Runs"
    ) -> list[Claim]:
        """Return the claim that a linear method is better than a non-linear one, with and without a baseline.

        The second claim compares the accuracies minus those of joint training of the same network.

        Args:
            text: The claim, without the setting.
            source: The published table.
            better: The linear method.
            worse: The non-linear method.
            joint: The runs with joint training.
        """
        gains = [
            (a - a_joint) - (b - b_joint)
            for a, a_joint, b, b_joint in zip(
                self.values(better),
                joint.values("joint_linear"),
                self.values(worse),
                joint.values("joint"),
                strict=True,
            )
        ]
        complete = self.has_runs(better, worse) and joint.has_runs("joint", "joint_linear")
        runs = self.require(self.explain_tie(self.values(better), self.values(worse), close=False)).require(self.rising)
        if complete and abs(fmean(gains)) < _ROUNDING / self.samples:
            runs = runs.require(f"they differ by less than one of {self.samples:,} test images")
        return [
            self.compare(text, source, better, worse),
            runs.claim(
                f"{text}, each minus its own joint training",
                f"ours, based on {source}",
                gains if complete else [],
                _is_positive,
            ),
        ]

    def published_value(self, source: str, method: MethodName, key: str = "acc") -> float | None:
        """Return a published number in percent, from the cited table if it has the number."""
        tables = sorted(self.tables, key=lambda table: table["source"] != source)
        found = (table["rows"].get(method, {}).get(key) for table in tables)
        return next((float(value) for value in found if value is not None), None)

    def published_difference(
        self, source: str, better: MethodName, worse: MethodName, key: str = "acc"
    ) -> float | None:
        """Return the published difference of two methods, as a fraction."""
        first, second = (self.published_value(source, method, key) for method in (better, worse))
        return None if first is None or second is None else round((first - second) / 100, 4)

    def explain_tie(self, one: Sequence[float], other: Sequence[float], close: bool) -> str:
        """Return why two methods cannot be told apart; an empty string if they can.

        Args:
            one: One value per seed of the first method.
            other: One value per seed of the second method.
            close: Whether methods with nearly equal means count as a tie.
        """
        a, b = fmean(one), fmean(other)
        if a > _SATURATED and b > _SATURATED:  # not min(a, b), whose result with NaN depends on the order
            return f"both are above {_SATURATED}"
        if close and abs(a - b) < _ROUNDING / self.samples:
            return f"they differ by less than one of {self.samples:,} test images"
        return ""


def _data_claims(runs: _Runs, short: _Runs) -> list[Claim]:
    """Return the claims about data-IL.

    Args:
        runs: Runs of the short or the long stream.
        short: Runs of the short stream, which has joint training.
    """
    pairs: tuple[tuple[str, MethodName, MethodName], ...] = (
        ("diagonal", "dlcft_diag", "ewc"),
        ("K-FAC", "dlcft_kfac", "osla"),
        ("TK-FAC", "dlcft_tkfac", "osla_tkfac"),
    )
    long = runs.setting == "data_long"
    sources = [table["source"] for table in runs.tables]

    def cite(name: str) -> str:
        wanted = "poster, ablation" if long or name == "TK-FAC" else "Table 5"
        return wanted if wanted in sources else sources[0]

    return [
        claim
        for name, better, worse in pairs[1 if long else 0 :]
        for claim in runs.compare_linear(f"with {name} curvature {_LINEAR}", cite(name), better, worse, short)
    ]


def _joint_claim(runs: _Runs) -> Claim:
    """Return the claim about the method with the highest mean; the maximum over methods per seed would be biased."""
    joint = [max(pair) for pair in zip(runs.values("joint"), runs.values("joint_linear"), strict=True)]
    others = [runs.values(method) for method in METHODS if runs.has_runs(method) and method not in BOUNDS]
    complete = [values for values in others if math.isfinite(fmean(values))]
    differences: list[float] = []
    if complete and runs.has_runs("joint", "joint_linear"):
        best = max(complete, key=fmean)
        runs = runs.require(runs.explain_tie(best, joint, close=False))
        differences = [a - b for a, b in zip(best, joint, strict=True)]
    if _HALF_A_POINT * runs.samples < 1:
        runs = runs.require(f"half a point is less than one of {runs.samples:,} test images")
    return runs.claim(
        f"no method exceeds joint training by more than half a point (best mean of {len(complete)} methods, minus the "
        "better of the two joint trainings)",
        "poster, data-IL",
        differences,
        lambda difference: difference <= _HALF_A_POINT,
        runs.published_difference("poster, data-IL", "dlcft_tkfac", "joint"),  # the highest one there
    )


def _task_claims(runs: _Runs) -> list[Claim]:
    ewc = fmean(runs.values("ewc"))
    if math.isnan(ewc):
        runs = runs.require("EWC, which shows whether tasks are forgotten, has no value")
    elif ewc > _SATURATED:
        runs = runs.require(f"almost nothing is forgotten: the accuracy of EWC is {ewc:.3f}")
    baselines: tuple[tuple[MethodName, str], ...] = (
        ("lwf", "Table 6"),
        ("er", "poster, replay"),
        ("der", "poster, replay"),
        ("derpp", "poster, replay"),
    )
    return [
        *runs.compare_linear("DLCFT has higher accuracy than OSLA", "Table 6", "dlcft_tkfac", "osla", runs),
        *_baseline_claims(runs, baselines),
        runs.compare(
            "OSLA is not worse than EWC by one test image or more",
            "Table 6",
            "osla",
            "ewc",
            by=lambda difference: difference > -_ROUNDING / runs.samples,
        ),
        runs.compare(
            "DLCFT forgets less than EWC (backward transfer more than 2 points higher)",
            "Table 6",
            "dlcft_tkfac",
            "ewc",
            "bwt",
            lambda difference: difference > 0.02,
        ),
        runs.claim(
            "LwF forgets almost nothing (backward transfer at least -3 points)",
            "Table 6",
            runs.values("lwf", "bwt") if runs.has_runs("lwf") else [],
            lambda value: value >= -0.03,
            0.0004,
        ),
    ]


def _baseline_claims(runs: _Runs, baselines: Sequence[tuple[MethodName, str]]) -> list[Claim]:
    return [
        runs.compare(f"DLCFT has higher accuracy than {METHODS[name].label}", source, "dlcft_tkfac", name)
        for name, source in baselines
    ]


def _class_claims(runs: _Runs) -> list[Claim]:
    def five_points(difference: float) -> bool:
        return difference >= 0.05

    regularization: tuple[tuple[str, MethodName, MethodName], ...] = (
        ("with replay", "dlcft_tkfac", "dlcft_no_regularization"),
        ("without replay", "dlcft_no_replay", "dlcft_neither"),
    )
    answers = [
        runs.compare(
            f"regularising the classifier gains 5 points or more, {text}",
            "poster, class-IL (no number)",
            better,
            worse,
            by=five_points,
        )
        for text, better, worse in regularization
    ]
    arms: tuple[tuple[str, MethodName, MethodName, MethodName], ...] = (
        ("K-FAC", "dlcft_kfac", "dlcft_kfac_no_regularization", "osla"),
        ("TK-FAC", "dlcft_tkfac", "dlcft_no_regularization", "osla_tkfac"),
    )
    for name, better, alike, worse in arms:
        text = f"with {name} curvature and replay {_LINEAR}"
        answers += runs.compare_linear(text, "poster, ablation", better, worse, runs)
        answers += runs.compare_linear(
            f"{text}, without regularisation of the classifier", "poster, ablation (like with like)", alike, worse, runs
        )
    baselines: tuple[MethodName, ...] = ("er", "der", "derpp")
    return [*answers, *_baseline_claims(runs, [(name, "poster, replay") for name in baselines])]
