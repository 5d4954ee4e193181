"""Histograms of the Fisher's diagonal after batches of new classes, and of its average, clipped at 0.001.

    python figures/lecture/clipped_fisher.py [RUN]

Draws from the results in RUN (default runs/clipped_fisher), running the analysis first if there are none.
"""

import sys

from curvlab.analyze.frame.scripts import draw_script

if __name__ == "__main__":
    sys.exit(draw_script("clipped_fisher", preset="cpu", out="runs/clipped_fisher"))
