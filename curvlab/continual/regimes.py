"""How a network is trained on a stream of tasks: what tells a stable training from a plastic one.

References:
    Mirzadeh et al. (2020), Understanding the role of training regimes in continual learning.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

from curvlab.errors import CurvlabError

_LOWEST_RATE = 5e-5


@dataclass(frozen=True)
class Regime:
    """How a network is trained on each task (Mirzadeh et al. 2020).

    Their Stable SGD is naive fine-tuning under such a regime: a high rate that falls from task to task, dropout, and
    small batches.

    Attributes:
        lr: Learning rate before the decay.
        decay: Its factor from a task to the next one.
        batch_size: Samples a step.
        dropout: Share of the hidden units left out.

    Examples:
        >>> stable = Regime(lr=0.1, decay=0.5, batch_size=16, dropout=0.25)
        >>> [stable.rate(task) for task in (1, 2, 3)]
        [0.05, 0.025, 0.0125]
        >>> stable.options()
        {'lr': 0.05, 'lr_decay': 0.5, 'min_lr': 5e-05, 'batch_size': 16}
    """

    lr: float
    decay: float
    batch_size: int
    dropout: float

    @classmethod
    def of(cls, config: Any, name: str) -> "Regime":
        """Return the regime of that name: ``stable``, ``stable-dropout`` (dropout as in plastic) and so on.

        Args:
            config: What has the numbers of both as ``stable_lr``, ``plastic_lr`` and so on.
            name: ``stable``, ``plastic``, ``stable-X`` or ``plastic+X``, with X of the attributes.

        Raises:
            CurvlabError: There is no such regime.
        """
        keys = [field.name for field in fields(cls)]
        if name not in ("stable", "plastic", *(f"stable-{key}" for key in keys), *(f"plastic+{key}" for key in keys)):
            raise CurvlabError(
                f"a regime is stable, plastic, stable-X or plastic+X, with X of {', '.join(keys)}, not {name!r}"
            )
        stable, plastic = (cls(*(getattr(config, f"{kind}_{key}") for key in keys)) for kind in ("stable", "plastic"))
        own, other = (stable, plastic) if name.startswith("stable") else (plastic, stable)
        changed = name.replace("+", "-").partition("-")[2]
        return replace(own, **{changed: getattr(other, changed)}) if changed else own

    def rate(self, task: int) -> float:
        """Return the learning rate of task 1, 2, ...; the first is decayed already, as in the authors' code."""
        return max(self.lr * self.decay**task, _LOWEST_RATE)

    def options(self) -> dict[str, Any]:
        """Return what ``curvlab.continual.run`` takes of it; dropout is the network's."""
        return {
            "lr": self.lr * self.decay,
            "lr_decay": self.decay,
            "min_lr": _LOWEST_RATE,
            "batch_size": self.batch_size,
        }


def describe_regime(name: str) -> str:
    """Return in words what a regime is.

    Examples:
        >>> describe_regime("stable-batch_size"), describe_regime("plastic+lr"), describe_regime("stable")
        ('stable, batch size of plastic', 'plastic, lr of stable', 'stable')
    """
    own, _, exchanged = name.replace("+", "-").partition("-")
    other = "plastic" if own == "stable" else "stable"
    return f"{own}, {exchanged.replace('_', ' ')} of {other}" if exchanged else own
