"""The continual loop and the replay methods, beside the same steps written bare in PyTorch.

    python benchmarks/continual.py [--rounds 15]

``naive``: a whole ``run`` of two tasks, its checks, bookkeeping and evaluations included, over bare loops that train
and evaluate as much. ``methods``: the second of two tasks over bare steps that do what is written there, from a memory
that is there already. They are timed in turn, on one thread; reported are the medians of the seconds and of the ratio
within a round, and the bytes that a method holds at the end. Prints a line of JSON a result.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from measure import emit, machine
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from curvlab.continual import Task, run
from curvlab.continual.strategies import AGEM, DER, ER, Naive, Strategy
from curvlab.data import Dataset
from curvlab.models import build

Past = list[tuple[Tensor, Tensor]]
Step = Callable[[nn.Module, Tensor, Tensor, Past], Any]

#: Name -> network, shape of a sample, batch, steps per task, test samples.
SETTINGS: dict[str, tuple[str, tuple[int, ...], int, int, int]] = {
    "mlp 784-256-256-10, batch 10": ("mlp", (1, 28, 28), 10, 300, 300),
    "resnet20, batch 64": ("resnet20", (3, 32, 32), 64, 5, 64),
}
MEMORY = 500


def network(name: str, shape: tuple[int, ...]) -> nn.Module:
    return build(name, shape, 10, hidden=(256, 256) if name == "mlp" else ())


def stream_of(setting: str) -> tuple[Task, Task]:
    _, shape, batch, steps, test = SETTINGS[setting]
    x, y = torch.rand(batch * steps, *shape), torch.randint(10, (batch * steps,))
    data = Dataset("random", x, y, torch.rand(test, *shape), torch.randint(10, (test,)), tuple("0123456789"))
    return Task("first", data, _same), Task("second", data, _turned)


def _same(x: Tensor) -> Tensor:
    return x


def _turned(x: Tensor) -> Tensor:
    return x.flip(-1)


def plain(model: nn.Module, x: Tensor, y: Tensor, _: Past) -> None:
    cross_entropy(model(x), y).backward()


def one_pass_of_both(model: nn.Module, x: Tensor, y: Tensor, past: Past) -> None:
    cross_entropy(model(torch.cat([x, past[0][0]])), torch.cat([y, past[0][1]])).backward()


def one_more_pass(model: nn.Module, x: Tensor, y: Tensor, past: Past) -> None:
    (cross_entropy(model(x), y) + cross_entropy(model(past[0][0]), past[0][1])).backward()


def outputs_of_past(model: nn.Module, x: Tensor, y: Tensor, past: Past) -> None:
    then = torch.zeros(len(x), 10)
    (cross_entropy(model(x), y) + mse_loss(model(past[0][0]), then)).backward()


def two_more_passes(model: nn.Module, x: Tensor, y: Tensor, past: Past) -> None:
    then = torch.zeros(len(x), 10)
    loss = cross_entropy(model(x), y) + mse_loss(model(past[0][0]), then)
    (loss + cross_entropy(model(past[1][0]), past[1][1])).backward()


def second_gradient(model: nn.Module, x: Tensor, y: Tensor, past: Past) -> list[tuple[Tensor, Tensor]]:
    cross_entropy(model(x), y).backward()
    parameters = list(model.parameters())
    of_past = torch.autograd.grad(cross_entropy(model(past[0][0]), past[0][1]), parameters)
    return [(p.grad, r) for p, r in zip(parameters, of_past, strict=True) if p.grad is not None]


def projection(model: nn.Module, x: Tensor, y: Tensor, past: Past) -> None:
    pairs = second_gradient(model, x, y, past)
    product = sum((g * r).sum() for g, r in pairs)
    if product < 0:
        size = sum((r * r).sum() for _, r in pairs)
        for g, r in pairs:
            g -= product / size * r


#: Name -> the method for a batch size, and the bare steps that it is compared with.
METHODS: dict[str, tuple[Callable[[int], Strategy], dict[str, Step]]] = {
    "er": (
        lambda _: ER(MEMORY),
        {"bare plus a pass of its own": one_more_pass, "bare, both batches in one pass": one_pass_of_both},
    ),
    "er, ring": (lambda _: ER(MEMORY, buffer="ring"), {"bare plus a pass of its own": one_more_pass}),
    "der": (lambda _: DER(MEMORY, alpha=0.5), {"bare plus a pass of its own": outputs_of_past}),
    "der++": (lambda _: DER(MEMORY, alpha=0.5, beta=0.5), {"bare plus two passes of its own": two_more_passes}),
    "a-gem": (
        lambda batch: AGEM(MEMORY // 20, batch_size=batch),
        {"bare plus a pass of its own": second_gradient, "bare plus that and the projection": projection},
    ),
}


def bare_task(model: nn.Module, x: Tensor, y: Tensor, batch: int, step: Step = plain) -> None:
    """Train for an epoch as anyone would write it down."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    memory_x, memory_y = x[:MEMORY].clone(), y[:MEMORY].clone()
    replayed = 0 if step is plain else 2
    model.train()
    for index in torch.randperm(len(x)).split(batch):
        drawn = (torch.randint(len(memory_x), (batch,)) for _ in range(replayed))
        past = [(memory_x[rows], memory_y[rows]) for rows in drawn]
        optimizer.zero_grad()
        step(model, x[index], y[index], past)
        optimizer.step()


