"""Every combination of the registry on every model: correct to 1e-10, or refused by name; never a wrong number.

The expected values are computed from the reference's rows, one sample at a time (``curvlab.estimators.torch_func``,
which ``test_estimators.py`` tests against plain loops), not from its matrices. The combinations are those of
``BACKENDS``: a new one there is tested here.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from functools import cache
from itertools import count

import numpy as np
import pytest
import torch
from models_under_test import CLASSES, ZOO, Case, N, case
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from curvlab.errors import CurvlabError, UnsupportedError
from curvlab.estimators import BACKENDS, estimate
from curvlab.estimators.torch_func import per_sample_rows
from curvlab.estimators.verification import kronecker_layers
from curvlab.matrices import EKFAC, CurvatureMatrix
from curvlab.matrices.layers import group_layers
from curvlab.problem import BatchSource, Problem
from curvlab.quantities import GGN, EmpiricalFisher, Fisher, Hessian, MaSQ, Quantity

LOSSES = ("cross_entropy", "squared_error", "binary_cross_entropy")
FORMS: dict[type[Quantity], tuple[Quantity, ...]] = {
    Fisher: (Fisher(), Fisher(samples=2, seed=1)),
    EmpiricalFisher: (EmpiricalFisher(),),
    MaSQ: (MaSQ(3),),
    GGN: (GGN(),),
    Hessian: (Hessian(),),
}
QUANTITIES = tuple(quantity for forms in FORMS.values() for quantity in forms)
VARIANTS = {
    "kfac": ("kfac", "kfac:sharing=reduce"),
    "ekfac": ("ekfac", "ekfac:sharing=reduce"),
    "tkfac": ("tkfac", "tkfac:sharing=reduce", "tkfac:variant=rescaled"),
}
PAIRS = [
    pytest.param(backend.name, quantity, id=f"{backend.name}-{quantity}")
    for backend in BACKENDS.values()
    for kind in backend.structures
    for quantity in FORMS[kind]
]


def structures(backend: str, quantity: Quantity, variants: bool = True) -> list[str]:
    """Return the structures that a backend has for a quantity, in all variants or in one form each."""
    names = BACKENDS[backend].structures[type(quantity)]
    return [form for name in names for form in VARIANTS.get(name, (name,))] if variants else list(names)


def is_kronecker(structure: str) -> bool:
    return "kfac" in structure


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-10) -> bool:
    """Return whether tensors agree relative to the largest entry."""
    return actual.shape == expected.shape and bool((actual - expected).abs().max() <= rtol * expected.abs().max())


# Expected results ----------------------------------------------------------------------------------------------------


class Truth:
    """Expected matrices of a case, from the rows of a quantity."""

    def __init__(self, whole: Case, quantity: Quantity) -> None:
        self.problem, self.quantity = whole.problem, quantity
        self.kronecker_names = [n for n in self.problem.space.names if n.rpartition(".")[0] in whole.kronecker]
        self._tensors: dict[str, Mapping[str, Tensor]] = {}
        if isinstance(quantity, Hessian):
            self.dense = estimate(self.problem, quantity, "dense", backend="torch").to_dense()
        else:
            self.rows = torch.cat(list(per_sample_rows(self.problem, quantity, self.problem.space)))
            self.dense = self.rows.mT @ self.rows / self.problem.num_samples

    def index(self, matrix: CurvatureMatrix) -> Tensor:
        """Return the indices of the parameters of a matrix among all parameters."""
        every = torch.arange(self.problem.space.total)
        return torch.cat([every[self.problem.space.slices[name]] for name in matrix.space.names])

    def tensors(self, structure: str) -> Mapping[str, Tensor]:
        if structure not in self._tensors:
            matrix = estimate(self.problem, self.quantity, structure, backend="torch", params=self.kronecker_names)
            self._tensors[structure] = matrix.tensors()
        return self._tensors[structure]

    def approves(self, matrix: CurvatureMatrix, structure: str) -> bool:
        index = self.index(matrix)
        if structure == "dense":
            return close(matrix.to_dense(), self.dense[index][:, index])
        if structure == "block_diag":
            blocks = [self.dense[index[part]][:, index[part]] for part in matrix.space.slices.values()]
            return close(matrix.to_dense(), torch.block_diag(*blocks))
        if structure == "diag":
            return close(matrix.diagonal(), self.dense.diagonal()[index])
        if structure == "implicit":
            generator = torch.Generator().manual_seed(0)
            vectors = torch.randn(len(index), 2, dtype=torch.float64, generator=generator)
            return close(matrix @ vectors, self.dense[index][:, index] @ vectors)
        if isinstance(matrix, EKFAC):
            return self._is_eigenbasis(matrix, self.tensors(structure.replace("ekfac", "kfac")))
        expected = self.tensors(structure)
        actual = matrix.tensors()
        # The scale may be on either factor.
        return all(
            close(torch.kron(actual[f"{n}|S"][0], actual[f"{n}|A"][0]), torch.kron(s[0], expected[f"{n}|A"][0]))
            for n, s in ((key.removesuffix("|S"), t) for key, t in expected.items() if key.endswith("|S"))
        )

    def _is_eigenbasis(self, matrix: EKFAC, kfac: Mapping[str, Tensor]) -> bool:
        """Return whether EK-FAC's basis diagonalises K-FAC and its values are the diagonal in this basis.

        The basis is not unique, but this property is.
        """
        rows = dict(zip(matrix.space.names, self._columns(matrix), strict=True))
        tensors = matrix.tensors()
        for name, layer in group_layers(matrix.space).items():
            of_inputs, of_slopes = tensors[f"{name}|U_A"], tensors[f"{name}|U_S"]
            for vectors, factor in ((of_inputs, kfac[f"{name}|A"][0]), (of_slopes, kfac[f"{name}|S"][0])):
                rotated = vectors.mT @ factor @ vectors
                if not close(rotated, rotated.diagonal().diag()):
                    return False
                if not close(vectors.mT @ vectors, torch.eye(len(vectors), dtype=vectors.dtype)):
                    return False
            gradients = layer.join(rows)
            moments = (of_slopes.mT @ gradients @ of_inputs).square().sum(dim=0) / self.problem.num_samples
            if not close(tensors[f"{name}|values"], moments):
                return False
        return True

    def _columns(self, matrix: CurvatureMatrix) -> Iterator[Tensor]:
        for name in matrix.space.names:
            yield self.rows[:, self.problem.space.slices[name]].mT


@cache
def truth(name: str, quantity: Quantity, loss: str | None = None, samples: int = N) -> Truth:
    whole = case(name, loss=loss)
    return Truth(replace(whole, inputs=whole.inputs[:samples], targets=whole.targets[:samples]), quantity)


def attempt(
    problem: Problem, quantity: Quantity, structure: str, backend: str, params: Sequence[str] | None = None
) -> CurvatureMatrix | None:
    """Return the matrix, or None if the backend refuses; the error must name the backend."""
    try:
        return estimate(problem, quantity, structure, backend=backend, params=params)
    except UnsupportedError as error:
        refusal = str(error)
    assert f"backend {backend}" in refusal
    return None


def check_structures(
    backend: str, quantity: Quantity, expected: Truth, problem: Problem, variants: bool = True
) -> dict[str, bool]:
    """Check every structure on a problem; return for each whether it was computed."""
    done = {}
    problem.check()
    problem.check = lambda: None  # checked once is enough
    for structure in structures(backend, quantity, variants):
        if backend == "torch" and is_kronecker(structure):
            continue  # the reference itself: test_estimators.py has the definitions
        names = expected.kronecker_names if is_kronecker(structure) else None
        if names == []:
            continue
        matrix = attempt(problem, quantity, structure, backend, names)
        assert matrix is None or expected.approves(matrix, structure), f"{structure} is wrong"
        done[structure] = matrix is not None
    return done


# Combinations x models x losses x batches ----------------------------------------------------------------------------


Split = Callable[[Tensor, Tensor], BatchSource]


def at_once(x: Tensor, y: Tensor) -> BatchSource:
    return x, y


def uneven(x: Tensor, y: Tensor) -> BatchSource:
    """Return batches of which the last has one sample."""
    return list(zip(x.split(3), y.split(3), strict=True))


def singles(x: Tensor, y: Tensor) -> BatchSource:
    """Return two batches of one sample each."""
    return list(zip(x[:2].split(1), y[:2].split(1), strict=True))


def dropping(x: Tensor, y: Tensor) -> BatchSource:
    """Return a loader that drops the last sample, which ``len(loader.sampler)`` counts."""
    return DataLoader(TensorDataset(x, y), batch_size=3, drop_last=True)


SPLITS: tuple[Split, ...] = (at_once, uneven, singles, dropping)
PLAIN = ("mlp", "mlp squared error", "mlp binary")


def split_truth(name: str, quantity: Quantity, loss: str, split: Split, samples: int = 4) -> tuple[Truth, Problem]:
    """Return the expected results for the first samples of a case, 4 or 7, and the problem with them in batches."""
    expected = truth(name, quantity, loss, {singles: 2, dropping: samples - 1}.get(split, samples))
    if split is at_once:
        return expected, expected.problem
    given = case(name, loss=loss)
    return expected, Problem(given.model, loss, split(given.inputs[:samples], given.targets[:samples]))


def zoo_combinations() -> Iterator[tuple[str, Quantity, str, str, Split]]:
    """Yield every backend and quantity on every model; each of these three is combined with every loss and every split.

    The plain networks are left out, because another test covers them; also the GGN, which equals the Fisher, on most
    models, and the dense Hessian of ResNet-20, which is slow.
    """
    for i, name in enumerate(name for name in ZOO if name not in PLAIN):
        for backend, quantity in (p.values for p in PAIRS):
            if isinstance(quantity, GGN) and name not in ("batch norm", "tokens", "residual"):
                continue
            if isinstance(quantity, Hessian) and name == "resnet-20":
                continue
            j = QUANTITIES.index(quantity)
            yield backend, quantity, name, LOSSES[(i + j) % len(LOSSES)], SPLITS[(i // 3 + j) % len(SPLITS)]


LATER = [pytest.mark.slow]
NAMES = [(backend, str(quantity)) for backend, quantity in (p.values for p in PAIRS)]


def often(backend: str, quantity: Quantity, name: str) -> bool:
    """Return whether a combination is tested at every change: every second one, so that each setting is with half."""
    return (NAMES.index((backend, str(quantity))) + list(ZOO).index(name)) % 2 == 0


@pytest.mark.parametrize(
    ("backend", "quantity", "name", "loss", "split"),
    [
        pytest.param(*row, id="-".join([*map(str, row[:4]), row[4].__name__]), marks=[] if often(*row[:3]) else LATER)
        for row in zoo_combinations()
    ],
)
def test_right_or_refused(backend: str, quantity: Quantity, name: str, loss: str, split: Split) -> None:
    several = case(name).kronecker - case(name).linear  # with one position, sharing makes no difference
    done = check_structures(backend, quantity, *split_truth(name, quantity, loss, split), variants=bool(several))
    if backend in ("torch", "hooks"):
        assert all(done.values()), "curvlab's own backends refuse nothing"


def test_every_setting_is_combined_with_every_loss_and_split() -> None:
    rows = list(zoo_combinations())
    tested = [row for row in rows if often(*row[:3])]
    for setting in {row[:2] for row in rows if not isinstance(row[1], GGN)} | {row[2] for row in rows}:
        found = [row[3:] for row in tested if setting in (row[:2], row[2])]
        assert {loss for loss, _ in found} == set(LOSSES), setting
        assert {split for _, split in found} == set(SPLITS), setting


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("backend", "quantity"), PAIRS)
def test_every_combination_supports_a_plain_network(backend: str, quantity: Quantity, loss: str) -> None:
    split = SPLITS[(LOSSES.index(loss) + QUANTITIES.index(quantity)) % len(SPLITS)]
    assert all(check_structures(backend, quantity, *split_truth("mlp", quantity, loss, split, N)).values())


@cache
def reference(name: str, quantity: Quantity, structure: str, params: tuple[str, ...] | None = None) -> CurvatureMatrix:
    return estimate(case(name).problem, quantity, structure, backend="torch", params=params)


@pytest.mark.parametrize(("backend", "quantity"), PAIRS)
def test_selected_parameters(backend: str, quantity: Quantity) -> None:
    """Every structure with one selection, another with the next quantity."""
    whole, selections = case("mlp"), (("2.weight",), ("0.bias",), ("0.weight", "2.*"))
    for i, structure in enumerate(structures(backend, quantity), start=QUANTITIES.index(quantity)):
        params = selections[i % len(selections)]
        part = reference("mlp", quantity, structure, params)
        matrix = attempt(whole.problem, quantity, structure, backend, params)
        if matrix is None:
            continue
        assert matrix.space == part.space
        if structure.startswith("ekfac"):  # here no factor has equal non-zero eigenvalues
            assert close(matrix.trace(), part.trace())
            assert close(matrix.to_dense(), part.to_dense())
        else:
            assert close(matrix.to_dense(), part.to_dense())


@pytest.mark.parametrize(("backend", "quantity"), PAIRS)
def test_float32(backend: str, quantity: Quantity) -> None:
    whole = case("mlp")
    single = Problem(deepcopy(whole.model).float(), whole.loss, (whole.inputs.float(), whole.targets))
    for structure in structures(backend, quantity):
        expected = reference("mlp", quantity, structure).to_dense()
        matrix = attempt(single, quantity, structure, backend)
        if matrix is not None:
            assert matrix.dtype == torch.float32
            assert close(matrix.to_dense().double(), expected, rtol=2e-5), structure


@pytest.mark.parametrize("structure", ["diag", "kfac"])
@pytest.mark.parametrize("backend", ["torch", "hooks"])
def test_a_layer_whose_output_is_not_used(backend: str, structure: str) -> None:
    """An auxiliary head in eval mode: its curvature is zero."""

    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.aside = nn.Linear(4, CLASSES), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.aside(x)
            return self.fc(x)

    whole = replace(case("mlp"), model=Aside().double())
    matrix = estimate(whole.problem, EmpiricalFisher(), structure, backend=backend)
    assert not matrix.diagonal()[whole.problem.space.slices["aside.weight"]].any()
    alone = estimate(whole.problem, EmpiricalFisher(), structure, backend="torch", params="fc.*")
    assert close(matrix.trace(), alone.trace())


# Exact approximations ------------------------------------------------------------------------------------------------


def layer_blocks(expected: Truth, matrix: CurvatureMatrix) -> Tensor:
    """Return the reference's dense matrix without the entries between layers."""
    index = expected.index(matrix)
    layers = [n.rpartition(".")[0] for n in matrix.space.names]
    number = torch.tensor([layers.index(layer) for layer in layers]).repeat_interleave(torch.tensor(matrix.space.sizes))
    same = number.unsqueeze(0) == number.unsqueeze(1)
    return expected.dense[index][:, index] * same


