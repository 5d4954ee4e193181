"""Runs cells, one after another, for a number of seconds, and prints every kind of failure as a script."""

import argparse
import json
import sys
import time
from collections import Counter
from functools import partial
from itertools import count

from .cells import Cell, draw
from .judge import Verdict
from .shrink import script, shrink
from .workers import Worker, verdicts

_WORDS = ("right", "refused", "wrong", "raw", "changed")
_BETWEEN = 10  # seconds from one line of progress to the next


class Tally:
    """What came of the cells so far."""

    def __init__(self) -> None:
        self.words: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.failures: dict[tuple[str, str], list[int]] = {}  # seeds by what they have in common
        self.verdicts: dict[tuple[str, str], Verdict] = {}  # of the first of each
        self.refusals: dict[str, list[int]] = {}  # by ``auto``, of what the oracle can

    def add(self, cell: Cell, verdict: Verdict) -> None:
        """Count a cell; say so at once if it fails in a way that none did before."""
        self.words[verdict.word] += 1
        self.kinds.update(set(cell.kinds()))
        if verdict.word == "refused" and cell.backend == "auto" and cell.structure in ("diag", "dense", "block_diag"):
            self.refusals.setdefault(verdict.told, []).append(cell.seed)
        if not verdict.failed:
            return
        if verdict.signature not in self.failures:
            asked = f"{cell.quantity} {cell.structure} of {', '.join(cell.kinds()) or 'a layer'}"
            print(f"{verdict.word} (cell {cell.seed}): {verdict.told} [{asked}]", flush=True)
            self.verdicts[verdict.signature] = verdict
        self.failures.setdefault(verdict.signature, []).append(cell.seed)

    def summary(self, seconds: float) -> str:
        """Return the counts as JSON; seeds are the first of each kind."""
        cells = sum(self.words[word] for word in _WORDS)
        counts = {
            "cells": cells,
            "seconds": round(seconds, 1),
            "cells a second": round(cells / seconds, 1),
            **{word: self.words[word] for word in _WORDS},
            "refused though the reference can": sum(map(len, self.refusals.values())),
            "not run, since torch itself cannot": self.words["not run"],
            "kinds of steps": dict(sorted(self.kinds.items())),
            "refusals": {told: [len(seeds), *seeds[:3]] for told, seeds in self.refusals.items()},
            "failures": {f"{word}: {told}": [len(seeds), *seeds[:3]] for (word, told), seeds in self.failures.items()},
        }
        return json.dumps(counts, indent=1).replace(",\n   ", ", ").replace("[\n   ", "[").replace("\n  ]", "]")


def main() -> int:
    """Return the exit status: 1 if a cell failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to draw cells (default 60)")
    parser.add_argument("--cells", type=int, default=None, help="stop after that many")
    parser.add_argument("--seed", type=int, default=0, help="of the first cell; the others follow (default 0)")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each (default 2)")
    parser.add_argument("--cell", type=int, default=None, help="run this cell alone and print it as a script")
    parser.add_argument("--shrink", type=int, default=12, help="how many kinds of failure to make small (default 12)")
    arguments = parser.parse_args()
    worker = Worker()
    try:
        if arguments.cell is None:
            return _many(arguments, worker)
        cell = draw(arguments.cell)
        verdict = _ask(worker, cell)
        _print(cell, verdict, worker if arguments.shrink else None)
        return int(verdict.failed)
    finally:
        worker.stop()


def _ask(worker: Worker, cell: Cell) -> Verdict:
    worker.give(cell)
    return worker.take()


def _many(arguments: argparse.Namespace, worker: Worker) -> int:
    tally, started, told = Tally(), time.monotonic(), 0.0
    for cell, verdict in verdicts(map(draw, count(arguments.seed)), arguments.jobs):
        tally.add(cell, verdict)
        passed = time.monotonic() - started
        if passed > told + _BETWEEN:
            told = passed
            print(f"{passed:.0f} s, cell {cell.seed}: {dict(tally.words)}", file=sys.stderr, flush=True)
        if passed > arguments.seconds or tally.words.total() == arguments.cells:
            break
    for index, (signature, verdict) in enumerate(tally.verdicts.items()):
        _print(draw(tally.failures[signature][0]), verdict, worker if index < arguments.shrink else None)
    print(tally.summary(passed))
    return int(bool(tally.failures))


def _print(cell: Cell, verdict: Verdict, worker: Worker | None) -> None:
    """Print a cell as a script, made small if there is a worker for that."""
    if verdict.failed and worker is not None:
        cell, verdict = shrink(cell, verdict, partial(_ask, worker))
    told = "".join(f"# {line}\n" for line in verdict.details.splitlines()[-12:])
    print(f"\n# {100 * '-'}\n{script(cell, verdict)}{told}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
