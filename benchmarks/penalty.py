"""Training with a quadratic penalty: ours beside the penalty in the loss, by autograd and by NNGeometry.

    python benchmarks/penalty.py [--rounds 60] [--no-peers]

SGD steps of MLP 784-800-800-10 at batch 128. In every round each case takes a few steps after a warm one, its model its
own; reported are the median milliseconds per step and the median over the rounds of the ratio to the plain step of the
same round. Run it with ``OMP_NUM_THREADS=2``. Prints a line of JSON a result.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from measure import emit, machine
from torch import nn
from torch.nn.functional import cross_entropy

from curvlab.matrices import KFAC, CurvatureMatrix, Diagonal, Info, Penalty
from curvlab.models import mlp
from curvlab.parameters import ParameterSpace

BATCH, STEPS, STRENGTH = 128, 5, 1e-3
INFO = Info("fisher", "any", "cross_entropy", "benchmark", 1)

Loss = Callable[[nn.Module], torch.Tensor]
AfterBackward = Callable[[nn.Module], None]


def diagonal(model: nn.Module) -> Diagonal:
    space = ParameterSpace.of(model)
    return Diagonal(torch.rand(space.total), space, INFO)


def kfac(model: nn.Module) -> KFAC:
    """Return factors of full rank, without zeros."""
    tensors = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            for key, size in (("A", layer.in_features + 1), ("S", layer.out_features)):
                samples = torch.randn(2 * size, size)
                tensors[f"{name}|{key}"] = samples.mT @ samples / len(samples)
    return KFAC.from_tensors(tensors, ParameterSpace.of(model), INFO)


def anchor(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() + 0.01 * torch.randn_like(p) for name, p in model.named_parameters()}


def penalty_of(model: nn.Module, matrix: Callable[[nn.Module], CurvatureMatrix], tasks: int) -> Penalty:
    penalty = Penalty()
    for _ in range(tasks):
        penalty.add(matrix(model), anchor(model))
    return penalty


def in_place(matrix: Callable[[nn.Module], CurvatureMatrix], tasks: int) -> Callable[[nn.Module], AfterBackward]:
    def prepare(model: nn.Module) -> AfterBackward:
        penalty, parameters = penalty_of(model, matrix, tasks), dict(model.named_parameters())
        return lambda _: penalty.add_gradient_(parameters, STRENGTH)

    return prepare


def in_loss(matrix: Callable[[nn.Module], CurvatureMatrix], tasks: int = 1) -> Callable[[nn.Module], Loss]:
    """Return our ``value`` in the loss, a separate penalty a task."""

    def prepare(model: nn.Module) -> Loss:
        penalties, parameters = [penalty_of(model, matrix, 1) for _ in range(tasks)], dict(model.named_parameters())
        return lambda _: STRENGTH * sum(penalty.value(parameters) for penalty in penalties)

    return prepare


def textbook(model: nn.Module) -> Loss:
    """Return the sum over parameters of ``F (theta - mu)^2 / 2`` that most implementations of EWC have."""
    entries, anchors = diagonal(model).space.unflatten(diagonal(model).entries), anchor(model)
    named = dict(model.named_parameters())
    return lambda _: STRENGTH / 2 * sum((entries[n] * (p - anchors[n]).square()).sum() for n, p in named.items())


def nngeometry(structure: str) -> Callable[[nn.Module], Loss]:
    def prepare(model: nn.Module) -> Loss:
        from nngeometry.backend.dummy import DummyGenerator
        from nngeometry.layercollection import LayerCollection
        from nngeometry.object import PMatDiag, PMatKFAC, PVector

        layers = LayerCollection.from_model(model)
        generator = DummyGenerator(layers, torch.device("cpu"))
        if structure == "diag":
            matrix = PMatDiag(generator=generator, data=diagonal(model).entries)
        else:
            factors = kfac(model).factors.values()
            pairs = {layer: (f.A[0], f.S[0]) for layer, f in zip(layers.layers, factors, strict=True)}
            matrix = PMatKFAC(generator=generator, data=pairs)
        start = PVector.from_model(model).clone().detach()
        return lambda model: STRENGTH / 2 * matrix.vTMv(PVector.from_model(model) - start)

    return prepare


#: Name -> what is added to the loss, what is done after ``backward``.
CASES: dict[str, tuple[Callable[[nn.Module], Loss] | None, Callable[[nn.Module], AfterBackward] | None]] = {
    "plain": (None, None),
    "diagonal, in place, 1 task": (None, in_place(diagonal, 1)),
    "diagonal, in place, 5 tasks": (None, in_place(diagonal, 5)),
    "diagonal, in place, 50 tasks": (None, in_place(diagonal, 50)),
    "kfac, in place, 1 task": (None, in_place(kfac, 1)),
    "kfac, in place, 5 tasks, all pairs": (None, in_place(kfac, 5)),
    "diagonal, value in the loss": (in_loss(diagonal), None),
    "kfac, value in the loss": (in_loss(kfac), None),
}
PEERS: dict[str, tuple[Callable[[nn.Module], Loss] | None, Callable[[nn.Module], AfterBackward] | None]] = {
    "diagonal, textbook autograd": (textbook, None),
    "diagonal, value in the loss, 5 separate tasks": (in_loss(diagonal, 5), None),
    "diagonal, NNGeometry vTMv": (nngeometry("diag"), None),
    "kfac, NNGeometry vTMv": (nngeometry("kfac"), None),
}


def trainer(name: str) -> Callable[[], None]:
    torch.manual_seed(0)
    model = mlp(784, (800, 800), 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x, y = torch.randn(BATCH, 784), torch.randint(10, (BATCH,))
    loss, after = (CASES | PEERS)[name]
    added = loss(model) if loss else None
    in_gradient = after(model) if after else None

    def step() -> None:
        optimizer.zero_grad()
        value = cross_entropy(model(x), y)
        if added:
            value = value + added(model)
        value.backward()
        if in_gradient:
            in_gradient(model)
        optimizer.step()

    return step


def milliseconds(step: Callable[[], None]) -> float:
    step()
    started = time.perf_counter()
    for _ in range(STEPS):
        step()
    return 1e3 * (time.perf_counter() - started) / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--no-peers", action="store_true")
    given = parser.parse_args()
    emit({"machine": machine(), "rounds": given.rounds})
    steps = {name: trainer(name) for name in (CASES if given.no_peers else CASES | PEERS)}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(given.rounds):
        for name, step in steps.items():
            taken[name].append(milliseconds(step))
    for name, times in taken.items():  # all of them take turns, and end together
        ratios = [time / plain for time, plain in zip(times, taken["plain"], strict=True)]
        emit({"case": name, "ms": statistics.median(times), "over_plain": round(statistics.median(ratios), 2)})


if __name__ == "__main__":
    main()
