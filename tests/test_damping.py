"""What is added to the diagonal: every form of it in every structure, against dense linear algebra."""

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import test_matrices as made
import torch
from test_matrices import INFO, LAYERS, SIZES, P, close, homogeneous, kron, vector
from torch import Tensor

from curvlab.errors import CurvlabError, UnsupportedError
from curvlab.matrices import (
    EKFAC,
    KFAC,
    TKFAC,
    BlockDiagonal,
    Composite,
    CurvatureMatrix,
    Dense,
    Diagonal,
    FactoredDamping,
    Implicit,
)
from curvlab.matrices.damping import Damping
from curvlab.parameters import ParameterSpace

#: Structure -> what makes one, with its dense form.
MAKERS: dict[str, Callable[[], tuple[CurvatureMatrix, Tensor]]] = {
    name.removeprefix("Test"): getattr(made, name)().make
    for name in vars(made)
    if name.startswith("Test") and hasattr(getattr(made, name), "make")
}
#: Those whose blocks keep their eigenvectors only under one number a layer.
LAYERED = ("KFAC", "TKFAC", "SumOfKFAC", "EKFAC")
ANY = [name for name in MAKERS if name not in (*LAYERED, "Composite")]


def positive_entries(space: ParameterSpace) -> Tensor:
    return torch.linspace(0.3, 2.0, space.total, dtype=torch.float64)


def one_a_layer(space: ParameterSpace) -> dict[str, float]:
    return {name: 0.5 + len(name.partition(".")[0]) for name in space.names}


def real(number: Any) -> Tensor:
    return number.double() if isinstance(number, Tensor) else torch.as_tensor(number, dtype=torch.float64)


def dense_of(damping: Any, space: ParameterSpace) -> Tensor:
    """The matrix that a damping stands for, by its definition."""
    if isinstance(damping, dict):
        entries = [real(damping[n]).expand(s) for n, s in zip(space.names, space.shapes, strict=True)]
        return torch.cat([e.reshape(-1) for e in entries]).diag()
    return real(damping).expand(space.total).diag()


def is_right(matrix: CurvatureMatrix, dense: Tensor, damping: Any) -> None:
    damped = dense + dense_of(damping, matrix.space)
    assert close(matrix.solve(vector(), damping), torch.linalg.solve(damped, vector()))
    several = vector(2, 3)
    assert close(matrix.solve(several, damping), torch.linalg.solve(damped, several))
    assert close(matrix.logdet(damping), torch.logdet(damped))
    assert close(matrix.det(damping), torch.linalg.det(damped))
    assert close(matrix.inverse_diagonal(damping), torch.linalg.inv(damped).diagonal())
    # The draws are a root of the inverse times known noise.
    noise = torch.from_numpy(np.random.default_rng(4).standard_normal((P, P)))
    root = torch.linalg.solve(noise, matrix.sample(P, damping, seed=4), left=False)
    assert torch.allclose(root @ root.mT, torch.linalg.inv(damped), rtol=1e-7, atol=1e-9)


def forms(space: ParameterSpace) -> dict[str, Any]:
    entries = positive_entries(space)
    named = space.unflatten(entries)
    return {
        "vector": entries,
        "float32 vector": entries.float().clone(),
        "NumPy vector": entries.flip(0).numpy(),
        "whole numbers": torch.arange(1, P + 1),
        "a number a name": {name: i + 0.5 for i, name in enumerate(space.names)},
        "a tensor a name": named,
        "either": {name: t if i % 2 else np.float32(0.25) for i, (name, t) in enumerate(named.items())},
    }


@pytest.mark.parametrize("form", list(forms(LAYERS)))
@pytest.mark.parametrize("name", ANY)
def test_any_damping(name: str, form: str) -> None:
    matrix, dense = MAKERS[name]()
    is_right(matrix, dense, forms(matrix.space)[form])
    assert close(matrix.logdet(0.3), torch.logdet(dense + 0.3 * torch.eye(P, dtype=dense.dtype)))  # and not the last


