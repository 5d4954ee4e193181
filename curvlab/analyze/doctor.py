"""What can each backend do for a network, and what will it cost? ``curvlab.doctor`` from the command line."""

import json
from collections.abc import Mapping
from typing import ClassVar

from rich.console import Console

from curvlab import doctor
from curvlab.analyze import subject
from curvlab.analyze.command import Analysis, RunOptions
from curvlab.analyze.subject import SubjectConfig
from curvlab.results import Stopwatch, collect, open_run, write_tables


class DoctorConfig(SubjectConfig):
    """Try every backend and structure on a few samples of a network."""

    titles: ClassVar[Mapping[str, str]] = {**SubjectConfig.titles, "quantities": "curvature"}

    quantities: tuple[str, ...] = ("fisher",)
    """fisher, fisher:samples=K, empirical_fisher, masq:batch_size=B, ggn or hessian; one or several."""
    params: tuple[str, ...] | None = None
    """Patterns of parameter names, such as 'fc*.weight'; none means all trainable ones."""


def run(config: DoctorConfig, options: RunOptions, console: Console) -> None:
    """Diagnose and print; with a folder for the results, write the run directory, too.

    Raises:
        CurvlabError: The configuration, the data or the weights are not usable; nothing is written then.
    """
    clock = Stopwatch()
    with clock("data"):
        dataset = subject.dataset(config, options)
    subject.check(config, dataset)
    subject.check_distinct(quantities=config.quantities)
    problem = subject.problem(config, dataset, subject.network(config, dataset, seed=0))
    with clock("doctor"):
        diagnosis = doctor(problem, config.quantities, config.params, progress=True)
    console.print(str(diagnosis), markup=False, highlight=False, soft_wrap=True)
    if options.out is None:
        return
    directory = open_run(options.out, "doctor", config.to_yaml())
    write_tables(directory, json.loads(diagnosis.cells.to_json(orient="records")))
    directory.write_json("findings.json", [diagnosis.summary, *diagnosis.findings])
    data_hash = dataset.fingerprint()
    origin = collect(seeds=[0], data_hash=data_hash, stages=clock.seconds, started=clock.started, device=config.device)
    directory.write_json("provenance.json", origin)
    console.print(f"Saved in {directory.path}.", markup=False, soft_wrap=True)


ANALYSIS = Analysis(
    config=DoctorConfig,
    presets={"default": DoctorConfig()},
    run=run,
    description="What can each backend do for this network, and what will it cost? Tries every backend and structure "
    "on a few samples: what is refused, why, and what would work; and the predicted seconds and memory of the rest. "
    "It prints, and saves only with --out.",
)
