"""The figure of Table 2 of Mirzadeh et al. (2020): accuracy and forgetting of each method, with published values.

    python figures/regimes/table2.py [RUN]

Draws from the results in RUN (default runs/regimes_table2), and runs the analysis first if they are missing.
"""

import sys

from curvlab.analyze.frame.scripts import draw_script

if __name__ == "__main__":
    sys.exit(draw_script("methods", preset="paper", out="runs/regimes_table2", figures=["accuracy_and_forgetting"]))
