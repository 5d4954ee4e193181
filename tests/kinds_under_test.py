"""Networks as people write them, with code that no list of kinds of modules shows, and plain loops over them."""

import threading
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.nn.utils import weight_norm as older_weight_norm
from torch.utils.checkpoint import checkpoint

from curvlab.problem import Problem

CLASSES, N = 3, 6


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES))


def layer_of(model: nn.Sequential) -> nn.Linear:
    layer = model[0]
    assert isinstance(layer, nn.Linear)
    return layer


# Right ---------------------------------------------------------------------------------------------------------------


def pruned() -> nn.Module:
    model = mlp()
    prune.l1_unstructured(model[0], "weight", 0.3)
    return model


def weight_normed() -> nn.Module:
    model = mlp()
    older_weight_norm(model[0])
    return model


def low_rank_by_closure() -> nn.Module:
    """A hook of one layer that has the layer, as written, in its closure."""
    model = mlp()
    layer = layer_of(model)
    layer.down, layer.up = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.zeros(5, 2))
    layer.register_forward_hook(lambda _, given, output: output + given[0] @ layer.down.T @ layer.up.T)
    return model


def low_rank_module_by_closure() -> nn.Module:
    model = mlp()
    extra = nn.Linear(4, 5, bias=False)
    layer_of(model).extra = extra
    layer_of(model).register_forward_hook(lambda _, given, output: output + extra(given[0]))
    return model


def patched_by_method() -> nn.Module:
    model = mlp()
    layer = layer_of(model)
    layer.forward = types.MethodType(lambda self, x: F.linear(x, self.weight * 2, self.bias) ** 2, layer)  # type: ignore[method-assign]
    return model


def patched_by_closure() -> nn.Module:
    model = mlp()
    layer = layer_of(model)
    plain = layer.forward
    layer.forward = lambda x: plain(x) ** 2 + layer.bias  # type: ignore[method-assign]
    return model


class Locked(nn.Module):
    """Cannot be copied; normalises and, in train mode, drops."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, CLASSES))
        self.net(torch.randn(20, 4))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            return self.net(x)


class Views(nn.Module):
    """In-place operations on an output that is a view."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(2, 3), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, 2, 2)
        y = self.first(tokens)
        y[:, 0].mul_(3)
        y += tokens.sum(dim=-1, keepdim=True)
        return self.out(F.relu(y, inplace=True).flatten(1))


class Force(nn.Module):
    """A derivative in its forward pass, in one of the ways that torch has."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.net, self.way = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)), way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "grad":
            x.requires_grad_()
            slope = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)[0]
        elif self.way == "vmap":
            slope = torch.func.vmap(torch.func.grad(lambda one: self.net(one).sum()))(x)
        else:
            value, along = torch.func.jvp(self.net, (x,), (torch.ones_like(x),))
            slope = torch.cat([value, along, value * along], dim=1)
        return -slope[:, :CLASSES]


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.net, self.reentrant = mlp(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.net[0](x)
        again: Any = checkpoint(lambda h: self.net[1](self.net[0](h[:, :4])), hidden, use_reentrant=self.reentrant)
        return self.net[2](again)


class CheckpointedLocked(Checkpointed):
    """Recomputes, in its backward pass, with whatever its weights are by then."""

    def __init__(self) -> None:
        super().__init__(reentrant=False)
        self.lock = threading.Lock()


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, CLASSES, 2))

    def forward(self, x: Tensor) -> Tensor:
        z = x.to(torch.complex128) @ torch.view_as_complex(self.weight)
        return (z * z.conj()).real + z.imag


class Embedded(nn.Module):
    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(9, 4, sparse=True), nn.Linear(4, CLASSES)
        self.functional = functional

    def forward(self, x: Tensor) -> Tensor:
        indices = (4 * x[:, 0].detach().abs()).long().clamp(max=8)
        if self.functional:
            return self.out(F.embedding(indices, self.embedding.weight, sparse=True).tanh())
        return self.out(self.embedding(indices).tanh())


class UsedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.first(x).tanh() @ self.first.weight.t() @ self.first.weight.t())


class Casting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x)


RIGHT: dict[str, Callable[[], nn.Module]] = {
    "pruned": pruned,
    "weight_norm": weight_normed,
    "a low rank by a closure": low_rank_by_closure,
    "a low rank of a module by a closure": low_rank_module_by_closure,
    "a forward patched by a method": patched_by_method,
    "a forward patched by a closure": patched_by_closure,
    "not copyable": Locked,
    "in place on views": Views,
    "autograd.grad in the forward": lambda: Force("grad"),
    "vmap(grad) in the forward": lambda: Force("vmap"),
    "func.jvp in the forward": lambda: Force("jvp"),
    "checkpoint": lambda: Checkpointed(reentrant=False),
    "view_as_complex": Complex,
    "sparse embedding": lambda: Embedded(functional=False),
    "functional sparse embedding": lambda: Embedded(functional=True),
    "a weight used again": UsedTwice,
    "autocast within": Casting,
}


# Refused, by whatever takes gradients --------------------------------------------------------------------------------


def parameter_in_a_closure() -> nn.Module:
    model = mlp()
    weight = nn.Parameter(torch.randn(5, 4, dtype=torch.float64))
    layer_of(model).extra = weight
    model[0].register_forward_hook(lambda _, given, output: output + given[0] @ weight.T)
    return model


class InAList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = [nn.Parameter(torch.randn(4, 4, dtype=torch.float64)) for _ in range(2)]
        for index, weight in enumerate(self.weights):
            self.register_parameter(f"w{index}", weight)
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((x @ self.weights[0]).tanh() @ self.weights[1])


class Remembers(nn.Module):
    """A weight that is computed once."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp().double()
        self.doubled = self.net[0].weight * 2

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2]((x @ self.doubled.T).tanh())


