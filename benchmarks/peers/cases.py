"""What a case of a peer's suite is: its model, loss and data as data, and how ``Problem`` takes them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


def inputs_and_targets(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Return the outputs and targets of a batch as the loops of most peers do."""
    inputs, targets = batch
    return model(inputs), targets


@dataclass(frozen=True)
class Case:
    """A case: what the peer's own test takes, each made by a function, in this order and with one seed.

    Attributes:
        name: Name of the case, unique in its suite.
        model: Function that returns the model.
        loss: Function that returns the loss of ``torch.nn``.
        data: Function that returns the batches.
        params: Patterns of the parameters that the case selects; None for all trainable ones.
        options: Arguments of ``Problem`` that the case needs besides model, loss and data.
        call: The peer's loop: model and batch to outputs and targets, in the layout that the loss takes.
        rewritten: What had to be written in another way than in the peer's suite; empty if nothing.
        closed_form: Products of the Hessian in closed form with vectors ``(P, K)``, of the model, the batches and the
            vectors; None if the peer has none.
        exact: Kronecker structures that the peer's test wants to be equal to the GGN in this case.
        refused_by_peer: Whether the peer's own test wants an error.
        seed: Seed of torch before the model is made.
    """

    name: str
    model: Callable[[], nn.Module]
    loss: Callable[[], nn.Module]
    data: Callable[[], Any]
    params: tuple[str, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    call: Callable[[nn.Module, Any], tuple[Tensor, Tensor]] = inputs_and_targets
    rewritten: str = ""
    closed_form: Callable[[nn.Module, Any, Tensor], Tensor] | None = None
    exact: tuple[str, ...] = ()
    refused_by_peer: bool = False
    seed: int = 0

    @property
    def way(self) -> str:
        """How the case is expressed: ``as it is``, ``with class_dim``, ``with a function`` or ``rewritten``.

        The unit is no other way: it says what the peer's mean is over.
        """
        if self.rewritten:
            return "rewritten"
        if {"forward", "targets"} & set(self.options):
            return "with a function"
        return "with class_dim" if "class_dim" in self.options else "as it is"

    def make(self) -> tuple[nn.Module, nn.Module, Any]:
        """Return the model in float64, the loss and the data."""
        torch.manual_seed(self.seed)
        model = self.model().double()
        return model, self.loss().double(), self.data()


class Composed(nn.Module):
    """A module from a function of tensors, for the layers that a peer writes as classes of its own."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Any:
        """Return the function's value."""
        return self.function(*tensors)


def classes(*shape: int, number: int) -> Tensor:
    """Return random labels."""
    return torch.randint(number, shape)


def zeros_and_ones(*shape: int) -> Tensor:
    """Return random binary targets."""
    return torch.randint(2, shape).float()
