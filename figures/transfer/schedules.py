"""Learning curves of six schedules at their best, and what the initial rate does to accuracy and curvature.

    python figures/transfer/schedules.py [RUN]

Draws from the results in RUN (default runs/transfer_schedules), running the analysis first if there are none.
"""

import sys

from curvlab.analyze.frame.scripts import draw_script

if __name__ == "__main__":
    sys.exit(draw_script("lr_schedules", preset="paper", out="runs/transfer_schedules"))
