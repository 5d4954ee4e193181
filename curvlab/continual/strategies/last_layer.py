"""The layer whose outputs are those of the network."""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from curvlab.errors import CurvlabError
from curvlab.linearize import outputs_at_point
from curvlab.training.samples import reference, take
from curvlab.training.state import preserve_modes

if TYPE_CHECKING:
    from curvlab.continual.learner import Learner


def last_linear(learner: "Learner", method: str) -> str:
    """Return the name of the ``nn.Linear`` whose outputs are those of the network, as it is seen on a sample.

    Neither the order in which layers are registered nor their widths say which one that is.

    Args:
        learner: The run, before the first task.
        method: What needs it, for the message.

    Raises:
        CurvlabError: There is none: something comes after it, or it is called more than once.
    """
    model = learner.model
    returned: dict[str, list[Any]] = {}

    def note(name: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        returned.setdefault(name, []).append(output)

    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    handles = [module.register_forward_hook(partial(note, name)) for name, module in layers.items()]
    try:
        with preserve_modes(model), torch.no_grad():
            model.eval()
            x, _ = take(learner.stream[0].take(torch.arange(1)), slice(None), reference(model))
            outputs = outputs_at_point(model, x)
    finally:
        for handle in handles:
            handle.remove()
    found = [name for name, given in returned.items() if len(given) == 1 and given[0] is outputs]
    if len(found) != 1:
        raise CurvlabError(
            f"{method} needs to know the last layer: the network's outputs must be what an nn.Linear returns, and "
            f"those of {type(model).__name__} are not; leave out what comes after it"
        )
    return found[0]