class _Reversible(Function):
    """Adds to the gradients of its module's parameters itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x)
        return module(x).detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            ctx.module(x).backward(gradient)
        return x.grad, None


class Reversible(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.net = nn.Linear(4, 4), mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](_Reversible.apply(self.first(x), self.net[0]))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a parameter in a closure": (
        parameter_in_a_closure,
        r"Sequential uses its parameter 0\.extra through a tensor or a function",
    ),
    "parameters in a list": (InAList, "InAList uses its parameter w0 through a tensor"),
    "a weight computed once": (Remembers, r"Remembers uses its parameter net\.0\.weight through a tensor"),
    "its own backward passes": (Reversible, "backward pass of Reversible adds to its parameters' grad itself"),
    "re-entrant checkpoint": (
        lambda: Checkpointed(reentrant=True),
        "torch cannot differentiate Checkpointed: When use_reentrant=True",
    ),
}


def problem_of(build: Callable[[], nn.Module]) -> Problem:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build().double()
        return Problem(model, "cross_entropy", (torch.randn(N, 4).double(), torch.randint(CLASSES, (N,))))


def plainly(problem: Problem, quantity: str) -> Tensor:
    """The matrix, by the model's own parameters and backward passes alone."""
    model, (x, y) = problem.model, problem.data
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradient(value: Tensor, keep: bool = False) -> Tensor:
        slopes = torch.autograd.grad(
            value, parameters, create_graph=keep, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return torch.cat([slope.to_dense().flatten() for slope in slopes])

    if quantity == "hessian":
        slope = gradient(F.cross_entropy(model(x.clone()), y), keep=True)
        matrix = torch.stack([gradient(entry) for entry in slope])
    elif quantity.startswith("masq"):
        pairs = zip(x.split(2), y.split(2), strict=True)
        rows = [gradient(F.cross_entropy(model(a.clone()), b, reduction="sum")) for a, b in pairs]
        matrix = torch.stack(rows).mT @ torch.stack(rows) / len(x)
    else:
        rows = []
        for one, label in zip(x.split(1), y, strict=True):
            log_p = model(one.clone()).log_softmax(dim=1)[0]
            weights = log_p.exp().detach() if quantity == "ggn" else F.one_hot(label, CLASSES)
            rows += [weight.sqrt() * gradient(entry) for weight, entry in zip(weights, log_p, strict=True)]
        matrix = torch.stack(rows).mT @ torch.stack(rows) / len(x)
    return matrix
