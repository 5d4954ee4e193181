"""Peak memory under a limit, ``estimate(memory=...)``, and what the limit costs in time.

    python benchmarks/memory.py [--limits 500MB 100MB 30MB]

A convolutional network of 22,000 parameters on 1,000 images of 32 x 32 pixels, in float32. In processes of their own:
by how much the resident memory rises at its peak during an estimate, over the limit (not to be above 1), and the
samples that are processed at once. Prints a line of JSON a result, as they come. Run it with ``OMP_NUM_THREADS=1``.
"""

import argparse

import torch
from measure import emit, in_own_process, machine, peak_above
from torch import nn

from curvlab import Problem, estimate
from curvlab.estimators.memory import parse_memory

STRUCTURES = ("diag", "kfac", "ekfac", "implicit")


def run_case(structure: str, limit: str) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 10)]
    model = nn.Sequential(*layers)
    x, y = torch.randn(1000, 3, 32, 32), torch.arange(1000) % 10

    def work(samples: int) -> int | None:
        problem = Problem(model, "cross_entropy", (x[:samples], y[:samples]))
        matrix = estimate(problem, "fisher:samples=1", structure, memory=limit)
        if structure == "implicit":
            matrix.matvec(torch.ones(problem.space.total))
        return matrix.info.batch_size

    work(2)  # imports
    size, seconds, peak = peak_above(lambda: work(len(x)))
    over = round(peak * 2**20 / parse_memory(limit), 2)
    emit({"samples_at_once": size, "seconds": round(seconds, 2), "peak_mb": round(peak, 1), "peak_over_limit": over})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limits", nargs="+", default=["500MB", "100MB", "30MB"])
    parser.add_argument("--case", choices=STRUCTURES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        run_case(given.case, given.limits[0])
        return
    emit({"machine": machine()})
    for case in STRUCTURES:
        for limit in given.limits:
            emit({"structure": case, "limit": limit} | in_own_process(__file__, case, "--limits", limit))


if __name__ == "__main__":
    main()
