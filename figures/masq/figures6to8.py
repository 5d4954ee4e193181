"""Figures 6 to 8 of Gepperth and Wiech (2019), and MaSQ over the batch size and the training.

    python figures/masq/figures6to8.py [RUN]

Draws from the results in RUN (default runs/masq_figures6to8), running the analysis first if there are none.
"""

import sys

from curvlab.analyze.frame.scripts import draw_script

if __name__ == "__main__":
    sys.exit(draw_script("masq_vs_fim", preset="cpu", out="runs/masq_figures6to8"))
