"""What can each backend compute for a network, and at what cost? ``curvlab.doctor`` on the command line."""

import json
from collections.abc import Mapping
from typing import ClassVar

from rich.console import Console

from curvlab.analyze.frame import subject
from curvlab.analyze.frame.analysis import Preset, Tool
from curvlab.analyze.frame.functions import describe_functions, list_functions
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
    """Diagnose and print; with ``--out``, also write a run directory.

    Raises:
        CurvlabError: The configuration, the data or the weights are invalid; nothing is written then.
    """
    clock = Stopwatch()
    located = subject.locate_weights(config, options)
    with clock("data"):
        dataset = subject.load_subject(located, options)
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
            if list_functions(config):
                again = subject.load_subject(located, options)
                origin["functions"] = describe_functions(config, dataset, again, origin["data_hash"])
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
    # Converted through JSON, so that missing values are None, not NaN.
    write_tables(directory, json.loads(diagnosis.combinations.to_json(orient="records")))
    directory.write_json("findings.json", [diagnosis.summary, *diagnosis.findings])


ANALYSIS = Tool(
    config=DoctorConfig,
    question="What can each backend compute for this network, and at what cost? Tries every backend and structure on a "
    "few samples, and prints what is refused, why, and what works instead, with the predicted seconds and memory. "
    "It saves the results only with --out.",
    presets={"default": Preset(DoctorConfig(), minutes=0.2)},
    run=run,
)