@pytest.mark.parametrize("name", MAKERS)
def test_numbers_and_one_number_a_layer(name: str) -> None:
    matrix, dense = MAKERS[name]()
    space = matrix.space
    layers = one_a_layer(space)
    vector_of_it = dense_of(layers, space).diagonal()
    for damping in (2, np.float32(0.5), torch.tensor(0.7), np.array(3), layers, vector_of_it):
        is_right(matrix, dense, damping)
    assert torch.equal(matrix.logdet(Fraction(1, 4)), matrix.logdet(0.25))
    same = space.unflatten(torch.full((P,), 0.3, dtype=torch.float64))
    for damping in (same, torch.full((P,), 0.3), dict.fromkeys(space.names, 0.3)):
        assert torch.allclose(matrix.solve(vector(), damping), matrix.solve(vector(), 0.3), rtol=1e-6)


@pytest.mark.parametrize("name", MAKERS)
def test_patterns_of_names(name: str) -> None:
    """One precision per layer, by globs and regular expressions; a name counts before a pattern."""
    matrix, dense = MAKERS[name]()
    first, *others = matrix.space.names
    if matrix.space is LAYERS:
        of_name = {"fc.bias": 0.5, "fc.weight": 0.5, "out.weight": 0.25, "head.bias": 2.0}
        by_pattern: list[dict[Any, Any]] = [
            {"fc.*": 0.5, re.compile("out.*"): torch.tensor(0.25), "head.bias": 2.0},
            {"fc.bias": 0.5, "*weight": 0.5, "out.weight": 0.25, "head.*": np.float64(2.0)},
            {re.compile(r"(fc|none)\..*"): 0.5, "[o]*": 0.25, "?ead.bias": 2},
        ]
    else:
        of_name = {first: 0.5} | dict.fromkeys(others, 2.0)
        by_pattern = [{first: 0.5, "*": 2.0}, {re.compile(f"(?!{first}).*"): 2.0, f"[{first}]": 0.5}]
    for damping in by_pattern:
        assert close(matrix.solve(vector(), damping), matrix.solve(vector(), of_name))
        assert close(matrix.logdet(damping), torch.logdet(dense + dense_of(of_name, matrix.space)))
        assert close(matrix.inverse_diagonal(damping), matrix.inverse_diagonal(of_name))
        assert torch.equal(matrix.sample(2, damping), matrix.sample(2, of_name))


def test_a_tensor_by_pattern_has_the_shape_of_each_parameter() -> None:
    space = ParameterSpace(("a.w", "b.w", "b.v"), ((2,), (2,), (3,)))
    matrix, entries = Diagonal(torch.arange(1.0, 8).double(), space, INFO), torch.tensor([0.5, 1.5]).double()
    found = matrix.inverse_diagonal({"*.w": entries, "b.v": 3.0})
    assert close(found, 1 / (matrix.entries + torch.cat([entries, entries, torch.full((3,), 3.0).double()])))
    with pytest.raises(CurvlabError, match=r"damping of b\.v must be a number or a tensor of shape \(3,\), not \(2,\)"):
        matrix.logdet({"a.*": 1.0, "b.*": entries})


def test_a_name_that_is_also_a_pattern_is_a_name() -> None:
    space = ParameterSpace(("w[0]", "w0"), ((1,), (1,)))
    matrix = Diagonal(torch.zeros(2).double(), space, INFO)
    assert close(matrix.det({"w[0]": 2.0, "w0": 5.0}), torch.tensor(10.0).double())
    with pytest.raises(CurvlabError, match=r"missing \['w0'\]"):
        matrix.det({"w[0]": 2.0})


