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

from curvlab.posterior.laplace import LogDensity

_FIRST_STEP = 0.05
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
        draws: Number of draws of each chain after warm-up.
        warmup: Number of warm-up draws, in which the step size is adapted; they are dropped.
        leapfrog: Number of leapfrog steps of a trajectory.
        target: Acceptance rate to which the step size is adapted.
        seed: Seed of the momenta and of the acceptance.
    """
    rng = np.random.default_rng(seed)
    place = starts.detach().double().clone()
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

    Every chain is split in halves. If no chain varies, it is 1 if all chains are equal, else infinite.

    Examples:
        >>> split_rhat(torch.tensor([[0.0, 5.0], [1.0, 6.0], [0.0, 5.0], [1.0, 6.0]]).double()) > 4
        True
    """
    half = len(values) // 2
    parts = torch.cat([values[:half], values[len(values) - half :]], 1)
    within, between = float(parts.var(0).mean()), float(parts.mean(0).var())
    if within == 0:
        return 1.0 if between == 0 else math.inf
    return math.sqrt((half - 1) / half + between / within)


def effective_sample_size(values: Tensor) -> float:
    """Return the effective sample size of draws ``(draws, chains)`` of one number.

    Autocorrelations are summed up to the first negative sum of two neighbours.
    """
    length, chains = values.shape
    way = values - values.mean(0)
    spectrum = torch.fft.rfft(way, 2 * length, dim=0)
    covariance = torch.fft.irfft(spectrum.abs().square(), 2 * length, dim=0)[:length].mean(1) / length
    within = float(covariance[0]) * length / (length - 1)
    total = within * (length - 1) / length + (float(values.mean(0).var()) if chains > 1 else 0.0)
    if total == 0:
        return float(values.numel())
    correlation = (1 - (within - covariance * length / (length - 1)) / total).tolist()
    time = -1.0
    for lag in range(0, length - 1, 2):
        pair = correlation[lag] + correlation[lag + 1]
        if pair < 0:
            break
        time += 2 * pair
    return min(float(values.numel()), values.numel() / max(time, 1e-12))
