"""The problem: what is refused, and that nothing of the user's is changed."""

import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from models_under_test import CLASSES, Shifting, case
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset, WeightedRandomSampler

from curvlab.errors import CurvlabError, UnsupportedError
from curvlab.estimators import estimate
from curvlab.estimators.rows import linear_factors, linear_layers, row_batches
from curvlab.problem import Problem
from curvlab.quantities import EmpiricalFisher, Fisher, MaSQ

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % CLASSES


class Counting(nn.Module):
    """Writes a buffer at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


def network() -> nn.Module:
    """One of everything that has a state: train and eval modes, buffers, hooks, gradients, frozen weights."""
    model = nn.Sequential(
        nn.Linear(4, 5),
        nn.BatchNorm1d(5),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Sequential(nn.Linear(5, CLASSES), nn.Tanh(), Counting()),
        nn.Linear(CLASSES, CLASSES),
    )
    model.eval()
    model[2].train()
    model[0].bias.requires_grad_(False)
    model[5].weight.grad = torch.ones(CLASSES, CLASSES)
    model[0].register_forward_hook(lambda module, arguments, output: None)
    model[4].register_forward_pre_hook(lambda module, arguments: None)
    return model


def random_states() -> list[Any]:
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - the state that must not move
    return [random.getstate(), name, keys.tolist(), rest, torch.get_rng_state().tolist()]


def state(model: nn.Module) -> list[Any]:
    """All that a user could see of a model, in comparable form."""
    return [
        [(n, id(p), p.tolist(), p.requires_grad) for n, p in model.named_parameters()],
        [(id(p.grad), None if p.grad is None else p.grad.tolist()) for p in model.parameters()],
        [(n, id(b), b.tolist()) for n, b in model.named_buffers()],
        [m.training for m in model.modules()],
        [[(k, len(v)) for k, v in vars(m).items() if k.endswith(("hooks", "kwargs"))] for m in model.modules()],
    ]


def everything(problem: Problem) -> None:
    """Every way in which a problem is computed with."""
    for quantity in (EmpiricalFisher(), Fisher(samples=2), MaSQ(3), "ggn", "hessian"):
        estimate(problem, quantity, "diag")
    for name, layer in linear_layers(problem).items():
        linear_factors(problem, Fisher(), name, layer)
    for quantity in (EmpiricalFisher(), Fisher(samples=2), MaSQ(3)):
        list(row_batches(problem, quantity, problem.space.names))


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Uses every global random state, and at the given access raises."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.fail_at, self.accesses = fail_at, 0

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.accesses += 1
        if self.accesses == self.fail_at:
            raise KeyboardInterrupt
        noise = random.random() + np.random.rand() + torch.rand(())  # noqa: NPY002
        return torch.cat([X[index, :3], X[index, 3:] + noise]), Y[index]


class TestNothingIsChanged:
    def test_model(self) -> None:
        model = network()
        before = state(model)
        everything(Problem(model, "cross_entropy", (X, Y)))
        assert state(model) == before

    def test_data(self) -> None:
        """Also where the model changes its inputs in place."""
        x, y = X.clone(), Y.clone()
        everything(Problem(Shifting(), "cross_entropy", (x, y)))
        assert torch.equal(x, X)
        assert torch.equal(y, Y)

    @pytest.mark.parametrize("sampler", ["none", "global", "own", "weighted", "batch"])
    def test_random_states(self, sampler: str) -> None:
        generator = torch.Generator().manual_seed(4)
        data = {
            "none": lambda: DataLoader(Augmented(), 3, generator=generator),
            "global": lambda: DataLoader(Augmented(), 3, shuffle=True),
            "own": lambda: DataLoader(Augmented(), 3, shuffle=True, generator=generator),
            "weighted": lambda: DataLoader(
                Augmented(), 3, sampler=WeightedRandomSampler(torch.ones(8), 8, generator=generator)
            ),
            "batch": lambda: DataLoader(
                Augmented(), batch_sampler=BatchSampler(RandomSampler(X, generator=generator), 3, drop_last=False)
            ),
        }[sampler]()
        model = network()
        before = [random_states(), generator.get_state().tolist()]
        problem = Problem(model, "cross_entropy", data)
        first = list(problem.batches())
        everything(problem)
        assert [random_states(), generator.get_state().tolist()] == before
        for (x, y), (again, labels) in zip(first, problem.batches(), strict=True):
            assert torch.equal(x, again)
            assert torch.equal(y, labels)
        # The draws go on from batch to batch.
        seen = torch.cat([x for x, _ in first])
        index = (seen[:, :1] == X[:, 0]).int().argmax(dim=1)
        assert (seen[:, 3] - X[index, 3]).unique().numel() == len(X)

    @pytest.mark.parametrize("fail_at", [2, 5, 8 + 4, 8 * 3 + 5, 8 * 4])
    def test_interrupted(self, fail_at: int) -> None:
        model, generator = network(), torch.Generator().manual_seed(4)
        before = [state(model), random_states(), generator.get_state().tolist()]
        data = DataLoader(Augmented(fail_at), 3, shuffle=True, generator=generator)
        with pytest.raises(KeyboardInterrupt):
            everything(Problem(model, "cross_entropy", data))
        assert [state(model), random_states(), generator.get_state().tolist()] == before

    def test_interrupted_inside_the_model(self) -> None:
        model, calls = network(), []

        def interrupt(*_: object) -> None:
            calls.append(None)
            if len(calls) == 2:
                raise KeyboardInterrupt

        model[5].register_forward_pre_hook(interrupt)
        before = [state(model), random_states()]
        with pytest.raises(KeyboardInterrupt):
            linear_layers(Problem(model, "cross_entropy", (X, Y)))
        assert [state(model), random_states()] == before

    def test_a_kept_traceback_does_not_turn_the_clock_back(self) -> None:
        """The frames of a failed estimate live as long as its error; to let go of them later changes nothing."""
        x = X.clone()
        x[6, 1] = torch.nan
        data = DataLoader(TensorDataset(x, Y), batch_size=3, shuffle=True)
        problem = Problem(network(), "cross_entropy", data)
        before = random_states()
        try:
            estimate(problem, "empirical_fisher", "diag")
        except CurvlabError as error:
            kept = [error]
        assert random_states() == before
        torch.rand(3), random.random()
        later = random_states()
        kept.clear()
        assert random_states() == later


class Mixing(nn.Module):
    """Centres its inputs over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x - x.mean(dim=0))


