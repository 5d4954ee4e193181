"""The curves of Shon et al. (2022), "DLCFT": the largest eigenvalue of the curvature over training, with each loss.

    python figures/dlcft_curvature.py [RUN]

Draws from the results in RUN (default runs/dlcft_curvature), running the analysis first if there are none.
If cells have failed, the figure says so.
"""

import json
import sys
from pathlib import Path

import yaml

from curvlab.analyze.__main__ import main as analyze
from curvlab.analyze.dlcft.eigenvalues import curves_figures
from curvlab.analyze.gridded import marked
from curvlab.results import RunDirectory

NAMES = {"eigenvalues": "dlcft_curvature", "normalised": "dlcft_curvature-normalised"}


def main(run: Path) -> int:
    """Draw ``dlcft_curvature`` and ``dlcft_curvature-normalised``, ``.png`` and ``.pdf``, in the run's folder."""
    code = 0
    if not (run / "provenance.json").exists():  # written last: the run is finished
        code = analyze(["eigenvalues", "--preset", "paper", "--out", str(run)])
        if not (run / "provenance.json").exists():
            return code
    records = json.loads((run / "table.json").read_text())
    config = yaml.safe_load((run / "config.yaml").read_text())
    figures = curves_figures(records, f"{config['model']} on {Path(config['data']).name}")
    for name, stem in NAMES.items():
        if name in figures:
            for path in RunDirectory(run, resumed=True).write_figure(stem, marked(figures[name], run)):
                print(path)
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/dlcft_curvature")))
