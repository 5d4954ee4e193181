"""Forecasts of forgetting beside what was measured, and against their cost.

    python figures/regimes/forgetting_forecast.py [RUN]

Draws from the results in RUN (default runs/regimes_forgetting_forecast), running the analysis first if there are none.
"""

import sys

from curvlab.analyze.frame.scripts import draw_script

if __name__ == "__main__":
    sys.exit(draw_script("forgetting_forecast", preset="paper", out="runs/regimes_forgetting_forecast"))
