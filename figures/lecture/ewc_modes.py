"""Accuracy over tasks, sensitivity to the strength, and memory of the forms of EWC and its relatives.

    python figures/lecture/ewc_modes.py [RUN]

Draws from the results in RUN (default runs/ewc_modes), running the analysis first if there are none.
"""

import sys

from curvlab.analyze.frame.scripts import draw_script

if __name__ == "__main__":
    sys.exit(draw_script("ewc_modes", preset="cpu", out="runs/ewc_modes"))