@pytest.mark.parametrize(
    ("damping", "told"),
    [
        ({"fc*": 1.0, "out*": 1.0}, r"missing \['head.bias'\], unknown \[\]"),
        ({"*": 1.0, "conv*": 2.0}, r"missing \[\], unknown \['conv\*'\]"),
        ({"*": 1.0, re.compile("fc"): 2.0}, r"unknown \[re.compile\('fc'\)\]"),
        ({"*": 1.0, re.compile(b"fc.*"): 2.0, 3: 1.0}, r"unknown \[re.compile\(b'fc.*3\]"),
        ({"fc*": 1.0, "*": 2.0, "fc.bias": 1.0}, r"fc\.weight is given by several patterns, fc\*, \*: .*by its name"),
        ({re.compile("f.*"): 1.0, "*": 2.0}, r"several patterns, re.compile\('f\.\*'\), \*"),
        ({"*": None}, r"damping of \* must be a finite real number, not None"),
    ],
)
@pytest.mark.parametrize("name", ["EKFAC", "Composite"])
def test_patterns_that_give_no_or_two_numbers(name: str, damping: Any, told: str) -> None:
    with pytest.raises(CurvlabError, match=told):
        MAKERS[name]()[0].logdet(damping)


def damp_factors(tensors: dict[str, Tensor], damping: dict[str, float]) -> Tensor:
    """The dense matrix of damped factors, by the definition of Martens and Grosse."""
    blocks = {}
    for layer in SIZES:
        a, s, number = tensors[f"{layer}|A"], tensors[f"{layer}|S"], damping[layer]
        pi = ((a.trace() / len(a)) / (s.trace() / len(s))) ** 0.5
        eye = [torch.eye(len(factor), dtype=torch.float64) for factor in (s, a)]
        blocks[layer] = kron(s + number**0.5 / pi * eye[0], a + pi * number**0.5 * eye[1])
    return homogeneous(LAYERS, blocks)


