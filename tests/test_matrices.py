"""The matrices: every structure against dense linear algebra, by one inherited set of tests."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy.sparse.linalg import cg, eigsh
from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.matrices import (
    EKFAC,
    KFAC,
    TKFAC,
    BlockDiagonal,
    Composite,
    CurvatureMatrix,
    Dense,
    Diagonal,
    Implicit,
    Info,
    iterative,
    kronecker,
    load,
)
from curvlab.matrices.kronecker import Factors
from curvlab.parameters import ParameterSpace

SPACE = ParameterSpace(("w", "b", "v"), ((3, 2), (3,), (1, 2)))
P = SPACE.total
#: The same size: a layer with both, in an order of their own, one with a weight alone, and one with a bias alone.
LAYERS = ParameterSpace(("fc.bias", "out.weight", "fc.weight", "head.bias"), ((2,), (1, 2), (2, 1, 3), (1,)))
INFO = Info("fisher:samples=2", "any", "cross_entropy", "torch", 10, samples=2, seed=0, batch_size=5, seconds=1.5)
few = settings(max_examples=15, deadline=None)


def positive(size: int, seed: int = 0, rank: int | None = None) -> Tensor:
    """A symmetric matrix of the given rank, with well separated eigenvalues where it is full."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q
    values = torch.arange(1.0, size + 1, dtype=torch.float64) * (torch.arange(size) >= size - (rank or size))
    return basis @ values.diag() @ basis.mT


def vector(seed: int = 1, columns: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*((P,) if columns is None else (P, columns)), dtype=torch.float64, generator=generator)


def close(actual: Tensor, expected: Tensor) -> bool:
    return actual.shape == expected.shape and torch.allclose(actual, expected, rtol=1e-10, atol=1e-12)


