"""Training the last layer on features that stay as they are."""

from typing import TYPE_CHECKING

from torch import nn

from curvlab.continual.strategies.base import Strategy
from curvlab.errors import CurvlabError

if TYPE_CHECKING:
    from curvlab.continual.learner import Learner


class LinearProbe(Strategy):
    """Train the last ``nn.Linear`` alone, task after task, on features that are the same in training and evaluation.

    All other modules are in eval mode, so that BatchNorm does not move and Dropout drops nothing.
    """

    def start(self, learner: "Learner") -> None:
        """See ``Strategy``.

        Raises:
            CurvlabError: The outputs of the network are not those of its last linear layer.
        """
        last = self._last(learner)
        for p in learner.parameters.values():
            p.requires_grad_(any(p is own for own in last.parameters()))

    def before_task(self, learner: "Learner") -> None:
        """See ``Strategy``."""
        learner.model.eval()
        self._last(learner).train()

    def _last(self, learner: "Learner") -> nn.Linear:
        layers = [module for module in learner.model.modules() if isinstance(module, nn.Linear)]
        if not layers or layers[-1].out_features != learner.outputs.count:
            raise CurvlabError(
                f"LinearProbe trains the last nn.Linear, which must give the {learner.outputs.count} outputs of the "
                f"model; here it {f'gives {layers[-1].out_features}' if layers else 'does not exist'}"
            )
        return layers[-1]
