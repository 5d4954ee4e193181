"""Carta, "Regularization Priors", slide "Importance weights follow a logarithmic distribution": the Fisher's tail.

    python analyses/lecture/clipped_fisher.py [OPTIONS of clipped_fisher]

The diagonal after three batches of new classes, and its average clipped at 0.001, over three seeds, with each claim's
verdict. Results in runs/clipped_fisher; a finished run is printed again, an interrupted one continues. Needs MNIST.
"""

import sys

from curvlab.analyze.frame.scripts import run_script

if __name__ == "__main__":
    sys.exit(run_script("clipped_fisher", preset="cpu", out="runs/clipped_fisher"))
