"""Does the Hessian of the softmax loss vanish? Numerical check of Shon et al. (2022), supplement, Appendix A."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap
from torch.nn import functional as F

from curvlab import plots
from curvlab.analyze.dlcft import softmax_hessian_claims as appendix_a
from curvlab.analyze.dlcft.softmax_hessian_options import PRESETS, SoftmaxHessianConfig
from curvlab.analyze.frame import subject
from curvlab.analyze.frame.analysis import Analysis, Record, Report, Results, Table, Workspace
from curvlab.data import Dataset
from curvlab.errors import CurvlabError
from curvlab.estimators import estimate
from curvlab.likelihoods import CrossEntropy
from curvlab.problem import Problem
from curvlab.results import Column, aggregate, format_number, mean_column
from curvlab.spectrum import top_eigenvalues
from curvlab.text import write_count
from curvlab.training import fit

_FIRST = 0.5  # 1 - p_t of the first random logits; divided by ten from one record to the next

_LOGITS = (
    Column("complement", "1 - p_t", lambda value: format_number(value, 2)),
    Column("lower", "p_t (1 - p_t)"),
    mean_column("lambda_max", "largest eigenvalue"),
    Column("trace", "1 - |p|²"),
    Column("upper", "2 (1 - p_t)"),
    Column("autograd", "autograd, rel. difference", lambda value: format_number(value, 2)),
    Column("factors", "output factors, rel. difference", lambda value: format_number(value, 2)),
)
_NETWORK = (
    Column("step", "step"),
    mean_column("complement", "mean 1 - p_t"),
    mean_column("outputs", "Hessian w.r.t. outputs, mean"),
    mean_column("jacobian", "J'J"),
    mean_column("ggn", "GGN"),
    mean_column("hessian", "Hessian"),
)


def check(config: SoftmaxHessianConfig, dataset: Dataset) -> None:
    """Check the configuration and the data.

    Raises:
        CurvlabError: One of them is invalid.
    """
    subject.check_subject(config, dataset)
    estimate(subject.problem(config, dataset, subject.network(config, dataset, config.seeds[0])), "hessian", "implicit")


def measure(config: SoftmaxHessianConfig, dataset: Dataset, workspace: Workspace) -> Iterator[Record]:
    """Yield the records of the random logits, and those of the network during training, which have a ``step``."""
    (seed,) = config.seeds
    yield from logit_records(config, seed)
    yield from network_records(config, dataset, seed, workspace)


# At random logits -----------------------------------------------------------------------------------------------------


def softmax_hessian(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the Hessian of the softmax loss with respect to the logits, by equations (20) and (21) of the supplement.

    Args:
        logits: ``(N, C)``.
        targets: ``(N,)``, class indices. The Hessian does not depend on them; the formulas divide by their exponential.

    Returns:
        ``(N, C, C)``, ``diag(p) - p p'``, computed without cancellation: the bracket in (20) is a sum of positive
        numbers.

    Examples:
        >>> softmax_hessian(torch.zeros(1, 2), torch.tensor([0]))
        tensor([[[ 0.2500, -0.2500],
                 [-0.2500,  0.2500]]])
    """
    ratios = (logits - logits.gather(1, targets.unsqueeze(1))).exp()  # e^{x_m} / e^{x_t}
    total = ratios.sum(dim=1)
    matrix = -ratios.unsqueeze(1) * ratios.unsqueeze(2)
    others = ratios @ (1 - torch.eye(ratios.shape[1], dtype=ratios.dtype, device=ratios.device))
    matrix.diagonal(dim1=1, dim2=2).copy_(ratios * others)
    return matrix / total.square()[:, None, None]


