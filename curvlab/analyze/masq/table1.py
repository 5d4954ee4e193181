"""Selection of grid points, tables and claims for Gepperth and Wiech (2019), Table 1 and Figures 1 to 5."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, Literal, NamedTuple

from curvlab.analyze.frame.conditions import describe_differences
from curvlab.analyze.frame.published import read_published
from curvlab.analyze.frame.subject import Subject
from curvlab.analyze.frame.values import list_by_seed, number, where
from curvlab.analyze.masq import streams
from curvlab.analyze.masq.choice import choose_best
from curvlab.analyze.masq.ewc_grid_options import EwcGridConfig
from curvlab.results import Claim, Column, Gate, Identity, aggregate, mean_column, require_direction

Record = Mapping[str, Any]
Criterion = Literal["best", "last"]

_SOURCE = "Gepperth and Wiech (2019), "
_METHODS = {
    "masq": "MaSQ",
    "fim": "FIM",
    "none": "λ = 0",
    "fim here": "FIM, MaSQ's net and rate",
    "none here": "λ = 0, MaSQ's net and rate",
}
#: Rows of the figure (Figures 2 to 5 of the paper) and the selected points they show.
FIGURE_ROWS = {
    "MaSQ, best": "masq best",
    "MaSQ, last": "masq last",
    "FIM": "fim here best",
    r"$\lambda=0$": "none here best",
}

COLUMNS = (
    Column("stream", "tasks"),
    Column("criterion", "criterion"),
    Column("method", "importance"),
    Column("net", "hidden"),
    Column("rate", "rate", "{:g}".format),
    Column("strength", "λ", "{:g}".format),
    mean_column("accuracy", "accuracy"),
    mean_column("last_D1", "D1, last"),
    mean_column("last_D2", "D2, last"),
    Column("on_test", "selected on test"),
    Column("published", "published", "{:.4f}".format),
)
EQUAL_COLUMNS = (
    Column("stream", "tasks"),
    Column("net", "hidden"),
    Column("rate", "rate", "{:g}".format),
    Column("strength", "λ", "{:g}".format),
    mean_column("masq", "MaSQ, last"),
    mean_column("fim", "FIM, last"),
    mean_column("difference", "MaSQ - FIM"),
)


class Point(NamedTuple):
    """A point of the grid."""

    importance: str
    net: str
    rate: float
    strength: float

    def select(self, found: Sequence[Record]) -> list[Any]:
        """Return the records of this point, one per seed."""
        return where(found, **self._asdict())


def choose(found: Sequence[Record], key: str) -> Point | None:
    """Return the point with the highest mean of a key over the seeds; None if there is none."""
    best = choose_best(found, Point._fields, key)
    return None if best is None else Point(**best)


def choose_points(found: Sequence[Record]) -> dict[str, Point | None]:
    """Return the points of a stream selected on held-out samples.

    For each criterion: ``masq``, ``fim`` and ``none`` (lambda = 0) are the best of their own grids; ``fim here`` and
    ``none here`` have the network and rate of ``masq``, the FIM its own best strength.
    """
    chosen: dict[str, Point | None] = {}
    for criterion in ("best", "last"):
        key = f"validation_{criterion}"
        for name in ("masq", "fim", "none"):
            chosen[f"{name} {criterion}"] = choose(where(found, importance=name), key)
        own = chosen[f"masq {criterion}"]
        for name in ("fim", "none"):
            here = [] if own is None else where(found, importance=name, net=own.net, rate=own.rate)
            chosen[f"{name} here {criterion}"] = choose(here, key)
    return chosen


def rows(stream: str, found: Sequence[Record], data: str) -> list[dict[str, Any]]:
    """Return the rows of Table 1 for a stream: selected points and their test accuracies."""
    table1 = read_published("masq")["table1"]
    known = table1["rows"][stream] if data == table1["conditions"]["data"] else {}
    table = []
    for criterion in ("best", "last"):
        for name, label in _METHODS.items():
            point = choose_points(found)[f"{name} {criterion}"]
            if point is None or (name[:4], criterion) == ("none", "best"):  # without penalty the accuracy only falls
                continue
            (row,) = aggregate(point.select(found), list(Point._fields), ["best", "last", "last_D1", "last_D2"])
            key = "peak" if criterion == "best" else "last"
            on_test = choose(where(found, importance=name), key) if " " not in name else None
            published = {"masq": "accuracy", "none here": "without penalty"}.get(name, "")
            table.append(
                {**row, "stream": stream, "criterion": criterion, "method": label}
                | {"accuracy": row[criterion], "accuracy_std": row[f"{criterion}_std"]}
                | {"on_test": None if on_test is None else fmean(r[key] for r in on_test.select(found))}
                | {"published": known.get(criterion, {}).get(published)}
            )
    return table


def at_equal_strength(found: Sequence[Record]) -> list[dict[str, Any]]:
    """Return last accuracies of MaSQ and FIM at every strength, with the network and rate selected for MaSQ."""
    point = choose_points(found)["masq last"]
    if point is None:
        return []
    pairs = []
    for record in where(found, importance="masq", net=point.net, rate=point.rate):
        keys = {key: record[key] for key in ("stream", "net", "rate", "strength", "seed")}
        masq, (fim,) = record["last"], [other["last"] for other in where(found, **keys, importance="fim")]
        if masq is not None and fim is not None:
            pairs.append({**keys, "masq": masq, "fim": fim, "difference": masq - fim})
    return aggregate(pairs, ["stream", "net", "rate", "strength"], ["masq", "fim", "difference"])


def gate(config: EwcGridConfig, data: Subject) -> Gate:
    """Return the gate of the claims."""
    known = read_published("masq")["table1"]
    return require_direction(conditions(config, data), known["conditions"], known["direction"])


def conditions(config: EwcGridConfig, data: Subject) -> dict[str, Any]:
    """Return the conditions of a run, with the names used in ``published.yaml``."""
    return {
        **streams.conditions(config, data),
        "networks": len(config.nets),
        "largest layer": max(int(size) for net in config.nets for size in net.split("-")),
        "rates": list(config.rates),
        "strengths": list(config.strengths),
        "batch size of MaSQ": config.masq_batch_size,
        "steps between measurements": config.every,
        "selection on": f"{config.validation} held-out samples per task",
        "initialisation": "uniform, of PyTorch",
    }


def deviations(config: EwcGridConfig, data: Subject) -> list[str]:
    """Return how a run on the published data differs from the published run."""
    theirs = read_published("masq")["table1"]["conditions"]
    differ = describe_differences(conditions(config, data), theirs)
    return [f"{differ}."] if differ and data.data == theirs["data"] else []


def claims(found: Sequence[Record], config: EwcGridConfig, data: Subject) -> list[Claim]:
    """Return the claims with their verdicts; accuracies (0 to 1) are on D1 and D2 together.

    Args:
        found: Records of ``ewc_grid``.
        config: Configuration of the run.
        data: Data of the run.
    """
    known = read_published("masq")["table1"]["rows"]
    answers = []
    for stream in config.streams:
        mine = where(found, stream=stream)
        points = choose_points(mine)

        def values(
            compare: Callable[..., float],
            *terms: tuple[str, str],
            mine: Sequence[Record] = mine,
            points: Mapping[str, Point | None] = points,
        ) -> list[float]:
            """Return, per seed, ``compare`` of the values at the given points and keys."""
            taken = [(points[name], key) for name, key in terms]

            def value(seed: int) -> float:
                numbers = []
                for point, key in taken:
                    records = [] if point is None else where(point.select(mine), seed=seed)
                    numbers.append(number(records[0][key]) if records else math.nan)
                return compare(*numbers)

            return list_by_seed(mine, config.seeds, value)

        def claim(
            text: str,
            numbers: Sequence[float],
            test: Callable[[float], bool],
            source: str,
            published: Any = None,
            stream: str = stream,
        ) -> Claim:
            return Claim.of(f"{stream}: {text}", f"{_SOURCE}{source}", numbers, test, published, gate(config, data))

        low, high = known[stream]["last"]["without penalty range"]
        least = known[stream]["least gain"]
        last = ("masq last", "last")
        answers += [
            claim(
                f"without penalty the last accuracy is between {low:g} and {high:g}",
                values(lambda none: none, ("none here last", "last")),
                lambda value, low=low, high=high: low <= value <= high,  # type: ignore[misc]
                "Table 1",
                known[stream]["last"]["without penalty"],
            ),
            claim(
                f"EWC with MaSQ exceeds lambda = 0 by at least {least:g} (last accuracy, difference)",
                values(lambda masq, none: masq - none, last, ("none here last", "last")),
                lambda value, least=least: value >= least,  # type: ignore[misc]
                "Table 1, Fig. 5",
                float(f"{known[stream]['last']['accuracy'] - known[stream]['last']['without penalty']:.4g}"),
            ),
            claim(
                "MaSQ and FIM differ by at most 0.02, each at its best strength (last accuracy, difference)",
                values(lambda masq, fim: masq - fim, last, ("fim here last", "last")),
                lambda value: abs(value) <= 0.02,
                "section 3.2, Fig. 4",
            ),
            claim(
                "early stopping on held-out samples does not lose test accuracy (best - last, MaSQ)",
                values(lambda best, last: best - last, ("masq best", "best"), last),
                lambda value: value >= 0,
                "Table 1",
                float(f"{known[stream]['best']['accuracy'] - known[stream]['last']['accuracy']:.4g}"),
            ),
        ]
    return answers


def identities(found: Sequence[Record], config: EwcGridConfig) -> list[Identity]:
    """Return the identity that the highest test accuracy of a retraining is at least its last."""
    margins = {
        seed: [r["peak"] - r["last"] for r in where(found, seed=seed) if r["last"] is not None] for seed in config.seeds
    }
    text = "The highest test accuracy in a retraining is at least its last (smallest difference)"
    return [Identity(text, [min(values) for values in margins.values() if values])]