def check_exact(whole: Case, quantity: Quantity, names: list[str], sharing: str = "expand") -> None:
    """Check that K-FAC, EK-FAC and TK-FAC of every backend are the blocks of the layers."""
    expected, accepted = Truth(whole, quantity), 0
    for backend in BACKENDS.values():
        for name in set(backend.structures.get(type(quantity), ())) & set(VARIANTS):
            form = name if sharing == "expand" else f"{name}:sharing={sharing}"
            matrix = attempt(whole.problem, quantity, form, backend.name, names)
            if matrix is not None:
                accepted += 1
                assert close(matrix.to_dense(), layer_blocks(expected, matrix)), (backend.name, form)
    assert accepted >= 3


def random_case(model: nn.Module, inputs: tuple[int, ...], loss: str, outputs: int = CLASSES) -> Case:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(inputs, dtype=torch.float64, generator=generator)
    y = {
        "cross_entropy": torch.randint(outputs, (len(x),), generator=generator),
        "squared_error": torch.randn(len(x), outputs, dtype=torch.float64, generator=generator),
        "binary_cross_entropy": torch.randint(2, (len(x), outputs), generator=generator).double(),
    }[loss]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in model.double().parameters():
            nn.init.normal_(parameter)
    return Case(model, x, y, loss)


