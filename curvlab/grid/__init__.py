"""Grids of runs: specifications of runs, the store of their results, and the engine that executes missing runs.

This package knows no analysis: a run is a function, named ``module:name``, and its configuration.
"""

from curvlab.grid.axes import draw, expand
from curvlab.grid.run_spec import Outcome, Place, RunSpec
from curvlab.grid.running import run, run_folder
from curvlab.grid.store import Store, read_store, write_store

__all__ = ["Outcome", "Place", "RunSpec", "Store", "draw", "expand", "read_store", "run", "run_folder", "write_store"]
