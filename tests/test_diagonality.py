"""Tests of the diagonality statistics against their definitions, with the dense matrix of the reference."""

import copy
import random
from collections.abc import Callable
from math import inf, isnan, nan
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from curvlab import CurvlabError, EmpiricalFisher, Problem, UnsupportedError, diagonality, estimate
from curvlab.diagonality import Submatrix, records, sampling, submatrix
from curvlab.diagonality.blocks import Block, Draw, OffDiagonal
from curvlab.diagonality.outer import OuterBlock
from curvlab.diagonality.streamed import StreamedBlock
from curvlab.estimators.rows import LinearFactors, row_batches
from curvlab.progress import no_progress

FORCE_SAMPLING = 1e-12
N = 13

# ---------------------------------------------------------------------------------------------------------------------
# Networks: (model, inputs, classes)

Net = tuple[nn.Module, Tensor, int]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def settled(model: nn.Module) -> nn.Module:
    """Give a model weights that do not depend on the global random state."""
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.data = 0.6 * normal(*parameter.shape, seed=100 + i)
    return model.double().eval()


def mlp() -> Net:
    return settled(nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 4))), normal(N, 6), 4


def dead_mlp() -> Net:
    """Return a network with two dead inputs, others that are often zero, a dead unit and others sometimes inactive."""
    model = settled(nn.Sequential(nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 4)))
    with torch.no_grad():
        model[0].bias[3] = -100.0
        model[2].bias += 0.5
    inputs = normal(N, 9).relu()
    inputs[:, [1, 8]] = 0
    return model, inputs, 4


def no_bias() -> Net:
    layers = nn.Linear(5, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False)
    return settled(nn.Sequential(*layers)), normal(N, 5), 3


def wide() -> Net:
    """Return a network with more than four outputs per input in both layers: the blocks are grouped by input."""
    return (
        settled(nn.Sequential(nn.Linear(2, 9), nn.ReLU(), nn.Linear(9, 2), nn.ReLU(), nn.Linear(2, 9))),
        normal(N, 2),
        9,
    )


def cnn() -> Net:
    convolutions = nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(inplace=True), nn.Conv2d(4, 3, 2)
    return (
        settled(nn.Sequential(*convolutions, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, 3))),
        normal(N, 2, 5, 5),
        3,
    )


def batch_norm() -> Net:
    model = settled(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)))
    model[1].running_mean, model[1].running_var = normal(6), normal(6).square() + 0.5
    return model, normal(N, 5), 3


def embedding() -> Net:
    model = settled(nn.Sequential(nn.Embedding(11, 3), nn.Flatten(), nn.Linear(12, 3)))
    return model, torch.arange(4 * N).reshape(N, 4) % 7, 3


class Tokens(nn.Module):
    """Linear layers over tokens, as a third dimension or folded into the first."""

    def __init__(self, fold: bool) -> None:
        super().__init__()
        self.fold, self.inner, self.out = fold, nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[2]) if self.fold else x
        return self.out(torch.tanh(self.inner(tokens))).view(len(x), x.shape[1], 3).mean(dim=1)


class Reused(nn.Module):
    """A weight shared by two layers, a layer called twice, and a weight used outside of its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.b(torch.tanh(self.a(x))))
        x = torch.tanh(self.c(torch.tanh(self.c(x))))
        return self.out(x) + F.linear(x, self.out.weight.abs())


class Generated(nn.Module):
    """A layer that computes the weights of the next from constants, as many as there are samples."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", normal(N, 3, seed=5))
        self.make = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.tanh(self.make(self.codes)[: x.shape[1], :3])


