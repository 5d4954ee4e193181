"""Tests of the curvlinops backend: factors against plain per-sample gradients, products against the reference."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import product as combinations

import pytest
import torch
from models_under_test import CLASSES, ZOO, N, case, plain_loss
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from curvlab.errors import CurvlabError, UnsupportedError
from curvlab.estimators import estimate, torch_func
from curvlab.estimators.covectors import label_stream
from curvlab.estimators.curvlinops import BACKEND
from curvlab.estimators.verification import kronecker_layers
from curvlab.parameters import ParameterSpace
from curvlab.problem import Pair, Problem
from curvlab.progress import no_progress
from curvlab.quantities import GGN, EmpiricalFisher, Fisher, Hessian, Quantity
from curvlab.structures import DenseStructure, EKFACStructure, ImplicitStructure, KFACStructure, Kronecker

LOSSES = ("cross_entropy", "squared_error", "binary_cross_entropy")
QUANTITIES = (Fisher(), Fisher(samples=2, seed=1), EmpiricalFisher(), GGN())
SHARINGS = ("expand", "reduce")
WITH_FACTORS = (
    "mlp",
    "one layer",
    "convolutions, eval batch norm, in-place relu",
    "frozen",
    "tokens",
    "keyword argument",
    "input changed in place",
    "residual",
    "same padding",
    "batch norm",
    "group norm, layer norm",
    "transformer block",
    "resnet-20",
)
#: Every model with both sharings, with the quantities in turn; test_estimator_matrix.py has all of them.
MODELS = [
    (name, sharing, QUANTITIES[(i + 2 * j) % 4])
    for i, name in enumerate(WITH_FACTORS)
    for j, sharing in enumerate(SHARINGS)
]
#: Where torch.func cannot differentiate a gradient, or does so wrongly: the models, and the modules to be named.
WITHOUT_HESSIAN = {
    "residual": "Residual",
    "circular padding": "SiLU",
    "group norm, layer norm": "GroupNorm",
    "transformer block": "LayerNorm",
    "transformer encoder layer": "LayerNorm",
}


def assert_same(actual: Tensor, expected: Tensor, rtol: float = 1e-10) -> None:
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert bool(expected.any())
    assert (actual - expected).abs().max() <= rtol * expected.abs().max()


def kronecker_space(problem: Problem, params: list[str] | None = None) -> ParameterSpace:
    """Return the parameters whose block is that of a whole module."""
    space = ParameterSpace.of(problem.model, params)
    layers = dict(problem.model.named_modules())
    whole = [layer for key, layer in kronecker_layers(problem, space)[0].items() if layers.get(key) is layer.module]
    return space.restrict({name for layer in whole for name in layer.parameters})


def computed(
    problem: Problem, quantity: Quantity, structure: Kronecker, params: list[str] | None = None, size: int | None = None
) -> dict[str, Tensor]:
    space = kronecker_space(problem, params)
    assert BACKEND.obstacle(problem, quantity, structure, space) is None
    return dict(BACKEND.compute(problem, quantity, structure, space, size, no_progress).tensors)


def labels(problem: Problem, quantity: Quantity) -> list[list[tuple[float, Tensor]]]:
    """Return weighted targets for every sample: the Fisher is the weighted mean of their empirical Fishers."""
    inputs, targets = next(problem.batches())
    outputs = problem.forward({}, inputs)
    if isinstance(quantity, EmpiricalFisher):
        return [[(1.0, y)] for y in targets]
    if isinstance(quantity, Fisher) and quantity.samples is not None:
        drawn = problem.loss.sample(outputs, quantity.samples, label_stream(quantity))
        return [[(1 / quantity.samples, y) for y in of_sample] for of_sample in drawn]
    if problem.loss.name == "cross_entropy":
        return [[(float(p), torch.tensor(y)) for y, p in enumerate(of_sample)] for of_sample in outputs.softmax(dim=1)]
    if problem.loss.name == "squared_error":  # whose gradients f - y are then the unit vectors
        return [[(1.0, f - unit) for unit in torch.eye(CLASSES, dtype=f.dtype)] for f in outputs]
    corners = [torch.tensor(bits, dtype=outputs.dtype) for bits in combinations((0.0, 1.0), repeat=CLASSES)]
    return [[(float(torch.where(y > 0, p, 1 - p).prod()), y) for y in corners] for p in outputs.sigmoid()]


def positions(problem: Problem, quantity: Quantity, name: str) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Return, for every sample, a layer's inputs ``(T, d)`` and one output gradient ``(T, o)`` per weighted label."""
    model = deepcopy(problem.model)
    module = model.get_submodule(name)
    seen: dict[str, Tensor] = {}

    def keep(_: nn.Module, arguments: tuple[Tensor, ...], keywords: dict[str, Tensor], output: Tensor) -> Tensor:
        seen["input"], seen["output"] = [*arguments, *keywords.values()][0].detach(), output
        return output.clone()  # which may be changed in place

    module.register_forward_hook(keep, with_kwargs=True)

    def unfolded(x: Tensor) -> Tensor:
        if isinstance(module, nn.Linear):
            return x.reshape(-1, x.shape[-1])
        if module.padding == "same":
            before = [d * (k - 1) // 2 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        else:
            before = list(module.padding)
        x = F.pad(x, (before[1], before[1], before[0], before[0]))
        return F.unfold(x, module.kernel_size, module.dilation, 0, module.stride)[0].mT

    def flattened(g: Tensor) -> Tensor:
        return g.reshape(-1, g.shape[-1]) if isinstance(module, nn.Linear) else g[0].flatten(1).mT

    inputs, _ = next(problem.batches())
    for x, weighted in zip(inputs.split(1), labels(problem, quantity), strict=True):
        outputs = model(x.clone())
        gradients = [
            w**0.5
            * torch.autograd.grad(
                plain_loss(problem.loss.name, outputs, y[None]).sum(), seen["output"], retain_graph=True
            )[0]
            for w, y in weighted
        ]
        a = unfolded(seen["input"])
        names = dict(module.named_parameters())
        a = torch.cat([a, torch.ones_like(a[:, :1])], dim=1) if names.get("bias") is not None else a
        yield a, [flattened(g) for g in gradients]


def factors(problem: Problem, quantity: Quantity, name: str, sharing: str) -> tuple[Tensor, Tensor]:
    """Return K-FAC's ``A`` and ``S`` by their definition."""
    a_total, s_total = torch.zeros(()), torch.zeros(())
    for a, gradients in positions(problem, quantity, name):
        if sharing == "reduce":
            a, gradients = a.mean(dim=0, keepdim=True), [g.sum(dim=0, keepdim=True) for g in gradients]
        a_total = a_total + a.mT @ a / len(a)
        s_total = s_total + sum(g.mT @ g for g in gradients)
    return a_total / N, s_total / N


class TestFactors:
    @pytest.mark.parametrize(("name", "sharing", "quantity"), MODELS)
    def test_kfac(self, name: str, sharing: str, quantity: Quantity) -> None:
        self.check(case(name).problem, quantity, sharing)

    @pytest.mark.parametrize("quantity", QUANTITIES, ids=str)
    @pytest.mark.parametrize("loss", LOSSES)
    def test_losses(self, loss: str, quantity: Quantity) -> None:
        """Every loss with every quantity; models and sharings alternate."""
        k = LOSSES.index(loss) + QUANTITIES.index(quantity)
        name = ("mlp", "tokens", "same padding")[k % 3]
        self.check(case(name, loss=loss).problem, quantity, SHARINGS[k % 2])

    def check(self, problem: Problem, quantity: Quantity, sharing: str) -> None:
        tensors = computed(problem, quantity, KFACStructure(sharing))
        for layer in {key.partition("|")[0] for key in tensors}:
            # A parameter that is frozen has no row: the oracle's factors are of weight and bias.
            a, s = factors(problem, quantity, layer, sharing)
            assert_same(tensors[f"{layer}|S"], s)
            size = len(tensors[f"{layer}|A"])
            assert_same(tensors[f"{layer}|A"], a[-1:, -1:] if size == 1 else a[:size, :size])

    @pytest.mark.parametrize(("name", "sharing", "quantity"), MODELS)
    def test_ekfac(self, name: str, sharing: str, quantity: Quantity) -> None:
        """The bases diagonalise K-FAC's factors, and the values are second moments of the true gradients in them."""
        problem = case(name).problem
        tensors = computed(problem, quantity, EKFACStructure(sharing))
        kfac = computed(problem, quantity, KFACStructure(sharing))
        for layer in {key.partition("|")[0] for key in tensors}:
            for side in ("A", "S"):
                basis, factor = tensors[f"{layer}|U_{side}"], kfac[f"{layer}|{side}"]
                assert_same(basis.mT @ basis, torch.eye(len(basis), dtype=basis.dtype))
                rotated = basis.mT @ factor @ basis
                assert_same(rotated, rotated.diagonal().diag())
            u_a, u_s = tensors[f"{layer}|U_A"], tensors[f"{layer}|U_S"]
            values = torch.zeros_like(tensors[f"{layer}|values"])
            for a, gradients in positions(problem, quantity, layer):
                a = a[:, -1:] if len(u_a) == 1 else a[:, : len(u_a)]
                values += sum((u_s.mT @ g.mT @ a @ u_a).square() for g in gradients) / N
            assert_same(tensors[f"{layer}|values"], values)

    @pytest.mark.parametrize(
        "structure", [KFACStructure(), KFACStructure("reduce"), EKFACStructure(), EKFACStructure("reduce")], ids=str
    )
    @pytest.mark.parametrize("quantity", QUANTITIES, ids=str)
    def test_batches_do_not_matter(self, quantity: Quantity, structure: Kronecker) -> None:
        whole = case("tokens")
        loader = DataLoader(TensorDataset(whole.inputs, whole.targets), batch_size=2, drop_last=True)
        uneven = list(zip(whole.inputs.split([4, 1, 2]), whole.targets.split([4, 1, 2]), strict=True))
        for data, n in ((loader, N - 1), (uneven, N)):
            one = Problem(whole.model, whole.loss, (whole.inputs[:n], whole.targets[:n]))
            expected = self.matrix(one, quantity, structure, None)
            for size in (None, 1, 5):
                assert_same(
                    self.matrix(Problem(whole.model, whole.loss, data), quantity, structure, size), expected, 1e-9
                )

    def matrix(self, problem: Problem, quantity: Quantity, structure: Kronecker, size: int | None) -> Tensor:
        """The matrix of one layer, which does not depend on the basis within an eigenspace."""
        t = computed(problem, quantity, structure, size=size)
        if structure.name == "kfac":
            return torch.kron(t["out|S"], t["out|A"])
        basis = torch.kron(t["out|U_S"], t["out|U_A"])
        return basis @ t["out|values"].flatten().diag() @ basis.mT

    @pytest.mark.parametrize("structure", [KFACStructure(), EKFACStructure()], ids=str)
    @pytest.mark.parametrize("params", [["*.weight"], ["*.bias"], ["2.*", "0.bias"]], ids=str)
    def test_some_parameters(self, params: list[str], structure: Kronecker) -> None:
        problem = case("mlp").problem
        space = ParameterSpace.of(problem.model, params)
        tensors = computed(problem, Fisher(), structure, params)
        expected = torch_func.compute(problem, Fisher(), structure, space, None, no_progress).tensors
        assert tensors.keys() == expected.keys()
        for key, tensor in tensors.items():
            assert tensor.shape == expected[key].shape
            if "|U_" not in key:  # whose signs are free
                assert_same(tensor, expected[key])

    def test_low_rank_and_float32(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An eigensolver in float32 may not converge for these factors, so it is not used."""
        eigh = torch.linalg.eigh

        def in_double(matrix: Tensor) -> tuple[Tensor, Tensor]:
            assert matrix.dtype == torch.float64
            return eigh(matrix)

        monkeypatch.setattr(torch.linalg, "eigh", in_double)
        model = nn.Sequential(nn.Linear(300, 4), nn.ReLU(), nn.Linear(4, CLASSES))
        x = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
        problem = Problem(model, "cross_entropy", (x, torch.arange(5) % CLASSES))
        tensors = computed(problem, Fisher(), EKFACStructure())
        basis = tensors["0|U_A"].double()
        assert basis.shape == (301, 301)
        assert tensors["0|U_A"].dtype == torch.float32
        assert (basis.mT @ basis - torch.eye(301)).abs().max() < 1e-5

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_saturated_softmax(self, dtype: torch.dtype) -> None:
        """The probability of a class rounds to one."""
        model = nn.Linear(2, CLASSES, bias=False).double()
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[30.0, 0.0], [0.0, 0.0], [0.0, 0.1]]))
        x, y = torch.ones(3, 2, dtype=torch.float64), torch.tensor([0, 1, 2])
        expected = computed(Problem(model, "cross_entropy", (x, y)), Fisher(), KFACStructure())
        actual = computed(Problem(deepcopy(model).to(dtype), "cross_entropy", (x, y)), Fisher(), KFACStructure())
        assert actual["|S"].max() < 1e-12
        assert_same(actual["|S"].double(), expected["|S"], rtol=1e-5)


@pytest.mark.parametrize("name", WITHOUT_HESSIAN)
def test_hessians_that_torch_func_does_not_have(name: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"curvlinops cannot.*{WITHOUT_HESSIAN[name]}.*torch can"):
        estimate(case(name).problem, "hessian", "implicit", backend="curvlinops")


@pytest.mark.parametrize(
    ("name", "quantity"), [(name, (*QUANTITIES[:3], Hessian())[i % 4]) for i, name in enumerate(ZOO)]
)
def test_products(name: str, quantity: Quantity) -> None:
    """Every model with one quantity; test_estimator_matrix.py has all of them."""
    problem = case(name).problem
    space = problem.space
    if isinstance(quantity, Hessian) and name in WITHOUT_HESSIAN:
        quantity = GGN()
    assert BACKEND.obstacle(problem, quantity, ImplicitStructure(), space) is None
    matrix = torch_func.compute(problem, quantity, DenseStructure(), space, None, no_progress).tensors["matrix"]
    vectors = torch.randn(space.total, 2, dtype=problem.dtype, generator=torch.Generator().manual_seed(1))
    assert BACKEND.product is not None
    assert_same(BACKEND.product(problem, quantity, space, 3)(vectors), matrix @ vectors)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("quantity", [*QUANTITIES, Hessian()], ids=str)
def test_products_with_some_parameters_for_each_loss(quantity: Quantity, loss: str) -> None:
    problem = case("mlp", loss=loss).problem
    matrix = estimate(problem, quantity, "implicit", backend="curvlinops", params=["2.*", "0.bias"], batch_size=2)
    assert matrix.info.backend == "curvlinops"
    assert_same(matrix.to_dense(), estimate(problem, quantity, "dense", params=["2.*", "0.bias"]).to_dense())


@pytest.mark.parametrize("name", ["lstm", "attention"])
def test_products_in_float32(name: str) -> None:
    """The fused kernels have no forward-mode derivative."""
    whole = case(name)
    single = Problem(deepcopy(whole.model).float(), whole.loss, (whole.inputs.float(), whole.targets))
    actual = estimate(single, "fisher", "implicit", backend="curvlinops").to_dense()
    assert_same(actual.double(), estimate(whole.problem, "fisher", "dense").to_dense(), rtol=2e-5)


class Failing(nn.Module):
    """A model that fails in the second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        if bool((x > 100).any()):
            raise RuntimeError("the second batch")
        return self.fc(x)


class TestTheUsersModel:
    def model(self) -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True), Failing()).eval()
        model[0].bias.requires_grad_(False)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        return model.double()

    def assert_unchanged(self, model: nn.Module, act: Callable[[], object]) -> None:
        before = deepcopy(model)
        random = torch.get_rng_state()
        act()
        assert torch.equal(torch.get_rng_state(), random)
        for parameter, old in zip(model.parameters(), before.parameters(), strict=True):
            assert torch.equal(parameter, old)
            assert parameter.requires_grad == old.requires_grad
            assert torch.equal(parameter.grad, torch.ones_like(parameter))
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before.buffers(), strict=True))
        for module, was in zip(model.modules(), before.modules(), strict=True):
            assert module.training == was.training
            assert not module._forward_hooks
            assert not module._forward_pre_hooks

    @pytest.mark.parametrize("structure", [KFACStructure(), EKFACStructure("reduce"), ImplicitStructure()], ids=str)
    def test_is_as_it_was(self, structure: Kronecker | ImplicitStructure) -> None:
        model = self.model()
        problem = Problem(model, "cross_entropy", (torch.randn(N, 4), torch.arange(N) % CLASSES))

        def act() -> None:
            params = None if isinstance(structure, ImplicitStructure) else ["0.*", "3.*"]
            matrix = estimate(problem, Fisher(samples=2), structure, backend="curvlinops", params=params)
            assert matrix.to_dense().any()

        self.assert_unchanged(model, act)

    @pytest.mark.parametrize("structure", [KFACStructure(), EKFACStructure()], ids=str)
    def test_is_as_it_was_after_a_failure(self, structure: Kronecker) -> None:
        model = self.model()
        y = torch.arange(4) % CLASSES
        batches: list[Pair] = [(torch.randn(4, 4), y) for _ in range(3)]
        batches[1][0][3] = 1e6  # of the second batch, but none of the samples that are probed
        problem = Problem(model, "cross_entropy", batches)
        space = ParameterSpace.of(model, ["3.*"])

        def act() -> None:
            with pytest.raises(RuntimeError, match="the second batch"):
                BACKEND.compute(problem, Fisher(), structure, space, None, no_progress)

        self.assert_unchanged(model, act)

    def test_its_progress_ends_at_the_number_of_samples(self) -> None:
        problem = case("mlp").problem
        done: list[float] = []
        for structure in (KFACStructure(), EKFACStructure()):
            BACKEND.compute(problem, GGN(), structure, problem.space, 2, lambda n=1, /, **_: done.append(n))
        assert sum(done) == 2 * N


