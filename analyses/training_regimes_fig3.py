"""Mirzadeh et al. (2020), Fig. 3: a stable against a plastic training, over five tasks of rotated and permuted MNIST.

    python analyses/training_regimes_fig3.py [OPTIONS of training_regimes]

Accuracies, the Hessian's largest eigenvalue after each task and the distance between tasks, with each ingredient of the
stable regime exchanged too, over five seeds: about an hour on one core; --preset cpu takes minutes. Results in
runs/training_regimes_fig3; a finished run is printed again, an interrupted one continues. Needs MNIST.
"""

import sys

from curvlab.analyze.__main__ import main

OUT = "runs/training_regimes_fig3"

if __name__ == "__main__":
    sys.exit(main(["training_regimes", "--preset", "paper", "--out", OUT, *sys.argv[1:]]))
