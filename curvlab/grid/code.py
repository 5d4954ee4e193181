"""Fingerprints of the source files that runs use, to compare the code of two machines."""

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from importlib.util import find_spec, resolve_name
from pathlib import Path

import curvlab


def fingerprints(functions: Iterable[str]) -> dict[str, str]:
    """Return a fingerprint of curvlab's source files, and one for each module of the functions with its imports.

    Installed packages and the standard library are left out, since they have versions; so are missing modules.

    Args:
        functions: Names of the form ``module:name``.

    Examples:
        >>> list(fingerprints(["platform:node", "curvlab.analyze.masq:ANALYSIS.execute"]))
        ['curvlab']
    """
    root = Path(curvlab.__file__).parent
    found = {"curvlab": _hash((str(file.relative_to(root)), file) for file in sorted(root.rglob("*.py")))}
    for module in sorted({function.partition(":")[0] for function in functions}):
        if sources := _sources(module):
            found[module] = _hash(sorted(sources.items()))
    return found


def _hash(files: Iterable[tuple[str, Path]]) -> str:
    digest = hashlib.sha256()
    for name, file in files:
        digest.update(f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:32]


def _sources(module: str) -> dict[str, Path]:
    """Return the names and files of a module and of the modules that it imports, directly or indirectly."""
    found: dict[str, Path] = {}
    todo = [module]
    while todo:
        name = todo.pop()
        if name in found or not _is_own(name.partition(".")[0]):
            continue
        try:
            spec = find_spec(name)
            if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
                continue
            file = Path(spec.origin)
            todo += _imports(ast.parse(file.read_bytes()), spec.parent or "")
        except Exception:  # looking up a submodule runs its package; the run itself reports the error better
            continue
        found[name] = file
    return found


def _is_own(package: str) -> bool:
    """Return whether a package is the user's own: not curvlab, not installed, and not of the standard library."""
    if package == "curvlab" or package in sys.stdlib_module_names:
        return False
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        return False
    where = [spec.origin or "", *(spec.submodule_search_locations or ())] if spec is not None else []
    installed = [Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")]
    return bool(where) and not any(Path(place).is_relative_to(folder) for place in where for folder in installed)


def _imports(tree: ast.Module, package: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package) if node.level else str(node.module)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)  # a name may be a module
