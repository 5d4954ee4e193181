"""Training the last layer on features that stay as they are."""

from typing import TYPE_CHECKING

from curvlab.continual.strategies.base import Strategy
from curvlab.continual.strategies.last_layer import last_linear

if TYPE_CHECKING:
    from curvlab.continual.learner import Learner


class LinearProbe(Strategy):
    """Train the last ``nn.Linear`` alone, task after task, on features that are the same in training and evaluation.

    It is the layer whose outputs are those of the network. All other modules are in eval mode, so that BatchNorm does
    not move and Dropout drops nothing.
    """

    def start(self, learner: "Learner") -> None:
        """See ``Strategy``.

        Raises:
            CurvlabError: The outputs of the network are not those of its last linear layer.
        """
        self.last = last_linear(learner, "LinearProbe")
        last = learner.model.get_submodule(self.last)
        for p in learner.parameters.values():
            p.requires_grad_(any(p is own for own in last.parameters()))

    def before_task(self, learner: "Learner") -> None:
        """See ``Strategy``."""
        learner.model.eval()
        learner.model.get_submodule(self.last).train()
