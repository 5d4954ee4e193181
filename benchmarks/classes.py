"""Many classes: the memory of an exact Fisher's diagonal, and what a product of the GGN costs beside the Hessian's.

    python benchmarks/classes.py [--classes 2000] [--samples 500]

The diagonal, in a process of its own: a network 213-7-C (17,498 parameters with 2,000 classes); by how many MB the
peak memory rises above what the process held (not to be above 300 MB), and the seconds, of the exact Fisher and of the
Monte Carlo one with a label a sample. The products: ``Linear(16, 2 C)`` on 8 samples, the best of some rounds; the
GGN's seconds over the Hessian's (not to be above 3). Prints a line of JSON a result, as they come. Run it with
``OMP_NUM_THREADS=1``.
"""

import argparse
import time

import torch
from measure import emit, in_own_process, machine, peak_above
from torch import nn

from curvlab import Problem, estimate

CASES = {"exact": "fisher", "one label a sample": "fisher:samples=1"}
ROUNDS = 20


def problem_of(model: nn.Module, features: int, samples: int, classes: int) -> Problem:
    return Problem(model, "cross_entropy", (torch.randn(samples, features), torch.randint(classes, (samples,))))


def run_case(case: str, classes: int, samples: int) -> None:
    torch.manual_seed(0)
    small = problem_of(nn.Sequential(nn.Linear(213, 7), nn.Tanh(), nn.Linear(7, 10)), 213, 20, 10)
    estimate(small, CASES[case], "diag")  # the libraries' own start
    problem = problem_of(nn.Sequential(nn.Linear(213, 7), nn.Tanh(), nn.Linear(7, classes)), 213, samples, classes)
    matrix, seconds, peak = peak_above(lambda: estimate(problem, CASES[case], "diag"))
    emit({"parameters": matrix.shape[0], "seconds": round(seconds, 2), "peak_mb": round(peak, 1)})


def product_seconds(problem: Problem, quantity: str) -> float:
    matrix = estimate(problem, quantity, "implicit")
    vector = torch.randn(matrix.shape[0])
    best = float("inf")
    for _ in range(ROUNDS):
        started = time.perf_counter()
        matrix @ vector
        best = min(best, time.perf_counter() - started)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        run_case(given.case, given.classes, given.samples)
        return
    emit({"machine": machine()})
    torch.manual_seed(0)
    problem = problem_of(nn.Linear(16, 2 * given.classes), 16, 8, 2 * given.classes)
    seconds = {quantity: product_seconds(problem, quantity) for quantity in ("hessian", "ggn", "fisher:samples=1")}
    ratio = {"ggn_over_hessian": round(seconds["ggn"] / seconds["hessian"], 2)}
    rounded = {f"{quantity}_seconds": round(value, 5) for quantity, value in seconds.items()}
    emit({"products": {"classes": 2 * given.classes} | rounded | ratio})
    for case in CASES:
        sizes = ("--classes", str(given.classes), "--samples", str(given.samples))
        emit({"diagonal": {"case": case} | in_own_process(__file__, case, *sizes)})


if __name__ == "__main__":
    main()
