"""The Hessian of the softmax loss at random logits, and a network's curvature in training (Shon et al. 2022).

    python figures/dlcft/softmax_hessian.py [RUN]

Draws from the results in RUN (default runs/softmax_hessian), running the analysis first if there are none.
"""

import sys

from curvlab.analyze.frame.scripts import draw_script

if __name__ == "__main__":
    sys.exit(draw_script("softmax_hessian", preset="cpu", out="runs/softmax_hessian"))
