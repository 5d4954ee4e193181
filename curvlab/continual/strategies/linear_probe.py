"""Training of the last layer on fixed features."""

from typing import TYPE_CHECKING

from curvlab.continual.strategies.base import Strategy
from curvlab.continual.strategies.last_layer import find_last_linear

if TYPE_CHECKING:
    from curvlab.continual.learner import Learner


class LinearProbe(Strategy):
    """Linear probing: train only the last ``nn.Linear`` on each task, on fixed features.

    The last layer is the one that returns the outputs of the network. All other modules are in eval mode, so that
    BatchNorm statistics do not change and Dropout is inactive; features are the same in training and evaluation.
    """

    def start(self, learner: "Learner") -> None:
        """Implement the hook of ``Strategy``.

        Raises:
            CurvlabError: The outputs of the network are not the outputs of an ``nn.Linear``.
        """
        self.last = find_last_linear(learner, "LinearProbe")
        last = learner.model.get_submodule(self.last)
        for p in learner.parameters.values():
            p.requires_grad_(any(p is own for own in last.parameters()))

    def before_task(self, learner: "Learner") -> None:
        """Implement the hook of ``Strategy``."""
        learner.model.eval()
        learner.model.get_submodule(self.last).train()