class TestFactored:
    """The factored Tikhonov regularization of K-FAC."""

    def check(self, matrix: CurvatureMatrix, damped: Tensor, damping: Any) -> None:
        several = vector(2, 3)
        assert close(matrix.solve(several, damping), torch.linalg.solve(damped, several))
        assert close(matrix.logdet(damping), torch.logdet(damped))
        assert close(matrix.det(damping), torch.linalg.det(damped))
        assert close(matrix.inverse_diagonal(damping), torch.linalg.inv(damped).diagonal())
        noise = torch.from_numpy(np.random.default_rng(4).standard_normal((P, P)))
        root = torch.linalg.solve(noise, matrix.sample(P, damping, seed=4), left=False)
        assert torch.allclose(root @ root.mT, torch.linalg.inv(damped), rtol=1e-7, atol=1e-9)

    @pytest.mark.parametrize("kind", [KFAC, TKFAC])
    @pytest.mark.parametrize("singular", [False, True])
    def test_against_damped_factors(self, kind: type[KFAC], singular: bool) -> None:
        tensors = made.factors(singular=singular)
        matrix = kind.from_tensors(tensors, LAYERS, INFO)
        self.check(matrix, damp_factors(tensors, dict.fromkeys(SIZES, 0.3)), FactoredDamping(0.3))
        of_layer = {"fc": 0.5, "out": 2.0, "head": 0.1}
        by_pattern = {f"{layer}.*": number for layer, number in of_layer.items()}
        self.check(matrix, damp_factors(tensors, of_layer), FactoredDamping(by_pattern))
        assert not close(matrix.logdet(FactoredDamping(0.3)), matrix.logdet(0.3))

    def test_how_the_scale_is_split_does_not_matter(self) -> None:
        tensors = made.factors()
        split = {name: t * (1e3 if name.endswith("A") else 1e-3) for name, t in tensors.items()}
        expected = KFAC.from_tensors(tensors, LAYERS, INFO).solve(vector(), FactoredDamping(0.3))
        assert close(KFAC.from_tensors(split, LAYERS, INFO).solve(vector(), FactoredDamping(0.3)), expected)

    def test_a_zero_block_has_the_damping_alone(self) -> None:
        for zero in ("fc|A", "fc|S"):
            tensors = made.factors()
            tensors[zero] = torch.zeros_like(tensors[zero])
            matrix = KFAC.from_tensors(tensors, LAYERS, INFO)
            found = LAYERS.unflatten(matrix.inverse_diagonal(FactoredDamping(0.25)))
            assert close(found["fc.weight"], torch.full((2, 1, 3), 4.0).double())
            tensors[zero] = torch.eye(len(tensors[zero])).double() * 1e-30  # the limit
            limit = KFAC.from_tensors(tensors, LAYERS, INFO).inverse_diagonal(FactoredDamping(0.25))
            assert torch.allclose(limit, LAYERS.flatten(found), rtol=1e-9)

    def test_parts_of_a_composite_without_factors_have_the_exact_one(self) -> None:
        matrix, _ = MAKERS["Composite"]()
        a, s = (matrix.parts[0].factors["fc"][i][0] for i in (0, 1))
        pi = ((a.trace() / 3) / (s.trace() / 2)) ** 0.5
        eye = torch.eye(3, dtype=torch.float64)
        damped = KFAC.from_tensors(
            {"fc|A": a + pi * 0.09**0.5 * eye, "fc|S": s + 0.09**0.5 / pi * eye[:2, :2]}, matrix.parts[0].space, INFO
        )
        whole, entries = (part.to_dense() + 0.09 * torch.eye(part.space.total).double() for part in matrix.parts[1:])
        expected = Composite(
            [damped, Dense(whole, matrix.parts[1].space, INFO), Dense(entries, matrix.parts[2].space, INFO)],
            LAYERS,
            INFO,
        )
        self.check(matrix, expected.to_dense(), FactoredDamping(0.09))
        first, *others = matrix.parts
        ekfac = EKFAC.from_tensors(
            {"fc|U_A": torch.eye(3).double(), "fc|U_S": torch.eye(2).double(), "fc|values": torch.ones(2, 3).double()},
            first.space,
            INFO,
        )
        for part in (ekfac, Dense(first.to_dense(), first.space, INFO)):
            with pytest.raises(UnsupportedError, match="factored damping needs a kfac or tkfac matrix"):
                Composite([part, *others], LAYERS, INFO).logdet(FactoredDamping(0.1))

    @pytest.mark.parametrize("name", [name for name in MAKERS if name not in ("KFAC", "TKFAC", "Composite")])
    def test_other_structures_refuse_it(self, name: str) -> None:
        matrix, _ = MAKERS[name]()
        told = "one pair .* fc has 2: merge" if name == "SumOfKFAC" else "needs a kfac or tkfac matrix.*give its number"
        for attempt in (
            lambda: matrix.solve(vector(), FactoredDamping(0.1)),
            lambda: matrix.logdet(FactoredDamping(0.1)),
            lambda: matrix.inverse_diagonal(FactoredDamping(0.1)),
            lambda: matrix.sample(1, FactoredDamping(0.1)),
        ):
            with pytest.raises(UnsupportedError, match=told):
                attempt()

    def test_what_is_no_factored_damping(self) -> None:
        matrix, _ = MAKERS["KFAC"]()
        with pytest.raises(CurvlabError, match=r"at least 0, but that of fc is -0\.1"):
            matrix.logdet(FactoredDamping(-0.1))
        with pytest.raises(CurvlabError, match="number per layer, not a factored damping"):
            matrix.logdet(FactoredDamping(FactoredDamping(0.1)))
        with pytest.raises(CurvlabError, match="that of fc is not one number"):
            matrix.logdet(FactoredDamping(positive_entries(LAYERS)))
        with pytest.raises(CurvlabError, match=r"F \+ 0 I \(factored\) is singular"):
            KFAC.from_tensors(made.factors(singular=True), LAYERS, INFO).solve(vector(), FactoredDamping(0))
        tensors = made.factors()
        tensors["fc|A"] = -tensors["fc|A"]
        with pytest.raises(UnsupportedError, match="positive traces, unlike those of fc"):
            KFAC.from_tensors(tensors, LAYERS, INFO).logdet(FactoredDamping(0.1))

    def test_the_evidence_is_differentiable_in_it(self) -> None:
        matrix, _ = MAKERS["KFAC"]()
        number = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda n: matrix.logdet(FactoredDamping(n)), number)


