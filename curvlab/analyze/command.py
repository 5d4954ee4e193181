"""From a command line to a config, and from an error to one sentence: what every analysis shares.

An analysis is a frozen pydantic config, its presets, and a function that runs it. Options are made from the fields of
the config; what they are given, and what a YAML file holds, goes through the same validation.
"""

import argparse
import re
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, NoReturn, TypeVar

import pydantic
from pydantic_core import PydanticCustomError
from rich.console import Console
from rich.text import Text

from curvlab import grid, yaml_file
from curvlab.data import fingerprint
from curvlab.errors import CurvlabError
from curvlab.grid import Cell, Place
from curvlab.text import readable

EXIT_CODES = (
    "Exit codes: 0 done; 1 done, but cells have failed; 2 bad input, or it cannot go on; 130 interrupted by Ctrl-C."
)

_NONE = "none"
_WORDS = {"integer": "N", "number": "X", "string": "TEXT", "null": _NONE}
_PIPE_WIDTH = 150  # characters; a pipe has no width of its own, and the widest table needs so many


class CellsFailed(CurvlabError):
    """A run is at its end, but some of its cells have failed."""


class Config(pydantic.BaseModel):
    """Base of the configs: frozen, nothing in it that is not a field, and numbers that are finite."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    #: Titles for groups of options in the help, each under the name of the group's first field.
    titles: ClassVar[Mapping[str, str]] = {}

    @pydantic.field_validator("*")
    @classmethod
    def _within_64_bits(cls, value: Any) -> Any:
        """Refuse a whole number that neither torch nor a store can hold."""
        if any(isinstance(number, int) and abs(number) >= 2**63 for number in _items(value)):
            raise PydanticCustomError("out_of_range", "should be less than 2**63")
        return value

    def to_yaml(self) -> str:
        """Return the whole config as YAML; ``--config`` reads it back."""
        return yaml_file.dumps(self.model_dump(mode="json"))


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, tuple) else (value,)


class RunOptions(Config):
    """How to run rather than what: none of these changes a number."""

    titles: ClassVar[Mapping[str, str]] = {"out": "places"}

    out: Path | None = None
    """Folder for the results; the same command with the same folder continues there. Else runs/ANALYSIS-TIME,
    or none for an analysis that only prints."""
    data_root: Path | None = None
    """Where data sets are kept. Else the environment variable CURVLAB_DATA, else ~/.cache/curvlab/data."""
    offline: bool = False
    """Never touch the network: data that are not on disk are an error."""


class GridOptions(RunOptions):
    """How to run an analysis that is a grid of cells."""

    titles: ClassVar[Mapping[str, str]] = {**RunOptions.titles, "jobs": "running"}

    jobs: int | None = pydantic.Field(default=None, ge=1)
    """Cells at once, each in a process of its own; the numbers are the same to the bit whatever this is. Else as many
    as the cores bear."""
    threads: int = pydantic.Field(default=1, ge=1)
    """Threads of each process; another number of them may round otherwise."""
    scheduler: str | None = None
    """Address of a Dask scheduler, such as tcp://HOST:8786, whose workers then run the cells."""
    cell_timeout: float | None = pydantic.Field(default=None, gt=0)
    """Seconds after which a cell is stopped and recorded as failed; what its module takes to import, once for all
    cells, is not counted."""
    retry_failed: bool = False
    """Run the cells again that have failed."""

    def run(self, cells: Sequence[Cell], store: Path) -> dict[str, int]:
        """Run the cells that the store does not have; see ``curvlab.grid.run``.

        Args:
            cells: The grid.
            store: The file.

        Raises:
            CurvlabError: The store or the cluster cannot be used, or the store was begun with other data.
        """
        # Of analyses: another function may call anything data.
        configs = [cell.config for cell in cells if cell.function.startswith("curvlab.analyze.")]
        names = sorted({str(config[key]) for config in configs for key in ("data", "weights") if config.get(key)})
        return grid.run(
            cells,
            store,
            jobs=self.jobs,
            threads=self.threads,
            scheduler=self.scheduler,
            cell_timeout=self.cell_timeout,
            retry_failed=self.retry_failed,
            data_root=self.data_root,
            offline=self.offline,
            data={name: fingerprint(name, root=self.data_root, offline=self.offline) for name in names},
        )