class TestExactness:
    @pytest.mark.parametrize("quantity", [Fisher(), GGN()], ids=str)
    def test_deep_linear_network_with_squared_error(self, quantity: Quantity) -> None:
        """The output gradients do not depend on the sample (Bernacchia et al., 2018)."""
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5), nn.Linear(5, CLASSES))
        whole = random_case(model, (N, 4), "squared_error")
        check_exact(whole, quantity, list(whole.problem.space.names))

    @pytest.mark.parametrize("loss", LOSSES)
    @pytest.mark.parametrize("quantity", [Fisher(), Fisher(samples=2), EmpiricalFisher(), GGN()], ids=str)
    def test_one_sample(self, quantity: Quantity, loss: str) -> None:
        """Rows of one sample share their input: ``sum_r g_r g_r' (x) a a'``, for every quantity."""
        whole = case("mlp", loss=loss)
        one = replace(whole, inputs=whole.inputs[:1], targets=whole.targets[:1])
        check_exact(one, quantity, list(whole.problem.space.names))

    def test_linear_network_whose_positions_are_outputs(self) -> None:
        """The expand setting of Eschenhagen et al. (2023)."""
        model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2), nn.Flatten())
        whole = random_case(model, (N, 4, 2), "squared_error", outputs=8)
        check_exact(whole, Fisher(), list(whole.problem.space.names), "expand")

    @pytest.mark.parametrize("pooling", [torch.mean, torch.sum])
    def test_linear_network_whose_positions_are_pooled(self, pooling: Callable[..., Tensor]) -> None:
        """The reduce setting of Eschenhagen et al. (2023)."""

        class Pooled(nn.Sequential):
            def forward(self, x: Tensor) -> Tensor:
                return pooling(super().forward(x), dim=1)

        whole = random_case(Pooled(nn.Linear(2, 3), nn.Linear(3, CLASSES)), (N, 4, 2), "squared_error")
        check_exact(whole, Fisher(), list(whole.problem.space.names), "reduce")

    def test_pooled_linear_convolution(self) -> None:
        model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        whole = random_case(model, (N, 2, 3, 3), "squared_error")
        check_exact(whole, Fisher(), list(whole.problem.space.names), "reduce")

    @pytest.mark.parametrize(("i", "name"), list(enumerate(name for name in ZOO if case(name).kronecker)))
    def test_traces(self, name: str, i: int) -> None:
        """EK-FAC and TK-FAC have the trace of the exact matrix, at any number of positions."""
        quantity = (Fisher(), Fisher(samples=2, seed=1), EmpiricalFisher())[i % 3]
        expected = truth(name, quantity, samples=4)
        for structure in ("ekfac", "tkfac", "tkfac:variant=rescaled"):
            matrix = estimate(expected.problem, quantity, structure, params=expected.kronecker_names)
            assert close(matrix.trace(), expected.dense.diagonal()[expected.index(matrix)].sum())

    @pytest.mark.parametrize("variant", ["gao", "rescaled"])
    @pytest.mark.parametrize("backend", ["auto", "hooks", "torch"])
    @pytest.mark.parametrize("cancelling", ["inputs", "gradients"])
    def test_factors_that_cancel_over_the_positions(self, cancelling: str, backend: str, variant: str) -> None:
        """With reduce, the factors consist of rounding errors, which must not be scaled to the trace."""

        class Centred(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x - x.mean(dim=1, keepdim=True) if cancelling == "inputs" else x.softmax(dim=1)

        linear = nn.Linear(2, 3, bias=cancelling == "gradients")
        layers = (Centred(), linear) if cancelling == "inputs" else (linear, Centred())
        model = nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.Linear(12, CLASSES))
        whole = random_case(model, (N, 4, 2), "squared_error")
        expected = estimate(whole.problem, "empirical_fisher", "diag", backend="torch").trace()
        options = f"variant={variant},rest=diag"
        assert close(estimate(whole.problem, "empirical_fisher", f"tkfac:{options}", backend="hooks").trace(), expected)
        message = rf"{1 * (cancelling == 'inputs')} \(Linear\) has no tkfac with sharing=reduce: .*sharing=expand"
        with pytest.raises(CurvlabError, match=message):
            estimate(whole.problem, "empirical_fisher", f"tkfac:sharing=reduce,{options}", backend=backend)


