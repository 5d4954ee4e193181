"""A vocabulary head: the time of a product over that of a plain pass, and its memory in tensors of all outputs.

    python benchmarks/heads.py [--classes 50000] [--terms 512] [--features 256]

``Linear(features, classes)`` on sequences of 32 tokens, cross-entropy, unit ``term``, in float32. In processes of their
own: the seconds of a further product of the GGN, of the exact Fisher and of the Monte Carlo Fisher with one label per
term, over the seconds of the backward pass of the head (not to be above 1.2) and of a plain forward and backward pass;
and by how much the peak memory rises in the first product, in tensors ``(terms, classes)`` (not to be above 3). Prints
a line of JSON a result, as they come. Run it with ``OMP_NUM_THREADS=1``.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from measure import emit, in_own_process, machine, peak_above
from torch import nn
from torch.nn import functional as F

from curvlab import Problem, estimate

CASES = ("ggn", "fisher", "fisher:samples=1", "plain")
LENGTH, ROUNDS = 32, 7


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def run_case(case: str, classes: int, terms: int, features: int) -> None:
    torch.manual_seed(0)
    head = nn.Linear(features, classes)
    x, y = torch.randn(terms // LENGTH, LENGTH, features), torch.randint(classes, (terms // LENGTH, LENGTH))
    batch = x.flatten(0, 1), y.flatten()

    batch[0].requires_grad_()  # as within a network: the backward pass of the head reaches its inputs

    def forward() -> torch.Tensor:
        return F.cross_entropy(head(batch[0]), batch[1])

    def backward() -> float:
        logits = head(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        return seconds(lambda: torch.autograd.grad(loss, [batch[0], *head.parameters()]))

    unit = terms * classes * 4 / 2**20
    if case == "plain":
        _, _, peak = peak_above(lambda: torch.autograd.grad(forward(), [batch[0], *head.parameters()]))
        whole = [seconds(lambda: torch.autograd.grad(forward(), [batch[0], *head.parameters()])) for _ in range(ROUNDS)]
        emit({"seconds": round(statistics.median(whole), 3), "peak_tensors": round(peak / unit, 2)})
        return
    small = Problem(nn.Linear(4, 5), "cross_entropy", (torch.randn(3, 2, 4), torch.randint(5, (3, 2))), unit="term")
    estimate(small, case, "implicit") @ torch.randn(25)  # imports, first allocations
    matrix = estimate(Problem(head, "cross_entropy", (x, y), unit="term"), case, "implicit")
    vector = torch.randn(matrix.shape[0])
    _, first, peak = peak_above(lambda: matrix @ vector)
    rounds = [(seconds(lambda: matrix @ vector), backward(), seconds(forward)) for _ in range(ROUNDS)]
    product, back, forth = (statistics.median(part) for part in zip(*rounds, strict=True))
    emit(
        {
            "first_seconds": round(first, 3),
            "seconds": round(product, 3),
            "over_backward": round(product / back, 2),
            "over_forward_and_backward": round(product / (back + forth), 2),
            "peak_tensors": round(peak / unit, 2),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=50_000)
    parser.add_argument("--terms", type=int, default=512)
    parser.add_argument("--features", type=int, default=256)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    sizes = given.classes, given.terms, given.features
    if given.case:
        run_case(given.case, *sizes)
        return
    emit({"machine": machine(), "classes": sizes[0], "terms": sizes[1], "features": sizes[2]})
    options = ("--classes", str(sizes[0]), "--terms", str(sizes[1]), "--features", str(sizes[2]))
    for case in CASES:
        emit({"case": case} | in_own_process(__file__, case, *options))


if __name__ == "__main__":
    main()
