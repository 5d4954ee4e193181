"""Carta, "Regularization Priors", slides on natural gradient descent: does it converge faster, and is it more stable?

    python analyses/lecture/natural_gradient.py [OPTIONS of natural_gradient]

A linear regression at two learning rates, and a network trained by SGD, Adam and natural gradients with the exact
Fisher, K-FAC and its diagonal, over three seeds. Results in runs/natural_gradient; a finished run is printed again.
"""

import sys

from curvlab.analyze.frame.scripts import run_script

if __name__ == "__main__":
    sys.exit(run_script("natural_gradient", preset="default", out="runs/natural_gradient"))
