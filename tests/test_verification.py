"""Rules are used only where they are correct; rejected ones are reported, and the result is still computed."""

import contextlib
import re
import types

import pytest
import torch
from kinds_under_test import CLASSES, RIGHT, mlp, plainly, problem_of
from torch import Tensor, nn
from torch.nn import functional as F

from curvlab import Problem, diagonality, estimate
from curvlab.errors import UnsupportedError
from curvlab.estimators import hooks, registry, rules, torch_func
from curvlab.estimators.backend import Backend, BackendResult
from curvlab.estimators.capture import Call, forward, inspect_graph, make_leaves
from curvlab.estimators.layers import Layer, make_layer
from curvlab.estimators.rows import row_batches
from curvlab.estimators.rules import WrongRuleError, rule
from curvlab.estimators.sums import Sums
from curvlab.estimators.verification import ChangedUseError, kronecker_layers, verify_factors, verify_rules
from curvlab.likelihoods import FromFunction
from curvlab.parameters import ParameterSpace
from curvlab.progress import no_progress
from curvlab.quantities import EmpiricalFisher, Fisher, Quantity
from curvlab.structures import DenseStructure, EKFACStructure

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> bool:
    return bool((actual - expected).abs().max() <= tolerance * expected.abs().max())


@pytest.mark.parametrize("backend", ["auto", "hooks", "torch"])
@pytest.mark.parametrize("kind", RIGHT)
def test_diagonals(kind: str, backend: str) -> None:
    problem = problem_of(RIGHT[kind])
    for quantity in ("empirical_fisher", "ggn"):
        matrix = estimate(problem, quantity, "diag", backend=backend)
        assert close(matrix.diagonal(), plainly(problem, quantity).diagonal()), quantity


@pytest.mark.parametrize("kind", RIGHT)
def test_kronecker_factors_or_the_diagonal(kind: str) -> None:
    """For each layer, the trace of EK-FAC is that of the true block, and so is the diagonal's."""
    problem = problem_of(RIGHT[kind])
    layers, reasons = kronecker_layers(problem, problem.space)
    assert sorted([*reasons, *(n for layer in layers.values() for n in layer.parameters)]) == sorted(
        problem.space.names
    )
    if not layers:
        with pytest.raises(UnsupportedError, match="needs Kronecker factors for every parameter"):
            estimate(problem, "empirical_fisher", "ekfac:rest=none")
        whole = estimate(problem, "empirical_fisher", "ekfac")
        assert close(whole.diagonal(), plainly(problem, "empirical_fisher").diagonal())
        return
    diagonal = problem.space.unflatten(plainly(problem, "empirical_fisher").diagonal())
    for backend in ("auto", "torch"):
        found = estimate(problem, "empirical_fisher", "ekfac:rest=diag", backend=backend)
        found_diagonal = problem.space.unflatten(found.diagonal())
        for layer in layers.values():
            expected = sum(float(diagonal[name].sum()) for name in layer.parameters)
            assert sum(float(found_diagonal[name].sum()) for name in layer.parameters) == pytest.approx(
                expected, rel=1e-10
            )
        for name in reasons:
            assert close(found_diagonal[name], diagonal[name])


def patched() -> nn.Module:
    def doubling(self: nn.Linear, x: Tensor) -> Tensor:
        return F.linear(2 * x, self.weight, self.bias)

    model = mlp()
    model[0].forward = types.MethodType(doubling, model[0])
    return model


def test_rejected_rules_are_reported() -> None:
    problem = problem_of(patched)
    matrix = estimate(problem, "fisher", "diag")
    assert matrix.info.backend == "hooks"
    assert matrix.info.rejected == (
        "0.weight belongs to Linear 0, whose forward was replaced: its gradient does not follow from its inputs and "
        "the gradient of its output",
    )
    assert estimate(problem_of(mlp), "fisher", "diag").info.rejected == ()


def test_rejected_libraries_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no such kernel\nand a long explanation")

    broken = Backend("hooks", hooks.BACKEND.structures, fail)
    monkeypatch.setattr(registry, "BACKENDS", {"hooks": broken, "torch": torch_func.BACKEND})
    matrix = estimate(problem_of(mlp), "fisher", "diag")
    assert matrix.info.backend == "torch"
    assert matrix.info.rejected == ("backend hooks: it fails on Sequential (ValueError: no such kernel)",)
    with pytest.raises(UnsupportedError, match=r"backend hooks cannot: it fails on Sequential .*backend torch can"):
        estimate(problem_of(mlp), "fisher", "diag", backend="hooks")


