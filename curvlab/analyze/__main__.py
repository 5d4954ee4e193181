"""``python -m curvlab.analyze``: list the analyses, or run one."""

import sys
from difflib import get_close_matches
from importlib import import_module

from rich.console import Console
from rich.markup import escape

from curvlab.analyze import ANALYSES
from curvlab.analyze.command import Analysis, Config, execute

PROGRAM = "python -m curvlab.analyze"


def main(arguments: list[str] | None = None) -> int:
    """Run an analysis by name and return the exit code: 0 done, 2 bad input, 130 interrupted."""
    given = sys.argv[1:] if arguments is None else arguments
    if not given or given[0] in ("-h", "--help"):
        _list()
        return 0
    name, rest = given[0], given[1:]
    if name not in ANALYSES:
        near = get_close_matches(name, ANALYSES, n=1, cutoff=0.0)[0]
        Console(stderr=True, soft_wrap=True).print(
            f"[bold red]error:[/] there is no analysis {escape(name)!r}; the nearest is {near!r} "
            f"({PROGRAM} lists them all)"
        )
        return 2
    analysis: Analysis[Config] = import_module(f"curvlab.analyze.{name}").ANALYSIS
    return execute(analysis, rest, f"{PROGRAM} {name}")


def _list() -> None:
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"usage: {PROGRAM} ANALYSIS [OPTIONS]", markup=False)
    console.print("\nAnalyses:")
    for name, line in ANALYSES.items():
        console.print(f"  [bold]{name}[/]  {line}")
    console.print(f"\n{PROGRAM} ANALYSIS --help shows an analysis's options.")


if __name__ == "__main__":
    sys.exit(main())