class _Command(Config):
    """What is said to the command itself."""

    titles: ClassVar[Mapping[str, str]] = {"help": "this command"}

    help: bool = False
    """Show this and stop."""
    preset: str = "default"
    """The values that the options below start from."""
    config: Path | None = None
    """A YAML file of options, such as the config.yaml of a run. It wins over the preset; options win over it."""
    print_config: bool = False
    """Print the whole configuration as YAML and stop. Types and ranges have been checked; what takes the data to check,
    a run does."""
    debug: bool = False
    """Show the traceback of an error."""


C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class Analysis(Generic[C]):
    """An analysis.

    Attributes:
        config: Its config, a ``Config``.
        presets: Configs by name; ``default`` among them.
        run: Does it, and prints its tables; raises ``CurvlabError`` for what a user can mend. It is given the
            ``GridOptions`` if there is a ``cell``, else the ``RunOptions``.
        description: What ``--help`` says first.
        cell: One cell of its grid, with one seed: gives flat records. None for an analysis that is no grid.
        version: Of ``cell``: raised when its numbers change, so that stores do not mix old ones with new.
    """

    config: type[C]
    presets: Mapping[str, C]
    run: Callable[[C, Any, Console], None]
    description: str
    cell: Callable[[C, Place], Sequence[Mapping[str, Any]]] | None = None
    version: int = 1

    @property
    def seed(self) -> str:
        """The field of the seed, ``seed`` or ``seeds``."""
        return "seeds" if "seeds" in self.config.model_fields else "seed"

    def cells(self, configs: Iterable[C], seeds: Iterable[int] | None = None) -> list[Cell]:
        """Return the cells of configurations and seeds; without seeds, those of each configuration itself.

        Raises:
            CurvlabError: The analysis is no grid.
        """
        if self.cell is None:
            raise CurvlabError("this analysis is no grid: it has no cells")
        module = self.cell.__module__
        found = []
        for config in configs:
            values = config.model_dump(mode="json")
            own = values.get(self.seed, 0)
            for seed in (own if isinstance(own, list) else [own]) if seeds is None else seeds:
                whole = values | {self.seed: [seed] if self.seed == "seeds" else seed}
                name = module.rpartition(".")[2]
                found.append(Cell(f"{module}:ANALYSIS.run_cell", whole, name, self.version, self.seed))
        return found

    def run_cell(self, values: Mapping[str, Any], place: Place) -> Sequence[Mapping[str, Any]]:
        """Run a cell as ``curvlab.grid`` calls it, with the configuration as JSON values."""
        assert self.cell is not None
        return self.cell(self.config(**values), place)


def execute(analysis: Analysis[C], arguments: list[str], program: str) -> int:
    """Parse, run, and turn an error into one sentence on standard error.

    Returns:
        The exit code, as ``told`` gives it.
    """
    return told(lambda: _execute(analysis, arguments, program), debug="--debug" in arguments)


def told(action: Callable[[], int | None], debug: bool) -> int:
    """Do something, and turn an error into one sentence on standard error.

    Returns:
        The exit code: that of the action or 0; 1 if only cells have failed, 2 for any other error.
    """
    try:
        return action() or 0
    except CurvlabError as error:
        if debug:
            traceback.print_exc()
        print("error:", readable(" ".join(str(error).split())), file=sys.stderr)
        for note in getattr(error, "__notes__", ()):
            print(readable(note), file=sys.stderr)
        return 1 if isinstance(error, CellsFailed) else 2
    except (MemoryError, RuntimeError) as error:
        # What torch raises has no class of its own on the CPU.
        if debug or not (isinstance(error, MemoryError) or re.search("allocate memory|out of memory", str(error))):
            raise
        size = re.search(r"[\d.]+ ?(?:bytes|.iB)", str(error))
        what = f" for an array of {size[0]}" if size else ""
        print(f"error: there is not enough memory{what}; take a smaller network or fewer samples", file=sys.stderr)
        return 2


