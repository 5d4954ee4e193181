"""The program ``curvlab``: ``curvlab analyze`` is ``python -m curvlab.analyze``, and likewise ``curvlab sweep``."""

import sys
from pathlib import Path

from curvlab._version import __version__
from curvlab.analyze import __main__ as analyze
from curvlab.sweep import __main__ as sweep

_USAGE = "curvlab analyze [ANALYSIS] [OPTIONS] | curvlab sweep COMMAND ... | curvlab --version"


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand and return the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    if not {"", str(Path.cwd())} & set(sys.path):  # as python -m does, for functions of the user
        sys.path.append(str(Path.cwd()))
    if given[:1] == ["analyze"]:
        return analyze.main(given[1:])
    if given[:1] == ["sweep"]:
        return sweep.main(given[1:])
    if given == ["--version"]:
        print(f"curvlab {__version__}")
        return 0
    if not given or given[0] in ("-h", "--help"):
        print(f"usage: {_USAGE}")
        return 0
    print(
        f"error: unknown command {given[0]!r}; the commands are curvlab analyze, curvlab sweep and curvlab --version",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    sys.exit(main())
