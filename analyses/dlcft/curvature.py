"""Shon et al. (2022), "DLCFT": does the largest eigenvalue of the Fisher vanish during training, with each loss?

    python analyses/dlcft/curvature.py [OPTIONS of eigenvalues]

Trains the MNIST network of the authors' code with softmax cross-entropy and with squared error, with three seeds, and
prints the verdict on each claim. Results are in runs/dlcft_curvature; a finished run is printed again, an interrupted
run continues. Needs MNIST. With --preset paper-cifar100 and another --out: Fig. 7 of the supplement, on CIFAR-100, for
a machine with a GPU.
"""

import sys

from curvlab.analyze.frame.scripts import run_script

if __name__ == "__main__":
    sys.exit(run_script("eigenvalues", preset="paper", out="runs/dlcft_curvature"))
