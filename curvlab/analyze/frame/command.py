"""The command line of an analysis."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from curvlab.analyze.frame.analysis import Analysis, Preset, Tool
from curvlab.analyze.frame.driver import run
from curvlab.analyze.frame.functions import fill_defaults
from curvlab.commandline.config import C, Config
from curvlab.commandline.console import make_console
from curvlab.commandline.options import EXIT_CODES, GridOptions, RunOptions
from curvlab.commandline.parser import (
    Parser,
    option_name,
    read_yaml,
    replace_values,
    select_fields,
    validate,
)
from curvlab.commandline.program import report_errors
from curvlab.errors import CurvlabError
from curvlab.text import did_you_mean


class _Command(Config):
    """Options of the command itself."""

    titles: ClassVar[dict[str, str]] = {"help": "this command"}

    help: bool = False
    """Show this help and exit."""
    preset: str = "default"
    """Preset that gives the default values of the options below."""
    config: Path | None = None
    """YAML file of options, such as the config.yaml of a run. It overrides the preset; options override it."""
    print_config: bool = False
    """Print the whole configuration as YAML and exit. Types and ranges are checked; a run also checks the options
    against the data."""
    debug: bool = False
    """Show the traceback of an error."""


def execute(analysis: Analysis[C] | Tool[C], arguments: list[str], program: str) -> int:
    """Parse the arguments, run the analysis, and print an error as one sentence on standard error.

    Returns:
        The exit code, see ``curvlab.commandline.program.report_errors``.
    """
    return report_errors(lambda: _execute(analysis, arguments, program), debug="--debug" in arguments)


def _execute(analysis: Any, arguments: list[str], program: str) -> None:
    # The preset and the file set the default values that the help shows, so they are parsed first.
    first = Parser(program)
    first.add(_Command())
    chosen, _ = first.parse_known_args(arguments)
    command = validate(_Command, select_fields(vars(chosen), _Command), option_name)
    if command.preset not in analysis.presets:
        raise CurvlabError(
            f"unknown preset {command.preset!r}{did_you_mean(command.preset, analysis.presets)} "
            f"(presets: {', '.join(analysis.presets)})"
        )
    preset = analysis.presets[command.preset]
    base = preset.config
    from_file = {} if command.config is None else read_yaml(command.config)
    if command.config is not None:
        base = replace_values(base, from_file, command.config)

    parser = Parser(program, f"{analysis.question} Presets: {describe_presets(analysis.presets)}.")
    kind: type[RunOptions] = RunOptions
    if isinstance(analysis, Analysis):
        kind, parser.epilog = GridOptions, EXIT_CODES
    sections = (command, base, kind())
    for values in sections:
        parser.add(values)
    if command.help:
        print(parser.format_help(), end="")
        return
    given = parser.parse_options(arguments, sections)
    chosen_fields = select_fields(given, type(base))
    values = fill_defaults(type(base), {**base.model_dump(), **chosen_fields}, {*from_file, *chosen_fields})
    config = validate(type(base), values, option_name)
    _check_read(config, chosen_fields)
    options: Any = validate(kind, select_fields(given, kind), option_name)
    if command.print_config:
        print(config.to_yaml(), end="")
        return
    if isinstance(analysis, Analysis):
        run(analysis, config, options, make_console())
    else:
        analysis.run(config, options, make_console())


def _check_read(config: Config, given: Iterable[str]) -> None:
    """Check that the options on the command line have an effect; a file may have those of other methods, too.

    Raises:
        CurvlabError: An option is not read, since another one has not the value that it belongs to.
    """
    for name in given:
        missing = config.find_readers(name)
        if missing is not None:
            other, values = missing
            texts = [f"{option_name(other)} {' or '.join(map(str, filter(None, values)))}"] if any(values) else []
            texts += [f"runs without {option_name(other)}"] if () in values else []
            raise CurvlabError(f"{option_name(name)} has no effect: it is for {' or '.join(texts)}; leave it out")


def describe_presets(presets: Mapping[str, Preset[Any]]) -> str:
    """Return the names of presets, each with its cost and requirements if they are known."""
    return ", ".join(name + _cost(preset) for name, preset in presets.items())


def _cost(preset: Preset[Any]) -> str:
    parts = [] if preset.minutes is None else ["seconds" if preset.minutes < 1 else f"{preset.minutes:g} min"]
    parts += [f"needs {' and '.join(preset.needs)}"] if preset.needs else []
    return f" ({', '.join(parts)})" if parts else ""
