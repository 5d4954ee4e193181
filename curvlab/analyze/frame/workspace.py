"""Records of a run, and the folder that it works in."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from curvlab.files import write_whole
from curvlab.grid import Place
from curvlab.results.run_directory import to_json

Record = dict[str, Any]


@dataclass(frozen=True)
class Workspace:
    """Folder of one run, for its checkpoints and for the values it saves.

    Attributes:
        place: The folder, and the location of the data.
    """

    place: Place

    @property
    def folder(self) -> Path:
        """Folder for checkpoints; a run that continues after an interruption gets the same folder."""
        return self.place.folder

    def save(self, name: str, value: Any) -> None:
        """Save a value that is not a flat record, such as a matrix for a figure, as JSON for the report.

        Args:
            name: One of the ``artifacts`` of the analysis.
            value: Numbers, strings, arrays, and lists or mappings of them.
        """
        write_whole(self.folder / f"{name}.json", to_json(value).encode())

    def within(self, name: str) -> "Workspace":
        """Return the workspace of a part of the run: a subfolder."""
        return Workspace(replace(self.place, folder=self.folder / name))
