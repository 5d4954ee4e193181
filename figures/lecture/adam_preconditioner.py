"""The figures of Adam's second moment: against three diagonals over training, and of every parameter at its end.

    python figures/lecture/adam_preconditioner.py [RUN]

Draws from the results in RUN (default runs/adam_preconditioner), running the analysis first if there are none.
"""

import sys

from curvlab.analyze.frame.scripts import draw_script

if __name__ == "__main__":
    sys.exit(draw_script("adam_preconditioner", preset="cpu", out="runs/adam_preconditioner"))
