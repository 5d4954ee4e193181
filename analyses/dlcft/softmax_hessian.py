"""Shon et al. (DLCFT, 2022), supplement, Appendix A: does the Hessian of the softmax loss vanish?

    python analyses/dlcft/softmax_hessian.py [OPTIONS of softmax_hessian]

Compares the formulas at random logits with automatic differentiation and with the output factors of the estimators,
records the curvature of a network during training on MNIST, with three seeds, and prints the verdict on each claim.
Results are in runs/softmax_hessian; a finished run is printed again, an interrupted run continues. Needs MNIST.
"""

import sys

from curvlab.analyze.frame.scripts import run_script

if __name__ == "__main__":
    sys.exit(run_script("softmax_hessian", preset="cpu", out="runs/softmax_hessian"))
