"""Gepperth and Wiech (2019), Table 2: how diagonal is the Fisher of 784-30-30-10 on MNIST classes 0 to 4?

    python analyses/masq/table2.py [OPTIONS of fim_diagonality]

The paper's configuration over three seeds, W1 and W2 included, with the published numbers and each claim's verdict.
Results in runs/masq_table2; a finished run is printed again, an interrupted one continues. Needs MNIST.
"""

import sys

from curvlab.analyze.frame.scripts import run_script

if __name__ == "__main__":
    sys.exit(run_script("fim_diagonality", preset="paper", out="runs/masq_table2"))