@pytest.mark.parametrize("name", LAYERED)
def test_kronecker_factors_refuse_more_than_a_number_a_layer(name: str) -> None:
    matrix, _ = MAKERS[name]()
    apart = one_a_layer(LAYERS) | {"fc.bias": 0.1}
    for damping in (positive_entries(LAYERS), apart, LAYERS.unflatten(positive_entries(LAYERS))):
        for attempt in (
            lambda damping=damping: matrix.solve(vector(), damping),
            lambda damping=damping: matrix.logdet(damping),
            lambda damping=damping: matrix.det(damping),
            lambda damping=damping: matrix.inverse_diagonal(damping),
            lambda damping=damping: matrix.sample(1, damping),
        ):
            with pytest.raises(CurvlabError, match=r"one damping per layer.*that of fc is not.*dense.*to_dense"):
                attempt()
    Dense(matrix.to_dense(), LAYERS, INFO).solve(vector(), apart)  # the way out


def test_a_composite_gives_each_part_what_it_takes() -> None:
    matrix, dense = MAKERS["Composite"]()
    entries = positive_entries(LAYERS)
    entries[LAYERS.slices["fc.weight"]] = 0.7  # of the K-FAC part
    is_right(matrix, dense, entries)
    is_right(matrix, dense, LAYERS.unflatten(entries))
    with pytest.raises(CurvlabError, match="that of fc is not one number"):
        matrix.solve(vector(), positive_entries(LAYERS))
    # Another order, and an implicit part.
    first, second, third = matrix.parts
    implicit = Implicit(lambda v: second @ v, second.space, INFO, dtype=torch.float64)
    assert torch.allclose(
        Composite((third, implicit, first), LAYERS, INFO).solve(vector(), entries),
        torch.linalg.solve(dense + entries.diag(), vector()),
        rtol=1e-8,
    )


@pytest.mark.parametrize("name", ["Dense", "EKFAC", "Composite", "Implicit"])
@pytest.mark.parametrize(
    ("damping", "told"),
    [
        (float("nan"), "finite real number, not nan"),
        (float("-inf"), "finite real number, not -inf"),
        (10**400, "finite real number, not 1000"),
        (True, "finite real number, not True"),
        (1j, "finite real number, not 1j"),
        ("0.1", "finite real number, not '0.1'"),
        (None, "finite real number, not None"),
        ([0.1] * P, "unless it is a tensor or a dict"),
        (torch.tensor(True), "dense and real, not .* torch.bool"),
        (torch.tensor(1j), "dense and real, not .* torch.complex"),
        (torch.ones(P).to_sparse(), "dense and real, not a torch.sparse_coo"),
        (np.array(["a"] * P), "finite real number, not a NumPy array"),
        (torch.tensor(float("nan")), "finite in torch.float64"),
        (torch.full((P,), float("inf")), "finite in torch.float64"),
        (torch.ones(P - 1), r"\(11,\).*not a tensor of shape \(10,\)"),
        (torch.ones(P, 1), r"not a tensor of shape \(11, 1\)"),
        (torch.ones(P, device="meta"), "is on meta"),
        (torch.tensor(1.0, device="meta"), "is on meta"),
        ({}, "missing .*, unknown \\[\\]"),
        (dict.fromkeys((*LAYERS.names, *made.SPACE.names, "more"), 0.1), "missing \\[\\], unknown .*'more'"),
    ],
)
def test_what_is_no_damping(name: str, damping: Any, told: str) -> None:
    matrix, _ = MAKERS[name]()
    for attempt in (
        lambda: matrix.solve(vector(), damping),
        lambda: matrix.logdet(damping),
        lambda: matrix.det(damping),
        lambda: matrix.inverse_diagonal(damping),
        lambda: matrix.sample(1, damping),
    ):
        with pytest.raises(CurvlabError, match=told):
            attempt()


