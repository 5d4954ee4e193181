"""Mirzadeh et al. (2020): is forgetting bounded by curvature and distance, over the training regimes of the paper?

    python analyses/regimes/forgetting_bound.py [OPTIONS of forgetting_bound]

Runs the paper's five tasks of rotated and permuted MNIST, networks and regimes (with the authors' dropout of 0.25):
stable, plastic, and stable with one ingredient exchanged, with five seeds: about an hour on one core; --preset cpu
takes minutes. Results are in runs/regimes_forgetting_bound; a finished run is printed again, an interrupted run
continues. Needs MNIST.
"""

import sys

from curvlab.analyze.frame.scripts import run_script

if __name__ == "__main__":
    sys.exit(run_script("forgetting_bound", preset="paper", out="runs/regimes_forgetting_bound"))
