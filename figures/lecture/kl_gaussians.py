"""The figures of Carta's slides on the Kullback-Leibler divergence: panels of Gaussians, and forward and reverse fits.

    python figures/lecture/kl_gaussians.py [RUN]

Draws from the results in RUN (default runs/kl_gaussians), running the analysis first if there are none.
"""

import sys

from curvlab.analyze.frame.scripts import draw_script

if __name__ == "__main__":
    sys.exit(draw_script("kl_gaussians", preset="default", out="runs/kl_gaussians"))
