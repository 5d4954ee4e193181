"""Tests of ``Problem.probe``: a few samples from several places of the data, and what they show about a model."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from curvlab.errors import UnsupportedError
from curvlab.problem import Problem

N = 40
X = torch.arange(float(N))[:, None]
Y = torch.arange(N) % 3


class Counted:
    """Batches of given sizes that count the passes."""

    def __init__(self, x: Tensor, sizes: list[int]) -> None:
        self.x, self.sizes, self.passes = x, sizes, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        yield from zip(self.x.split(self.sizes), Y[: len(self.x)].split(self.sizes), strict=True)


def model() -> nn.Module:
    return nn.Linear(1, 3)


class TestPlaces:
    @pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 8, 9, 23, 24, 25, 40])
    def test_two_from_the_beginning_the_middle_and_the_end(self, n: int) -> None:
        [(x, y)] = Problem(model(), "cross_entropy", (X[:n], Y[:n])).probe()
        places = x.flatten().long().tolist()
        assert places == sorted(set(places))
        assert len(places) == min(n, 6)
        assert {*range(min(n, 2)), *range(max(n - 2, 0), n)} <= set(places)
        assert torch.equal(y, Y[places])
        if n >= 6:
            middle = places[2:4]
            assert middle[1] == middle[0] + 1
            assert n / 3 - 1 <= middle[0] <= 2 * n / 3

    @pytest.mark.parametrize("sizes", [[40], [1] * 40, [3, 1, 0, 30, 6], [39, 1], [16, 16, 8]])
    def test_however_the_data_are_split(self, sizes: list[int]) -> None:
        whole = Problem(model(), "cross_entropy", (X, Y)).probe()
        [(x, y)] = Problem(model(), "cross_entropy", Counted(X, sizes)).probe()
        assert torch.equal(x, whole[0][0])
        assert torch.equal(y, whole[0][1])

    def test_samples_of_other_shapes_are_batches_of_their_own(self) -> None:
        data = [(torch.zeros(3, 1), Y[:3]), (torch.zeros(3, 2, 1), Y[:3].int()), (torch.ones(2, 1), Y[:2])]
        probe = Problem(model(), "cross_entropy", data).probe()
        assert [(tuple(x.shape), y.dtype) for x, y in probe] == [((4, 1), torch.int64), ((2, 2, 1), torch.int32)]

    def test_dtype_of_the_model(self) -> None:
        [(x, y)] = Problem(model().double(), "squared_error", (X, X.expand(-1, 3))).probe()
        assert (x.dtype, y.dtype) == (torch.float64, torch.float64)

    def test_data_that_reuse_their_memory(self) -> None:
        class Reusing:
            def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
                held = torch.zeros(8, 1)
                for x, y in zip(X.split(8), Y.split(8), strict=True):
                    yield held.copy_(x), y

        [(x, _)] = Problem(model(), "cross_entropy", Reusing()).probe()
        assert x.flatten().tolist() == [0, 1, 16, 17, 38, 39]


class TestPasses:
    def test_the_pass_of_check_serves(self) -> None:
        data = Counted(X, [16, 16, 8])
        problem = Problem(model(), "cross_entropy", data)
        problem.check()
        assert data.passes == 1
        assert problem.num_samples == N
        assert len(problem.probe()[0][0]) == len(copy.copy(problem).probe()[0][0]) == 6
        assert data.passes == 1

    def test_a_part_of_a_pass_does_not(self) -> None:
        data = Counted(X, [16, 16, 8])
        problem = Problem(model(), "cross_entropy", data)
        next(problem.batches())
        assert problem.probe()[0][0][-1] == N - 1
        assert data.passes == 2

    def test_batches_serve_too(self) -> None:
        problem = Problem(model(), "cross_entropy", DataLoader(TensorDataset(X, Y), batch_size=16))
        list(problem.batches(7))
        assert problem.num_samples == N


class Running(nn.Module):
    """Adds to each sample the sum of the samples before it in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.cumsum(0))


class Late(Running):
    """Mixes samples only if an input is large, which none at the beginning is."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x + x.mean() * (x > N / 3))


class Backwards(Running):
    """Adds the next sample to each."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x + torch.cat([x[1:], x[:1] * 0]))


class Sized(Running):
    """Treats a batch of one sample differently."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x + (len(x) == 1))


@pytest.mark.parametrize("mixing", [Running(), Late(), Backwards(), Sized()])
@pytest.mark.parametrize("sizes", [[40], [1, 3, 36], [1] * 40])
def test_samples_that_mix(mixing: nn.Module, sizes: list[int]) -> None:
    with pytest.raises(UnsupportedError, match="depends on the other samples"):
        Problem(mixing, "cross_entropy", Counted(X, sizes)).check()