class Gated(nn.Module):
    """Some samples use the weight of a layer a second time, without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc(x).tanh()
        gate = x[:, :1] > 50
        if bool(gate.any()):
            hidden = torch.where(gate, hidden + F.linear(hidden, self.fc.weight), hidden)
        return self.out(hidden)


def sixteen(model: nn.Module, *odd: int) -> tuple[Problem, Problem]:
    """Return a problem in batches of two, with some odd samples, and the same samples in one batch."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(16, 4, dtype=torch.float64), torch.arange(16) % CLASSES
    inputs[list(odd), 0] = 100.0
    problem = Problem(model.double(), "cross_entropy", list(zip(inputs.split(2), targets.split(2), strict=True)))
    assert all(bool((x[:, 0] < 50).all()) for x, _ in problem.probe())
    return problem, Problem(model, "cross_entropy", (inputs, targets))


def test_a_use_that_the_samples_of_the_verification_do_not_show() -> None:
    problem, whole = sixteen(Gated(), 5)
    verified = verify_rules(problem, problem.space)
    assert set(verified.layers) == {"fc", "out"}
    odd = list(problem.batches())[2][0]
    with pytest.raises(
        ChangedUseError, match=r"fc\.weight belongs to Linear fc, but is also used elsewhere in some batch"
    ):
        verified.run(problem, odd)
    for quantity in ("empirical_fisher", "ggn"):
        expected = plainly(whole, quantity)
        diagonal = estimate(problem, quantity, "diag")
        assert close(diagonal.diagonal(), expected.diagonal())
        assert "fc.weight belongs to Linear fc, but is also used elsewhere in some batch" in diagonal.info.rejected
        for structure in ("dense", "implicit"):
            matrix = estimate(problem, quantity, structure)
            assert close(matrix @ torch.eye(problem.space.total, dtype=torch.float64), expected)
    for backend in ("auto", "hooks", "torch", "curvlinops", "nngeometry"):
        with pytest.raises(UnsupportedError, match="fc"):
            estimate(problem, "empirical_fisher", "kfac", backend=backend)


@pytest.mark.parametrize("structure", ["diag", "kfac", "ekfac"])
def test_a_hook_that_changes_the_outputs_of_some_samples_only(structure: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, CLASSES))
    model[0].register_forward_hook(lambda _, __, output: output.clamp(-20, 20))
    problem, whole = sixteen(model, 5)
    assert max(float(model[0](x).detach().abs().max()) for x, _ in problem.probe()) < 15
    assert float(model[0](next(whole.batches())[0]).detach().abs().max()) == 20
    reference = estimate(whole, "empirical_fisher", structure, backend="torch")
    if structure == "diag":
        assert close(reference.diagonal(), plainly(whole, "empirical_fisher").diagonal())
    for backend in ("hooks", "torch", *(["curvlinops"] if structure != "diag" else [])):
        matrix = estimate(problem, "empirical_fisher", structure, backend=backend)
        assert close(matrix.to_dense(), reference.to_dense())
    for backend in ("nngeometry", *(["backpack"] if structure != "ekfac" else [])):
        with pytest.raises(UnsupportedError, match=r"a hook of Linear \(0\) changes its output"):
            estimate(problem, "empirical_fisher", structure, backend=backend)


def test_a_replaced_forward_that_does_more_for_some_samples_only() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, CLASSES))
    model[0].forward = lambda x, plain=model[0].forward: plain(x).clamp(-20, 20)
    problem, whole = sixteen(model, 5)
    assert max(float(model[0](x).detach().abs().max()) for x, _ in problem.probe()) < 15
    right = plainly(whole, "empirical_fisher")
    for of in (problem, whole):
        matrix = estimate(of, "empirical_fisher", "diag")
        assert close(matrix.diagonal(), right.diagonal())
        assert "0.weight belongs to Linear 0, whose forward was replaced" in matrix.info.rejected[0]
        for backend in ("hooks", "torch", "nngeometry", "backpack"):
            with pytest.raises(UnsupportedError, match="0"):
                estimate(of, "empirical_fisher", "kfac", backend=backend)
        for backend in ("nngeometry", "backpack"):
            with pytest.raises(UnsupportedError, match="whose forward was replaced"):
                estimate(of, "empirical_fisher", "dense", backend=backend)


