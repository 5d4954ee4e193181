"""Hwang and Shin: how important is the learning-rate schedule in transfer learning?

    python analyses/transfer/schedules.py [OPTIONS of lr_schedules]

A ResNet-20 trained on CIFAR-10, fine-tuned on CIFAR-100 with six schedules, initial rates and decays, over five seeds:
hours of a machine with a GPU (--device cuda); --preset cpu takes minutes on MNIST, --preset cpu-cifar100 half an hour.
Results in runs/transfer_schedules; a finished run is printed again, an interrupted one continues.
"""

import sys

from curvlab.analyze.frame.scripts import run_script

if __name__ == "__main__":
    sys.exit(run_script("lr_schedules", preset="paper", out="runs/transfer_schedules"))
