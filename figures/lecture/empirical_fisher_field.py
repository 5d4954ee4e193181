"""Figure 1 of Kunstner et al. (2019): the data, and three vector fields with their trajectories.

    python figures/lecture/empirical_fisher_field.py [RUN]

Draws from the results in RUN (default runs/empirical_fisher_field), running the analysis first if there are none.
"""

import sys

from curvlab.analyze.frame.scripts import draw_script

if __name__ == "__main__":
    sys.exit(draw_script("empirical_fisher_field", preset="default", out="runs/empirical_fisher_field"))
