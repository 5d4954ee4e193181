"""Fig. 3 of Mirzadeh et al. (2020): accuracies, eigenvalues and distances of stable and plastic training.

    python figures/regimes/figure3.py [RUN]

Draws from the results in RUN (default runs/regimes_figure3), and runs the analysis first if they are missing.
"""

import sys

from curvlab.analyze.frame.scripts import draw_script

if __name__ == "__main__":
    sys.exit(draw_script("training_regimes", preset="paper", out="runs/regimes_figure3"))
