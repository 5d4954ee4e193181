"""The data of a problem: what is refused in one sentence, and passes that are not alike."""

import secrets
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.masked import masked_tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset

from curvlab import estimate
from curvlab.continual import permuted, run
from curvlab.continual.strategies import Naive
from curvlab.data import Dataset as DataSet
from curvlab.errors import CurvlabError
from curvlab.intake import are_equal
from curvlab.problem import Problem
from curvlab.training import fit

N = 12
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) % 3


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


class Source:
    """Batches of the sizes that are given for each pass, the last of them for all that follow."""

    def __init__(self, *sizes: list[int]) -> None:
        self.sizes = list(sizes)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        start = 0
        for size in self.sizes.pop(0) if len(self.sizes) > 1 else self.sizes[0]:
            yield X[start : start + size], Y[start : start + size]
            start += size


class Samples(Dataset[tuple[Tensor, Tensor]]):
    """Samples, of which one stops or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self.error is not None and index == 7:
            raise self.error
        return X[index], Y[index]


class ListDataset(Dataset[Any]):
    """A data set of samples in a list."""

    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


class Noisy(Samples):
    """Another augmentation at each access, which nothing can bring back."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index] + secrets.randbelow(1000) / 1e3, Y[index]


class Once(IterableDataset[tuple[Tensor, Tensor]]):
    """Goes on where it stopped."""

    def __init__(self) -> None:
        self.samples = iter(list(zip(X, Y, strict=True)))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.samples


class Shuffled(Sampler[int]):
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)

    def __iter__(self) -> Iterator[int]:
        return iter(self.generator.permutation(N).tolist())

    def __len__(self) -> int:
        return N


def used_up() -> DataLoader[Any]:
    loader = DataLoader(Once(), batch_size=4)
    list(loader)
    return loader


class TestPasses:
    @pytest.mark.parametrize(
        ("data", "told"),
        [
            (Source([4, 4, 4], [4, 4]), "the data gave 12 samples in the first pass and 8 in this one: several passes"),
            (Source([4, 4], [4, 4, 4]), "the data gave 8 samples in the first pass and 12 or more in this one"),
            (Source([4, 4, 4], [4, 3, 4]), "batch 1 of the data had 4 samples in the first pass and 3 in this one"),
            (Source([4, 4, 4], []), "12 samples in the first pass and none in this one"),
            (DataLoader(Once(), batch_size=4), "12 samples in the first pass and none in this one"),
            (DataLoader(Noisy(), batch_size=4), "batch 0 of the data differs from the same batch of the first pass"),
            (used_up(), "no samples: an IterableDataset must restart"),
        ],
    )
    def test_that_differ(self, data: Any, told: str) -> None:
        with pytest.raises(CurvlabError, match=told):
            estimate(Problem(model(), "cross_entropy", data), "empirical_fisher", "diag")

    @pytest.mark.parametrize("backend", ["torch", "backpack", "nngeometry", "curvlinops"])
    def test_of_every_backend(self, backend: str) -> None:
        """The pass of ``check`` is the first one, also for what computes on a copy of the model."""
        structure = "kfac" if backend == "curvlinops" else "diag"
        problem = Problem(model(), "cross_entropy", Source([4, 4, 4], [4, 4]))
        with pytest.raises(CurvlabError, match="in the first pass and"):
            estimate(problem, "empirical_fisher", structure, backend=backend)

    def test_a_part_of_a_pass_is_compared(self) -> None:
        problem = Problem(model(), "cross_entropy", DataLoader(Noisy(), batch_size=4))
        problem.check()
        with pytest.raises(CurvlabError, match="batch 0 of the data differs from"):
            next(problem.batches())

    def test_a_generator_of_the_data_set_starts_each_pass_alike(self) -> None:
        class Augmented(Samples):
            def __init__(self) -> None:
                super().__init__()
                self.generator = np.random.default_rng(0)

            def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
                return X[index] + self.generator.random(), Y[index]

        problem = Problem(model(), "cross_entropy", DataLoader(Augmented(), batch_size=4))
        one, other = (torch.cat([x for x, _ in problem.batches()]) for _ in range(2))
        assert torch.equal(one, other)

    def test_own_generators_start_each_pass_alike(self) -> None:
        sampler = Shuffled()
        before = str(sampler.generator.bit_generator.state)
        problem = Problem(model(), "cross_entropy", DataLoader(TensorDataset(X, Y), batch_size=4, sampler=sampler))
        one, other = (torch.cat([x for x, _ in problem.batches()]) for _ in range(2))
        assert torch.equal(one, other)
        assert not torch.equal(one, X)
        assert str(sampler.generator.bit_generator.state) == before

    def test_persistent_workers(self) -> None:
        """Their one iterator is not taken from whoever is in the middle of it, and passes are alike."""
        data = DataLoader(TensorDataset(X, Y), batch_size=4, num_workers=1, persistent_workers=True, shuffle=True)
        theirs = iter(data)
        next(theirs)
        problem = Problem(model(), "cross_entropy", data)
        problem.check()
        assert problem.num_samples == sum(len(x) for x, _ in problem.batches()) == N
        assert sum(len(x) for x, _ in theirs) == N - 4

    def test_a_pair_may_be_changed_between_computations(self) -> None:
        x = X.clone()
        problem = Problem(model(), "cross_entropy", (x, Y))
        problem.check()
        x.add_(1)
        problem.check()
        assert torch.equal(next(problem.batches())[0], x)

    def test_sums_that_overflow(self) -> None:
        x = torch.full((6, 4), 3e38)
        assert len(next(Problem(model(), "cross_entropy", [(x, Y[:6])]).batches())[0]) == 6

    @pytest.mark.parametrize("workers", [0, 1])
    def test_stop_iteration_in_a_data_set(self, workers: int) -> None:
        data = DataLoader(Samples(StopIteration()), batch_size=4, num_workers=workers)
        with pytest.raises(CurvlabError, match="the DataLoader ended after 1 of 3 batches: a StopIteration"):
            Problem(model(), "cross_entropy", data).check()

    def test_lengths_that_are_right(self) -> None:
        batches = [[0, 1, 2], [3], [4, 5]]
        for data in (
            DataLoader(TensorDataset(X, Y), batch_size=5, drop_last=True),
            DataLoader(TensorDataset(X, Y), batch_sampler=batches),
            DataLoader(TensorDataset(X, Y), batch_sampler=iter(batches)),  # of no length, and used up
        ):
            problem = Problem(model(), "cross_entropy", data)
            assert problem.num_samples == (10 if data.drop_last else 6)

    def test_an_error_of_the_data(self) -> None:
        data = DataLoader(Samples(ValueError("image 7 is broken\nat length")), batch_size=4)
        with pytest.raises(
            CurvlabError, match=r"the data raise an error at batch 1: ValueError: image 7 is broken$"
        ) as caught:
            Problem(model(), "cross_entropy", data).check()
        assert isinstance(caught.value.__cause__, ValueError)


