"""What a matrix is asked that it cannot answer, and half precision: one sentence, or the right answer."""

import pickle
from collections.abc import Callable
from copy import copy, deepcopy
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import test_matrices as made
import torch
from test_matrices import INFO, SPACE, P, close, vector
from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.matrices import (
    EKFAC,
    KFAC,
    BlockDiagonal,
    Composite,
    CurvatureMatrix,
    Dense,
    Diagonal,
    Implicit,
    Penalty,
)
from curvlab.parameters import ParameterSpace

MAKERS: dict[str, Callable[..., tuple[CurvatureMatrix, Tensor]]] = {
    name.removeprefix("Test"): getattr(made, name)().make
    for name in vars(made)
    if name.startswith("Test") and hasattr(getattr(made, name), "make")
}
STORED = [name for name in MAKERS if name != "Implicit"]
NO_NUMBERS = ["a", None, True, 1j, float("nan"), float("inf"), 10**400, [1.0], np.ones(3), torch.ones(P), Decimal(1)]


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_no_vector(name: str) -> None:
    matrix, _ = MAKERS[name]()
    v = vector()
    named = matrix.space.unflatten(v)
    first = matrix.space.names[0]
    for wrong in (
        *("x", 3, None, [1.0] * P, {first}, {}, v.numpy(), matrix),
        *(v[1:], v[:0], v[0], v.view(P, 1, 1), v.float(), v.to(torch.complex128), v.long(), v > 0),
        *(v.to_sparse(), v.to("meta"), named | {first: "x"}, named | {first: v}, named | {first: named[first].float()}),
        *(named | {"more": v}, {n: t for n, t in named.items() if n != first}),
    ):
        for attempt in (
            lambda wrong=wrong: matrix @ wrong,
            lambda wrong=wrong: matrix.matvec(wrong),
            lambda wrong=wrong: matrix.solve(wrong, 0.1),
            lambda wrong=wrong: matrix.quadratic_form(wrong),
            lambda wrong=wrong: matrix.add_product_(wrong, wrong),
        ):
            if isinstance(wrong, dict) and "more" in wrong and "add_product_" in attempt.__code__.co_names:
                continue  # takes what it needs
            with pytest.raises(CurvlabError) as refused:
                attempt()
            assert "\n" not in str(refused.value)
    for value in (float("nan"), float("inf")):
        bad = v.clone()
        bad[3] = value
        assert not (matrix @ bad).isfinite().all()  # as torch has it
        for b in (bad, bad.unsqueeze(1), matrix.space.unflatten(bad)):
            with pytest.raises(CurvlabError, match="solve holds NaN or infinity"):
                matrix.solve(b, 0.1)
    for left in (v, v.numpy(), [1.0] * P):
        with pytest.raises(CurvlabError, match="matrix @ vector"):
            left @ matrix
    assert (matrix @ v.view(P, 1)[:, :0]).shape == matrix.solve(v.view(P, 1)[:, :0], 1.0).shape == (P, 0)


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_no_number(name: str) -> None:
    matrix, dense = MAKERS[name]()
    outputs = {n: torch.zeros_like(t) for n, t in matrix.space.unflatten(vector()).items()}
    for wrong in (*NO_NUMBERS, matrix):
        for attempt in (
            lambda wrong=wrong: matrix * wrong,
            lambda wrong=wrong: wrong * matrix,
            lambda wrong=wrong: matrix.add_product_(outputs, outputs, wrong),
        ):
            with pytest.raises(CurvlabError, match="finite real number"):
                attempt()
        if wrong is not matrix:
            for add in (lambda wrong=wrong: matrix + wrong, lambda wrong=wrong: wrong + matrix):
                with pytest.raises(CurvlabError, match="added to a matrix"):
                    add()
    with pytest.raises(CurvlabError, match=r"sum\(matrices\[1:\], matrices\[0\]\)"):
        sum([matrix, matrix])
    assert close(sum([matrix], matrix).to_dense(), 2 * dense)
    for number in (2, np.float32(2), np.int64(2), torch.tensor(2.0), torch.tensor(2), Fraction(2), np.array(2.0)):
        for product in (matrix * number, number * matrix):
            assert type(product) is type(matrix)
            assert product.dtype == torch.float64
            assert close(product @ vector(), 2 * dense @ vector())
    factor = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    if name != "Implicit":  # whose products are not differentiable in what made them
        (gradient,) = torch.autograd.grad((matrix * factor).quadratic_form(vector()), factor)
        assert close(gradient, vector() @ dense @ vector())


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_no_count_and_no_seed(name: str) -> None:
    matrix, _ = MAKERS[name]()
    for wrong in (-1, 1.5, True, None, "2", float("nan"), [2], np.float64(2), torch.tensor(2.0), torch.Generator()):
        with pytest.raises(CurvlabError, match="n must be a whole number from 1"):
            matrix.sample(wrong)
        with pytest.raises(CurvlabError, match="seed must be a whole number from 0"):
            matrix.sample(1, seed=wrong)
    with pytest.raises(CurvlabError, match="from 1, not 0"):
        matrix.sample(0)
    with pytest.raises(CurvlabError, match="do not fit into memory"):
        matrix.sample(10**15)
    for two in (np.int32(2), torch.tensor(2)):
        assert torch.equal(matrix.sample(two, seed=two), matrix.sample(2, seed=2))


