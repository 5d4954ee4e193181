"""The description of an analysis: what one run measures, and how a report is made from all runs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic

from rich.console import Console

from curvlab.analyze.frame.functions import OwnProblem
from curvlab.analyze.frame.search import Search, Trial, choose, run_trial
from curvlab.analyze.frame.subject import Subject, load_dataset, locate_weights
from curvlab.analyze.frame.workspace import Record, Workspace
from curvlab.commandline.config import C
from curvlab.commandline.options import RunOptions
from curvlab.data import Dataset
from curvlab.grid import Place, RunSpec
from curvlab.results import Claim, Column, Identity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Analysis", "Preset", "Record", "Report", "Results", "Table", "Tool", "Workspace"]


@dataclass(frozen=True)
class Preset(Generic[C]):
    """A named configuration.

    Attributes:
        config: The configuration.
        minutes: Wall time on two cores; None if it was not measured.
        needs: Requirements: names of data sets that are not embedded, ``weights``, ``gpu``.
    """

    config: C
    minutes: float | None = None
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Results(Generic[C]):
    """The results of all runs, from which a report is made without the network or the data.

    Attributes:
        config: The configuration.
        subject: Description of the data; empty for an analysis without a data set.
        records: Records by kind; the names are those of the ``kinds`` of the analysis.
        selection: One record per candidate of a hyper-parameter search, see ``curvlab.analyze.frame.search.select``.
        artifacts: Values that the runs saved, by name; failed runs have none.
        failed: ``seed`` and ``error`` of each failed run.
        total: Number of runs, failed ones included.
    """

    config: C
    subject: Subject
    records: Mapping[str, Sequence[Record]]
    selection: Sequence[Record] = ()
    artifacts: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    failed: Sequence[Mapping[str, Any]] = ()
    total: int = 0

    @property
    def seeds(self) -> Sequence[int]:
        """The seeds of the configuration."""
        seeds: Sequence[int] = getattr(self.config, "seeds", ())
        return seeds

    @property
    def spread(self) -> str:
        """Text for a title: how the numbers of a table are averaged over seeds."""
        if len(self.seeds) == 1:
            return "one seed"
        number = "the seeds that did not fail" if self.failed else f"{len(self.seeds)} seeds"
        return f"mean ± standard deviation over {number}"


@dataclass(frozen=True)
class Table:
    """A table of a report.

    Attributes:
        title: The title.
        columns: The columns, and how their values are formatted.
        records: The rows.
    """

    title: str
    columns: Sequence[Column]
    records: Sequence[Record]


@dataclass(frozen=True)
class Report:
    """Tables, claims and figures of an analysis.

    Attributes:
        summary: The table written to ``table.md`` and ``table.tex``.
        tables: The tables printed on the console; None for the summary only.
        claims: Statements of the paper, and our own, that data can refute, with their verdicts.
        identities: Identities and arithmetic, which no data can refute; they have no verdict.
        figures: Functions that draw a figure, by file name.
        files: Additional records to write, by file name.
        deviations: Differences between the run and the published one, one line each.
        notes: Additional lines to print.
    """

    summary: Table
    tables: Sequence[Table] | None = None
    claims: Sequence[Claim] = ()
    identities: Sequence[Identity] = ()
    figures: Mapping[str, "Callable[[], Figure]"] = field(default_factory=dict)
    files: Mapping[str, Sequence[Record]] = field(default_factory=dict)
    deviations: Sequence[str] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Tool(Generic[C]):
    """A command without runs: it trains nothing and has no seeds.

    Attributes:
        config: The config class.
        question: First sentence of ``--help``.
        presets: Presets by name, including ``default``.
        run: Function that does the work and prints.
    """

    config: type[C]
    question: str
    presets: Mapping[str, Preset[C]]
    run: Callable[[C, RunOptions, Console], None]


def _accept(config: Any, dataset: Any) -> None:
    """Accept every configuration."""


@dataclass(frozen=True)
class Analysis(Generic[C]):
    """An analysis that runs on the frame.

    Attributes:
        config: The config class; it has a field ``seeds``.
        question: First sentence of ``--help``.
        presets: Presets by name, including ``default``.
        measure: Function of one run with a single seed; returns flat records.
        report: Pure function that makes tables, claims and figures from records.
        check: Function that raises ``CurvlabError`` for an invalid configuration, before anything is written.
        load: Function that loads the data set of a configuration; ``subject.no_data`` for an analysis without one:
            ``measure`` and ``check`` then get None in its place.
        parts: Function that splits a configuration into its runs; None for one run per seed.
        search: The hyper-parameter search; None if there is none.
        kinds: File name of each kind of records -> a key that only these records have; includes ``table``.
        artifacts: Names of the values that a run saves with ``Workspace.save``.
        version: Version of ``measure``, raised when its numbers change, so that a store never mixes old and new ones.
    """

    config: type[C]
    question: str
    presets: Mapping[str, Preset[C]]
    measure: Callable[[C, Any, Workspace], Iterable[Record]]  # the second argument is what ``load`` returns
    report: Callable[[Results[C]], Report]
    check: Callable[[C, Any], None] = _accept
    load: Callable[[Any, RunOptions | Place], Dataset | OwnProblem | None] = load_dataset
    parts: Callable[[C], Sequence[C]] | None = None
    search: Search[C] | None = None
    kinds: Mapping[str, str] = field(default_factory=lambda: {"table": "seed"})
    artifacts: Sequence[str] = ()
    version: int = 1

    @property
    def module(self) -> str:
        """Name of the module that defines it as ``ANALYSIS``."""
        return self.measure.__module__

    @property
    def name(self) -> str:
        """Name on the command line."""
        return self.module.rpartition(".")[2]

    @property
    def seed(self) -> str:
        """Name of the field with the seeds."""
        return "seeds"

    def run_specs(self, configs: Iterable[C], seeds: Iterable[int] | None = None) -> list[RunSpec]:
        """Return one run per configuration and seed; without ``seeds``, the seeds of each configuration are used."""
        function = f"{self.module}:ANALYSIS.execute"
        specs = []
        for config in configs:
            values = config.model_dump(mode="json")
            specs += [
                RunSpec(function, {**values, "seeds": [seed]}, self.name, self.version, "seeds")
                for seed in (values["seeds"] if seeds is None else seeds)
            ]
        return specs

    def execute(self, values: Mapping[str, Any], place: Place) -> Sequence[Record]:
        """Execute one run of ``run_specs`` for ``curvlab.grid``: its search, if it has one, then its parts in order."""
        config, dataset = self._prepare(values, place)
        here = Workspace(place)
        configs: Sequence[C] = [config] if self.parts is None else self.parts(config)
        if self.search is not None:
            trials = [
                run_trial(self.search, self.measure, trial, dataset, here.within(f"candidate-{number}"))
                for number, trial in enumerate(self.search.trials(config))
            ]
            configs = self.search.runs(config, choose(self.search, config, trials))
        if len(configs) == 1:
            return list(self.measure(configs[0], dataset, here))
        return [
            record
            for number, part in enumerate(configs)
            for record in self.measure(part, dataset, here.within(f"run-{number}"))
        ]

    def trial_specs(self, config: C) -> list[RunSpec]:
        """Return the runs of the hyper-parameter search."""
        if self.search is None:
            return []
        return [
            RunSpec(
                f"{self.module}:ANALYSIS.execute_trial",
                {**trial.config.model_dump(mode="json"), "group": trial.group, "candidate": trial.candidate},
                f"{self.name}-trial",
                self.version,
                "seeds",
            )
            for trial in self.search.trials(config)
        ]

    def execute_trial(self, values: Mapping[str, Any], place: Place) -> Sequence[Record]:
        """Execute one run of ``trial_specs`` for ``curvlab.grid``."""
        assert self.search is not None
        values = dict(values)
        group, candidate = values.pop("group"), values.pop("candidate")
        config, dataset = self._prepare(values, place)
        return [run_trial(self.search, self.measure, Trial(group, candidate, config), dataset, Workspace(place))]

    def _prepare(self, values: Mapping[str, Any], place: Place) -> tuple[C, Dataset | OwnProblem | None]:
        config = locate_weights(self.config(**values), place)
        dataset = self.load(config, place)
        self.check(config, dataset)
        return config, dataset