def test_a_hook_that_changes_nothing_does_not_exclude_libraries() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, CLASSES))
    seen: list[Tensor] = []
    model[0].register_forward_hook(lambda _, __, output: seen.append(output))
    _, whole = sixteen(model)
    right = estimate(whole, "empirical_fisher", "diag", backend="torch").diagonal()
    for backend in ("nngeometry", "backpack"):
        assert close(estimate(whole, "empirical_fisher", "diag", backend=backend).diagonal(), right)


class InPlace(nn.Module):
    """In a batch of one sample, the output of the layer is a view, and the hook of a library is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 4), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc(x.unflatten(1, (1, 4)).repeat(1, 2, 1))
        hidden += 1
        return self.out(hidden.tanh().flatten(1))


@pytest.mark.parametrize("size", [1, 3, 15, None])
@pytest.mark.parametrize("structure", ["kfac", "ekfac:sharing=reduce"])
def test_outputs_that_are_views_in_some_batches(structure: str, size: int | None) -> None:
    _, whole = sixteen(InPlace())
    right = estimate(whole, "empirical_fisher", structure, backend="torch").to_dense()
    for backend in ("curvlinops", "hooks"):
        matrix = estimate(whole, "empirical_fisher", structure, backend=backend, batch_size=size)
        assert close(matrix.to_dense(), right), backend


@pytest.mark.parametrize(
    ("structure", "change", "message"),
    [
        ("kfac", lambda t: t.pop("0|S"), r"'0\|S' is missing"),
        ("ekfac", lambda t: [t.pop(name) for name in list(t) if name.startswith("0|")], "bases|layers"),
        ("diag", lambda t: t.update(entries=t["entries"][1:]), "shape"),
        ("dense", lambda t: t.update(matrix=t["matrix"][1:]), "shape"),
        ("block_diag", lambda t: t.pop("0.weight"), "the names and shapes of the blocks"),
    ],
)
def test_tensors_that_do_not_fit_are_rejected(structure, change, message, monkeypatch: pytest.MonkeyPatch) -> None:
    def compute(*arguments: object) -> BackendResult:
        tensors = dict(hooks.BACKEND.compute(*arguments).tensors)
        change(tensors)
        return BackendResult(tensors)

    broken = Backend("hooks", hooks.BACKEND.structures, compute)
    monkeypatch.setattr(registry, "BACKENDS", {"hooks": broken, "torch": torch_func.BACKEND})
    problem = problem_of(mlp)
    matrix = estimate(problem, "fisher", structure)
    assert matrix.info.backend == "torch"
    assert re.search(f"backend hooks: its tensors do not fit Sequential: .*{message}", matrix.info.rejected[0])
    with pytest.raises(UnsupportedError, match="backend hooks cannot: its tensors do not fit Sequential"):
        estimate(problem, "fisher", structure, backend="hooks")


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update({"0|values": 1.01 * t["0|values"]}),
        lambda t: t.update({"0|values": t["0|values"].flip(0)}),
        lambda t: t.update({"2|U_S": 2 * t["2|U_S"], "2|values": t["2|values"] * 4}),
        lambda t: t.update({"2|U_S": torch.eye(len(t["2|U_S"]), dtype=torch.float64)}),
        lambda t: t.update({"0|U_A": t["0|U_A"].flip(1)}),
    ],
)
def test_an_ekfac_of_a_library_that_is_wrong(change, monkeypatch: pytest.MonkeyPatch) -> None:
    def compute(*arguments: object) -> BackendResult:
        tensors = dict(hooks.BACKEND.compute(*arguments).tensors)
        change(tensors)
        return BackendResult(tensors)

    library = Backend("hooks", hooks.BACKEND.structures, compute, library=True)
    monkeypatch.setattr(registry, "BACKENDS", {"hooks": library, "torch": torch_func.BACKEND})
    matrix = estimate(problem_of(mlp), "fisher", "ekfac")
    assert matrix.info.backend == "torch"
    assert "backend hooks: it gives a wrong result for Sequential" in matrix.info.rejected[0]


class Scaled(nn.Module):
    """The factor S is a multiple of the identity, and the true block is not a Kronecker product."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x[:, :4]) * x[:, 4:]


