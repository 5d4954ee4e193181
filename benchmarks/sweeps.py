"""Cost of the engine of sweeps: overhead per run, repetition of a finished sweep, and speed-up by two processes.

    python benchmarks/sweeps.py [--rounds 3]

- ``overhead_ms``: 100 runs that do nothing, one after another, less the time of a sweep with one run: the process
  of a run, its records and its row in the store. With ``--jobs 2``, the total time divided by the number of runs.
- ``rerun_s``: the whole command on a finished sweep of 10,000 runs, start of Python and import of torch included.
- ``speedup``: runs that keep a core busy for a second each, one at a time against two at a time.

The results are medians over the rounds, one line of JSON each. Run it on an idle machine with two cores.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import emit, machine

from curvlab.grid import Outcome, Place, RunSpec, run, write_store

RUNS, BUSY, RERUN = 100, 12, 10_000
NAME = "sweeps"  # this file, which the processes of the runs import


def nothing(config: Mapping[str, Any], _: Place) -> Sequence[dict[str, Any]]:
    return [{"x": config["seed"] / 3}]


def busy(config: Mapping[str, Any], _: Place) -> Sequence[dict[str, Any]]:
    a = torch.randn(200, 200, generator=torch.Generator().manual_seed(config["seed"]))
    for _ in range(config["steps"]):
        a = torch.tanh(a @ a / 14)
    return [{"sum": float(a.sum())}]


def specs(function: str, number: int, **config: Any) -> list[RunSpec]:
    return [RunSpec(f"{NAME}:{function}", {**config, "seed": seed}) for seed in range(number)]


def seconds(work: Sequence[RunSpec], jobs: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        tally = run(work, Path(folder) / "s.sqlite", jobs=jobs)
        taken = time.perf_counter() - started
    assert tally["done"] == len(work)
    return taken


def steps_a_second() -> int:
    started = time.perf_counter()
    busy({"seed": 0, "steps": 500}, Place(Path()))
    return int(500 / (time.perf_counter() - started))


def rerun(rounds: int) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "s.yaml"
        file.write_text(json.dumps({"function": f"{NAME}:nothing", "seeds": list(range(RERUN))}))
        work = specs("nothing", RERUN)
        with write_store(file.with_suffix(".sqlite")) as store:
            store.register(work)
            for spec in work:
                store.finish(Outcome(spec.key, records=nothing(spec.config, Place(Path()))))
        taken = []
        for _ in range(rounds):
            started = time.perf_counter()
            command = [sys.executable, "-m", "curvlab.sweep", "run", str(file)]
            path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
            here = {**os.environ, "PYTHONPATH": path}  # where the function is
            out = subprocess.run(command, check=True, capture_output=True, text=True, env=here).stdout
            taken.append(time.perf_counter() - started)
            assert f"{RERUN:,} runs: {RERUN:,} done" in out
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    emit({"machine": machine(), "cores": os.cpu_count(), "rounds": rounds})
    overhead: dict[int, list[float]] = {1: [], 2: []}
    pairs, steps = [], steps_a_second()
    for _ in range(rounds):
        for jobs, taken in overhead.items():
            start = seconds(specs("nothing", 1), jobs)
            taken.append(1e3 * (seconds(specs("nothing", RUNS + 1), jobs) - start) / RUNS)
        start = seconds(specs("busy", 1, steps=1), 1)
        pairs.append([seconds(specs("busy", BUSY, steps=steps), jobs) - start for jobs in (1, 2)])
    emit({"overhead_ms": {f"jobs {jobs}": round(statistics.median(taken), 1) for jobs, taken in overhead.items()}})
    emit({"speedup": round(statistics.median(one / two for one, two in pairs), 2), "busy_s": pairs})
    emit({"rerun_s": round(statistics.median(rerun(rounds)), 2)})


if __name__ == "__main__":
    main()
