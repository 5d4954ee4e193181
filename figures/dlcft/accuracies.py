"""The tables of Shon et al. (2022), "DLCFT", as points, with published values for the published data.

    python figures/dlcft/accuracies.py [RUN]

Draws from the results in RUN (default runs/dlcft), and runs the analysis first if they are missing.
"""

import sys

from curvlab.analyze.frame.scripts import draw_script

if __name__ == "__main__":
    sys.exit(draw_script("dlcft", preset="cpu", out="runs/dlcft", figures=["accuracies"]))