class TestRefused:
    @pytest.mark.parametrize(
        ("data", "told"),
        [
            (DataLoader(TensorDataset(X, Y), batch_size=None), "targets of batch 0 are one number.*batch_size=None"),
            (
                DataLoader(list(zip(X, range(N), strict=True)), batch_size=None),
                "a list of 2 .Tensor, int.*set its batch_size",
            ),
            (
                DataLoader(TensorDataset(X, X[:, :3]), batch_size=None),
                "4 inputs but 3 targets; a DataLoader with batch_size",
            ),
            (list(zip(X, Y, strict=True)), "targets of batch 0 are one number, not one row per sample"),
            ((torch.tensor(1.0), torch.tensor(1)), "inputs of the data are one number"),
            ([{"x": X, "y": Y}], r"not a pair \(inputs, targets\) but a dict with x, y: give forward=lambda"),
            ([(X, X, Y)], r"not a pair .* but a tuple of 3 \(Tensor, Tensor, Tensor\): give forward=lambda model"),
            ([({"x": X, "name": object()}, Y)], r"\['name'\] of batch 0 is of type object: a batch is made of tensors"),
            ([({"x": X, "z": X[:3]}, Y)], r"batch 0 has 12 rows in \['x'\] but 3 in \['z'\]"),
            ([((X, torch.tensor(1.0)), Y)], r"\[1\] of batch 0 is one number, not one row per sample"),
            (({}, Y), "the data holds no tensor"),
            ("mnist", "not a pair .*but a str"),
            (None, "DataLoader, a data set, a list of batches, a pair of tensors or a mapping, not a NoneType"),
            ((X.to_sparse(), Y), r"inputs of the data are sparse_coo tensors: convert with to_dense\(\)"),
            ((X.to_sparse_csr(), Y), r"inputs of the data are sparse_csr tensors: convert with to_dense\(\)"),
            ([(X, Y), (X, Y.to_sparse())], "targets of batch 1 are sparse_coo"),
            ((torch.nested.nested_tensor([X[:3], X[3:5]]), Y[:2]), r"nested \(ragged\) tensors: pad them"),
            ((torch.nested.nested_tensor([X[:3], X[3:5]], layout=torch.jagged), Y[:2]), "nested .ragged. tensors"),
            ((torch.quantize_per_tensor(X, 0.1, 0, torch.qint8), Y), r"quantized: convert with dequantize\(\)"),
            ((X.to(torch.float8_e4m3fn), Y), r"float8_e4m3fn: convert with float\(\)"),
            ((X.to("meta"), Y), "meta device"),
            ((masked_tensor(X, X > 0), Y), "have the class MaskedTensor: give plain tensors"),
            ((X.double() * 1e300, Y), r"outside the range of torch\.float32, .*: rescale them"),
            ((torch.complex(X, X / 0), Y), "data hold NaN or infinite"),
            (((X * 9).to(torch.uint8), Y), r"inputs are torch\.uint8, not floating: use .*x\.float\(\) / 255"),
            ((X > 0, Y), r"inputs are torch\.bool, not floating: use x\.float\(\)"),
            (
                (X[:, :3], Y),
                r"Sequential raises an error on the first samples of the data: RuntimeError: mat1 and mat2 shapes",
            ),
        ],
    )
    @pytest.mark.filterwarnings("ignore")
    def test_in_one_sentence(self, data: Any, told: str) -> None:
        with pytest.raises(CurvlabError, match=told) as caught:
            Problem(model(), "cross_entropy", data).check()
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("loss", [[], {}, None, 3])
    def test_losses_go_by_name(self, loss: Any) -> None:
        with pytest.raises(CurvlabError, match=f"loss must be one of the names cross_entropy.*{type(loss).__name__}"):
            Problem(model(), loss, (X, Y))


