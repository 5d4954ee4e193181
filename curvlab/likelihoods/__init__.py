"""Likelihoods: what a loss says about the targets of a term, and the curvature of this with respect to the outputs.

The built-in ones, with their names where a text is wanted:

======================== ==================================== ==========================
class                    loss of a term                       Hessian and Fisher
======================== ==================================== ==========================
CrossEntropy             ``-sum_c w_c q_c log p_c``           ``m (diag(p) - p p')``
SquaredError             ``||f - y||^2 / (2 variance)``       ``1 / variance``
BinaryCrossEntropy       ``-w y log p - (1 - y) log(1 - p)``  ``a p (1 - p)``
Poisson                  ``exp(f) - y f``                     ``exp(f)``
HeteroscedasticGaussian  ``(s + (y - m)^2 exp(-s)) / 2``      Fisher ``exp(-s)``, ``1/2``
FromFunction             ``nll(f, y)``                        by differentiation
======================== ==================================== ==========================
"""

from curvlab.likelihoods.base import Likelihood
from curvlab.likelihoods.bernoulli import BinaryCrossEntropy
from curvlab.likelihoods.categorical import CrossEntropy
from curvlab.likelihoods.function import FromFunction
from curvlab.likelihoods.gaussian import HeteroscedasticGaussian, SquaredError
from curvlab.likelihoods.names import LIKELIHOODS, LossName, get_likelihood
from curvlab.likelihoods.poisson import Poisson
from curvlab.likelihoods.terms import Terms

__all__ = [
    "LIKELIHOODS",
    "BinaryCrossEntropy",
    "CrossEntropy",
    "FromFunction",
    "HeteroscedasticGaussian",
    "Likelihood",
    "LossName",
    "Poisson",
    "SquaredError",
    "Terms",
    "get_likelihood",
]
