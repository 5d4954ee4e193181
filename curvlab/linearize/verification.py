"""Verification of a linearized model against its plain forward and backward pass, at its first call.

Forward derivatives can differ from backward passes: hooks may change gradients, a part may run without gradients, or a
fast path may be used if nothing is trained. A copy can still use the weights of the original model through a closure.
These cases are not searched for individually: outputs and gradients are compared, and the used tensors are recorded.
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
from curvlab.linearize.point import iterate_parameters, point_value
from curvlab.linearize.pushforward import Arguments, Keywords
from curvlab.randomness import preserve_random_state

Push = Callable[[nn.Module, Arguments, Keywords], tuple[Tensor, Tensor]]


class Origin:
    """Weak references to the original of a copied model, whose tensors the copy must not use.

    ``deepcopy`` returns the same object; pickling stores nothing.

    Args:
        model: The original model; None if it is unknown.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        modules = [] if model is None else list(model.named_modules())
        self._modules = [(name, ref(module)) for name, module in modules]
        # A closure may keep only a tensor.
        self._tensors = [(name, ref(tensor)) for name, tensor in _tensors(modules)]

    def __deepcopy__(self, _: object) -> "Origin":
        return self

    def __reduce__(self) -> tuple[type["Origin"], tuple[()]]:
        return Origin, ()

    def tensors(self) -> list[tuple[str, Tensor]]:
        """Return the remaining tensors of the original, with their names."""
        modules = [(name, module) for name, reference in self._modules if (module := reference()) is not None]
        tensors = [(name, tensor) for name, reference in self._tensors if (tensor := reference()) is not None]
        return [*tensors, *_tensors(modules)]


def check(model: nn.Module, inputs: Arguments, keywords: Keywords, push: Push, origin: Origin) -> None:
    """Check the outputs and gradients of a linearized model against the model at the point of linearization.

    Args:
        model: The copied model, with its point of linearization.
        inputs: Positional arguments of a call.
        keywords: Keyword arguments of the call.
        push: The function that returns the outputs at the point and their change.
        origin: The original of the copy.

    Raises:
        UnsupportedError: Outputs or gradients differ, or torch cannot differentiate the model.
    """
    name = type(model).__name__
    # Copies, because the caller's tensors may be from inference mode, which does not support backward passes.
    inputs, keywords = tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, (inputs, dict(keywords)))
    function, at, _ = pushforward.function(model, inputs, keywords)
    # NumPy's generator, because a random draw of torch would count as one of the model.
    generator = np.random.default_rng(0)

    def random(like: Tensor) -> Tensor:
        return torch.from_numpy(generator.standard_normal(tuple(like.shape))).to(like)

    with preserve_random_state(), pushforward.use_forward_mode_kernels(model), _record_uses(model, origin) as foreign:
        leaves = {key: value.detach().clone().requires_grad_() for key, value in at.items()}
        outputs = function(leaves)
    if foreign:
        raise UnsupportedError(
            f"{name} cannot be linearized: it uses {foreign[0]} directly and not through its module, as in a hook or "
            "forward that is a closure over a model; use the module that the hook receives, or write a method of a "
            "class"
        )
    pushforward.require_tensor(model, outputs)
    along = random(outputs)
    with preserve_random_state(), _convert_errors(name):
        plain = _gradients(outputs, leaves, along)
    moved = {key: (at[key] + _displacement_scale(at[key]) * random(at[key])).detach().requires_grad_() for key in at}
    slots = {f"model.{key}": value for key, value in moved.items()}
    with preserve_random_state():
        point, change = functional_call(_PushModule(model, push), slots, (inputs, keywords), tie_weights=False)
    with preserve_random_state(), _convert_errors(name):
        linear = _gradients(change, moved, along)
    outputs, point, change = outputs.detach(), point.detach(), change.detach()
    eps = _precision(outputs)
    largest = max([float(gradient.norm()) for gradient in plain.values()], default=0.0)
    displacement = {key: value.detach() - at[key] for key, value in moved.items()}
    # Rounding errors of a gradient can be as large as those of the largest gradient.
    wrong = [
        key
        for key in plain
        if not _is_close(linear[key], plain[key], 10 * eps**0.5 * float(plain[key].norm()) + 100 * eps * largest)
    ]
    pairs = [(along, change), *((plain[key], displacement[key]) for key in plain)]
    pushed, *pulled = (float((a.double() * b.double()).sum()) for a, b in pairs)
    size = sum(float(a.double().norm() * b.double().norm()) for a, b in pairs)
    if not _is_close(point, outputs, 10 * eps**0.5 * float(outputs.norm())):
        raise UnsupportedError(
            f"{name} cannot be linearized: its outputs differ between a differentiated call and a plain call, as those "
            "of a frozen TransformerEncoder do at masked positions; call its encoder with enable_nested_tensor=False "
            "or without the mask"
        )
    if wrong or not abs(sum(pulled) - pushed) <= 10 * eps**0.5 * size:
        raise UnsupportedError(
            f"{name} cannot be linearized: its forward derivative differs from its backward passes"
            + (f", in {wrong[0]}" if wrong else "")
            + ", for example because a part runs under torch.no_grad() or a hook changes gradients; use detach() "
            "there, or remove the hook"
        )


