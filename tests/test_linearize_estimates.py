"""Curvature of linearized models: every cell against rows by plain backward passes through the linearized module."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cache
from itertools import count

import pytest
import torch
from models_under_test import CLASSES, Case, case
from test_estimator_matrix import FORMS, PAIRS, QUANTITIES, Truth, attempt, check_structures, close, is_kronecker
from torch import Tensor, nn

from curvlab import EmpiricalFisher, Fisher, Hessian, Problem, diagonality, doctor, estimate, linearize, standard_error
from curvlab.diagonality import _Blocks, submatrix
from curvlab.estimators import per_layer
from curvlab.estimators.torch_func import per_sample_rows
from curvlab.linearize import first_order_model
from curvlab.models import ResNet20, mlp
from curvlab.parameters import ParameterSpace
from curvlab.quantities import GGN, Quantity
from curvlab.spectrum import top_eigenvalues


def moved(linear: nn.Module, scale: float = 0.3) -> nn.Module:
    seeds = count(3)
    with torch.no_grad():
        for p in linear.parameters():
            noise = torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(next(seeds)))
            p.add_(scale * noise * p.requires_grad)
    return linear


def relu_mlp() -> Case:
    """Every module of it has a rule."""
    whole = case("mlp")
    return replace(whole, model=nn.Sequential(whole.model[0], nn.ReLU(), whole.model[2]), kronecker=frozenset("02"))


def convolutional() -> Case:
    whole = case("batch norm")
    layers = whole.model[1], whole.model[2], nn.LeakyReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3, CLASSES)
    model = nn.Sequential(*layers).double().eval()
    return replace(whole, model=model, inputs=whole.inputs.view(-1, 2, 3, 3), kronecker=frozenset("05"))


def selecting() -> Case:
    """A hook on the linearized module takes some of its outputs."""
    whole = linearized(relu_mlp())
    whole.model.register_forward_hook(lambda _, __, outputs: outputs[:, [2, 0]])
    return replace(whole, targets=whole.targets % 2)


class Inside(nn.Module):
    """A linearized module that is a part of another."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(4, 4)
        self.body = moved(linearize(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4))))
        self.after = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.body(self.before(x).tanh()).tanh())


def inside() -> Case:
    torch.manual_seed(0)
    names = frozenset({"before", "body.0", "body.2", "after"})
    return replace(case("mlp"), model=Inside().double(), kronecker=names)


def linearized(whole: Case, head: str | None = None) -> Case:
    return replace(whole, model=moved(linearize(whole.model, head=head)))


CASES: dict[str, Callable[[], Case]] = {
    "rules": lambda: linearized(relu_mlp()),
    "general": lambda: linearized(case("mlp")),
    "head outside": lambda: linearized(relu_mlp(), head="2"),
    "hook": selecting,
    "inside another": inside,
    "convolutional": lambda: linearized(convolutional()),
    "partly frozen": lambda: linearized(case("frozen")),
    "tied": lambda: linearized(case("tied")),
    "module used twice": lambda: linearized(case("module used twice")),
    "tokens": lambda: linearized(case("tokens")),
    "transformer encoder layer": lambda: linearized(case("transformer encoder layer")),
    "lstm": lambda: linearized(case("lstm")),
    "one layer": lambda: linearized(replace(case("one layer"), linear=frozenset(), kronecker=frozenset())),
}


@cache
def truth(name: str, quantity: Quantity, loss: str | None = None) -> Truth:
    whole = CASES[name]()
    if loss is not None:
        whole = replace(whole, loss=loss, targets=case("mlp", loss=loss).targets)
    return Truth(whole, quantity)


# Every cell ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "quantity", "name"),
    [
        pytest.param(*cell.values, name, marks=[pytest.mark.slow] if (i + j) % 4 // 2 else [])
        for i, name in enumerate(CASES)
        for j, cell in enumerate(PAIRS)
        if cell.values[1] != GGN() and (i + QUANTITIES.index(cell.values[1])) % 2  # the GGN is the Fisher
    ],
)
def test_right_or_refused(backend: str, quantity: Quantity, name: str) -> None:
    """Every model with every backend and half of the quantities, every quantity with half of the models.

    Half of these combinations are slow tests.
    """
    expected = truth(name, quantity)
    several = name in ("rules", "convolutional", "tokens", "transformer encoder layer")
    done = check_structures(backend, quantity, expected, expected.problem, variants=several)
    if backend in ("torch", "hooks"):
        assert all(done.values()), "our own refuse nothing"


@pytest.mark.parametrize(("backend", "quantity"), PAIRS)
def test_losses(backend: str, quantity: Quantity) -> None:
    """One of two other losses with every quantity."""
    rules = QUANTITIES.index(quantity) % 2
    name, loss = ("rules", "squared_error") if rules else ("general", "binary_cross_entropy")
    expected = truth(name, quantity, loss)
    check_structures(backend, quantity, expected, expected.problem)