# Invariances ---------------------------------------------------------------------------------------------------------


def assert_invariant(one: Problem, other: Problem, backend: str, quantity: Quantity) -> None:
    """Check that every structure gives the same matrix; for EK-FAC, whose basis is not unique, the same trace."""
    layers = kronecker_layers(one, one.space)[0].values()
    inside = [name for layer in layers for name in layer.parameters]
    for structure in structures(backend, quantity):
        names = inside if is_kronecker(structure) else None
        first = attempt(one, quantity, structure, backend, names)
        second = attempt(other, quantity, structure, backend, names)
        assert (first is None) == (second is None)
        if first is None or second is None:
            continue
        if structure.startswith("ekfac"):
            assert close(first.trace(), second.trace())
        else:
            assert close(first.to_dense(), second.to_dense()), structure


# Only curvlab's own backends: the others are compared with them above.
OWN = [p for p in PAIRS if not BACKENDS[p.values[0]].library]
OF_SAMPLES = (Fisher(), EmpiricalFisher(), GGN(), Hessian())


@pytest.mark.parametrize(("backend", "quantity"), [p for p in OWN if p.values[1] in OF_SAMPLES])
def test_order_of_the_samples(backend: str, quantity: Quantity) -> None:
    whole = case("tokens")
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    shuffled = replace(whole, inputs=whole.inputs[order], targets=whole.targets[order])
    assert_invariant(whole.problem, shuffled.problem, backend, quantity)


