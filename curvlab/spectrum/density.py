"""The spectral density by stochastic Lanczos quadrature.

References:
    Golub and Meurant (2010), Matrices, Moments and Quadrature; Ubaru, Chen and Saad (2017), SIAM Journal on Matrix
    Analysis 38; Ghorbani, Krishnan and Xiao (2019), ICML; Chen, Trogdon and Ubaru (2021), ICML.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import pi, sqrt

import numpy as np
import torch
from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.progress import Advance, no_progress, progress
from curvlab.spectrum.arguments import check_real, check_real_tensor, check_whole, make_generator
from curvlab.spectrum.estimate import mean_and_error
from curvlab.spectrum.lanczos import Lanczos
from curvlab.spectrum.operator import Operator, Products

_LARGEST_FORMED = 5_000  # parameters; in float64 the matrix then takes 200 MB


@dataclass(frozen=True)
class SpectralDensity:
    """The distribution of the eigenvalues of a matrix, each with weight ``1/P``, estimated with random probes.

    A probe ``z`` has the weight ``(u_i' z)^2 / |z|^2`` on eigenvalue ``i``. Lanczos' method gives the Gauss quadrature
    of this weighted distribution, which is exact for polynomials of degree up to ``2 steps - 1``. The mean over probes
    is unbiased, and their spread gives the standard errors. The standard errors do not include the error of the finite
    number of steps, which ``resolution`` bounds.

    Attributes:
        nodes: ``(probes, steps)``, float64, ascending in each row. An exact density has one row with all eigenvalues.
        weights: ``(probes, steps)``; each row sums to 1. If a probe has fewer nodes, the last node is repeated with
            weight zero.
        size: ``P``, the number of eigenvalues.
        exact: Whether the nodes are all eigenvalues and not estimates; all errors are then zero.
        matvecs: Number of matrix-vector products.
        resolution: Upper bound on the Wasserstein distance caused by the finite number of steps (Jackson's theorem):
            ``pi (b - a) / (4 steps)`` with the outermost nodes ``a``, ``b``. The true distance is often far smaller.
    """

    nodes: Tensor
    weights: Tensor
    size: int
    exact: bool
    matvecs: int
    resolution: float

    def expectation(self, function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return the mean of a function over the eigenvalues, and its standard error.

        ``P`` times this mean is the trace of the function of the matrix.

        Args:
            function: Maps a tensor of eigenvalues ``(probes, steps)`` entry by entry to ``(..., probes, steps)``.

        Examples:
            >>> density = SpectralDensity(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.5, 0.5]]), 2, True, 2, 0.0)
            >>> value, error = density.expectation(torch.square)
            >>> float(value), float(error)
            (5.0, 0.0)
        """
        means = (self.weights * function(self.nodes)).sum(dim=-1).movedim(-1, 0)
        if self.exact:
            return means[0], torch.zeros_like(means[0])
        return mean_and_error(means)

    def pdf(self, points: Tensor, width: float, *, log: bool = False) -> tuple[Tensor, Tensor]:
        """Return the density at points, with a Gaussian for each eigenvalue, and its standard error.

        Args:
            points: ``(G,)``.
            width: Standard deviation of the Gaussians, in units of the eigenvalues, or in decades if ``log``.
            log: Return the density of ``log10 |lambda|`` instead, over the eigenvalues with the sign of the point.

        Raises:
            CurvlabError: The width is not positive, ``points`` is not a tensor, or a point is zero with ``log``.
        """
        points, width = check_real_tensor("points", points).to(self.nodes), check_real("width", width, above=0)
        if log and not bool(points.all()):
            raise CurvlabError("points must not contain zero on a logarithmic scale")

        def gaussians(nodes: Tensor) -> Tensor:
            at = points.view(-1, 1, 1)
            deviations = (nodes.abs() / at.abs()).log10() if log else nodes - at
            values = (-((deviations / width) ** 2) / 2).exp() / (width * sqrt(2 * pi))
            return values * (nodes.sign() == at.sign()) if log else values

        return self.expectation(gaussians)

    def cdf(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return the share of eigenvalues less than or equal to each of the points ``(G,)``, and its standard error.

        Raises:
            CurvlabError: ``points`` is not a real tensor.
        """
        at = check_real_tensor("points", points).to(self.nodes).view(-1, 1, 1)
        return self.expectation(lambda nodes: (nodes <= at).to(nodes))

    def wasserstein(self, eigenvalues: Tensor) -> tuple[float, float]:
        """Return the Wasserstein-1 distance to eigenvalues ``(n,)``, and the part that the probes explain.

        The distance is the area between the two cumulative distribution functions. The second number is the area under
        the standard error of the estimated function. It bounds the root mean square of the distance of an estimate to
        its expectation.

        Raises:
            CurvlabError: ``eigenvalues`` is not a real tensor.
        """
        eigenvalues = check_real_tensor("eigenvalues", eigenvalues)
        from scipy.stats import wasserstein_distance  # half a second, too slow for the start of every command

        nodes, weights = self.nodes.flatten().numpy(), self.weights.flatten().numpy()
        seen = weights > 0
        distance = wasserstein_distance(
            nodes[seen], eigenvalues.double().cpu().numpy(), weights[seen] / len(self.nodes)
        )
        steps = self.nodes.flatten().sort().values
        # In slices, because a comparison needs a bit for each node of each probe at each point.
        errors = torch.cat([self.cdf(some)[1] for some in steps[:-1].split(256)]) if len(steps) > 1 else steps[:0]
        return float(distance), float(errors @ steps.diff())


def spectral_density(
    operator: Operator, *, probes: int = 10, steps: int = 100, seed: int = 0, progress: bool = False
) -> SpectralDensity:
    """Return the spectral density by stochastic Lanczos quadrature, with its error.

    A matrix with at most ``probes * steps`` and at most 5,000 parameters is formed, because this takes no more
    products; its density is then exact.

    Args:
        operator: Any symmetric matrix with ``shape``, ``dtype``, ``device`` and ``matvec``.
        probes: Number of random sign vectors; the standard error scales as ``1 / sqrt(probes * P)``.
        steps: Largest number of products per probe, and number of vectors in memory. A probe takes fewer steps if its
            Krylov space is exhausted.
        seed: Random seed of the probes.
        progress: Show a progress bar on a terminal.

    Raises:
        CurvlabError: An argument is not valid, a product is not finite, or the operator is not symmetric.

    Examples:
        >>> from curvlab.matrices import Diagonal, Info
        >>> from curvlab.parameters import ParameterSpace
        >>> space, info = ParameterSpace(("w",), ((2000,),)), Info("", "diag", "", "", 1)
        >>> density = spectral_density(Diagonal(torch.linspace(0, 1, 2000), space, info), probes=2, steps=20)
        >>> mean, error = density.expectation(lambda values: values)
        >>> bool(abs(mean - 0.5) < 3 * error + 1e-6)
        True
    """
    products, generator = Products(operator), make_generator(seed)
    probes, steps = check_probes(probes, steps)
    if is_small(products, probes, steps):
        nodes = exact_eigenvalues(products)[0].unsqueeze(0)
        weights = torch.full_like(nodes, 1 / products.size)
        return SpectralDensity(nodes, weights, products.size, True, products.count, 0.0)
    rules = []
    with _bar("spectral density", probes * steps, progress) as advance:
        for lanczos in iterate_quadratures(products, probes, steps, generator, advance):
            found, shares = gauss_rule(lanczos.matrix)
            rules.append((products.unscale(found), shares, is_exhausted(lanczos, products)))
    longest = max(len(nodes) for nodes, _, _ in rules)
    padded_nodes = [np.pad(nodes, (0, longest - len(nodes)), mode="edge") for nodes, _, _ in rules]
    padded_weights = [np.pad(weights, (0, longest - len(weights))) for _, weights, _ in rules]
    # A probe whose Krylov space is exhausted has no quadrature error.
    bounds = [0.0 if whole else pi * (nodes[-1] - nodes[0]) / (4 * len(nodes)) for nodes, _, whole in rules]
    return SpectralDensity(
        torch.from_numpy(np.stack(padded_nodes)),
        torch.from_numpy(np.stack(padded_weights)),
        products.size,
        False,
        products.count,
        float(np.mean(bounds)),
    )


_bar = progress  # ``spectral_density`` has an argument with the name of this function


def check_probes(probes: int, steps: int) -> tuple[int, int]:
    """Check the numbers of probes and steps.

    Raises:
        CurvlabError: They are not whole numbers, or there are fewer than two probes or no steps.
    """
    probes = check_whole("probes", probes, 0)
    if probes < 2:
        raise CurvlabError(f"probes must be at least 2, not {probes}: one probe gives no standard error")
    return probes, check_whole("steps", steps, 1)


def is_small(products: Products, probes: int, steps: int) -> bool:
    """Return whether forming the matrix takes no more products than the probes, and little memory."""
    return products.size <= min(probes * steps, _LARGEST_FORMED)


def exact_eigenvalues(products: Products) -> tuple[Tensor, float]:
    """Return all eigenvalues ``(P,)`` in float64, and the largest asymmetry of the products.

    Raises:
        CurvlabError: The matrix is not symmetric.
    """
    matrix = torch.stack([column.double().cpu() for column in iterate_columns(products)])
    noise, largest = float((matrix - matrix.mT).abs().max()), float(matrix.abs().max())
    if noise > 10 * sqrt(products.eps) * largest:
        raise CurvlabError(
            f"the operator is not symmetric, or changes between products: two entries that should be equal differ "
            f"by {noise:.2g}, and the largest entry is {largest:.2g}; make it symmetric and deterministic"
        )
    return torch.linalg.eigvalsh(matrix / 2 + matrix.mT / 2), noise


def iterate_columns(products: Products) -> Iterator[Tensor]:
    """Yield the columns of the matrix, ``(P,)`` each, as products with unit vectors."""
    for i in range(products.size):
        yield products.column(i)


def iterate_quadratures(
    products: Products, probes: int, steps: int, generator: np.random.Generator, advance: Advance = no_progress
) -> Iterator[Lanczos]:
    """Yield a Lanczos basis for each probe, with ``steps`` steps or until its Krylov space is exhausted."""
    for _ in range(probes):
        lanczos = Lanczos(products, steps, products.signs(generator), generator)
        while True:
            lanczos.step()
            advance()
            # After the Krylov space is exhausted, the basis would continue with directions outside of it.
            if lanczos.full or is_exhausted(lanczos, products):
                break
        advance(steps - lanczos.size)
        yield lanczos


def is_exhausted(lanczos: Lanczos, products: Products) -> bool:
    """Return whether the last product has only rounding errors outside the basis."""
    rounding = 50 * torch.finfo(products.dtype).eps * float(np.abs(lanczos.matrix).max())
    return lanczos.beta <= rounding


def gauss_rule(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the nodes and weights of the Gauss quadrature of a Lanczos matrix (Golub and Welsch, 1969)."""
    nodes, vectors = np.linalg.eigh(matrix)
    return nodes, vectors[0] ** 2