@pytest.mark.parametrize(
    ("backend", "quantity"), [p for p in PAIRS if p.values[0] != "backpack" and p.values[1] != Hessian()]
)
def test_no_backend_refuses_a_plain_network(backend: str, quantity: Quantity) -> None:
    expected = truth("rules", quantity)
    assert all(check_structures(backend, quantity, expected, expected.problem).values())


# By hand -------------------------------------------------------------------------------------------------------------


def test_factors_by_hand() -> None:
    """The inputs of layers and the way back are those at the point; the slopes of the loss are those of ``f_lin``."""
    whole = CASES["rules"]()
    base = relu_mlp().model
    x, y = whole.inputs, whole.targets
    W = base[2].weight.detach()
    hidden = base[0](x).detach()
    outputs = whole.model(x).detach()
    assert (outputs - base(x)).abs().max() > 0.1
    p = outputs.softmax(dim=1)
    for quantity in ("empirical_fisher", "fisher"):
        rows = [(torch.eye(CLASSES)[y], torch.ones(len(x)))]
        if quantity == "fisher":
            rows = [(torch.eye(CLASSES)[c].expand(len(x), -1), p[:, c]) for c in range(CLASSES)]
        seeds = [(p - onehot, weight) for onehot, weight in rows]
        back = [(s, (s @ W) * (hidden > 0), weight) for s, weight in seeds]
        ones = torch.ones(len(x), 1, dtype=x.dtype)
        matrix = estimate(whole.problem, quantity, "kfac")
        tensors = matrix.tensors()
        for layer, given, which in (("0", x, 1), ("2", hidden.relu(), 0)):
            a = torch.cat([given, ones], dim=1)
            A, S = a.mT @ a / len(x), sum((b[which].mT * b[2]) @ b[which] for b in back) / len(x)
            found = torch.kron(tensors[f"{layer}|S"][0], tensors[f"{layer}|A"][0])
            assert close(found, torch.kron(S, A))


@pytest.mark.parametrize("name", ["convolutional", "tokens", "transformer encoder layer", "rules"])
@pytest.mark.parametrize("quantity", [Fisher(), EmpiricalFisher()], ids=str)
def test_traces(quantity: Quantity, name: str) -> None:
    """EK-FAC and TK-FAC have the trace of the exact matrix, whose rows know nothing of layers."""
    expected = truth(name, quantity)
    for structure in ("ekfac", "tkfac"):
        matrix = estimate(expected.problem, quantity, structure, params=expected.kronecker_names)
        assert close(matrix.trace(), expected.dense.diagonal()[expected.index(matrix)].sum())


def test_at_the_point_it_is_the_models() -> None:
    for whole in (relu_mlp(), case("mlp"), convolutional()):
        at_point = replace(whole, model=linearize(whole.model))
        for quantity in (form for forms in FORMS.values() for form in forms if not isinstance(form, Hessian)):
            for structure in ("dense", "kfac:rest=diag"):
                if structure != "dense" and quantity.name == "masq":
                    continue
                one, other = (estimate(w.problem, quantity, structure) for w in (whole, at_point))
                assert one.space == other.space == ParameterSpace.of(whole.model)
                assert close(one.to_dense(), other.to_dense())


@pytest.mark.parametrize("name", ["rules", "general", "hook"])
def test_hessian_is_the_ggn(name: str) -> None:
    problem = truth(name, Hessian()).problem
    hessian, ggn = (estimate(problem, quantity, "dense").to_dense() for quantity in ("hessian", "ggn"))
    assert close(hessian, ggn)
    base = Problem(case("mlp").model, problem.loss.name, (problem.data[0], case("mlp").targets))
    assert not close(*(estimate(base, quantity, "dense").to_dense() for quantity in ("hessian", "ggn")), rtol=1e-3)


def test_hessian_with_a_head_outside_is_not_the_ggn() -> None:
    """The outputs are bilinear in features and head."""
    problem = truth("head outside", Hessian()).problem
    hessian, ggn = (estimate(problem, quantity, "dense").to_dense() for quantity in ("hessian", "ggn"))
    assert not close(hessian, ggn, rtol=1e-3)
    for part in ("0.*", "2.*"):
        of_part = [estimate(problem, quantity, "dense", params=part).to_dense() for quantity in ("hessian", "ggn")]
        assert close(*of_part)


def test_gauss_newton_does_not_depend_on_the_parameters_with_squared_error() -> None:
    whole = replace(relu_mlp(), loss="squared_error", targets=case("mlp", loss="squared_error").targets)
    here = replace(whole, model=linearize(whole.model))
    there = replace(whole, model=moved(deepcopy(here.model)))
    for structure in ("dense", "kfac", "ekfac", "tkfac", "diag"):
        one, other = (estimate(w.problem, "ggn", structure).to_dense() for w in (here, there))
        assert close(one, other)
    one, other = (estimate(w.problem, "empirical_fisher", "dense").to_dense() for w in (here, there))
    assert not close(one, other, rtol=1e-2)


