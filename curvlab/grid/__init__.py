"""Grids of runs: cells, the store that keeps them, and the engine that runs those that it does not have.

Nothing here knows an analysis: a cell is a function, named ``module:name``, and its configuration.
"""

from curvlab.grid.axes import draw, expand
from curvlab.grid.cell import Cell, Outcome, Place
from curvlab.grid.running import folder_of, run
from curvlab.grid.store import Store, reading, writing

__all__ = ["Cell", "Outcome", "Place", "Store", "draw", "expand", "folder_of", "reading", "run", "writing"]
