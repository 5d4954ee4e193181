"""The tables of Shon et al. (2022), "DLCFT", as points beside ours, and accuracies over the tasks.

    python figures/dlcft.py [RUN]

Draws from the results in RUN (default runs/dlcft), running the analysis first if there are none.
If cells have failed, the figures say so.
"""

import json
import sys
from pathlib import Path

import yaml

from curvlab.analyze.__main__ import main as analyze
from curvlab.analyze.dlcft import DlcftConfig, describe, figures, summarise
from curvlab.analyze.gridded import marked
from curvlab.results import RunDirectory


def main(run: Path) -> int:
    """Draw ``accuracies`` and ``accuracy_curves``, ``.png`` and ``.pdf``, in the run's folder."""
    code = 0
    if not (run / "provenance.json").exists():  # written last: the run is finished
        code = analyze(["dlcft", "--preset", "cpu", "--out", str(run)])
        if not (run / "provenance.json").exists():
            return code
    found, curves = (json.loads((run / name).read_text()) for name in ("table.json", "curves.json"))
    config = DlcftConfig(**yaml.safe_load((run / "config.yaml").read_text()))
    for name, figure in figures(summarise(found), curves, describe(config)).items():
        for path in RunDirectory(run, resumed=True).write_figure(name, marked(figure, run)):
            print(path)
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/dlcft")))
