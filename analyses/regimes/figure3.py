"""Mirzadeh et al. (2020), Fig. 3: stable and plastic training on five tasks of rotated and permuted MNIST.

    python analyses/regimes/figure3.py [OPTIONS of training_regimes]

Records accuracies, the largest eigenvalue of the Hessian after each task and the distance between tasks, also with each
ingredient of the stable regime exchanged, with five seeds: about an hour on one core; --preset cpu takes minutes.
Results are in runs/regimes_figure3; a finished run is printed again, an interrupted run continues. Needs MNIST.
"""

import sys

from curvlab.analyze.frame.scripts import run_script

if __name__ == "__main__":
    sys.exit(run_script("training_regimes", preset="paper", out="runs/regimes_figure3"))
