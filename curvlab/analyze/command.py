"""The analyses that are not yet on the frame: what they are, and what they import."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic

from rich.console import Console

from curvlab.commandline.config import C, Config
from curvlab.commandline.options import GridOptions, RunOptions
from curvlab.commandline.program import RunsFailed as CellsFailed
from curvlab.errors import CurvlabError
from curvlab.grid import Cell, Place

__all__ = ["Analysis", "C", "CellsFailed", "Config", "GridOptions", "RunOptions"]


@dataclass(frozen=True)
class Analysis(Generic[C]):
    """An analysis.

    Attributes:
        config: Its config, a ``Config``.
        presets: Configs by name; ``default`` among them.
        run: Does it, and prints its tables; raises ``CurvlabError`` for what a user can mend. It is given the
            ``GridOptions`` if there is a ``cell``, else the ``RunOptions``.
        description: What ``--help`` says first.
        cell: One cell of its grid, with one seed: gives flat records. None for an analysis that is no grid.
        version: Of ``cell``: raised when its numbers change, so that stores do not mix old ones with new.
    """

    config: type[C]
    presets: Mapping[str, C]
    run: Callable[[C, Any, Console], None]
    description: str
    cell: Callable[[C, Place], Sequence[Mapping[str, Any]]] | None = None
    version: int = 1

    @property
    def seed(self) -> str:
        """The field of the seed, ``seed`` or ``seeds``."""
        return "seeds" if "seeds" in self.config.model_fields else "seed"

    def cells(self, configs: Iterable[C], seeds: Iterable[int] | None = None) -> list[Cell]:
        """Return the cells of configurations and seeds; without seeds, those of each configuration itself.

        Raises:
            CurvlabError: The analysis is no grid.
        """
        if self.cell is None:
            raise CurvlabError("this analysis is no grid: it has no cells")
        module = self.cell.__module__
        found = []
        for config in configs:
            values = config.model_dump(mode="json")
            own = values.get(self.seed, 0)
            for seed in (own if isinstance(own, list) else [own]) if seeds is None else seeds:
                whole = values | {self.seed: [seed] if self.seed == "seeds" else seed}
                name = module.rpartition(".")[2]
                found.append(Cell(f"{module}:ANALYSIS.run_cell", whole, name, self.version, self.seed))
        return found

    def run_cell(self, values: Mapping[str, Any], place: Place) -> Sequence[Mapping[str, Any]]:
        """Run a cell as ``curvlab.grid`` calls it, with the configuration as JSON values."""
        assert self.cell is not None
        return self.cell(self.config(**values), place)
