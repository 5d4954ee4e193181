"""Runs cells for a number of seconds; see the package."""

import argparse
import json
import sys
import time
from collections import Counter

import torch

from .cells import draw
from .judge import UnfitCellError, Verdict, judge
from .shrink import script, shrink

_SHRUNK = 12  # failures of different kinds that are made small and printed


def main() -> int:
    """Return the exit status: 1 if a cell failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to run (default 60)")
    parser.add_argument("--cells", type=int, default=None, help="stop after that many cells")
    parser.add_argument("--seed", type=int, default=0, help="of the first cell; the others follow (default 0)")
    parser.add_argument(
        "--cell", type=int, default=None, help="run the cell of this seed alone and print it as a script"
    )
    parser.add_argument("--no-shrink", action="store_true", help="print failures as they were drawn")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.cell is not None:
        return _one(arguments.cell, not arguments.no_shrink)
    return _many(arguments)


def _one(seed: int, small: bool) -> int:
    cell = draw(seed)
    verdict = judge(cell)
    if verdict.failed and small:
        cell, verdict = shrink(cell, verdict)
    print(script(cell, verdict))
    print(verdict.word, verdict.told, verdict.details, file=sys.stderr)
    return int(verdict.failed)


def _many(arguments: argparse.Namespace) -> int:
    started = last = time.monotonic()
    counts: Counter[str] = Counter()
    steps: Counter[str] = Counter()
    refusals: Counter[str] = Counter()
    seeds: dict[str, int] = {}
    failures: dict[tuple[str, str], list[int]] = {}
    verdicts: dict[tuple[str, str], Verdict] = {}
    seed = arguments.seed
    while time.monotonic() - started < arguments.seconds and (
        arguments.cells is None or sum(counts.values()) < arguments.cells
    ):
        cell = draw(seed)
        seed += 1
        try:
            verdict = judge(cell)
        except UnfitCellError:
            counts["not run"] += 1
            continue
        counts[verdict.word] += 1
        steps.update(set(cell.kinds()))
        if verdict.word == "refused" and cell.backend == "auto" and cell.structure in ("diag", "dense", "block_diag"):
            counts["refused though the reference can"] += 1
            refusals[verdict.told] += 1
            seeds.setdefault(verdict.told, cell.seed)
        if verdict.failed:
            if verdict.signature not in failures:
                print(
                    f"{verdict.word} (cell {cell.seed}): {verdict.told}  [{cell.quantity} {cell.structure} {', '.join(cell.kinds())}]",
                    flush=True,
                )
                verdicts[verdict.signature] = verdict
            failures.setdefault(verdict.signature, []).append(cell.seed)
        if time.monotonic() - last > 10:
            last = time.monotonic()
            print(f"{last - started:.0f} s: {dict(counts)}", file=sys.stderr, flush=True)
    seconds = time.monotonic() - started
    for signature, found in list(failures.items())[:_SHRUNK]:
        cell, verdict = draw(found[0]), verdicts[signature]
        if not arguments.no_shrink:
            cell, verdict = shrink(cell, verdict)
        print(f"\n# {'-' * 100}\n{script(cell, verdict)}", flush=True)
    for told, count in refusals.most_common(20):
        print(f"refused {count} times, first in cell {seeds[told]}: {told}")
    done = sum(counts[word] for word in ("right", "refused", "wrong", "raw", "changed"))
    print(
        json.dumps(
            {
                "cells": done,
                "seconds": round(seconds, 1),
                "cells a second": round(done / seconds, 1),
                **{word: counts[word] for word in ("right", "refused", "wrong", "raw", "changed", "not run")},
                "refused though the reference can": counts["refused though the reference can"],
                "kinds of steps": len(steps),
                "failures": {f"{word}: {told}": found[:5] for (word, told), found in failures.items()},
            },
            indent=2,
        )
    )
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
