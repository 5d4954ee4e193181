"""IMM with MaSQ, the future work of Gepperth and Wiech (2019): solutions of two tasks merged by mean, FIM and MaSQ.

    python analyses/masq/imm.py [OPTIONS of imm_masq]

Three streams of MNIST, network 784-200-200-10, three transfers, three seeds: about 3 minutes on two cores. Results in
runs/masq_imm; a finished run is printed again, an interrupted one continues. Needs MNIST.
"""

import sys

from curvlab.analyze.frame.scripts import run_script

if __name__ == "__main__":
    sys.exit(run_script("imm_masq", preset="cpu", out="runs/masq_imm"))
