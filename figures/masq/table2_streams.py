"""The figures of Table 2 of Gepperth and Wiech (2019) for the three streams: sums and means, and parts of the matrices.

    python figures/masq/table2_streams.py [RUN]

Draws from the results in RUN (default runs/masq_table2_streams), running the analysis first if there are none.
"""

import sys

from curvlab.analyze.frame.scripts import draw_script

if __name__ == "__main__":
    sys.exit(draw_script("fim_diagonality", preset="streams", out="runs/masq_table2_streams"))
