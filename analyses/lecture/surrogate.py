"""Carta, "Regularization Priors", slide "The Optimization Approach": the Taylor surrogate of the loss of old data.

    python analyses/lecture/surrogate.py [OPTIONS of surrogate]

The old loss along the line between two tasks' solutions, with its surrogates, over three seeds, with each claim's
verdict. Results in runs/surrogate; a finished run is printed again, an interrupted one continues. Needs MNIST.
"""

import sys

from curvlab.analyze.frame.scripts import run_script

if __name__ == "__main__":
    sys.exit(run_script("surrogate", preset="cpu", out="runs/surrogate"))
