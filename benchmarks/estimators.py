"""Estimators: `estimate(...)` and the libraries by themselves, as ratios to one forward and backward pass.

    python benchmarks/estimators.py [--nets mlp cnn] [--cells exact_diag] [--ways ours] [--rounds 7] [--memory]
    python benchmarks/estimators.py --against CHECKOUT

Every net and cell is a process of its own. In it the plain pass and the ways take turns over the same batches, for some
rounds, after one batch each to warm up; what is printed is the median over rounds of each way's seconds over the mean
of the plain passes before and after it.
``--memory``: instead, the peak memory of each way over up to four batches, above the process with model and data that
has done a plain pass; a process a way. ``--against``: instead, ours here and in another checkout of this repository, in
turn. ``--cpu``: the processor's seconds instead of those on the clock, for a machine that others use, too. Prints a
line of JSON a cell, as soon as it is there.
"""

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from measure import emit, in_own_process, machine, peak_above, side_by_side
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from curvlab import EmpiricalFisher, Fisher, Problem, estimate
from curvlab.models import ResNet20, mlp
from curvlab.quantities import Quantity

Batches = list[tuple[Tensor, Tensor]]
Way = Callable[[nn.Module, Batches], object]

_clock = time.process_time if "--cpu" in sys.argv else time.perf_counter
N = 2000
BATCH = {"mlp": 2000, "cnn": 250, "resnet20": 125}
# Name -> what is estimated.
CELLS: dict[str, tuple[Quantity, str]] = {
    "empirical_diag": (EmpiricalFisher(), "diag"),
    "exact_diag": (Fisher(), "diag"),
    "mc_diag": (Fisher(samples=1), "diag"),
    "mc_kfac": (Fisher(samples=1), "kfac"),
    "exact_kfac": (Fisher(), "kfac"),
    "exact_ekfac": (Fisher(), "ekfac"),
}
# The most that each cell may cost, in forward and backward passes, in the order of CELLS.
BARS = {
    "mlp": (1.15, 3.4, 1.2, 1.7, 6.4, 16),
    "cnn": (1.45, 6.8, 1.55, 2.6, 6.3, 19),
    "resnet20": (1.5, 9.5, 2.2, 5.3, 9.3, 27),
}


def network(name: str) -> tuple[nn.Module, Batches]:
    torch.manual_seed(0)
    if name == "mlp":
        model: nn.Module = nn.Sequential(nn.Flatten(), *mlp(784, (800, 800), 10))
    elif name == "cnn":
        layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
        model = nn.Sequential(*layers, nn.MaxPool2d(4), nn.Flatten(), nn.Linear(32 * 49, 10))
    else:
        model = ResNet20()
    shape = (3, 32, 32) if name == "resnet20" else (1, 28, 28)
    data = torch.randn(N, *shape), torch.randint(10, (N,))
    return model.eval(), list(zip(*(t.split(BATCH[name]) for t in data), strict=True))


def plain(model: nn.Module, batches: Batches) -> None:
    for x, y in batches:
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()


def ours(cell: str, backend: str = "auto") -> Way:
    quantity, structure = CELLS[cell]

    def way(model: nn.Module, batches: Batches) -> object:
        of_layers = [
            f"{name}.{key}"
            for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, nn.Conv2d))
            for key, _ in module.named_parameters()
        ]
        params = of_layers if "kfac" in structure else None  # the normalisation layers have no Kronecker factors
        return estimate(Problem(model, "cross_entropy", batches), quantity, structure, params=params, backend=backend)

    return way


# The peers, as their own documentation uses them ---------------------------------------------------------------------


