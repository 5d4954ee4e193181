"""Mirzadeh et al. (2020), Table 2: six methods on 20 tasks of permuted and rotated MNIST, and of split CIFAR-100.

    python analyses/regimes/table2.py [OPTIONS of methods]

Chooses the best of equally many candidates per method on held-out samples, runs it with five seeds, and prints the
published numbers and the verdict on each claim. Takes hours on a machine with a GPU (--device cuda); --preset cpu takes
an hour on two cores. For split CIFAR-100, with a network trained on CIFAR-10: --preset paper-cifar100 (or cpu-cifar100)
and another --out. Results are in runs/regimes_table2; a finished run is printed again, an interrupted run continues.
"""

import sys

from curvlab.analyze.frame.scripts import run_script

if __name__ == "__main__":
    sys.exit(run_script("methods", preset="paper", out="runs/regimes_table2"))
