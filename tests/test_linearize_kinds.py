"""What people do to networks besides writing layers: the linearized copy is right, or it is refused in one sentence."""

import gc
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm
from torch.utils.checkpoint import checkpoint

from curvlab import UnsupportedError, linearize
from curvlab.linearize import Linearized

X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def net(activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), activation(), nn.Linear(4, 3)).double()


class With(nn.Module):
    """A network, and what is done with its outputs or instead of its call."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self._forward = net(), forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self.net, x)


class Square(torch.autograd.Function):
    """With both derivatives; subclasses spoil one."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient * ctx.saved_tensors[0]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 2 * tangent * ctx.saved_tensors[0]


class WrongBackward(Square):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 3 * gradient * ctx.saved_tensors[0]


class ZeroForward(Square):
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return torch.zeros_like(tangent)


class WithoutForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient * ctx.saved_tensors[0]


class Equilibrium(nn.Module):
    """A fixed point, found without gradients, whose derivative is a hook on the backward pass of one more step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
        with torch.no_grad():
            self.inner.weight.mul_(0.3)

    def forward(self, x: Tensor) -> Tensor:
        def step(z: Tensor) -> Tensor:
            return torch.tanh(self.inner(z) + self.outer(x))

        with torch.no_grad():
            z = torch.zeros_like(x)
            for _ in range(30):
                z = step(z)
        z = step(z)
        if z.requires_grad:
            at = z.detach().requires_grad_()
            again = step(at)

            def solved(gradient: Tensor) -> Tensor:
                total = gradient
                for _ in range(30):
                    total = torch.autograd.grad(again, at, total, retain_graph=True)[0] + gradient
                return total

            z.register_hook(solved)
        return z


class Encoder(nn.Module):
    """A frozen encoder of sequences, some of whose places are masked, before a layer that is trained."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.encoder, self.masked = nn.TransformerEncoder(layer, 2).requires_grad_(False), masked
        self.fc = nn.Linear(4, 3)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        places = torch.stack([x, x.sin(), x.cos()], 1)
        mask = torch.zeros(len(x), 3, dtype=torch.bool)
        mask[:, 2] = x[:, 0] > 0
        return self.fc(self.encoder(places, src_key_padding_mask=mask if self.masked else None)).mean(1)


def patched(which: str) -> nn.Module:
    model = net()
    module = model.get_submodule(which)
    original = module.forward
    module.forward = lambda x: 2 * original(x)
    return model


def hooked(frozen: bool = False) -> nn.Module:
    model = net()
    model[0].requires_grad_(not frozen)
    weight = model[0].weight
    model[2].register_forward_hook(lambda _, __, output: output + weight.sum())
    return model


def orphan() -> Linearized:
    linear = linearize(hooked())  # the original is gone, but for what the closure keeps
    linear.get_submodule("2")
    return linear


def hooked_itself(called_before: bool) -> Linearized:
    linear = linearize(net())
    if called_before:
        linear(X)
    weight = linear.get_parameter("0.weight")
    linear.get_submodule("2").register_forward_hook(lambda _, __, output: output + weight.sum())
    return linear


def backward_hooked(factor: float | None, activation: type[nn.Module], before: bool = False) -> nn.Module:
    model = net(activation)
    if before:
        model[0].register_full_backward_pre_hook(lambda _, gradients: tuple(factor * g for g in gradients))
    else:
        model[2].register_full_backward_hook(
            lambda _, gradients, __: None if factor is None else tuple(factor * g for g in gradients)
        )
    return model