def by_backpack(cell: str) -> Way:
    import backpack
    from backpack import extensions as ex

    extension = {
        "empirical_diag": ex.SumGradSquared,
        "exact_diag": ex.DiagGGNExact,
        "mc_diag": ex.DiagGGNMC,
        "mc_kfac": ex.KFAC,
        "exact_kfac": ex.KFLR,
    }[cell]()

    def way(model: nn.Module, batches: Batches) -> object:
        copy, loss = deepcopy(model), backpack.extend(nn.CrossEntropyLoss(reduction="sum"))
        second_order = cell != "empirical_diag"
        copy = backpack.extend(copy, use_converter=second_order and isinstance(model, ResNet20))
        total: dict[str, object] = {}
        for x, y in batches:
            with backpack.backpack(extension):
                loss(copy(x), y).backward()
            for name, p in copy.named_parameters():
                value = getattr(p, extension.savefield)
                if isinstance(value, list):
                    value = [a + b for a, b in zip(total[name], value, strict=True)] if name in total else value
                else:
                    value = total[name] + value if name in total else value
                total[name] = value
                delattr(p, extension.savefield)
                p.grad = None
        return total

    return way


def by_nngeometry(cell: str) -> Way:
    from nngeometry.backend import TorchHooksJacobianBackend
    from nngeometry.layercollection import LayerCollection
    from nngeometry.metrics import FIM, FIM_MonteCarlo
    from nngeometry.object import PMatDiag, PMatEKFAC, PMatKFAC

    representation = {"diag": PMatDiag, "kfac": PMatKFAC, "ekfac": PMatEKFAC}[CELLS[cell][1]]

    def way(model: nn.Module, batches: Batches) -> object:
        copy = deepcopy(model)
        layers = LayerCollection()
        for module in copy.modules():
            kinds = (nn.Linear, nn.Conv2d) if "kfac" in cell else (nn.Linear, nn.Conv2d, nn.BatchNorm2d)
            if isinstance(module, kinds):
                layers.add_layer_from_model(copy, module)
        data = TensorDataset(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))
        loader = DataLoader(data, batch_size=len(batches[0][0]))
        if cell == "empirical_diag":

            def log_likelihood(inputs: Tensor, targets: Tensor) -> Tensor:
                return copy(inputs).log_softmax(dim=1).gather(1, targets.unsqueeze(1))

            backend = TorchHooksJacobianBackend(layer_collection=layers, model=copy, function=log_likelihood)
            return PMatDiag(generator=backend, examples=loader)
        if cell.startswith("mc"):
            return FIM_MonteCarlo(copy, loader, representation, "classif_logits", layer_collection=layers)
        matrix = FIM(copy, loader, representation, "classif_logits", layer_collection=layers)
        if cell == "exact_ekfac":
            matrix.update_diag(loader)
        return matrix

    return way


def by_curvlinops(cell: str) -> Way:
    from curvlinops import EKFACLinearOperator, KFACLinearOperator
    from curvlinops.kfac import FisherType

    kind = EKFACLinearOperator if cell == "exact_ekfac" else KFACLinearOperator

    def way(model: nn.Module, batches: Batches) -> object:
        copy = deepcopy(model)
        layers = [m for m in copy.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        operator = kind(
            copy,
            nn.CrossEntropyLoss(),
            [p for layer in layers for p in layer.parameters()],
            batches,
            check_deterministic=False,
            fisher_type=FisherType.MC if cell.startswith("mc") else FisherType.TYPE2,
            separate_weight_and_bias=False,
        )
        if cell == "exact_ekfac":
            operator._maybe_compute_ekfac()
        else:
            operator.compute_kronecker_factors()
        return operator

    return way


def by_vmap(cell: str) -> Way:
    if cell != "empirical_diag":
        raise KeyError(cell)

    def way(model: nn.Module, batches: Batches) -> object:
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def loss(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            outputs = torch.func.functional_call(model, p, (x.unsqueeze(0),))
            return nn.functional.cross_entropy(outputs, y.unsqueeze(0))

        per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0), chunk_size=125)
        total = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for x, y in batches:
            for name, gradient in per_sample(parameters, x, y).items():
                total[name] += gradient.square_().sum(dim=0)
        return total

    return way


PEERS = {"backpack": by_backpack, "nngeometry": by_nngeometry, "curvlinops": by_curvlinops, "vmap": by_vmap}


def ways(net: str, cell: str) -> dict[str, Way]:
    made: dict[str, Way] = {"ours": ours(cell)}
    for name, make in PEERS.items():
        if name == "vmap" and net == "mlp":
            continue  # 30 times the plain pass, and gigabytes
        if name == "curvlinops" and "kfac" not in cell:
            continue  # it has no diagonal
        try:
            made[name] = make(cell)
        except KeyError:  # a cell that the library has not
            continue
    return made


