"""Training regimes for a stream of tasks: stable and plastic.

References:
    Mirzadeh et al. (2020), Understanding the role of training regimes in continual learning.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

from curvlab.errors import CurvlabError

_LOWEST_RATE = 5e-5


@dataclass(frozen=True)
class Regime:
    """Training regime (Mirzadeh et al. 2020).

    Their Stable SGD is naive fine-tuning with the stable regime: a high learning rate that decays from task to task,
    dropout, and small batches.

    Attributes:
        lr: Learning rate before the decay.
        decay: Factor on the learning rate from one task to the next.
        batch_size: Samples per step.
        dropout: Dropout probability of the hidden units.
        batch_decay: Factor on the batch size from one task to the next.

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
    batch_decay: float = 1.0

    @classmethod
    def of(cls, config: Any, name: str) -> "Regime":
        """Return a regime by name; ``stable-dropout``, for example, is stable with the dropout of plastic.

        Args:
            config: Object with the values of both regimes as attributes ``stable_lr``, ``plastic_lr`` and so on, and
                with ``batch_decay``.
            name: ``stable``, ``plastic``, ``stable-X`` or ``plastic+X``, where X is ``lr``, ``decay``, ``batch_size``
                or ``dropout``; ``stable+shrinking`` or ``plastic+shrinking``, whose batch size has the factor
                ``batch_decay``.

        Raises:
            CurvlabError: The name is unknown.
        """
        if name in ("stable+shrinking", "plastic+shrinking"):
            return replace(cls.of(config, name.partition("+")[0]), batch_decay=config.batch_decay)
        keys = [field.name for field in fields(cls) if field.name != "batch_decay"]
        if name not in ("stable", "plastic", *(f"stable-{key}" for key in keys), *(f"plastic+{key}" for key in keys)):
            raise CurvlabError(
                f"a regime is stable, plastic, stable-X or plastic+X, with X one of {', '.join(keys)}, or "
                f"stable+shrinking or plastic+shrinking, not {name!r}"
            )
        stable, plastic = (cls(*(getattr(config, f"{kind}_{key}") for key in keys)) for kind in ("stable", "plastic"))
        own, other = (stable, plastic) if name.startswith("stable") else (plastic, stable)
        changed = name.replace("+", "-").partition("-")[2]
        return replace(own, **{changed: getattr(other, changed)}) if changed else own

    def rate(self, task: int) -> float:
        """Return the learning rate of task 1, 2, ...; it is already decayed for task 1, as in the authors' code."""
        return max(self.lr * self.decay**task, _LOWEST_RATE)

    def size(self, task: int) -> int:
        """Return the batch size of task 1, 2, ..., at least 1."""
        return max(round(self.batch_size * self.batch_decay ** (task - 1)), 1)

    def options(self, tasks: int = 1) -> dict[str, Any]:
        """Return the options for ``curvlab.continual.run``; dropout is an option of the network.

        Args:
            tasks: Length of the stream, for a batch size that changes from task to task.
        """
        sizes = self.batch_size if self.batch_decay == 1 else [self.size(task) for task in range(1, tasks + 1)]
        rates = {"lr": self.lr * self.decay, "lr_decay": self.decay, "min_lr": _LOWEST_RATE}
        return {**rates, "batch_size": sizes}


def describe_regime(name: str) -> str:
    """Return a description of a regime.

    Examples:
        >>> describe_regime("stable-batch_size"), describe_regime("plastic+lr"), describe_regime("stable")
        ('stable, batch size of plastic', 'plastic, lr of stable', 'stable')
    """
    if name.endswith("+shrinking"):
        return f"{name.partition('+')[0]}, shrinking batches"
    own, _, exchanged = name.replace("+", "-").partition("-")
    other = "plastic" if own == "stable" else "stable"
    return f"{own}, {exchanged.replace('_', ' ')} of {other}" if exchanged else own
