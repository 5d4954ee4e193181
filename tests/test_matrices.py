"""The matrices: every structure against dense linear algebra, by one inherited set of tests."""

import json
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy.sparse.linalg import cg, eigsh
from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.matrices import BlockDiagonal, CurvatureMatrix, Dense, Diagonal, Info, load
from curvlab.parameters import ParameterSpace

SPACE = ParameterSpace(("w", "b", "v"), ((3, 2), (3,), (1, 2)))
P = SPACE.total
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

    @abstractmethod
    def make(self, seed: int = 0, *, singular: bool = False) -> tuple[CurvatureMatrix, Tensor]:
        """Return a matrix over ``SPACE`` and its dense form."""

    def test_products_keep_the_vectors_form(self) -> None:
        matrix, dense = self.make()
        v, several = vector(), vector(2, 4)
        assert close(matrix @ v, dense @ v)
        assert close(matrix.matvec(v), dense @ v)
        assert close(matrix @ several, dense @ several)
        named = matrix @ SPACE.unflatten(v)
        assert [tuple(t.shape) for t in named.values()] == list(SPACE.shapes)
        assert close(SPACE.flatten(named), dense @ v)

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
            assert close(SPACE.flatten(matrix.solve(SPACE.unflatten(b), damping)), expected)
        else:
            assert close(matrix.solve(b, damping), expected)

    def test_singular(self) -> None:
        matrix, dense = self.make(singular=True)
        for attempt in (lambda: matrix.solve(vector()), matrix.logdet, lambda: matrix.sample(2)):
            with pytest.raises(CurvlabError, match="raise the damping"):
                attempt()
        damped = dense + 0.1 * torch.eye(P, dtype=dense.dtype)
        assert close(matrix.solve(vector(), damping=0.1), torch.linalg.solve(damped, vector()))
        assert close(matrix.logdet(0.1), torch.logdet(damped))

    def test_solve_of_an_indefinite_matrix(self) -> None:
        matrix, dense = self.make()
        shift = -float(torch.linalg.eigvalsh(dense)[0] + torch.linalg.eigvalsh(dense)[-1]) / 2.01
        damped = dense + shift * torch.eye(P, dtype=dense.dtype)
        assert torch.allclose(matrix.solve(vector(), shift), torch.linalg.solve(damped, vector()), rtol=1e-8)
        with pytest.raises(CurvlabError, match="not positive definite"):
            matrix.logdet(shift)

    def test_quadratic_form_and_its_gradient(self) -> None:
        matrix, dense = self.make()
        delta = vector().requires_grad_()
        value = matrix.quadratic_form(delta)
        assert close(value.detach(), delta.detach() @ dense @ delta.detach())
        assert close(torch.autograd.grad(value, delta)[0], 2 * dense @ delta.detach())
        named = {name: t.detach().clone().requires_grad_() for name, t in SPACE.unflatten(delta).items()}
        gradients = torch.autograd.grad(matrix.quadratic_form(named), list(named.values()))
        assert close(torch.cat([g.flatten() for g in gradients]), 2 * dense @ delta.detach())
        with pytest.raises(CurvlabError, match="one vector"):
            matrix.quadratic_form(vector(columns=2))

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
        assert torch.equal(single.to_dense(), dense.float())
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

    def test_sums_across_spaces_and_structures_are_refused(self) -> None:
        matrix, _ = self.make()
        renamed = replace(SPACE, names=("w", "b", "u"))
        elsewhere = matrix.from_tensors({n.replace("v", "u"): t for n, t in matrix.tensors().items()}, renamed, INFO)
        with pytest.raises(CurvlabError, match="different parameters"):
            matrix + elsewhere
        other = Diagonal(torch.ones(P, dtype=torch.float64), SPACE, INFO)
        if isinstance(matrix, Diagonal):
            other = Dense(torch.eye(P, dtype=torch.float64), SPACE, INFO)
        with pytest.raises(CurvlabError, match=f"{matrix.kind} and a {other.kind}"):
            matrix + other
        with pytest.raises(TypeError):
            matrix + 1.0

    def test_vectors_of_another_space_are_refused(self) -> None:
        matrix, _ = self.make()
        for attempt in (lambda: matrix @ torch.ones(P + 1), lambda: matrix.solve({"w": torch.ones(3, 2)})):
            with pytest.raises(CurvlabError, match="vector"):
                attempt()

    def test_wrong_tensors_are_refused(self) -> None:
        matrix, _ = self.make()
        with pytest.raises(CurvlabError):
            matrix.from_tensors({name: t[:-1] for name, t in matrix.tensors().items()}, SPACE, INFO)

    def test_file_round_trip(self, tmp_path: Path) -> None:
        matrix, dense = self.make()
        file = tmp_path / "matrix.safetensors"
        matrix.save(file)
        again = load(str(file))
        assert type(again) is type(matrix)
        assert (again.space, again.info) == (SPACE, INFO)
        assert torch.equal(again.to_dense(), dense)
        assert [f.name for f in tmp_path.iterdir()] == [file.name]

    def test_truncated_file(self, tmp_path: Path) -> None:
        file = tmp_path / "matrix.safetensors"
        self.make()[0].save(file)
        for length in (0, 20, file.stat().st_size - 8):
            cut = tmp_path / f"{length}.safetensors"
            cut.write_bytes(file.read_bytes()[:length])
            with pytest.raises(CurvlabError, match=f"{length}.safetensors is not a whole"):
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

    @pytest.mark.parametrize("changes", [{"format": 2}, {"kind": "hyperbolic"}])
    def test_newer_file(self, tmp_path: Path, changes: dict[str, object]) -> None:
        self.write(tmp_path / "future.safetensors", **changes)
        with pytest.raises(CurvlabError, match=f"future.safetensors.*newer curvlab.*{next(iter(changes.values()))}"):
            load(tmp_path / "future.safetensors")

    def test_foreign_file(self, tmp_path: Path) -> None:
        save_file({"weight": torch.ones(2)}, tmp_path / "weights.safetensors")
        with pytest.raises(CurvlabError, match=r"weights.safetensors.*not a matrix that curvlab saved"):
            load(tmp_path / "weights.safetensors")
        (tmp_path / "notes.txt").write_text("nothing of the kind, but longer than a header" * 10)
        with pytest.raises(CurvlabError, match=r"notes.txt is not a whole safetensors file"):
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