class Recurrent(nn.Module):
    """A module without a batching rule: its rows are computed one at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.LSTM(3, 2, batch_first=True), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell(x)[0][:, -1])


NETS: dict[str, Callable[[], Net]] = {
    "mlp": mlp,
    "dead_mlp": dead_mlp,
    "no_bias": no_bias,
    "wide": wide,
    "cnn": cnn,
    "batch_norm": batch_norm,
    "embedding": embedding,
    "tokens": lambda: (settled(Tokens(fold=False)), normal(N, 2, 4), 3),
    "folded_tokens": lambda: (settled(Tokens(fold=True)), normal(N, 2, 4), 3),
    "reused": lambda: (settled(Reused()), normal(N, 4), 3),
    "lstm": lambda: (settled(Recurrent()), normal(N, 3, 3), 3),
}
QUANTITIES = (
    "empirical_fisher",
    "fisher",
    "fisher:samples=3,seed=5",
    "ggn",
    "masq:batch_size=4",
    "masq:batch_size=5,norm=mean",
    "masq:batch_size=6,norm=scaled",
    "hessian",
)


def labels(classes: int) -> Tensor:
    return torch.arange(N) * 5 % 7 % classes


def problem_of(net: Net, split: str = "uneven") -> Problem:
    model, inputs, classes = net
    targets = labels(classes)
    if split == "pair":
        return Problem(model, "cross_entropy", (inputs, targets))
    sizes = [5, 3, 1, 4] if split == "uneven" else [N]
    return Problem(model, "cross_entropy", list(zip(inputs.split(sizes), targets.split(sizes), strict=True)))


# ---------------------------------------------------------------------------------------------------------------------
# The definitions


def by_definition(matrix: np.ndarray) -> dict[str, float]:
    size = len(matrix)
    diagonal = matrix[np.eye(size, dtype=bool)]
    rest = matrix[~np.eye(size, dtype=bool)]
    norm = np.sqrt((matrix**2).sum())
    mean = np.abs(rest).mean()
    return {
        "size": size,
        "diag_sum": diagonal.sum(),
        "diag_mean": diagonal.mean(),
        "diag_max": diagonal.max(),
        "offdiag_abs_sum": np.abs(rest).sum(),
        "offdiag_abs_mean": mean,
        "offdiag_abs_max": np.abs(rest).max(),
        "offdiag_signed_sum": rest.sum(),
        "frobenius": norm,
        "diag_share": np.sqrt((diagonal**2).sum()) / norm,
        "zero_fraction": (matrix == 0).mean(),
        "mean_ratio": diagonal.mean() / mean if mean else inf,
        "sum_ratio": np.abs(rest).sum() / diagonal.sum(),
    }


def check_row(row: pd.Series, matrix: np.ndarray, tolerance: float = 1e-10) -> None:
    expected = by_definition(matrix)
    # What cancels is known to the scale of what it is a sum of.
    near = {"offdiag_signed_sum": tolerance * (abs(expected["diag_sum"]) + expected["offdiag_abs_sum"])}
    for column, value in expected.items():
        assert row[column] == pytest.approx(value, rel=tolerance, abs=near.get(column, 0.0)), (row["parameter"], column)
    assert row["method"] == "exact"
    assert (row["ci95"], row["frobenius_ci95"], row["draws"]) == (0, 0, 0)
    assert row["offdiag_abs_max_bound"] == row["offdiag_abs_max"]


def rows_of_levels(problem: Problem) -> dict[str, list[str]]:
    """Return the parameters of each row of the three levels, written out from the modules."""
    trainable = [name for name, p in problem.model.named_parameters() if p.requires_grad]
    rows = {name: [name] for name in trainable}
    for path, module in problem.model.named_modules():
        own = [f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)]
        if path and any(name in trainable for name in own):
            rows[path] = [name for name in own if name in trainable]
    return rows | {"network": trainable}


def check_table(problem: Problem, quantity: str, **options: float) -> None:
    table = diagonality(problem, quantity, per=["tensor", "layer", "network"], **options)
    expected = rows_of_levels(problem)
    assert list(table["parameter"]) == list(expected)
    dense = estimate(problem, quantity, "dense", backend="torch").to_dense().numpy()
    places = dict(zip(expected["network"], np.split(np.arange(len(dense)), cuts(problem)), strict=True))
    for _, row in table.iterrows():
        index = np.concatenate([places[name] for name in expected[row["parameter"]]])
        check_row(row, dense[np.ix_(index, index)])


def cuts(problem: Problem) -> np.ndarray:
    """Return the start of every tensor after the first."""
    return np.cumsum([p.numel() for p in problem.model.parameters() if p.requires_grad])[:-1]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several panels, several groups of which the last is padded, and several passes, on small nets."""
    monkeypatch.setattr(OuterBlock, "_MIN_PANEL", 2)
    monkeypatch.setattr(StreamedBlock, "_WIDTH", 11)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("net", "quantity"),
    [(net, quantity) for i, net in enumerate(NETS) for j, quantity in enumerate(QUANTITIES) if (i + j) % 2],
)
def test_every_column_is_the_dense_matrix_s(net: str, quantity: str) -> None:
    check_table(problem_of(NETS[net]()), quantity, tile_memory=5000)


