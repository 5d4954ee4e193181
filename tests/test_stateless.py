"""Models called at other parameters: what is refused, and that nothing of a call stays on them."""

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from curvlab import estimate
from curvlab.errors import CurvlabError, UnsupportedError
from curvlab.problem import Problem
from curvlab.stateless import copy_model

N = 8
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) % 3


class Model(nn.Module):
    """Two layers, a buffer, an attribute, and a forward pass of any kind."""

    def __init__(self, forward: Callable[["Model", Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.given = nn.Linear(4, 5), nn.Linear(5, 3), forward
        self.register_buffer("buffer", torch.zeros(3))
        self.attribute: Any = None

    def forward(self, x: Tensor) -> Any:
        return self.given(self, x)

    def plain(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def problem(model: nn.Module) -> Problem:
    return Problem(model, "cross_entropy", (X, Y))


def state(model: nn.Module) -> list[Any]:
    """All that is held by a model and its modules, by value or identity."""
    tensors = [(n, id(t), t.tolist(), t.requires_grad) for n, t in (*model.named_parameters(), *model.named_buffers())]
    held = [
        {k: v if isinstance(v, (int, bool)) else (id(v), getattr(v, "grad_fn", None)) for k, v in vars(m).items()}
        for m in model.modules()
    ]
    return [tensors, held]


def derivatives(model: nn.Module) -> Tensor:
    """Return the squares of per-sample gradients, summed over the samples, by plain automatic differentiation."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = torch.zeros(sum(p.numel() for p in parameters))
    for x, y in zip(X, Y, strict=True):
        gradients = torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), parameters)
        total += torch.cat([g.flatten() for g in gradients]).square()
    return total / N


class TestRefused:
    @pytest.mark.parametrize(
        ("make", "told"),
        [
            (lambda: nn.DataParallel(mlp()), r"the model \(DataParallel\) splits a batch.*inside it, \.module"),
            (lambda: nn.Sequential(nn.DataParallel(mlp())), r"0 \(DataParallel\) splits a batch"),
            (lambda: torch.jit.script(mlp()), "scripted or traced module.*give the module from which it was made"),
            (lambda: torch.jit.trace(mlp(), X), "scripted or traced module"),
            (lambda: nn.Sequential(torch.jit.script(nn.Linear(4, 5)), nn.Linear(5, 3)), r"0 \(Recursive.* scripted"),
            (
                lambda: nn.Sequential(nn.LazyLinear(5), nn.Linear(5, 3)),
                r"parameter 0\.weight of a lazy module.*call the",
            ),
            (lambda: nn.Sequential(nn.Linear(4, 3), nn.LazyBatchNorm1d()), r"parameter 1\.weight of a lazy module"),
            (lambda: mlp().to("meta"), r"parameter 0\.weight is on the meta device"),
            (lambda: mlp().to(torch.float8_e4m3fn), "float8_e4m3fn; curvature needs a real floating dtype"),
            (lambda: X, "the model must be a torch.nn.Module, not Tensor"),
            (lambda: nn.Linear, "the model must be a torch.nn.Module, not the class Linear"),
        ],
    )
    @pytest.mark.filterwarnings("ignore")
    def test_modules(self, make: Callable[[], Any], told: str) -> None:
        with pytest.raises(CurvlabError, match=told):
            problem(make())

    def test_inference_parameters(self) -> None:
        with torch.inference_mode():
            model = mlp()
        with pytest.raises(CurvlabError, match=r"parameter 0\.weight was made under torch\.inference_mode"):
            problem(model)

    @pytest.mark.parametrize(
        ("forward", "told"),
        [
            (lambda m, x: m.plain(x)[:1].mean(), r"for one sample it returned \(\): give forward=lambda model, batch"),
            (lambda m, x: (m.plain(x),), r"one tensor .* not tuple: give forward=lambda model, batch"),
            (lambda m, x: m.plain(x).long(), "returns torch.int64; the losses"),
            (lambda m, x: m.plain(x) + 0j, "returns torch.complex64; the losses"),
            (lambda m, x: m.plain(x).detach(), "do not depend on its trainable parameters"),
            (torch.no_grad()(lambda m, x: m.plain(x)), "do not depend on its trainable parameters"),
            (torch.inference_mode()(lambda m, x: m.plain(x)), "do not depend on its trainable parameters"),
            (lambda m, x: torch.zeros(len(x), 3, requires_grad=True) * 1, "do not depend on its trainable parameters"),
            (lambda m, x: m.buffer.expand(len(x), 3), "do not depend on its trainable parameters"),
            (
                lambda m, x: m.missing(x),
                "Model raises an error on the first samples of the data: AttributeError: .*missing",
            ),
        ],
    )
    def test_forward_passes(self, forward: Callable[[Model, Tensor], Any], told: str) -> None:
        with pytest.raises(UnsupportedError, match=told):
            problem(Model(forward)).check()

    def test_parameters_by_another_way(self) -> None:
        """What holds a parameter since before the call does not see the one that it is called at."""
        first = Model(lambda m, x: m.b(F.linear(x, m.attribute.t())))
        first.attribute = first.a.weight.t()
        second = Model(lambda m, x: m.b(m.attribute(x)))
        second.attribute = functools.partial(F.linear, weight=second.a.weight)
        for model in (first, second):
            with pytest.raises(
                UnsupportedError, match=r"Model uses its parameter a\.weight through a tensor or a function"
            ):
                problem(model).check()


def clamped(model: Model, x: Tensor) -> Tensor:
    with torch.no_grad():
        model.a.weight.clamp_(-0.1, 0.1)
    return model.plain(x)


def clamped_data(model: Model, x: Tensor) -> Tensor:
    model.a.weight.data.clamp_(-0.1, 0.1)
    return model.plain(x)


def assigned(model: Model, x: Tensor) -> Tensor:
    model.a.weight.data = F.normalize(model.a.weight.data)
    return model.plain(x)


class TestWritten:
    @pytest.mark.parametrize("forward", [clamped, clamped_data, assigned])
    @pytest.mark.parametrize("frozen", [False, True])
    def test_parameters(self, forward: Callable[[Model, Tensor], Tensor], frozen: bool) -> None:
        model = Model(forward)
        model.a.weight.requires_grad_(not frozen)
        before = state(model)
        with pytest.raises(UnsupportedError, match=r"writes into its parameter a\.weight \(Linear\).*write it once"):
            problem(model).check()
        assert state(model) == before

    def test_max_norm(self) -> None:
        model = nn.Sequential(nn.Embedding(7, 4, max_norm=0.5), nn.Flatten(), nn.Linear(8, 3))
        before = state(model)
        with pytest.raises(UnsupportedError, match=r"0\.weight \(Embedding\).*set max_norm to None"):
            Problem(model, "cross_entropy", (torch.arange(16).reshape(8, 2) % 7, Y)).check()
        assert state(model) == before

    def test_attributes(self) -> None:
        """Also of a module that holds no parameter; a view of a weight stays one."""

        def writing(model: Model, x: Tensor) -> Tensor:
            model.inner.attribute[: len(x)] = model.plain(x).detach()
            return model.plain(x)

        model = Model(writing)
        model.inner = nn.Identity()
        model.inner.attribute = torch.zeros(N, 3)
        with pytest.raises(
            UnsupportedError, match=r"writes into its attribute inner\.attribute, which is not a buffer"
        ):
            problem(model).check()
        assert not bool(model.inner.attribute.any())

    def test_a_later_write_is_seen_too(self) -> None:
        """In ``forward``, where ``check`` has not been."""
        at = problem(Model(clamped))
        with pytest.raises(UnsupportedError, match=r"writes into its parameter a\.weight"):
            at.forward({name: p.clone() for name, p in at.parameters().items()}, X)


def counted(model: Model, x: Tensor) -> Tensor:
    model.calls = getattr(model, "calls", 0) + 1
    return model.plain(x)


def kept(model: Model, x: Tensor) -> Tensor:
    if model.attribute is None:
        model.attribute = model.a.weight * 1
    return model.b(F.linear(x, model.attribute))


def registered(model: Model, x: Tensor) -> Tensor:
    model.register_buffer("seen", x.mean(0))
    model.buffer = model.buffer + 1
    return model.plain(x)


def switched(model: Model, x: Tensor) -> Tensor:
    model.train(not model.training)
    return model.plain(x)


class TestNothingStays:
    @pytest.mark.parametrize("forward", [counted, kept, registered, switched])
    def test_what_a_forward_pass_sets(self, forward: Callable[[Model, Tensor], Tensor]) -> None:
        model = Model(forward)
        before = state(model)
        at = problem(model)
        at.check()
        at.forward(at.parameters(), X)
        assert state(model) == before
        copy.deepcopy(model)
        found = estimate(at, "empirical_fisher", "diag", backend="torch").diagonal()
        if forward is not kept:  # of which a plain call leaves a graph that a second one cannot use
            torch.testing.assert_close(found, derivatives(model))

    @pytest.mark.parametrize("norm", ["pruned", "weight_norm", "spectral_norm", "parametrized"])
    @pytest.mark.filterwarnings("ignore")
    def test_weights_that_are_computed(self, norm: str) -> None:
        model = mlp()
        if norm == "pruned":
            prune.l1_unstructured(model[0], "weight", 0.3)
        elif norm == "weight_norm":
            nn.utils.weight_norm(model[0])
        elif norm == "spectral_norm":
            nn.utils.spectral_norm(model[0])
        else:
            parametrizations.orthogonal(model[2])
        model.eval()
        with torch.no_grad():
            model(X)  # from now on the computed weight has no graph, and the model can be copied
        copy.deepcopy(model)
        before = state(model)
        at = problem(model)
        for backend in ("torch", "backpack", "nngeometry"):
            try:
                estimate(at, "empirical_fisher", "diag", backend=backend)
            except UnsupportedError:
                assert backend != "torch"
        estimate(at, "ggn", "implicit") @ torch.ones(at.space.total)
        assert state(model) == before
        copy.deepcopy(model)

    def test_a_copy_of_what_torch_does_not_copy(self) -> None:
        model = mlp()
        prune.l1_unstructured(model[0], "weight", 0.3)
        with pytest.raises(RuntimeError, match="deepcopy"):
            copy.deepcopy(model)
        torch.testing.assert_close(copy_model(model)(X), model(X))

    def test_a_copy_that_cannot_be_made(self) -> None:
        model = mlp()
        model.register_buffer("graph", torch.eye(3).to_sparse_csr())
        assert copy_model(model).graph is not model.graph
        model.held = (value for value in [1])
        with pytest.raises(UnsupportedError, match=r"Sequential cannot be copied .*generator"):
            copy_model(model)

    def test_filters_of_warnings(self) -> None:
        before = list(warnings.filters)
        estimate(problem(mlp()), "empirical_fisher", "diag")
        assert warnings.filters == before


class TestRight:
    @pytest.mark.parametrize("kind", ["whole", "inside", "in place"])
    def test_compiled(self, kind: str) -> None:
        """The original runs, and the names are those of the model that was given."""
        plain = mlp()
        model: nn.Module = copy.deepcopy(plain)
        if kind == "whole":
            model = torch.compile(model, backend="eager")
        elif kind == "inside":
            model[0] = torch.compile(model[0], backend="eager")
        else:
            model.compile(backend="eager")
        at = problem(model)
        assert at.space.names == tuple(dict(model.named_parameters()))
        found = estimate(at, "empirical_fisher", "diag", backend="torch").diagonal()
        torch.testing.assert_close(found, derivatives(plain))
        assert (model._compiled_call_impl is not None) == (kind == "in place")

    def test_cached_parametrizations(self) -> None:
        model = mlp()
        parametrizations.orthogonal(model[2])
        expected = estimate(problem(model), "empirical_fisher", "diag", backend="torch").diagonal()
        with parametrize.cached():
            model(X)
            weight = model[2].weight
            found = estimate(problem(model), "empirical_fisher", "diag", backend="torch").diagonal()
            assert model[2].weight is weight
        torch.testing.assert_close(found, expected)

    def test_outputs_of_another_dtype(self) -> None:
        for change in (torch.Tensor.double, torch.Tensor.half):
            at = problem(Model(lambda m, x, change=change: change(m.plain(x))))
            assert at.forward(at.parameters(), X).dtype == torch.float32
            assert at.forward({n: p.double() for n, p in at.parameters().items()}, X.double()).dtype == torch.float64

    def test_frozen_parameters_of_other_kinds(self) -> None:
        model = mlp()
        model.register_parameter("codes", nn.Parameter(torch.arange(3), requires_grad=False))
        model.register_parameter("waves", nn.Parameter(torch.ones(2) + 0j, requires_grad=False))
        found = estimate(problem(model), "empirical_fisher", "diag", backend="torch").diagonal()
        torch.testing.assert_close(found, derivatives(model))

    @pytest.mark.parametrize(
        "buffer", [torch.eye(3).to_sparse(), torch.eye(3).to(torch.float8_e4m3fn), torch.ones(3).to(torch.uint16)]
    )
    def test_buffers_of_other_kinds(self, buffer: Tensor) -> None:
        model = mlp()
        model.register_buffer("buffer", buffer)
        problem(model).check()

    def test_autocast(self) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with pytest.raises(UnsupportedError, match=r"torch\.autocast is on around this call"):
                estimate(problem(mlp()), "fisher", "diag")
            at = problem(mlp())
            with pytest.raises(UnsupportedError, match="call curvlab outside of it"):
                at.forward(at.parameters(), X)

        def inside(model: Model, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return model.plain(x)

        at = problem(Model(inside))
        at.check()
        assert at.forward(at.parameters(), X).dtype == torch.float32

    def test_another_model_on_the_same_data(self) -> None:
        at = problem(mlp())
        at.check()
        other = at.with_model(nn.Linear(4, 3))
        assert other.space.names == ("weight", "bias")
        assert at.space.names[0] == "0.weight"
        assert torch.equal(other.probe()[0][0], at.probe()[0][0])
        assert other.num_samples == N
