"""Tests of the sampled absolute sum: it is unbiased, and its interval has the stated coverage."""

import importlib
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from curvlab import Problem, diagonality
from curvlab.diagonality import sampling
from curvlab.diagonality.blocks import Block
from curvlab.diagonality.outer import OuterBlock
from curvlab.diagonality.sampling import SampledSums, sample_off_diagonal
from curvlab.diagonality.statistics import block_record
from curvlab.diagonality.streamed import StreamedBlock
from curvlab.estimators.rows import LinearFactors

N = 30
ONE_ROUND = 0.1  # operations: fewer than a single draw takes


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ignore(_: float = 1, /, *, note: str = "") -> None:
    pass


Made = tuple[Block, Tensor]


def outer(repeats: int) -> Made:
    """Return a layer with scales over two decades, units that are often inactive, a dead unit and dead inputs."""
    left = normal(N, repeats, 7, seed=1).relu() * torch.logspace(-1, 0, 7)
    right = normal(N, 40, seed=2).relu() * torch.logspace(-2, 0, 40)
    left[:, :, 2] = 0
    right[:, [4, 30]] = 0
    rows = torch.einsum("nro,ni->nroi", left, right).reshape(N * repeats, 280)
    return OuterBlock.of_weight(LinearFactors(right, left)), rows


def transposed() -> Made:
    left, right = normal(N, 1, 40, seed=1), normal(N, 5, seed=2).relu()
    block = OuterBlock.of_weight(LinearFactors(right, left))
    assert block.transposed
    return block, torch.einsum("no,ni->noi", left[:, 0], right).reshape(N, 200)


def streamed() -> Made:
    """Return a block of seven groups, the last one padded, with a dead parameter."""
    rows = normal(N, 203, seed=3).relu() * torch.logspace(-1.5, 0, 203).roll(50)
    rows[:, 20] = 0
    return StreamedBlock(lambda: iter(rows.split(11)), 203, max_bytes=1e6), rows


MAKES: dict[str, Callable[[], Made]] = {
    "outer": lambda: outer(1),
    "several rows a sample": lambda: outer(3),
    "transposed": transposed,
    "streamed": streamed,
}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use strips that are only a part of a tile, and few draws."""
    monkeypatch.setattr(StreamedBlock, "_WIDTH", 32)
    for name, value in {"_FORMS": 8, "_PILOT": 30, "_ROUND": 100, "_MIN_DRAWS": 100, "_STRIP": 10}.items():
        monkeypatch.setattr(sampling, name, value)


def exact(rows: Tensor, block: Block) -> tuple[float, float]:
    """Return the sums over the dense matrix, in the block's unit."""
    matrix = rows.mT @ rows
    rest = (matrix - matrix.diagonal().diag()) / block.unit()
    return float(rest.abs().sum()), float(rest.square().sum())


# ---------------------------------------------------------------------------------------------------------------------
# Unbiased, covered, repeatable


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["outer", "several rows a sample", "streamed"])
def test_unbiased_and_covered(name: str) -> None:
    """Over 100 seeds, each one round of draws. The seeds are fixed: this fails always or never.

    Of 100 intervals at 95 %, 89 % or more hold the truth with probability 0.99; too few draws for the
    normal interval cost the squares, which are more skewed, another two points. That they are not too wide
    is seen of their lengths, which the errors have to fill within three standard errors of their spread.
    """
    block, rows = MAKES[name]()
    truths = np.array(exact(rows, block))
    runs = [sample_off_diagonal(block, 1e-9, ONE_ROUND, seed, ignore) for seed in range(100)]
    estimates = np.array([(run.abs_sum, run.square_sum) for run in runs])
    halves = np.array([(run.abs_sum_ci95, run.square_sum_ci95) for run in runs])
    errors = estimates - truths
    z = errors.mean(axis=0) / (errors.std(axis=0, ddof=1) / np.sqrt(len(runs)))
    coverage = (np.abs(errors) <= halves).mean(axis=0)
    assert (np.abs(z) < 4).all(), z
    assert coverage[0] >= 0.89, coverage
    assert coverage[1] >= 0.87, coverage
    filled = 1.96 * np.sqrt((errors**2).mean(axis=0) / (halves**2).mean(axis=0))
    assert (np.abs(filled - 1) < 0.21).all(), filled
    assert errors[:, 0].std() > 1e-3 * truths[0]  # or nothing was sampled