@pytest.mark.parametrize("split", ["single", "pair"])
@pytest.mark.parametrize(
    ("net", "quantity"), [("dead_mlp", "empirical_fisher"), ("wide", "fisher"), ("cnn", "masq:batch_size=4")]
)
def test_with_default_tiles_and_other_splits(net: str, split: str, quantity: str) -> None:
    check_table(problem_of(NETS[net](), split), quantity)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("quantity", ["empirical_fisher", "fisher", "fisher:samples=2", "ggn", "masq:batch_size=4"])
@pytest.mark.parametrize("loss", ["squared_error", "binary_cross_entropy"])
def test_other_losses(loss: str, quantity: str) -> None:
    model, inputs, outputs = mlp()
    targets = normal(N, outputs, seed=9) if loss == "squared_error" else (normal(N, outputs, seed=9) > 0).double()
    check_table(Problem(model, loss, (inputs, targets)), quantity)


@pytest.mark.parametrize("quantity", ["empirical_fisher", "fisher"])
def test_a_layer_that_is_not_called_on_samples(quantity: str) -> None:
    """The inputs of the layer have as many rows as there are samples, but not one per sample."""
    check_table(problem_of((settled(Generated()), normal(N, 5), 3), "pair"), quantity)


def test_many_rows_are_split_into_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that do not fit in memory are yielded a few samples at a time."""
    from curvlab.estimators import rows

    monkeypatch.setattr(rows.row_batches, "__defaults__", (2000, no_progress))
    check_table(problem_of(cnn()), "fisher")


def test_float32_is_near() -> None:
    model, inputs, classes = dead_mlp()
    exact = problem_of((model, inputs, classes))
    table = diagonality(problem_of((copy.deepcopy(model).float(), inputs.float(), classes)))
    for _, row in table.iterrows():
        check_row(row, estimate(exact, "empirical_fisher", "dense", params=row["parameter"]).to_dense().numpy(), 2e-5)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("time_budget", [60, FORCE_SAMPLING])
@pytest.mark.parametrize("net", ["mlp", "cnn"])
def test_a_close_fit_does_not_underflow_in_float32(net: str, time_budget: float) -> None:
    """Gradients of 1e-13: the squares of the matrix's entries are zero in float32."""
    model, inputs, _ = NETS[net]()
    with torch.no_grad():
        model[-1].weight *= 0.1
        model[-1].bias[0] += 30.0
    data = inputs, torch.zeros(N, dtype=torch.long)
    exact = Problem(model, "cross_entropy", data)
    table = diagonality(Problem(copy.deepcopy(model).float(), "cross_entropy", data), time_budget=time_budget)
    for _, row in table.iterrows():
        # Not from the oracle: torch's own gradient of the cross entropy, p - 1, has lost its digits here.
        v = torch.cat(list(row_batches(exact, EmpiricalFisher(), [row["parameter"]])))
        expected = by_definition((v.mT @ v / N).numpy())
        assert expected["diag_max"] < 1e-22
        assert row["diag_sum"] == pytest.approx(expected["diag_sum"], rel=1e-5)
        assert row["offdiag_abs_max"] == pytest.approx(expected["offdiag_abs_max"], rel=1e-5)
        for column, error in (("offdiag_abs_sum", row["ci95"]), ("frobenius", row["frobenius_ci95"])):
            assert row[column] == pytest.approx(expected[column], rel=1e-5, abs=2.5 * error), column


# ---------------------------------------------------------------------------------------------------------------------
# What must hold whatever the numbers are


