"""Carta, "Regularization Priors": separate and online EWC, plain L2, SI, MAS and others on permuted MNIST.

    python analyses/lecture/ewc_modes.py [OPTIONS of ewc_modes]

Accuracy, memory over tasks and sensitivity to the strength over three seeds, with each claim's verdict. Results in
runs/ewc_modes; a finished run is printed again, an interrupted one continues. Needs MNIST.
"""

import sys

from curvlab.analyze.frame.scripts import run_script

if __name__ == "__main__":
    sys.exit(run_script("ewc_modes", preset="cpu", out="runs/ewc_modes"))
