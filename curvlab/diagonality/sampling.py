"""Unbiased estimate, with an interval, of the absolute off-diagonal sum of a block that is too large to sum exactly.

A draw selects one tile, with probability approximately proportional to its absolute sum, and within it a strip of rows,
by systematic sampling with probabilities proportional to the scales of the positions. Its Hansen-Hurwitz term
``(strip sum / inclusion) / probability`` is unbiased for any probabilities that are positive wherever the sum is; good
probabilities reduce the variance. The absolute sum of a tile is predicted from its signed sum, its Frobenius norm
(estimated with random forms ``u' T v``) and an upper bound, which are computed for all tiles at once. A log-linear fit
on a small pilot sample, which is not used further, combines them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch
from torch import Tensor

from curvlab.diagonality.blocks import Block, Draw
from curvlab.progress import Advance

_FORMS = 24
_PILOT = 200
_ROUND = 200
_MIN_DRAWS = 600
_STRIP = 48
_NORMAL_975 = 1.959963984540054

_Pairs = tuple[np.ndarray, np.ndarray]  # the groups of every tile ``o <= p``


@dataclass(frozen=True)
class SampledSums:
    """Estimated sums over the off-diagonal entries, each with the half-width of its 95 % interval."""

    abs_sum: float
    abs_sum_ci95: float
    square_sum: float
    square_sum_ci95: float
    draws: int


def sample_off_diagonal(
    block: Block, precision: float, max_operations: float, seed: int, advance: Advance
) -> SampledSums:
    """Estimate the absolute and the squared off-diagonal sums.

    Args:
        block: The block.
        precision: Stop when the half-width of the 95 % interval is at most this fraction of the absolute sum.
        max_operations: Stop in any case after approximately this number of operations.
        seed: Seed of the draws; the same seed gives the same result.
        advance: Called with the fraction done, one in total.
    """
    rng = np.random.default_rng(seed)
    pairs = np.triu_indices(block.groups)
    features = _features(block, pairs, rng)
    bounds = features[:, 2]
    strip = _StripSampler(block.column_scales(), rng)

    guess = _mixture(np.sqrt(features[:, 1] * bounds), bounds)
    pilot = list(_draw(block, pairs, guess, _PILOT, strip, rng))
    within = np.equal(*pairs)
    fitted = _fit(features, within, np.array([t.index for t in pilot]), np.array([t.abs_sum for t in pilot]))
    probability = _mixture(fitted, bounds)

    terms = np.empty((0, 2))
    used, done = 0.0, 0.0
    while True:
        drawn = list(_draw(block, pairs, probability, _ROUND, strip, rng))
        used += sum(term.operations for term in drawn)
        new = [(t.abs_sum / probability[t.index], t.square_sum / probability[t.index]) for t in drawn]
        terms = np.concatenate([terms, new])
        mean = terms.mean(axis=0)
        half = _NORMAL_975 * terms.std(axis=0, ddof=1) / sqrt(len(terms))
        enough = len(terms) >= _MIN_DRAWS and half[0] <= precision * mean[0]
        share = min(1.0, max(used / max_operations, len(terms) / _needed(half[0], mean[0], precision, len(terms))))
        advance(max(0.0, share - done))
        done = max(done, share)
        if enough or used >= max_operations:
            break
    return SampledSums(float(mean[0]), float(half[0]), float(mean[1]), float(half[1]), len(terms))


def _needed(half: float, mean: float, precision: float, draws: int) -> float:
    return max(_MIN_DRAWS, draws * (half / (precision * mean)) ** 2) if mean > 0 else _MIN_DRAWS


@dataclass(frozen=True)
class _Term:
    """Index of a drawn tile and its estimated sums over both triangles."""

    index: int
    abs_sum: float
    square_sum: float
    operations: float


def _features(block: Block, pairs: _Pairs, rng: np.random.Generator) -> np.ndarray:
    """Return, for every tile ``o <= p``: |signed sum|, estimated Frobenius norm, upper bound; zeros for a zero tile."""
    ones = torch.ones_like(block.column_scales()).unsqueeze(0)
    signs = torch.as_tensor(rng.choice([-1.0, 1.0], size=(2, _FORMS, block.width))).to(ones)
    # For non-negative inputs, the constant direction has a large part of the norm: it is computed exactly, and random
    # forms estimate the rest.
    unit = ones / sqrt(block.width)
    left, right = (s - (s @ unit.mT) @ unit for s in signs)
    signed = next(iter(block.tile_forms(ones, ones)))
    squares = (signed / block.width).square()
    half = _FORMS // 2
    for form in block.tile_forms(unit.expand(half, -1), right[:half]):
        squares += 2 * form.square() / half
    for form in block.tile_forms(left[half:], right[half:]):
        squares += form.square() / (_FORMS - half)
    columns = (signed.abs(), squares.sqrt(), block.tile_bounds())
    return np.stack([c.double().cpu().numpy()[pairs] for c in columns], axis=1)


def _mixture(weights: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Return probabilities with a part proportional to the bound, so that no tile is missed or dominates."""
    shares: np.ndarray = bounds / bounds.sum()
    return 0.95 * weights / weights.sum() + 0.05 * shares if weights.any() else shares