@pytest.mark.parametrize("quantity", ["empirical_fisher", "fisher", "fisher:samples=3", "masq:batch_size=4"])
@pytest.mark.parametrize("time_budget", [60, FORCE_SAMPLING])
def test_the_signed_sum_of_a_softmax_layer_is_zero(quantity: str, time_budget: float) -> None:
    """The output gradients of a sample sum to zero, so those of the last layer's weight and bias do."""
    model, inputs, classes = dead_mlp()
    problem = problem_of((model.float(), inputs.float(), classes))
    table = diagonality(problem, quantity, params="4.*", time_budget=time_budget)
    assert list(table["parameter"]) == ["4.weight", "4.bias"]
    for _, row in table.iterrows():
        assert row["offdiag_signed_sum"] == pytest.approx(-row["diag_sum"], rel=1e-6)
        assert row["diag_sum"] > 0.01


@pytest.mark.parametrize(
    ("net", "quantity"), [(("dead_mlp", "cnn", "lstm")[i % 3], q) for i, q in enumerate(QUANTITIES) if q != "hessian"]
)
def test_bounds_and_ratios(net: str, quantity: str) -> None:
    table = diagonality(problem_of(NETS[net]()), quantity)
    slack = 1 + 1e-12
    assert (table["offdiag_abs_sum"] <= (table["size"] - 1) * table["diag_sum"] * slack).all()  # Cauchy-Schwarz
    assert (table["offdiag_abs_max"] <= table["diag_max"] * slack).all()
    assert (table["offdiag_signed_sum"].abs() <= table["offdiag_abs_sum"] * slack).all()
    np.testing.assert_allclose(table["sum_ratio"], table["offdiag_abs_sum"] / table["diag_sum"])
    np.testing.assert_allclose(table["mean_ratio"], (table["size"] - 1) / table["sum_ratio"])
    np.testing.assert_allclose(table["diag_mean"] * table["size"], table["diag_sum"])


def test_masq_at_its_two_ends() -> None:
    """One sample per batch gives the empirical Fisher, all samples the square of the mean gradient."""
    problem = problem_of(cnn())
    numbers = diagonality(problem).drop(columns=["parameter", "method"]).to_numpy(float)
    for norm in ("sumsq", "mean", "scaled"):
        one = diagonality(problem, f"masq:batch_size=1,norm={norm}").drop(columns=["parameter", "method"])
        np.testing.assert_allclose(one.to_numpy(float), numbers, rtol=1e-10, atol=1e-15)
    model, inputs, classes = cnn()
    F.cross_entropy(model(inputs), labels(classes)).backward()
    for size in (N, 1000):  # a batch size above the number of samples is that number
        table = diagonality(problem, f"masq:batch_size={size},norm=mean").set_index("parameter")
        for name, parameter in model.named_parameters():
            gradient = parameter.grad.flatten().numpy()
            row = table.loc[name]
            assert row["diag_sum"] == pytest.approx((gradient**2).sum(), rel=1e-10)
            assert row["offdiag_abs_sum"] == pytest.approx(np.abs(gradient).sum() ** 2 - (gradient**2).sum(), rel=1e-10)
            assert row["frobenius"] == pytest.approx((gradient**2).sum(), rel=1e-10)


@pytest.mark.usefixtures("small_tiles")
def test_a_shuffled_loader_is_read_in_one_order() -> None:
    """MaSQ depends on the order of the samples, which must be the same in all passes."""
    model, inputs, classes = cnn()
    torch.manual_seed(3)
    loader = DataLoader(TensorDataset(inputs, labels(classes)), batch_size=4, shuffle=True)
    check_table(Problem(model, "cross_entropy", loader), "masq:batch_size=4", tile_memory=3000)