def _execute(analysis: Analysis[C], arguments: list[str], program: str) -> None:
    # Preset and file set the values that the options start from, which the help shows: they are looked for first.
    first = Parser(program)
    first.add(_Command())
    chosen, _ = first.parse_known_args(arguments)
    command = validated(_Command, part(vars(chosen), _Command), option_name)
    if command.preset not in analysis.presets:
        raise CurvlabError(
            f"there is no preset {command.preset!r}; the nearest is {nearest(command.preset, analysis.presets)!r} "
            f"of {', '.join(analysis.presets)}"
        )
    base = analysis.presets[command.preset]
    if command.config is not None:
        base = _read_config(command.config, base)

    parser = Parser(program, f"{analysis.description} Presets: {', '.join(analysis.presets)}.")
    kind = RunOptions
    if analysis.cell is not None:
        kind, parser.epilog = GridOptions, EXIT_CODES
    sections = (command, base, kind())
    for values in sections:
        parser.add(values)
    if command.help:
        print(parser.format_help(), end="")
        return
    given = parser.known(arguments, sections)
    config = validated(type(base), {**base.model_dump(), **part(given, type(base))}, option_name)
    options = validated(kind, part(given, kind), option_name)
    if command.print_config:
        print(config.to_yaml(), end="")
        return
    analysis.run(config, options, console())


def console() -> Console:
    """Return what tables are printed on."""
    # Names are no markup, nor is :fire: in one an emoji.
    make = partial(_Console, markup=False, emoji=False)
    terminal = make()
    return terminal if terminal.is_terminal else make(width=_PIPE_WIDTH)


class _Console(Console):
    """Prints no control characters that a name may hold, and raises where rich would end the program."""

    def render_str(self, text: str, **how: Any) -> Text:
        """Make text of a string."""
        return super().render_str("\n".join(map(readable, text.split("\n"))), **how)

    def on_broken_pipe(self) -> None:
        """Leave it to the caller, as ``print`` does."""
        raise BrokenPipeError


