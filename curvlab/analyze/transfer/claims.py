"""What the project slides ask of schedules, as claims that data can refute."""

from collections.abc import Callable, Sequence
from statistics import fmean

from curvlab.analyze.frame.analysis import Record
from curvlab.analyze.frame.published import read_published
from curvlab.analyze.frame.subject import Subject
from curvlab.analyze.frame.values import list_by_seed, where
from curvlab.analyze.transfer.options import LrSchedulesConfig
from curvlab.results import Claim, require_direction

_COST, _FASTER = 0.005, 1.1  # thresholds of ours


def claims(
    found: Sequence[Record], best: Sequence[Record], shares: Sequence[Record], config: LrSchedulesConfig, data: Subject
) -> list[Claim]:
    """Return the claims with their verdicts.

    Args:
        found: Records as ``table.json`` has them.
        best: Those of the best rate and decay of each schedule.
        shares: Records as ``shares.json`` has them.
        config: Configuration of the run.
        data: Subject of the run.
    """
    slide = read_published("transfer")["schedules"]
    ours = {"data": data.data, "steps": config.steps, "schedules": len(config.schedules), "rates": len(config.lrs)}
    gate = require_direction(ours, slide["conditions"], slide["direction"])
    decaying = [record for record in best if record["schedule"] != "constant"]
    constant = where(best, schedule="constant")
    # The best of them by held-out samples, in the mean over the seeds.
    leader = max(
        dict.fromkeys(record["schedule"] for record in decaying),
        key=lambda name: fmean(r["validation_accuracy"] or 0.0 for r in where(decaying, schedule=name)),
        default=None,
    )
    led = where(decaying, schedule=leader)

    def compare(key: str, combine: Callable[[float, float], float]) -> list[float]:
        def value(seed: int) -> float | None:
            pair = [where(records, seed=seed)[0][key] for records in (led, constant)]
            return None if None in pair or not pair[1] else combine(*pair)

        return list_by_seed(best, config.seeds, value) if led and constant else []

    def spread_of_steps(seed: int) -> float | None:
        steps = [record["steps_to_target"] for record in where(best, seed=seed)]
        reached = [step for step in steps if step is not None]
        return max(reached) / min(reached) if len(reached) > 1 else None

    tried = sorted({record["lr"] for record in found})

    def failures(seed: int) -> float | None:
        rates = {lr: fmean(r["reached"] for r in where(found, seed=seed, lr=lr)) for lr in tried}
        return max(rates.values()) - rates[max(rates)] if len(rates) > 1 else None

    def ratio(seed: int) -> float | None:
        (share,) = where(shares, value="area", seed=seed)
        return share["lr"] / share["schedule"] if share["schedule"] else None

    values = {
        "decayed": (compare("accuracy", lambda ours, theirs: ours - theirs), lambda value: value >= -_COST),
        "speed": (list_by_seed(best, config.seeds, spread_of_steps), lambda value: value >= _FASTER),
        "large": (list_by_seed(found, config.seeds, failures), lambda value: value > 0),
        "rate": (list_by_seed(found, config.seeds, ratio), lambda value: value > 1),
        "flat": (compare("lambda_max", lambda ours, theirs: ours / theirs), lambda value: value < 1),
    }
    return [Claim.of(text, slide["source"], *values[key], gate=gate) for key, text in slide["rows"].items()]
