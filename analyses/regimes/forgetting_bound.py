"""Mirzadeh et al. (2020): is forgetting bounded by curvature and distance, over the training regimes of the paper?

    python analyses/regimes/forgetting_bound.py [OPTIONS of forgetting_bound]

The paper's five tasks of rotated and permuted MNIST, networks and regimes (the authors' dropout of 0.25), stable and
plastic and with one ingredient exchanged, over five seeds: about an hour on one core; --preset cpu takes minutes.
Results in runs/regimes_forgetting_bound; a finished run is printed again, an interrupted one continues. Needs MNIST.
"""

import sys

from curvlab.analyze.frame.scripts import run_script

if __name__ == "__main__":
    sys.exit(run_script("forgetting_bound", preset="paper", out="runs/regimes_forgetting_bound"))
