"""Forgetting against its bound by curvature and distance (Mirzadeh et al. 2020), over training regimes.

    python figures/regimes/forgetting_bound.py [RUN]

Draws from the results in RUN (default runs/regimes_forgetting_bound), and runs the analysis first if they are missing.
"""

import sys

from curvlab.analyze.frame.scripts import draw_script

if __name__ == "__main__":
    sys.exit(draw_script("forgetting_bound", preset="paper", out="runs/regimes_forgetting_bound"))
