"""The curves of Shon et al. (2022), "DLCFT": the largest eigenvalue of the curvature during training, with each loss.

    python figures/dlcft/curvature.py [RUN]

Draws from the results in RUN (default runs/dlcft_curvature), and runs the analysis first if they are missing. If
runs failed, the figures say so.
"""

import sys

from curvlab.analyze.frame.scripts import draw_script

if __name__ == "__main__":
    sys.exit(
        draw_script("eigenvalues", preset="paper", out="runs/dlcft_curvature", figures=("eigenvalues", "normalised"))
    )
