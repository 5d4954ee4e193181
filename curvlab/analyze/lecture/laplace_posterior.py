"""How far is Laplace's sequential posterior from the exact one? Carta's lecture, "EWC - Laplace Approximation"."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from curvlab import plots
from curvlab.analyze.frame import subject
from curvlab.analyze.frame.analysis import Analysis, Preset, Record, Report, Results, Table, Workspace
from curvlab.analyze.frame.values import number, where
from curvlab.analyze.lecture import laplace_posterior_claims
from curvlab.analyze.lecture.laplace_posterior_options import LABELS, LaplacePosteriorConfig
from curvlab.commandline.options import RunOptions
from curvlab.data import Dataset
from curvlab.errors import CurvlabError
from curvlab.grid import Place
from curvlab.posterior import (
    Gaussian,
    effective_sample_size,
    hamiltonian_monte_carlo,
    laplace_update,
    log_likelihood,
    make_predictor,
    posterior_on_grid,
    predict_linear,
    split_rhat,
)
from curvlab.results import Column, aggregate, mean_column
from curvlab.text import write_count

_MODELS = {"logistic": "logistic regression, 2 parameters", "network": "network"}
_LOSS = "binary_cross_entropy"
_SHOWN = 4  # every fourth point of the grid is stored for the figure


PRESETS = {
    "default": Preset(LaplacePosteriorConfig(), minutes=2),
    "cpu": Preset(
        LaplacePosteriorConfig(data="mnist", chunks=10, hidden=(8,), draws=1000, warmup=500),
        minutes=6,
        needs=("mnist",),
    ),
}
_VALUES = {
    "kl": "KL from the exact one (nats)",
    "mean_error": "error of the mean (standard deviations)",
    "covariance_error": "relative error of the covariance",
    "predictive_error": "error of probabilities",
    "linear_error": "error of probabilities, linearized model",
    "map_error": "error of probabilities at the mode",
}
_COLUMNS = (
    Column("model", "model"),
    Column("label", "curvature"),
    Column("chunk", "chunks"),
    *(mean_column(key, head) for key, head in _VALUES.items()),
)


# A run ----------------------------------------------------------------------------------------------------------------


def load_dataset(config: LaplacePosteriorConfig, options: RunOptions | Place) -> Dataset:
    """Return the data set with the two classes only."""
    return subject.load_dataset(config.model_copy(update={"classes": "all"}), options).select(config.classes)


def check(config: LaplacePosteriorConfig, dataset: Dataset) -> None:
    """Refuse what cannot be done, before anything is written.

    Raises:
        CurvlabError: There are not two classes, or too few samples, or the subject is not usable.
    """
    subject.check_subject(config, dataset)
    subject.check_distinct(models=config.models)
    if len(config.classes) != 2:
        raise CurvlabError(f"classes must be two classes, not {list(config.classes)}")
    if config.chunks * config.chunk_samples > len(dataset.x_train):
        raise CurvlabError(
            f"{config.chunks} chunks of {write_count(config.chunk_samples, 'sample')} are more than the "
            f"{len(dataset.x_train):,} training samples: give fewer"
        )


def make_data(config: LaplacePosteriorConfig, dataset: Dataset, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs ``(N, 2)`` and targets ``(N, 1)`` of all chunks, and test inputs: two standardised components."""
    images = dataset.x_train.flatten(1).double()
    mean = images.mean(0)
    _, scales, axes = torch.linalg.svd(images - mean, full_matrices=False)
    project = axes[:2].T / scales[:2] * len(images) ** 0.5
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    rows = order[: config.chunks * config.chunk_samples]
    targets = (dataset.y_train[rows] == config.classes[1]).double()[:, None]
    return (images[rows] - mean) @ project, targets, (dataset.x_test.flatten(1).double() - mean) @ project


def make_model(config: LaplacePosteriorConfig) -> nn.Module:
    """Return the network of the configuration, or with the model ``logistic`` a linear one without a bias."""
    if config.models[0] == "logistic":
        return nn.Linear(2, 1, bias=False)
    sizes = (2, *config.hidden)
    layers = [[nn.Linear(a, b), nn.Tanh()] for a, b in pairwise(sizes)]
    return nn.Sequential(*(layer for pair in layers for layer in pair), nn.Linear(sizes[-1], 1))


