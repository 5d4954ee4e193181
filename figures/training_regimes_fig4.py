"""Fig. 4 of Mirzadeh et al. (2020): the mean accuracy on the tasks so far, and that on the first task, over 20 tasks.

    python figures/training_regimes_fig4.py [RUN]

Draws from the results in RUN (default runs/training_regimes_table2), running the analysis first if there are none.
If cells have failed, the figure says so.
"""

import json
import sys
from pathlib import Path

import yaml
from curvlab.analyze.training_regimes_table2 import LABELS

from curvlab.analyze.__main__ import main as analyze
from curvlab.analyze.gridded import marked
from curvlab.analyze.regimes.methods import describe
from curvlab.analyze.regimes.methods_options import MethodsConfig
from curvlab.results import RunDirectory
from curvlab.results.continual import accuracy_curves


def main(run: Path) -> int:
    """Draw ``training_regimes_fig4.png`` and ``.pdf`` in the run's folder."""
    code = 0
    if not (run / "provenance.json").exists():  # written last: the run is finished
        code = analyze(["methods", "--preset", "paper", "--out", str(run)])
        if not (run / "provenance.json").exists():
            return code
    accuracies = json.loads((run / "accuracies.json").read_text())
    config = MethodsConfig(**yaml.safe_load((run / "config.yaml").read_text()))
    figure = accuracy_curves(accuracies, LABELS, describe(config))
    for path in RunDirectory(run, resumed=True).write_figure("training_regimes_fig4", marked(figure, run)):
        print(path)
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/training_regimes_table2")))
