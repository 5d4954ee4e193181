"""Figures 6 to 8 of Gepperth and Wiech (2019), and what their text says of MaSQ and FIM: cost, proportion, cancelling.

    python analyses/masq/figures6to8.py [OPTIONS of masq_vs_fim]

Three streams of MNIST, network 784-200-200-10, three seeds: about 5 minutes on two cores. Results in
runs/masq_figures6to8; a finished run is printed again, an interrupted one continues. Needs MNIST.
"""

import sys

from curvlab.analyze.frame.scripts import run_script

if __name__ == "__main__":
    sys.exit(run_script("masq_vs_fim", preset="cpu", out="runs/masq_figures6to8"))