@pytest.mark.parametrize(("backend", "quantity"), OWN)
def test_shift_of_the_logits(backend: str, quantity: Quantity) -> None:
    whole, shifted = case("mlp"), case("mlp")
    with torch.no_grad():
        shifted.model[-1].bias += 3.0
    assert_invariant(whole.problem, shifted.problem, backend, quantity)


@pytest.mark.parametrize(("backend", "quantity"), OWN)
def test_pointwise_convolution_is_a_linear_layer(backend: str, quantity: Quantity) -> None:
    class Pointwise(nn.Module):
        def __init__(self, layer: nn.Module, dim: int) -> None:
            super().__init__()
            self.layer, self.dim, self.act, self.out = layer, dim, nn.Tanh(), nn.Linear(3, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.act(self.layer(x)).mean(dim=self.dim))

    linear = random_case(Pointwise(nn.Linear(2, 3), 1), (N, 4, 2), "cross_entropy")
    convolution = random_case(Pointwise(nn.Conv1d(2, 3, 1), 2), (N, 2, 4), "cross_entropy")
    convolution = replace(convolution, inputs=linear.inputs.mT, targets=linear.targets)
    one, other = linear.problem, convolution.problem
    for structure in structures(backend, quantity):
        first, second = (attempt(p, quantity, structure, backend) for p in (one, other))
        if first is None or second is None:
            continue
        if structure.startswith("ekfac"):
            assert close(first.trace(), second.trace())
        else:
            assert close(first.to_dense(), second.to_dense()), structure


