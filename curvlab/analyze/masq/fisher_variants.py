"""Does the kind of Fisher matter for EWC, and does one strength fit all kinds?"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

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
from curvlab.data import Dataset
from curvlab.errors import CurvlabError
from curvlab.estimators import estimate
from curvlab.problem import Problem
from curvlab.quantities import EmpiricalFisher, Fisher, MaSQ, Quantity, parse_quantity
from curvlab.results import Claim, Column, aggregate, mean_column, require_direction
from curvlab.text import write_count

#: Difference of accuracies that counts as a loss (our threshold).
_LOSS = 0.02
_SCALES = {"raw": "as estimated", "trace": "one trace"}
_KEYS = ("stream", "variant", "scale", "strength")


class FisherVariantsConfig(TwoTasksConfig):
    """Learn task D1 once, then D2 with EWC for every kind of Fisher, strength and scale."""

    titles: ClassVar[Mapping[str, str]] = {**TwoTasksConfig.titles, "quantities": "curvature"}

    quantities: tuple[str, ...] = ("fisher", "fisher:samples=1", "empirical_fisher", "masq:batch_size=128,norm=mean")
    """Kinds of Fisher; the first one is the reference. Values: fisher, fisher:samples=K, empirical_fisher or
    masq:batch_size=B,norm=N."""
    subsets: tuple[Annotated[int, Field(ge=1)], ...] = (50,)
    """Sample counts on which the first kind is also estimated; may be empty."""
    strengths: tuple[Positive, ...] = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5, 1e6, 1e7)
    """Strengths lambda of the penalty lambda/2 sum F (theta - theta1)^2."""
    trace: Positive = 10.0
    """Trace to which importances are normalised for the scale `trace`."""
    second_lr: Positive = 1e-3
    """Learning rate of Adam for D2."""


PRESETS = {
    "default": Preset(FisherVariantsConfig(hidden=(50, 50)), minutes=1),
    "cpu": Preset(
        FisherVariantsConfig(
            data="mnist",
            hidden=(100, 100),
            validation=500,
            train_samples=20_000,
            test_samples=2000,
            steps=1000,
            subsets=(100, 1000),
            second_lr=1e-4,
        ),
        minutes=13,
        needs=("mnist",),
    ),
    # Data, networks and training of Gepperth and Wiech (2019), who did not compare these variants.
    "paper": Preset(
        FisherVariantsConfig(
            data="mnist", hidden=(800, 800), validation=500, steps=5000, subsets=(100, 1000), second_lr=1e-4
        ),
        minutes=1200,
        needs=("mnist",),
    ),
}
_COLUMNS = (
    Column("stream", "tasks"),
    Column("scale_label", "scale"),
    Column("variant", "Fisher"),
    mean_column("trace", "trace"),
    Column("strength", "best λ", "{:g}".format),
    mean_column("accuracy", "accuracy there"),
    Column("shared_strength", "best λ of the first kind", "{:g}".format),
    mean_column("shared", "accuracy there"),
)


def describe_variant(quantity: Quantity | str, samples: int | None = None) -> str:
    """Return the label of a kind of Fisher.

    Examples:
        >>> describe_variant("fisher", 50), describe_variant("masq:batch_size=128,norm=mean")
        ('exact, 50 samples', 'batched, 128')
    """
    quantity = parse_quantity(quantity)
    name = str(quantity)
    if isinstance(quantity, Fisher):
        name = "exact" if quantity.samples is None else f"sampled, {quantity.samples} a sample"
    elif isinstance(quantity, EmpiricalFisher):
        name = "empirical"
    elif isinstance(quantity, MaSQ):
        name = f"batched, {quantity.batch_size}" + ("" if quantity.norm == "mean" else f", {quantity.norm}")
    return name if samples is None else f"{name}, {write_count(samples, 'sample')}"


def check(config: FisherVariantsConfig, dataset: Dataset) -> None:
    """Raise an error if the configuration cannot be run."""
    subject.check_distinct(strengths=config.strengths)
    if config.subsets:
        subject.check_distinct(subsets=config.subsets)
    streams.check(config, dataset)
    for stream in config.streams:
        task = streams.make_tasks(config, dataset, stream, config.seeds[0])[0]
        have = config.samples or task.sizes["train"]
        if too_many := [number for number in config.subsets if number > have]:
            raise CurvlabError(
                f"subsets has {too_many[0]:,}, more than the {have:,} samples of the first task of {stream}"
            )
        problem = streams.take_problem(config, subject.network(config, dataset, config.seeds[0]), task)
        subject.check_curvature(problem, config.quantities, None)


def importances(config: FisherVariantsConfig, model: nn.Module, task: Task) -> dict[str, Tensor]:
    """Return the diagonal of every kind of Fisher, ``(P,)``, by its label."""
    problem = streams.take_problem(config, model, task)
    found = {describe_variant(q): estimate(problem, q, "diag").diagonal() for q in config.quantities}
    x, y = problem.data
    for number in config.subsets:
        part = Problem(model, "cross_entropy", (x[:number], y[:number]))
        name = describe_variant(config.quantities[0], number)
        found[name] = estimate(part, config.quantities[0], "diag").diagonal()
    return found


def measure(config: FisherVariantsConfig, dataset: Dataset, workspace: Workspace) -> Iterator[Record]:
    """Learn D1, then D2 for every kind, scale and strength; yield one record for each."""
    (stream,), (seed,) = config.streams, config.seeds
    tasks = streams.make_tasks(config, dataset, stream, seed)
    model = streams.train_first(config, dataset, tasks[0], seed, workspace.folder / "first.pt")
    samples = streams.named_samples(tasks, ("validation", "test"))
    strengths = torch.tensor(config.strengths)
    for variant, importance in importances(config, model, tasks[0]).items():
        trace = float(importance.double().sum())
        for scale in _SCALES:
            factor = 1.0 if scale == "raw" or not trace else config.trace / trace
            trained = train_copies(
                model,
                tasks[1].train,
                factor * strengths.to(importance)[:, None] * importance,
                lr=config.second_lr,
                steps=config.steps,
                every=config.steps,
                evaluation=samples,
                batch_size=config.batch_size,
                seed=seed + 1,
            )
            for copy, strength in enumerate(config.strengths):
                yield {"stream": stream, "seed": seed, "variant": variant, "scale": scale, "strength": strength} | {
                    "trace": trace,
                    **{
                        key: _known(streams.pool(tasks, [trained.accuracy[f"{part}{i}"][-1, copy] for i in (1, 2)]))
                        for key, part in (("validation", "validation"), ("accuracy", "test"))
                    },
                    **{f"D{i}": _known(trained.accuracy[f"test{i}"][-1, copy]) for i in (1, 2)},
                }


def _known(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


# Report -------------------------------------------------------------------------------------------------------------


def best_points(found: Sequence[Record], stream: str, scale: str) -> dict[str, Record]:
    """Return the best point of each kind of Fisher on held-out samples."""
    mine = where(found, stream=stream, scale=scale)
    kinds = dict.fromkeys(record["variant"] for record in mine)
    points = {variant: choose_best(where(mine, variant=variant), _KEYS, "validation") for variant in kinds}
    return {variant: point for variant, point in points.items() if point is not None}


def rows(found: Sequence[Record], stream: str, scale: str) -> list[Record]:
    """Return one record per kind: accuracy at its own best strength and at the best strength of the first kind."""
    points = best_points(found, stream, scale)
    shared = next(iter(points.values()), None)
    table = []
    for point in points.values():
        (row,) = aggregate(where(found, **point), _KEYS, ["accuracy", "trace"])
        assert shared is not None
        (at_shared,) = aggregate(where(found, **{**point, "strength": shared["strength"]}), _KEYS, ["accuracy"])
        more = {f"shared{end}": at_shared[f"accuracy{end}"] for end in ("", "_std")}
        table.append({**row, **more, "shared_strength": shared["strength"], "scale_label": _SCALES[scale]})
    return table


def claims(results: Results[FisherVariantsConfig]) -> list[Claim]:
    """Return the claims with their verdicts."""
    known = read_published("masq")["fisher_variants"]
    gate = require_direction(
        streams.conditions(results.config, results.subject), known["conditions"], known["direction"]
    )
    found = results.records["table"]
    answers = []
    for stream in results.config.streams:
        points = {scale: best_points(found, stream, scale) for scale in _SCALES}

        def values(point: Record | None, found: Sequence[Record] = found) -> list[float]:
            return values_by_seed(found, results.seeds, point, "accuracy")

        def costs(scale: str, points: Mapping[str, Mapping[str, Record]] = points) -> list[float]:
            """Return per seed the largest loss, over the kinds, at the best strength of the first kind."""
            mine = points[scale]
            if len(mine) < 2:
                return []
            strength = next(iter(mine.values()))["strength"]
            lost = [subtract(values(p), values({**p, "strength": strength})) for p in mine.values()]
            return [max(seed) for seed in zip(*lost, strict=True)]

        def claim(text: str, numbers: Sequence[float], test: Callable[[float], bool], stream: str = stream) -> Claim:
            return Claim.of(f"{stream}: {text}", known["source"], numbers, test, None, gate)

        first, *others = points["raw"]
        answers += [
            claim(
                f"the Fisher '{other}' is within {_LOSS:g} of '{first}', each at its best strength (difference)",
                subtract(values(points["raw"][other]), values(points["raw"][first])),
                lambda value: abs(value) <= _LOSS,
            )
            for other in others
        ]
        answers += [
            claim(
                f"without normalisation the best strength of '{first}' does not carry over: some kind loses more than "
                f"{_LOSS:g} of its own best accuracy (largest loss)",
                costs("raw"),
                lambda value: value > _LOSS,
            ),
            claim(
                f"normalised to one trace it carries over: no kind loses more than {_LOSS:g} (largest loss)",
                costs("trace"),
                lambda value: value <= _LOSS,
            ),
        ]
    return answers


def report(results: Results[FisherVariantsConfig]) -> Report:
    """Return the table, the claims, and accuracy over the strength for both scales."""
    config, found = results.config, results.records["table"]
    title = f"EWC on two tasks of {results.subject.data}, accuracy on both together; {results.spread}"
    table = [row for stream in config.streams for scale in _SCALES for row in rows(found, stream, scale)]
    return Report(
        Table(title, _COLUMNS, table),
        claims=claims(results),
        figures={
            "as_estimated": lambda: plots.draw_panels(_panels(results, "raw"), columns=3),
            "one_trace": lambda: plots.draw_panels(_panels(results, "trace"), columns=3),
        },
        notes=[
            f"Strengths are selected on held-out samples, mean over the seeds. One trace: normalised to trace "
            f"{config.trace:g}.",
            *_ends(table, config),
        ],
    )


def _ends(table: Sequence[Record], config: FisherVariantsConfig) -> list[str]:
    """Return a note if a best strength is at the edge of the grid."""
    ends = (min(config.strengths), max(config.strengths))
    at = [f"{r['stream']}, {r['variant']}, {r['scale_label']}" for r in table if r["strength"] in ends]
    return [f"The best strength is at the edge of the grid: {'; '.join(at)}."] if at else []


def _panels(results: Results[FisherVariantsConfig], scale: str) -> "list[plots.Panel]":
    return [
        plots.Panel(
            stream,
            where(results.records["table"], stream=stream, scale=scale),
            "strength",
            "accuracy",
            "variant",
            r"strength $\lambda$",
            "test accuracy",
            log="x",
        )
        for stream in results.config.streams
    ]


ANALYSIS = Analysis(
    config=FisherVariantsConfig,
    question="Does the kind of Fisher matter for EWC, and does one strength fit all kinds? Accuracy over the strength "
    "with the exact, sampled, empirical and batched Fisher and on few samples, as estimated and at one trace.",
    presets=PRESETS,
    check=check,
    load=streams.load_dataset,
    measure=measure,
    report=report,
    parts=streams.parts,
    kinds={"table": "variant"},
)
