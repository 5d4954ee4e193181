"""Shon et al. (DLCFT, 2022), supplement, Appendix A: does the Hessian of the softmax loss vanish?

    python analyses/softmax_hessian.py [OPTIONS of softmax_hessian]

The formulas at random logits, beside automatic differentiation and the output factors of the estimators here, and a
network's curvature while it learns MNIST, over three seeds, with each claim's verdict. Results in runs/softmax_hessian;
a finished run is printed again, an interrupted one continues. Needs MNIST.
"""

import sys

from curvlab.analyze.__main__ import main

OUT = "runs/softmax_hessian"

if __name__ == "__main__":
    sys.exit(main(["softmax_hessian", "--preset", "cpu", "--out", OUT, *sys.argv[1:]]))
