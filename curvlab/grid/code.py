"""Which code cells run: fingerprints of source files, which tell whether two machines have the same."""

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from importlib.util import find_spec, resolve_name
from pathlib import Path

import curvlab


def fingerprints(functions: Iterable[str]) -> dict[str, str]:
    """Return a fingerprint of curvlab's source files, and of each module of the functions with all that it imports.

    What is installed or of Python itself is left out: it has a version. So is a module that there is not.

    Args:
        functions: Named ``module:name``.

    Examples:
        >>> list(fingerprints(["platform:node", "curvlab.analyze.masq:ANALYSIS.run_cell"]))
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
    """Return the names and files of a module and of those that it imports, directly or not."""
    found: dict[str, Path] = {}
    todo = [module]
    while todo:
        name = todo.pop()
        if name in found or not _own(name.partition(".")[0]):
            continue
        try:
            spec = find_spec(name)
            if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
                continue
            file = Path(spec.origin)
            todo += _imports(ast.parse(file.read_bytes()), spec.parent or "")
        except Exception:  # of whatever kind: a package runs when it is looked into; a cell will tell it better
            continue
        found[name] = file
    return found


def _own(package: str) -> bool:
    """Say whether a package is the user's: neither curvlab, nor installed, nor of Python itself."""
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
            yield from (f"{base}.{alias.name}" for alias in node.names)  # it may be a module
