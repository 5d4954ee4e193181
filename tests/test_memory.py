"""Bounded memory: ``estimate(memory=...)``."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from curvlab import Problem, estimate
from curvlab.errors import CurvlabError, UnsupportedError
from curvlab.estimators import memory
from curvlab.estimators.memory import fit_batch_size, measure_process_peak, parse_memory


def problem(samples: int = 40) -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 4)).double()
    return Problem(model, "cross_entropy", (torch.randn(samples, 1, 6, 6).double(), torch.arange(samples) % 4))


@pytest.mark.parametrize(
    ("given", "size"),
    [("2GB", 2e9), ("1.5 gb", 1.5e9), ("512MiB", 512 * 2**20), ("small", 1e9), ("large", 16e9), (3e8, 3e8), (5, 5.0)],
)
def test_sizes(given: str | float, size: float) -> None:
    assert parse_memory(given) == size


@pytest.mark.parametrize(
    "given", ["2 potatoes", "tiny", "", 0, -1.0, float("nan"), float("inf"), True, None, "0GB", "-2GB"]
)
def test_what_is_no_size(given: object) -> None:
    with pytest.raises(CurvlabError, match="memory must be a size such as '2GB'"):
        parse_memory(given)  # type: ignore[arg-type]


@pytest.mark.parametrize("structure", ["dense", "block_diag", "diag", "kfac", "ekfac", "tkfac", "implicit"])
@pytest.mark.parametrize("quantity", ["fisher", "fisher:samples=2", "empirical_fisher", "ggn", "hessian"])
def test_a_limit_does_not_change_the_result(quantity: str, structure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if quantity == "hessian" and structure in ("kfac", "ekfac", "tkfac"):
        pytest.skip("no backend has it")
    here = problem(12)
    peaks = iter([1, 1e8, 1e12])  # one sample fits, more do not

    def measured(work: Callable[[], object], _: torch.device) -> float:
        work()
        return next(peaks)

    monkeypatch.setattr(memory, "measure_process_peak", measured)
    limited, plain = estimate(here, quantity, structure, memory="1GB"), estimate(here, quantity, structure)
    assert limited.info.batch_size == 1
    vectors = torch.randn(here.space.total, 3, dtype=torch.float64)
    torch.testing.assert_close(limited @ vectors, plain @ vectors, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("constant", [0, 100, 600])
@pytest.mark.parametrize("slope", [0, 1, 7, 99])
def test_the_largest_number_that_fits(constant: int, slope: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def measured(work: Callable[[], object], _: torch.device) -> int:
        work()
        return constant + slope * sizes[-1]

    def work(few: Problem) -> float:
        sizes.append(few.num_samples)
        return 0.0

    monkeypatch.setattr(memory, "measure_process_peak", measured)
    size = fit_batch_size("it", problem(), 1000, work)
    best = min(40, (700 - constant) // slope) if slope else 40
    assert best / 3 <= size <= best
    assert max(sizes) <= 3 * best, "no trial exceeds the limit by much"


def test_memory_that_many_batches_hold_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "measure_process_peak", lambda work, _: work() or 100)
    assert fit_batch_size("it", problem(), 1000, lambda few: 30.0) == 40
    with pytest.raises(
        UnsupportedError, match=r"it needs about 1\.14 kB even for one sample at a time, more than memory=1 kB"
    ):
        fit_batch_size("it", problem(), 1000, lambda few: 700.0)


def test_what_does_not_fit() -> None:
    with pytest.raises(
        UnsupportedError, match=r"fisher as dense needs about 409 kB .* more than memory=100 kB: use another"
    ):
        estimate(problem(), "fisher", "dense", memory="100kB")
    with pytest.raises(CurvlabError, match="leave out batch_size, or memory"):
        estimate(problem(), "fisher", "diag", memory="1GB", batch_size=4)
    with pytest.raises(CurvlabError, match="memory must be a size"):
        estimate(problem(), "fisher", "diag", memory="a lot")


def test_the_batch_with_the_largest_samples_is_tried() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten())
    lengths = (3, 50, 7)
    data = [(torch.randn(4, length, 2), torch.tensor([0, 1, 0, 1])) for length in lengths]
    seen: list[tuple[int, ...]] = []

    def work(few: Problem) -> float:
        seen.extend(tuple(inputs.shape) for inputs, _ in few.batches())
        return 0.0

    fit_batch_size("it", Problem(model, "cross_entropy", data), 1e9, work)
    assert {shape[1] for shape in seen} == {50}


def test_the_peak_of_a_process_contains_the_tensors() -> None:
    peak = measure_process_peak(lambda: torch.ones(10**7), torch.device("cpu"))
    assert 4e7 <= peak < 1e9
