"""Methods of continual learning, one class per file.

Stable SGD is ``Naive`` with the options of a ``curvlab.continual.Regime``; DER++ is ``DER`` with ``beta``.
"""

from curvlab.continual.strategies.agem import AGEM
from curvlab.continual.strategies.base import Strategy
from curvlab.continual.strategies.der import DER
from curvlab.continual.strategies.dlcft import DLCFT
from curvlab.continual.strategies.er import ER
from curvlab.continual.strategies.ewc import EWC
from curvlab.continual.strategies.imm import IMM
from curvlab.continual.strategies.joint import Joint
from curvlab.continual.strategies.l2 import L2
from curvlab.continual.strategies.linear_probe import LinearProbe
from curvlab.continual.strategies.lwf import LwF
from curvlab.continual.strategies.mas import MAS
from curvlab.continual.strategies.naive import Naive
from curvlab.continual.strategies.oracle import Oracle
from curvlab.continual.strategies.osla import OSLA
from curvlab.continual.strategies.si import SI

__all__ = [
    "AGEM",
    "DER",
    "DLCFT",
    "ER",
    "EWC",
    "IMM",
    "L2",
    "MAS",
    "OSLA",
    "SI",
    "Joint",
    "LinearProbe",
    "LwF",
    "Naive",
    "Oracle",
    "Strategy",
]
