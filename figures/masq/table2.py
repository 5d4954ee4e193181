"""The figure of Table 2 of Gepperth and Wiech (2019): sums and means on and off the diagonal, with published values.

    python figures/masq/table2.py [RUN]

Draws from the results in RUN (default runs/masq_table2), and runs the analysis first if they are missing.
"""

import sys

from curvlab.analyze.frame.scripts import draw_script

if __name__ == "__main__":
    sys.exit(draw_script("fim_diagonality", preset="paper", out="runs/masq_table2"))
