"""The figure of Carta's slide "Training Stability": the distribution of the Fisher's diagonal, in logarithmic scales.

    python figures/lecture/fisher_histogram.py [RUN]

Draws from the results in RUN (default runs/fisher_histogram), and runs the analysis first if they are missing.
"""

import sys

from curvlab.analyze.frame.scripts import draw_script

if __name__ == "__main__":
    sys.exit(draw_script("fisher_histogram", preset="paper", out="runs/fisher_histogram"))
