"""Does IMM work with MaSQ instead of the FIM? Future work of Gepperth and Wiech (2019), section 5."""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from curvlab import plots
from curvlab.analyze.frame import subject
from curvlab.analyze.frame.analysis import Analysis, Preset, Record, Report, Results, Table, Workspace
from curvlab.analyze.frame.published import read_published
from curvlab.analyze.frame.values import where
from curvlab.analyze.masq import streams
from curvlab.analyze.masq.choice import choose_best, subtract, values_by_seed
from curvlab.analyze.masq.streams import Positive, TwoTasksConfig
from curvlab.continual import Task
from curvlab.continual.copies import train_copies
from curvlab.continual.drop_transfer import drop_transfer
from curvlab.data import Dataset
from curvlab.estimators import estimate
from curvlab.parameters import ParameterSpace
from curvlab.quantities import EmpiricalFisher, MaSQ
from curvlab.results import Claim, Column, aggregate, mean_column, require_direction
from curvlab.training import Training, evaluate, fit

Transfer = Literal["weight", "l2", "drop"]

_FLOOR = 1e-8  # of importances, as in the authors' code
_MERGES = {"mean": "mean-IMM", "fim": "mode-IMM, FIM", "masq": "mode-IMM, MaSQ"}
_KEYS = ("stream", "transfer", "merge", "alpha")


class ImmMasqConfig(TwoTasksConfig):
    """Learn two tasks and merge their solutions: mean-IMM, and mode-IMM with the FIM and with MaSQ."""

    titles: ClassVar[dict[str, str]] = {**TwoTasksConfig.titles, "transfers": "merging"}

    transfers: tuple[Transfer, ...] = ("weight", "l2", "drop")
    """Transfer techniques of Lee et al. (2017) for D2: weight (start at the solution of D1), l2 (plus a penalty on the
    distance), drop (plus random replacement of weights by those of D1)."""
    l2: float = Field(default=1e-3, gt=0)
    """Factor of the squared distance in L2-transfer."""
    drop: float = Field(default=0.5, gt=0, lt=1)
    """Dropout rate of drop-transfer."""
    alphas: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    """Mixing weights of D2; D1 has weight 1 - alpha."""
    second_lr: Positive = 1e-3
    """Learning rate of Adam for D2."""
    masq_batch_size: int = Field(default=100, ge=1)
    """Batch size of MaSQ (norm=sumsq)."""