@pytest.mark.parametrize("time_budget", [60, FORCE_SAMPLING])
def test_nothing_of_the_user_s_is_changed(time_budget: float) -> None:
    model, inputs, classes = batch_norm()
    model.append(nn.Identity())
    model[0].bias.requires_grad_(False)
    model[3].weight.grad = torch.ones_like(model[3].weight)
    generator = torch.Generator().manual_seed(7)
    loader = DataLoader(TensorDataset(inputs, labels(classes)), batch_size=5, shuffle=True, generator=generator)

    def state() -> list[object]:
        modules = list(model.modules())
        return [
            torch.get_rng_state().tolist(),
            str(np.random.get_state()),  # noqa: NPY002 - it is the user's
            random.getstate(),
            generator.get_state().tolist(),
            {name: tensor.tolist() for name, tensor in model.state_dict().items()},
            [(p.requires_grad, None if p.grad is None else p.grad.tolist()) for p in model.parameters()],
            [m.training for m in modules],
            [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules],
            torch.is_grad_enabled(),
        ]

    before = state()
    for quantity in ("empirical_fisher", "fisher:samples=2", "masq:batch_size=4", "hessian"):
        diagonality(Problem(model, "cross_entropy", loader), quantity, time_budget=time_budget)
    assert state() == before


# ---------------------------------------------------------------------------------------------------------------------
# The edges


@pytest.mark.parametrize("quantity", ["empirical_fisher", "fisher", "masq", "hessian"])
def test_one_sample(quantity: str) -> None:
    model, inputs, classes = mlp()
    check_table(Problem(model, "cross_entropy", (inputs[:1], labels(classes)[:1])), quantity)


@pytest.mark.parametrize("time_budget", [60, FORCE_SAMPLING])
@pytest.mark.parametrize("quantity", ["empirical_fisher", "fisher", "masq"])
def test_one_class_has_no_curvature(quantity: str, time_budget: float) -> None:
    problem = Problem(nn.Linear(3, 1), "cross_entropy", (torch.ones(4, 3), torch.zeros(4, dtype=torch.long)))
    weight = diagonality(problem, quantity, time_budget=time_budget).iloc[0]
    assert (weight["diag_sum"], weight["offdiag_abs_sum"], weight["frobenius"], weight["zero_fraction"]) == (0, 0, 0, 1)


