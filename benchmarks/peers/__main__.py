"""The test cases of other libraries, written anew, through curvlab and through plain autograd.

    python -m benchmarks.peers [--suite curvlinops] [--case WORDS]

A case is a model, a loss of ``torch.nn`` and data as in the peer's own tests. ``Problem`` is given these three; what
else it needs is in the record (``way``). Its Hessian, GGN, Fisher, empirical Fisher and Monte Carlo Fisher, their
diagonals, and the Kronecker factors that the peer has, are compared with per-sample autograd in float64
(``reference.py``), to 1e-9 of the largest entry; each is an instance. The peers' inverses and estimators are not
here. Prints a line of JSON a case, as they come, and a table. Run it with ``OMP_NUM_THREADS=1``.
"""

import argparse
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from benchmarks.peers.compare import run

SUITES = ("curvlinops", "nngeometry", "backpack", "eigenthings", "laplace")
COLUMNS = ("cases", "instances", "as it is", "with class_dim", "with a function", "rewritten", "refused", "wrong")


def records(suite: str, words: str = "") -> Iterator[dict[str, Any]]:
    """Yield the record of every case of a suite whose name contains some words."""
    module = import_module(f"benchmarks.peers.suites.{suite}")
    for case in module.cases():
        if words in case.name:
            yield {"suite": suite, **run(case, module.KRONECKER)}


def count(found: list[dict[str, Any]]) -> dict[str, int]:
    """Return numbers of instances by column: those that are right by the way in which the case is expressed."""
    ran = [record for record in found if "not_run" not in record]
    numbers = dict.fromkeys(COLUMNS, 0) | {"cases": len(ran)}
    for record in ran:
        numbers[record["way"]] += record["right"]
        for key in ("refused", "wrong"):
            numbers[key] += sum(map(len, record.get(key, {}).values()))
    return numbers | {"instances": sum(numbers[key] for key in COLUMNS[2:])}


def main() -> None:
    """Run the suites."""
    from benchmarks.measure import emit, machine

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, action="append", help="can be given several times; all by default")
    parser.add_argument("--case", default="", help="only the cases with these words in their names")
    given = parser.parse_args()
    emit({"machine": machine()})
    table: dict[str, list[dict[str, Any]]] = {}
    for suite in given.suite or SUITES:
        table[suite] = []
        for record in records(suite, given.case):
            emit(record)
            table[suite].append(record)
    print(f"\n{'suite':12}" + "".join(f"{column:>17}" for column in COLUMNS) + f"{'right as it is':>17}")
    for suite, found in [*table.items(), ("all", [record for part in table.values() for record in part])]:
        numbers = count(found)
        share = numbers["as it is"] / max(1, numbers["instances"])
        print(f"{suite:12}" + "".join(f"{numbers[column]:>17}" for column in COLUMNS) + f"{share:>17.1%}")


if __name__ == "__main__":
    main()
