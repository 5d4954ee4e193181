"""What an analysis is: a value, which says what is measured in one run and what a report makes of all of them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic

from rich.console import Console

from curvlab.analyze.frame.search import Search, Trial, choose, run_trial
from curvlab.analyze.frame.subject import Subject, load_dataset, locate_weights
from curvlab.commandline.config import C
from curvlab.commandline.options import RunOptions
from curvlab.data import Dataset
from curvlab.files import write_whole
from curvlab.grid import Place, RunSpec
from curvlab.results import Claim, Column, Identity
from curvlab.results.run_directory import to_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = dict[str, Any]


@dataclass(frozen=True)
class Preset(Generic[C]):
    """A configuration that is worth a name.

    Attributes:
        config: The values.
        minutes: What it takes on two cores; None if that is not known.
        needs: What has to be there: names of data sets that are not embedded, ``weights``, ``gpu``.
    """

    config: C
    minutes: float | None = None
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Workspace:
    """Where a run works.

    Attributes:
        place: Its folder, and where data are.
    """

    place: Place

    @property
    def folder(self) -> Path:
        """For checkpoints: the same folder when a run that was stopped begins again."""
        return self.place.folder

    def save(self, name: str, value: Any) -> None:
        """Keep what is not a flat record, such as a matrix to be drawn, as JSON for the report.

        Args:
            name: One of the analysis' ``artifacts``.
            value: Numbers, strings, arrays, and lists or mappings of them.
        """
        write_whole(self.folder / f"{name}.json", to_json(value).encode())

    def within(self, name: str) -> "Workspace":
        """Return a workspace of its own for a part of the run."""
        return Workspace(replace(self.place, folder=self.folder / name))


@dataclass(frozen=True)
class Results(Generic[C]):
    """What a report is made of; nothing in it needs the network or the data, so that it can be read from files.

    Attributes:
        config: The configuration.
        subject: Of the data.
        records: By the names of the analysis' ``kinds``.
        selection: A record a candidate of a search for hyper-parameters, as ``curvlab.analyze.frame.search`` has them.
        artifacts: By name, what the runs have kept; a run that failed has none.
        failed: The runs that have failed: ``seed`` and ``error`` of each.
        total: How many runs there are in all.
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
        """What a title says of the numbers of a table."""
        if len(self.seeds) == 1:
            return "one seed"
        number = "the seeds that did not fail" if self.failed else f"{len(self.seeds)} seeds"
        return f"mean ± standard deviation over {number}"


@dataclass(frozen=True)
class Table:
    """A table to be read.

    Attributes:
        title: What stands above.
        columns: What is shown of the records.
        records: The rows.
    """

    title: str
    columns: Sequence[Column]
    records: Sequence[Record]


@dataclass(frozen=True)
class Report:
    """What an analysis comes to.

    Attributes:
        summary: The table that ``table.md`` and ``table.tex`` hold.
        tables: Those that the console shows; None for the summary alone.
        claims: Statements of the paper, and ours, that data can refute, with their verdicts.
        identities: Arithmetic and identities, which no data could refute: they have no verdict.
        figures: Functions that draw, by the name of the file.
        files: Further records to be kept, by the name of the file.
        deviations: In what the run differs from the published one.
        notes: What else is to be said.
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
    """A command that answers at once: nothing is trained or repeated over seeds.

    Attributes:
        config: Its config.
        question: What ``--help`` says first.
        presets: By name; ``default`` among them.
        run: Does it, and prints.
    """

    config: type[C]
    question: str
    presets: Mapping[str, Preset[C]]
    run: Callable[[C, RunOptions, Console], None]


def _accept(config: Any, dataset: Dataset) -> None:
    """Refuse nothing."""


@dataclass(frozen=True)
class Analysis(Generic[C]):
    """An analysis on the frame.

    Attributes:
        config: Its config; has ``seeds``.
        question: What ``--help`` says first.
        presets: By name; ``default`` among them.
        measure: One run, with a single seed; gives flat records.
        report: Pure: makes tables, claims and figures of the records.
        check: Refuses what cannot be done, before anything is written.
        load: The data set of a configuration.
        parts: The runs of a configuration with given hyper-parameters; None for one a seed.
        search: How hyper-parameters are chosen, if they are.
        kinds: Name of a file of records -> a key that these records alone have; ``table`` among them.
        artifacts: What ``Workspace.save`` may be given.
        items: The tables and figures of the paper that it regenerates.
        version: Of ``measure``: raised when its numbers change, so that stores do not mix old ones with new.
    """

    config: type[C]
    question: str
    presets: Mapping[str, Preset[C]]
    measure: Callable[[C, Dataset, Workspace], Iterable[Record]]
    report: Callable[[Results[C]], Report]
    check: Callable[[C, Dataset], None] = _accept
    load: Callable[[Any, RunOptions | Place], Dataset] = load_dataset
    parts: Callable[[C], Sequence[C]] | None = None
    search: Search[C] | None = None
    kinds: Mapping[str, str] = field(default_factory=lambda: {"table": "seed"})
    artifacts: Sequence[str] = ()
    items: Sequence[str] = ()
    version: int = 1

    @property
    def module(self) -> str:
        """The module that has it as ``ANALYSIS``."""
        return self.measure.__module__

    @property
    def name(self) -> str:
        """What it is called on the command line."""
        return self.module.rpartition(".")[2]

    @property
    def seed(self) -> str:
        """The field of the seeds."""
        return "seeds"

    def run_specs(self, configs: Iterable[C], seeds: Iterable[int] | None = None) -> list[RunSpec]:
        """Return one run for every configuration and seed; without ``seeds``, for the seeds of each configuration."""
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
        """Execute a run of ``run_specs``; ``curvlab.grid`` calls this. Several parts follow one another."""
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
        """Return the runs that try the candidates of the hyper-parameters."""
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
        """Execute a run of ``trial_specs``; ``curvlab.grid`` calls this."""
        assert self.search is not None
        values = dict(values)
        group, candidate = values.pop("group"), values.pop("candidate")
        config, dataset = self._prepare(values, place)
        return [run_trial(self.search, self.measure, Trial(group, candidate, config), dataset, Workspace(place))]

    def _prepare(self, values: Mapping[str, Any], place: Place) -> tuple[C, Dataset]:
        config = locate_weights(self.config(**values), place)
        dataset = self.load(config, place)
        self.check(config, dataset)
        return config, dataset
