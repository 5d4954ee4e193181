"""From a command line to a config, and from an error to one sentence: what every analysis shares.

An analysis is a frozen pydantic config, its presets, and a function that runs it. Options are made from the config
by tyro; their defaults are the preset's, then those of a YAML file.
"""

import contextlib
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import pydantic
import tyro
import yaml
from rich.console import Console
from rich.text import Text

from curvlab.errors import CurvlabError


class Config(pydantic.BaseModel):
    """Base of the configs: frozen, and nothing in it that is not a field."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def to_yaml(self) -> str:
        """Return the whole config as YAML; ``--config`` reads it back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class RunOptions:
    """How to run rather than what: none of these changes a number."""

    out: Path | None = None
    """Folder for the results; the same command with the same folder continues there. Else runs/ANALYSIS-TIME."""
    data_root: Path | None = None
    """Where data sets are kept. Else the environment variable CURVLAB_DATA, else ~/.cache/curvlab/data."""
    offline: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Never touch the network: data that are not on disk are an error."""


@dataclass(frozen=True)
class Analysis(Generic[C]):
    """An analysis.

    Attributes:
        config: Its config, a ``Config``.
        presets: Configs by name; ``default`` among them.
        run: Does it, and prints its tables; raises ``CurvlabError`` for what a user can mend.
        description: What ``--help`` says first.
    """

    config: type[C]
    presets: Mapping[str, C]
    run: Callable[[C, RunOptions, Console], None]
    description: str


@dataclass(frozen=True)
class _Line(Generic[C]):
    """A whole command line."""

    analysis: tyro.conf.OmitArgPrefixes[C]
    running: tyro.conf.OmitArgPrefixes[RunOptions] = field(default_factory=RunOptions)
    preset: str = "default"
    """Which defaults the options above have."""
    config: Path | None = None
    """A YAML file of options, such as a run's config.yaml; options given beside it win."""
    print_config: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the whole configuration as YAML and stop."""
    debug: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show the traceback of an error."""


def execute(analysis: Analysis[C], arguments: list[str], program: str) -> int:
    """Parse, run, and turn errors into one sentence on standard error.

    Returns:
        The exit code: 0 done, 2 bad input, 130 interrupted.
    """
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    debug = "--debug" in arguments
    try:
        line = parse(analysis, arguments, program)
        if line.print_config:
            print(line.analysis.to_yaml(), end="")
            return 0
        console = Console()
        if not console.is_terminal:
            console = Console(width=150)
        analysis.run(line.analysis, line.running, console)
    except CurvlabError as error:
        if debug:
            errors.print_exception()
        errors.print(Text.assemble(("error: ", "bold red"), " ".join(str(error).split())))
        return 2
    except KeyboardInterrupt as interrupt:
        for note in getattr(interrupt, "__notes__", ()):
            errors.print(Text(note))
        errors.print(Text("interrupted", style="bold yellow"))
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader of our output has left (| head): not an error, and Python must not complain at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


def parse(analysis: Analysis[C], arguments: list[str], program: str) -> "_Line[C]":
    """Return the parsed command line; ``--help`` prints and leaves with 0.

    Raises:
        CurvlabError: An option or value is wrong; the message names the nearest option there is.
    """
    preset = _value_of("--preset", arguments) or "default"
    if preset not in analysis.presets:
        near = get_close_matches(preset, analysis.presets, n=1, cutoff=0.0)[0]
        raise CurvlabError(f"there is no preset {preset!r}; the nearest is {near!r} of {', '.join(analysis.presets)}")
    base = analysis.presets[preset]
    file = _value_of("--config", arguments)
    if file is not None:
        base = _read_config(Path(file), base)
    line_type: Any = _Line
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages), _wide():
            line, unknown = tyro.cli(
                line_type[analysis.config],
                args=arguments,
                default=_Line(analysis=base, preset=preset, config=Path(file) if file else None),
                prog=program,
                description=f"{analysis.description}\n\nPresets: {', '.join(analysis.presets)}.",
                return_unknown_args=True,
            )
    except SystemExit as leaving:
        if leaving.code == 0:
            raise
        raise CurvlabError(_sentence(messages.getvalue(), program)) from None
    if unknown:
        raise CurvlabError(_unknown_option(unknown[0], analysis, program))
    parsed: _Line[C] = line
    return parsed


def _value_of(option: str, arguments: list[str]) -> str | None:
    """Return what follows an option; it is needed before the options can be parsed, because it sets their defaults."""
    for i, argument in enumerate(arguments):
        if argument.startswith(f"{option}="):
            return argument.partition("=")[2]
        if argument == option and i + 1 < len(arguments):
            return arguments[i + 1]
    return None


def _read_config(file: Path, base: C) -> C:
    try:
        values = yaml.safe_load(file.read_text())
    except OSError as error:
        raise CurvlabError(f"cannot read {file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CurvlabError(f"{file} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise CurvlabError(f"{file} does not hold options as key: value")
    known = type(base).model_fields
    for key in values:
        if key not in known:
            near = get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            raise CurvlabError(f"{file}: there is no option {key!r}; the nearest is {near!r}")
    try:
        return type(base)(**{**base.model_dump(), **values})
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise CurvlabError(f"{file}: {first['loc'][0]}: {_lower(first['msg'])} (given: {first['input']!r})") from error


@contextlib.contextmanager
def _wide() -> Any:
    """Keep tyro from breaking the lines of a message that is taken apart afterwards; help goes to a person."""
    if "-h" in sys.argv or "--help" in sys.argv:
        yield
        return
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "1000"
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _sentence(boxed: str, program: str) -> str:
    """Return the first part of a message that tyro has drawn in a box, on one line."""
    lines = [line.strip().strip("│").strip() for line in boxed.splitlines()]
    end = next((i for i, line in enumerate(lines) if line.startswith("───")), len(lines))
    text = " ".join(line for line in lines[:end] if line and line[0] not in "╭╰")
    invalid = re.search(r"validation errors? for \w+ (\w+) (.*?) \[type=\w+, input_value=(.*?), input_type", text)
    if invalid:
        name, message, given = invalid.groups()
        text = f"--{name.replace('_', '-')}: {_lower(message)} (given: {given})"
    return f"{text.rstrip('. ')} ({program} --help shows the options)"


def _unknown_option(given: str, analysis: Analysis[C], program: str) -> str:
    names = [*analysis.config.model_fields, *RunOptions.__dataclass_fields__, *_Line.__dataclass_fields__]
    options = [f"--{name.replace('_', '-')}" for name in names if name not in ("analysis", "running")]
    near = get_close_matches(given.partition("=")[0], options, n=1, cutoff=0.0)[0]
    return f"there is no option {given!r}; the nearest is {near} ({program} --help shows them all)"


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]
