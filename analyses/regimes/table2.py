"""Mirzadeh et al. (2020), Table 2: six methods on 20 tasks of permuted and rotated MNIST, and of split CIFAR-100.

    python analyses/regimes/table2.py [OPTIONS of methods]

Every method with the best of equally many candidates on held-out samples, then over five seeds, beside the published
numbers and with each claim's verdict. Hours of a machine with a GPU (--device cuda); --preset cpu takes an hour of two
cores. Split CIFAR-100, from a network that was trained on CIFAR-10: --preset paper-cifar100 (or cpu-cifar100) and
another --out. Results in runs/regimes_table2; a finished run is printed again, an interrupted one continues.
"""

import sys

from curvlab.analyze.frame.scripts import run_script

if __name__ == "__main__":
    sys.exit(run_script("methods", preset="paper", out="runs/regimes_table2"))