def run_times(net: str, cell: str, rounds: int, only: list[str] | None) -> dict[str, object]:
    model, batches = network(net)
    ratios: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    passes = []
    todo = {name: way for name, way in ways(net, cell).items() if only is None or name in only}
    for name, way in list(todo.items()):
        try:
            way(model, batches[:1])
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            del todo[name]
    plain(model, batches)
    for _ in range(rounds):
        before = _seconds(lambda: plain(model, batches))
        for name, way in todo.items():
            seconds = _seconds(lambda way=way: way(model, batches))
            after = _seconds(lambda: plain(model, batches))
            ratios.setdefault(name, []).append(2 * seconds / (before + after))
            passes.append(after)
            before = after
    table = {name: round(statistics.median(values), 2) for name, values in ratios.items()}
    return {
        "net": net,
        "cell": cell,
        "pass_seconds": round(statistics.median(passes), 4),
        "ratios": table,
        "failed": failed,
        "bar": BARS[net][list(CELLS).index(cell)],
    }


def serve(net: str, cell: str) -> None:
    """For every line of the input, print what ours takes over the mean of the plain passes before and after it."""
    model, batches = network(net)
    way = ours(cell)
    for _ in sys.stdin:
        before = _seconds(lambda: plain(model, batches))
        seconds = _seconds(lambda: way(model, batches))
        print(2 * seconds / (before + _seconds(lambda: plain(model, batches))), flush=True)


def compared(net: str, cell: str, rounds: int, other: str, *options: str) -> dict[str, object]:
    """Return the medians of this checkout and another one, and that of their quotients, round by round."""
    here = str(Path(__file__).resolve().parent.parent)
    found = side_by_side(__file__, f"{net}:{cell}", {"new": here, "old": other}, rounds, *options)
    quotients = [new / old for new, old in zip(found["new"], found["old"], strict=True)]
    passes = {name: round(statistics.median(values), 3) for name, values in found.items()}
    return {"net": net, "cell": cell, **passes, "new_over_old": round(statistics.median(quotients), 3)}


def _seconds(work: Callable[[], object]) -> float:
    started = _clock()
    work()
    return _clock() - started


def run_memory(net: str, cell: str, way: str) -> dict[str, object]:
    model, batches = network(net)
    batches = batches[:4]
    plain(model, batches[:1])
    model.zero_grad()
    work = plain if way == "plain" else ways(net, cell)[way]
    _, seconds, peak = peak_above(lambda: work(model, batches))
    return {"seconds": seconds, "peak_mb": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="*", choices=list(BARS), default=list(BARS))
    parser.add_argument("--cells", nargs="*", choices=list(CELLS), default=list(CELLS))
    parser.add_argument("--ways", nargs="*", choices=["ours", *PEERS], help="only these")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--against", metavar="CHECKOUT")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.case:
        net, cell, *way = arguments.case.split(":")
        if arguments.serve:
            serve(net, cell)
        else:
            emit(run_memory(net, cell, way[0]) if way else run_times(net, cell, arguments.rounds, arguments.ways))
        return
    clock = ["--cpu"] if arguments.cpu else []
    emit({"machine": machine(), "samples": N, "batch": BATCH})
    for net in arguments.nets:
        for cell in arguments.cells:
            if arguments.against:
                result = compared(net, cell, arguments.rounds, arguments.against, *clock)
            elif arguments.memory:
                cases = {way: f"{net}:{cell}:{way}" for way in ("plain", *ways(net, cell))}
                peaks = {way: in_own_process(__file__, case) for way, case in cases.items()}
                megabytes = {way: peak.get("peak_mb", peak.get("failed")) for way, peak in peaks.items()}
                result = {"net": net, "cell": cell, "peak_mb": megabytes}
            else:
                only = ["--ways", *arguments.ways] if arguments.ways else []
                result = in_own_process(__file__, f"{net}:{cell}", "--rounds", str(arguments.rounds), *only, *clock)
            emit(result)


if __name__ == "__main__":
    main()