@pytest.mark.parametrize("wrong", [torch.ones(4), torch.tensor(float("nan")), "a", False, None, [1.0]])
def test_a_name_with_what_is_no_damping(wrong: Any) -> None:
    for name in ("Diagonal", "KFAC"):
        matrix, _ = MAKERS[name]()
        last = matrix.space.names[-1]
        with pytest.raises(CurvlabError, match=f"damping of {last}"):
            matrix.solve(vector(), dict.fromkeys(matrix.space.names, 0.1) | {last: wrong})


def test_a_tensor_of_another_shape_than_its_parameter() -> None:
    matrix, _ = MAKERS["Diagonal"]()
    named = matrix.space.unflatten(positive_entries(matrix.space))
    for wrong in (named["w"].mT, named["w"].reshape(-1), named["w"][:, :1], named["w"].repeat(1, 2), torch.ones(1)):
        with pytest.raises(CurvlabError, match=r"damping of w must be a number or a tensor of shape \(3, 2\)"):
            matrix.logdet(named | {"w": wrong})


def test_a_damping_beyond_the_dtype() -> None:
    matrix = MAKERS["Diagonal"]()[0].to(dtype=torch.float32)
    assert matrix.logdet(positive_entries(made.SPACE)).dtype == torch.float32
    for damping in (1e39, torch.full((P,), 1e39, dtype=torch.float64)):
        with pytest.raises(CurvlabError, match=r"finite in torch\.float32"):
            matrix.logdet(damping)


@pytest.mark.parametrize("name", ANY)
def test_a_vector_that_leaves_it_singular_or_indefinite(name: str) -> None:
    matrix, dense = MAKERS[name]()
    away = -dense.diagonal().clone()
    away[1:] += 1e-3
    with pytest.raises(CurvlabError, match=r"F \+ diag\(damping\) is not positive definite"):
        matrix.logdet(away)
    with pytest.raises(CurvlabError, match=r"F \+ diag\(damping\) is not positive definite"):
        matrix.sample(1, away)
    if isinstance(matrix, Diagonal):
        with pytest.raises(CurvlabError, match=r"F \+ diag\(damping\) is singular"):
            matrix.solve(vector(), away)


@pytest.mark.parametrize("name", MAKERS)
def test_the_evidence_is_differentiable_in_the_damping(name: str) -> None:
    """As the choice of a prior by the marginal likelihood needs it: one precision, one per layer or per parameter."""
    matrix, dense = MAKERS[name]()

    def inverse(damping: Any) -> Tensor:
        return torch.linalg.inv(dense + dense_of(damping, matrix.space)).diagonal()

    number = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(matrix.logdet(number), number)
    assert close(gradient, inverse(0.4).sum())
    (gradient,) = torch.autograd.grad(matrix.det(number), number)
    assert close(gradient, matrix.det(0.4) * inverse(0.4).sum())
    (gradient,) = torch.autograd.grad(matrix.inverse_diagonal(number).sum(), number)
    squared = torch.linalg.matrix_power(dense + 0.4 * torch.eye(P, dtype=dense.dtype), -2)
    assert close(gradient, -squared.trace())
    of_layer = {size: number + size for size in one_a_layer(matrix.space).values()}  # one tensor a layer
    layers = {name: of_layer[size] for name, size in one_a_layer(matrix.space).items()}
    (gradient,) = torch.autograd.grad(matrix.logdet(layers), number)
    assert close(gradient, inverse({n: t.item() for n, t in layers.items()}).sum())
    entries = torch.full((P,), 0.4, dtype=torch.float64, requires_grad=True)  # equal, but each a variable
    if name in (*LAYERED, "Composite"):
        with pytest.raises(CurvlabError, match="is not one number"):
            matrix.logdet(entries)
    else:
        (gradient,) = torch.autograd.grad(matrix.logdet(entries), entries)
        assert close(gradient, inverse(0.4))