def saved_on_cpu(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return model(x)


def views_in_place(model: nn.Module, x: Tensor) -> Tensor:
    h = model(x).clone()
    h[:, 0].mul_(2)
    h[:, 1:].add_(h[:, :1])
    h.view(-1)[::2].exp_()
    return h


def without_gradients(model: nn.Module, x: Tensor) -> Tensor:
    h = model(x)
    with torch.no_grad():
        total = h.sum()
    return h * total


def pruned() -> nn.Module:
    return prune.l1_unstructured(net()[0], "weight", 0.3)


def inside(module: nn.Module) -> nn.Module:
    model = net()
    model[0] = module
    return model


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrized() -> nn.Module:
    model = net()
    parametrize.register_parametrization(model[2], "weight", Doubled())
    return model


CONSTANT = torch.full((3,), 2.0, dtype=torch.float64)


def with_constant() -> nn.Module:
    model = net()
    model[2].register_forward_hook(lambda _, __, output: output * CONSTANT)
    return model


RIGHT: dict[str, Callable[[], nn.Module]] = {
    "frozen encoder": lambda: Encoder(False),
    "tensors saved on the CPU": lambda: With(saved_on_cpu),
    "in-place operations on views": lambda: With(views_in_place),
    "detach": lambda: With(lambda m, x: m(x) * m(x).detach().sum()),
    "a function with both derivatives": lambda: With(lambda m, x: Square.apply(m(x))),
    "pruning": lambda: inside(pruned()),
    "a parametrization": parametrized,
    "spectral_norm": lambda: inside(parametrizations.spectral_norm(net()[0])).eval(),
    "the older spectral_norm": lambda: inside(spectral_norm(net()[0])).eval(),
    "a constant in a closure": with_constant,
    "a backward hook that looks on": lambda: backward_hooked(None, nn.ReLU),
}

PAST = "not through its module"
BACKWARD = "differs from its backward passes"
MISSING = "no forward derivative"
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a patched forward": (lambda: patched(""), PAST),
    "a patched forward of a layer": (lambda: patched("0"), PAST),
    "a hook that is a closure": (hooked, PAST),
    "a hook that is a closure over what is frozen": (lambda: hooked(frozen=True), PAST),
    "a hook that is a closure, of a model that is gone": (orphan, PAST),
    "a closure over the linearized model": (lambda: hooked_itself(False), PAST),
    "a closure over the linearized model, later": (lambda: hooked_itself(True), PAST),
    "a frozen encoder with masked places": (lambda: Encoder(True), "outputs differ"),
    "a checkpoint": (lambda: With(lambda m, x: checkpoint(m, x, use_reentrant=False)), "checkpoint"),
    "a re-entrant checkpoint": (lambda: With(lambda m, x: checkpoint(m[1:], m[0](x), use_reentrant=True)), ""),
    "a fixed point": (Equilibrium, BACKWARD),
    "a backward hook": (lambda: backward_hooked(2.0, nn.Tanh), BACKWARD),
    "a backward hook, with rules": (lambda: backward_hooked(2.0, nn.ReLU), BACKWARD),
    "a backward pre-hook": (lambda: backward_hooked(2.0, nn.Tanh, before=True), BACKWARD),
    "weight_norm": (lambda: inside(parametrizations.weight_norm(net()[0])), MISSING),
    "the older weight_norm": (lambda: inside(older_weight_norm(net()[0])), MISSING),
    "a function without forward derivative": (lambda: With(lambda m, x: WithoutForward.apply(m(x))), MISSING),
    "a function with a wrong derivative": (lambda: With(lambda m, x: WrongBackward.apply(m(x))), BACKWARD),
    "a function whose forward derivative is zero": (lambda: With(lambda m, x: ZeroForward.apply(m(x))), BACKWARD),
    "a part without gradients": (lambda: With(without_gradients), BACKWARD),
    "a scripted module": (lambda: torch.jit.trace(net(), X), "scripted or traced"),
    "a lazy module": (lambda: nn.Sequential(nn.LazyLinear(3)), "no shape"),
}


def older_weight_norm(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module)


@contextmanager
def torchs_own_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        for said in (
            "Full backward hook is firing",
            "The PyTorch API of nested tensors",
            "`torch.jit",
            "None of the inp",
        ):
            warnings.filterwarnings("ignore", said)
        yield


