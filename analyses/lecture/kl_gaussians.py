"""Carta, "Regularization Priors", slides on the Kullback-Leibler divergence: equal steps, unequal divergences.

    python analyses/lecture/kl_gaussians.py [OPTIONS of kl_gaussians]

KL divergences of Gaussians, the Gaussian closest to a mixture of two in either direction, and the Fisher as the KL's
Hessian, over three seeds, with each claim's verdict. Results in runs/kl_gaussians; a finished run is printed again.
"""

import sys

from curvlab.analyze.frame.scripts import run_script

if __name__ == "__main__":
    sys.exit(run_script("kl_gaussians", preset="default", out="runs/kl_gaussians"))
