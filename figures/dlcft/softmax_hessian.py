"""The Hessian of the softmax loss at random logits, and the curvature of a network during training (Shon et al. 2022).

    python figures/dlcft/softmax_hessian.py [RUN]

Draws from the results in RUN (default runs/softmax_hessian), and runs the analysis first if they are missing.
"""

import sys

from curvlab.analyze.frame.scripts import draw_script

if __name__ == "__main__":
    sys.exit(draw_script("softmax_hessian", preset="cpu", out="runs/softmax_hessian"))
