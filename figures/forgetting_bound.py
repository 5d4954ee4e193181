"""Forgetting against its bound by curvature and distance (Mirzadeh et al. 2020), over training regimes.

    python figures/forgetting_bound.py [RUN]

Draws from the results in RUN (default runs/forgetting_bound), running the analysis first if there are none.
If cells have failed, the figure says so.
"""

import json
import sys
from pathlib import Path

from curvlab.analyze.__main__ import main as analyze
from curvlab.analyze.gridded import marked
from curvlab.analyze.regimes.forgetting_bound import figure
from curvlab.results import RunDirectory


def main(run: Path) -> int:
    """Draw ``forgetting_bound.png`` and ``.pdf`` in the run's folder."""
    code = 0
    if not (run / "provenance.json").exists():  # written last: the run is finished
        code = analyze(["forgetting_bound", "--preset", "paper", "--out", str(run)])
        if not (run / "provenance.json").exists():
            return code
    records = json.loads((run / "table.json").read_text())
    drawn = figure(records, "Forgetting of a task by the next, its bound, and the bound's factors")
    for path in RunDirectory(run, resumed=True).write_figure("forgetting_bound", marked(drawn, run)):
        print(path)
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/forgetting_bound")))