class Noisy(Mixing):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x + 0.1 * torch.randn_like(x))


class Returning(Mixing):
    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.fc(x))


class TestRefusedModels:
    @pytest.mark.parametrize(
        ("module", "told"),
        [
            (nn.BatchNorm1d(4), r"1\.0 \(BatchNorm1d\) is in train mode.*model.eval\(\)"),
            (nn.Dropout(0.2), r"1\.0 \(Dropout\) is in train mode"),
            (nn.LSTM(2, 2, num_layers=2, dropout=0.5), r"1\.0 \(LSTM\) is in train mode"),
        ],
    )
    def test_train_mode(self, module: nn.Module, told: str) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(module), nn.Linear(4, CLASSES))
        with pytest.raises(UnsupportedError, match=told):
            estimate(Problem(model, "cross_entropy", (X, Y)), "fisher", "diag")

    def test_train_mode_that_is_harmless(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0), nn.LayerNorm(4), nn.Linear(4, CLASSES)).train()
        Problem(model, "cross_entropy", (X, Y)).check()

    @pytest.mark.parametrize(
        ("model", "told"),
        [(Mixing(), "Mixing is random or depends on the other samples"), (Noisy(), "draws random numbers .randn_like")],
    )
    def test_own_modules_that_mix_samples_or_draw(self, model: nn.Module, told: str) -> None:
        with pytest.raises(UnsupportedError, match=told):
            estimate(Problem(model, "cross_entropy", (X, Y)), "fisher", "diag")

    def test_a_weight_that_changes_whenever_it_is_read(self) -> None:
        model = nn.Sequential(spectral_norm(nn.Linear(4, CLASSES))).train()
        before = [buffer.clone() for buffer in model.buffers()]
        with pytest.raises(UnsupportedError, match=r"0 \(ParametrizedLinear\) changes its buffers when"):
            estimate(Problem(model, "cross_entropy", (X, Y)), "fisher", "diag")
        assert all(map(torch.equal, before, model.buffers()))
        Problem(model.eval(), "cross_entropy", (X, Y)).check()

    def test_a_contrastive_model(self) -> None:
        class Similarities(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                codes = super().forward(x)
                return codes @ codes.mT

        with pytest.raises(CurvlabError, match="which outputs that compare the samples of a batch cannot have"):
            Problem(Similarities(4, 2), "cross_entropy", (X[:4], torch.arange(4))).check()

    def test_an_iteration_that_the_largest_sample_ends(self) -> None:
        """The first sample alone, and every second one, take as many steps as the batch; the third one does not."""

        class Halving(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                while x.abs().max() > 1:
                    x = x / 2
                return super().forward(x)

        x = torch.tensor([3.0, 3.0, 0.5, 3.0])[:, None] * torch.ones(4, 4)
        with pytest.raises(UnsupportedError, match="Halving is random or depends on the other samples"):
            Problem(Halving(4, CLASSES), "cross_entropy", (x, Y[:4])).check()

    def test_mixing_shows_also_after_a_batch_of_one(self) -> None:
        with pytest.raises(UnsupportedError, match="Mixing is random or depends"):
            Problem(Mixing(), "cross_entropy", [(X[:1], Y[:1]), (X[1:], Y[1:])]).check()

    def test_batch_norm_without_running_statistics(self) -> None:
        model = nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, CLASSES)).eval()
        with pytest.raises(UnsupportedError, match=r"0 \(BatchNorm1d\) keeps no running statistics"):
            Problem(model, "cross_entropy", (X, Y)).check()

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            (lambda f: f[0, 0], r"\(N, C\) or \(N, \*S, C\); for one sample it returned \(\)"),
            (lambda f: f[:3], r"returned \(3, 3\)"),
            (lambda f: {"scores": f}, "not dict: give forward=lambda"),
        ],
    )
    def test_output(self, change: Callable[[Tensor], Any], told: str) -> None:
        with pytest.raises(UnsupportedError, match=told):
            Problem(Returning(change), "cross_entropy", (X, Y)).check()

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_weights_that_are_not_finite(self, value: float) -> None:
        model = network()
        with torch.no_grad():
            model[4][0].weight[0, 0] = value
        with pytest.raises(CurvlabError, match=r"the parameter 4\.0\.weight of the model holds 1 NaN"):
            estimate(Problem(model, "cross_entropy", (X, Y)), "fisher", "diag")

    def test_buffers_that_are_nan(self) -> None:
        model = network()
        model[1].running_mean[:2] = torch.nan
        with pytest.raises(CurvlabError, match=r"the buffer 1\.running_mean of the model holds 2 NaN"):
            Problem(model, "cross_entropy", (X, Y)).check()

    def test_a_mask_may_be_minus_infinity(self) -> None:
        case("attention").problem.check()

    def test_parameters(self) -> None:
        with pytest.raises(CurvlabError, match="no trainable parameter"):
            Problem(nn.Linear(4, 3).requires_grad_(False), "cross_entropy", (X, Y))
        mixed = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3).double())
        with pytest.raises(CurvlabError, match=r"must have one dtype.*float32.*float64"):
            Problem(mixed, "cross_entropy", (X, Y))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            complex_model = nn.Linear(4, 3).to(torch.complex64)
        with pytest.raises(CurvlabError, match=r"complex64.*real"):
            Problem(complex_model, "cross_entropy", (X, Y))


