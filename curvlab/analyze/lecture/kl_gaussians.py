"""What does a step in the parameters do to a distribution? Carta's lecture on regularization priors, the KL slides."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.distributions import Categorical, Distribution, MixtureSameFamily, Normal
from torch.distributions import kl_divergence as closed_form
from torch.nn.functional import kl_div

from curvlab import plots
from curvlab.analyze.frame.analysis import Analysis, Preset, Record, Report, Results, Table, Workspace
from curvlab.analyze.frame.published import read_published
from curvlab.analyze.frame.subject import no_data
from curvlab.analyze.frame.values import where
from curvlab.commandline.config import Config
from curvlab.divergences import Direction, fit_normal, kl_divergence, quadrature_grid
from curvlab.estimators import estimate
from curvlab.models import mlp
from curvlab.parameters import ParameterSpace
from curvlab.problem import Problem
from curvlab.results import Claim, Column, Identity, aggregate, mean_column, require_direction

#: Mean and standard deviation of P and of Q, which are one unit of the parameters apart.
PANELS = (
    ((0.0, 0.5), (1.0, 0.5)),
    ((0.0, 1.0), (1.0, 1.0)),
    ((0.0, 2.0), (1.0, 2.0)),
    ((0.0, 1.0), (0.0, 2.0)),
    ((0.0, 2.0), (0.0, 3.0)),
)
DIRECTIONS: tuple[Direction, ...] = ("forward", "reverse")
_GRID = quadrature_grid(-40.0, 40.0)


class KlGaussiansConfig(Config):
    """Compute KL divergences of Gaussians, fit a Gaussian to a mixture, and compare the Fisher with a Hessian."""

    separation: float = Field(default=3.0, ge=0, le=10)
    """Distance of the two modes of P from 0; both have weight 1/2 and standard deviation 1."""
    starts: int = Field(default=8, ge=1)
    """Number of fits from random starts; the one with the lowest divergence is used."""
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = (5,)
    """Hidden sizes of the small network."""
    points: int = Field(default=30, ge=1)
    """Number of random inputs of the small network."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = (0, 1, 2)
    """Seeds of the starts, of the network and of its inputs."""


_DIFFERENCES = {
    "quadrature": "KL of the panels: largest difference of formula and quadrature (nats)",
    "gaussian": "Hessian of the KL of a Gaussian and its Fisher: relative difference",
    "network": "Hessian of the KL of a small network and its Fisher: relative difference",
}


def measure(config: KlGaussiansConfig, dataset: None, workspace: Workspace) -> Iterator[Record]:
    """Yield the panels, the best fit in each direction, and the deviations from the identities."""
    del dataset, workspace
    (seed,) = config.seeds
    differences = []
    for p, q in PANELS:
        one, other = _normal(*p), _normal(*q)
        forward, reverse = float(closed_form(one, other)), float(closed_form(other, one))
        differences.append(abs(forward - float(kl_divergence(one, other, _GRID))))
        yield {
            "seed": seed,
            "p": f"N({p[0]:g}, {p[1]:g}²)",
            "q": f"N({q[0]:g}, {q[1]:g}²)",
            "mean": p[0],
            "std": p[1],
            "other_mean": q[0],
            "other_std": q[1],
            "kl": forward,
            "reverse_kl": reverse,
        }
    target, generator = mixture(config.separation), torch.Generator().manual_seed(seed)
    for direction in DIRECTIONS:
        fits = []
        for _ in range(config.starts):
            first, second = torch.rand(2, dtype=torch.float64, generator=generator).tolist()
            fitted, divergence = fit_normal(target, direction, 10 * first - 5, 0.5 * 6**second, _GRID)
            # More digits would be those of the optimizer.
            fits.append(tuple(round(float(value), 6) for value in (divergence, fitted.loc, fitted.scale)))
        divergence, mean, std = min(fits)
        yield {
            "seed": seed,
            "direction": direction,
            "fit_mean": mean,
            "distance": abs(mean),
            "fit_std": std,
            "variance": std**2,
            "divergence": divergence,
            "worst": max(fits)[0],
            "found": sum(fit[0] <= divergence + 2e-6 for fit in fits) / len(fits),
        }
    found = (max(differences), gaussian_difference(), network_difference(config, seed))
    yield from (
        {"seed": seed, "identity": name, "difference": value} for name, value in zip(_DIFFERENCES, found, strict=True)
    )


def _normal(mean: float, std: float) -> Normal:
    return Normal(*torch.tensor([mean, std], dtype=torch.float64))


def mixture(separation: float) -> Distribution:
    """Return the mixture of two Gaussians with standard deviation 1 at plus and minus ``separation``."""
    means = torch.tensor([-separation, separation], dtype=torch.float64)
    return MixtureSameFamily(Categorical(torch.ones_like(means)), Normal(means, torch.ones_like(means)))