class Partly(nn.Module):
    """A scalar, a tensor on which no output depends, a layer that is never called, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.idle = nn.Parameter(torch.ones(3, 4))
        self.never, self.out = nn.Linear(3, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.out(x)


@pytest.mark.parametrize("quantity", ["empirical_fisher", "fisher", "masq:batch_size=3", "hessian"])
@pytest.mark.parametrize("time_budget", [60, FORCE_SAMPLING])
def test_a_scalar_and_what_no_gradient_reaches(quantity: str, time_budget: float) -> None:
    problem = Problem(settled(Partly()), "cross_entropy", (normal(N, 4), labels(3)))
    table = diagonality(problem, quantity, time_budget=time_budget).set_index("parameter")
    scalar = table.loc["scale"]
    dense = float(estimate(problem, quantity, "dense", params="scale").to_dense())
    assert scalar["diag_sum"] == pytest.approx(dense, rel=1e-10)
    assert scalar["frobenius"] == pytest.approx(abs(dense), rel=1e-10)
    assert (scalar["offdiag_abs_sum"], scalar["offdiag_abs_max"]) == (0, 0)
    assert isnan(scalar["offdiag_abs_mean"])
    for name in ("idle", "never.weight", "never.bias"):
        row = table.loc[name]
        zeros = ("diag_sum", "diag_max", "offdiag_abs_sum", "offdiag_abs_mean", "offdiag_signed_sum", "frobenius")
        assert all(row[column] == 0 for column in zeros), name
        assert (row["zero_fraction"], row["ci95"], row["method"]) == (1, 0, "exact")
        assert isnan(row["mean_ratio"])
        assert isnan(row["sum_ratio"])


def test_a_diagonal_block_has_infinite_mean_ratio() -> None:
    """One-hot inputs and one output direction per sample: all off-diagonal entries are zero."""
    problem = Problem(nn.Linear(4, 2).double(), "squared_error", (torch.eye(4), torch.zeros(4, 2)))
    row = diagonality(problem, "ggn", params="weight").iloc[0]
    assert (row["offdiag_abs_sum"], row["diag_share"], row["mean_ratio"]) == (0, 1, inf)
    assert row["zero_fraction"] == 1 - 8 / 64


@pytest.mark.parametrize("time_budget", [60, FORCE_SAMPLING])
def test_opposite_inputs(time_budget: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """All random directions of two positions may miss such a block: it must still be drawn."""
    monkeypatch.setattr(sampling, "_FORMS", 2)
    x = normal(N, 1) * torch.tensor([[1.0, -1.0]])
    problem = Problem(nn.Linear(2, 1, bias=False).double(), "squared_error", (x, normal(N, 1, seed=1)))
    matrix = estimate(problem, "ggn", "dense").to_dense().numpy()
    for seed in range(12):
        row = diagonality(problem, "ggn", time_budget=time_budget, seed=seed).iloc[0]
        assert row["offdiag_abs_sum"] == pytest.approx(by_definition(matrix)["offdiag_abs_sum"], rel=1e-10)


def test_params_selects_and_frozen_parameters_are_absent() -> None:
    model, inputs, classes = dead_mlp()
    model[2].weight.requires_grad_(False)
    problem = problem_of((model, inputs, classes))
    assert list(diagonality(problem)["parameter"]) == ["0.weight", "0.bias", "2.bias", "4.weight", "4.bias"]
    assert list(diagonality(problem, params=["4.*", "*.weight"])["parameter"]) == ["0.weight", "4.weight", "4.bias"]
    layers = diagonality(problem, params=["0.*", "2.*"], per=["layer", "network"]).set_index("parameter")
    assert layers["size"].to_dict() == {"0": 70, "2": 6, "network": 76}
    check_row(
        diagonality(problem, params=["0.bias", "4.*"], per="network").iloc[0],
        estimate(problem, "empirical_fisher", "dense", params=["0.bias", "4.*"]).to_dense().numpy(),
    )


def test_a_model_that_is_one_layer_is_one_row() -> None:
    problem = Problem(settled(nn.Linear(3, 4)), "cross_entropy", (normal(N, 3), labels(4)))
    table = diagonality(problem, per="layer")
    assert list(table["parameter"]) == ["Linear"]
    check_row(table.iloc[0], estimate(problem, "empirical_fisher", "dense").to_dense().numpy())


def test_rows_that_are_known_are_skipped() -> None:
    rows = list(records(problem_of(mlp()), per=["tensor", "network"], skip={"0.weight", "2.bias", "network"}))
    assert [row["parameter"] for row in rows] == ["0.bias", "2.weight"]


@pytest.mark.parametrize(
    ("net", "quantity"),
    [("dead_mlp", "empirical_fisher"), ("wide", "fisher"), ("cnn", "masq:batch_size=4"), ("wide", "hessian")],
)
def test_submatrix_is_part_of_the_dense_matrix(net: str, quantity: str) -> None:
    problem = problem_of(NETS[net]())
    part = submatrix(problem, quantity, per_tensor=8)
    assert isinstance(part, Submatrix)
    dense = estimate(problem, quantity, "dense").to_dense()
    index, counts = [], []
    for name, place in problem.space.slices.items():
        size = place.stop - place.start
        counts.append(min(8, size))
        index += [place.start + int(i) for i in np.linspace(0, size - 1, counts[-1])]
        assert name in part.names
    assert part.counts == tuple(counts)
    torch.testing.assert_close(part.matrix, dense[index][:, index], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantity": "fischer"}, "'fischer'; did you mean 'fisher'"),
        ({"per": "weight"}, "per must be tensor, layer or network, not 'weight'"),
        ({"per": ["tensor", "block"]}, "not 'block'"),
        ({"params": "conv*"}, "no trainable parameter matches 'conv*'"),
        ({"time_budget": 0.0}, "time_budget must be positive, not 0.0"),
        ({"precision": -1.0}, "precision must be positive, not -1.0"),
        ({"precision": nan}, "precision must be positive, not nan"),
        ({"tile_memory": 0.0}, "tile_memory must be positive, not 0.0"),
    ],
)
def test_bad_arguments(options: dict[str, object], message: str) -> None:
    with pytest.raises(CurvlabError) as error:
        diagonality(problem_of(mlp()), **options)
    assert message in str(error.value)


def test_no_samples() -> None:
    with pytest.raises(CurvlabError, match="the data have no samples"):
        diagonality(Problem(nn.Linear(3, 2), "cross_entropy", (torch.ones(0, 3), torch.zeros(0, dtype=torch.long))))


@pytest.mark.parametrize("time_budget", [60, FORCE_SAMPLING])
@pytest.mark.parametrize("quantity", ["empirical_fisher", "masq"])
def test_what_overflows_is_named(quantity: str, time_budget: float) -> None:
    inputs = torch.full((4, 1, 2, 2), 1e25)
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten())
    problem = Problem(model, "squared_error", (inputs, torch.zeros(4, 2)))
    with pytest.raises(CurvlabError, match=r"of 0\.weight is not finite"):
        diagonality(problem, quantity, time_budget=time_budget)


def test_the_hessian_of_a_large_tensor_is_refused() -> None:
    problem = Problem(nn.Linear(1001, 4), "cross_entropy", (torch.ones(2, 1001), torch.zeros(2, dtype=torch.long)))
    with pytest.raises(UnsupportedError, match=r"the Hessian of weight, with 4,004 parameters.*params, or use the ggn"):
        diagonality(problem, "hessian")
    assert list(diagonality(problem, "hessian", params="bias")["size"]) == [4]


# ---------------------------------------------------------------------------------------------------------------------
# The blocks by themselves: everything that the statistics ask of them, against the matrix of their rows


def sparse(*shape: int, seed: int) -> Tensor:
    values = normal(*shape, seed=seed)
    return values * (normal(*shape, seed=seed + 50) > 0.3)


def outer(repeats: int) -> tuple[Block, Tensor]:
    left, right = sparse(N, repeats, 4, seed=1), sparse(N, 9, seed=2)
    right[:, 5] = 0
    rows = torch.einsum("nro,ni->nroi", left, right).reshape(N * repeats, 36)
    return OuterBlock.of_weight(LinearFactors(right, left)), rows


def transposed(repeats: int) -> tuple[Block, Tensor]:
    left, right = sparse(N, repeats, 11, seed=1), sparse(N, 2, seed=2)
    left[:, :, 3] = 0
    rows = torch.einsum("nro,ni->nroi", left, right).reshape(N * repeats, 22)
    block = OuterBlock.of_weight(LinearFactors(right, left))
    assert block.transposed
    return block, rows


def bias(repeats: int) -> tuple[Block, Tensor]:
    left = sparse(N, repeats, 6, seed=1)
    left[:, :, 2] = 0
    return OuterBlock.of_bias(LinearFactors(sparse(N, 3, seed=2), left)), left.reshape(-1, 6)


def layer(repeats: int) -> tuple[Block, Tensor]:
    left, right = sparse(N, repeats, 4, seed=1), sparse(N, 5, seed=2)
    rows = torch.einsum("nro,ni->nroi", left, torch.cat([right, torch.ones(N, 1)], dim=1))
    return OuterBlock.of_layer(LinearFactors(right, left)), rows.reshape(N * repeats, 24)


def streamed(repeats: int) -> tuple[Block, Tensor]:
    rows = sparse(N * repeats, 25, seed=1)
    rows[:, 7] = 0
    return StreamedBlock(lambda: iter(rows.split(4)), 25, max_bytes=2500), rows


BLOCKS = (outer, transposed, bias, layer, streamed)


@pytest.mark.parametrize(("missing", "passes"), [(0, 1), (1, 3)])
def test_rows_are_computed_once_if_they_fit_in_memory(missing: int, passes: int) -> None:
    rows = sparse(13, 25, seed=1)
    started = []

    def start() -> Any:
        started.append(1)
        return iter(rows.split(4))

    block = StreamedBlock(start, 25, rows.nbytes - missing)
    gram = block.gram(torch.arange(25)) * block.unit()
    bounds = block.tile_bounds()
    assert torch.allclose(gram, rows.mT @ rows)
    assert torch.allclose(bounds.sum() * block.unit(), rows.abs().sum(dim=1).square().sum())
    assert len(started) == passes


@pytest.fixture(params=BLOCKS, ids=lambda make: make.__name__)
def make_block(request: pytest.FixtureRequest, small_tiles: None) -> Callable[[int], tuple[Block, Tensor]]:
    return request.param


@pytest.mark.parametrize("repeats", [1, 3])
def test_a_block_is_the_matrix_of_its_rows(make_block: Callable[[int], tuple[Block, Tensor]], repeats: int) -> None:
    block, rows = make_block(repeats)
    diagonal, unit = block.diagonal(), block.unit()
    matrix = rows.mT @ rows / unit
    rest = matrix - matrix.diagonal().diag()
    close = pytest.approx
    torch.testing.assert_close(diagonal, matrix.diagonal(), rtol=1e-10, atol=1e-14)
    assert block.total() == close(float(matrix.sum()), rel=1e-10)
    index = torch.tensor([3, 0, len(matrix) - 1])
    torch.testing.assert_close(block.columns(index), rows[:, index] / unit**0.5, rtol=1e-10, atol=1e-14)

    done: list[float] = []
    sums = block.off_diagonal(lambda share=1.0, /, *, note="": done.append(share))
    assert sum(done) == close(1)
    assert sums.abs_sum == close(float(rest.abs().sum()), rel=1e-10)
    assert sums.square_sum == close(float(rest.square().sum()), rel=1e-10)
    assert sums.abs_max == close(float(rest.abs().max()), rel=1e-10)
    assert sums.nonzeros == int(rest.count_nonzero())
    zeros = 1 - int(matrix.count_nonzero()) / matrix.numel()
    assert 0 < block.certain_zeros() <= zeros
    assert block.operations() > 0
    if block.gram_operations() < inf:
        assert block.square_sum() == close(float(matrix.square().sum()), rel=1e-10)


@pytest.mark.parametrize("repeats", [1, 3])
def test_the_tiles_of_a_block(make_block: Callable[[int], tuple[Block, Tensor]], repeats: int) -> None:
    block, rows = make_block(repeats)
    block.diagonal()
    groups, width = block.groups, block.width
    if isinstance(block, OuterBlock):  # its positions are those active on some sample, rarest first
        shape = (block.num_positions, groups) if block.transposed else (groups, block.num_positions)
        grouped = rows.unflatten(1, shape)
        grouped = (grouped.mT if block.transposed else grouped)[:, :, block._alive]
    else:
        grouped = F.pad(rows, (0, groups * width - rows.shape[1])).unflatten(1, (groups, width))
    grouped = grouped / block.unit() ** 0.5
    tiles = torch.einsum("noi,npj->opij", grouped, grouped)

    left, right = normal(2, width, seed=3), normal(2, width, seed=4)
    forms = torch.stack(list(block.tile_forms(left, right)))
    torch.testing.assert_close(forms, torch.einsum("ki,opij,kj->kop", left, tiles, right), rtol=1e-9, atol=1e-12)
    assert (block.tile_bounds() >= tiles.abs().sum(dim=(2, 3)) * (1 - 1e-12)).all()
    assert ((block.column_scales() > 0) == (grouped != 0).any(dim=(0, 1))).all()

    draws = [
        Draw(o, p, torch.tensor(places, dtype=torch.long))
        for o in range(groups)
        for p in range(o, groups)
        for places in ([0], [width - 1, 1], [])
    ]
    for draw, strip in zip(draws, block.strips(draws), strict=True):
        expected = tiles[draw.first, draw.second][draw.rows]
        torch.testing.assert_close(strip, expected, rtol=1e-9, atol=1e-12)


def test_float32_sums_keep_their_digits():
    # Adding up one by one in float32, as torch's vector norms do, loses per cents of the sum of so many entries.
    entries = torch.randn(1024, 8192, generator=torch.Generator().manual_seed(0)).pow_(3)
    sums = OffDiagonal()
    sums.add(entries, 2)
    assert sums.abs_sum == pytest.approx(2 * float(entries.double().abs().sum()), rel=1e-6)
    assert sums.square_sum == pytest.approx(2 * float(entries.double().square().sum()), rel=1e-6)