# Everything else that looks into models ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rules", "general", "head outside", "hook"])
def test_diagonality(name: str) -> None:
    whole = truth(name, EmpiricalFisher())
    assert set(_Blocks(whole.problem, EmpiricalFisher(), 2e8).linear) == {"0", "2"}, "not the slow way"
    table = diagonality(whole.problem, "empirical_fisher").set_index("parameter")
    for parameter, part in whole.problem.space.slices.items():
        block = whole.dense[part, part]
        diagonal = block.diagonal().sum()
        assert close(torch.tensor(table.diag_sum[parameter]), diagonal)
        assert close(torch.tensor(table.offdiag_abs_sum[parameter]), block.abs().sum() - diagonal)
    assert close(submatrix(whole.problem).matrix, whole.dense)


def test_standard_error() -> None:
    for name in ("rules", "general"):
        problem = truth(name, Fisher()).problem
        quantity = Fisher(samples=3)
        rows = torch.cat(list(per_sample_rows(problem, quantity, problem.space))).view(-1, 3, problem.space.total)
        variance = (3 * rows.square()).sum(dim=2).var(dim=1).sum() / 3
        assert close(standard_error(problem, quantity).trace, (variance.sqrt() / problem.num_samples))


def test_eigenvalues() -> None:
    for name in ("rules", "general"):
        whole = truth(name, Fisher())
        matrix = estimate(whole.problem, "fisher", "implicit")
        assert close(top_eigenvalues(matrix, tol=1e-8).values, torch.linalg.eigvalsh(whole.dense)[-1:], 1e-8)


def test_per_layer() -> None:
    whole = truth("rules", Fisher())
    for layer, matrix in per_layer(whole.problem, "fisher", "kfac").items():
        names = [n for n in whole.problem.space.names if n.startswith(layer)]
        assert close(matrix.to_dense(), estimate(whole.problem, "fisher", "kfac", params=names).to_dense())


@pytest.mark.parametrize(("name", "quantity"), [("general", "fisher"), ("head outside", "hessian")])
def test_doctor(name: str, quantity: str) -> None:
    diagnosis = doctor(truth(name, Fisher()).problem, quantity)
    assert not diagnosis.findings
    table = diagnosis.combinations
    ours = table[table.backend.isin(["hooks", "torch"]) & (table.supported != "absent")]
    assert set(ours.supported) == {"yes"}
    assert not table.obstacle.str.contains("Error").any(), "refusals, not failures"


def test_nothing_is_changed_by_an_estimate() -> None:
    whole = CASES["hook"]()
    before = {name: t.clone() for name, t in whole.model.state_dict().items()}
    given = whole.model(whole.inputs)
    for structure in ("kfac", "diag", "dense"):
        for backend in ("hooks", "torch", "backpack", "nngeometry", "curvlinops"):
            if not (backend == "curvlinops" and structure != "kfac"):
                attempt(whole.problem, Fisher(), structure, backend)
    assert all(torch.equal(t, before[name]) for name, t in whole.model.state_dict().items())
    assert torch.equal(whole.model(whole.inputs), given)
    assert all(p.grad is None for p in whole.model.parameters())


def test_estimates_follow_the_model() -> None:
    whole = CASES["rules"]()
    problem = whole.problem
    for _ in range(2):
        rows = torch.cat(list(per_sample_rows(problem, EmpiricalFisher(), problem.space)))
        assert close(estimate(problem, "empirical_fisher", "dense").to_dense(), rows.mT @ rows / len(rows))
        moved(whole.model)


def test_first_order_leaves_other_models_alone() -> None:
    model = mlp(4, (5,), 3)
    assert first_order_model(model) is model
    once = first_order_model(linearize(model))
    assert first_order_model(once) is once


def test_resnet20() -> None:
    """By name, as of the plain network."""
    torch.manual_seed(0)
    model = ResNet20(CLASSES).double().eval()
    linear = moved(linearize(model), 0.01)
    x, y = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 2])
    problem = Problem(linear, "cross_entropy", (x, y))
    names = ["conv1.weight", "layer3.2.conv2.weight", "linear.*"]
    matrix = estimate(problem, "empirical_fisher", "tkfac", params=names)
    diagonal = estimate(problem, "empirical_fisher", "diag", params=names)
    parameters = [p for n, p in linear.named_parameters() if n.startswith(("conv1", "layer3.2.conv2", "linear"))]
    expected = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    for n in range(2):
        loss = nn.functional.cross_entropy(linear(x[n : n + 1]), y[n : n + 1])
        expected += torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).square() / 2
    assert close(diagonal.diagonal(), expected)
    assert close(matrix.trace(), expected.sum())


def test_kronecker_structure_of_a_bare_layer_is_refused() -> None:
    whole = CASES["one layer"]()
    with pytest.raises(Exception, match=r"weight belongs to Linearized \(the model\)"):
        estimate(whole.problem, "fisher", "kfac:rest=none")
    assert is_kronecker("kfac")
