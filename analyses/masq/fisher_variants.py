"""Which Fisher does EWC need, and at which strength? Five kinds, on three streams of MNIST, in two scales.

    python analyses/masq/fisher_variants.py [OPTIONS of fisher_variants]

Network 784-100-100-10, three seeds: about 9 minutes on two cores. Results in runs/masq_fisher_variants; a finished run
is printed again, an interrupted one continues. Needs MNIST.
"""

import sys

from curvlab.analyze.frame.scripts import run_script

if __name__ == "__main__":
    sys.exit(run_script("fisher_variants", preset="cpu", out="runs/masq_fisher_variants"))
