"""Contours of the exact posterior with the ellipses of Laplace's, and their distance over chunks of data.

    python figures/lecture/laplace_posterior.py [RUN]

Draws from the results in RUN (default runs/laplace_posterior), running the analysis first if there are none.
"""

import sys

from curvlab.analyze.frame.scripts import draw_script

if __name__ == "__main__":
    sys.exit(draw_script("laplace_posterior", preset="cpu", out="runs/laplace_posterior"))
