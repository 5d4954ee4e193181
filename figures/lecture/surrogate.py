"""The old loss and its quadratic surrogates along the line between the solutions of two tasks.

    python figures/lecture/surrogate.py [RUN]

Draws from the results in RUN (default runs/surrogate), running the analysis first if there are none.
"""

import sys

from curvlab.analyze.frame.scripts import draw_script

if __name__ == "__main__":
    sys.exit(draw_script("surrogate", preset="cpu", out="runs/surrogate"))
