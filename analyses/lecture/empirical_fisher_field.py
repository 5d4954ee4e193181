"""Kunstner et al. (2019), Figure 1: three vector fields of a linear regression.

    python analyses/lecture/empirical_fisher_field.py [OPTIONS of empirical_fisher_field]

Gradient, natural gradient and the gradient preconditioned by the empirical Fisher, with the samples and steps of the
authors' code, over three seeds. Results in runs/empirical_fisher_field; a finished run is printed again.
"""

import sys

from curvlab.analyze.frame.scripts import run_script

if __name__ == "__main__":
    sys.exit(run_script("empirical_fisher_field", preset="default", out="runs/empirical_fisher_field"))
