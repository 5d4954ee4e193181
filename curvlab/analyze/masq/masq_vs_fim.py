"""How do MaSQ and FIM differ? Gepperth and Wiech (2019), Figures 6 to 8 and sections 2.5, 3.4 and 4."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from curvlab.analyze.frame import subject
from curvlab.analyze.frame.analysis import Analysis, Record, Workspace
from curvlab.analyze.frame.values import divide
from curvlab.analyze.masq import comparison, costs, streams
from curvlab.analyze.masq.comparison import NORMS
from curvlab.analyze.masq.masq_vs_fim_options import PRESETS, MasqVsFimConfig
from curvlab.data import Dataset
from curvlab.errors import CurvlabError
from curvlab.estimators import estimate
from curvlab.estimators.masq import expected_masq
from curvlab.parameters import ParameterSpace
from curvlab.problem import Problem
from curvlab.quantities import MaSQ

_TOP = 0.1  # share of FIM entries called large
_CHANGE = 0.1  # perturbation relative to the root mean square of the tensor


def check(config: MasqVsFimConfig, dataset: Dataset) -> None:
    """Raise an error if the configuration cannot be run."""
    subject.check_distinct(parts=config.parts, points=config.points, batch_sizes=config.batch_sizes)
    streams.check(config, dataset)
    if odd := [size for size in config.batch_sizes if config.partition_samples % size]:
        raise CurvlabError(f"batch_sizes divide partition_samples ({config.partition_samples}); {odd[0]} does not")
    for stream in config.streams:
        have = streams.make_tasks(config, dataset, stream, config.seeds[0])[0].sizes["train"]
        if config.partition_samples > have:
            raise CurvlabError(f"partition_samples is {config.partition_samples:,}; {stream} has {have:,}")


def split(config: MasqVsFimConfig) -> list[MasqVsFimConfig]:
    """Return one configuration per run; each cost has a run, and so a process, of its own."""
    return [one.model_copy(update={"parts": (part,)}) for one in streams.parts(config) for part in config.parts]


def measure(config: MasqVsFimConfig, dataset: Dataset, workspace: Workspace) -> Iterator[Record]:
    """Learn the first task and yield the records of all comparisons, or measure one cost."""
    (stream,), (seed,), (part,) = config.streams, config.seeds, config.parts
    names = {"stream": stream, "seed": seed}
    task = streams.make_tasks(config, dataset, stream, seed)[0]
    if part != "values":  # cost does not depend on the weights
        problem = streams.take_problem(config, subject.network(config, dataset, seed), task)
        seconds, peak = costs.measure_cost(part, problem, config.batch_size, config.masq_batch_size)
        yield {**names, "method": part, "seconds": seconds, "peak_mb": None if peak is None else peak / 1e6}
        return
    model = streams.train_first(config, dataset, task, seed, workspace.folder / "checkpoint.pt")
    problem = streams.take_problem(config, model, task)
    yield from ({**names, **one} for one in _tensors(config, problem))
    yield from ({**names, **one} for one in _batches(config, problem, seed))
    yield {**names, **_cancelling(problem, seed)}
    for step in sorted({*(point for point in config.points if point < config.steps), config.steps}):
        at = config.model_copy(update={"steps": max(step, 1)})
        young = streams.train_first(at, dataset, task, seed) if step else subject.network(config, dataset, seed)
        yield {**names, "step": step, **_correlations(config, streams.take_problem(config, young, task))}


def gradient(problem: Problem) -> Tensor:
    """Return the gradient of the mean loss, ``(P,)``."""
    x, y = problem.data
    parameters = [p for p in problem.model.parameters() if p.requires_grad]
    found = torch.autograd.grad(problem.loss.values(problem.model(x), y).mean(), parameters)
    return torch.cat([one.reshape(-1) for one in found])


def _fim_and_gradient(problem: Problem) -> tuple[Tensor, Tensor]:
    return estimate(problem, "empirical_fisher", "diag").diagonal().double(), gradient(problem).double()


def _tensors(config: MasqVsFimConfig, problem: Problem) -> Iterator[Record]:
    """Yield the largest entries of MaSQ, of its expectation and of the FIM for every parameter tensor."""
    fim, j = _fim_and_gradient(problem)
    size = min(config.masq_batch_size, problem.num_samples)
    masq = {norm: estimate(problem, MaSQ(size, norm), "diag").diagonal().double() for norm in NORMS}
    whole = problem.num_samples - problem.num_samples % size  # the closed form needs batches of equal size
    expected = expected_masq(fim, j, whole, MaSQ(size, "sumsq"))
    for name, place in ParameterSpace.of(problem.model).slices.items():
        yield {
            "parameter": name,
            "fim_max": float(fim[place].max()),
            "gradient_max": float((j[place] ** 2).max()),
            "gradient_excess": divide(float((j[place] ** 2 - fim[place]).max()), float(fim[place].max())),
            "expected_max": float(expected[place].max()),
            **{f"masq_max_{norm}": float(masq[norm][place].max()) for norm in NORMS},
            "samples": problem.num_samples,
        }


def _batches(config: MasqVsFimConfig, problem: Problem, seed: int) -> Iterator[Record]:
    """Yield the trace of MaSQ for every batch size, mean over random partitions, and its closed form."""
    n = config.partition_samples
    x, y = (part[:n] for part in problem.data)
    fim, j = _fim_and_gradient(Problem(problem.model, "cross_entropy", (x, y)))
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(n, generator=generator) for _ in range(config.partitions)]
    for size in config.batch_sizes:
        quantity = MaSQ(size, "mean")
        expected = float(expected_masq(fim, j, n, quantity).sum())
        traces = []
        for order in orders[: 1 if size in (1, n) else None]:  # all partitions are equivalent
            one = Problem(problem.model, "cross_entropy", (x[order], y[order]))
            traces.append(float(estimate(one, quantity, "diag").diagonal().double().sum()))
        error = float(np.std(traces, ddof=1)) / len(traces) ** 0.5 if len(traces) > 1 else None
        yield {
            "batch_size": size,
            "expected": expected,
            "measured": float(np.mean(traces)),
            "standard_error": error,
            "z": (float(np.mean(traces)) - expected) / error if error else None,
            "relative": float(np.mean(traces)) / expected - 1 if expected else None,
            "partition_samples": n,
        }


def _correlations(config: MasqVsFimConfig, problem: Problem) -> Record:
    """Return the correlations of MaSQ and FIM over the parameters with a nonzero FIM."""
    from scipy.stats import pearsonr, spearmanr

    fim, j = _fim_and_gradient(problem)
    size = min(config.masq_batch_size, problem.num_samples)
    masq = estimate(problem, MaSQ(size), "diag").diagonal().double()
    alive = fim > 0
    f, m = fim[alive].cpu().numpy(), masq[alive].cpu().numpy()
    able = len(f) > 2 and np.ptp(f) > 0 and np.ptp(m) > 0
    return {
        "spearman": float(spearmanr(f, m).statistic) if able else None,
        "pearson": float(pearsonr(f, m).statistic) if able else None,
        "trace_ratio": float(m.sum() / f.sum()) if f.sum() else None,
        "gradient_share": float(size * (j**2).sum() / f.sum()) if f.sum() else None,
    }


def _cancelling(problem: Problem, seed: int) -> Record:
    """Return how often the mean gradient is zero within noise, and how much such weights matter.

    Zero within noise: ``J^2 < 4 F / N``, two standard errors. ``increase`` is the increase of the loss when the weights
    with such a gradient and a FIM among the 10 % largest are perturbed, ``increase_others`` when as many others are.
    """
    fim, j = _fim_and_gradient(problem)
    alive = fim > 0
    if not bool(alive.any()):
        return dict.fromkeys(("zero_share", "zero_share_large", "increase", "increase_others"))
    zero = alive & (j**2 < 4 * fim / problem.num_samples)
    large = fim >= torch.quantile(fim[alive].float()[:: max(1, int(alive.sum()) // 2**24)], 1 - _TOP)
    chosen = (zero & large).nonzero()[:, 0]
    generator = torch.Generator().manual_seed(seed)
    others = (alive & ~(zero & large)).nonzero()[:, 0].cpu()
    others = others[torch.randperm(len(others), generator=generator)[: len(chosen)]]
    signs = 2.0 * torch.randint(2, (len(fim),), generator=generator) - 1
    return {
        "zero_share": float(zero.sum() / alive.sum()),
        "zero_share_large": float((zero & large).sum() / large.sum()),
        "increase": _increase(problem, chosen, signs),
        "increase_others": _increase(problem, others, signs),
    }


def _increase(problem: Problem, places: Tensor, signs: Tensor) -> float:
    """Return the increase of the loss when weights are perturbed by a tenth of their tensor's root mean square."""
    (x, y), space = problem.data, ParameterSpace.of(problem.model)
    parameters = {name: p.detach() for name, p in problem.model.named_parameters()}
    scale = torch.cat([p.square().mean().sqrt().expand(p.numel()) for p in parameters.values()])
    change = torch.zeros_like(scale)
    change[places.to(scale.device)] = _CHANGE
    moves = space.unflatten(change * signs.to(scale) * scale)

    def loss(values: dict[str, Tensor]) -> float:
        return float(problem.loss.values(functional_call(problem.model, values, (x,)), y).mean())

    return loss({name: p + moves[name] for name, p in parameters.items()}) - loss(parameters)


ANALYSIS = Analysis(
    config=MasqVsFimConfig,
    question="How do MaSQ and FIM differ? Their largest entries, MaSQ over the batch size against its closed form, "
    "their correlation during training, their cost, and cancelling gradients.",
    presets=PRESETS,
    check=check,
    load=streams.load_dataset,
    measure=measure,
    report=comparison.report,
    parts=split,
    kinds={
        "table": "fim_max",
        "batches": "batch_size",
        "training": "spearman",
        "costs": "method",
        "cancelling": "zero_share",
    },
)