@pytest.mark.parametrize("name", STORED)
def test_what_is_no_dtype_and_no_device(name: str) -> None:
    matrix, _ = MAKERS[name]()
    for wrong in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, "float32", 3):
        with pytest.raises(CurvlabError, match=r"dtype of a matrix must be one of torch\.float16"):
            matrix.to(dtype=wrong)
    for wrong in ("nonsense", [], "cuda:99", "meta"):
        with pytest.raises(CurvlabError, match="cannot be moved to") as refused:
            matrix.to(device=wrong)
        assert "\n" not in str(refused.value)


def test_solvers_options() -> None:
    matrix, _ = MAKERS["Implicit"]()
    for wrong in (float("nan"), "1e-3", True, [1e-3]):
        with pytest.raises(CurvlabError, match="tol must be a finite real number"):
            matrix.solve(vector(), tol=wrong)
    for wrong in (0, -1, 1.5, "9", True, None):
        with pytest.raises(CurvlabError, match="max_products must be a whole number from 1"):
            matrix.solve(vector(), max_products=wrong)


def test_what_is_no_penalty() -> None:
    matrix, _ = MAKERS["Diagonal"]()
    penalty = Penalty()
    for wrong in ("x", None, torch.ones(P, P)):
        with pytest.raises(CurvlabError, match="a penalty needs a curvature matrix"):
            penalty.add(wrong, vector())
    for wrong in ("x", None, {}, vector(columns=2), vector().float(), vector() * float("nan")):
        with pytest.raises(CurvlabError):
            penalty.add(matrix, wrong)
    penalty.add(matrix, vector())
    parameters = {n: t.clone() for n, t in SPACE.unflatten(vector()).items()}
    for wrong in ("x", None, vector(), parameters | {"w": None}):
        for attempt in (penalty.value, penalty.add_gradient_):
            with pytest.raises(CurvlabError):
                attempt(wrong)
    for wrong in NO_NUMBERS:
        with pytest.raises(CurvlabError, match="strength must be a finite real number"):
            penalty.add_gradient_(parameters, wrong)
    assert all(t.grad is None for t in parameters.values())


def test_weights_of_pairs() -> None:
    matrix, _ = MAKERS["SumOfKFAC"]()
    assert isinstance(matrix, KFAC)
    for wrong in (3, "a", "ab", [1.0], [1, 2, 3], [1, None], [1, float("nan")], [-1, 2], [0, 0], [True, 1]):
        with pytest.raises(CurvlabError, match="weight"):
            matrix.average_factors(wrong)
    for right in ((1, 3), np.array([0.5, 1.5]), torch.tensor([2.0, 6.0])):
        assert close(matrix.average_factors(right).to_dense(), matrix.average_factors([1, 3]).to_dense())


@pytest.mark.parametrize(
    "wrong", ["x", None, [1.0] * P, torch.ones(P, dtype=torch.int64), torch.ones(P).to_sparse(), torch.ones(P) * 1j]
)
def test_what_is_no_entry(wrong: Any) -> None:
    square = torch.ones(1, 1)
    space = ParameterSpace(("fc.weight",), ((1, 1),))
    for attempt in (
        lambda: Diagonal(wrong, SPACE, INFO),
        lambda: Dense(wrong, SPACE, INFO),
        lambda: BlockDiagonal({"w": wrong}, SPACE, INFO),
        lambda: KFAC({"fc": (wrong, square)}, space, INFO),
        lambda: EKFAC({"fc": (square, square, wrong)}, space, INFO),
    ):
        with pytest.raises(CurvlabError, match=r"needs dense tensors in torch\.float16"):
            attempt()