def gaussian_difference() -> float:
    """Return the relative difference of the Hessian of the KL at N(0, 1.5²) and the Fisher, in (mean, std).

    The Hessian is that of the quadrature, the Fisher is the expected outer product of the score.
    """
    theta = torch.tensor([0.0, 1.5], dtype=torch.float64)
    here = Normal(theta[0], theta[1])

    def there(moved: Tensor) -> Normal:
        return Normal(moved[0], moved[1], validate_args=False)

    hessian = torch.func.hessian(lambda moved: kl_divergence(here, there(moved), _GRID))(theta)
    score = torch.func.jacrev(lambda moved: there(moved).log_prob(_GRID))(theta)
    density = here.log_prob(_GRID).exp()
    fisher = torch.trapezoid(density * torch.einsum("np,nq->pqn", score, score), _GRID)
    return _relative(hessian, fisher)


def network_difference(config: KlGaussiansConfig, seed: int) -> float:
    """Return the relative difference of the Hessian of the mean KL of a small classifier and its exact Fisher."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, inputs = mlp(4, config.hidden, 3).double(), torch.randn(config.points, 4, dtype=torch.float64)
    # The exact Fisher does not depend on the labels.
    problem = Problem(model, "cross_entropy", (inputs, torch.zeros(config.points, dtype=torch.long)))
    space, here = ParameterSpace.of(model), problem.parameters()
    outputs = problem.forward(here, inputs).log_softmax(dim=1).detach()

    def divergence(flat: Tensor) -> Tensor:
        parts = zip(space.names, space.shapes, flat.split(list(space.sizes)), strict=True)
        moved = torch.func.functional_call(model, {name: part.view(shape) for name, shape, part in parts}, inputs)
        return kl_div(moved.log_softmax(dim=1), outputs, reduction="batchmean", log_target=True)

    flat = torch.cat([here[name].flatten() for name in space.names])
    return _relative(torch.func.hessian(divergence)(flat), estimate(problem, "fisher", "dense").to_dense())


def _relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


_PANEL_COLUMNS = (Column("p", "P"), Column("q", "Q"), Column("kl", "KL(P‖Q)"), Column("reverse_kl", "KL(Q‖P)"))
_FIT_VALUES = {
    "distance": "|mean| of Q",
    "fit_std": "its standard deviation",
    "divergence": "divergence (nats)",
    "found": "share of starts that find it",
    "worst": "highest of the starts",
}
_FIT_COLUMNS = (
    Column("direction", "KL"),
    *(mean_column(key, head) for key, head in _FIT_VALUES.items()),
)


def report(run: Results[KlGaussiansConfig]) -> Report:
    """Return the panels, the fits, the claims about them and the identities."""
    slides = read_published("lecture")["kl_gaussians"]
    fits, differences = run.records["fits"], run.records["identities"]
    ours = {"separation": run.config.separation, "starts": run.config.starts}
    gate = require_direction(ours, slides["conditions"], slides["direction"])

    def claim(text: str, direction: str, key: str, test: Any) -> Claim:
        values = [fit[key] for fit in where(fits, direction=direction)]
        return Claim.of(text, slides["source"], values, test, None, gate)

    first = where(run.records["table"], seed=run.records["table"][0]["seed"])
    summary = Table(
        "KL divergence of Gaussians at distance 1 in (mean, standard deviation), nats", _PANEL_COLUMNS, first
    )
    fitted = aggregate(fits, ["direction"], list(_FIT_VALUES))
    return Report(
        summary,
        tables=[
            summary,
            Table(
                f"Gaussian Q closest to a mixture P of two, at ±{run.config.separation:g}; {run.spread}",
                _FIT_COLUMNS,
                fitted,
            ),
        ],
        claims=[
            claim("Forward KL covers both modes: the variance of Q is 10 within 1 %", "forward", "variance", _near(10)),
            claim(
                "Forward KL takes the average of the modes: |mean| of Q is at most 0.1", "forward", "distance", _least
            ),
            claim(
                "Reverse KL takes one mode: |mean| of Q is 2.9 to 3.1", "reverse", "distance", lambda x: 2.9 <= x <= 3.1
            ),
            claim(
                "Reverse KL fits that mode: the standard deviation of Q is 0.95 to 1.1",
                "reverse",
                "fit_std",
                lambda x: 0.95 <= x <= 1.1,
            ),
        ],
        identities=[
            Identity(text, [one["difference"] for one in where(differences, identity=name)])
            for name, text in _DIFFERENCES.items()
        ],
        figures={
            "panels": lambda: plots.density_pairs(first),
            "fits": lambda: plots.divergence_fits(fits, run.config.separation),
        },
        notes=_notes(fits),
    )


def _near(value: float) -> Any:
    return lambda x: abs(x - value) <= 0.01 * value


def _least(x: float) -> bool:
    return x <= 0.1


def _notes(fits: Sequence[Record]) -> list[str]:
    stuck = [fit for fit in where(fits, direction="reverse") if fit["found"] < 1]
    if not stuck:
        return []
    return [
        "Reverse KL has several local minima here: some starts end at a Q that covers both modes "
        f"({stuck[0]['worst']:.3f} nats against {stuck[0]['divergence']:.3f}). The best start is used."
    ]


ANALYSIS = Analysis(
    config=KlGaussiansConfig,
    question="What does a step in the parameters do to a distribution? KL divergences of Gaussians, forward and "
    "reverse fits, and the Fisher as the KL's Hessian.",
    presets={"default": Preset(KlGaussiansConfig(), minutes=0.2)},
    load=no_data,
    measure=measure,
    report=report,
    kinds={"table": "kl", "fits": "direction", "identities": "identity"},
)