def test_one_decomposition_serves_every_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vector of equal numbers included."""
    calls = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: (calls.append(len(m)), eigh(m))[1])
    for name, blocks in (("Dense", 1), ("BlockDiagonal", 3), ("KFAC", 6)):
        matrix, _ = MAKERS[name]()
        calls.clear()
        for damping in (0.1, 0.2, torch.full((P,), 0.3), dict.fromkeys(matrix.space.names, 0.4)):
            matrix.solve(vector(), damping)
            matrix.logdet(damping)
        assert len(calls) == blocks


def test_an_empty_parameter() -> None:
    space = ParameterSpace(("w", "none"), ((3,), (0, 2)))
    for matrix in (
        Diagonal(torch.ones(3), space, INFO),
        Implicit(lambda v: v, space, INFO, dtype=torch.float32),
        Dense(torch.eye(3), space, INFO),
        BlockDiagonal({"w": torch.eye(3), "none": torch.empty(0, 0)}, space, INFO),
    ):
        for damping in (1.0, torch.arange(3.0), {"w": torch.arange(3.0), "none": 5.0}):
            added = dense_of(damping, space).diagonal().float()
            assert torch.allclose(matrix.solve(torch.ones(3), damping), 1 / (1 + added))
            assert torch.allclose(matrix.logdet(damping), (1 + added).log().sum())
            assert matrix.sample(2, damping).shape == (3, 2)
            assert torch.allclose(matrix.inverse_diagonal(damping), 1 / (1 + added))
            assert torch.allclose(matrix.det(damping), (1 + added).prod())
    assert Damping.of(1.0, space, torch.float32, torch.device("cpu")).over(["none"]) == 1


def test_a_layer_that_is_square() -> None:
    """Where no shape tells the sides of a basis apart, nor rows from columns."""
    u_a, u_s = (torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q for _ in range(2))
    values = torch.arange(1.0, 10.0, dtype=torch.float64).view(3, 3)
    space = ParameterSpace(("fc.weight",), ((3, 3),))
    matrix = EKFAC.from_tensors({"fc|U_A": u_a, "fc|U_S": u_s, "fc|values": values}, space, INFO)
    basis = kron(u_s, u_a)
    dense = basis @ values.flatten().diag() @ basis.mT
    assert close(matrix.to_dense(), dense)
    assert close(matrix.diagonal(), dense.diagonal())
    assert close(matrix.solve(values.flatten(), 0.5), torch.linalg.solve(dense + 0.5 * torch.eye(9), values.flatten()))
    assert close(matrix.trace(), dense.trace())
    assert close(matrix.frobenius_norm(), torch.linalg.matrix_norm(dense))


def test_factors_with_eigenvalues_of_both_signs() -> None:
    a, s = (made.positive(3, seed) - 1.6 * torch.eye(3, dtype=torch.float64) for seed in (0, 1))
    matrix = KFAC.from_tensors({"fc|A": a, "fc|S": s}, ParameterSpace(("fc.weight",), ((3, 3),)), INFO)
    dense, b = kron(s, a), torch.arange(1.0, 10.0, dtype=torch.float64)
    assert close(matrix.eigenvalues(), torch.linalg.eigvalsh(dense))
    assert close(matrix.diagonal(), dense.diagonal())
    assert close(matrix.trace(), dense.trace())
    assert close(matrix.solve(b, 0.1), torch.linalg.solve(dense + 0.1 * torch.eye(9, dtype=dense.dtype), b))
    damped = dense + 0.1 * torch.eye(9, dtype=dense.dtype)
    assert close(matrix.inverse_diagonal(0.1), torch.linalg.inv(damped).diagonal())
    assert torch.linalg.eigvalsh(damped)[0] < 0
    assert close(matrix.det(0.1), torch.linalg.det(damped))
    with pytest.raises(CurvlabError, match="not positive definite"):
        matrix.logdet(0.1)
