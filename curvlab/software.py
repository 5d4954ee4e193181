"""Description of the software: versions of the packages, and state of the code."""

import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from curvlab._version import __version__

_PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "scipy",
    "scikit-learn",
    "pandas",
    "backpack-for-pytorch",
    "nngeometry",
    "curvlinops-for-pytorch",
)


def describe_software() -> dict[str, Any]:
    """Return ``versions`` by package, and ``git`` with ``commit`` and ``dirty``.

    Unknown values are None. Equal software computes equal numbers on the same machine.

    Examples:
        >>> list(describe_software())
        ['versions', 'git']
    """
    return {"versions": _versions(), "git": _git()}


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"curvlab": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _git() -> dict[str, Any] | None:
    """Describe the checkout that contains the package, or otherwise the current folder."""
    # An installed package may be in a virtual environment inside a checkout that does not track it.
    for folder, tracked in ((Path(__file__).parent, [Path(__file__).name]), (Path.cwd(), [])):
        if tracked and not _ask_git(folder, "ls-files", *tracked):
            continue
        commit = _ask_git(folder, "rev-parse", "HEAD")
        changes = _ask_git(folder, "status", "--porcelain", "--untracked-files=no")
        if commit:
            return {"commit": commit, "dirty": None if changes is None else bool(changes)}
    return None


def _ask_git(folder: Path, *arguments: str) -> str | None:
    program = shutil.which("git")
    if program is None:
        return None
    try:
        answer = subprocess.run(
            [program, "--no-optional-locks", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
