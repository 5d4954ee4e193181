"""A linearized model against its own plain forward and backward pass, at its first call.

Forward derivatives pass by much that a model can have: what a hook does to gradients, a part without gradients, a fast
path that is taken where nothing is trained. A copy can use the weights of the model that it was made from, which a
closure keeps. None of that is looked up: outputs and gradients are compared, and the tensors that are used are watched.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import sqrt
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from curvlab.errors import CurvlabError, UnsupportedError, first_line
from curvlab.linearize import pushforward
from curvlab.linearize.point import parameters_of, value_at
from curvlab.linearize.pushforward import Arguments, Keywords
from curvlab.randomness import preserved_random_state

Push = Callable[[nn.Module, Arguments, Keywords], tuple[Tensor, Tensor]]


class Origin:
    """The model that another was copied from, without keeping it: no tensor of it may be used by the copy.

    A copy of this is itself, and a file holds nothing of it.

    Args:
        model: The original; None for one that is not known.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        modules = [] if model is None else list(model.named_modules())
        self._modules = [(name, ref(module)) for name, module in modules]
        # A closure may keep a tensor alone.
        self._tensors = [(name, ref(tensor)) for name, tensor in _tensors(modules)]

    def __deepcopy__(self, _: object) -> "Origin":
        return self

    def __reduce__(self) -> tuple[type["Origin"], tuple[()]]:
        return Origin, ()

    def storages(self) -> dict[int, str]:
        """Return where the tensors of the original that are still there have their entries, and their names."""
        modules = [(name, module) for name, reference in self._modules if (module := reference()) is not None]
        tensors = [(name, tensor) for name, reference in self._tensors if (tensor := reference()) is not None]
        return {_address(tensor): name for name, tensor in [*tensors, *_tensors(modules)]}


def check(model: nn.Module, inputs: Arguments, keywords: Keywords, push: Push, origin: Origin) -> None:
    """Make sure that outputs and gradients of a linearized model are those of the model at the point of linearization.

    Args:
        model: The copy, with its point of linearization.
        inputs: Of a call.
        keywords: Of that call.
        push: What gives the outputs at the point and their change.
        origin: What the copy was made from.

    Raises:
        UnsupportedError: They are others, or torch cannot differentiate the model.
    """
    name = type(model).__name__
    # A caller's may be of inference mode, which no backward pass takes.
    inputs, keywords = tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, (inputs, dict(keywords)))
    function, at, _ = pushforward.function(model, inputs, keywords)
    # NumPy's: a draw of torch's in a forward pass is taken for one of the model.
    generator = np.random.default_rng(0)

    def random(like: Tensor) -> Tensor:
        return torch.from_numpy(generator.standard_normal(tuple(like.shape))).to(like)

    with preserved_random_state(), pushforward.random_as_in_forward_mode(model), _used(model, origin) as foreign:
        leaves = {key: value.detach().clone().requires_grad_() for key, value in at.items()}
        outputs = function(leaves)
    if foreign:
        raise UnsupportedError(
            f"{name} cannot be linearized: it uses {foreign[0]} past its module, as a hook or a forward that is a "
            "closure over a model does; write it with the module that it is given, or as a method of a class"
        )
    pushforward.require_tensor(model, outputs)
    along = random(outputs)
    with preserved_random_state(), _differentiated(name):
        plain = _gradients(outputs, leaves, along)
    moved = {key: (at[key] + _part(at[key]) * random(at[key])).detach().requires_grad_() for key in at}
    slots = {f"model.{key}": value for key, value in moved.items()}
    with preserved_random_state():
        point, change = functional_call(_Pushed(model, push), slots, (inputs, keywords), tie_weights=False)
    with preserved_random_state(), _differentiated(name):
        linear = _gradients(change, moved, along)
    outputs, point, change = outputs.detach(), point.detach(), change.detach()
    eps = _precision(outputs)
    largest = max([float(gradient.norm()) for gradient in plain.values()], default=0.0)
    displacement = {key: value.detach() - at[key] for key, value in moved.items()}
    # The part of a gradient that is rounding is as large as that of the others.
    wrong = [
        key
        for key in plain
        if not _close(linear[key], plain[key], 10 * eps**0.5 * float(plain[key].norm()) + 100 * eps * largest)
    ]
    pairs = [(along, change), *((plain[key], displacement[key]) for key in plain)]
    pushed, *pulled = (float((a.double() * b.double()).sum()) for a, b in pairs)
    size = sum(float(a.double().norm() * b.double().norm()) for a, b in pairs)
    if not _close(point, outputs, 10 * eps**0.5 * float(outputs.norm())):
        raise UnsupportedError(
            f"{name} cannot be linearized: where it is differentiated it gives other outputs than where it is called, "
            "as a frozen TransformerEncoder does for masked places; call its encoder with enable_nested_tensor=False "
            "or without the mask"
        )
    if wrong or not abs(sum(pulled) - pushed) <= 10 * eps**0.5 * size:
        raise UnsupportedError(
            f"{name} cannot be linearized: its forward derivative is not that of its backward passes"
            + (f", in {wrong[0]}" if wrong else "")
            + ", as where a part of it runs under torch.no_grad() or a hook changes gradients; use detach() there, or "
            "remove the hook"
        )


