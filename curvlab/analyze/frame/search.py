"""How hyper-parameters are chosen: on held-out samples, by runs of their own seeds, the same way for every analysis."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic

from curvlab.commandline.config import C
from curvlab.data import Dataset
from curvlab.errors import CurvlabError, UnsupportedError
from curvlab.results import Column, aggregate

if TYPE_CHECKING:
    from curvlab.analyze.frame.analysis import Workspace

Record = dict[str, Any]
Group = Mapping[str, str]
Candidate = Mapping[str, float]
Measure = Callable[[C, Any, "Workspace"], Iterable[Record]]  # of whatever ``load`` of the analysis gives


@dataclass(frozen=True)
class Trial(Generic[C]):
    """A run that a candidate is judged by.

    Attributes:
        group: What the candidate is for, such as a method.
        candidate: Its hyper-parameters.
        config: The configuration of the run, with one seed.
    """

    group: Group
    candidate: Candidate
    config: C


@dataclass(frozen=True)
class Choice:
    """What was chosen for a group."""

    group: Group
    candidate: Candidate


@dataclass(frozen=True)
class Search(Generic[C]):
    """A search.

    Attributes:
        candidates: Of a configuration: every group with its candidates; one alone is taken without a trial.
        config: The configuration of a trial, of a configuration, group, candidate and seed.
        runs: The runs of a configuration once a candidate of each group is chosen.
        seeds: The seeds that the trials of a configuration have.
        value: The key, in what ``measure`` gives, of the number on held-out samples that candidates are judged by.
        largest: Whether the largest value is the best; else the smallest.
        measure: Of a trial; None for that of the analysis.
        advice: What a user can do where every candidate diverges.
        limits: Values of a hyper-parameter that no other can surpass.
        label: What a group's part is called in a table.
    """

    candidates: Callable[[C], Sequence[tuple[Group, Sequence[Candidate]]]]
    config: Callable[[C, Group, Candidate, int], C]
    runs: Callable[[C, Sequence[Choice]], Sequence[C]]
    seeds: Callable[[C], Sequence[int]]
    value: str
    largest: bool = True
    measure: "Measure[C] | None" = None
    advice: str = "give other values"
    limits: Mapping[str, Sequence[float]] = field(default_factory=dict)
    label: Callable[[str], str] = str

    @property
    def validation(self) -> str:
        """The key of the judged value in the records of trials."""
        return f"validation_{self.value.removeprefix('validation_')}"

    def trials(self, config: C) -> list[Trial[C]]:
        """Return the trials of a configuration; none for groups with a single candidate."""
        return [
            Trial(group, candidate, self.config(config, group, candidate, seed))
            for group, candidates in self.candidates(config)
            if len(candidates) > 1
            for candidate in candidates
            for seed in self.seeds(config)
        ]


def run_trial(search: Search[C], measure: "Measure[C]", trial: Trial[C], dataset: Dataset, at: "Workspace") -> Record:
    """Do a trial; one that diverges has no value, and says why in ``note``."""
    names: Record = {**trial.group, **trial.candidate, "seed": trial.config.seeds[0]}  # type: ignore[attr-defined]
    try:
        records = (search.measure or measure)(trial.config, dataset, at)
        found = next(record for record in records if search.value in record)
    except UnsupportedError:
        raise
    except CurvlabError as error:
        # The options have been checked: what is left is a loss, or a weight, that is not finite.
        return {**names, search.validation: None, "note": str(error)}
    value = found[search.value]
    return {**names, search.validation: value, "note": "" if value is not None else str(found.get("note", ""))}


def judge(search: Search[C], config: C, trials: Sequence[Record]) -> list[Record]:
    """Return a record a candidate, in the order of the candidates.

    Keys: those of the group and of the candidate; ``seeds``, the mean and, with ``_std``, the standard deviation of
    the judged value where it was tried, None where a trial diverged; ``note``.

    Args:
        search: The search.
        config: The configuration.
        trials: What ``run_trial`` gave.
    """
    rows: list[Record] = []
    for group, candidates in search.candidates(config):
        for candidate in candidates:
            names = {**group, **candidate}
            mine = [trial for trial in trials if all(trial.get(key) == value for key, value in names.items())]
            if not mine:
                rows.append(dict(names))
                continue
            (row,) = aggregate(mine, list(names), [search.validation])
            rows.append({**row, "note": next((trial["note"] for trial in mine if trial["note"]), "")})
    return rows


def choose(search: Search[C], config: C, trials: Sequence[Record]) -> list[Choice]:
    """Return the best candidate of every group, the first of several.

    Raises:
        CurvlabError: All candidates of a group have diverged.
    """
    judged = judge(search, config, trials)
    chosen = []
    for group, candidates in search.candidates(config):
        if len(candidates) == 1:
            chosen.append(Choice(group, candidates[0]))
            continue
        rows = [row for row in judged if all(row[key] == value for key, value in group.items())]
        able = [row for row in rows if row.get(search.validation) is not None]
        if not able:
            raise CurvlabError(
                f"{' '.join(map(search.label, group.values()))} fails with every one of its {len(rows)} candidates "
                f"({rows[-1].get('note', '')}); {search.advice}"
            )
        sign = 1 if search.largest else -1
        best = max(able, key=lambda row: sign * float(row[search.validation]))
        chosen.append(Choice(group, {key: best[key] for key in candidates[0]}))
    return chosen


def select(search: Search[C], config: C, trials: Sequence[Record], chosen: Sequence[Choice]) -> list[Record]:
    """Return the records of ``judge`` with ``chosen``, which says whether a candidate is taken."""
    return [
        {
            **row,
            "chosen": any(
                all(row.get(key) == value for key, value in {**choice.group, **choice.candidate}.items())
                for choice in chosen
            ),
        }
        for row in judge(search, config, trials)
    ]


def show_selection(search: Search[C], config: C, selection: Sequence[Record]) -> tuple[list[Column], list[Record]]:
    """Return columns and rows that show what was chosen, of how many; a star marks the end of the values tried."""
    groups = search.candidates(config)
    tuned = list(dict.fromkeys(key for _, candidates in groups for key in candidates[0]))
    rows = []
    for group, candidates in groups:
        mine = [row for row in selection if all(row[key] == value for key, value in group.items())]
        best = next(row for row in mine if row["chosen"])
        ends = at_an_end(search, best, mine, list(candidates[0]))
        rows.append(
            {key: search.label(value) for key, value in group.items()}
            | {key: f"{best[key]:g}{'*' * (key in ends)}" for key in candidates[0] if best[key] is not None}
            | {
                "best": best.get(search.validation),
                "best_std": best.get(f"{search.validation}_std"),
                "tried": len(mine),
                "failed": sum(search.validation in row and row[search.validation] is None for row in mine),
            }
        )
    columns = [
        *(Column(key, key) for key in dict.fromkeys(key for group, _ in groups for key in group)),
        *(Column(key, key.replace("_", " ")) for key in tuned),
        Column("best", f"held-out {search.validation.removeprefix('validation_')}", spread="best_std"),
        Column("tried", "of candidates"),
        Column("failed", "of them failed"),
    ]
    return columns, rows


def at_an_end(
    search: Search[C], row: Mapping[str, Any], candidates: Sequence[Mapping[str, Any]], tuned: Sequence[str]
) -> list[str]:
    """Return the hyper-parameters whose value is the smallest or largest that was tried, and could be surpassed.

    Args:
        search: The search, with its ``limits``.
        row: The candidate.
        candidates: All of its group.
        tuned: The hyper-parameters.
    """
    values = {key: {candidate[key] for candidate in candidates} - {None} for key in tuned}
    return [
        key
        for key, tried in values.items()
        if len(tried) > 1 and row[key] in (min(tried), max(tried)) and row[key] not in search.limits.get(key, ())
    ]