class Parser(argparse.ArgumentParser):
    """Makes options of the fields of configs; they keep the strings that they are given, and only those given."""

    def __init__(self, program: str, description: str = "") -> None:
        super().__init__(
            prog=program,
            usage=f"{program} [OPTIONS]",
            description=description,
            add_help=False,  # the help needs the other options
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print under its usage."""
        raise CurvlabError(f"{message.removeprefix('argument ')} ({self.prog} --help shows the options)")

    def add(self, values: Config) -> None:
        """Add an option for every field; the help shows the values as defaults."""
        group: Any = self
        for name, schema in type(values).model_json_schema()["properties"].items():
            if name in values.titles:
                group = self.add_argument_group(values.titles[name])
            flags = ["-h", "--help"] if name == "help" else [option_name(name)]
            text = schema["description"].replace("%", "%%")
            if schema.get("type") == "boolean":
                group.add_argument(*flags, action="store_true", help=text)
                continue
            forms = schema.get("anyOf", [schema])
            value = getattr(values, name)
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            group.add_argument(
                *flags,
                nargs="*" if any(form.get("type") == "array" for form in forms) else None,
                metavar="|".join(_word(form) for form in forms),
                help=f"{text} (default: {_NONE if value is None else shown})",
            )

    def known(self, arguments: list[str], sections: Iterable[Config]) -> dict[str, Any]:
        """Return what the options were given.

        Raises:
            CurvlabError: One of them there is not.
        """
        known, unknown = self.parse_known_args(arguments)
        if unknown:
            name = unknown[0].partition("=")[0]
            if not name.startswith("-"):
                raise CurvlabError(f"{name!r} belongs to no option ({self.prog} --help shows them all)")
            names = [option_name(field) for values in sections for field in type(values).model_fields]
            raise CurvlabError(
                f"there is no option {name}; the nearest is {nearest(name, names)} ({self.prog} --help shows them all)"
            )
        return vars(known)


def _word(form: Mapping[str, Any]) -> str:
    """Return what stands for a value in the help, from its JSON schema; for a list, what stands for an item."""
    if "items" in form:
        return _word(form["items"])
    if form.get("format") == "path":
        return "PATH"
    choices = form.get("enum") or [form.get("const")]
    return "|".join(choices) if choices != [None] else _WORDS[form["type"]]


def part(given: Mapping[str, Any], kind: type[Config]) -> dict[str, Any]:
    """Return what was given for the fields of a config, as its validation takes it.

    Raises:
        CurvlabError: An option was given an empty value, such as an unset variable of the shell.
    """
    part: dict[str, Any] = {}
    for name, schema in kind.model_json_schema()["properties"].items():
        if name not in given:
            continue
        words: list[str] = given[name] if isinstance(given[name], list) else [given[name]]
        if "" in words:
            raise CurvlabError(f"{option_name(name)} was given an empty value; leave it out, or write what it is to be")
        forms = schema.get("anyOf", ())
        special: dict[str, Any] = {form["const"]: form["const"] for form in forms if "const" in form}
        if {"type": "null"} in forms:
            special[_NONE] = None
        part[name] = special[words[0]] if len(words) == 1 and words[0] in special else given[name]
    return part


def validated(kind: type[C], values: Mapping[str, Any], call: Callable[[str], str]) -> C:
    """Make a config.

    Args:
        kind: Of which class.
        values: Its fields, also as strings.
        call: What to call a field in an error.

    Raises:
        CurvlabError: A value is not right; the message names the first such field.
    """
    try:
        return kind(**values)
    except pydantic.ValidationError as error:
        faults = error.errors()
        name = _where(faults[0]["loc"])
        # One fault an alternative that the field has, or one an item of a list.
        reasons = (fault["msg"].removeprefix("Input ") for fault in faults if _where(fault["loc"]) == name)
        text = " or ".join(dict.fromkeys(re.split(", (?:unable|got) ", reason)[0] for reason in reasons))
        text = text.replace("should be a valid tuple", f"should be a list, such as [{faults[0]['input']}]")
        raise CurvlabError(f"{call(name)} {text}, not {faults[0]['input']!r}") from error


def _where(location: Iterable[int | str]) -> str:
    """Return field.key.key, without what tells the alternatives of a field or the items of a list apart."""
    return ".".join(part for part in location if isinstance(part, str) and part.isidentifier())


def _read_config(file: Path, base: C) -> C:
    return changed(base, read_yaml(file), file)


def read_yaml(file: Path) -> dict[str, Any]:
    """Return the options that a file holds.

    Raises:
        CurvlabError: It cannot be read, or holds anything else.
    """
    values = yaml_file.read(file)
    if not isinstance(values, dict):
        raise CurvlabError(f"{file} does not hold options, each a line key: value")
    return values


def changed(base: C, values: Mapping[str, Any], file: Path) -> C:
    """Return a config with other values, which a file has.

    Raises:
        CurvlabError: It has no such field, or a value is not right.
    """
    known = type(base).model_fields
    for key in values:
        if key not in known:
            raise CurvlabError(f"{file}: there is no option {key!r}; the nearest is {nearest(str(key), known)!r}")
    return validated(type(base), {**base.model_dump(), **values}, lambda name: f"{file}: {name}")


def nearest(name: str, names: Collection[str]) -> str:
    """Return the most similar one of the names."""
    return get_close_matches(name, names, n=1, cutoff=0.0)[0]


def option_name(name: str) -> str:
    """Return the option of a field."""
    return f"--{name.replace('_', '-')}"