PRESETS = {
    "default": Preset(ImmMasqConfig(hidden=(50, 50)), minutes=1),
    "cpu": Preset(
        ImmMasqConfig(
            data="mnist",
            hidden=(200, 200),
            validation=500,
            train_samples=20_000,
            test_samples=2000,
            steps=1000,
            masq_batch_size=1000,
            alphas=(0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
        ),
        minutes=3,
        needs=("mnist",),
    ),
    # Data, networks and training of Gepperth and Wiech (2019), who did not run IMM.
    "paper": Preset(
        ImmMasqConfig(
            data="mnist",
            hidden=(800, 800),
            validation=500,
            steps=5000,
            masq_batch_size=1000,
            alphas=(0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
        ),
        minutes=120,
        needs=("mnist",),
    ),
}
_COLUMNS = (
    Column("stream", "tasks"),
    Column("transfer", "transfer"),
    Column("label", "merge"),
    Column("alpha", "alpha", "{:g}".format),
    mean_column("accuracy", "accuracy"),
    mean_column("D1", "D1"),
    mean_column("D2", "D2"),
    mean_column("halves", "alpha 0.5"),
)


def check(config: ImmMasqConfig, dataset: Dataset) -> None:
    """Raise an error if the configuration cannot be run."""
    subject.check_distinct(transfers=config.transfers, alphas=config.alphas)
    streams.check(config, dataset)


def merge(first: Tensor, second: Tensor, weights: tuple[Tensor, Tensor], alpha: float) -> Tensor:
    """Return ``((1 - a) F1 t1 + a F2 t2) / ((1 - a) F1 + a F2)``, elementwise.

    Args:
        first: Solution of D1, ``(P,)``.
        second: Solution of D2, ``(P,)``.
        weights: Importances after D1 and after D2, ``(P,)``; ones give mean-IMM.
        alpha: Mixing weight a of D2.
    """
    one, other = (1 - alpha) * weights[0], alpha * weights[1]
    return (one * first + other * second) / (one + other)


def measure(config: ImmMasqConfig, dataset: Dataset, workspace: Workspace) -> Iterator[Record]:
    """Learn both tasks with every transfer; yield one record per merged network, and one for the last solution."""
    (stream,), (seed,) = config.streams, config.seeds
    tasks = streams.make_tasks(config, dataset, stream, seed)
    model = streams.train_first(config, dataset, tasks[0], seed, workspace.folder / "first.pt")
    first, before = _vector(model), _importances(config, model, tasks[0])
    for transfer in config.transfers:
        after = _train_second(config, model, tasks[1], transfer, seed)
        second, now = _vector(after), _importances(config, after, tasks[1])
        names = {"stream": stream, "seed": seed, "transfer": transfer}
        yield {**names, "merge": "last", "alpha": 1.0, **_accuracies(after, tasks)}
        for name in _MERGES:
            for alpha in config.alphas:
                vector_to_parameters(merge(first, second, (before[name], now[name]), alpha), after.parameters())
                yield {**names, "merge": name, "alpha": alpha, **_accuracies(after, tasks)}


def _vector(model: nn.Module) -> Tensor:
    return parameters_to_vector(model.parameters()).detach().clone()


def _importances(config: ImmMasqConfig, model: nn.Module, task: Task) -> dict[str, Tensor]:
    problem = streams.take_problem(config, model, task)
    quantities = {"fim": EmpiricalFisher(), "masq": MaSQ(config.masq_batch_size)}
    found = {name: estimate(problem, quantity, "diag").diagonal() + _FLOOR for name, quantity in quantities.items()}
    return {**found, "mean": torch.ones_like(found["fim"])}


def _train_second(config: ImmMasqConfig, model: nn.Module, task: Task, transfer: Transfer, seed: int) -> nn.Module:
    """Return the network after D2, learnt with this transfer."""
    after = deepcopy(model)
    training = Training(
        optimizer="adam", lr=config.second_lr, steps=config.steps, batch_size=config.batch_size, seed=seed + 1
    )
    if transfer == "drop":
        with drop_transfer(after, dict(model.named_parameters()), config.drop):
            fit(after, task.train, training=training, progress=False)
    elif transfer == "weight":
        fit(after, task.train, training=training, progress=False)
    else:
        total = ParameterSpace.of(model).total
        weights = torch.full((1, total), 2 * config.l2)
        options = {"steps": config.steps, "every": config.steps, "batch_size": config.batch_size, "seed": seed + 1}
        trained = train_copies(model, task.train, weights, lr=config.second_lr, evaluation={}, **options)
        after.load_state_dict({name: tensor[0] for name, tensor in trained.parameters.items()})
    return after


def _accuracies(model: nn.Module, tasks: tuple[Task, Task]) -> Record:
    """Return validation and test accuracy on both tasks together, and test accuracy on each."""
    each = {part: [evaluate(model, *getattr(task, part)).accuracy for task in tasks] for part in ("validation", "test")}
    both = {part: float(streams.pool(tasks, accuracies)) for part, accuracies in each.items()}
    return {"validation": both["validation"], "accuracy": both["test"], "D1": each["test"][0], "D2": each["test"][1]}


# Report -------------------------------------------------------------------------------------------------------------


def rows(found: Sequence[Record], stream: str) -> list[Record]:
    """Return one record per transfer and merge of a stream, with alpha selected on held-out samples."""
    table = []
    for transfer in dict.fromkeys(r["transfer"] for r in found):
        for name, label in {"last": "none (last solution)", **_MERGES}.items():
            mine = where(found, stream=stream, transfer=transfer, merge=name)
            point = choose_best(mine, _KEYS, "validation")
            if point is None:
                continue
            values = ["accuracy", "D1", "D2"]
            (row,) = aggregate(where(mine, **point), _KEYS, values)
            halves = aggregate(where(mine, alpha=0.5), _KEYS, values)
            row |= {"label": label}
            table.append(row | {f"halves{end}": one[f"accuracy{end}"] for one in halves for end in ("", "_std")})
    return table


def claims(results: Results[ImmMasqConfig]) -> list[Claim]:
    """Return the claims, with transfer and alpha selected on held-out samples."""
    known = read_published("masq")["imm"]
    ours = streams.conditions(results.config, results.subject)
    gate = require_direction(ours, known["conditions"], known["direction"])
    answers = []
    for stream in results.config.streams:
        mine = where(results.records["table"], stream=stream)

        def best(name: str, mine: Sequence[Record] = mine, **more: str) -> list[float]:
            chosen = choose_best(where(mine, merge=name, **more), _KEYS, "validation")
            return values_by_seed(mine, results.seeds, chosen, "accuracy")

        def claim(
            text: str, values: Sequence[float], test: Callable[[float], bool], source: str, stream: str = stream
        ) -> Claim:
            return Claim.of(f"{stream}: {text}", source, values, test, None, gate)

        drop = best("fim", transfer="drop") if "drop" in results.config.transfers else []
        weight = best("fim", transfer="weight") if "weight" in results.config.transfers else []
        answers += [
            claim(
                "mode-IMM with MaSQ is at most 0.02 below mode-IMM with the FIM (difference)",
                subtract(best("masq"), best("fim")),
                lambda value: value >= -0.02,
                known["source"],
            ),
            claim(
                "mode-IMM with the FIM is at most 0.01 below mean-IMM (difference)",
                subtract(best("fim"), best("mean")),
                lambda value: value >= -0.01,
                known["imm source"],
            ),
            claim(
                "mode-IMM with the FIM is above the last solution by 0.01 or more (difference)",
                subtract(best("fim"), best("last")),
                lambda value: value >= 0.01,
                known["imm source"],
            ),
            claim(
                "drop-transfer is not below weight-transfer (mode-IMM with the FIM, difference)",
                subtract(drop, weight),
                lambda value: value >= 0,
                known["imm source"],
            ),
        ]
    return answers


def report(results: Results[ImmMasqConfig]) -> Report:
    """Return the table, the claims, and accuracy over alpha."""
    config, found = results.config, results.records["table"]
    title = f"IMM on two tasks of {results.subject.data}, accuracy on both together; {results.spread}"
    return Report(
        Table(title, _COLUMNS, [row for stream in config.streams for row in rows(found, stream)]),
        claims=claims(results),
        figures={"alphas": lambda: plots.draw_panels(_panels(results))},
        deviations=["Adam (SGD in Lee et al.), and two tasks (three permuted MNIST tasks in Lee et al.)."],
        notes=["Alpha is selected by the accuracy on held-out samples, mean over the seeds."],
    )


def _panels(results: Results[ImmMasqConfig]) -> "list[plots.Panel]":
    """Return one panel per stream; every merge has the transfer selected on held-out samples."""
    panels = []
    for stream in results.config.streams:
        mine = where(results.records["table"], stream=stream)
        points = []
        for name, label in _MERGES.items():
            best = choose_best(where(mine, merge=name), _KEYS, "validation")
            chosen = [] if best is None else where(mine, merge=name, transfer=best["transfer"])
            points += [{**record, "label": label} for record in chosen]
        panels.append(
            plots.Panel(
                stream, points, "alpha", "accuracy", "label", r"mixing weight $\alpha$ of $D_2$", "test accuracy"
            )
        )
    return panels


ANALYSIS = Analysis(
    config=ImmMasqConfig,
    question="Does IMM work with MaSQ instead of the FIM? Mean-IMM, and mode-IMM with the FIM and with MaSQ, on two "
    "tasks, with weight-, L2- and drop-transfer.",
    presets=PRESETS,
    check=check,
    load=streams.load_dataset,
    measure=measure,
    report=report,
    parts=streams.parts,
    kinds={"table": "merge"},
)
