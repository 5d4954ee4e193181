"""The figures of EWC with five kinds of Fisher: accuracy over the strength, as estimated and scaled to one trace.

    python figures/masq/fisher_variants.py [RUN]

Draws from the results in RUN (default runs/masq_fisher_variants), running the analysis first if there are none.
"""

import sys

from curvlab.analyze.frame.scripts import draw_script

if __name__ == "__main__":
    sys.exit(draw_script("fisher_variants", preset="cpu", out="runs/masq_fisher_variants"))