class StructureTests(ABC):
    """What holds for every structure; a new one adds only ``make`` and the dense form of what it makes."""

    space = SPACE
    rename = ("v", "u")

    @abstractmethod
    def make(self, seed: int = 0, *, singular: bool = False) -> tuple[CurvatureMatrix, Tensor]:
        """Return a matrix over ``space`` and its dense form."""

    def test_products_keep_the_vectors_form(self) -> None:
        matrix, dense = self.make()
        v, several = vector(), vector(2, 4)
        assert close(matrix @ v, dense @ v)
        assert close(matrix.matvec(v), dense @ v)
        assert close(matrix @ several, dense @ several)
        named = matrix @ self.space.unflatten(v)
        assert [tuple(t.shape) for t in named.values()] == list(self.space.shapes)
        assert close(self.space.flatten(named), dense @ v)

    def test_numbers(self) -> None:
        matrix, dense = self.make()
        assert matrix.shape == (P, P)
        assert close(matrix.to_dense(), dense)
        assert close(matrix.diagonal(), dense.diagonal())
        assert close(matrix.trace(), dense.trace())
        assert close(matrix.frobenius_norm(), torch.linalg.matrix_norm(dense))
        assert close(matrix.eigenvalues(), torch.linalg.eigvalsh(dense))
        for damping in (0.0, 0.3):
            damped = dense + damping * torch.eye(P, dtype=dense.dtype)
            assert close(matrix.logdet(damping), torch.logdet(damped))

    @pytest.mark.parametrize("form", ["vector", "several", "named"])
    @pytest.mark.parametrize("damping", [0.0, 0.3])
    def test_solve(self, form: str, damping: float) -> None:
        matrix, dense = self.make()
        damped = dense + damping * torch.eye(P, dtype=dense.dtype)
        b = vector(columns=3) if form == "several" else vector()
        expected = torch.linalg.solve(damped, b)
        if form == "named":
            assert close(self.space.flatten(matrix.solve(self.space.unflatten(b), damping)), expected)
        else:
            assert close(matrix.solve(b, damping), expected)

    def test_singular(self) -> None:
        matrix, dense = self.make(singular=True)
        for attempt in (
            lambda: matrix.solve(vector()),
            matrix.inverse_diagonal,
            matrix.det,
            matrix.logdet,
            lambda: matrix.sample(2),
        ):
            with pytest.raises(CurvlabError, match="increase the damping"):
                attempt()
        damped = dense + 0.1 * torch.eye(P, dtype=dense.dtype)
        assert close(matrix.solve(vector(), damping=0.1), torch.linalg.solve(damped, vector()))
        assert close(matrix.logdet(0.1), torch.logdet(damped))

    def test_solve_of_an_indefinite_matrix(self) -> None:
        matrix, dense = self.make()
        shift = -float(torch.linalg.eigvalsh(dense)[0] + torch.linalg.eigvalsh(dense)[-1]) / 2.01
        damped = dense + shift * torch.eye(P, dtype=dense.dtype)
        assert torch.allclose(matrix.solve(vector(), shift), torch.linalg.solve(damped, vector()), rtol=1e-8)
        assert torch.allclose(matrix.inverse_diagonal(shift), torch.linalg.inv(damped).diagonal(), rtol=1e-8)
        assert torch.allclose(matrix.det(shift), torch.linalg.det(damped), rtol=1e-8)  # of either sign
        with pytest.raises(CurvlabError, match="not positive definite"):
            matrix.logdet(shift)

    def test_quadratic_form_and_its_gradient(self) -> None:
        matrix, dense = self.make()
        delta = vector().requires_grad_()
        value = matrix.quadratic_form(delta)
        assert close(value.detach(), delta.detach() @ dense @ delta.detach())
        assert close(torch.autograd.grad(value, delta)[0], 2 * dense @ delta.detach())
        named = {name: t.detach().clone().requires_grad_() for name, t in self.space.unflatten(delta).items()}
        gradients = torch.autograd.grad(matrix.quadratic_form(named), list(named.values()))
        assert close(torch.cat([g.flatten() for g in gradients]), 2 * dense @ delta.detach())
        with pytest.raises(CurvlabError, match="one vector"):
            matrix.quadratic_form(vector(columns=2))

    def test_product_in_place(self) -> None:
        matrix, dense = self.make()
        v, start = vector(), vector(2)
        outputs = {name: t.clone() for name, t in self.space.unflatten(start).items()} | {"other": torch.ones(2)}
        vectors = {name: t.requires_grad_() for name, t in self.space.unflatten(v.clone()).items()}
        matrix.add_product_(outputs, vectors | {"more": torch.ones(3)}, scale=-0.5)
        assert torch.equal(outputs.pop("other"), torch.ones(2))
        assert not any(t.requires_grad for t in outputs.values())
        assert close(self.space.flatten(outputs), start - dense @ v / 2)
        first = self.space.names[0]
        for wrong, message in (
            ({n: t for n, t in vectors.items() if n != first}, f"missing for parameters of the matrix: {first}"),
            (vectors | {first: torch.ones(7, dtype=torch.float64)}, f"{first} is .* of shape .7,."),
            (vectors | {first: vectors[first].float()}, f"{first} is torch.float32"),
        ):
            for arguments in ((outputs, wrong), (wrong, outputs)):
                with pytest.raises(CurvlabError, match=message):
                    matrix.add_product_(*arguments)

    @pytest.mark.parametrize("damping", [0.0, 2.0])
    def test_samples_have_the_inverse_as_covariance(self, damping: float) -> None:
        matrix, dense = self.make()
        n = 20_000
        draws = matrix.sample(n, damping, seed=3)
        assert draws.shape == (P, n)
        covariance = torch.linalg.inv(dense + damping * torch.eye(P, dtype=dense.dtype))
        variance = covariance.diagonal()
        z_mean = draws.mean(dim=1) / (variance / n).sqrt()
        z = (draws @ draws.mT / n - covariance) / ((variance.outer(variance) + covariance.square()) / n).sqrt()
        assert z_mean.abs().max() < 4
        assert z.abs().max() < 4
        assert torch.equal(matrix.sample(5, seed=3), matrix.sample(5, seed=3))
        assert not torch.equal(matrix.sample(5, seed=3), matrix.sample(5, seed=4))

    def test_scipy(self) -> None:
        matrix, dense = self.make()
        operator = matrix.to_scipy()
        v = vector(columns=2).numpy()
        assert operator.dtype == np.float64
        assert np.allclose(operator @ v, dense.numpy() @ v, rtol=1e-12)
        assert np.allclose(operator.T @ v[:, 0], dense.numpy() @ v[:, 0], rtol=1e-12)
        assert np.allclose(operator @ v[::-1, 0], dense.numpy() @ v[::-1, 0], rtol=1e-12)
        top = eigsh(operator, k=2, v0=np.ones(P), return_eigenvectors=False)
        assert np.allclose(np.sort(top), torch.linalg.eigvalsh(dense)[-2:].numpy(), rtol=1e-10)
        solution, status = cg(operator, v[:, 0], rtol=1e-12)
        assert status == 0
        assert np.allclose(solution, np.linalg.solve(dense.numpy(), v[:, 0]), rtol=1e-8)

    def test_to(self) -> None:
        matrix, dense = self.make()
        single = matrix.to(dtype=torch.float32)
        assert (single.dtype, matrix.dtype) == (torch.float32, torch.float64)
        assert single.info == matrix.info
        assert torch.allclose(single.to_dense(), dense.float(), rtol=1e-5, atol=1e-6)
        assert close(matrix.to_dense(), dense)
        assert single.to_scipy().dtype == np.float32
        assert np.allclose(single.to_scipy() @ np.ones(P), dense.sum(dim=1).numpy(), rtol=1e-4)
        with pytest.raises(CurvlabError, match=r"float32.*float64"):
            matrix @ vector().float()

    def test_algebra(self) -> None:
        @few
        @given(st.integers(0, 99), st.integers(0, 99), st.floats(-3, 3), st.floats(0.01, 2))
        def holds(seed: int, other: int, factor: float, damping: float) -> None:
            (a, dense_a), (b, dense_b) = self.make(seed), self.make(other)
            v = vector(seed)
            combined = factor * a + b * 2.0
            assert type(combined) is type(a)
            assert close(combined @ v, factor * (dense_a @ v) + 2 * (dense_b @ v))
            assert close(a.solve(a @ v + damping * v, damping), v)

        holds()

    def test_sum_names_both_quantities(self) -> None:
        matrix, _ = self.make()
        other = self.make()[0]
        other.info = replace(INFO, quantity="ggn")
        assert (matrix + other).info.quantity == "fisher:samples=2 + ggn"
        assert (matrix + matrix).info.quantity == "fisher:samples=2"

    def elsewhere(self, matrix: CurvatureMatrix) -> CurvatureMatrix:
        renamed = replace(self.space, names=tuple(name.replace(*self.rename) for name in self.space.names))
        return matrix.from_tensors({n.replace(*self.rename): t for n, t in matrix.tensors().items()}, renamed, INFO)

    def test_sums_across_spaces_and_structures_are_refused(self) -> None:
        matrix, _ = self.make()
        with pytest.raises(CurvlabError, match="different parameter spaces"):
            matrix + self.elsewhere(matrix)
        other = Diagonal(torch.ones(P, dtype=torch.float64), self.space, INFO)
        if isinstance(matrix, Diagonal):
            other = Dense(torch.eye(P, dtype=torch.float64), self.space, INFO)
        with pytest.raises(CurvlabError, match=f"{matrix.kind} and a {other.kind}"):
            matrix + other
        with pytest.raises(CurvlabError, match=r"added to a matrix only, not to 1\.0"):
            matrix + 1.0

    def test_vectors_of_another_space_are_refused(self) -> None:
        matrix, _ = self.make()
        for attempt in (lambda: matrix @ torch.ones(P + 1), lambda: matrix.solve({"w": torch.ones(3, 2)})):
            with pytest.raises(CurvlabError, match="vector"):
                attempt()

    def test_wrong_tensors_are_refused(self) -> None:
        matrix, _ = self.make()
        with pytest.raises(CurvlabError):
            matrix.from_tensors({name: t[..., :-1] for name, t in matrix.tensors().items()}, self.space, INFO)

    def test_file_round_trip(self, tmp_path: Path) -> None:
        matrix, _ = self.make()
        file = tmp_path / "matrix.safetensors"
        matrix.save(file)
        again = load(str(file))
        assert type(again) is type(matrix)
        assert (again.space, again.info) == (self.space, INFO)
        assert again.tensors().keys() == matrix.tensors().keys()
        assert all(torch.equal(t, matrix.tensors()[name]) for name, t in again.tensors().items())
        single = load(file).to(dtype=torch.float32, device="cpu")
        assert torch.allclose(single.to_dense(), matrix.to_dense().float(), rtol=1e-5, atol=1e-6)
        assert [f.name for f in tmp_path.iterdir()] == [file.name]

    def test_a_file_without_a_tensor_or_with_a_wrong_one(self, tmp_path: Path) -> None:
        file = tmp_path / "matrix.safetensors"
        self.make()[0].save(file)
        whole = load_file(file)
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata()
        for name, tensor in whole.items():
            for broken in (
                whole | {name: tensor[..., :-1].contiguous()},
                {n: t for n, t in whole.items() if n != name},
            ):
                save_file({"other": torch.ones(1)} | broken, file, metadata=header)
                with pytest.raises(CurvlabError, match=r"content of .*matrix.safetensors is not a valid"):
                    load(file)

    def test_truncated_file(self, tmp_path: Path) -> None:
        file = tmp_path / "matrix.safetensors"
        self.make()[0].save(file)
        for length in (0, 20, file.stat().st_size - 8):
            cut = tmp_path / f"{length}.safetensors"
            cut.write_bytes(file.read_bytes()[:length])
            with pytest.raises(CurvlabError, match=f"{length}.safetensors is not a complete"):
                load(cut)


