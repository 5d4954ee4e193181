"""Run cases for a number of seconds and print each kind of failure as a script."""

import argparse
import json
import sys
import time
from collections import Counter
from functools import partial
from itertools import count

from .cases import Case, draw
from .judge import Verdict
from .shrink import script, shrink
from .workers import Worker, judge_all

_OUTCOMES = ("right", "refused", "wrong", "error", "changed")
_INTERVAL = 10  # seconds between lines of progress


class Tally:
    """Counts of the outcomes of the cases."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.failures: dict[tuple[str, str], list[int]] = {}  # seeds by kind of failure
        self.verdicts: dict[tuple[str, str], Verdict] = {}  # the first verdict of each kind
        self.refusals: dict[str, list[int]] = {}  # seeds that ``auto`` refuses although the oracle can compute them

    def add(self, case: Case, verdict: Verdict) -> None:
        """Count a case; print it if it is the first failure of its kind."""
        self.outcomes[verdict.outcome] += 1
        self.kinds.update(set(case.kinds()))
        if (
            verdict.outcome == "refused"
            and case.backend == "auto"
            and case.structure in ("diag", "dense", "block_diag")
        ):
            self.refusals.setdefault(verdict.reason, []).append(case.seed)
        if not verdict.failed:
            return
        if verdict.signature not in self.failures:
            asked = f"{case.quantity} {case.structure} of {', '.join(case.kinds()) or 'a layer'}"
            print(f"{verdict.outcome} (case {case.seed}): {verdict.reason} [{asked}]", flush=True)
            self.verdicts[verdict.signature] = verdict
        self.failures.setdefault(verdict.signature, []).append(case.seed)

    def summary(self, seconds: float) -> str:
        """Return the counts as JSON, with the first seeds of each kind."""
        cases = sum(self.outcomes[outcome] for outcome in _OUTCOMES)
        counts = {
            "cases": cases,
            "seconds": round(seconds, 1),
            "cases per second": round(cases / seconds, 1),
            **{outcome: self.outcomes[outcome] for outcome in _OUTCOMES},
            "refused although the reference can": sum(map(len, self.refusals.values())),
            "not run, because torch itself cannot": self.outcomes["not run"],
            "kinds of steps": dict(sorted(self.kinds.items())),
            "refusals": {reason: [len(seeds), *seeds[:3]] for reason, seeds in self.refusals.items()},
            "failures": {f"{outcome}: {reason}": [len(s), *s[:3]] for (outcome, reason), s in self.failures.items()},
        }
        return json.dumps(counts, indent=1).replace(",\n   ", ", ").replace("[\n   ", "[").replace("\n  ]", "]")


def main() -> int:
    """Return the exit status: 1 if a case failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="duration (default 60)")
    parser.add_argument("--cases", type=int, default=None, help="stop after this number of cases")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the first case; the next cases have the next seeds (default 0)"
    )
    parser.add_argument("--jobs", type=int, default=2, help="number of processes, with one thread each (default 2)")
    parser.add_argument(
        "--case", type=int, default=None, help="run only the case of this seed and print it as a script"
    )
    parser.add_argument("--shrink", type=int, default=12, help="number of kinds of failure to reduce (default 12)")
    arguments = parser.parse_args()
    worker = Worker()
    try:
        if arguments.case is None:
            return _run_cases(arguments, worker)
        case = draw(arguments.case)
        verdict = _ask(worker, case)
        _print(case, verdict, worker if arguments.shrink else None)
        return int(verdict.failed)
    finally:
        worker.stop()


def _ask(worker: Worker, case: Case) -> Verdict:
    worker.give(case)
    return worker.take()


def _run_cases(arguments: argparse.Namespace, worker: Worker) -> int:
    tally, started, last_report = Tally(), time.monotonic(), 0.0
    for case, verdict in judge_all(map(draw, count(arguments.seed)), arguments.jobs):
        tally.add(case, verdict)
        passed = time.monotonic() - started
        if passed > last_report + _INTERVAL:
            last_report = passed
            print(f"{passed:.0f} s, case {case.seed}: {dict(tally.outcomes)}", file=sys.stderr, flush=True)
        if passed > arguments.seconds or tally.outcomes.total() == arguments.cases:
            break
    for index, (signature, verdict) in enumerate(tally.verdicts.items()):
        _print(draw(tally.failures[signature][0]), verdict, worker if index < arguments.shrink else None)
    print(tally.summary(passed))
    return int(bool(tally.failures))


def _print(case: Case, verdict: Verdict, worker: Worker | None) -> None:
    """Print a case as a script, reduced if a worker is given."""
    if verdict.failed and worker is not None:
        case, verdict = shrink(case, verdict, partial(_ask, worker))
    details = "".join(f"# {line}\n" for line in verdict.details.splitlines()[-12:])
    print(f"\n# {100 * '-'}\n{script(case, verdict)}{details}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