class _PushModule(nn.Module):
    """The function for the outputs at the point and their change, as a module."""

    def __init__(self, model: nn.Module, push: Push) -> None:
        super().__init__()
        self.model, self._push = model, push
        self.training = model.training

    def forward(self, inputs: Arguments, keywords: Keywords) -> tuple[Tensor, Tensor]:
        return self._push(self.model, inputs, keywords)


class _Watch(TorchDispatchMode):
    """A dispatch mode that records which tensors with given addresses are used."""

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
def _record_uses(model: nn.Module, origin: Origin) -> Iterator[list[str]]:
    """Yield a list of parameter names of the original or the model that are used inside the block.

    The block calls the model with other leaves in place of its parameters; a use of the parameters themselves would
    have no derivative.
    """
    own = {
        _address(parameter): name
        for name, module, key, parameter in iterate_parameters(model)
        if point_value(module, key) is not None
    }
    # Held until the end of the block: an address that is freed inside it could become that of a leaf.
    held = origin.tensors()
    addresses = {_address(tensor): name for name, tensor in held} | own
    with _Watch({address: name for address, name in addresses.items() if address}) as watch:
        yield watch.used
    del held


@contextmanager
def _convert_errors(name: str) -> Iterator[None]:
    """Convert an error of torch in a backward pass to an error message of one sentence."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            yield
    except (CurvlabError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UnsupportedError(
            f"{name} cannot be linearized: torch cannot differentiate it ({first_line(error)}); remove "
            "the named operation or checkpoint from it"
        ) from error


def _gradients(outputs: Tensor, leaves: Mapping[str, Tensor], along: Tensor) -> dict[str, Tensor]:
    if not outputs.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    found = torch.autograd.grad(outputs, list(leaves.values()), along, allow_unused=True, materialize_grads=True)
    dense = (gradient.to_dense() if gradient.is_sparse else gradient for gradient in found)
    return dict(zip(leaves, dense, strict=True))


def _displacement_scale(value: Tensor) -> float:
    """Return the displacement of a parameter: about its own magnitude, so that no digits are lost."""
    return max(float(value.norm()) / sqrt(max(value.numel(), 1)), 0.01)


def _precision(outputs: Tensor) -> float:
    """Return the expected relative rounding error of outputs."""
    eps: float = torch.finfo(torch.bfloat16 if pushforward.rounds(outputs) else outputs.dtype).eps
    return eps


def _is_close(one: Tensor, other: Tensor, bound: float) -> bool:
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
    """Return the address of the entries of a tensor, or 0 if it is not known."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse, or wrapped by torch.func
        return 0
