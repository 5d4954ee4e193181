"""The methods of continual learning, one a file."""

from curvlab.continual.strategies.base import Strategy
from curvlab.continual.strategies.naive import Naive

__all__ = ["Naive", "Strategy"]
