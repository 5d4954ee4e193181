"""Shon et al. (2022), "DLCFT": does the Fisher's largest eigenvalue vanish in training, with each loss?

    python analyses/dlcft/curvature.py [OPTIONS of eigenvalues]

The MNIST network of the authors' code over three seeds, softmax cross-entropy against squared error, with each claim's
verdict. Results in runs/dlcft_curvature; a finished run is printed again, an interrupted one continues. Needs MNIST.
With --preset paper-cifar100 and another --out: Fig. 7 of the supplement, on CIFAR-100, for a machine with a GPU.
"""

import sys

from curvlab.analyze.frame.scripts import run_script

if __name__ == "__main__":
    sys.exit(run_script("eigenvalues", preset="paper", out="runs/dlcft_curvature"))
