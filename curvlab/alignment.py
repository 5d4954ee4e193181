"""Which output belongs to which target: what is found from the first batch, where nobody said it."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from curvlab.batches import map_tensors
from curvlab.errors import UnsupportedError
from curvlab.interface import Interface, own_loss, two_dimensional
from curvlab.likelihoods import CrossEntropy, Likelihood, Terms
from curvlab.randomness import preserve_random_state
from curvlab.stateless import call


@dataclass(frozen=True)
class Alignment:
    """Finds the rest of an interface, and options of the likelihood that the model's own loss has.

    Attributes:
        own_labels: Whether the model computes a loss from ``labels`` by itself, which may shift them.
        torch_layout: Whether the classes are where ``nn.CrossEntropyLoss`` takes them, unless only the last dimension
            fits the targets.
    """

    own_labels: bool
    torch_layout: bool

    def find(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        interface: Interface,
        batch: Any,
        place: Callable[[Tensor], Tensor],
    ) -> tuple[Interface, Likelihood]:
        """Return the complete interface and likelihood.

        Args:
            model: The model, of which no module draws random numbers.
            likelihood: The likelihood of a term.
            interface: What the user said.
            batch: The first batch of the data.
            place: Function that returns a tensor on the device of the model and in its dtype.

        Raises:
            UnsupportedError: The model's own loss has another value with and without a shift, or the targets fit the
                outputs with the classes in either dimension.
        """
        if self.own_labels and isinstance(batch, Mapping) and "labels" in batch:
            interface, likelihood = _match_labels(model, likelihood, interface, batch, place)
        outputs, targets = _first_shapes(model, interface, batch, place) if self._asks_shapes(interface) else ((), ())
        if self.torch_layout and len(outputs) > 1:
            interface = replace(interface, class_dim=_find_class_dim(outputs, targets))
        if interface.class_dim != -1 and len(outputs) > 1 and targets == outputs:
            interface = replace(interface, moves_targets=True)
        return interface, likelihood

    def _asks_shapes(self, interface: Interface) -> bool:
        return self.torch_layout or interface.class_dim != -1


def _match_labels(
    model: nn.Module, likelihood: Likelihood, interface: Interface, batch: Any, place: Callable[[Tensor], Tensor]
) -> tuple[Interface, Likelihood]:
    """Align outputs and labels as the model's own loss does: a causal language model shifts them by one.

    Raises:
        UnsupportedError: The model's own loss has another value with and without a shift.
    """
    with preserve_random_state(model.modules()), torch.no_grad():
        own = own_loss(model, batch, place)
        if own is None:
            return interface, likelihood
        if isinstance(likelihood, CrossEntropy) and likelihood.ignore_index is None:
            likelihood = replace(likelihood, ignore_index=-100)  # as all of these models
        # A model with a decoder, which takes the labels before, makes its inputs from them.
        interface = replace(interface, decoder_inputs=getattr(model, "prepare_decoder_input_ids_from_labels", None))
        values = {}
        for shift in (0, 1):
            with suppress(Exception):  # the outputs and labels may not fit
                values[shift] = _mean_over_terms(model, likelihood, replace(interface, shift=shift), batch, place)
    is_half = min(parameter.dtype.itemsize for parameter in model.parameters()) < torch.float32.itemsize
    tolerance = 2e-2 if is_half else 1e-5  # the model may round its loss
    for shift, value in sorted(values.items(), key=lambda item: abs(item[1] - own)):
        if abs(value - own) <= tolerance * abs(own) + 1e-7:
            return replace(interface, shift=shift), likelihood
    tried = " and ".join(f"{value:.6g} {('without', 'with')[shift]} a shift" for shift, value in values.items())
    raise UnsupportedError(
        f"the loss that {type(model).__name__} computes from its labels is {own:.6g} on the first batch, but "
        f"{likelihood} gives {tried or 'an error'}: give the loss, forward=... and targets=... that you mean"
    )


def _mean_over_terms(
    model: nn.Module, likelihood: Likelihood, interface: Interface, batch: Any, place: Callable[[Tensor], Tensor]
) -> float:
    inputs, targets = interface.split(batch, "batch 0")
    inputs, targets = map_tensors(inputs, place), place(targets)
    terms = Terms(likelihood, "term")
    outputs = terms.flatten(two_dimensional(interface.outputs(model, inputs)))
    return float(terms.values(outputs, targets).sum()) / terms.count(targets)


def _first_shapes(
    model: nn.Module, interface: Interface, batch: Any, place: Callable[[Tensor], Tensor]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of the model's own outputs and of the targets of the first sample; empty if it fails."""
    plain = replace(interface, class_dim=-1)
    with preserve_random_state(model.modules()), suppress(Exception):  # a check says why
        inputs, targets = (part[:1] for part in plain.split(batch, "batch 0"))
        found = call(model, dict(model.named_parameters()), map_tensors(inputs, place), plain.outputs)
        return tuple(found.shape[1:]), tuple(targets.shape[1:])
    return (), ()


def _find_class_dim(outputs: tuple[int, ...], targets: tuple[int, ...]) -> int:
    """Return the dimension of the classes: torch has them in the second one, most language models in the last one.

    Args:
        outputs: Shape of the outputs of a sample.
        targets: Shape of its targets.

    Raises:
        UnsupportedError: The targets fit both.
    """
    second, last = targets in (outputs, outputs[1:]), targets in (outputs, outputs[:-1])
    if second and last:
        raise UnsupportedError(
            f"nn.CrossEntropyLoss takes the classes in dimension 1 of the outputs, but outputs {outputs} of a "
            f"sample with targets {targets} could also have them in the last: give class_dim=1 or class_dim=-1"
        )
    return 1 if second else -1
