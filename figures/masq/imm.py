"""The figure of IMM with MaSQ: accuracy over the weight of the second task.

    python figures/masq/imm.py [RUN]

Draws from the results in RUN (default runs/masq_imm), running the analysis first if there are none.
"""

import sys

from curvlab.analyze.frame.scripts import draw_script

if __name__ == "__main__":
    sys.exit(draw_script("imm_masq", preset="cpu", out="runs/masq_imm"))
