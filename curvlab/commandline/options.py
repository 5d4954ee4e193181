"""Options for the execution of runs; none of them changes a number."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import pydantic

from curvlab import grid
from curvlab.commandline.config import Config
from curvlab.data import fingerprint
from curvlab.grid import RunSpec
from curvlab.grid.functions import names_function

NO_DATA = "none"  # name of the data if the function of the network returns them too
EXIT_CODES = (
    "Exit codes: 0 done; 1 done, but runs have failed; 2 bad input, or it cannot continue; 130 interrupted by Ctrl-C."
)


class RunOptions(Config):
    """Folders of results and data."""

    titles: ClassVar[Mapping[str, str]] = {"out": "folders"}

    out: Path | None = None
    """Folder for the results; the same command with the same folder continues there. Without it, runs/ANALYSIS-TIME,
    or no folder for an analysis that only prints."""
    data_root: Path | None = None
    """Folder of the data sets. Without it, the environment variable CURVLAB_DATA or ~/.cache/curvlab/data."""
    offline: bool = False
    """Do not use the network: data that are not on disk are an error."""


class GridOptions(RunOptions):
    """Options for the execution of many runs."""

    titles: ClassVar[Mapping[str, str]] = {**RunOptions.titles, "jobs": "execution"}

    jobs: int | None = pydantic.Field(default=None, ge=1)
    """Number of runs at once, each in its own process; it changes no bit of the results. Without it, the number of
    cores divided by the threads."""
    threads: int = pydantic.Field(default=1, ge=1)
    """Threads of each process; another number may round differently."""
    scheduler: str | None = None
    """Address of a Dask scheduler, such as tcp://HOST:8786, whose workers execute the runs."""
    run_timeout: float | None = pydantic.Field(default=None, gt=0)
    """Seconds after which a run is stopped and recorded as failed; import time is not counted."""
    retry_failed: bool = False
    """Execute the failed runs again."""

    def run(
        self, specs: Sequence[RunSpec], store: Path, returned: Mapping[str, str] = MappingProxyType({})
    ) -> dict[str, int]:
        """Execute the runs that the store does not have, as ``curvlab.grid.run`` does.

        Args:
            specs: Runs.
            store: File of the store.
            returned: Functions of the user -> hashes of what they return, as far as they are known.

        Raises:
            CurvlabError: The store or the cluster cannot be used, or runs in the store have read other data or called
                another version of a function.
        """
        # Only in analyses do the keys data and weights name files, and the keys data and model functions.
        configs = [spec.config for spec in specs if spec.function.startswith("curvlab.analyze.")]
        functions = {
            name for config in configs for key in ("data", "model") if names_function(name := str(config.get(key, "")))
        }
        files = {str(config[key]) for config in configs for key in ("data", "weights") if config.get(key)}
        names = sorted(files - functions - {NO_DATA})
        return grid.run(
            specs,
            store,
            jobs=self.jobs,
            threads=self.threads,
            scheduler=self.scheduler,
            run_timeout=self.run_timeout,
            retry_failed=self.retry_failed,
            data_root=self.data_root,
            offline=self.offline,
            data={name: fingerprint(name, root=self.data_root, offline=self.offline) for name in names},
            functions={name: returned.get(name, "") for name in sorted(functions)},
        )
