"""A training step of linearized models beside that of the models themselves.

    python benchmarks/linearize.py [--rounds 30] [--seconds 0.3]

Forward pass, backward pass and SGD step, with batch normalisation in eval mode: its weights trained, frozen, or merged
into the convolutions. In every round a linearized model and the plain one take steps in turn for some tenths of a
second; reported are the median milliseconds per step, and the median over the rounds of the ratio. ``ruled`` is the
augmented forward pass; ``general`` is ``torch.func.jvp``, which a hook on a layer leads to. Run it with
``OMP_NUM_THREADS=1``: the time is the processor's, so that what else the machine does counts little. Prints
a line of JSON a result.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from copy import deepcopy

import torch
from measure import emit, machine
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from curvlab import linearize
from curvlab.models import ResNet20, cnn, freeze_batch_norm, merge_batch_norm, mlp


def frozen() -> nn.Module:
    model = ResNet20()
    freeze_batch_norm(model)
    return model


def transformer() -> nn.Module:
    block = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    return nn.Sequential(block, nn.Flatten(), nn.Linear(16 * 256, 10))


#: Name -> model, shape of a batch, and whether all of its modules have a rule.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool]] = {
    "mlp 784-256-256-10, batch 64": (lambda: mlp(784, (256, 256), 10), (64, 784), True),
    "mlp 784-256-256-10, batch 256": (lambda: mlp(784, (256, 256), 10), (256, 784), True),
    "cnn on 28x28, batch 64": (lambda: cnn((1, 28, 28), 10), (64, 1, 28, 28), True),
    "resnet20, batch 64": (ResNet20, (64, 3, 32, 32), True),
    "resnet20, frozen, batch 64": (frozen, (64, 3, 32, 32), True),
    "resnet20, merged, batch 64": (lambda: merge_batch_norm(ResNet20()), (64, 3, 32, 32), True),
    "transformer block 16x256, batch 32": (transformer, (32, 16, 256), False),
}


def trainer(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def milliseconds(step: Callable[[], None], seconds: float) -> float:
    taken: list[float] = []
    while len(taken) < 2 or sum(taken) < seconds:
        started = time.process_time()
        step()
        taken.append(time.process_time() - started)
    return 1e3 * statistics.median(taken)


def compare(name: str, rounds: int, seconds: float) -> dict[str, dict[str, float]]:
    make, shape, ruled = CASES[name]
    torch.manual_seed(0)
    model, x, y = make().eval(), torch.randn(shape), torch.randint(10, shape[:1])
    linear = linearize(model)
    steps = {"plain": trainer(deepcopy(model), x, y)} | ({"ruled": trainer(linear, x, y)} if ruled else {})
    hooked = deepcopy(linear)
    next(module for module in hooked.modules() if not list(module.children())).register_forward_hook(lambda *_: None)
    steps["general"] = trainer(hooked, x, y)
    for step in steps.values():
        step()
    taken: dict[str, list[float]] = {way: [] for way in steps}
    for _ in range(rounds):
        for way, step in steps.items():
            taken[way].append(milliseconds(step, seconds))
    return {
        way: {
            "ms": round(statistics.median(times), 2),
            "over_plain": round(statistics.median(t / p for t, p in zip(times, taken["plain"], strict=True)), 2),
        }
        for way, times in taken.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=0.3)
    given = parser.parse_args()
    emit({"machine": machine(), "rounds": given.rounds})
    for name in CASES:
        emit({"case": name, **compare(name, given.rounds, given.seconds)})


if __name__ == "__main__":
    main()