def bare_accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        right = sum(
            int((model(part).argmax(1) == labels).sum())
            for part, labels in zip(x.split(1000), y.split(1000), strict=True)
        )
    return right / len(x)


def bare_run(model: nn.Module, stream: tuple[Task, Task], batch: int) -> None:
    """Train on both tasks, and evaluate both before the first, after it and at the end."""
    for task in (None, *stream):
        if task is not None:
            bare_task(model, *task.train, batch)
        for other in stream:
            bare_accuracy(model, *other.test)


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def compare(rounds: int, ours: Callable[[], float], others: dict[str, Callable[[], float]]) -> dict[str, Any]:
    """Time them in turn, the first ones every other round, after a round that does not count."""
    taken: dict[str, list[float]] = {"ours": [], **{name: [] for name in others}}
    cases = [("ours", ours), *others.items()]
    for i in range(rounds + 1):
        for name, case in cases if i % 2 else reversed(cases):
            taken[name].append(case())
    row: dict[str, Any] = {"seconds": round(statistics.median(taken["ours"][1:]), 4)}
    for name in others:
        ratios = sorted(mine / other for mine, other in zip(taken["ours"][1:], taken[name][1:], strict=True))
        row[f"over {name}"] = round(statistics.median(ratios), 3)
        row[f"over {name}, quartiles"] = [round(q, 3) for q in statistics.quantiles(ratios, n=4)[::2]]
    return row


def naive(setting: str, rounds: int) -> dict[str, Any]:
    name, shape, batch, _, _ = SETTINGS[setting]
    stream = stream_of(setting)
    options: dict[str, Any] = {"lr": 0.01, "batch_size": batch, "progress": False}

    def ours() -> float:
        model = network(name, shape)
        return seconds(lambda: run(stream, model, Naive(), **options))

    def bare() -> float:
        model = network(name, shape)
        return seconds(lambda: bare_run(model, stream, batch))

    return compare(rounds, ours, {"bare": bare})


def method(setting: str, rounds: int, strategy: Strategy, bare: dict[str, Step]) -> dict[str, Any]:
    name, shape, batch, _, _ = SETTINGS[setting]
    stream = stream_of(setting)
    held = 0

    def ours() -> float:
        nonlocal held
        result = run(stream, network(name, shape), strategy, lr=0.01, batch_size=batch, progress=False)
        held = result.tasks[-1]["bytes"]
        return result.tasks[-1]["seconds"]

    def other(step: Step) -> float:
        model, (x, y) = network(name, shape), stream[1].train
        return seconds(lambda: bare_task(model, x, y, batch, step))

    row = compare(rounds, ours, {name: lambda step=step: other(step) for name, step in bare.items()})
    return row | {"bytes": held}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    emit({"machine": machine(), "rounds": rounds})
    for setting, (_, _, batch, _, _) in SETTINGS.items():
        emit({"setting": setting, "method": "naive", **naive(setting, rounds)})
        for name, (make, bare) in METHODS.items():
            emit({"setting": setting, "method": name, **method(setting, rounds, make(batch), bare)})


if __name__ == "__main__":
    main()