def test_entries_of_two_dtypes() -> None:
    blocks = {"w": torch.eye(6), "b": torch.eye(3), "v": torch.eye(2).double()}
    with pytest.raises(CurvlabError, match="different dtypes"):
        BlockDiagonal(blocks, SPACE, INFO)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", STORED)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """Products are in it; numbers are added up in float32; what is inverted is refused, not called singular."""
    matrix, dense = MAKERS[name]()
    half = matrix.to(dtype=dtype)
    wide = half.to(dtype=torch.float32)
    v = vector().to(dtype)
    assert (half.dtype, (half @ v).dtype, half.quadratic_form(v).dtype) == (dtype, dtype, dtype)
    size = dense.abs().max()
    assert torch.allclose((half @ v).double(), dense @ v.double(), atol=0.05 * float(size))
    for number in ("trace", "frobenius_norm"):
        of_half, expected = getattr(half, number)(), getattr(wide, number)()
        assert of_half.dtype == torch.float32
        assert torch.allclose(of_half, expected, rtol=1e-5)
    for attempt in (
        half.eigenvalues,
        half.logdet,
        half.det,
        half.inverse_diagonal,
        lambda: half.solve(v, 1.0),
        lambda: half.sample(1, 1.0),
    ):
        with pytest.raises(CurvlabError, match=r"not accurate in .*matrix\.to\(dtype=torch\.float32\)"):
            attempt()
    with pytest.raises(CurvlabError, match=r"SciPy .*matrix\.to\(dtype=torch\.float32\)"):
        half.to_scipy()
    if name == "EKFAC":
        with pytest.raises(CurvlabError, match=r"eigenbasis of fc is not orthonormal.*float32"):
            wide.solve(v.float(), 1.0)
    else:
        expected = torch.linalg.solve(wide.to_dense() + torch.eye(P), v.float())
        assert torch.allclose(wide.solve(v.float(), 1.0), expected, rtol=1e-3, atol=1e-4)


def test_half_precision_adds_up_in_float32() -> None:
    space = ParameterSpace(("w",), ((70_000,),))
    matrix = Diagonal(torch.full((70_000,), 300.0, dtype=torch.float16), space, INFO)
    assert matrix.trace() == 300 * 70_000
    assert torch.allclose(matrix.frobenius_norm(), torch.tensor(300 * 70_000**0.5))


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_numbers_beyond_a_dtype(size: float) -> None:
    """Entries that a narrower dtype takes to zero or infinity, all of them, are not moved there."""
    for name in STORED:
        matrix, _ = MAKERS[name]()
        for dtype in (torch.float16, torch.float32):
            factor = size if dtype == torch.float16 else size**2
            with pytest.raises(CurvlabError, match=f"outside the range of {dtype}: rescale the matrix first"):
                (factor * matrix).to(dtype=dtype)
        with pytest.raises(CurvlabError, match=r"factor .* is outside the range of torch\.float32"):
            matrix.to(dtype=torch.float32) * size**2
    assert MAKERS["Dense"]()[0].to(dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("size", [1e-150, 1e-25, 1.0, 1e25, 1e150])
def test_norms_of_small_and_large_entries(size: float) -> None:
    """Whose squares are zero or infinite."""
    for name in STORED:
        matrix, dense = MAKERS[name]()
        expected = size * torch.linalg.matrix_norm(dense)
        assert close((size * matrix).frobenius_norm() / size, expected / size)
        if 1e-30 < size < 1e30:
            norm = (size * matrix).to(dtype=torch.float32).frobenius_norm()
            assert torch.allclose(norm.double(), expected, rtol=1e-5)
        assert (0.0 * matrix).frobenius_norm() == 0


@pytest.mark.parametrize("name", STORED)
def test_entries_that_are_not_finite(name: str) -> None:
    matrix, _ = MAKERS[name]()
    for value in (float("nan"), float("inf")):
        for changed in matrix.tensors():
            tensors = {n: t.contiguous().clone() for n, t in matrix.tensors().items()}
            tensors[changed].view(-1)[-1] = value
            if isinstance(matrix, Composite):
                parts = [
                    p.from_tensors({n: tensors[f"{i}/{n}"] for n in p.tensors()}, p.space, INFO)
                    for i, p in enumerate(matrix.parts)
                ]
                broken: CurvatureMatrix = Composite(parts, matrix.space, INFO)
            else:
                broken = matrix.from_tensors(tensors, matrix.space, INFO)
            for attempt in (
                broken.eigenvalues,
                lambda broken=broken: broken.solve(vector(), 1.0),
                lambda broken=broken: broken.logdet(1.0),
                lambda broken=broken: broken.sample(1, 1.0),
            ):
                with pytest.raises(CurvlabError):
                    attempt()


def test_what_is_not_symmetric_has_no_eigenvectors() -> None:
    rows = torch.ones(P, P, dtype=torch.float64).triu()
    for attempt in (Dense(rows, SPACE, INFO).eigenvalues, lambda: Dense(rows, SPACE, INFO).solve(vector())):
        with pytest.raises(CurvlabError, match="not symmetric"):
            attempt()


def test_a_matrix_goes_through_vmap() -> None:
    several = vector(columns=3).mT
    for name in STORED:
        matrix, _ = MAKERS[name]()
        for function in (lambda v, m=matrix: m.solve(v, 0.3), lambda v, m=matrix: m @ v):
            assert torch.allclose(torch.func.vmap(function)(several), function(several.mT).mT, rtol=1e-10)


def test_an_implicit_matrix_has_a_narrower_choice() -> None:
    matrix, _ = MAKERS["Implicit"]()
    assert isinstance(matrix, Implicit)
    for attempt in (lambda: matrix.to(dtype=torch.bfloat16), lambda: matrix.save("m")):
        with pytest.raises(CurvlabError, match="has no tensors"):
            attempt()


@pytest.mark.parametrize("name", MAKERS)
def test_divided_by_a_number(name: str) -> None:
    matrix, dense = MAKERS[name]()
    for divisor in (2, -0.5, torch.tensor(4.0, dtype=torch.float64), np.float64(3)):
        assert close((matrix / divisor).to_dense(), dense / float(divisor))
    assert close((-matrix).to_dense(), -dense)
    for wrong in (0, 0.0, *NO_NUMBERS, matrix):
        with pytest.raises(CurvlabError) as refused:
            matrix / wrong
        assert "\n" not in str(refused.value)
    for left in (1, vector(), vector().numpy()):
        with pytest.raises(CurvlabError, match="solve"):
            left / matrix
        for attempt in (lambda left=left: left - matrix, lambda left=left: matrix - left):
            with pytest.raises(CurvlabError, match="to a matrix"):
                attempt()


@pytest.mark.parametrize("name", MAKERS)
def test_a_difference_is_that_of_the_entries(name: str) -> None:
    matrix, dense = MAKERS[name]()
    difference = 3 * matrix - matrix
    assert close(difference.to_dense(), 2 * dense)
    assert close(difference @ vector(), 2 * dense @ vector())


@pytest.mark.parametrize("name", MAKERS)
def test_complex_vectors_in_scipy(name: str) -> None:
    """The product is linear: that of the imaginary part is the imaginary part."""
    matrix, dense = MAKERS[name]()
    z = np.stack([vector(seed=1).numpy(), vector(seed=2).numpy()], 1) @ np.array([[1, 2j], [1j, 3]])
    operator = matrix.to_scipy()
    for vectors in (z, z[:, 0]):
        for product in (operator @ vectors, operator.H @ vectors):
            assert np.allclose(product, dense.numpy() @ vectors, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MAKERS)
def test_quadratic_forms_are_never_beyond_the_dtype(name: str) -> None:
    matrix, _ = MAKERS[name]()
    for large in (torch.full((matrix.space.total,), 1e200, dtype=torch.float64), 1e200 * vector()):
        with pytest.raises(CurvlabError, match="delta smaller"):
            matrix.quadratic_form(large)
    bad = vector()
    bad[0] = float("inf")
    assert not matrix.quadratic_form(bad).isfinite()  # as torch has it


def test_copies_of_an_implicit_matrix() -> None:
    matrix, dense = MAKERS["Implicit"]()
    assert close(deepcopy(matrix).to_dense(), dense)
    assert close(copy(matrix).to_dense(), dense)
    with pytest.raises(CurvlabError, match="cannot be pickled"):
        pickle.dumps(matrix)
    module = torch.nn.Identity()  # its product can be
    plain = Implicit(module, matrix.space, INFO, dtype=torch.float64)
    assert close(pickle.loads(pickle.dumps(plain)).to_dense(), torch.eye(P, dtype=torch.float64))
