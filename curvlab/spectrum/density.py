"""The density of eigenvalues by stochastic Lanczos quadrature.

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
from curvlab.spectrum.arguments import generator_of, real, real_tensor, whole
from curvlab.spectrum.estimate import mean_and_error
from curvlab.spectrum.lanczos import Lanczos
from curvlab.spectrum.operator import Operator, Products

_LARGEST_FORMED = 5_000  # parameters; in float64 the matrix then takes 200 MB


@dataclass(frozen=True)
class SpectralDensity:
    """The eigenvalues of a matrix as a distribution, each with weight ``1/P``, seen by random probes.

    A probe ``z`` sees eigenvalue ``i`` with the weight ``(u_i' z)^2 / |z|^2``, and Lanczos' method gives the Gauss
    quadrature of what it sees: a polynomial of degree up to ``2 steps - 1`` is averaged exactly. The mean over probes
    is unbiased, and their spread is the error that is stated everywhere; it does not know of the finite number of
    steps, of which ``resolution`` does.

    Attributes:
        nodes: ``(probes, steps)``, float64, ascending in each row; an exact density has one row, all eigenvalues.
        weights: Likewise; each row sums to 1. Where a probe has fewer nodes, the last is repeated with weight zero.
        size: ``P``, the number of eigenvalues.
        exact: Whether these are all eigenvalues, not estimates; all errors are zero then.
        matvecs: Products taken.
        resolution: The Wasserstein distance that the finite number of steps can make, at most (Jackson's theorem):
            ``pi (b - a) / (4 steps)`` with the outermost nodes ``a``, ``b``. Often far less.
    """

    nodes: Tensor
    weights: Tensor
    size: int
    exact: bool
    matvecs: int
    resolution: float

    def expectation(self, function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return the mean of a function over the eigenvalues, and its standard error.

        ``P`` times that is the trace of the function of the matrix.

        Args:
            function: Of a tensor of eigenvalues, entry by entry; its values are ``(..., probes, steps)``.

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
        """Return the density at points, every eigenvalue drawn as a Gaussian, and its standard error.

        Args:
            points: ``(G,)``.
            width: Standard deviation of the Gaussians: in the eigenvalues, or in decades if ``log``.
            log: The density of ``log10 |lambda|`` instead, over eigenvalues with the sign of the point.

        Raises:
            CurvlabError: The width is not positive, points are no tensor, or one is zero on the logarithmic scale.
        """
        points, width = real_tensor("points", points).to(self.nodes), real("width", width, above=0)
        if log and not bool(points.all()):
            raise CurvlabError("a logarithmic scale has no zero: leave it out of the points")

        def gaussians(nodes: Tensor) -> Tensor:
            at = points.view(-1, 1, 1)
            deviations = (nodes.abs() / at.abs()).log10() if log else nodes - at
            values = (-((deviations / width) ** 2) / 2).exp() / (width * sqrt(2 * pi))
            return values * (nodes.sign() == at.sign()) if log else values

        return self.expectation(gaussians)

    def cdf(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return the share of eigenvalues that are at most each of the points ``(G,)``, and its standard error.

        Raises:
            CurvlabError: Points are no tensor of real numbers.
        """
        at = real_tensor("points", points).to(self.nodes).view(-1, 1, 1)
        return self.expectation(lambda nodes: (nodes <= at).to(nodes))

    def wasserstein(self, eigenvalues: Tensor) -> tuple[float, float]:
        """Return the Wasserstein-1 distance to eigenvalues ``(n,)``, and what of it the probes' spread explains.

        The distance is the area between the two distribution functions. The second number is the area under the
        standard error of ours: the root mean square of the distance of an estimate to its expectation is at most that.

        Raises:
            CurvlabError: The eigenvalues are no tensor of real numbers.
        """
        eigenvalues = real_tensor("eigenvalues", eigenvalues)
        from scipy.stats import wasserstein_distance  # half a second, which every command would take longer to start

        nodes, weights = self.nodes.flatten().numpy(), self.weights.flatten().numpy()
        seen = weights > 0
        distance = wasserstein_distance(
            nodes[seen], eigenvalues.double().cpu().numpy(), weights[seen] / len(self.nodes)
        )
        steps = self.nodes.flatten().sort().values
        # In slices: a comparison has a bit for each node of each probe at each point.
        errors = torch.cat([self.cdf(some)[1] for some in steps[:-1].split(256)]) if len(steps) > 1 else steps[:0]
        return float(distance), float(errors @ steps.diff())


def spectral_density(
    operator: Operator, *, probes: int = 10, steps: int = 100, seed: int = 0, progress: bool = False
) -> SpectralDensity:
    """Return the density of the eigenvalues by stochastic Lanczos quadrature, with its error.

    A matrix of at most ``probes * steps`` and at most 5,000 parameters is formed from as many products as it has
    parameters, which are no more: its density is exact.

    Args:
        operator: Any symmetric matrix with ``shape``, ``dtype``, ``device`` and ``matvec``.
        probes: Random vectors of signs; the error goes with the inverse root of ``probes * P``.
        steps: Products a probe, at most; as many vectors are held. Fewer are taken where a probe has seen all it can.
        seed: Of the probes.
        progress: Show a progress bar on a terminal.

    Raises:
        CurvlabError: An argument is not right; a product is not finite; the operator is not symmetric.

    Examples:
        >>> from curvlab.matrices import Diagonal, Info
        >>> from curvlab.parameters import ParameterSpace
        >>> space, info = ParameterSpace(("w",), ((2000,),)), Info("", "diag", "", "", 1)
        >>> density = spectral_density(Diagonal(torch.linspace(0, 1, 2000), space, info), probes=2, steps=20)
        >>> mean, error = density.expectation(lambda values: values)
        >>> bool(abs(mean - 0.5) < 3 * error + 1e-6)
        True
    """
    products, generator = Products(operator), generator_of(seed)
    probes, steps = check_probes(probes, steps)
    if small(products, probes, steps):
        nodes = eigenvalues_of_formed(products)[0].unsqueeze(0)
        weights = torch.full_like(nodes, 1 / products.size)
        return SpectralDensity(nodes, weights, products.size, True, products.count, 0.0)
    rules = []
    with _bar("spectral density", probes * steps, progress) as advance:
        for lanczos in quadratures(products, probes, steps, generator, advance):
            found, shares = gauss(lanczos.matrix)
            rules.append((products.restored(found), shares, exhausted(lanczos, products)))
    longest = max(len(nodes) for nodes, _, _ in rules)
    padded_nodes = [np.pad(nodes, (0, longest - len(nodes)), mode="edge") for nodes, _, _ in rules]
    padded_weights = [np.pad(weights, (0, longest - len(weights))) for _, weights, _ in rules]
    # A probe whose Krylov space is exhausted has no error of quadrature.
    bounds = [0.0 if whole else pi * (nodes[-1] - nodes[0]) / (4 * len(nodes)) for nodes, _, whole in rules]
    return SpectralDensity(
        torch.from_numpy(np.stack(padded_nodes)),
        torch.from_numpy(np.stack(padded_weights)),
        products.size,
        False,
        products.count,
        float(np.mean(bounds)),
    )


_bar = progress  # the argument of ``spectral_density`` hides the function's name there


def check_probes(probes: int, steps: int) -> tuple[int, int]:
    """Return numbers of probes and steps that a density, and its error, can be had from.

    Raises:
        CurvlabError: They are not whole, or there are fewer than two probes, or no steps.
    """
    probes = whole("probes", probes, 0)
    if probes < 2:
        raise CurvlabError(f"probes must be at least 2, not {probes}: one tells nothing of its error")
    return probes, whole("steps", steps, 1)


def small(products: Products, probes: int, steps: int) -> bool:
    """Return whether forming the matrix takes no more products than the probes, and little room."""
    return products.size <= min(probes * steps, _LARGEST_FORMED)


def eigenvalues_of_formed(products: Products) -> tuple[Tensor, float]:
    """Return all eigenvalues ``(P,)`` in float64, and the deviation from symmetry that the products have.

    Raises:
        CurvlabError: The matrix is not symmetric.
    """
    matrix = torch.stack([column.double().cpu() for column in columns(products)])
    noise, largest = float((matrix - matrix.mT).abs().max()), float(matrix.abs().max())
    if noise > 10 * sqrt(products.eps) * largest:
        raise CurvlabError(
            f"the operator is not symmetric, or not the same at every product: two entries that should agree differ "
            f"by {noise:.2g}, where the largest is {largest:.2g}"
        )
    return torch.linalg.eigvalsh(matrix / 2 + matrix.mT / 2), noise


def columns(products: Products) -> Iterator[Tensor]:
    """Yield the columns of the matrix, ``(P,)`` each: the products with the unit vectors."""
    for i in range(products.size):
        yield products.column(i)


def quadratures(
    products: Products, probes: int, steps: int, generator: np.random.Generator, advance: Advance = no_progress
) -> Iterator[Lanczos]:
    """Yield a Lanczos basis for each probe, of that many steps or until its Krylov space is exhausted."""
    for _ in range(probes):
        lanczos = Lanczos(products, steps, products.signs(generator), generator)
        while True:
            lanczos.step()
            advance()
            # Where nothing of the probe is left, the basis would go on with a direction that the probe has not.
            if lanczos.full or exhausted(lanczos, products):
                break
        advance(steps - lanczos.size)
        yield lanczos


def exhausted(lanczos: Lanczos, products: Products) -> bool:
    """Return whether what the last product has outside the basis is nothing but rounding errors."""
    rounding = 50 * torch.finfo(products.dtype).eps * float(np.abs(lanczos.matrix).max())
    return lanczos.beta <= rounding


def gauss(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return nodes and weights of the quadrature that a Lanczos matrix stands for (Golub and Welsch, 1969)."""
    nodes, vectors = np.linalg.eigh(matrix)
    return nodes, vectors[0] ** 2
