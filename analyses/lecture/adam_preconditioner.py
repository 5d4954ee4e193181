"""Carta, "Regularization Priors", slide on Adam: is its second moment the diagonal of the Fisher?

    python analyses/lecture/adam_preconditioner.py [OPTIONS of adam_preconditioner]

Rank correlation and scale over training against the batched empirical, the empirical and the exact diagonal, over three
seeds, with each claim's verdict. Results in runs/adam_preconditioner; a finished run is printed again. Needs MNIST.
"""

import sys

from curvlab.analyze.frame.scripts import run_script

if __name__ == "__main__":
    sys.exit(run_script("adam_preconditioner", preset="cpu", out="runs/adam_preconditioner"))