@pytest.mark.parametrize("name", RIGHT)
def test_right(name: str) -> None:
    """Outputs and gradients at moved weights are those of plain backward passes of the model itself."""
    with torchs_own_warnings():
        model = RIGHT[name]()
        linear = linearize(model)
        outputs = model(X.clone())
        theirs = {key: p for key, p in model.named_parameters() if p.requires_grad}
        rows = [
            torch.autograd.grad(f, theirs.values(), retain_graph=True, allow_unused=True, materialize_grads=True)
            for f in outputs.flatten()
        ]
        jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        ours = [linear.get_parameter(key) for key in theirs]
        assert torch.allclose(linear(X.clone()), outputs, rtol=0, atol=1e-10)
        generator = torch.Generator().manual_seed(2)
        way = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in ours]
        with torch.no_grad():
            for p, step in zip(ours, way, strict=True):
                p.add_(step)
        moved = linear(X.clone())
        change = (jacobian @ torch.cat([step.flatten() for step in way])).view_as(outputs)
        assert torch.allclose(moved, outputs + change, rtol=0, atol=1e-10)
        along = torch.randn(outputs.shape, dtype=outputs.dtype, generator=generator)
        found = torch.autograd.grad(moved, ours, along, allow_unused=True, materialize_grads=True)
        gradient = torch.cat([g.flatten() for g in found])
        assert torch.allclose(gradient, along.flatten() @ jacobian, rtol=0, atol=1e-10)
        assert torch.equal(deepcopy(linear)(X), linear(X))


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    model, said = REFUSED[name]
    with torchs_own_warnings():
        made = model()
        for _ in range(2):  # not only the first time
            with pytest.raises(Exception) as caught:
                (made if isinstance(made, Linearized) else linearize(made))(X.clone())
            assert type(caught.value).__module__ == "curvlab.errors", repr(caught.value)
            assert said in str(caught.value)
            assert "\n" not in str(caught.value)


def test_global_hooks_are_refused() -> None:
    linear = linearize(net())
    expected = linear(X)
    handle = nn.modules.module.register_module_forward_hook(lambda _, __, output: 2 * output)
    try:
        with pytest.raises(UnsupportedError, match="global hook"):
            linear(X)
    finally:
        handle.remove()
    assert torch.equal(linear(X), expected)


def test_original_is_not_kept() -> None:
    """What a file holds is the linearized model, and nothing of the one that it was made from."""
    import gc
    import pickle
    from weakref import ref

    model = net()
    gone, linear = ref(model[0].weight), linearize(model)
    again = pickle.loads(pickle.dumps(linear))
    del model
    gc.collect()
    assert gone() is None
    assert torch.equal(again(X), linear(X))


def test_an_original_that_is_freed_during_the_check_keeps_its_addresses_until_the_end() -> None:
    """The check compares addresses of tensors; that of a freed one could become that of another, taken for a use."""
    kept, alive = list[nn.Module](), list[bool]()

    class FreesTheOriginal(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if kept:
                kept.clear()
                gc.collect()
                alive.append(weight() is not None)
            return x

    kept.append(nn.Sequential(nn.Linear(3, 4), FreesTheOriginal(), nn.Linear(4, 2)))
    weight = ref(kept[0].get_parameter("0.weight"))
    linear = linearize(kept[0])
    linear(torch.ones(2, 3))
    assert alive == [True]
    gc.collect()
    assert weight() is None


def test_filters_of_warnings_stay() -> None:
    """In a process of its own: what adds filters is loaded once."""
    code = (
        "import warnings, torch; from torch import nn; from curvlab import linearize\n"
        "model = nn.Sequential(nn.Linear(3, 3), nn.Tanh()); before = list(warnings.filters)\n"
        "linearize(model)(torch.ones(2, 3)); assert warnings.filters == before"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
