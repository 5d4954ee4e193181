"""The hyper-parameter search of all analyses: candidates are compared on held-out samples, with separate seeds."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic

from curvlab.analyze.frame.subject import check_distinct
from curvlab.analyze.frame.workspace import Record, Workspace
from curvlab.commandline.config import C
from curvlab.errors import CurvlabError, UnsupportedError
from curvlab.results import Column, aggregate

Group = Mapping[str, str]
Candidate = Mapping[str, float]
Measure = Callable[[C, Any, Workspace], Iterable[Record]]  # the second argument is the data set that the analysis loads


@dataclass(frozen=True)
class Trial(Generic[C]):
    """A run of the search, with one candidate and one seed.

    Attributes:
        group: What the hyper-parameters are chosen for, such as a method.
        candidate: Values of the hyper-parameters.
        config: Configuration of the run, with one seed.
    """

    group: Group
    candidate: Candidate
    config: C


@dataclass(frozen=True)
class Choice:
    """The candidate chosen for a group."""

    group: Group
    candidate: Candidate


@dataclass(frozen=True)
class Search(Generic[C]):
    """A hyper-parameter search.

    Attributes:
        candidates: Function of a configuration that returns each group with its candidates; a single candidate is
            chosen without a trial.
        config: Function of a configuration, group, candidate and seed that returns the configuration of the trial.
        runs: Function of a configuration and the choices that returns the configurations of the runs.
        seeds: Function of a configuration that returns the seeds of its trials.
        value: Key of the held-out value in the records of ``measure``.
        largest: Whether the largest value is the best; otherwise the smallest.
        measure: Function that executes a trial; None for the ``measure`` of the analysis.
        advice: What the user can do if every candidate diverges.
        limits: Bounds of the range of a hyper-parameter, beyond which there is no value to try.
        label: Function that returns the label of a value of a group in a table.
    """

    candidates: Callable[[C], Sequence[tuple[Group, Sequence[Candidate]]]]
    config: Callable[[C, Group, Candidate, int], C]
    runs: Callable[[C, Sequence[Choice]], Sequence[C]]
    seeds: Callable[[C], Sequence[int]]
    value: str
    largest: bool = True
    measure: Measure[C] | None = None
    advice: str = "give other values"
    limits: Mapping[str, Sequence[float]] = field(default_factory=dict)
    label: Callable[[str], str] = str

    @property
    def validation(self) -> str:
        """Key of the held-out value in the records of trials."""
        return f"validation_{self.value.removeprefix('validation_')}"

    def trials(self, config: C) -> list[Trial[C]]:
        """Return the trials of a configuration; groups with a single candidate have none."""
        return [
            Trial(group, candidate, self.config(config, group, candidate, seed))
            for group, candidates in self.candidates(config)
            if len(candidates) > 1
            for candidate in candidates
            for seed in self.seeds(config)
        ]


def search_by_accuracy(
    candidates: Callable[[C], Sequence[tuple[Group, Sequence[Candidate]]]],
    single_run: Callable[[C, Group, Candidate], C],
    **options: Any,
) -> Search[C]:
    """Return a search for the candidate of each group with the best accuracy after the last task of a stream.

    The config has ``selection_seeds``, the seeds of the trials, and ``evaluation``, the samples for accuracies.

    Args:
        candidates: As for ``Search``.
        single_run: Function of a configuration, group and candidate that returns the configuration of their runs.
        **options: Other fields of ``Search``.
    """

    def make_trial(config: C, group: Group, candidate: Candidate, seed: int) -> C:
        return single_run(config, group, candidate).model_copy(update={"seeds": (seed,), "evaluation": "validation"})

    def make_runs(config: C, chosen: Sequence[Choice]) -> list[C]:
        return [single_run(config, one.group, one.candidate) for one in chosen]

    fields: dict[str, Any] = {"runs": make_runs, "value": "acc", **options}
    return Search(candidates, make_trial, seeds=lambda config: config.selection_seeds, **fields)


def check_selection_seeds(config: Any) -> None:
    """Check that the seeds of a search by accuracy are distinct, and differ from those of a table on the same samples.

    Raises:
        CurvlabError: They are not.
    """
    check_distinct(selection_seeds=config.selection_seeds)
    if config.evaluation == "validation" and set(config.seeds) & set(config.selection_seeds):
        raise CurvlabError(
            "with evaluation=validation the seeds of the table must differ from those of the search: "
            "give seeds and selection_seeds no common value"
        )


def run_trial(search: Search[C], measure: Measure[C], trial: Trial[C], dataset: Any, at: Workspace) -> Record:
    """Execute a trial and return its record; if it diverges, the value is None and ``note`` has the reason."""
    names: Record = {**trial.group, **trial.candidate, "seed": trial.config.seeds[0]}  # type: ignore[attr-defined]
    try:
        records = list((search.measure or measure)(trial.config, dataset, at))
    except UnsupportedError:
        raise
    except CurvlabError as error:
        # The options have been checked, so the only remaining error is a loss or a weight that is not finite.
        return {**names, search.validation: None, "note": str(error)}
    found = next(record for record in records if search.value in record)
    value = found[search.value]
    return {**names, search.validation: value, "note": "" if value is not None else str(found.get("note", ""))}


def judge(search: Search[C], config: C, trials: Sequence[Record]) -> list[Record]:
    """Return one record per candidate, in the order of the candidates.

    Keys: those of the group and of the candidate; if the candidate was tried, ``seeds``, ``note``, and mean and
    standard deviation (``_std``) of the held-out value, which are None if a trial diverged.

    Args:
        search: The search.
        config: The configuration.
        trials: Records of ``run_trial``.
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
    """Return the best candidate of each group; of equally good ones, the first.

    Raises:
        CurvlabError: All candidates of a group diverged.
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
                f"{' '.join(map(search.label, group.values()))} fails with all of its {len(rows)} candidates "
                f"({rows[-1].get('note', '')}); {search.advice}"
            )
        sign = 1 if search.largest else -1
        best = max(able, key=lambda row: sign * float(row[search.validation]))
        chosen.append(Choice(group, {key: best[key] for key in candidates[0]}))
    return chosen


def select(search: Search[C], config: C, trials: Sequence[Record], chosen: Sequence[Choice]) -> list[Record]:
    """Return the records of ``judge`` with the key ``chosen``: whether the candidate was chosen."""
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
    """Return columns and rows with the chosen candidates; a star marks a value found by ``find_boundary_values``."""
    groups = search.candidates(config)
    tuned = list(dict.fromkeys(key for _, candidates in groups for key in candidates[0]))
    rows = []
    for group, candidates in groups:
        mine = [row for row in selection if all(row[key] == value for key, value in group.items())]
        best = next(row for row in mine if row["chosen"])
        ends = find_boundary_values(search, best, mine, list(candidates[0]))
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
        Column("tried", "candidates"),
        Column("failed", "diverged"),
    ]
    return columns, rows


def find_boundary_values(
    search: Search[C], row: Mapping[str, Any], candidates: Sequence[Mapping[str, Any]], tuned: Sequence[str]
) -> list[str]:
    """Return the hyper-parameters whose value is the smallest or largest of three or more, and not at a limit.

    Of two values, one is always at an end, whatever the search finds: see ``list_pairs``.

    Args:
        search: The search, with its ``limits``.
        row: The candidate.
        candidates: All candidates of the group.
        tuned: Names of the hyper-parameters.
    """
    values = {key: {candidate[key] for candidate in candidates} - {None} for key in tuned}
    return [
        key
        for key, tried in values.items()
        if len(tried) > 2 and row[key] in (min(tried), max(tried)) and row[key] not in search.limits.get(key, ())
    ]


def list_pairs(search: Search[C], config: C) -> list[str]:
    """Return the hyper-parameters that are tried with two values only, in at least one group."""
    tried = [
        (key, {one[key] for one in candidates}) for _, candidates in search.candidates(config) for key in candidates[0]
    ]
    return list(dict.fromkeys(key for key, values in tried if len(values) == 2))
