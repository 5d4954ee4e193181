"""The figures of Carta's slides on natural gradient descent: loss and way on a linear regression, loss of a network.

    python figures/lecture/natural_gradient.py [RUN]

Draws from the results in RUN (default runs/natural_gradient), running the analysis first if there are none.
"""

import sys

from curvlab.analyze.frame.scripts import draw_script

if __name__ == "__main__":
    sys.exit(draw_script("natural_gradient", preset="default", out="runs/natural_gradient"))
