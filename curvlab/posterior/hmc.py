"""Hamiltonian Monte Carlo with several chains, and convergence diagnostics.

References:
    Neal (2011), MCMC using Hamiltonian dynamics; Gelman et al. (2013), Bayesian data analysis, section 11.4 (split
    R-hat) and 11.5 (effective sample size); Geyer (1992), Practical Markov chain Monte Carlo (truncation).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from curvlab.checks import real_number, to_double, whole_number
from curvlab.errors import CurvlabError
from curvlab.posterior.update import LogDensity, evaluate_density

_FIRST_STEP = 0.05
_FEWEST = 4  # draws of a chain: a variance of each half needs two
_JITTER = 0.2  # relative change of the step size, so that no trajectory is a whole period


@dataclass(frozen=True)
class Draws:
    """Draws of several chains.

    Attributes:
        values: ``(draws, chains, P)``, float64.
        acceptance: Acceptance rate after warm-up.
        step_size: Step size found in warm-up.
    """

    values: Tensor
    acceptance: float
    step_size: float


def hamiltonian_monte_carlo(
    log_density: LogDensity,
    starts: Tensor,
    *,
    draws: int,
    warmup: int,
    leapfrog: int = 15,
    target: float = 0.8,
    seed: int = 0,
) -> Draws:
    """Return draws from a density over ``P`` parameters, with all chains in one batch.

    Args:
        log_density: Gives the logarithm of the density, up to a constant, as a scalar of ``(P,)``; differentiable.
        starts: Initial points of the chains, ``(chains, P)``.
        draws: Number of draws of each chain after warm-up, from 1.
        warmup: Number of warm-up draws, in which the step size is adapted; they are dropped.
        leapfrog: Number of leapfrog steps of a trajectory, from 1.
        target: Acceptance rate to which the step size is adapted, above 0 and below 1.
        seed: Seed of the momenta and of the acceptance, a whole number from 0.

    Raises:
        CurvlabError: A value is out of its range, or the density is not a finite scalar at a start.
    """
    draws, warmup = whole_number(draws, "draws", 1), whole_number(warmup, "warmup")
    leapfrog, target = whole_number(leapfrog, "leapfrog", 1), real_number(target, "target")
    if not 0 < target < 1:
        raise CurvlabError(f"target must be above 0 and below 1, not {target:g}")
    place = to_double(starts, "starts", ("chains", "P")).detach().clone()
    rng = np.random.default_rng(whole_number(seed, "seed"))
    for start in place:
        evaluate_density(log_density, start)
    # Recorded once as plain operations: going through vmap and grad at every step takes five times as long.
    every = torch.func.vmap(torch.func.grad_and_value(log_density))
    gradient = make_fx(lambda points: every(points))(place)  # make_fx inspects the signature
    slope, value = gradient(place)
    log_step, accepted, kept = math.log(_FIRST_STEP), [], []
    for iteration in range(warmup + draws):
        momentum = torch.from_numpy(rng.standard_normal(place.shape))
        step = math.exp(log_step) * (1 + _JITTER * rng.uniform(-1, 1))
        energy = value - momentum.square().sum(1) / 2
        new, new_slope, new_value = place, slope, value
        momentum = momentum + step / 2 * new_slope
        for i in range(leapfrog):
            new = new + step * momentum
            new_slope, new_value = gradient(new)
            momentum = momentum + (step if i < leapfrog - 1 else step / 2) * new_slope
        chance = (new_value - momentum.square().sum(1) / 2 - energy).exp().clamp(max=1).nan_to_num(0.0)
        taken = torch.from_numpy(rng.uniform(size=len(place))) < chance
        place, slope = (torch.where(taken[:, None], a, b) for a, b in ((new, place), (new_slope, slope)))
        value = torch.where(taken, new_value, value)
        if iteration < warmup:
            log_step += (float(chance.mean()) - target) / (iteration + 1) ** 0.6
        else:
            kept.append(place)
            accepted.append(float(taken.double().mean()))
    return Draws(torch.stack(kept), float(np.mean(accepted)), math.exp(log_step))


def split_rhat(values: Tensor) -> float:
    """Return the split R-hat of draws ``(draws, chains)`` of one number: near 1 where the chains agree.

    Every chain is split in halves. If no half varies, it is infinite where they differ, and NaN where all draws are
    equal: such draws say nothing about convergence.

    Raises:
        CurvlabError: The draws are not finite numbers ``(draws, chains)``, or fewer than four of a chain.

    Examples:
        >>> split_rhat(torch.tensor([[0.0, 5.0], [1.0, 6.0], [0.0, 5.0], [1.0, 6.0]]).double()) > 4
        True
    """
    values = _check_draws(values)
    half = len(values) // 2
    parts = torch.cat([values[:half], values[len(values) - half :]], 1)
    if bool((parts == parts[0]).all()):  # the variances of equal numbers may round to others than 0
        return math.nan if bool((parts[0] == parts[0, 0]).all()) else math.inf
    within, between = float(parts.var(0).mean()), float(parts.mean(0).var())
    return math.sqrt((half - 1) / half + between / within)


def effective_sample_size(values: Tensor) -> float:
    """Return the effective sample size of draws ``(draws, chains)`` of one number.

    Autocorrelations are summed up to the first negative sum of two neighbours. If no chain varies, it is NaN: the
    autocorrelations are 0/0.

    Raises:
        CurvlabError: The draws are not finite numbers ``(draws, chains)``, or fewer than four of a chain.
    """
    values = _check_draws(values)
    if bool((values == values[0]).all()):
        return math.nan
    length, chains = values.shape
    way = values - values.mean(0)
    spectrum = torch.fft.rfft(way, 2 * length, dim=0)
    covariance = torch.fft.irfft(spectrum.abs().square(), 2 * length, dim=0)[:length].mean(1) / length
    within = float(covariance[0]) * length / (length - 1)
    total = within * (length - 1) / length + (float(values.mean(0).var()) if chains > 1 else 0.0)
    correlation = (1 - (within - covariance * length / (length - 1)) / total).tolist()
    time = -1.0
    for lag in range(0, length - 1, 2):
        pair = correlation[lag] + correlation[lag + 1]
        if pair < 0:
            break
        time += 2 * pair
    return min(float(values.numel()), values.numel() / max(time, 1e-12))


def _check_draws(values: Tensor) -> Tensor:
    values = to_double(values, "draws of one number", ("draws", "chains"))
    if len(values) < _FEWEST:
        raise CurvlabError(f"convergence needs at least {_FEWEST} draws of each chain, not {len(values)}")
    return values
