"""Shon et al. (2022), "DLCFT", Table 5: three curvatures, with the non-linear network and with the linear one.

    python analyses/dlcft/table5.py [OPTIONS of dlcft]

The MNIST version (--preset cpu), and joint training of both networks; Table 5 is printed in its own shape. Results are
in runs/dlcft_table5; a finished run is printed again, an interrupted run continues. Needs MNIST. With another --out:
--preset cpu-cifar100, or --preset paper for a machine with a GPU.
"""

import sys

from curvlab.analyze.frame.scripts import run_script

METHODS = ("ewc", "osla", "osla_tkfac", "dlcft_diag", "dlcft_kfac", "dlcft_tkfac", "joint", "joint_linear")

if __name__ == "__main__":
    options = ("--settings", "data", "--methods", *METHODS)
    sys.exit(run_script("dlcft", preset="cpu", out="runs/dlcft_table5", options=options))
