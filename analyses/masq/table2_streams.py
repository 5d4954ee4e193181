"""Gepperth and Wiech (2019), Table 2 "for all SLTs": how diagonal is the Fisher after D1 of D5-5, D9-1 and DP10-10?

    python analyses/masq/table2_streams.py [OPTIONS of fim_diagonality]

The paper's configuration over three seeds for each of the three streams: about 30 minutes on two cores. Results in
runs/masq_table2_streams; a finished run is printed again, an interrupted one continues. Needs MNIST.
"""

import sys

from curvlab.analyze.frame.scripts import run_script

if __name__ == "__main__":
    sys.exit(run_script("fim_diagonality", preset="streams", out="runs/masq_table2_streams"))