class TestRefusedData:
    @pytest.mark.parametrize(
        ("data", "told"),
        [
            ((X, Y[:5]), "8 inputs but 5 targets"),
            ([(X, Y), (X, Y[:5])], "batch 1 has 8 inputs but 5 targets"),
            ([(X, Y), (X, Y, Y)], "batch 1 is not a pair"),
            ([X, Y, Y], "batch 0 is not a pair"),
            ([(X, [0, 1])], "batch 0 has 8 inputs but 2 targets"),
            ([(X, ["a", "b"])], "targets of batch 0 are a list of 2 .str, str., from which no tensor can be made"),
            ((X[:0], Y[:0]), "no samples"),
            ([], "no samples"),
            ([(X[:0], Y[:0])], "no samples"),
            (iter([(X, Y)]), "only once"),
            (((x, y) for x, y in [(X, Y)]), "only once"),
            ((X / 0, Y), "data hold NaN or infinite"),
            ([(X, Y), (torch.full((1, 4), torch.nan), Y[:1])], "data hold NaN"),
            ((X, Y.float()), "class indices.*float32"),
            ((X, Y + 1), "label is 3"),
            ([(X, Y), (X, Y - 1)], "label is -1"),
        ],
    )
    def test_sentence(self, data: Any, told: str) -> None:
        with pytest.raises(CurvlabError, match=told):
            estimate(Problem(network(), "cross_entropy", data), "empirical_fisher", "diag")

    def test_unknown_loss(self) -> None:
        with pytest.raises(CurvlabError, match=r"no loss 'mse'.*squared_error"):
            Problem(network(), "mse", (X, Y))

    def test_targets_of_squared_error(self) -> None:
        with pytest.raises(CurvlabError, match=r"squared_error needs floating-point.*\(8, 3\).*\(8, 1\)"):
            Problem(network(), "squared_error", (X, X[:, :1])).check()


