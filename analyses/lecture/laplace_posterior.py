"""Carta, "Regularization Priors", slide "EWC - Laplace Approximation": the sequential posterior against the exact one.

    python analyses/lecture/laplace_posterior.py [OPTIONS of laplace_posterior]

Logistic regression with two weights and a small network, over three seeds, with each claim's verdict. Results in
runs/laplace_posterior; a finished run is printed again, an interrupted one continues. Needs MNIST.
"""

import sys

from curvlab.analyze.frame.scripts import run_script

if __name__ == "__main__":
    sys.exit(run_script("laplace_posterior", preset="cpu", out="runs/laplace_posterior"))
