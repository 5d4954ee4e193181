"""The items of the sources (figures, tables, formulas, statements) and where each of them is regenerated."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from curvlab import yaml_file


@dataclass(frozen=True)
class Item:
    """A figure, table, formula or statement of a source.

    Attributes:
        number: Number in the list.
        paper: Room of the paper.
        item: What it is.
        analyses: Names of the analyses that regenerate it.
        call: Dotted name of the function or class of the library that is the item; empty if there is none.
        test: File of the test of ``call``.
    """

    number: int
    paper: str
    item: str
    analyses: Sequence[str] = ()
    call: str = ""
    test: str = ""


@cache
def read_items() -> tuple[Item, ...]:
    """Return all items in the order of their numbers."""
    text = files("curvlab.analyze.frame").joinpath("items.yaml").read_text(encoding="utf-8")
    return tuple(Item(**one) for one in yaml_file.loads(text))