class TestBatches:
    @pytest.mark.parametrize("sizes", [[8], [3, 1, 4], [1] * 8, [0, 5, 0, 3]])
    @pytest.mark.parametrize("size", [1, 3, 8, 20])
    def test_regrouping_keeps_samples_and_order(self, sizes: list[int], size: int) -> None:
        data = list(zip(X.split(sizes), Y.split(sizes), strict=True))
        batches = list(Problem(network(), "cross_entropy", data).batches(size))
        assert [len(x) for x, _ in batches] == [len(x) for x in X.split(size)]
        assert torch.equal(torch.cat([x for x, _ in batches]), X)
        assert torch.equal(torch.cat([y for _, y in batches]), Y)

    def test_own_batches(self) -> None:
        data = [(X[:3], Y[:3]), (X[3:], Y[3:])]
        assert [len(x) for x, _ in Problem(network(), "cross_entropy", data).batches()] == [3, 5]

    def test_floating_data_take_the_models_dtype(self) -> None:
        x, y = next(Problem(nn.Linear(4, 3).double(), "squared_error", (X, X[:, :3])).batches())
        assert (x.dtype, y.dtype) == (torch.float64, torch.float64)
        x, y = next(Problem(nn.Linear(4, 3), "cross_entropy", (X.double(), Y)).batches())
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64)

    def test_a_source_is_gone_through_anew_each_time(self) -> None:
        class Source:
            def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
                return iter([(X[:3], Y[:3]), (X[3:], Y[3:])])

        problem = Problem(network(), "cross_entropy", Source())
        assert problem.num_samples == problem.num_samples == 8

    def test_parameters_are_detached(self) -> None:
        problem = Problem(network(), "cross_entropy", (X, Y))
        assert list(problem.parameters()) == list(problem.space.names)
        assert not any(p.requires_grad for p in problem.parameters().values())


@pytest.mark.parametrize("method", ["loss_value", "gradient"])
def test_outputs_that_are_nan_have_no_loss_and_no_gradient(method: str) -> None:
    class Root(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sqrt()

    with pytest.raises(CurvlabError, match="is nan: look for NaN and infinite values in the outputs of Root"):
        getattr(Problem(Root(4, CLASSES), "cross_entropy", (X, Y)), method)()
