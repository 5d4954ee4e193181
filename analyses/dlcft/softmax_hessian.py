"""Shon et al. (DLCFT, 2022), supplement, Appendix A: does the Hessian of the softmax loss vanish?

    python analyses/dlcft/softmax_hessian.py [OPTIONS of softmax_hessian]

The formulas at random logits, beside automatic differentiation and the output factors of the estimators here, and a
network's curvature in training on MNIST, over three seeds, with each claim's verdict. Results in runs/softmax_hessian;
a finished run is printed again, an interrupted one continues. Needs MNIST.
"""

import sys

from curvlab.analyze.frame.scripts import run_script

if __name__ == "__main__":
    sys.exit(run_script("softmax_hessian", preset="cpu", out="runs/softmax_hessian"))