class _Pushed(nn.Module):
    """What gives the outputs at the point and their change, as a module."""

    def __init__(self, model: nn.Module, push: Push) -> None:
        super().__init__()
        self.model, self._push = model, push
        self.training = model.training

    def forward(self, inputs: Arguments, keywords: Keywords) -> tuple[Tensor, Tensor]:
        return self._push(self.model, inputs, keywords)


class _Watch(TorchDispatchMode):
    """Notes which tensors of some storages are used."""

    def __init__(self, storages: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages, self.used = storages, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and (name := self.storages.get(_address(tensor))) is not None:
                self.used.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def _used(model: nn.Module, origin: Origin) -> Iterator[list[str]]:
    """Yield the names of the parameters that are used within, of the original or of the model itself.

    In the place of the model's stand leaves; what it uses besides has no derivative here.
    """
    own = {
        _address(parameter): name
        for name, module, key, parameter in parameters_of(model)
        if value_at(module, key) is not None
    }
    with _Watch({address: name for address, name in (origin.storages() | own).items() if address}) as watch:
        yield watch.used


@contextmanager
def _differentiated(name: str) -> Iterator[None]:
    """Turn what torch raises in a backward pass into one sentence."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            yield
    except (CurvlabError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UnsupportedError(
            f"{name} cannot be linearized: torch cannot differentiate it ({first_line(error)}); take "
            "the checkpoint or the operation that is named out of it"
        ) from error


def _gradients(outputs: Tensor, leaves: Mapping[str, Tensor], along: Tensor) -> dict[str, Tensor]:
    if not outputs.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    found = torch.autograd.grad(outputs, list(leaves.values()), along, allow_unused=True, materialize_grads=True)
    dense = (gradient.to_dense() if gradient.is_sparse else gradient for gradient in found)
    return dict(zip(leaves, dense, strict=True))


def _part(value: Tensor) -> float:
    """Return how far to move a parameter: about as much as it is large, so that no digits are lost."""
    return max(float(value.norm()) / sqrt(max(value.numel(), 1)), 0.01)


def _precision(outputs: Tensor) -> float:
    """Return the rounding that is to be expected of outputs."""
    eps: float = torch.finfo(torch.bfloat16 if pushforward.rounds(outputs) else outputs.dtype).eps
    return eps


def _close(one: Tensor, other: Tensor, bound: float) -> bool:
    same = one.isfinite() == other.isfinite()
    difference = torch.where(one.isfinite() & other.isfinite(), one.double() - other.double(), 0)
    return one.shape == other.shape and bool(same.all()) and float(difference.norm()) <= bound


def _tensors(modules: list[tuple[str, nn.Module]]) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in modules:
        for held in (module._parameters, module._buffers, vars(module)):
            for key, tensor in held.items():
                if isinstance(tensor, Tensor):
                    yield f"{prefix}.{key}".removeprefix("."), tensor


def _address(tensor: Tensor) -> int:
    """Return where the entries of a tensor are; 0 where it has none, or none that can be told."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse, or wrapped by torch.func
        return 0
