"""Claims about EWC and its relatives, and the conditions under which they are judged."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from curvlab.analyze.frame.analysis import Record
from curvlab.analyze.frame.published import read_published
from curvlab.analyze.frame.subject import Subject, describe_network
from curvlab.analyze.frame.values import number, where
from curvlab.analyze.lecture.ewc_modes_methods import METHODS, ONLINE, EwcModesConfig
from curvlab.results import Claim, Gate, require_direction

#: Smallest difference of accuracy that counts.
MARGIN = 0.01
#: Loss of accuracy at the next strength of the grid from which on a method counts as sensitive.
SENSITIVE = 0.02
#: Largest difference of accuracy between forms that count as equal.
ALIKE = 0.02
_GROWTH = 0.9  # of the numbers kept, times the number of tasks
_CONSTANT = 1.1


def conditions(config: EwcModesConfig, data: Subject) -> dict[str, Any]:
    """Return the conditions of a run under the names of ``published.yaml``."""
    ratios = {round(big / small, 6) for small, big in zip(config.ewc_strengths, config.ewc_strengths[1:], strict=False)}
    return {
        "data": data.data,
        "tasks": config.tasks,
        "network": describe_network(config, data),
        "structure": config.structure,
        "ratio of strengths": ratios.pop() if len(ratios) == 1 else None,
    }


def claims(
    everything: Sequence[Record],
    found: Sequence[Record],
    memory: Sequence[Record],
    config: EwcModesConfig,
    data: Subject,
) -> list[Claim]:
    """Return the claims with their verdicts; a claim whose methods were not run is not tested.

    Args:
        everything: Records of ``table.json`` with all strengths.
        found: Records of the chosen strengths.
        memory: Records of ``memory.json`` of the chosen strengths.
        config: Configuration of the run.
        data: Data set of the run.
    """
    published = read_published("lecture")["ewc_modes"]
    sources = published["sources"]
    gates = {
        key: require_direction(conditions(config, data), published["conditions"], published["direction"][key])
        for key in published["direction"]
    }

    def judge(
        text: str,
        source: str,
        values: Sequence[float],
        test: Callable[[float], bool],
        printed: str | None = None,
        gate: str = "accuracy",
    ) -> Claim:
        passed: Gate = gates[gate]
        return Claim.of(text, sources[source], values, test, printed, passed)

    def differ(stream: str, one: str, other: str) -> list[float]:
        return difference(where(found, stream=stream), one, other, config.seeds)

    answers = []
    for name in config.methods:
        if name != "naive" and not name.startswith("imm_mean"):
            answers.append(
                judge(
                    f"{METHODS[name].label} is above naive fine-tuning by 0.01 or more (difference of accuracy)",
                    "l2" if name == "l2" else "methods",
                    differ("permuted", name, "naive"),
                    lambda x: x >= MARGIN,
                )
            )
    answers += [
        judge(
            "Plain L2 is below EWC (difference of accuracy, EWC separate less L2)",
            "l2",
            differ("permuted", "ewc_separate", "l2"),
            lambda x: x > 0,
        ),
        judge(
            "The three online forms of EWC are within 0.02 of each other (largest difference)",
            "online",
            _range(where(found, stream="permuted"), ONLINE, config.seeds),
            lambda x: x <= ALIKE,
        ),
        judge(
            "OSLA is not below EWC by more than 0.01 (difference of accuracy)",
            "methods",
            differ("permuted", "osla", "ewc_separate"),
            lambda x: x >= -MARGIN,
        ),
        judge(
            "Mode-IMM is not below mean-IMM by more than 0.01 (difference of accuracy)",
            "methods",
            differ("permuted", "imm_mode", "imm_mean"),
            lambda x: x >= -MARGIN,
        ),
        judge(
            "EWC is very sensitive to the strength: the next one of the grid, a factor of ten, costs 0.02 or more",
            "sensitivity",
            next_strength_costs(everything, found, "ewc_separate", config.ewc_strengths, config.seeds),
            lambda x: x >= SENSITIVE,
            gate="sensitivity",
        ),
        judge(
            f"Separate EWC has a linear cost: after {config.tasks} tasks it keeps at least {_GROWTH * config.tasks:g} "
            "times what it keeps after one, as stored here",
            "memory",
            growth(memory, "ewc_separate", config.seeds),
            lambda x: x >= _GROWTH * config.tasks,
            "linear",
        ),
        judge(
            "Online EWC has a constant cost: at most 1.1 times what it keeps after one task",
            "memory",
            growth(memory, "ewc_online", config.seeds),
            lambda x: x <= _CONSTANT,
            "constant",
        ),
    ]
    answers += [
        judge(
            f"Class-incremental: {METHODS[name].label} fails to beat naive fine-tuning (difference of accuracy below "
            "0.01)",
            "class",
            differ("class", name, "naive"),
            lambda x: x < MARGIN,
            gate="class",
        )
        for name in ("ewc_separate", "si", "mas")
    ]
    return answers


def difference(found: Sequence[Record], one: str, other: str, seeds: Sequence[int]) -> list[float]:
    """Return the difference of accuracy of two methods, one value per seed; an empty list if one was not run."""
    if not where(found, method=one) or not where(found, method=other):
        return []
    return [_accuracy(found, one, seed) - _accuracy(found, other, seed) for seed in seeds]


def _accuracy(found: Sequence[Record], method: str, seed: int) -> float:
    mine = where(found, method=method, seed=seed)
    return number(mine[0]["acc"]) if mine else math.nan


def _range(found: Sequence[Record], methods: Sequence[str], seeds: Sequence[int]) -> list[float]:
    if not all(where(found, method=name) for name in methods):
        return []
    values = [[_accuracy(found, name, seed) for name in methods] for seed in seeds]
    return [math.nan if any(map(math.isnan, there)) else max(there) - min(there) for there in values]


def next_strength_costs(
    everything: Sequence[Record], found: Sequence[Record], method: str, grid: Sequence[float], seeds: Sequence[int]
) -> list[float]:
    """Return the loss of accuracy at the worse neighbour of the chosen strength, permuted stream, one value per seed.

    Args:
        everything: Records of all strengths.
        found: Records of the chosen strengths.
        method: Name of the method.
        grid: Strengths of the method, in order.
        seeds: All seeds.
    """
    mine = where(found, stream="permuted", method=method)
    if not mine or len(grid) < 2:
        return []
    place = list(grid).index(mine[0]["strength"])
    beside = [grid[i] for i in (place - 1, place + 1) if 0 <= i < len(grid)]

    def accuracy(seed: int, strength: float) -> float:
        records = where(everything, stream="permuted", method=method, strength=strength, seed=seed)
        return number(records[0]["acc"]) if records else math.nan

    costs = [[accuracy(seed, grid[place]) - accuracy(seed, strength) for strength in beside] for seed in seeds]
    return [math.nan if any(map(math.isnan, there)) else max(there) for there in costs]


def growth(memory: Sequence[Record], method: str, seeds: Sequence[int]) -> list[float]:
    """Return the stored numbers after the last task divided by those after the first task, one value per seed."""
    mine = where(memory, stream="permuted", method=method)
    if not mine:
        return []
    last = max(record["after"] for record in mine)
    at = {(record["seed"], record["after"]): record["stored"] for record in mine}
    return [at.get((seed, last), math.nan) / at.get((seed, 1), math.nan) for seed in seeds]