def test_an_ekfac_of_a_library_in_another_basis_of_equal_eigenvalues(monkeypatch: pytest.MonkeyPatch) -> None:
    def compute(
        problem: Problem, quantity: Quantity, structure: EKFACStructure, space: ParameterSpace, *_: object
    ) -> BackendResult:
        tensors = dict(torch_func.compute(problem, quantity, structure, space, None, no_progress).tensors)
        tensors["fc|U_S"] = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double())[0]
        return BackendResult(tensors | torch_func.compute_in_basis(problem, quantity, structure, space, tensors)[1])

    library = Backend("hooks", hooks.BACKEND.structures, compute, library=True)
    monkeypatch.setattr(registry, "BACKENDS", {"hooks": library, "torch": torch_func.BACKEND})
    torch.manual_seed(0)
    inputs = torch.cat([torch.randn(6, 4), (1 + torch.eye(3)).repeat(2, 1)], dim=1).double()
    problem = Problem(Scaled().double(), "squared_error", (inputs, torch.randn(6, 3).double()))
    one, other = (estimate(problem, "ggn", "ekfac", backend=backend).to_dense() for backend in ("hooks", "torch"))
    assert not close(one, other, tolerance=1e-3)


class BranchesByName(nn.Module):
    """For some samples, the outputs do not depend on a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc(x)
        return self.out(x if bool((x[:, 0] > 50).any()) else hidden)


def test_a_layer_on_which_some_outputs_do_not_depend() -> None:
    problem, whole = sixteen(BranchesByName(), 4, 5)
    matrix = estimate(problem, "ggn", "diag")
    assert close(matrix.diagonal(), plainly(whole, "ggn").diagonal())
    assert "on which the outputs depend for some samples only" in " ".join(matrix.info.rejected)


@pytest.mark.parametrize("structure", ["diag", "dense", "block_diag"])
@pytest.mark.parametrize("split", [9, 4])
def test_prelu_where_there_are_as_many_samples_as_rows(structure: str, split: int) -> None:
    """A batching rule of torch is wrong in this case."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.PReLU(6), nn.Linear(6, 10)).double()
    inputs, targets = torch.randn(9, 4, dtype=torch.float64), torch.arange(9)
    problem = Problem(model, "cross_entropy", list(zip(inputs.split(split), targets.split(split), strict=True)))
    whole = torch_func.compute(problem, Fisher(), DenseStructure(), problem.space, None, no_progress).tensors["matrix"]
    parts = [whole[part, part] for part in problem.space.slices.values()]
    expected = {"diag": whole.diagonal().diag(), "dense": whole, "block_diag": torch.block_diag(*parts)}[structure]
    assert close(estimate(problem, "fisher", structure).to_dense(), expected)


def test_a_wrong_batching_rule_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.PReLU(6), nn.Linear(6, CLASSES)).double()
    inputs, targets = torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % CLASSES
    problem = Problem(model, "cross_entropy", (inputs, targets))
    expected = plainly(problem, "empirical_fisher")
    right = torch.func.vmap

    def wrong(function):
        def answer(*arguments):
            found = right(function)(*arguments)
            if isinstance(found, dict):  # wrong only for the batch, not for the samples of the verification
                return {key: rows.roll(1, 0) if len(rows) == 8 else rows for key, rows in found.items()}
            return found.roll(1, 0) if len(found) == 8 else found

        return answer

    monkeypatch.setattr(rules, "vmap", wrong)
    given, slopes = torch.randn(2, 8, 6, dtype=torch.float64)
    prelu = rule(make_layer(problem.space, "1", model[1]), [Call(given, None, given.shape)])
    with pytest.raises(WrongRuleError, match="torch vectorises PReLU wrongly over 8 samples"):
        prelu.add(slopes)
    matrix = estimate(problem, "empirical_fisher", "diag")
    assert close(matrix.diagonal(), expected.diagonal())
    assert "1.weight has no rule that is right for every batch" in " ".join(matrix.info.rejected)
    monkeypatch.setattr("curvlab.estimators.rows.vmap", wrong)
    rows = torch.cat(list(row_batches(problem, EmpiricalFisher(), problem.space.names)))
    assert close(rows.mT @ rows / 8, expected)


def test_weights_are_perturbed_if_all_gradients_are_zero() -> None:
    """Before a last layer of zeros, all gradients are zero, and a wrong rule shows only with other weights."""

    def zeroed(build):
        def model() -> nn.Module:
            made = build()
            nn.init.zeros_(made[2].weight)
            return made

        return model

    good, bad = problem_of(zeroed(mlp)), problem_of(zeroed(patched))
    assert set(kronecker_layers(good, good.space)[0]) == {"0", "2"}
    assert set(kronecker_layers(bad, bad.space)[0]) == {"2"}


