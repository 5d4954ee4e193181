"""Does EWC with MaSQ forget as little as with the FIM? Gepperth and Wiech (2019), Table 1 and Figures 1 to 5."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvlab import plots
from curvlab.analyze.frame import subject
from curvlab.analyze.frame.analysis import Analysis, Record, Report, Results, Table, Workspace
from curvlab.analyze.frame.values import where
from curvlab.analyze.masq import streams, table1
from curvlab.analyze.masq.ewc_grid_options import PRESETS, EwcGridConfig
from curvlab.continual.copies import TrainedCopies, train_copies
from curvlab.data import Dataset
from curvlab.errors import CurvlabError
from curvlab.estimators import estimate
from curvlab.quantities import EmpiricalFisher, MaSQ, Quantity

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check(config: EwcGridConfig, dataset: Dataset) -> None:
    """Raise an error if the configuration cannot be run."""
    if config.model != "mlp" or config.weights is not None:
        raise CurvlabError("ewc_grid varies the hidden layers of an mlp: leave model and weights as they are")
    subject.check_distinct(nets=config.nets, rates=config.rates, strengths=config.strengths)
    streams.check(config, dataset)


def split(config: EwcGridConfig) -> list[EwcGridConfig]:
    """Return one configuration per run: a stream, seed and network."""
    return [part.model_copy(update={"nets": (net,)}) for part in streams.parts(config) for net in config.nets]


def measure(config: EwcGridConfig, dataset: Dataset, workspace: Workspace) -> Iterator[Record]:
    """Learn D1, then D2 at every point of the grid; yield one record per point, and save the curves."""
    (stream,), (seed,), (net,) = config.streams, config.seeds, config.nets
    sizes = tuple(map(int, net.split("-")))
    model = subject.network(config.model_copy(update={"hidden": sizes}), dataset, seed)
    tasks = streams.make_tasks(config, dataset, stream, seed)
    samples = streams.named_samples(tasks, ("validation", "test"))

    def train(data: tuple[Tensor, Tensor], weights: Tensor, lr: float, place: int) -> TrainedCopies:
        options: dict[str, Any] = {"steps": config.steps, "every": config.every, "batch_size": config.batch_size}
        return train_copies(model, data, weights, lr=lr, evaluation=samples, seed=2 * seed + place, **options)

    total = sum(p.numel() for p in model.parameters())
    nothing = torch.zeros(1, total, device=config.device, dtype=getattr(torch, config.dtype))
    first = train(tasks[0].train, nothing, config.lr, 0)
    model.load_state_dict({name: tensor[0] for name, tensor in first.parameters.items()})
    problem = streams.take_problem(config, model, tasks[0])
    quantities: dict[str, Quantity] = {"masq": MaSQ(config.masq_batch_size), "fim": EmpiricalFisher()}
    importances = {name: estimate(problem, q, "diag").diagonal() for name, q in quantities.items()}
    points = [("none", 0.0), *product(importances, config.strengths)]
    weights = torch.cat([nothing, *(strength * importances[name][None] for name, strength in points[1:])])

    names = {"stream": stream, "net": net, "seed": seed}
    kept = [{"importance": "first", "rate": config.lr, "strength": 0.0, **_curve(tasks, first, 0)}]
    for rate in config.rates:
        second = train(tasks[1].train, weights, rate, 1)
        for copy, (importance, strength) in enumerate(points):
            point = {"importance": importance, "rate": rate, "strength": strength}
            kept.append({**point, **_curve(tasks, second, copy)})
            yield {**names, **point, **_summary(tasks, second, copy)}
    workspace.save("curves", {**names, "steps": first.steps, "curves": kept})


def _together(tasks: Sequence[Any], trained: TrainedCopies, part: str, copy: int) -> Tensor:
    both: Tensor = streams.pool(tasks, [trained.accuracy[f"{part}{i}"][:, copy] for i in (1, 2)])
    return both


def _curve(tasks: Sequence[Any], trained: TrainedCopies, copy: int) -> Record:
    """Return test accuracies over the steps, rounded to four digits for the figure."""
    lines = {f"D{i}": trained.accuracy[f"test{i}"][:, copy] for i in (1, 2)}
    lines["both"] = _together(tasks, trained, "test", copy)
    return {name: [round(value, 4) for value in line.tolist()] for name, line in lines.items()}


def _summary(tasks: Sequence[Any], trained: TrainedCopies, copy: int) -> Record:
    """Return accuracies on D1 and D2 together, at the end and at the best step; None if the retraining diverged.

    Keys: ``last`` and ``best`` are test accuracies at the last step and at the step with the highest validation
    accuracy (``validation_best``); ``peak`` is the highest test accuracy (the paper's "best"); ``last_D1`` and
    ``last_D2`` are final test accuracies on each task.
    """
    validation, test = (_together(tasks, trained, part, copy) for part in ("validation", "test"))
    if bool(validation.isnan().any()):
        return dict.fromkeys(("validation_last", "validation_best", "last", "best", "peak", "last_D1", "last_D2"))
    return {
        "validation_last": float(validation[-1]),
        "validation_best": float(validation.max()),
        "last": float(test[-1]),
        "best": float(test[validation.argmax()]),
        "peak": float(test.max()),
        "last_D1": float(trained.accuracy["test1"][-1, copy]),
        "last_D2": float(trained.accuracy["test2"][-1, copy]),
    }


def report(results: Results[EwcGridConfig]) -> Report:
    """Return Table 1, the claims, and the curves of Figures 1 to 5."""
    config, found = results.config, results.records["table"]
    title = f"EWC on two tasks of {results.subject.data}: accuracy on D1 and D2 together; {results.spread}"
    chosen: dict[str, Any] = {stream: table1.choose_points(where(found, stream=stream)) for stream in config.streams}
    rows = [
        row
        for stream in config.streams
        for row in table1.rows(stream, where(found, stream=stream), results.subject.data)
    ]
    curves = results.artifacts["curves"]
    return Report(
        Table(title, table1.COLUMNS, rows),
        tables=[
            Table(title, table1.COLUMNS, rows),
            Table(
                "MaSQ and FIM at equal strength, with the network and rate selected for MaSQ by last accuracy",
                table1.EQUAL_COLUMNS,
                [row for stream in config.streams for row in table1.at_equal_strength(where(found, stream=stream))],
            ),
        ],
        claims=table1.claims(found, config, results.subject),
        identities=table1.identities(found, config),
        figures={"curves": lambda: _draw(chosen, curves)} if curves else {},
        deviations=table1.deviations(config, results.subject),
        notes=[
            "D1 is learnt once per network and seed; every retraining starts there. Points of the grid are selected by "
            "the accuracy on held-out samples, mean over the seeds: 'best' by the highest value during retraining (the "
            "test accuracy is taken at the same step), 'last' by the final value. 'selected on test' is the accuracy "
            "that selection on test samples, as in the paper, would report."
        ],
    )


def _draw(chosen: Mapping[str, Mapping[str, table1.Point | None]], curves: Sequence[Record]) -> "Figure":
    """Draw one column per stream: MaSQ selected by best and by last accuracy, FIM, and lambda = 0.

    FIM and lambda = 0 have the network and rate selected for MaSQ by best; the FIM has its own best strength there.
    """
    panels: dict[tuple[str, str], list[Record]] = {}
    for (stream, points), (label, name) in product(chosen.items(), table1.FIGURE_ROWS.items()):
        point = points[name]
        if point is None:
            continue
        for kept in where(curves, stream=stream, net=point.net):
            (first,) = where(kept["curves"], importance="first")
            (second,) = where(kept["curves"], importance=point.importance, rate=point.rate, strength=point.strength)
            panels.setdefault((label, stream), []).append(
                {"seed": kept["seed"], "steps": kept["steps"], "first": first, "second": second}
            )
    return plots.retraining_curves(panels)


ANALYSIS = Analysis(
    config=EwcGridConfig,
    question="Does EWC with MaSQ forget as little as with the FIM? A grid of networks, learning rates and strengths "
    "over three streams of two tasks, points selected on held-out samples.",
    presets=PRESETS,
    check=check,
    load=streams.load_dataset,
    measure=measure,
    report=report,
    parts=split,
    kinds={"table": "importance"},
    artifacts=("curves",),
)
