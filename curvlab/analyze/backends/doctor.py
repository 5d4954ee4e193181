"""What can each backend do for a network, and what will it cost? ``curvlab.doctor`` from the command line."""

import json
from collections.abc import Mapping
from typing import ClassVar

from rich.console import Console

from curvlab.analyze.frame import subject
from curvlab.analyze.frame.analysis import Preset, Tool
from curvlab.analyze.frame.subject import SubjectConfig
from curvlab.commandline.options import RunOptions
from curvlab.doctor import Diagnosis, doctor
from curvlab.errors import CurvlabError
from curvlab.results import RunDirectory, Stopwatch, collect, open_run, write_tables


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
    located = subject.locate_weights(config, options)
    with clock("data"):
        dataset = subject.load_dataset(located, options)
    subject.check_subject(located, dataset)
    problem = subject.problem(located, dataset, subject.network(located, dataset, seed=0))
    subject.check_curvature(problem, config.quantities, config.params)
    directory = None if options.out is None else open_run(options.out, "doctor", config.to_yaml())
    try:
        with clock("doctor"):
            diagnosis = doctor(problem, config.quantities, config.params, progress=True)
        if directory is not None:
            _write(directory, diagnosis)
            origin = collect(
                seeds=[0],
                data_hash=dataset.fingerprint(),
                stages=clock.seconds,
                started=clock.started,
                device=config.device,
            )
            directory.write_json("provenance.json", origin)
    except (CurvlabError, KeyboardInterrupt):
        if directory is not None:
            directory.discard_if_empty()
        raise
    console.print(str(diagnosis), markup=False, highlight=False, soft_wrap=True)
    if directory is not None:
        saved = f"Saved in {directory.path}: table (.json .csv .md .tex), findings, provenance."
        console.print(saved, markup=False, soft_wrap=True)


def _write(directory: RunDirectory, diagnosis: Diagnosis) -> None:
    # Through JSON, where what is not there is null rather than NaN.
    write_tables(directory, json.loads(diagnosis.cells.to_json(orient="records")))
    directory.write_json("findings.json", [diagnosis.summary, *diagnosis.findings])


ANALYSIS = Tool(
    config=DoctorConfig,
    question="What can each backend do for this network, and what will it cost? Tries every backend and structure "
    "on a few samples: what is refused, why, and what would work; and the predicted seconds and memory of the rest. "
    "It prints, and saves only with --out.",
    presets={"default": Preset(DoctorConfig(), minutes=0.2)},
    run=run,
)