# Saturation ----------------------------------------------------------------------------------------------------------


@cache
def saturated(loss: str, dtype: torch.dtype) -> Problem:
    """Return a problem in which every sample has a probability that rounds to one in float32."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        # Not larger: the reference must still compute the complement of the probability correctly in float64.
        model[-1].bias.copy_(torch.tensor([20.0, 0.0, -20.0]))
        model[-1].weight.mul_(0.2)
    x = torch.randn(N, 4, generator=generator)
    probabilities = model(x).softmax(1) if loss == "cross_entropy" else model(x).sigmoid()
    assert bool((probabilities.max(dim=1).values == 1).all())
    y = torch.arange(N) % CLASSES if loss == "cross_entropy" else torch.rand(N, CLASSES, generator=generator)
    return Problem(model.to(dtype), loss, (x, y))


@cache
def saturated_reference(loss: str, quantity: Quantity, structure: str) -> Tensor:
    return estimate(saturated(loss, torch.float64), quantity, structure, backend="torch").to_dense()


@pytest.mark.parametrize(("backend", "quantity"), PAIRS)
def test_saturated_outputs(backend: str, quantity: Quantity) -> None:
    """The curvature is small, but not zero or NaN; one loss per structure, the other with the next quantity."""
    for i, structure in enumerate(structures(backend, quantity), start=QUANTITIES.index(quantity)):
        loss = ("cross_entropy", "binary_cross_entropy")[i % 2]
        matrix = attempt(saturated(loss, torch.float32), quantity, structure, backend)
        if matrix is not None:
            actual = matrix.to_dense()
            assert bool(actual.isfinite().all())
            assert close(actual.double(), saturated_reference(loss, quantity, structure), rtol=1e-4), structure


# State of the user that must not change ------------------------------------------------------------------------------


class Watched:
    """A small network with all state that could be changed, and a snapshot of this state."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Linear(5, CLASSES)
        ).double()
        self.model.eval()
        self.model[1].train()  # a mixture of modes
        self.model[4].running_var.uniform_(0.5, 1.5)
        self.model[0].bias.requires_grad_(False)
        self.raises_at, self.error = 0, BaseException()
        self.calls = 0
        self.model[1].register_forward_pre_hook(self._count)
        self.inputs = torch.randn(N, 4, dtype=torch.float64)
        self.targets = torch.randint(CLASSES, (N,))
        for parameter in self.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        self.problem = Problem(
            self.model, "cross_entropy", [(self.inputs[:4], self.targets[:4]), (self.inputs[4:], self.targets[4:])]
        )

    def __deepcopy__(self, memo: object) -> "Watched":
        return self  # hooks of copied models count here, too

    def _count(self, *_: object) -> None:
        self.calls += 1
        if self.calls == self.raises_at:
            raise self.error

    def snapshot(self) -> dict[str, object]:
        tensors = {f"input {i}": t for i, t in enumerate((self.inputs, self.targets))}
        tensors |= {f"grad of {n}": p.grad for n, p in self.model.named_parameters()}
        tensors |= dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        modules = dict(self.model.named_modules())
        return (
            {name: t.detach().numpy().tobytes() for name, t in tensors.items()}
            | {f"id of {name}": id(t) for name, t in tensors.items()}
            | {f"grad {name}": p.requires_grad for name, p in self.model.named_parameters()}
            | {f"mode of {name}": module.training for name, module in modules.items()}
            | {f"type of {name}": type(module) for name, module in modules.items()}
            | {
                f"{kind} of {name}": list(value.items()) if isinstance(value, dict) and "hooks" in kind else None
                for name, module in modules.items()
                for kind, value in vars(module).items()
            }
            | {f"backward of {name}": p._backward_hooks for name, p in self.model.named_parameters()}
            | {"torch": torch.get_rng_state().numpy().tobytes(), "python": random.getstate()}
            | {"numpy": repr(np.random.get_state()), "grad mode": torch.is_grad_enabled()}  # noqa: NPY002
            | {"dtype": torch.get_default_dtype(), "threads": torch.get_num_threads()}
        )