def test_weight_and_bias_are_verified_separately() -> None:
    """A wrong rule for the weight does not exclude the bias, but Kronecker factors need the whole layer."""

    class AlsoElsewhere(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.fc(x).tanh() @ self.fc.weight.t().t())

    problem = problem_of(AlsoElsewhere)
    verified = verify_rules(problem, problem.space)
    assert verified.layers["fc"].parameters == ("fc.bias",)
    assert set(verify_factors(problem, problem.space).layers) == {"out"}


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, CLASSES))
    model[2].weight = model[0].weight
    return model


def test_biases_beside_a_tied_weight() -> None:
    """If the weight is not selected, both biases have factors; otherwise neither has."""
    problem = problem_of(tied)
    reasons = kronecker_layers(problem, problem.space)[1]
    assert (
        reasons["0.bias"]
        == reasons["2.bias"]
        == "belongs to the same layer as 0.weight, which is shared with 2 (a tied weight)"
    )
    right = problem.space.unflatten(plainly(problem, "ggn").diagonal())
    for backend in ("hooks", "torch", "curvlinops"):
        matrix = estimate(problem, "ggn", "kfac", params=["*.bias"], backend=backend)
        assert len(matrix.tensors()) == 6
        for name, diagonal in matrix.space.unflatten(matrix.diagonal()).items():
            assert close(diagonal, right[name])
    problem.model[0].weight.requires_grad_(False)
    frozen = Problem(problem.model, problem.loss.name, list(problem.batches()))
    assert set(kronecker_layers(frozen, frozen.space)[0]) == {"0", "2", "3"}