def measure(config: LaplacePosteriorConfig, dataset: Dataset, workspace: Workspace) -> Iterator[Record]:
    """Yield the errors of each approximation and diagnostics after every chunk, for one model."""
    (name,), (seed,) = config.models, config.seeds
    x, y, test = make_data(config, dataset, seed)
    model = make_model(config)
    size = sum(p.numel() for p in model.parameters())
    prior = Gaussian.prior(size, config.prior_precision)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(size, generator=generator).double()  # zero is a saddle point of a network
    chains = prior.sample(config.chains, seed)
    posteriors = dict.fromkeys(("diag", "kfac", "full"), prior)
    panels = []
    for chunk in range(1, config.chunks + 1):
        new, so_far = (
            slice((chunk - 1) * config.chunk_samples, chunk * config.chunk_samples),
            slice(chunk * config.chunk_samples),
        )
        for structure, before in posteriors.items():
            posteriors[structure] = laplace_update(
                before,
                model,
                _LOSS,
                (x[new], y[new]),
                structure=structure.replace("full", "dense"),
                start=start if chunk == 1 else None,
            )
        at_once = laplace_update(prior, model, _LOSS, (x[so_far], y[so_far]), start=posteriors["full"].mean)
        found = {**posteriors, "at_once": at_once}
        likelihood = log_likelihood(model, _LOSS, (x[so_far], y[so_far]))

        def log_posterior(theta: Tensor, likelihood: Callable[[Tensor], Tensor] = likelihood) -> Tensor:
            return likelihood(theta) - config.prior_precision / 2 * theta.square().sum()

        keys = {"model": name, "seed": seed, "chunk": chunk}
        predict = make_predictor(model, test)
        if name == "logistic":
            grid = posterior_on_grid(log_posterior, at_once)
            exact = torch.einsum("k,kn->n", grid.weights.flatten(), predict(grid.points.view(-1, 2)))
            yield {**keys, "edge_mass": grid.edge_mass, "rhat": None, "ess": None, "noise": None}
            panels.append(_panel(chunk * config.chunk_samples, grid, found))
        else:
            sampled = hamiltonian_monte_carlo(
                log_posterior, chains, draws=config.draws, warmup=config.warmup, seed=seed + chunk
            )
            chains = sampled.values[-1]
            probabilities = predict(sampled.values.flatten(0, 1)).view(config.draws, config.chains, -1)
            exact = probabilities.mean((0, 1))
            yield {**keys, "edge_mass": None, **_diagnose(probabilities)}
        for structure, posterior in found.items():
            record: Record = {**keys, "structure": structure, "parameters": size}
            if name == "logistic":
                record |= _distances(grid, posterior)
            else:
                record |= dict.fromkeys(("kl", "kl_as_printed", "mean_error", "covariance_error"))
            mine = predict(posterior.sample(4000, seed)).mean(0)
            record["predictive_error"] = float((mine - exact).abs().mean())
            record["linear_error"] = float((predict_linear(model, posterior, test) - exact).abs().mean())
            record["map_error"] = float((predict(posterior.mean[None])[0] - exact).abs().mean())
            yield record
    if panels:
        workspace.save("contours", {"seed": seed, "panels": panels})


def _distances(grid: Any, posterior: Gaussian) -> Record:
    mean, covariance = grid.mean, grid.covariance
    way = posterior.mean - mean
    # In the slide, the covariance is F, not its inverse.
    printed = Gaussian(posterior.mean, posterior.covariance)
    return {
        "kl": grid.kl_from(posterior),
        "kl_as_printed": grid.kl_from(printed),
        "mean_error": float((way @ torch.linalg.solve(covariance, way) / 2).sqrt()),
        "covariance_error": float((posterior.covariance - covariance).norm() / covariance.norm()),
    }


