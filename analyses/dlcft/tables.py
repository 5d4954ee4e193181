"""Shon et al. (2022), "DLCFT": the tables for data-, task- and class-incremental learning, the ablation and Table 5.

    python analyses/dlcft/tables.py [OPTIONS of dlcft]

The MNIST version (--preset cpu): a network that was pre-trained on the digits 0 to 3 learns 4 to 9, linearized with
squared error and in its original form, with three seeds; the verdict on each claim is printed. Results are in
runs/dlcft; a finished run is printed again, an interrupted run continues. Needs MNIST. With another --out: --preset
cpu-cifar100 has 20 classes of CIFAR-100 and a ResNet-20 trained on CIFAR-10; --preset paper has all classes, for a
machine with a GPU.
"""

import sys

from curvlab.analyze.frame.scripts import run_script

if __name__ == "__main__":
    sys.exit(run_script("dlcft", preset="cpu", out="runs/dlcft"))