class TestDense(StructureTests):
    def make(self, seed: int = 0, *, singular: bool = False) -> tuple[CurvatureMatrix, Tensor]:
        dense = positive(P, seed, rank=P - 1 if singular else P)
        return Dense(dense, SPACE, INFO), dense


class TestBlockDiagonal(StructureTests):
    def make(self, seed: int = 0, *, singular: bool = False) -> tuple[CurvatureMatrix, Tensor]:
        blocks = {
            n: (i + 1) * positive(size, seed + i) for i, (n, size) in enumerate(zip("wbv", (6, 3, 2), strict=True))
        }
        if singular:
            blocks["b"] = positive(3, seed, rank=1)
        return BlockDiagonal(dict(reversed(blocks.items())), SPACE, INFO), torch.block_diag(*blocks.values())


class TestDiagonal(StructureTests):
    def make(self, seed: int = 0, *, singular: bool = False) -> tuple[CurvatureMatrix, Tensor]:
        entries = torch.arange(1.0, P + 1, dtype=torch.float64).roll(seed)
        if singular:
            entries[2] = 0
        return Diagonal(entries, SPACE, INFO), entries.diag()


def homogeneous(space: ParameterSpace, blocks: dict[str, Tensor]) -> Tensor:
    """The dense matrix of blocks over homogeneous weights ``(o, d)``, entry by entry: the bias is the last column."""
    at: dict[str, list[int]] = {}
    for layer in blocks:
        shapes = {
            k: space.shapes[space.names.index(f"{layer}.{k}")]
            for k in ("weight", "bias")
            if f"{layer}.{k}" in space.names
        }
        outputs = next(iter(shapes.values()))[0]
        positions = []
        for o in range(outputs):
            if "weight" in shapes:
                inputs = prod(shapes["weight"][1:])
                positions += [space.slices[f"{layer}.weight"].start + o * inputs + i for i in range(inputs)]
            if "bias" in shapes:
                positions.append(space.slices[f"{layer}.bias"].start + o)
        at[layer] = positions
    dense = torch.zeros(space.total, space.total, dtype=torch.float64)
    for layer, block in blocks.items():
        for i, row in enumerate(at[layer]):
            for j, column in enumerate(at[layer]):
                dense[row, column] = block[i, j]
    return dense


#: Layer -> ``(o, d)``.
SIZES = {"fc": (2, 4), "out": (1, 2), "head": (1, 1)}


