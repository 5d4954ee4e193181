"""Does stored curvature forecast what a network forgets, and which structure is worth its cost?

    python analyses/regimes/forgetting_forecast.py [OPTIONS of forgetting_forecast]

Four methods on rotated and permuted MNIST, ten tasks, five seeds: about two hours on one core; --preset cpu takes ten
minutes. Results in runs/regimes_forgetting_forecast; a finished run is printed again, an interrupted one continues.
Needs MNIST.
"""

import sys

from curvlab.analyze.frame.scripts import run_script

if __name__ == "__main__":
    sys.exit(run_script("forgetting_forecast", preset="paper", out="runs/regimes_forgetting_forecast"))