def image(layer: nn.Module) -> Problem:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Unflatten(1, (2, 4, 4)), deepcopy(layer), nn.Flatten(), nn.LazyLinear(CLASSES))
        model(torch.zeros(2, 32))
        return Problem(model.double().eval(), "cross_entropy", (torch.randn(N, 32), torch.arange(N) % CLASSES))


class TestRefusals:
    @pytest.mark.parametrize("structure", ["kfac", "ekfac"])
    @pytest.mark.parametrize(
        ("layer", "message"),
        [
            (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), r"Conv2d \(1\) assume zero.*circular"),
            (nn.Conv2d(2, 2, 2, padding="same"), r"Unequal padding"),
            (nn.Sequential(nn.Flatten(2), nn.Conv1d(2, 2, 3)), r"Conv2d layers only, not for Conv1d \(1.1\)"),
            (
                nn.Sequential(nn.Unflatten(2, (2, 2)), nn.Conv3d(2, 2, 2)),
                r"Linear and Conv2d layers only, not for Conv3d \(1.1\)",
            ),
            (nn.Conv2d(2, 2, 2, groups=2), r"one pair of full factors per module, not a block 1/group=0of2"),
        ],
        ids=["circular", "even same", "conv1d", "conv3d", "groups"],
    )
    def test_a_convolution(self, layer: nn.Module, message: str, structure: str) -> None:
        with pytest.raises(UnsupportedError, match=message):
            estimate(image(layer), "fisher", structure, backend="curvlinops")

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("module used twice", r"shared.weight belongs to Linear shared, which is called 2 times"),
            ("tied", r"first.weight is shared with second \(a tied weight\)"),
            ("raw parameters", r"scale belongs to Raw"),
            ("also functional", r"fc.weight belongs to Linear fc, but is also used elsewhere"),
            ("lstm", r"lstm.weight_ih_l0 belongs to LSTM"),
            ("attention", r"not a block attention.in_proj/group=0of3"),
            ("embedding", r"not a block 0/embedding"),
            ("batch norm", r"2.weight belongs to BatchNorm2d"),
            ("group norm, layer norm", r"2.weight belongs to GroupNorm"),
        ],
    )
    def test_a_module(self, name: str, message: str) -> None:
        with pytest.raises(UnsupportedError, match=message):
            estimate(case(name).problem, "fisher", "kfac", backend="curvlinops")

    def test_cells_that_it_does_not_have(self) -> None:
        problem = case("mlp").problem
        for quantity, structure in (("masq", "implicit"), ("hessian", "kfac"), ("fisher", "tkfac"), ("ggn", "dense")):
            with pytest.raises(CurvlabError):
                estimate(problem, quantity, structure, backend="curvlinops")

    def test_auto_takes_another(self) -> None:
        matrix = estimate(case("transformer block").problem, "hessian", "implicit")
        assert matrix.info.backend == "torch"


@pytest.mark.parametrize("functional", [False, True])
def test_an_embedding_with_a_padding_index_that_few_samples_do_not_show(functional: bool) -> None:
    """The row has no gradient, but the library's forward-mode derivative includes it."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(5, 3, padding_idx=None if functional else 0)
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = nn.functional.embedding(x, self.words.weight, padding_idx=0) if functional else self.words(x)
            out: Tensor = self.head(h.flatten(1))
            return out

    torch.manual_seed(0)
    words = torch.tensor([[1], [2], [3], [4], [0], [1], [2], [3], [4], [1]])
    problem = Problem(Net().double(), "squared_error", (words, torch.randn(10, 2).double()))
    with pytest.raises(UnsupportedError, match=r"includes the row of padding_idx.*backend torch can"):
        estimate(problem, "ggn", "implicit", backend="curvlinops")
    right = estimate(problem, "ggn", "dense", backend="torch").to_dense()
    vector = torch.randn(len(right)).double()
    torch.testing.assert_close(estimate(problem, "ggn", "implicit") @ vector, right @ vector, rtol=1e-10, atol=1e-12)
