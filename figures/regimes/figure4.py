"""Fig. 4 of Mirzadeh et al. (2020): accuracy on the tasks so far and on the first task, over 20 tasks.

    python figures/regimes/figure4.py [RUN]

Draws from the results in RUN (default runs/regimes_table2), and runs the analysis first if they are missing.
"""

import sys

from curvlab.analyze.frame.scripts import draw_script

if __name__ == "__main__":
    sys.exit(draw_script("methods", preset="paper", out="runs/regimes_table2", figures=["accuracy_curves"]))
