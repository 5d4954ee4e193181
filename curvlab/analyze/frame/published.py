"""The published numbers of a paper: each number with its table, row and conditions."""

from functools import cache
from importlib.resources import files
from typing import Any

from curvlab import yaml_file


@cache
def read_published(room: str) -> dict[str, Any]:
    """Return the contents of the ``published.yaml`` of a room: tables with ``source``, ``conditions`` and ``rows``.

    Args:
        room: Name of the folder, such as ``masq``.
    """
    text = files(f"curvlab.analyze.{room}").joinpath("published.yaml").read_text()
    tables: dict[str, Any] = yaml_file.loads(text)
    return tables