def _diagnose(probabilities: Tensor) -> Record:
    """Return diagnostics of the predicted probabilities ``(draws, chains, N)``; weights of a network have symmetries.

    ``rhat`` and ``ess`` are the worst over at most 20 test inputs, NaN if all draws are equal at one of them. ``noise``
    is the mean difference between the probabilities of even and of odd chains, over 2: about the error of their mean.
    """
    some = probabilities[..., :: max(1, probabilities.shape[2] // 20)].unbind(-1)
    halves = probabilities[:, ::2].mean((0, 1)) - probabilities[:, 1::2].mean((0, 1))
    return {
        "rhat": _worst(max, map(split_rhat, some)),
        "ess": _worst(min, map(effective_sample_size, some)),
        "noise": float(halves.abs().mean() / 2),
    }


def _worst(choose: Callable[[Sequence[float]], float], values: Iterable[float]) -> float:
    """Return the largest or smallest of values; NaN if one is NaN, which ``max`` and ``min`` may pass over."""
    known = list(values)
    return math.nan if any(map(math.isnan, known)) else choose(known)


def _panel(samples: int, grid: Any, found: Mapping[str, Gaussian]) -> Record:
    return {
        "name": write_count(samples, "sample"),
        "points": grid.points[::_SHOWN, ::_SHOWN].tolist(),
        "density": grid.weights[::_SHOWN, ::_SHOWN].tolist(),
        "gaussians": {
            name: {"mean": g.mean.tolist(), "covariance": g.covariance.tolist()}
            for name, g in found.items()
            if name != "at_once"
        },
    }


# Summaries of the records ---------------------------------------------------------------------------------------------


def report(run: Results[LaplacePosteriorConfig]) -> Report:
    """Return the table after the last chunk, the claims, and the figures: contours, and errors over the chunks."""
    config, found, diagnostics = run.config, run.records["table"], run.records["diagnostics"]
    rows = aggregate(where(found, chunk=config.chunks), ["model", "structure", "chunk"], list(_VALUES))
    rows = [{**row, "label": LABELS[row["structure"]], "model": _MODELS[row["model"]]} for row in rows]
    what = f"{run.subject.data}, classes {' and '.join(map(str, config.classes))}"
    figures = {
        "probabilities": lambda: plots.line_panels(
            _with_noise(found, diagnostics),
            "chunk",
            "predictive_error",
            line="structure",
            labels=LABELS | _MODELS | {"noise": "sampling error of the exact one"},
            panel="model",
            reference={"noise": ":"},
            axis_labels=("chunks of data", "mean difference of probabilities"),
            title=f"Sequential Laplace against the exact posterior, {what}",
            log="y",
        )
    }
    if where(found, model="logistic"):
        figures["divergence"] = lambda: plots.line_panels(
            where(found, model="logistic"),
            "chunk",
            "kl",
            line="structure",
            labels=LABELS,
            axis_labels=("chunks of data", "KL(exact, Laplace) (nats)"),
            title=f"{_MODELS['logistic']}, {run.subject.data}",
            log="y",
            width=3.3,
        )
    if run.artifacts.get("contours"):
        panels = run.artifacts["contours"][0]["panels"]
        shown = [panels[0], panels[len(panels) // 2], panels[-1]] if len(panels) > 2 else panels
        figures["contours"] = lambda: plots.posterior_contours(
            shown,
            LABELS,
            f"Posterior of {_MODELS['logistic']}: {what}",
            ("weight of component 1", "weight of component 2"),
        )
    return Report(
        Table(
            f"Posteriors after {write_count(config.chunks * config.chunk_samples, 'sample')} of {what}; {run.spread}",
            _COLUMNS,
            rows,
        ),
        claims=laplace_posterior_claims.claims(found, diagnostics, config),
        figures=figures,
        notes=_notes(diagnostics),
    )


def _with_noise(found: Sequence[Record], diagnostics: Sequence[Record]) -> list[Record]:
    noise = [
        {**row, "structure": "noise", "predictive_error": row["noise"]}
        for row in diagnostics
        if row["noise"] is not None
    ]
    return [*found, *noise]


def _notes(diagnostics: Sequence[Record]) -> list[str]:
    notes = []
    if sampled := where(diagnostics, model="network"):
        rhat = _worst(max, (number(row["rhat"]) for row in sampled))
        ess = _worst(min, (number(row["ess"]) for row in sampled))
        notes.append(
            f"Hamiltonian Monte Carlo: split R-hat of probabilities at most {rhat:.3f}, effective sample size at least "
            f"{ess:,.0f}."
            if math.isfinite(rhat) and math.isfinite(ess)
            else "Hamiltonian Monte Carlo: split R-hat or effective sample size is not defined, because at a test "
            "input the probability does not vary within any chain."
        )
    if grids := where(diagnostics, model="logistic"):
        notes.append(f"Grid: probability of its border at most {max(row['edge_mass'] for row in grids):.1e}.")
    return notes


ANALYSIS = Analysis(
    config=LaplacePosteriorConfig,
    question="How far is Laplace's sequential posterior from the exact one? Diagonal, K-FAC and full curvature after "
    "each of several chunks of data.",
    presets=PRESETS,
    check=check,
    load=load_dataset,
    measure=measure,
    report=report,
    parts=lambda config: [config.model_copy(update={"models": (model,)}) for model in config.models],
    kinds={"table": "structure", "diagnostics": "edge_mass"},
    artifacts=("contours",),
)