class TestTaken:
    @pytest.mark.parametrize(
        "make",
        [
            lambda: X.clone().requires_grad_(),
            lambda: X.clone().requires_grad_() * 1,
            lambda: nn.Parameter(X.clone()),
            lambda: torch.stack([X, X])[0].t().contiguous().t(),
            lambda: torch.complex(X, -X).conj().imag,
            lambda: X.double(),
        ],
    )
    def test_forms_of_the_same_inputs(self, make: Any) -> None:
        torch.manual_seed(0)
        net = model()
        expected = estimate(Problem(net, "cross_entropy", (X, Y)), "empirical_fisher", "diag").diagonal()
        x = make()
        for data in ((x, Y), [(x[:5], Y[:5]), (x[5:], Y[5:])]):
            problem = Problem(net, "cross_entropy", data)
            torch.testing.assert_close(estimate(problem, "empirical_fisher", "diag").diagonal(), expected)
            assert not any(inputs.requires_grad for inputs, _ in problem.batches(3))
        assert x.grad_fn is not None or x.grad is None

    def test_inference_tensors(self) -> None:
        net = model()
        with torch.inference_mode():
            problem = Problem(net, "cross_entropy", [(X + 0, Y + 0)])
            estimate(problem, "fisher", "diag")
        estimate(problem, "hessian", "implicit") @ torch.ones(problem.space.total)
        assert not problem.probe()[0][0].is_inference()

    def test_batches_that_a_data_set_makes(self) -> None:
        data = DataLoader([(X[:5], Y[:5]), (X[5:], Y[5:])], batch_size=None)
        assert Problem(model(), "cross_entropy", data).num_samples == N

    def test_integers_where_they_belong(self) -> None:
        net = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 3))
        Problem(net, "cross_entropy", (torch.arange(24).reshape(12, 2) % 5, Y)).check()

    def test_complex_inputs_take_the_precision_of_the_model(self) -> None:
        x, _ = next(Problem(model(), "cross_entropy", (torch.complex(X, X).to(torch.complex128), Y)).batches())
        assert x.dtype == torch.complex64


def test_a_last_batch_of_one_under_batch_normalisation() -> None:
    """In training: one sentence with the way out."""
    inputs, targets = torch.randn(9, 1, 2, 2), torch.arange(9) % 2
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    told = "batch normalisation needs more than one sample per batch; choose another batch_size"
    with pytest.raises(CurvlabError, match=told):
        fit(net, (inputs, targets), batch_size=8, epochs=1, progress=False)
    dataset = DataSet("nine", inputs, targets, inputs, targets, ("a", "b"))
    with pytest.raises(CurvlabError, match=f"the model fails in task 0: {told}"):
        run(permuted(dataset, tasks=1), net, Naive(), batch_size=8, progress=False)


def test_arrays_and_data_sets_are_taken() -> None:
    net = model()
    x, y = X.numpy(), Y.numpy()
    expected = estimate(Problem(net, "cross_entropy", (X, Y)), "empirical_fisher", "diag").diagonal()
    pairs = [((x[i], y[i])) for i in range(N)]
    for data in (
        *((x, y), (X, y), (x, Y), (X, Y.tolist()), [(x[:5], y[:5]), (X[5:], Y[5:].tolist())]),
        *(TensorDataset(X, Y), ListDataset(pairs)),
    ):
        found = estimate(Problem(net, "cross_entropy", data), "empirical_fisher", "diag").diagonal()
        assert torch.allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (4, 6), (3, 5), (0,)])
def test_equal_tensors(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Whether they are compared as words or entry by entry."""
    torch.manual_seed(0)
    one = torch.randn(shape).to(dtype)
    assert are_equal(one, one.clone())
    assert are_equal(one.mT, one.mT.clone()) if len(shape) == 2 else True
    assert are_equal(torch.zeros(shape, dtype=dtype), -torch.zeros(shape, dtype=dtype))
    if one.numel():
        other = one.clone()
        other.view(-1)[-1] += 1
        assert not are_equal(one, other)
        other.view(-1)[-1] = torch.nan
        assert not are_equal(one, other)
