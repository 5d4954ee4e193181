"""The figure of Table 2 of Gepperth and Wiech (2019): sums and means on and off the diagonal, published ones marked.

    python figures/masq_table2.py [RUN]

Draws from the results in RUN (default runs/masq_table2), running the analysis first if there are none.
If cells have failed, the figure says so.
"""

import json
import sys
from pathlib import Path

from curvlab.analyze.__main__ import main as analyze
from curvlab.analyze.fim_diagonality import summarise, table_figure
from curvlab.analyze.gridded import marked
from curvlab.results import RunDirectory


def main(run: Path) -> int:
    """Draw ``masq_table2.png`` and ``.pdf`` in the run's folder."""
    code = 0
    if not (run / "provenance.json").exists():  # written last: the run is finished
        code = analyze(["fim_diagonality", "--preset", "paper", "--out", str(run)])
        if not (run / "provenance.json").exists():
            return code
    records = json.loads((run / "table.json").read_text())
    figure = table_figure(summarise(records), "Empirical Fisher of 784-30-30-10 on MNIST, classes 0 to 4")
    for path in RunDirectory(run, resumed=True).write_figure("masq_table2", marked(figure, run)):
        print(path)
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/masq_table2")))