def test_uses_of_parameters_in_a_graph() -> None:
    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Parameter(torch.randn(4, 4)) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            transposed = self.b.t()
            return (x @ self.a + x @ transposed @ transposed)[:, :CLASSES] + self.c.flatten()[:CLASSES]

    problem = problem_of(Uses)
    leaves = make_leaves(problem)
    outputs, _ = forward(problem, {}, problem.probe()[0][0], leaves)
    assert inspect_graph(outputs, leaves).uses == {"a": 1, "b": 2, "c": 1, "d": 0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("structure", ["diag", "dense", "kfac", "ekfac", "tkfac", "implicit"])
def test_half_precision_is_summed_in_float32(structure: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = mlp().to(dtype)
    inputs, targets = torch.randn(300, 4).to(dtype), torch.randint(CLASSES, (300,))
    half = Problem(model, "cross_entropy", (inputs, targets))
    matrix = estimate(half, "fisher", structure, batch_size=5)
    assert matrix.dtype == torch.float32
    double = mlp().double()
    double.load_state_dict(model.state_dict())
    right = estimate(Problem(double, "cross_entropy", (inputs.double(), targets)), "fisher", structure)
    vectors = torch.randn(half.space.total, 2)
    expected = right @ vectors.double()
    assert float((matrix @ vectors - expected).norm() / expected.norm()) < 0.01


def test_long_sums_are_accurate() -> None:
    problem = Problem(nn.Linear(2, 3), "cross_entropy", (torch.randn(100_000, 2), torch.zeros(100_000).long()))
    sums = Sums({"one": (1,), "tenth": (2, 2)}, problem)
    for _ in range(100_000):
        sums.running["one"] += 1
        sums.running["tenth"] += 0.1
        sums.next()
    means = sums.means()
    assert means["one"].dtype == torch.float32
    assert means["one"] == 1
    assert torch.allclose(means["tenth"], torch.full((2, 2), 0.1), rtol=2e-6, atol=0)


def test_a_likelihood_without_outcomes_has_no_exact_fisher_in_the_reference() -> None:
    likelihood = FromFunction(lambda f, y: (f - y).square().sum(dim=1), natural=True)
    x = torch.randn(4, 3).double()
    problem = Problem(nn.Linear(3, 2).double(), likelihood, (x, x[:, :2]))
    with pytest.raises(UnsupportedError, match="the reference has no exact Fisher of function"):
        estimate(problem, "fisher", "diag", backend="torch")


class DeadOnMost(nn.Module):
    """Few outputs depend on the layer, which is changed in place or has a replaced forward."""

    def __init__(self, build) -> None:
        super().__init__()
        self.inner, self.out = build(), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(x) * (x[:, :1] > 50))


class ViewInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc(x.unsqueeze(1).expand(-1, 2, -1))
        hidden[:, 0].mul_(3)
        return hidden.sum(1)


def doubled() -> nn.Linear:
    layer = nn.Linear(4, 5)
    layer.forward = lambda x: F.linear(2 * x, layer.weight, layer.bias)
    return layer


@pytest.mark.parametrize("build", [doubled, ViewInPlace])
def test_layers_without_a_gradient_on_the_samples_of_the_verification(build) -> None:
    """Two zero gradients agree, but this does not verify a rule."""
    problem, whole = sixteen(DeadOnMost(build), 5)
    matrix = estimate(problem, "empirical_fisher", "diag")
    assert close(matrix.diagonal(), plainly(whole, "empirical_fisher").diagonal())


class SeldomTwice(nn.Module):
    """Few samples use a layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if (x[:, 0] > 5).any():
            h = torch.where(x[:, :1] > 5, self.a(h.tanh()), h)
        return self.c(h.tanh())


def test_the_error_on_a_layer_that_few_samples_use_twice() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 4, dtype=torch.float64).clamp(-3, 3)
    x[100, 0] = 9
    problem = Problem(SeldomTwice().double(), "cross_entropy", list(zip(x.split(20), TARGETS.split(20), strict=True)))
    for structure in ("kfac", "kfac:rest=none"):
        with pytest.raises(UnsupportedError, match=r"no Kronecker factors: leave it out with params=") as refused:
            estimate(problem, "fisher", structure)
        assert len(str(refused.value)) < 200
        assert "backend" not in str(refused.value)
        with pytest.raises(UnsupportedError) as refused:
            estimate(problem, "fisher", structure, backend="torch")
        assert "backend hooks can" not in str(refused.value), "hooks cannot"
    with pytest.raises(UnsupportedError, match=r"leave its parameters out with params="):
        diagonality(problem, "fisher")
    # The alternatives in the messages work.
    assert estimate(problem, "fisher", "kfac", params="c.*").shape == (15, 15)
    assert list(diagonality(problem, "fisher", params="c.*").parameter) == ["c.weight", "c.bias"]
    assert estimate(problem, "fisher", "diag").shape == (35, 35)


TARGETS = torch.arange(200) % 3


@pytest.mark.parametrize("shape", [(6, 4), (6, 3, 4)])
def test_distance_of_a_rule_from_other_gradients(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight of a Linear layer is compared some rows at a time."""
    monkeypatch.setattr(rules, "_BLOCK", 8)  # two rows of four
    torch.manual_seed(0)
    layer, inputs = nn.Linear(4, 5).double(), torch.randn(shape, dtype=torch.float64)
    slopes = torch.randn_like(layer(inputs))
    layer(inputs).backward(slopes)
    right = {"w": layer.weight.grad, "b": layer.bias.grad}
    linear = rules.rule(Layer("", layer, "w", "b"), [Call(inputs, None, slopes.shape)])
    assert max(linear.distances(slopes, right).values()) < 1e-12
    other = {name: value.clone() for name, value in right.items()}
    other["w"][0, 0] += 3
    other["w"][4, 3] += 4  # in the last rows
    other["b"][4] += 2
    assert linear.distances(slopes, other) == pytest.approx({"w": 5.0, "b": 2.0})
    other["w"][0, 0] = torch.nan
    assert not rules.is_rounding(linear.distances(slopes, other)["w"], torch.inf, 1.0, torch.float64)


@pytest.mark.parametrize("backend", ["curvlinops", "nngeometry", "backpack", "hooks", "torch"])
def test_a_patched_forward_that_leads_a_copy_back_to_the_model_leaves_its_gradients(backend: str) -> None:
    """The copy of a library then uses the model's own weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 2)).double()
    model[0].forward = lambda *a, plain=model[0].forward: plain(*a).tanh()  # type: ignore[method-assign]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    problem = Problem(model, "squared_error", (torch.randn(4, 5).double(), torch.randn(4, 2).double()))
    for structure in ("kfac:rest=diag,sharing=reduce", "ekfac:rest=diag", "diag", "implicit"):
        with contextlib.suppress(UnsupportedError):
            estimate(problem, "empirical_fisher", structure, backend=backend)
        assert all(bool((p.grad == 1).all()) for p in model.parameters() if p.grad is not None)
        assert all(p.grad is not None for p in model.parameters())


def test_mixed_samples_that_half_precision_does_not_show() -> None:
    """Samples are compared in float32."""

    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(x) + 0.05 * x.mean(dim=0).sum()
            return out

    torch.manual_seed(0)
    problem = Problem(
        Mixing().bfloat16(), "squared_error", (torch.randn(4, 5).bfloat16(), torch.randn(4, 2).bfloat16())
    )
    problem.check()  # not visible in half precision
    with pytest.raises(UnsupportedError, match="depends on the other samples"):
        estimate(problem, "empirical_fisher", "diag")