def kron(s: Tensor, a: Tensor) -> Tensor:
    """``S (x) A``, from its definition."""
    o, d = len(s), len(a)
    return torch.stack([s[i // d, j // d] * a[i % d, j % d] for i in range(o * d) for j in range(o * d)]).view(
        o * d, -1
    )


def factors(seed: int = 0, *, singular: bool = False) -> dict[str, Tensor]:
    """Tensors whose blocks have well separated eigenvalues."""
    tensors = {}
    for i, (layer, (o, d)) in enumerate(SIZES.items()):
        tensors[f"{layer}|A"] = (1 + 0.1 * i + 0.01 * seed) * positive(d, seed + i)
        tensors[f"{layer}|S"] = positive(o, seed + 7 + i) + (0.37 + 0.01 * seed) * torch.eye(o, dtype=torch.float64)
    if singular:
        tensors["fc|A"] = positive(4, seed, rank=3)
    return tensors


def dense_of(tensors: dict[str, Tensor]) -> Tensor:
    return homogeneous(LAYERS, {layer: kron(tensors[f"{layer}|S"], tensors[f"{layer}|A"]) for layer in SIZES})


class TestKFAC(StructureTests):
    space = LAYERS
    rename = ("head", "tail")

    def make(self, seed: int = 0, *, singular: bool = False) -> tuple[CurvatureMatrix, Tensor]:
        tensors = factors(seed, singular=singular)
        return KFAC.from_tensors(tensors, LAYERS, INFO), dense_of(tensors)


class TestTKFAC(TestKFAC):
    def make(self, seed: int = 0, *, singular: bool = False) -> tuple[CurvatureMatrix, Tensor]:
        tensors = factors(seed, singular=singular)
        return TKFAC.from_tensors(tensors, LAYERS, INFO), dense_of(tensors)


class TestSumOfKFAC(StructureTests):
    """Two pairs of factors that do not commute."""

    space = LAYERS
    rename = ("head", "tail")

    def make(self, seed: int = 0, *, singular: bool = False) -> tuple[CurvatureMatrix, Tensor]:
        pairs = [factors(seed), factors(seed + 50)]
        if singular:
            for tensors in pairs:
                tensors["fc|A"] = positive(4, seed, rank=3)
        first, second = (KFAC.from_tensors(tensors, LAYERS, INFO) for tensors in pairs)
        return first + second, dense_of(pairs[0]) + dense_of(pairs[1])


class TestEKFAC(StructureTests):
    space = LAYERS
    rename = ("head", "tail")

    def make(self, seed: int = 0, *, singular: bool = False) -> tuple[CurvatureMatrix, Tensor]:
        tensors, blocks = {}, {}
        for layer, (o, d) in SIZES.items():
            u_a, u_s = (torch.linalg.eigh(positive(n, n)).eigenvectors for n in (d, o))
            values = torch.arange(1.0, o * d + 1, dtype=torch.float64).roll(seed).view(o, d) * (1 + 0.1 * d)
            if singular:
                values[0, 0] = 0
            tensors |= {f"{layer}|U_A": u_a, f"{layer}|U_S": u_s, f"{layer}|values": values}
            basis = kron(u_s, u_a)
            blocks[layer] = basis @ values.flatten().diag() @ basis.mT
        return EKFAC.from_tensors(tensors, LAYERS, INFO), homogeneous(LAYERS, blocks)

    def test_different_bases_have_no_sum(self) -> None:
        matrix, _ = self.make()
        for basis in ("fc|U_A", "fc|U_S"):
            turned = {n: t.flip(1) if n == basis else t for n, t in matrix.tensors().items()}
            with pytest.raises(CurvlabError, match=r"different eigenbases for fc.*kfac.*to_dense"):
                matrix + EKFAC.from_tensors(turned, LAYERS, INFO)


class TestComposite(StructureTests):
    """Parts in another order than the space's: K-FAC of one layer, dense for two tensors, a diagonal for the last."""

    space = LAYERS

    def make(self, seed: int = 0, *, singular: bool = False) -> tuple[CurvatureMatrix, Tensor]:
        return self.over(LAYERS, seed, singular=singular)

    def over(self, space: ParameterSpace, seed: int = 0, *, singular: bool = False) -> tuple[Composite, Tensor]:
        spaces = [
            space.restrict(names) for names in (("fc.weight",), {*space.names} - {"fc.weight", "fc.bias"}, ("fc.bias",))
        ]
        whole, entries = positive(3, seed + 1), torch.tensor([1.5, 4.5], dtype=torch.float64).roll(seed)
        if singular:
            whole = positive(3, seed, rank=2)
        a, s = positive(3, seed) + 0.7 * torch.eye(3), positive(2, seed + 2) + 0.3 * torch.eye(2)
        parts = [
            KFAC.from_tensors({"fc|A": a, "fc|S": s}, spaces[0], INFO),
            Dense(whole, spaces[1], INFO),
            Diagonal(entries, spaces[2], INFO),
        ]
        dense = torch.block_diag(kron(s, a), whole, entries.diag())
        order = [i for part in spaces for name in part.names for i in range(P)[space.slices[name]]]
        at = torch.tensor(order).argsort()
        return Composite(parts, space, INFO), dense[at][:, at]

    @pytest.mark.parametrize("how", ["average_factors", "nearest"])
    def test_merges_are_those_of_its_kronecker_parts(self, how: str) -> None:
        total = self.make(0)[0] + self.make(1)[0]
        assert isinstance(total, Composite)
        merged = getattr(total, how)()
        assert torch.equal(merged.parts[0].to_dense(), getattr(total.parts[0], how)().to_dense())
        assert not close(merged.parts[0].to_dense(), total.parts[0].to_dense())
        for part, expected in zip(merged.parts[1:], total.parts[1:], strict=True):
            assert torch.equal(part.to_dense(), expected.to_dense())

    def elsewhere(self, matrix: CurvatureMatrix) -> CurvatureMatrix:
        return self.over(replace(LAYERS, names=tuple(n.replace("head", "tail") for n in LAYERS.names)))[0]

    def test_the_parts_have_to_make_the_space(self) -> None:
        first, second, third = self.make()[0].parts
        for parts in ((first, second), (first, second, third, third), ()):
            with pytest.raises(CurvlabError, match="exactly one part"):
                Composite(parts, LAYERS, INFO)
        with pytest.raises(CurvlabError, match="dtypes or devices"):
            Composite((first, second, third.to(dtype=torch.float32)), LAYERS, INFO)

    def test_parts_over_different_parameters_have_no_sum(self) -> None:
        matrix, dense = self.make()
        with pytest.raises(CurvlabError, match="split into different parts"):
            matrix + Composite([Dense(dense, LAYERS, INFO)], LAYERS, INFO)
        assert close((matrix + Composite(matrix.parts[::-1], LAYERS, INFO)).to_dense(), 2 * dense)

    def test_an_implicit_part(self, tmp_path: Path) -> None:
        matrix, dense = self.make()
        first, second, third = matrix.parts
        calls = []
        implicit = Implicit(lambda v: (calls.append(1), second @ v)[1], second.space, INFO, dtype=torch.float64)
        mixed = Composite((first, implicit, third), LAYERS, INFO)
        delta = vector().requires_grad_()
        (gradient,) = torch.autograd.grad(mixed.quadratic_form(delta), delta)
        assert close(gradient, 2 * dense @ delta.detach())
        assert len(calls) == 1
        assert torch.allclose(mixed.solve(vector(), 0.1), matrix.solve(vector(), 0.1), rtol=1e-10)
        with pytest.raises(CurvlabError, match="has no tensors"):
            mixed.save(tmp_path / "mixed.safetensors")


class TestImplicit(StructureTests):
    def make(self, seed: int = 0, *, singular: bool = False) -> tuple[Implicit, Tensor]:
        dense = positive(P, seed, rank=P - 1 if singular else P)
        return self.of(dense), dense

    def of(self, dense: Tensor) -> Implicit:
        return Implicit(lambda v: dense.to(v) @ v, SPACE, INFO, dtype=torch.float64)

    def elsewhere(self, matrix: CurvatureMatrix) -> CurvatureMatrix:
        return Implicit(lambda v: v, replace(SPACE, names=("w", "b", "u")), INFO, dtype=torch.float64)

    def test_to(self) -> None:
        with pytest.raises(CurvlabError, match="has no tensors"):
            self.make()[0].to(dtype=torch.float32)

    def test_file_round_trip(self, tmp_path: Path) -> None:
        with pytest.raises(CurvlabError, match="has no tensors"):
            self.make()[0].save(tmp_path / "matrix.safetensors")
        assert not list(tmp_path.iterdir())

    test_truncated_file = test_a_file_without_a_tensor_or_with_a_wrong_one = None

    def test_wrong_tensors_are_refused(self) -> None:
        with pytest.raises(CurvlabError, match="cannot be created from tensors"):
            Implicit.from_tensors({}, SPACE, INFO)

    def test_a_quadratic_form_takes_one_product_and_has_every_derivative(self) -> None:
        dense = positive(P)
        calls = []

        def product(vectors: Tensor) -> Tensor:
            assert torch.is_grad_enabled()  # Hessian-vector products need it
            calls.append(vectors.shape)
            return (dense @ vectors).detach()

        matrix = Implicit(product, SPACE, INFO, dtype=torch.float64)
        delta = vector().requires_grad_()
        with torch.no_grad():
            assert close(matrix @ delta, dense @ delta)
        (gradient,) = torch.autograd.grad(matrix.quadratic_form(delta), delta)
        assert len(calls) == 2
        assert close(gradient, 2 * dense @ delta.detach())
        assert close(torch.autograd.functional.hessian(matrix.quadratic_form, vector()), 2 * dense)
        (of_product,) = torch.autograd.grad((matrix @ delta) @ vector(3), delta)
        assert close(of_product, dense @ vector(3))

    def test_conjugate_gradients_stop_at_the_tolerance(self) -> None:
        values = torch.linspace(1, 100, 400, dtype=torch.float64)
        space = ParameterSpace(("w",), ((400,),))
        counts = []
        for tol in (1e-2, 1e-6, 1e-10):
            calls = []
            matrix = Implicit(
                lambda v, calls=calls: (calls.append(1), values[:, None] * v)[1], space, INFO, dtype=torch.float64
            )
            x = matrix.solve(torch.ones(400, 2, dtype=torch.float64), 0.5, tol=tol)
            residual = ((values + 0.5)[:, None] * x - 1).norm(dim=0) / 20
            assert residual.max() <= tol
            counts.append(len(calls))
        assert counts[0] < counts[1] < counts[2] < 140

    def test_what_is_not_reached_is_refused(self) -> None:
        space = ParameterSpace(("w",), ((300,),))
        values = torch.logspace(-8, 0, 300, dtype=torch.float64)
        matrix = Implicit(lambda v: values[:, None] * v, space, INFO, dtype=torch.float64)
        b = torch.ones(300, dtype=torch.float64)
        with pytest.raises(CurvlabError, match=r"after 50 products .* increase the damping, or tol or max_products"):
            matrix.solve(b, max_products=49)
        assert torch.allclose(matrix.solve(b, 0.01), b / (values + 0.01), rtol=1e-8)
        with pytest.raises(CurvlabError, match="right-hand side of solve holds NaN"):
            matrix.solve(b * float("nan"))
        assert torch.equal(matrix.solve(0 * b), 0 * b)

    def test_float32_reaches_its_tolerance(self) -> None:
        """Where updated residuals alone would claim more than they have."""
        values = torch.logspace(-4, 0, 500)
        matrix = Implicit(lambda v: values[:, None] * v, ParameterSpace(("w",), ((500,),)), INFO, dtype=torch.float32)
        b = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
        x = matrix.solve(b, 1e-4)
        exact = values.double()[:, None] * x.double() + 1e-4 * x.double() - b.double()
        assert (exact.norm(dim=0) / b.norm(dim=0)).max() < 2 * torch.finfo(torch.float32).eps ** 0.75

    def test_conjugate_gradients_are_left_where_they_break_down(self) -> None:
        exchange = torch.eye(P, dtype=torch.float64).flip(0)
        b = torch.eye(P, dtype=torch.float64)[:, 0]
        assert close(self.of(exchange).solve(b), b.flip(0))

    def test_a_solved_column_does_not_stop_the_others(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(iterative, "_minres")
        matrix, dense = self.make()
        b = torch.stack([vector(), torch.zeros(P), dense[:, 0], dense @ dense[:, 1]], dim=1)
        assert torch.allclose(matrix.solve(b), torch.linalg.solve(dense, b), rtol=1e-9, atol=1e-10)

    def test_indefinite_systems_of_many_columns(self) -> None:
        space = ParameterSpace(("w",), ((60,),))
        values = torch.cat([-torch.linspace(1, 5, 20), torch.linspace(1, 30, 40)]).double()
        matrix = Implicit(lambda v: values[:, None] * v, space, INFO, dtype=torch.float64)
        b = torch.randn(60, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(matrix.solve(b), b / values[:, None], rtol=1e-9)

    def test_a_large_one_is_not_formed(self) -> None:
        space = ParameterSpace(("w",), ((5001,),))
        matrix = Implicit(lambda v: 2 * v, space, INFO, dtype=torch.float64)
        assert matrix.solve(torch.ones(5001, dtype=torch.float64))[0] == 0.5
        for attempt in (
            matrix.diagonal,
            matrix.inverse_diagonal,
            matrix.det,
            matrix.trace,
            matrix.eigenvalues,
            matrix.to_dense,
            matrix.frobenius_norm,
        ):
            with pytest.raises(CurvlabError, match=r"up to 5,000 parameters, not 5,001.*diag"):
                attempt()

    def test_a_product_that_is_none_is_refused(self) -> None:
        rotation = torch.eye(P, dtype=torch.float64).roll(1, 0)
        with pytest.raises(CurvlabError, match="the matrix is not symmetric"):
            self.of(rotation).trace()
        with pytest.raises(CurvlabError, match="not finite"):
            self.of(rotation * float("nan")).trace()
        short = Implicit(lambda v: v[:-1], SPACE, INFO, dtype=torch.float64)
        with pytest.raises(CurvlabError, match=r"of shape .11, 1. .* not .* .10, 1."):
            short @ vector()


class TestPairs:
    """The merges of a sum of Kronecker products."""

    def sum_of(self, kind: type[KFAC] = KFAC, seeds: tuple[int, ...] = (0, 50, 100)) -> KFAC:
        first, *others = (kind.from_tensors(factors(seed), LAYERS, INFO) for seed in seeds)
        for other in others:
            first = first + other
        return first

    def test_a_sum_keeps_the_pairs(self) -> None:
        matrix = 2.0 * self.sum_of()
        assert {f.A.shape[0] for f in matrix.factors.values()} == {3}
        assert close(matrix.to_dense(), 2 * sum(dense_of(factors(seed)) for seed in (0, 50, 100)))

    def test_average_of_the_factors(self) -> None:
        merged = self.sum_of().average_factors()
        tensors = [factors(seed) for seed in (0, 50, 100)]
        a, s = (sum(t[f"fc|{key}"] for t in tensors) / 3 for key in "AS")
        assert [len(t) for t in merged.factors["fc"]] == [1, 1]
        assert close(kron(merged.factors["fc"].S[0], merged.factors["fc"].A[0]), 3 * kron(s, a))

    @pytest.mark.parametrize("merge", [KFAC.average_factors, KFAC.nearest])
    @pytest.mark.parametrize("shared", ["A", "S"])
    def test_merges_are_exact_where_a_factor_is_shared(self, merge: Callable[[KFAC], KFAC], shared: str) -> None:
        first, second = factors(0), factors(50)
        second |= {name: 1.0 * first[name] for name in first if name.endswith(shared)}
        both = KFAC.from_tensors(first, LAYERS, INFO) + KFAC.from_tensors(second, LAYERS, INFO)
        assert close(merge(both).to_dense(), both.to_dense())

    @pytest.mark.parametrize("merge", [KFAC.average_factors, KFAC.nearest])
    def test_one_pair_stays(self, merge: Callable[[KFAC], KFAC]) -> None:
        matrix = self.sum_of(seeds=(0,))
        assert torch.equal(merge(matrix).to_dense(), matrix.to_dense())

    @pytest.mark.parametrize("count", [2, 3, 5, 12])
    def test_the_nearest_is_that_of_the_rearranged_matrix(self, count: int) -> None:
        generator = torch.Generator().manual_seed(count)
        rows = torch.randn(2, count, 4, 3, dtype=torch.float64, generator=generator)
        a, s = (r.mT @ r * torch.arange(1.0, count + 1).view(-1, 1, 1) for r in rows)
        space = ParameterSpace(("fc.weight",), ((3, 3),))
        matrix = KFAC({"fc": Factors(a, s)}, space, INFO)
        rearranged = sum(si.flatten().outer(ai.flatten()) for ai, si in zip(a, s, strict=True))
        left, sizes, right = torch.linalg.svd(rearranged)
        best = sizes[0] * kron(left[:, 0].view(3, 3), right[0].view(3, 3))
        nearest = matrix.nearest()
        assert close(nearest.to_dense(), best)
        distance = torch.linalg.matrix_norm(matrix.to_dense() - nearest.to_dense())
        assert close(distance, sizes[1:].square().sum().sqrt())
        assert all(torch.linalg.eigvalsh(t).min() >= 0 for pair in nearest.factors.values() for t in pair)

    def test_equally_near_products_give_a_positive_one(self) -> None:
        """Pairs that are orthogonal and equally long: every mixture of them is a leading singular pair."""
        for turn in range(6):
            corners = [torch.zeros(3, 3, dtype=torch.float64) for _ in range(3)]
            for i, corner in enumerate(corners):
                corner[i, i] = 1
            a = torch.stack(corners).roll(turn, 0) if turn < 3 else torch.stack(corners[::-1]).roll(turn, 0)
            matrix = KFAC({"fc": Factors(a, torch.stack(corners))}, ParameterSpace(("fc.weight",), ((3, 3),)), INFO)
            nearest = matrix.nearest()
            assert nearest.eigenvalues().min() > -1e-12
            assert close(
                torch.linalg.matrix_norm(matrix.to_dense() - nearest.to_dense()) ** 2, torch.tensor(2.0).double()
            )

    def test_pairs_that_cancel(self) -> None:
        matrix = self.sum_of(seeds=(0,))
        nothing = matrix + (-1.0) * matrix
        assert nothing.frobenius_norm() <= 1e-6 * matrix.frobenius_norm()
        assert nothing.nearest().to_dense().abs().max() < 1e-10
        assert nothing.average_factors().to_dense().abs().max() < 1e-10
        assert (0.0 * (matrix + matrix)).nearest().to_dense().abs().max() == 0

    def test_small_float32_factors(self) -> None:
        """Whose squares are zero."""
        matrix = (1e-25 * self.sum_of()).to(dtype=torch.float32)
        expected = self.sum_of()
        assert torch.allclose(matrix.frobenius_norm() * 1e25, expected.frobenius_norm().float(), rtol=1e-5)
        assert torch.allclose(matrix.nearest().to_dense() * 1e25, expected.nearest().to_dense().float(), rtol=1e-4)

    @pytest.mark.parametrize("merge", [KFAC.average_factors, KFAC.nearest])
    def test_trace_restricted_merges_keep_every_trace(self, merge: Callable[[KFAC], KFAC]) -> None:
        matrix = self.sum_of(TKFAC)
        merged = merge(matrix)
        assert type(merged) is TKFAC
        for name in SIZES:
            before, after = (sum(a.trace() * s.trace() for a, s in m.factors[name].pairs()) for m in (matrix, merged))
            assert close(after, before)
        assert not close(merge(self.sum_of()).trace(), matrix.trace())
        assert merge(0.0 * matrix).trace() == 0

    def test_kfac_and_tkfac_have_no_sum(self) -> None:
        for a, b in ((KFAC, TKFAC), (TKFAC, KFAC)):
            with pytest.raises(CurvlabError, match="has neither structure"):
                self.sum_of(a) + self.sum_of(b)

    def test_eigenvectors_of_many_pairs_have_a_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kronecker, "_LARGEST_DENSE_BLOCK", 7)
        matrix = self.sum_of()
        for attempt in (
            lambda: matrix.solve(vector()),
            matrix.inverse_diagonal,
            matrix.logdet,
            matrix.eigenvalues,
            lambda: matrix.sample(1),
        ):
            with pytest.raises(
                CurvlabError, match=r"fc has 3 pairs .* 8 parameters.*average_factors\(\) or nearest\(\)"
            ):
                attempt()
        matrix.nearest().solve(vector())

    def test_parameters_without_factors_are_refused(self) -> None:
        one = torch.ones(1, 1, dtype=torch.float64)
        for name, shape in (("norm.weight", (4,)), ("scale", (1, 1)), ("fc.bias", (2, 2))):
            with pytest.raises(CurvlabError, match=f"{name} of shape .*Composite"):
                KFAC.from_tensors({"a|A": one, "a|S": one}, ParameterSpace((name,), (shape,)), INFO)
        with pytest.raises(CurvlabError, match=r"fc must have the same number of outputs"):
            KFAC.from_tensors({}, ParameterSpace(("fc.weight", "fc.bias"), ((2, 3), (4,))), INFO)

    def test_the_model_itself_is_a_layer(self) -> None:
        space = ParameterSpace.of(torch.nn.Linear(2, 3))
        a, s = positive(3), positive(3, 1)
        matrix = KFAC.from_tensors({"|A": a, "|S": s}, space, INFO)
        parameters = {"x.weight": (3, 2), "x.bias": (3,)}
        expected = homogeneous(ParameterSpace(tuple(parameters), tuple(parameters.values())), {"x": kron(s, a)})
        assert close(matrix.to_dense(), expected)

    def test_gradients_of_another_memory_format(self) -> None:
        """Of a convolution in ``channels_last``: they cannot be seen as a matrix without a copy."""
        space = ParameterSpace(("conv.weight", "conv.bias"), ((3, 2, 2, 2), (3,)))
        matrix = KFAC.from_tensors({"conv|A": positive(9), "conv|S": positive(3)}, space, INFO)
        v = torch.arange(27.0, dtype=torch.float64)
        outputs = {name: torch.zeros_like(t) for name, t in space.unflatten(v).items()}
        outputs["conv.weight"] = outputs["conv.weight"].to(memory_format=torch.channels_last)
        assert not outputs["conv.weight"].is_contiguous()
        matrix.add_product_(outputs, space.unflatten(v))
        assert close(space.flatten(outputs), matrix @ v)


def test_a_blocks_rounding_does_not_reach_another() -> None:
    """Blocks of very different size are each solved to full precision; only within one is a small value rounding."""
    sizes = torch.tensor([1e20, 1.0, 1e-25], dtype=torch.float64)
    blocks = {n: size * positive(k) for n, k, size in zip("wbv", (6, 3, 2), sizes, strict=True)}
    matrix = BlockDiagonal(blocks, SPACE, INFO)
    expected = torch.cat(
        [torch.linalg.solve(b, v) for b, v in zip(blocks.values(), vector().split([6, 3, 2]), strict=True)]
    )
    assert torch.allclose(matrix.solve(vector()), expected, rtol=1e-9)
    assert close(matrix.logdet(), torch.stack([b.logdet() for b in blocks.values()]).sum())
    entries = torch.logspace(-30, 30, P, dtype=torch.float64)
    assert close(Diagonal(entries, SPACE, INFO).solve(vector()), vector() / entries)
    entries[0] = 1e-310  # its inverse is infinite
    with pytest.raises(CurvlabError, match="increase the damping"):
        Diagonal(entries, SPACE, INFO).solve(vector())


def test_a_determinant_outside_of_the_dtype() -> None:
    space = ParameterSpace(("w",), ((400,),))
    for dtype in (torch.float32, torch.float64):
        ones = torch.ones(400, dtype=dtype)
        flipped = ones.clone()
        flipped[0] = -1
        assert Diagonal(10 * ones, space, INFO).det() == torch.inf
        assert Diagonal(10 * flipped, space, INFO).det() == -torch.inf
        assert Diagonal(0.1 * ones, space, INFO).det() == 0
        balanced = torch.cat([10 * ones[:200], 0.1 * ones[200:]])  # whose partial products are outside, too
        assert torch.allclose(Diagonal(balanced, space, INFO).det(), ones[0], rtol=1e-5)


def test_singularity_is_found_whatever_the_rounding() -> None:
    """The eigenvalue that is zero comes out as up to a few rounding errors, of either sign."""
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(P - 1, P, dtype=torch.float64, generator=generator)
        with pytest.raises(CurvlabError, match="singular"):
            Dense(rows.mT @ rows, SPACE, INFO).solve(vector())


class TestFiles:
    def write(self, file: Path, **changes: object) -> None:
        description = {"format": 1, "kind": "diag", "names": ["w"], "shapes": [[2]], "info": INFO.__dict__} | changes
        save_file({"entries": torch.ones(2)}, file, metadata={"curvlab": json.dumps(description)})

    def test_the_handwritten_file_is_read(self, tmp_path: Path) -> None:
        self.write(tmp_path / "m.safetensors")
        assert load(tmp_path / "m.safetensors").trace() == 2

    @pytest.mark.parametrize("changes", [{"format": 3}, {"kind": "hyperbolic"}])
    def test_newer_file(self, tmp_path: Path, changes: dict[str, object]) -> None:
        self.write(tmp_path / "future.safetensors", **changes)
        with pytest.raises(CurvlabError, match=f"future.safetensors.*newer curvlab.*{next(iter(changes.values()))}"):
            load(tmp_path / "future.safetensors")

    def test_a_part_of_a_newer_kind(self, tmp_path: Path) -> None:
        space = ParameterSpace(("w",), ((2,),))
        Composite([Diagonal(torch.ones(2), space, INFO)], space, INFO).save(tmp_path / "m.safetensors")
        assert load(tmp_path / "m.safetensors").trace() == 2
        part = {"kind": "hyperbolic", "names": ["w"], "shapes": [[2]], "info": INFO.__dict__}
        self.write(tmp_path / "future.safetensors", kind="composite", parts=[part])
        with pytest.raises(CurvlabError, match=r"future.safetensors.*newer curvlab"):
            load(tmp_path / "future.safetensors")

    @pytest.mark.parametrize(
        "changes", [{"names": ["w", "b"]}, {"shapes": [[3]]}, {"info": {"other": 1}}, {"info": None}, {"names": None}]
    )
    def test_a_header_that_does_not_fit(self, tmp_path: Path, changes: dict[str, object]) -> None:
        self.write(tmp_path / "odd.safetensors", **changes)
        with pytest.raises(CurvlabError, match=r"content of .*odd.safetensors is not a valid matrix"):
            load(tmp_path / "odd.safetensors")

    def test_foreign_file(self, tmp_path: Path) -> None:
        save_file({"weight": torch.ones(2)}, tmp_path / "weights.safetensors")
        with pytest.raises(CurvlabError, match=r"weights.safetensors.*not a matrix saved by curvlab"):
            load(tmp_path / "weights.safetensors")
        (tmp_path / "notes.txt").write_text("nothing of the kind, but longer than a header" * 10)
        with pytest.raises(CurvlabError, match=r"notes.txt is not a complete safetensors file"):
            load(tmp_path / "notes.txt")

    def test_a_file_is_replaced_never_written_into(self, tmp_path: Path) -> None:
        """So that it is whole at every moment: another name of the old file still has the old content."""
        file, link = tmp_path / "m.safetensors", tmp_path / "link.safetensors"
        Diagonal(torch.ones(P), SPACE, INFO).save(file)
        link.hardlink_to(file)
        Diagonal(torch.zeros(P), SPACE, INFO).save(file)
        assert (load(file).trace(), load(link).trace()) == (0, P)

    def test_missing_file_and_folder(self, tmp_path: Path) -> None:
        with pytest.raises(CurvlabError, match=r"there is no file .*absent.safetensors"):
            load(tmp_path / "absent.safetensors")
        matrix = Diagonal(torch.ones(P), SPACE, INFO)
        with pytest.raises(CurvlabError, match=r"cannot write .*nowhere"):
            matrix.save(tmp_path / "nowhere" / "m.safetensors")

    def test_a_failed_save_leaves_the_old_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = tmp_path / "m.safetensors"
        Diagonal(torch.ones(P), SPACE, INFO).save(file)

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(CurvlabError, match=r"m.safetensors: No space left on device"):
            Diagonal(torch.zeros(P), SPACE, INFO).save(file)
        assert torch.equal(load_file(file)["entries"], torch.ones(P))
        assert [f.name for f in tmp_path.iterdir()] == [file.name]
