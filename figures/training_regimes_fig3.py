"""Fig. 3 of Mirzadeh et al. (2020): accuracies, eigenvalues and distances, of stable and plastic training.

    python figures/training_regimes_fig3.py [RUN]

Draws from the results in RUN (default runs/training_regimes_fig3), running the analysis first if there are none.
If cells have failed, the figure says so.
"""

import json
import sys
from pathlib import Path

import yaml

from curvlab.analyze.__main__ import main as analyze
from curvlab.analyze.gridded import marked
from curvlab.analyze.regimes.training_regimes import TrainingRegimesConfig, describe, figure
from curvlab.results import RunDirectory


def main(run: Path) -> int:
    """Draw ``training_regimes_fig3.png`` and ``.pdf`` in the run's folder."""
    code = 0
    if not (run / "provenance.json").exists():  # written last: the run is finished
        code = analyze(["training_regimes", "--preset", "paper", "--out", str(run)])
        if not (run / "provenance.json").exists():
            return code
    points, accuracies = (json.loads((run / f"{name}.json").read_text()) for name in ("points", "accuracies"))
    config = TrainingRegimesConfig(**yaml.safe_load((run / "config.yaml").read_text()))
    drawn = figure(points, accuracies, describe(config))
    for path in RunDirectory(run, resumed=True).write_figure("training_regimes_fig3", marked(drawn, run)):
        print(path)
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/training_regimes_fig3")))
