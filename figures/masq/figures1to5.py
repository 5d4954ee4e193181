"""Figures 1 to 5 of Gepperth and Wiech (2019): accuracies while D1 and then D2 is learnt, with MaSQ, FIM and neither.

    python figures/masq/figures1to5.py [RUN]

Draws from the results in RUN (default runs/masq_table1), running the analysis first if there are none.
"""

import sys

from curvlab.analyze.frame.scripts import draw_script

if __name__ == "__main__":
    sys.exit(draw_script("ewc_grid", preset="cpu", out="runs/masq_table1"))