@pytest.mark.usefixtures("quick")
def test_covered_where_the_precision_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopping when the interval is short favours short intervals, but only slightly."""
    monkeypatch.setattr(sampling, "_ROUND", 40)
    monkeypatch.setattr(sampling, "_MIN_DRAWS", 80)
    block, rows = outer(1)
    truth, _ = exact(rows, block)
    runs = [sample_off_diagonal(block, 0.02, 1e18, seed, ignore) for seed in range(100)]
    assert all(run.abs_sum_ci95 <= 0.02 * run.abs_sum for run in runs)
    assert len({run.draws for run in runs}) > 1
    assert min(run.draws for run in runs) >= 80
    covered = np.mean([abs(run.abs_sum - truth) <= run.abs_sum_ci95 for run in runs])
    assert covered >= 0.87, covered


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["outer", "streamed"])
def test_the_seed_decides(name: str) -> None:
    def run(seed: int) -> SampledSums:
        return sample_off_diagonal(MAKES[name]()[0], 0.05, 1e18, seed, ignore)

    assert run(4) == run(4)
    assert run(4) != run(5)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("max_operations", [ONE_ROUND, 1e18])
def test_the_bar_is_full_at_the_end(max_operations: float) -> None:
    done: list[float] = []
    sample_off_diagonal(streamed()[0], 0.05, max_operations, 0, lambda share=1.0, /, *, note="": done.append(share))
    assert sum(done) == pytest.approx(1)
    assert min(done) >= 0


@pytest.mark.usefixtures("quick")
def test_the_budget_ends_it() -> None:
    block, _ = outer(1)
    short = sample_off_diagonal(block, 1e-9, ONE_ROUND, 0, ignore)
    assert short.draws == 100
    strip = 2 * N * 10 * 40
    assert sample_off_diagonal(block, 1e-9, 500 * strip, 0, ignore).draws in (500, 600)


# ---------------------------------------------------------------------------------------------------------------------
# The strips


def strip_sampler(scales: Tensor, size: int, monkeypatch: pytest.MonkeyPatch) -> sampling._StripSampler:
    monkeypatch.setattr(sampling, "_STRIP", size)
    return sampling._StripSampler(scales, np.random.default_rng(0))


def test_positions_are_drawn_with_their_inclusion_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    scales = normal(60, seed=0).abs() + 0.05
    scales[[3, 17]] = 0
    scales[[8, 40]] = 50.0
    sampler = strip_sampler(scales, 12, monkeypatch)
    times, count = 8000, np.zeros(60)
    stated: dict[int, float] = {}
    for _ in range(times):
        places, inclusion = sampler()
        assert len(set(places.tolist())) == len(places) == 12
        count[places] += 1
        stated.update(zip(places.tolist(), inclusion.tolist(), strict=True))
    assert set(stated) == set(range(60)) - {3, 17}  # the dead ones never
    assert (count[[8, 40]] == times).all()  # the dominant ones always
    assert stated[8] == stated[40] == 1
    others = sorted(set(stated) - {8, 40})
    p = np.array([stated[i] for i in others])
    np.testing.assert_allclose(p, 10 * scales[others].numpy() / float(scales[others].sum()), rtol=1e-10)
    z = (count[others] / times - p) / np.sqrt(p * (1 - p) / times)
    assert np.abs(z).max() < 4
    assert np.abs(z).max() > 0.5


@pytest.mark.parametrize("alive", [0, 1, 7, 12])
def test_all_positions_are_taken_if_they_fit_in_a_strip(alive: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scales = torch.zeros(20, dtype=torch.float64)
    scales[4 : 4 + alive] = normal(alive, seed=1).abs() + 0.01
    sampler = strip_sampler(scales, 12, monkeypatch)
    for _ in range(20):
        places, inclusion = sampler()
        assert sorted(places.tolist()) == list(range(4, 4 + alive))
        np.testing.assert_allclose(inclusion, 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# The record of a sampled block


def record(block: Block, max_operations: float = ONE_ROUND, seed: int = 0) -> dict[str, float]:
    return block_record(block, N, precision=1e-9, max_operations=max_operations, seed=seed, advance=ignore)


@pytest.mark.parametrize("name", MAKES)
def test_a_sampled_record_agrees_with_the_exact_one(name: str) -> None:
    """With the default constants: exact numbers are the same, and sampled ones within their error (z < 4)."""
    block, rows = MAKES[name]()
    sampled, whole = record(block), record(block, 1e18)
    assert (sampled["method"], whole["method"]) == ("sampled", "exact")
    same = ("size", "diag_sum", "diag_mean", "diag_max", "offdiag_signed_sum", "offdiag_abs_max")
    assert all(sampled[column] == pytest.approx(whole[column], rel=1e-12) for column in same)
    assert sampled["offdiag_abs_max_bound"] == sampled["offdiag_abs_max"]
    assert sampled["draws"] == 200
    for column, half in (("offdiag_abs_sum", sampled["ci95"]), ("frobenius", sampled["frobenius_ci95"])):
        assert abs(sampled[column] - whole[column]) <= 4 / 1.96 * half, column
        assert half < 0.2 * whole[column]
    assert sampled["sum_ratio"] == pytest.approx(sampled["offdiag_abs_sum"] / sampled["diag_sum"])
    assert sampled["mean_ratio"] == pytest.approx((sampled["size"] - 1) / sampled["sum_ratio"])
    matrix = (rows.mT @ rows).numpy()
    assert 0 <= sampled["zero_fraction"] <= (matrix == 0).mean()
    assert (sampled["zero_fraction"] > 0) == bool((matrix.diagonal() == 0).any())


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["outer", "streamed"])
def test_the_interval_of_the_frobenius_norm(name: str) -> None:
    """The interval of the squares, tested above, transformed by the square root."""
    block, rows = MAKES[name]()
    got = record(block, seed=3)
    squares = sample_off_diagonal(block, 1e-9, ONE_ROUND, 3, ignore)
    diagonal = float(rows.square().sum(dim=0).square().sum()) / N**2
    mean, half = (s * (block.unit() / N) ** 2 for s in (squares.square_sum, squares.square_sum_ci95))
    assert got["frobenius"] == pytest.approx(np.sqrt(diagonal + mean), rel=1e-12)
    ends = np.sqrt(diagonal + mean + half), np.sqrt(diagonal + mean - half)
    assert got["frobenius_ci95"] == pytest.approx((ends[0] - ends[1]) / 2, rel=0.02)


@pytest.mark.parametrize("name", ["outer", "several rows a sample", "transposed"])
def test_the_gram_matrix_gives_the_frobenius_norm(name: str) -> None:
    """If it costs less than the budget, the norm of a sampled block is exact."""
    block, rows = MAKES[name]()
    n, r, o = block.left.shape
    affordable = n**2 * (block.width + r**2 * o)
    assert affordable < block.operations()
    got = record(block, affordable)
    assert got["method"] == "sampled"
    assert got["frobenius"] == pytest.approx(float(torch.linalg.matrix_norm(rows.mT @ rows)) / N, rel=1e-10)
    assert got["frobenius_ci95"] == 0
    assert got["ci95"] > 0
    assert record(block, affordable - 1)["frobenius_ci95"] > 0


def test_the_gram_matrix_a_strip_of_samples_at_a_time() -> None:
    """More samples than one strip has."""
    left, right = normal(4600, 1, 2, seed=1), normal(4600, 3, seed=2)
    rows = torch.einsum("no,ni->noi", left[:, 0], right).reshape(4600, 6)
    block = OuterBlock.of_weight(LinearFactors(right, left))
    assert block.square_sum() * block.unit() ** 2 == pytest.approx(float((rows.mT @ rows).square().sum()), rel=1e-10)


@cache
def many_parameters() -> Tensor:
    """More parameters than are searched at once, all of the same size, so that none can be excluded."""
    return nn.functional.normalize(normal(8, 4200, seed=5).float(), dim=0)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", ["alike", "one pair stands out", "a small parameter goes with a large one"])
def test_the_largest_entry_or_a_bound_of_it(kind: str) -> None:
    rows = many_parameters().clone()
    if kind == "one pair stands out":
        rows[:, 4100] *= 9
        rows[:, 7] = rows[:, 4100]
    elif kind != "alike":
        rows[:, 7] = 9 * rows[:, 4100]
        rows[:, 4100] *= 0.999  # the smallest of all: it is not among those that are looked at
    block = StreamedBlock(lambda: iter([rows]), 4200, max_bytes=1e9)
    got = record(block)
    matrix = rows.mT @ rows
    matrix.diagonal().zero_()
    truth = float(matrix.abs().max()) / N
    if kind == "one pair stands out":
        assert got["offdiag_abs_max"] == got["offdiag_abs_max_bound"] == pytest.approx(truth, rel=1e-5)
    else:
        assert got["offdiag_abs_max"] <= truth * (1 + 1e-5)
        assert truth <= got["offdiag_abs_max_bound"] * (1 + 1e-5)
        assert got["offdiag_abs_max"] < got["offdiag_abs_max_bound"]


@pytest.mark.parametrize(
    "make",
    [
        lambda rows: StreamedBlock(lambda: iter([rows]), rows.shape[1], max_bytes=1e6),
        lambda rows: OuterBlock.of_bias(LinearFactors(rows, rows.unsqueeze(1))),
    ],
)
@pytest.mark.parametrize("columns", [1, 5])
def test_a_block_with_one_active_parameter(columns: int, make: Callable[[Tensor], Block]) -> None:
    rows = torch.zeros(N, columns, dtype=torch.float64)
    rows[:, 0] = normal(N, seed=0)
    got = record(make(rows))
    assert got["method"] == "sampled"
    assert (got["offdiag_abs_sum"], got["ci95"], got["offdiag_abs_max"]) == (0, 0, 0)
    assert got["frobenius"] == pytest.approx(float(rows.square().sum()) / N, rel=1e-12)
    assert got["zero_fraction"] == pytest.approx(1 - 1 / columns**2)


# ---------------------------------------------------------------------------------------------------------------------
# From the outside


@pytest.mark.parametrize("quantity", ["empirical_fisher", "fisher", "masq:batch_size=3"])
def test_a_budget_too_short_for_everything(quantity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors stay exact, large ones are sampled to the requested precision."""
    monkeypatch.setattr(importlib.import_module("curvlab.diagonality"), "OPERATIONS_PER_SECOND", 1.0)
    for name, value in {"_STRIP": 4, "_ROUND": 50, "_MIN_DRAWS": 100}.items():
        monkeypatch.setattr(sampling, name, value)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 3))
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.data = 0.3 * normal(*parameter.shape, seed=i)
    problem = Problem(model, "cross_entropy", (normal(24, 1, 6, 6, seed=9), torch.arange(24) % 3))
    table = diagonality(problem, quantity, time_budget=5e6, precision=0.2).set_index("parameter")
    whole = diagonality(problem, quantity, time_budget=1e18).set_index("parameter")
    assert (whole["method"] == "exact").all()
    methods = table["method"].to_dict()
    assert methods.pop("3.weight") == "sampled"
    assert set(methods.values()) == {"exact"}
    row, truth = table.loc["3.weight"], whole.loc["3.weight"]
    assert row["draws"] >= 100
    assert row["ci95"] <= 0.2 * row["offdiag_abs_sum"]
    assert abs(row["offdiag_abs_sum"] - truth["offdiag_abs_sum"]) <= 4 / 1.96 * row["ci95"]
    assert row["zero_fraction"] <= truth["zero_fraction"]
    again = diagonality(problem, quantity, time_budget=5e6, precision=0.2, params="3.weight")
    assert again["offdiag_abs_sum"].item() == row["offdiag_abs_sum"]
