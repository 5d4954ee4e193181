"""Does the empirical Fisher precondition as the Fisher does? Kunstner, Balles and Hennig (2019), Figure 1."""

from collections.abc import Iterator
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from curvlab import plots
from curvlab.analyze.frame.analysis import Analysis, Preset, Record, Report, Results, Table, Workspace
from curvlab.analyze.frame.published import read_published
from curvlab.analyze.frame.subject import no_data
from curvlab.analyze.frame.values import where
from curvlab.commandline.config import Config
from curvlab.least_squares import Field as VectorField
from curvlab.least_squares import LeastSquares, angles, descend
from curvlab.results import Claim, Column, Identity, aggregate, mean_column, require

STARTS = ((2.0, 4.5), (1.0, 0.0), (4.5, 3.0), (-0.5, 3.0))
_PRIOR_VARIANCE, _DAMPING = 0.1, 1e-8
_LOW, _HIGH, _POINTS = -1.0, 5.0, 15  # of the grid, in either parameter
_DRAWN = 500  # points of a trajectory in the figure


class EmpiricalFisherFieldConfig(Config):
    """Compare gradient, natural gradient and empirical-Fisher preconditioning on a linear regression."""

    samples: int = Field(default=1000, ge=3)
    """Number of samples of the regression; with fewer than three, no variance is left."""
    steps: int = Field(default=50_000, ge=1)
    """Number of Euler steps of a trajectory."""
    step_size: float = Field(default=0.001, gt=0)
    """Size of an Euler step."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = (0, 1, 2)
    """Seeds of the samples; seed 0 gives those of the published figure. The figure shows the first seed."""


PRESETS = {"default": Preset(EmpiricalFisherFieldConfig(), minutes=0.5)}
FIELDS = {"gd": "gradient", "ngd": "natural gradient", "ef": "empirical Fisher"}


def draw_regression(samples: int, seed: int) -> LeastSquares:
    """Return a regression with an intercept and a log-normal feature, both of weight 2, and unit noise.

    The random numbers are those of the code of the paper, from NumPy's legacy generator.
    """
    generator = np.random.RandomState(seed)
    feature = generator.lognormal(0, 0.75, (samples, 1))
    x = np.hstack([np.ones((samples, 1)), feature])
    y = x @ np.array([2.0, 2.0]) + generator.randn(samples, 1)[:, 0]
    return LeastSquares(torch.from_numpy(x), torch.from_numpy(y), precision=1 / _PRIOR_VARIANCE)


def make_fields(regression: LeastSquares) -> dict[str, VectorField]:
    """Return the three vector fields, scaled as in the published figure."""
    hessian, damping = regression.hessian, _DAMPING * torch.eye(2, dtype=torch.float64)

    def solve(matrix: Tensor, theta: Tensor) -> Tensor:
        # A right-hand side with one column; torch would treat a batch of vectors as a matrix.
        solved: Tensor = torch.linalg.solve(matrix + damping, regression.gradient(theta)[..., None])
        return solved[..., 0]

    return {
        "gd": lambda theta: -regression.gradient(theta) / 3,
        "ngd": lambda theta: -solve(hessian, theta),
        "ef": lambda theta: -3 * solve(regression.empirical_fisher(theta), theta),
    }


def measure(config: EmpiricalFisherFieldConfig, dataset: None, workspace: Workspace) -> Iterator[Record]:
    """Yield the angles of each field to the direction of the solution, and the end of its trajectories."""
    del dataset
    (seed,) = config.seeds
    regression = draw_regression(config.samples, seed)
    solution = regression.solution
    axis = torch.linspace(_LOW, _HIGH, _POINTS, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    starts = torch.tensor(STARTS, dtype=torch.float64)
    fields, trajectories = {}, {}
    for name, field in make_fields(regression).items():
        vectors = field(grid)
        path = descend(field, starts, config.step_size, config.steps)
        off = angles(vectors, solution - grid)
        yield {
            "seed": seed,
            "field": name,
            "median_angle": float(off.median()),
            "largest_angle": float(off.max()),
            "end_distance": float((path[-1] - solution).norm(dim=1).max()),
            "detour": round(float((path.diff(dim=0).norm(dim=2).sum(0) / (path[-1] - path[0]).norm(dim=1)).max()), 6),
        }
        fields[name] = vectors.numpy()
        # Trajectories are fast at first and slow at the end: the kept steps are evenly spaced in the logarithm.
        kept = np.unique(np.geomspace(1, config.steps + 1, _DRAWN).astype(int) - 1)
        trajectories[name] = path[kept].transpose(0, 1).numpy()
    loss = regression.loss(grid)
    drawing = {"x": regression.x[:, 1], "y": regression.y, "solution": solution, "axis": axis, "loss": loss}
    arrays = {name: tensor.numpy() for name, tensor in drawing.items()}
    workspace.save("drawing", {"seed": seed, **arrays, "fields": fields, "trajectories": trajectories})


_VALUES = {
    "median_angle": "median angle (°)",
    "largest_angle": "largest angle (°)",
    "end_distance": "distance at the end",
    "detour": "path / straight line",
}
_COLUMNS = (Column("name", "field"), *(mean_column(key, head) for key, head in _VALUES.items()))


def report(run: Results[EmpiricalFisherFieldConfig]) -> Report:
    """Return the table of the fields, the claim of the figure, and the figure."""
    records, figure = run.records["table"], read_published("lecture")["empirical_fisher_field"]
    ours = {key: getattr(run.config, key) for key in figure["conditions"]}
    rows = [{**row, "name": FIELDS[row["field"]]} for row in aggregate(records, ["field"], list(_VALUES))]

    def values(field: str, key: str) -> list[float]:
        return [row[key] for row in where(records, field=field)]

    title = f"Angle of a field to the direction of the solution, on a grid, and its trajectories; {run.spread}"
    drawings = run.artifacts.get("drawing", ())
    return Report(
        Table(title, _COLUMNS, rows),
        claims=[
            Claim.of(
                "The empirical Fisher distorts the gradient field: the median angle to the solution is above 10°",
                figure["source"],
                values("ef", "median_angle"),
                lambda angle: angle > 10,
                None,
                require(ours, figure["conditions"]),
            ),
            Claim.of(
                "Trajectories of the natural gradient end at the solution (largest distance below 0.05)",
                figure["source"],
                values("ngd", "end_distance"),
                lambda distance: distance < 0.05,
                None,
                require(ours, figure["conditions"]),
            ),
        ],
        identities=[
            Identity(
                "The natural gradient of a quadratic loss points to its minimum: largest angle (°; below 1)",
                values("ngd", "largest_angle"),
            ),
        ],
        figures={"fields": lambda: plots.preconditioned_fields(drawings[0], FIELDS)} if drawings else {},
        notes=[
            f"Seed {row['seed']}: after the last step, a trajectory of the field {FIELDS[row['field']]} is still "
            f"{row['end_distance']:.3g} from the solution."
            for row in records
            if row["end_distance"] > 0.05
        ],
    )


ANALYSIS = Analysis(
    config=EmpiricalFisherFieldConfig,
    question="Does the empirical Fisher precondition as the Fisher does? Three vector fields of a linear regression.",
    presets=PRESETS,
    load=no_data,
    measure=measure,
    report=report,
    kinds={"table": "field"},
    artifacts=("drawing",),
)