def random_logits(categories: int, draws: int, complement: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return normal logits ``(N, C)`` in float64, and targets ``(N,)`` with probability ``1 - complement``.

    Args:
        categories: Number of classes ``C``.
        draws: Number of logits ``N``.
        complement: Between 0 and 1.
        seed: Seed of the draws.
    """
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.standard_normal((draws, categories)))
    targets = torch.from_numpy(rng.integers(categories, size=(draws, 1)))
    others = logits.scatter(1, targets, -math.inf).logsumexp(dim=1, keepdim=True)
    return logits.scatter(1, targets, others + math.log1p(-complement) - math.log(complement)), targets.squeeze(1)


def logit_records(config: SoftmaxHessianConfig, seed: int) -> list[Record]:
    """Return one record per probability of the label, with means or maxima over the draws.

    Keys: ``seed``, ``complement`` (1 - p_t), ``lambda_max`` (mean), ``lower`` (p_t (1 - p_t)), ``trace`` (1 - |p|^2,
    mean), ``upper`` (2 (1 - p_t)), ``above_trace``, ``above_upper`` and ``below_lower`` (largest relative violation
    of the inequalities between these; negative if they hold),
    ``autograd`` and ``factors`` (largest relative Frobenius norm of the difference between automatic differentiation,
    or our output factors, and the formulas), ``autograd_entry`` (largest difference of an entry), ``squared_error``
    (largest entry of the Hessian of the squared error minus the identity).
    """
    return [_logit_record(config, seed, _FIRST * 10.0**-decade) for decade in range(config.decades + 1)]


def _logit_record(config: SoftmaxHessianConfig, seed: int, complement: float) -> Record:
    logits, targets = random_logits(config.categories, config.draws, complement, seed)
    formula = softmax_hessian(logits, targets)
    autograd = vmap(jacrev(jacrev(F.cross_entropy)))(logits, targets)
    factors = CrossEntropy().output_factors(logits, targets)
    squared_error = vmap(jacrev(jacrev(lambda f, y: 0.5 * (f - y).square().sum())))(logits, torch.zeros_like(logits))
    largest = torch.linalg.eigvalsh(formula)[:, -1]
    trace = formula.diagonal(dim1=1, dim2=2).sum(dim=1)
    lower, upper = (1 - complement) * complement, 2 * complement
    return {
        "seed": seed,
        "complement": complement,
        "lower": lower,
        "lambda_max": float(largest.mean()),
        "trace": float(trace.mean()),
        "upper": upper,
        "above_trace": float((largest / trace - 1).max()),
        "above_upper": float((trace / upper - 1).max()),
        "below_lower": float((1 - largest / lower).max()),
        "autograd": _relative(autograd, formula),
        "autograd_entry": float((autograd - formula).abs().max()),
        "factors": _relative(factors.mT @ factors, formula),
        "squared_error": float((squared_error - torch.eye(config.categories)).abs().max()),
    }


def _relative(matrices: Tensor, reference: Tensor) -> float:
    # Scale by a power of two, which is exact: the squares of entries of 1e-300 underflow.
    largest = reference.abs().amax(dim=(1, 2), keepdim=True)
    scale = largest / largest.frexp().mantissa
    return float((((matrices - reference) / scale).norm(dim=(1, 2)) / (reference / scale).norm(dim=(1, 2))).max())


# In training ----------------------------------------------------------------------------------------------------------


class NetworkRecorder:
    """Observer that measures the network at given steps of its training (see ``curvlab.training.Observer``)."""

    def __init__(self, measure: Callable[[nn.Module], Record], steps: Sequence[int]) -> None:
        self._measure, self._steps = measure, set(steps)
        self.records: list[Record] = []

    def due(self, step: int) -> bool:
        """Return whether the network is measured after this step."""
        return step in self._steps

    def __call__(self, step: int, model: nn.Module) -> None:
        """Add a record of the model."""
        self.records.append({"step": step, **self._measure(model)})

    def state_dict(self) -> dict[str, Any]:
        """Return the records."""
        return {"records": list(self.records)}

    def load_state_dict(self, states: Mapping[str, Any], /) -> None:
        """Restore the records of an interrupted run."""
        self.records = list(states["records"])


def network_records(
    config: SoftmaxHessianConfig, dataset: Dataset, seed: int, workspace: Workspace
) -> Iterator[Record]:
    """Train a network, and yield one record per measured step."""
    model = subject.network(config, dataset, seed)
    steps = np.geomspace(1, config.steps, config.points).round().astype(int).tolist()
    recorder = NetworkRecorder(
        lambda trained: network_record(subject.problem(config, dataset, trained), config.tol), steps
    )
    fit(
        model,
        (dataset.x_train, dataset.y_train),
        **subject.fit_options(config),
        seed=seed,
        observers=[recorder],
        checkpoint=workspace.folder / "checkpoint.pt",
    )
    for record in recorder.records:
        yield {"seed": seed, **record}


def network_record(problem: Problem, tol: float) -> Record:
    """Return the confidence of a network, and the largest eigenvalues of its curvature.

    Keys: ``complement`` (1 - p_t, mean over samples), ``outputs`` (largest eigenvalue of the Hessian with respect to
    the outputs, mean over samples), ``jacobian`` (largest eigenvalue of ``mean J'J``, the GGN of the squared error),
    ``ggn``, ``hessian`` (largest eigenvalues with respect to the parameters).

    Args:
        problem: A problem with the loss ``cross_entropy``.
        tol: Relative tolerance of the eigenvalues.

    Raises:
        CurvlabError: An output is not finite.
    """
    complements, outputs = [], []
    with torch.no_grad():
        for inputs, targets in problem.batches():
            logits = problem.forward({}, inputs).double()
            if not bool(logits.isfinite().all()):
                raise CurvlabError("the network's outputs are not finite: lower lr, or check the scale of the inputs")
            complements.append(-torch.expm1(-problem.loss.values(logits, targets)))
            factors = problem.loss.output_factors(logits, targets)
            outputs.append(torch.linalg.eigvalsh(factors @ factors.mT)[:, -1])
    # The GGN of the squared error does not depend on the targets.
    with_zeros = [(x, torch.zeros(len(x), logits.shape[1])) for x, _ in problem.batches()]
    squares = Problem(problem.model, "squared_error", with_zeros)

    def largest(measured: Problem, quantity: str) -> float:
        return float(top_eigenvalues(estimate(measured, quantity, "implicit"), tol=tol).values[0])

    return {
        "complement": float(torch.cat(complements).mean()),
        "outputs": float(torch.cat(outputs).mean()),
        "jacobian": largest(squares, "ggn"),
        "ggn": largest(problem, "ggn"),
        "hessian": largest(problem, "hessian"),
    }


# The report -----------------------------------------------------------------------------------------------------------


def summarise(logits: Sequence[Record], network: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Return mean and standard deviation over seeds: one record per probability, and one per training step."""
    by_probability = aggregate(logits, ["complement", "lower", "upper"], ["lambda_max", "trace", "autograd", "factors"])
    values = [key for key in network[0] if key not in ("seed", "step")]
    return by_probability, aggregate(network, ["step"], values)


def report(results: Results[SoftmaxHessianConfig]) -> Report:
    """Return the tables, the identities and claims of Appendix A, and the figure."""
    logits, network, config = results.records["table"], results.records["network"], results.config
    conditions = appendix_a.conditions(config, results.subject, network)
    by_probability, by_step = summarise(logits, network)
    name = f"{subject.describe_network(config, results.subject)} on {results.subject.data}"
    samples = config.samples or results.subject.train
    tables = [
        Table(
            f"Hessian of the softmax loss at {config.draws:,} random logits with {config.categories} classes; "
            f"{results.spread}",
            _LOGITS,
            by_probability,
        ),
        Table(
            f"Largest eigenvalues during training: {name}, {write_count(samples, 'sample')}; {results.spread}",
            _NETWORK,
            by_step,
        ),
    ]
    return Report(
        tables[0],
        tables,
        appendix_a.claims(network, conditions),
        appendix_a.identities(logits),
        {"vanishing_curvature": lambda: plots.vanishing_curvature(by_probability, by_step, name)},
        deviations=appendix_a.deviations(conditions),
        notes=[
            "Relative differences are from equations (20) and (21), maxima over the draws. Automatic differentiation "
            "in float64 computes p_t - p_t², which has no correct digit if 1 - p_t is below 1e-16."
        ],
    )


ANALYSIS = Analysis(
    config=SoftmaxHessianConfig,
    question="Does the Hessian of the softmax loss vanish as the probability of the label goes to 1? Computes it at "
    "random logits by automatic differentiation, by the formulas of the DLCFT supplement and by the output factors of "
    "the estimators, and records the curvature of a network during training.",
    presets=PRESETS,
    check=check,
    measure=measure,
    report=report,
    kinds={"table": "lambda_max", "network": "step"},
)