def _fit(features: np.ndarray, within: np.ndarray, index: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Return predicted sums of all tiles from a log-linear least-squares fit on the pilot sample.

    Tiles within one group, on the diagonal, have their own intercept, because all their terms have the same sign.
    """
    floor = 1e-6 * features[:, 2:]
    logs = np.log(np.maximum(features, floor) + np.finfo(float).tiny)
    design = np.column_stack([logs, within, np.ones(len(logs))])
    positive = sums > 0
    if positive.sum() < 2 * design.shape[1]:
        return features[:, 2]
    coefficients, *_ = np.linalg.lstsq(design[index[positive]], np.log(sums[positive]), rcond=None)
    predicted: np.ndarray = np.where(features[:, 2] > 0, np.exp(design @ coefficients), 0.0)
    return predicted


class _StripSampler:
    """Systematic sampling of positions with probability proportional to their scale (Madow 1949)."""

    def __init__(self, scales: Tensor, rng: np.random.Generator) -> None:
        weights = scales.double().cpu().numpy()
        self.rng = rng
        self.order = weights.argsort()
        alive = weights[self.order]
        inclusion = np.zeros_like(alive)
        size = min(_STRIP, int((alive > 0).sum()))
        certain = np.zeros(len(alive), dtype=bool)
        while True:  # positions above one are always included; the others share the rest
            rest = ~certain & (alive > 0)
            inclusion[certain] = 1.0
            inclusion[rest] = alive[rest] * (size - certain.sum()) / alive[rest].sum() if rest.any() else 0.0
            over = rest & (inclusion >= 1.0)
            if not over.any():
                break
            certain |= over
        self.inclusion = inclusion
        self.cumulative = inclusion.cumsum()

    def __call__(self) -> tuple[np.ndarray, np.ndarray]:
        """Return positions and their inclusion probabilities."""
        count = round(self.cumulative[-1])
        points = self.rng.random() + np.arange(count)
        hit = np.unique(np.minimum(np.searchsorted(self.cumulative, points, side="right"), len(self.order) - 1))
        hit = hit[self.inclusion[hit] > 0]
        return self.order[hit], self.inclusion[hit]


def _draw(
    block: Block, pairs: _Pairs, weights: np.ndarray, count: int, strip: _StripSampler, rng: np.random.Generator
) -> Iterator[_Term]:
    first, second = pairs
    index = rng.choice(len(weights), size=count, p=weights / weights.sum())
    strips = [strip() for _ in range(count)]
    draws = [
        Draw(int(first[i]), int(second[i]), torch.as_tensor(positions))
        for i, (positions, _) in zip(index, strips, strict=True)
    ]
    for i, draw, (_, inclusion), tile in zip(index, draws, strips, block.strips(draws), strict=True):
        if draw.first == draw.second:
            tile[torch.arange(len(draw.rows)), draw.rows] = 0
        times = 1 if draw.first == draw.second else 2
        weight = times / torch.as_tensor(inclusion, device=tile.device)
        yield _Term(
            int(i),
            float((tile.abs().sum(dim=1) * weight).sum()),
            float((tile.square().sum(dim=1) * weight).sum()),
            block.strip_operations(draw),
        )
