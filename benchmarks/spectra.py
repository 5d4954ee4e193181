"""The largest Hessian eigenvalue: ours beside curvlinops with SciPy's eigsh, PyHessian and hessian-eigenthings.

    python benchmarks/spectra.py [--seeds 5] [--data-root DIR] [--no-peers]   the table: products, seconds, error
    python benchmarks/spectra.py --products [--rounds 7]                       what one product costs, in gradients
    python benchmarks/spectra.py --recorder [--seeds 3]                        products a point along a training

The table: MLP 784-800-800-10 on the first 2,000 samples of MNIST in one batch, softmax cross-entropy, at initialisation
and after 2,000 steps of SGD; relative tolerance 1e-3. Every case starts from a fresh operator, and its seconds hold
everything from there to the eigenvalue. The error is against float64 ARPACK at 1e-10. Given are the median over the
seeds, the worst error, and our seconds over those of each peer (the median of ratios within a seed). MNIST is
taken from ``--data-root`` or ``CURVLAB_DATA``; random images take its place where there is none, and that is said. Run
it with ``OMP_NUM_THREADS=2``. Prints a line of JSON a result. The peers come with ``pip install -e .[bench]``.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from copy import deepcopy

import numpy as np
import torch
from measure import emit, machine
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from curvlab import EigenvalueRecorder, Problem, estimate, top_eigenvalues
from curvlab.data import load
from curvlab.errors import CurvlabError
from curvlab.estimators import products
from curvlab.models import build
from curvlab.training import fit

SAMPLES, TOL = 2_000, 1e-3
TRAINING = {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "batch_size": 100}
STEPS = {"at initialisation": 0, "after training": 2_000}

#: A value and the products that it took.
Found = tuple[float, int]


def ours(problem: Problem, **options: str) -> Found:
    result = top_eigenvalues(estimate(problem, "hessian", "implicit"), tol=TOL, **options)  # type: ignore[arg-type]
    assert result.converged
    return float(result.values[0]), result.matvecs


def curvlinops_operator(problem: Problem, count: list[int]) -> LinearOperator:
    from curvlinops import HessianLinearOperator

    parameters = list(problem.model.parameters())
    theirs = HessianLinearOperator(
        problem.model, nn.CrossEntropyLoss(), parameters, list(problem.batches()), check_deterministic=False
    ).to_scipy()

    def matvec(vector: np.ndarray) -> np.ndarray:
        count[0] += 1
        return theirs @ vector

    return LinearOperator(theirs.shape, matvec=matvec, dtype=theirs.dtype)


def by_curvlinops(problem: Problem, ncv: int | None = None) -> Found:
    count = [0]
    values = eigsh(curvlinops_operator(problem, count), k=1, which="LA", tol=TOL, ncv=ncv, return_eigenvectors=False)
    return float(values[0]), count[0]


def by_eigsh(problem: Problem, ncv: int) -> Found:
    """ARPACK over our products."""
    count = [0]
    theirs = estimate(problem, "hessian", "implicit").to_scipy()

    def matvec(vector: np.ndarray) -> np.ndarray:
        count[0] += 1
        return theirs @ vector

    counted = LinearOperator(theirs.shape, matvec=matvec, dtype=theirs.dtype)
    return float(eigsh(counted, k=1, which="LA", tol=TOL, ncv=ncv, return_eigenvectors=False)[0]), count[0]


def by_pyhessian(problem: Problem) -> Found:
    from pyhessian import hessian

    model = deepcopy(problem.model)
    theirs = hessian(model, nn.CrossEntropyLoss(), data=next(problem.batches()), cuda=False)
    count, gradients = [0], torch.autograd.grad

    def counted(*given: object, **named: object) -> object:
        count[0] += 1
        return gradients(*given, **named)

    torch.autograd.grad = counted
    try:
        values, _ = theirs.eigenvalues(top_n=1, tol=TOL)
    finally:
        torch.autograd.grad = gradients
    return float(values[0]), count[0]


def by_eigenthings(problem: Problem, power: bool) -> Found:
    import hessian_eigenthings as theirs

    operator = theirs.HessianOperator(problem.model, list(problem.batches()), theirs.supervised_loss(cross_entropy))
    count = [0]
    multiply = operator.matvec

    def matvec(vector: Tensor) -> Tensor:
        count[0] += 1
        return multiply(vector)

    operator.matvec = matvec
    if power:
        result = theirs.deflated_power_iteration(operator, k=1, max_iter=100, tol=TOL)
    else:
        result = theirs.lanczos(operator, k=1, tol=TOL, which="LA")
    return float(result.eigenvalues[0]), count[0]


OURS: dict[str, Callable[[Problem], Found]] = {
    "curvlab": ours,
    "curvlab, stop=gap": lambda problem: ours(problem, stop="gap"),
}
PEERS: dict[str, Callable[[Problem], Found]] = {
    "curvlinops, eigsh": by_curvlinops,
    "curvlinops, eigsh ncv=6": lambda problem: by_curvlinops(problem, 6),
    "our products, eigsh ncv=6": lambda problem: by_eigsh(problem, 6),
    "PyHessian": by_pyhessian,
    "hessian-eigenthings, Lanczos": lambda problem: by_eigenthings(problem, power=False),
    "hessian-eigenthings, power": lambda problem: by_eigenthings(problem, power=True),
}


def samples(root: str | None) -> tuple[tuple[Tensor, Tensor], str]:
    try:
        data = load("mnist", root=root, offline=True)
    except CurvlabError as error:
        generator = torch.Generator().manual_seed(0)
        noise = torch.rand(20_000, 1, 28, 28, generator=generator)
        return (noise, torch.randint(10, (20_000,), generator=generator)), f"random images: {error}"
    return (data.x_train[:20_000], data.y_train[:20_000]), "MNIST"


def network(data: tuple[Tensor, Tensor], seed: int, steps: int) -> nn.Module:
    model = build("mlp", (1, 28, 28), 10, hidden=(800, 800), seed=seed)
    if steps:
        fit(model, data, steps=steps, seed=seed, progress=False, **TRAINING)  # type: ignore[arg-type]
    return model.eval()


def reference(model: nn.Module, few: tuple[Tensor, Tensor]) -> float:
    exact = Problem(deepcopy(model).double(), "cross_entropy", (few[0].double(), few[1]))
    result = top_eigenvalues(estimate(exact, "hessian", "implicit"), tol=1e-10, method="eigsh")
    return float(result.values[0])


def seconds_of_gradient(problem: Problem) -> float:
    parameters = list(problem.model.parameters())
    taken = []
    for _ in range(5):
        started = time.perf_counter()
        for inputs, targets in problem.batches():
            torch.autograd.grad(cross_entropy(problem.model(inputs), targets), parameters)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def table(seeds: int, root: str | None, peers: bool) -> None:
    data, origin = samples(root)
    few = (data[0][:SAMPLES], data[1][:SAMPLES])
    cases = OURS | (PEERS if peers else {})
    emit({"data": origin, "samples": SAMPLES, "seeds": seeds, "tolerance": TOL})
    for state, steps in STEPS.items():
        runs: dict[str, list[tuple[int, float, float]]] = {name: [] for name in cases}
        gradients, failed = [], {}
        for seed in range(seeds):
            model = network(data, seed, steps)
            problem = Problem(model, "cross_entropy", [few])
            exact = reference(model, few)
            gradients.append(seconds_of_gradient(problem))
            for name, case in cases.items():
                if name in failed:
                    continue
                started = time.perf_counter()
                try:
                    value, count = case(problem)
                except Exception as error:  # a peer that is not installed, or fails
                    failed[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                    continue
                found = count, time.perf_counter() - started, abs(value - exact) / abs(exact)
                runs[name].append(found)
                emit({"state": state, "seed": seed, "case": name, "products": count, "error": found[2]})
        rows: dict[str, object] = dict(failed)
        for name, found in runs.items():
            if name in failed:
                continue
            rows[name] = {
                "products": [count for count, _, _ in found],
                "median_products": statistics.median(count for count, _, _ in found),
                "seconds": round(statistics.median(s for _, s, _ in found), 2),
                "gradients": round(statistics.median(s / g for (_, s, _), g in zip(found, gradients, strict=True)), 1),
                "worst_error": float(f"{max(error for _, _, error in found):.2g}"),
                "median_error": float(f"{statistics.median(error for _, _, error in found):.2g}"),
            }
        for name in PEERS:
            if runs.get(name) and name not in failed:
                for own in OURS.keys() - failed.keys():
                    ratios = [a[1] / b[1] for a, b in zip(runs[own], runs[name], strict=True)]
                    rows[name][f"{own} over this"] = round(statistics.median(ratios), 2)  # type: ignore[index]
        emit({"state": state, **rows})


def product_costs(rounds: int) -> None:
    """Print the seconds of one product over those of a gradient, medians of ratios within a round."""
    sizes = {
        "mlp 784-800-800-10": ("mlp", {"hidden": (800, 800)}, (1, 28, 28), 1000),
        "cnn": ("cnn", {}, (1, 28, 28), 250),
        "resnet20": ("resnet20", {}, (3, 32, 32), 50),
    }
    for label, (name, options, shape, n) in sizes.items():
        torch.manual_seed(0)
        model = build(name, shape, 10, seed=0, **options).eval()  # type: ignore[arg-type]
        problem = Problem(model, "cross_entropy", [(torch.randn(n, *shape), torch.randint(10, (n,)))])
        cases: dict[str, Callable[[], object]] = {}
        for quantity in ("hessian", "ggn", "empirical_fisher"):
            for kept in ("kept", "rebuilt"):
                matrix = _matrix(problem, quantity, kept == "kept")
                vector = torch.randn(matrix.shape[0])
                cases[f"{quantity}, graph {kept}"] = lambda a=matrix, v=vector: a.matvec(v)
        theirs = curvlinops_operator(problem, [0])
        numbers = torch.randn(theirs.shape[0]).numpy()
        cases["hessian, curvlinops"] = lambda a=theirs, v=numbers: a @ v
        ratios: dict[str, list[float]] = {case: [] for case in cases}
        for round_ in range(rounds + 1):
            gradient = seconds_of_gradient(problem)
            for case, work in cases.items():
                started = time.perf_counter()
                work()
                if round_:  # the first loads what a first call loads, and makes the graphs that are kept
                    ratios[case].append((time.perf_counter() - started) / gradient)
        emit({"net": label, **{case: round(statistics.median(found), 2) for case, found in ratios.items()}})


def _matrix(problem: Problem, quantity: str, kept: bool) -> object:
    room = products._KEPT_BYTES
    products._KEPT_BYTES = 4e9 if kept else 0.0
    try:
        matrix = estimate(problem, quantity, "implicit")
        matrix.matvec(torch.randn(matrix.shape[0]))
        return matrix
    finally:
        products._KEPT_BYTES = room


def recorder_costs(seeds: int, root: str | None) -> None:
    """Print the products a point, warm and cold, along a training of the MLP, a point every 100 steps."""
    data, origin = samples(root)
    few = (data[0][:SAMPLES], data[1][:SAMPLES])
    emit({"data": origin})
    for warm in (True, False):
        counts: dict[str, list[int]] = {"fisher": [], "hessian": []}
        shares = []
        for seed in range(seeds):
            model = build("mlp", (1, 28, 28), 10, hidden=(800, 800), seed=seed)
            recorder = EigenvalueRecorder([few], every=100, tol=TOL, warm=warm)
            started = time.perf_counter()
            fit(model, data, steps=2_000, seed=seed, observers=[recorder], progress=False, **TRAINING)  # type: ignore[arg-type]
            taken = time.perf_counter() - started
            within = sum(record["seconds"] for record in recorder.records)
            shares.append(within / (taken - within))
            for record in recorder.records:
                counts[record["quantity"]].append(record["matvecs"])
        found = {
            "median_products": {quantity: statistics.median(found) for quantity, found in counts.items()},
            "median_products_of_all": statistics.median(counts["fisher"] + counts["hessian"]),
            "recorder_over_training": round(statistics.median(shares), 2),
        }
        emit({"recorder": "warm" if warm else "cold", **found})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--data-root")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--products", action="store_true")
    parser.add_argument("--recorder", action="store_true")
    given = parser.parse_args()
    emit({"machine": machine()})
    if given.products:
        product_costs(given.rounds)
    elif given.recorder:
        recorder_costs(given.seeds, given.data_root)
    else:
        table(given.seeds, given.data_root, not given.no_peers)


if __name__ == "__main__":
    main()
