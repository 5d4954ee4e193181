"""How to run rather than what: none of these options changes a number."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import pydantic

from curvlab import grid
from curvlab.commandline.config import Config
from curvlab.data import fingerprint
from curvlab.grid import Cell

EXIT_CODES = (
    "Exit codes: 0 done; 1 done, but runs have failed; 2 bad input, or it cannot go on; 130 interrupted by Ctrl-C."
)


class RunOptions(Config):
    """Where results and data are."""

    titles: ClassVar[Mapping[str, str]] = {"out": "places"}

    out: Path | None = None
    """Folder for the results; the same command with the same folder continues there. Else runs/ANALYSIS-TIME,
    or none for an analysis that only prints."""
    data_root: Path | None = None
    """Where data sets are kept. Else the environment variable CURVLAB_DATA, else ~/.cache/curvlab/data."""
    offline: bool = False
    """Never touch the network: data that are not on disk are an error."""


class GridOptions(RunOptions):
    """How to do many runs."""

    titles: ClassVar[Mapping[str, str]] = {**RunOptions.titles, "jobs": "running"}

    jobs: int | None = pydantic.Field(default=None, ge=1)
    """Runs at once, each in a process of its own; the numbers are the same to the bit whatever this is. Else as many
    as the cores bear."""
    threads: int = pydantic.Field(default=1, ge=1)
    """Threads of each process; another number of them may round otherwise."""
    scheduler: str | None = None
    """Address of a Dask scheduler, such as tcp://HOST:8786, whose workers then do the runs."""
    cell_timeout: float | None = pydantic.Field(default=None, gt=0)
    """Seconds after which a run is stopped and recorded as failed; what its module takes to import, once for all
    runs, is not counted."""
    retry_failed: bool = False
    """Repeat the runs that have failed."""

    def run(self, cells: Sequence[Cell], store: Path) -> dict[str, int]:
        """Do the runs that the store does not have; see ``curvlab.grid.run``.

        Args:
            cells: The grid.
            store: The file.

        Raises:
            CurvlabError: The store or the cluster cannot be used, or the store was begun with other data.
        """
        # Only configurations of analyses: another function may call anything data.
        configs = [cell.config for cell in cells if cell.function.startswith("curvlab.analyze.")]
        names = sorted({str(config[key]) for config in configs for key in ("data", "weights") if config.get(key)})
        return grid.run(
            cells,
            store,
            jobs=self.jobs,
            threads=self.threads,
            scheduler=self.scheduler,
            cell_timeout=self.cell_timeout,
            retry_failed=self.retry_failed,
            data_root=self.data_root,
            offline=self.offline,
            data={name: fingerprint(name, root=self.data_root, offline=self.offline) for name in names},
        )
