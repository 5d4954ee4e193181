"""Shon et al. (2022), "DLCFT": its tables for data-, task- and class-incremental learning, its ablation and Table 5.

    python analyses/dlcft/tables.py [OPTIONS of dlcft]

The MNIST version (--preset cpu): a network that was pre-trained on the digits 0 to 3 learns 4 to 9, linearized with
squared error and in its original form, over three seeds, with each claim's verdict. Results in runs/dlcft; a finished
run is printed again, an interrupted one continues. Needs MNIST. With another --out: --preset cpu-cifar100 is 20 classes
of CIFAR-100 with a ResNet-20 that was trained on CIFAR-10, and paper all classes, for a machine with a GPU.
"""

import sys

from curvlab.analyze.frame.scripts import run_script

if __name__ == "__main__":
    sys.exit(run_script("dlcft", preset="cpu", out="runs/dlcft"))
