"""Gepperth and Wiech (2019), Table 1 and Figures 1 to 5: EWC with MaSQ and with the FIM on three streams of MNIST.

    python analyses/masq/table1.py [OPTIONS of ewc_grid]

Eight smaller networks, all rates and strengths of the paper, three seeds: about 25 minutes on two cores. `--preset
paper` has its 36 networks. Results in runs/masq_table1; a finished run is printed again, an interrupted one continues.
Needs MNIST.
"""

import sys

from curvlab.analyze.frame.scripts import run_script

if __name__ == "__main__":
    sys.exit(run_script("ewc_grid", preset="cpu", out="runs/masq_table1"))
