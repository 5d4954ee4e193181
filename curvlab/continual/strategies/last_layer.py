"""Search for the last linear layer of a network."""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from curvlab.errors import CurvlabError
from curvlab.linearize import outputs_at_point
from curvlab.training.samples import reference, take
from curvlab.training.state import restore_modes

if TYPE_CHECKING:
    from curvlab.continual.learner import Learner


def find_last_linear(learner: "Learner", method: str) -> str:
    """Return the name of the ``nn.Linear`` that returns the outputs of the network.

    The layer is found by a forward pass on one sample, because neither the order of registration nor the widths
    determine it.

    Args:
        learner: State of the run before the first task.
        method: Name of the method that needs the layer, for the error message.

    Raises:
        CurvlabError: There is no such layer: another operation follows it, or it is called more than once.
    """
    model = learner.model
    returned: dict[str, list[Any]] = {}

    def note(name: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        returned.setdefault(name, []).append(output)

    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    handles = [module.register_forward_hook(partial(note, name)) for name, module in layers.items()]
    try:
        with restore_modes(model), torch.no_grad():
            model.eval()
            x, _ = take(learner.stream[0].take(torch.arange(1)), slice(None), reference(model))
            outputs = outputs_at_point(model, x)
    finally:
        for handle in handles:
            handle.remove()
    found = [name for name, given in returned.items() if len(given) == 1 and given[0] is outputs]
    if len(found) != 1:
        raise CurvlabError(
            f"{method} needs a last layer: the outputs of the network must be the outputs of an nn.Linear, but those "
            f"of {type(model).__name__} are not; remove the operations after the last linear layer"
        )
    return found[0]
