"""Mirzadeh et al. (2020), Fig. 3: a stable against a plastic training, over five tasks of rotated and permuted MNIST.

    python analyses/regimes/figure3.py [OPTIONS of training_regimes]

Accuracies, the Hessian's largest eigenvalue after each task and the distance between tasks, with each ingredient of the
stable regime exchanged too, over five seeds: about an hour on one core; --preset cpu takes minutes. Results in
runs/regimes_figure3; a finished run is printed again, an interrupted one continues. Needs MNIST.
"""

import sys

from curvlab.analyze.frame.scripts import run_script

if __name__ == "__main__":
    sys.exit(run_script("training_regimes", preset="paper", out="runs/regimes_figure3"))
