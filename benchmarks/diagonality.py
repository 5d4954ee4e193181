"""Diagonality statistics: ours, the dense way and NNGeometry's, time and peak memory, each in its own process.

    python benchmarks/diagonality.py [--samples 10000] [--repeats 3] [--no-peers] [--wide]

The network of Gepperth and Wiech's Table 2 (784-30-30-10, MNIST classes 0 to 4, 5,000 Adam steps), the statistics of
its first weight (23,520 parameters, 5.5e8 entries). ``--wide``: all rows of 784-800-800-10, at initialisation and
trained. Needs MNIST under ``CURVLAB_DATA`` and, for NNGeometry, the extra ``bench``. Prints a line of JSON a result.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from measure import emit, in_own_process, machine, peak_above

from curvlab import Problem
from curvlab.data import load
from curvlab.diagonality import records
from curvlab.models import mlp
from curvlab.training import fit


def prepare(path: Path, hidden: tuple[int, ...], steps: int, samples: int) -> None:
    data, _ = load("mnist").hold_out(5000)
    data = data.select(range(5)) if hidden == (30, 30) else data
    torch.manual_seed(0)
    model = mlp(784, hidden, 10)
    if steps:
        fit(model, (data.x_train, data.y_train), steps=steps, evaluate_every=steps)
    torch.save(
        {
            "state": model.state_dict(),
            "hidden": hidden,
            "x": data.x_train[:samples].clone(),
            "y": data.y_train[:samples].clone(),
        },
        path,
    )


def read(path: str) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    saved = torch.load(path, weights_only=True)
    model = mlp(784, saved["hidden"], 10).eval()
    model.load_state_dict(saved["state"])
    return model, saved["x"], saved["y"]


def one_pass(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    """The physical limit: a plain forward and backward pass over the data."""
    for a, b in zip(x.split(500), y.split(500), strict=True):
        torch.autograd.grad(torch.nn.functional.cross_entropy(model(a), b), list(model.parameters()))


def ours(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, params: list[str] | None) -> list[dict]:
    rows = []
    for row in records(Problem(model, "cross_entropy", (x, y)), "empirical_fisher", params=params):
        relative = row["ci95"] / row["offdiag_abs_sum"]
        rows.append({key: row[key] for key in ("parameter", "method", "offdiag_abs_sum", "diag_sum", "draws")})
        rows[-1]["ci95_relative"] = relative
    return rows


def dense(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> list[dict]:
    """The matrix itself, from per-sample gradients that are all there at once."""
    flat = x.flatten(1)
    with torch.no_grad():
        hidden = model.fc1(flat)
    hidden.requires_grad_()
    outputs = model.fc3(model.fc2(hidden.relu()).relu())
    loss = torch.nn.functional.cross_entropy(outputs, y, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, hidden)
    rows = (gradient.unsqueeze(2) * flat.unsqueeze(1)).flatten(1)
    return [_of_matrix((rows.mT @ rows).div_(len(x)))]


def nngeometry(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> list[dict]:
    """NNGeometry's block-diagonal matrix of log p(y|x), whose outer product is the empirical Fisher."""
    from nngeometry.backend import TorchHooksJacobianBackend
    from nngeometry.layercollection import LayerCollection
    from nngeometry.object import PMatBlockDiag

    layers = LayerCollection()
    layers.add_layer_from_model(model, model.fc1)

    def log_likelihood(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return model(inputs).log_softmax(dim=1).gather(1, targets.unsqueeze(1))

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=500)
    backend = TorchHooksJacobianBackend(layer_collection=layers, model=model, function=log_likelihood)
    block = next(iter(PMatBlockDiag(generator=backend, examples=loader).data.values()))
    return [_of_matrix(block[:23520, :23520])]


def _of_matrix(matrix: torch.Tensor) -> dict:
    diagonal = matrix.diagonal().clone()
    matrix.diagonal().zero_()
    absolute = sum(float(strip.abs().sum()) for strip in matrix.split(1024))
    return {"parameter": "fc1.weight", "offdiag_abs_sum": absolute, "diag_sum": float(diagonal.sum())}


CASES = {
    "ours": lambda model, x, y: ours(model, x, y, ["fc1.weight"]),
    "ours_all_rows": lambda model, x, y: ours(model, x, y, None),
    "dense": dense,
    "nngeometry": nngeometry,
}


def run_case(case: str, path: str, samples: int) -> None:
    model, x, y = read(path)
    x, y = x[:samples], y[:samples]
    one_pass(model, x[:500], y[:500])  # the libraries' own start
    _, limit, _ = peak_above(lambda: one_pass(model, x, y))
    rows, seconds, peak = peak_above(lambda: CASES[case](model, x, y))
    print(
        json.dumps(
            {
                "samples": samples,
                "seconds": seconds,
                "peak_mb": round(peak, 1),
                "over_one_pass": round(seconds / limit, 1),
                "rows": rows,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--wide", action="store_true")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        run_case(given.case, given.data, given.samples)
        return
    emit({"machine": machine()})
    with tempfile.TemporaryDirectory() as folder:
        nets = {"initial": 0, "trained": 3000} if given.wide else {"trained": 5000}
        for name, steps in nets.items():
            path = str(Path(folder) / f"{name}.pt")
            prepare(Path(path), (800, 800) if given.wide else (30, 30), steps, given.samples)
            net = f"784-800-800-10, {name}" if given.wide else "784-30-30-10, fc1.weight"
            common = ("--data", path, "--samples")
            case = "ours_all_rows" if given.wide else "ours"
            ours = in_own_process(__file__, case, *common, str(given.samples), repeats=given.repeats)
            emit({"net": net, "way": case, **ours})
            for peer in () if given.wide or given.no_peers else ("dense", "nngeometry"):
                emit({"net": net, "way": peer, **in_own_process(__file__, peer, *common, str(given.samples))})


if __name__ == "__main__":
    main()
