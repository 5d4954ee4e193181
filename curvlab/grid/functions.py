"""Functions of the user, named ``module:name``: import them, and find where an error in them was raised."""

import re
import sys
import sysconfig
import traceback
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import curvlab
from curvlab.errors import CurvlabError
from curvlab.text import did_you_mean


def names_function(text: str) -> bool:
    r"""Return whether a text names a function, and not a file or a network of torchvision.

    Examples:
        >>> [names_function(name) for name in ("my_nets:make", "digits", "torchvision:resnet18", "C:\\data.npz")]
        [True, False, False, False]
    """
    drive = re.match(r"[A-Za-z]:[\\/]", text)
    return ":" in text and not drive and not text.startswith("torchvision:") and not Path(text).exists()


def find_function(function: str) -> Any:
    """Import and return the object named ``module:name``.

    Raises:
        CurvlabError: The name has another form, the module or the function does not exist, or the import fails.
    """
    module, colon, name = function.partition(":")
    if not (module and colon and name):
        raise CurvlabError(f"a function must be named module:name, not {function!r}")
    if module.endswith(".py") or not all(part.isidentifier() for part in module.split(".")):
        short = Path(module).name.removesuffix(".py")
        folder = "" if module == Path(module).name else f", in the folder {Path(module).parent}"
        raise CurvlabError(f"function {function}: {module!r} is not the name of a module: write {short}:{name}{folder}")
    try:
        found = import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        missing = str(error.name)
        # The module itself or a package of it is missing, not one that it imports.
        hint = did_you_mean(top, (one.name for one in iter_modules([str(Path.cwd())]))) if missing == top else ""
        raise CurvlabError(
            f"function {function}: cannot import {missing!r}: no such module{find_place(error)}{hint}"
        ) from error
    except (Exception, SystemExit) as error:  # importing runs the module, which may raise anything
        raise CurvlabError(f"function {function}: {to_sentence(error)}{find_place(error)}") from error
    try:
        return attrgetter(name)(found)
    except AttributeError as error:
        known = [one for one in vars(found) if not one.startswith("_")]
        where = getattr(found, "__file__", None) or module
        raise CurvlabError(f"function {function}: {where} has no {name!r}{did_you_mean(name, known)}") from error


def to_sentence(error: BaseException) -> str:
    """Return an error as one line: its message, after its type unless it is a ``CurvlabError``."""
    text = " ".join(str(error).split())
    return text if isinstance(error, CurvlabError) else ": ".join(filter(None, (type(error).__name__, text)))


def find_place(error: BaseException) -> str:
    """Return the last line of the user's own code in the traceback of an error, as `` (FILE, line N)``.

    An empty text if there is none, or if the message names the place already.
    """
    if isinstance(error, SyntaxError):
        return ""
    paths = sysconfig.get_paths()
    others = [str(Path(curvlab.__file__).parent), *(paths[kind] for kind in ("purelib", "platlib", "stdlib"))]
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_file() and not any(Path(frame.filename).is_relative_to(other) for other in others)
    ]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


def find_file(function: str) -> str | None:
    """Return the path of the file of an imported function's module; None if it has none."""
    return getattr(sys.modules.get(function.partition(":")[0]), "__file__", None)