@pytest.mark.parametrize(("backend", "quantity"), PAIRS)
def test_state_is_unchanged(backend: str, quantity: Quantity) -> None:
    watched = Watched()
    before = watched.snapshot()
    names = ["0.weight", "3.*", "5.*"]
    for structure in structures(backend, quantity):
        matrix = attempt(watched.problem, quantity, structure, backend, names if is_kronecker(structure) else None)
        if matrix is not None and structure == "implicit":
            _ = matrix @ torch.ones(matrix.shape[0], dtype=torch.float64)
        assert watched.snapshot() == before, structure


@pytest.mark.parametrize(("backend", "quantity"), PAIRS)
def test_state_is_unchanged_after_a_failure(backend: str, quantity: Quantity) -> None:
    """The failure happens in the first call of a layer, the fourth and so on, by an error or by Ctrl-C."""
    watched = Watched()
    before = watched.snapshot()
    for i, structure in enumerate(structures(backend, quantity)):
        names = ["0.weight", "3.*", "5.*"] if is_kronecker(structure) else None
        for k in count():
            error = (RuntimeError, KeyboardInterrupt)[(i + k) % 2]
            watched.calls, watched.raises_at, watched.error = 0, 4**k, error("stop")
            with suppress(error, UnsupportedError):
                matrix = estimate(watched.problem, quantity, structure, backend=backend, params=names)
                if structure == "implicit":
                    _ = matrix @ torch.ones(matrix.shape[0], dtype=torch.float64)
            assert watched.snapshot() == before, (structure, watched.raises_at)
            if watched.calls < watched.raises_at:
                break
