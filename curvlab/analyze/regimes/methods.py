"""Methods of continual learning beside each other: Mirzadeh et al. (2020), Table 2 and Figure 4."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from matplotlib.figure import Figure
from rich.console import Console

from curvlab.analyze import gridded
from curvlab.analyze.command import Analysis, GridOptions
from curvlab.analyze.frame import subject
from curvlab.analyze.regimes import methods_claims as table2
from curvlab.analyze.regimes.methods_options import (
    LISTS,
    PRESETS,
    TUNED,
    Candidate,
    MethodsConfig,
    candidates,
    pairs,
    single,
    trials,
)
from curvlab.analyze.regimes.methods_run import dataset_of, head_of, learnt, network_of, strategy_of, tasks_of
from curvlab.continual.checks import check_loss
from curvlab.continual.outputs import Outputs
from curvlab.data import Dataset
from curvlab.errors import CurvlabError
from curvlab.grid import Place
from curvlab.results import (
    Claim,
    Column,
    RunDirectory,
    Stopwatch,
    aggregate,
    render,
    render_claims,
    write_tables,
)
from curvlab.results.continual import accuracy_curves, method_bars

Record = dict[str, Any]

_VALUES = ["acc", "forgetting", "learning_accuracy", "bytes"]
_NAMES = (Column("stream", "stream"), Column("label", "method"))
_TABLE: tuple[Column, ...] = (
    *_NAMES,
    Column("acc", "accuracy", spread="acc_std"),
    Column("forgetting", "forgetting", spread="forgetting_std"),
    Column("learning_accuracy", "when learnt", spread="learning_accuracy_std"),
    Column("megabytes", "MB kept", format=lambda value: f"{value:.2f}"),
    Column("seconds", "median seconds", format=lambda value: f"{value:.0f}"),
)
_PUBLISHED = (
    *_NAMES,
    Column("acc", "accuracy", spread="acc_std"),
    Column("printed_acc", "published"),
    Column("forgetting", "forgetting", spread="forgetting_std"),
    Column("printed_forgetting", "published"),
)
_SELECTED = (
    *_NAMES,
    *(Column(f"chosen_{name}", name.replace("_", " ")) for name in TUNED),
    Column("validation_acc", "held-out accuracy", spread="validation_acc_std"),
    Column("tried", "of candidates"),
    Column("failed", "of them failed"),
)
_ORDER = (
    Column("stream", "stream"),
    Column("seed", "seed"),
    Column("stable-ewc", "Stable SGD less EWC", format=lambda value: f"{value:.4f}"),
    Column("ewc-naive", "EWC less naive", format=lambda value: f"{value:.4f}"),
    Column("stable-naive", "Stable SGD less naive", format=lambda value: f"{value:.4f}"),
    Column("holds", "in this order", format=lambda value: "yes" if value else "no"),
)
#: Values beyond which there are none.
_LAST = {"batch_size": (1,), "decay": (1.0,), "dropout": (0.0,)}


def run(config: MethodsConfig, options: GridOptions, console: Console) -> None:
    """Choose hyper-parameters, learn and measure, a cell a stream, method and seed, and write the run directory.

    Raises:
        CurvlabError: The configuration, the data or the weights are not usable, and nothing is written; or a cell has
            failed, and what the others gave is written and printed.
    """
    clock = Stopwatch()
    with clock("data"):
        dataset = dataset_of(config, options)
        data_hash = dataset.fingerprint()
    _check(subject.locate_weights(config, options), dataset)
    with gridded.opened("methods", config, options) as directory:
        with clock("selection"):
            tries = ANALYSIS.cells(part for name in pairs(config) for part in trials(config, *name))
            of_tries = gridded.candidates(tries, options, directory) if tries else []
            tried = [record for record in of_tries if "acc" in record]
            chosen = {name: _chosen(config, *name, tried) for name in pairs(config)}
        with clock("cells"):
            cells = ANALYSIS.cells(
                single(config, *name, chosen[name], seed, config.evaluation)
                for name in pairs(config)
                for seed in config.seeds
            )
            records, failed = gridded.run([*tries, *cells], options, directory)
        records = records[len(of_tries) :]
        found = [record for record in records if "acc" in record]
        accuracies = [record for record in records if "accuracy" in record]
        if not found:
            gridded.report_failures(console, directory)
        table = table2.beside_published(summarise(found), Path(config.data).name, config.tasks)
        verdicts, order = table2.claims(found), table2.order(found)
        selection = _selection(tried, chosen)
        write_tables(directory, found, (*_TABLE, gridded.SEEDS) if failed else _TABLE, summary=table)
        directory.write_json("accuracies.json", accuracies)
        directory.write_json("selection.json", selection)
        directory.write_json("claims.json", verdicts)
        directory.write_json("order.json", order)
        with clock("figures"):
            for name, figure in figures(accuracies, table, describe(config)).items():
                directory.write_figure(name, gridded.marked(figure, directory.path))
        gridded.write_provenance(directory, config.seeds, data_hash, clock, config.device)
        _print(console, config, dataset, table, selection, order, verdicts, directory)
        gridded.report_failures(console, directory)


def cell(config: MethodsConfig, place: Place) -> list[Record]:
    """Return the records of a seed, for every stream and method: one of the run, with ``acc``, and its accuracies.

    Of several candidates the best on the held-out samples is taken.

    Raises:
        CurvlabError: The configuration, the data or the weights are not usable, or a training diverges.
    """
    dataset = dataset_of(config, place)
    config = subject.locate_weights(config, place)
    _check(config, dataset)
    records: list[Record] = []
    for stream, method in pairs(config):
        tried = []
        for number, part in enumerate(trials(config, stream, method)):
            found = cell(part, replace(place, folder=place.folder / f"{stream}-{method}-{number}"))
            tried += [record for record in found if "acc" in record]
        chosen = _chosen(config, stream, method, tried)
        for seed in config.seeds:
            part = single(config, stream, method, chosen, seed, config.evaluation)
            records += learnt(part, dataset, chosen, place.folder / f"{stream}-{method}.pt")
    return records


def _check(config: MethodsConfig, dataset: Dataset) -> None:
    """Refuse what cannot be done, before anything is written."""
    subject.check_distinct(seeds=config.seeds, streams=config.streams, methods=config.methods)
    subject.check_subject(config, dataset)
    for method in config.methods:
        tuned = {field: getattr(config, field) for field in LISTS[method].values()}
        subject.check_distinct(**tuned)
        if len(candidates(config, method)) == 1:
            continue
        subject.check_distinct(selection_seeds=config.selection_seeds)
        if not config.validation:
            raise CurvlabError(
                f"the hyper-parameters of {method} are chosen on held-out samples: set validation, or give "
                f"{', '.join(tuned)} a single value each"
            )
        if config.evaluation == "validation" and set(config.seeds) & set(config.selection_seeds):
            raise CurvlabError(
                "a table of the held-out samples needs other seeds than those that hyper-parameters are chosen with: "
                "give seeds and selection_seeds no value in common"
            )
    if config.model != "mlp" and "stable" in config.methods and any(config.dropouts):
        raise CurvlabError(f"dropout is for the mlp: with {config.model} set dropouts to 0")
    if config.fine_tune and config.weights is None:
        raise CurvlabError("fine_tune is for weights from a file: set weights")
    tried = [(method, candidate) for method in config.methods for candidate in candidates(config, method)]
    for dropout in {candidate.get("dropout", 0.0) for _, candidate in tried}:
        network_of(config, dataset, config.seeds[0], dropout)
    for stream in config.streams:
        tasks = tasks_of(config, dataset, stream, config.seeds[0])
        check_loss(tasks, Outputs(tasks, head_of(stream), dataset.num_classes, torch.device("cpu")), "cross_entropy")
        for method, candidate in tried:
            strategy_of(config, method, candidate, tasks)


# Hyper-parameters -----------------------------------------------------------------------------------------------------


def _judged(stream: str, method: str, tried: Sequence[Record]) -> list[Record]:
    """Return a record a candidate: its mean accuracy on the held-out samples over the seeds; None if one diverged."""
    tuned = LISTS[method]
    of_method = [
        {**record, "validation_acc": record["acc"]}
        for record in tried
        if (record["stream"], record["method"]) == (stream, method)
    ]
    rows = aggregate(of_method, ["stream", "method", *tuned], ["validation_acc"])
    for row in rows:
        row["note"] = next(
            (r["note"] for r in of_method if r["note"] and all(r[name] == row[name] for name in tuned)), ""
        )
    return rows


def _chosen(config: MethodsConfig, stream: str, method: str, tried: Sequence[Record]) -> Candidate:
    """Return the candidate with the highest accuracy on the held-out samples, the first of several.

    Raises:
        CurvlabError: All of them have diverged.
    """
    every = candidates(config, method)
    if len(every) == 1:
        return every[0]
    rows = _judged(stream, method, tried)
    able = [row for row in rows if row["validation_acc"] is not None]
    if not able:
        raise CurvlabError(
            f"{method} fails on the {stream} stream with every one of its {len(rows)} candidates ({rows[-1]['note']}); "
            "give lower values with --lrs"
        )
    best = max(able, key=lambda row: cast(float, row["validation_acc"]))
    return {name: best[name] for name in LISTS[method]}


def _selection(tried: Sequence[Record], chosen: Mapping[tuple[str, str], Candidate]) -> list[Record]:
    """Return a record a candidate that was tried, and of a method with a single one this, with ``chosen``."""
    selection: list[Record] = []
    for (stream, method), best in chosen.items():
        rows = _judged(stream, method, tried) or [{"stream": stream, "method": method, **best}]
        selection += [{**row, "chosen": all(row[name] == best[name] for name in best)} for row in rows]
    return selection


def at_an_end(row: Record, selection: Sequence[Record]) -> list[str]:
    """Return the hyper-parameters whose value is the smallest or largest that was tried, and could be surpassed.

    Args:
        row: A candidate of ``selection``.
        selection: Records as ``selection.json`` has them.
    """
    mine = [other for other in selection if (other["stream"], other["method"]) == (row["stream"], row["method"])]
    values = {name: {other[name] for other in mine} for name in LISTS[row["method"]]}
    return [
        name
        for name, tried in values.items()
        if len(tried) > 1 and row[name] in (min(tried), max(tried)) and row[name] not in _LAST.get(name, ())
    ]


# What is made of them -------------------------------------------------------------------------------------------------


def summarise(found: Sequence[Record]) -> list[Record]:
    """Return mean and standard deviation over the seeds, a record a stream and method; of the seconds the median.

    Args:
        found: Records as ``table.json`` has them.
    """
    table = aggregate(found, ["stream", "method"], _VALUES)
    for row in table:
        mine = [record for record in found if (record["stream"], record["method"]) == (row["stream"], row["method"])]
        row["label"] = table2.LABELS[row["method"]]
        row["megabytes"] = None if row["bytes"] is None else row["bytes"] / 1e6
        row["seconds"] = median(record["seconds"] for record in mine)  # another program may disturb one of them
    return table


def figures(accuracies: Sequence[Record], table: Sequence[Record], title: str) -> dict[str, Figure]:
    """Return the figures by name: accuracies over the tasks, and the table as bars.

    Args:
        accuracies: Records as ``accuracies.json`` has them.
        table: Of ``summarise``, with published numbers where there are some.
        title: What stands above.
    """
    return {
        "accuracy_curves": accuracy_curves(accuracies, table2.LABELS, title),
        "accuracy_and_forgetting": method_bars(table, title),
    }


def describe(config: MethodsConfig) -> str:
    """Return what a title says: how many tasks of what."""
    held_out = "" if config.evaluation == "test" else ", on the held-out samples"
    return f"{config.tasks} tasks of {Path(config.data).name}{held_out}"


def _print(
    console: Console,
    config: MethodsConfig,
    dataset: Dataset,
    table: Sequence[Record],
    selection: Sequence[Record],
    order: Sequence[Record],
    claims: Sequence[Claim],
    directory: RunDirectory,
) -> None:
    number, columns = f"{len(config.seeds)} seeds", _TABLE
    if any(row["seeds"] < len(config.seeds) for row in table):
        number, columns = "the seeds that did not fail", (*_TABLE, gridded.SEEDS)
    spread = f"mean ± standard deviation over {number}" if len(config.seeds) > 1 else "one seed"
    console.print(render(table, columns, f"Methods after {describe(config)}; {spread}"), crop=False)
    chosen, ends = _shown(selection)
    if any(row["tried"] > 1 for row in chosen):
        console.print(render(chosen, _SELECTED, "Hyper-parameters, chosen on the held-out samples"), crop=False)
    if any("published_acc" in row for row in table):
        rows = [row | {f"printed_{key}": _printed(row, key) for key in ("acc", "forgetting")} for row in table]
        console.print(render(rows, _PUBLISHED, f"{table2.published()['source']}, beside ours"), crop=False)
    # A published number has no more digits than were printed.
    printed = [c if c.published is None else replace(c, published=f"{c.published:g}") for c in claims]
    console.print(render_claims(printed), crop=False)
    if order:
        console.print(render(order, _ORDER, "Stable SGD above EWC above naive: differences of accuracy"), crop=False)
    for note in (*_notes(config, dataset, ends), f"{_SAVED.format(directory.path)}, {gridded.STORE}."):
        console.print(note, markup=False, highlight=False, soft_wrap=True)


_SAVED = "Saved in {}: table (.json .csv .md .tex), accuracies, selection, claims, order, provenance, figures"


def _shown(selection: Sequence[Record]) -> tuple[list[Record], bool]:
    """Return what is printed of the chosen candidates, and whether a value is at an end of those tried."""
    shown, ends = [], False
    for row in (row for row in selection if row["chosen"]):
        tried = [other for other in selection if (other["stream"], other["method"]) == (row["stream"], row["method"])]
        marked = at_an_end(row, selection)
        values = {f"chosen_{name}": f"{row[name]:g}{'*' * (name in marked)}" for name in LISTS[row["method"]]}
        failed = sum(other.get("validation_acc") is None for other in tried if "note" in other)
        shown.append(
            row | values | {"label": table2.LABELS[row["method"]], "tried": len(tried), "failed": failed},
        )
        ends = ends or bool(marked)
    return shown, ends


def _printed(row: Record, key: str) -> str | None:
    """Return a published number with the digits that it was printed with."""
    if row.get(f"published_{key}") is None:
        return None
    digits = 3 if key == "acc" else 2
    return f"{row[f'published_{key}']:.{digits}f} ± {row[f'published_{key}_std']:.{digits}f}"


def _notes(config: MethodsConfig, dataset: Dataset, ends: bool) -> list[str]:
    sizes: dict[str, tuple[int, int]] = {}
    for stream in config.streams:
        first = tasks_of(config, dataset, stream, config.seeds[0])[0]
        sizes[stream] = (first.sizes["train"], len(dataset.x_test))
    notes = []
    if any(trials(config, *name) for name in pairs(config)):
        notes.append(
            f"Candidates were trained with seed {', '.join(map(str, config.selection_seeds))}, the table's runs with "
            f"{', '.join(map(str, config.seeds))}; all learn from the same number of samples, none of them held out."
        )
    if ends:
        notes.append("* The smallest or largest value that was tried: beyond it may be a better one.")
    if "stable" in config.methods:
        notes.append("The learning rate of stable falls by the decay before its first task too.")
    deviations = table2.deviations(config, sizes)
    return [*notes, "Here, and in the published runs (in brackets):", *(f"- {line}" for line in deviations)]


ANALYSIS = Analysis(
    config=MethodsConfig,
    presets=PRESETS,
    run=run,
    description="Which method forgets least? Learns streams of tasks by naive fine-tuning, EWC, A-GEM, experience "
    "replay, Stable SGD and joint training under the same conditions, the hyper-parameters of each chosen on held-out "
    "samples from equally many candidates, and sets accuracy and forgetting beside the published ones.",
    cell=cell,
)
