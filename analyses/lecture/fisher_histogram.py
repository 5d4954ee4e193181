"""Carta, "Regularization Priors", slide "Training Stability": how skewed is the Fisher after task 1 of SplitMNIST?

    python analyses/lecture/fisher_histogram.py [OPTIONS of fisher_histogram]

Computes the exact diagonal for an MLP with three seeds, and prints the verdict on each claim. Results are in
runs/fisher_histogram; a finished run is printed again, an interrupted run continues. Needs MNIST.
"""

import sys

from curvlab.analyze.frame.scripts import run_script

if __name__ == "__main__":
    sys.exit(run_script("fisher_histogram", preset="paper", out="runs/fisher_histogram"))
