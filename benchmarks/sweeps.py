"""What the engine of sweeps costs: a cell, a rerun of what is finished, and what two processes gain.

    python benchmarks/sweeps.py [--rounds 3]

- ``overhead_ms``: 100 cells that do nothing, one after the other, less the same start with one cell; a cell's
  process, its records and its place in the store. With ``--jobs 2``, the time of the whole over the number of cells.
- ``rerun_s``: the whole command on a finished sweep of 10,000 cells, Python's start and torch's import included.
- ``speedup``: cells that keep a core busy, a second each, in one process after the other and in two at a time.

Reported are medians over the rounds. Run it on a machine that does nothing else; it needs two cores. Prints a
line of JSON a result.
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

from curvlab.grid import Cell, Outcome, Place, run, writing

CELLS, BUSY, RERUN = 100, 12, 10_000
NAME = "sweeps"  # this file, which the processes of the cells import


def nothing(config: Mapping[str, Any], _: Place) -> Sequence[dict[str, Any]]:
    return [{"x": config["seed"] / 3}]


def busy(config: Mapping[str, Any], _: Place) -> Sequence[dict[str, Any]]:
    a = torch.randn(200, 200, generator=torch.Generator().manual_seed(config["seed"]))
    for _ in range(config["steps"]):
        a = torch.tanh(a @ a / 14)
    return [{"sum": float(a.sum())}]


def cells(function: str, number: int, **config: Any) -> list[Cell]:
    return [Cell(f"{NAME}:{function}", {**config, "seed": seed}) for seed in range(number)]


def seconds(work: Sequence[Cell], jobs: int) -> float:
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
        work = cells("nothing", RERUN)
        with writing(file.with_suffix(".sqlite")) as store:
            store.register(work)
            for cell in work:
                store.finish(Outcome(cell.key, records=nothing(cell.config, Place(Path()))))
        taken = []
        for _ in range(rounds):
            started = time.perf_counter()
            command = [sys.executable, "-m", "curvlab.sweep", "run", str(file)]
            path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
            here = {**os.environ, "PYTHONPATH": path}  # where the function is
            out = subprocess.run(command, check=True, capture_output=True, text=True, env=here).stdout
            taken.append(time.perf_counter() - started)
            assert f"{RERUN:,} cells: {RERUN:,} done" in out
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
            start = seconds(cells("nothing", 1), jobs)
            taken.append(1e3 * (seconds(cells("nothing", CELLS + 1), jobs) - start) / CELLS)
        start = seconds(cells("busy", 1, steps=1), 1)
        pairs.append([seconds(cells("busy", BUSY, steps=steps), jobs) - start for jobs in (1, 2)])
    emit({"overhead_ms": {f"jobs {jobs}": round(statistics.median(taken), 1) for jobs, taken in overhead.items()}})
    emit({"speedup": round(statistics.median(one / two for one, two in pairs), 2), "busy_s": pairs})
    emit({"rerun_s": round(statistics.median(rerun(rounds)), 2)})


if __name__ == "__main__":
    main()
