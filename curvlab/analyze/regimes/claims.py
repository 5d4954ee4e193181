"""Claims of Mirzadeh et al. (2020) about stable and plastic training over five tasks, and their conditions."""

from collections.abc import Callable, Mapping, Sequence
from operator import sub, truediv
from typing import Any

from curvlab.analyze.frame.conditions import describe_differences
from curvlab.analyze.frame.published import read_published
from curvlab.analyze.frame.subject import Subject, describe_network
from curvlab.analyze.frame.values import list_by_seed, where
from curvlab.analyze.regimes.options import Record, StreamsConfig
from curvlab.continual.regimes import Regime
from curvlab.results import Claim, Gate, require_direction

#: Smallest rank correlation of two related quantities; our threshold, the same for all claims.
CORRELATED = 0.5
#: Largest accuracy on a new task that stable training may lose; our threshold.
_COST = 0.06


def conditions(config: StreamsConfig, data: Subject, stream: str) -> dict[str, Any]:
    """Return the conditions of a run, with the names used in ``published.yaml``.

    Args:
        config: Configuration of an analysis of regimes.
        data: Description of the data.
        stream: Name of the stream.
    """
    regimes = {f"{name} regime": _describe(Regime.of(config, name)) for name in ("stable", "plastic")}
    return {
        "data": data.data,
        "tasks": config.tasks,
        "training samples per task": config.task_samples or data.train,
        "passes": config.epochs,
        "network": describe_network(config, data),
        "momentum": config.momentum,
        **regimes,
        "seeds": len(config.seeds),
        **({"degrees a task": config.degrees} if stream == "rotated" else {}),
    }


def _describe(regime: Regime) -> str:
    return f"lr {regime.lr:g}, decay {regime.decay:g}, batch size {regime.batch_size:g}, dropout {regime.dropout:g}"


def gate(config: StreamsConfig, data: Subject, stream: str, table: str) -> Gate:
    """Return the gate for judging a direction of a published table."""
    known = read_published("regimes")[table]
    return require_direction(conditions(config, data, stream), known["conditions"][stream], known["direction"][stream])


def deviations(config: StreamsConfig, data: Subject) -> list[str]:
    """Return the differences of a run on the published data, with the published values in brackets."""
    lines = []
    for stream in config.streams:
        theirs = read_published("regimes")["figure3"]["conditions"][stream]
        differ = describe_differences(conditions(config, data, stream), theirs)
        lines += [f"{stream}: {differ}."] if differ and data.data == theirs["data"] else []
    return lines


def judge_streams(judge: Callable[..., list[Claim]], *tables: Sequence[Record]) -> list[Claim]:
    """Return the claims about every stream.

    Args:
        judge: Function of the name of a stream and of its records in each table.
        *tables: Records with ``stream``.
    """
    streams = list(dict.fromkeys(record["stream"] for record in tables[0]))
    return [claim for stream in streams for claim in judge(stream, *(where(table, stream=stream) for table in tables))]


def list_seeds(records: Sequence[Record]) -> list[int]:
    """Return the distinct seeds, in order of first appearance."""
    return list(dict.fromkeys(record["seed"] for record in records))


def judge_correlation(
    text: str, stream: str, records: Sequence[Record], rank: Callable[[int], float | None], gate: Gate
) -> Claim:
    """Return the claim that two quantities are correlated over regimes and tasks, judged for each seed.

    Args:
        text: The claim, with an open bracket that names the correlation.
        stream: Name of the stream.
        records: The records that the correlations are computed from.
        rank: Function of a seed that returns the rank correlation.
        gate: Gate of the claim.
    """
    source: str = read_published("regimes")["hypothesis"]["source"]
    return Claim.of(
        f"{stream}: {text}, over regimes and tasks, at least {CORRELATED:g})",
        source,
        list_by_seed(records, list_seeds(records), rank),
        lambda value: value >= CORRELATED,
        gate=gate,
    )


def judge_stability(
    stream: str, records: Sequence[Record], value: Callable[[str, int, str], float], gate: Gate
) -> dict[str, Claim]:
    """Return the claims that compare stable and plastic training, by metric; without values if one was not run.

    Args:
        stream: Name of the stream.
        records: The records that ``value`` reads.
        value: Function of a metric (``forgetting``, ``lambda_max``, ``distance`` or ``learning_accuracy``), a seed and
            a regime.
        gate: Gate of the claims.
    """
    both = {"stable", "plastic"} <= {record["regime"] for record in records}
    seeds = list_seeds(records) if both else []

    def compare_regimes(metric: str, compare: Callable[[float, float], float]) -> list[float]:
        return list_by_seed(
            records, seeds, lambda seed: compare(value(metric, seed, "stable"), value(metric, seed, "plastic"))
        )

    source: str = read_published("regimes")["figure3"]["source"]
    statements: Mapping[str, tuple[str, Callable[[float, float], float], Callable[[float], bool]]] = {
        "forgetting": (
            "the stable regime forgets less than the plastic one (forgetting in accuracy, stable minus plastic)",
            sub,
            lambda value: value < 0,
        ),
        "lambda_max": (
            "the Hessian's largest eigenvalue is smaller in the stable regime (stable over plastic, mean over tasks)",
            truediv,
            lambda value: value < 1,
        ),
        "distance": (
            "the weights move less from task to task in the stable regime (stable over plastic, mean over tasks)",
            truediv,
            lambda value: value < 1,
        ),
        "learning_accuracy": (
            f"stable training costs little accuracy on new tasks (stable minus plastic at least -{_COST:g})",
            sub,
            lambda value: value >= -_COST,
        ),
    }
    return {
        key: Claim.of(f"{stream}: {text}", source, compare_regimes(key, compare), test, gate=gate)
        for key, (text, compare, test) in statements.items()
    }
