"""Gepperth and Wiech (2019), Table 2: how diagonal is the Fisher of 784-30-30-10 on MNIST classes 0 to 4?

    python analyses/masq/table2.py [OPTIONS of fim_diagonality]

Runs the paper's configuration with three seeds, including W1 and W2, and prints published numbers and
verdicts on claims. Results are in runs/masq_table2; a finished run is printed again, an interrupted run continues.
Needs MNIST.
"""

import sys

from curvlab.analyze.frame.scripts import run_script

if __name__ == "__main__":
    sys.exit(run_script("fim_diagonality", preset="paper", out="runs/masq_table2"))
