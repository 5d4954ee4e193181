"""The methods that the analysis ``methods`` compares: all that there is to say of each, and nowhere else."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from curvlab.analyze.frame.search import Candidate
from curvlab.continual import Task
from curvlab.continual.strategies import AGEM, ER, EWC, Joint, Naive, Strategy


@dataclass(frozen=True)
class Method:
    """A method.

    Attributes:
        label: What it is called.
        help: What it is, if the label does not say so.
        make: Makes it of a configuration, with the method's options as attributes, a candidate, and the tasks.
        lists: What is tuned beside the batch size, and the option that has its values.
        options: Options that are of this method, and of no other that does not name them too.
    """

    label: str
    help: str
    make: Callable[[Any, Candidate, Sequence[Task]], Strategy]
    lists: Mapping[str, str] = field(default_factory=lambda: {"lr": "lrs"})
    options: tuple[str, ...] = ()

    @property
    def hyper_parameters(self) -> Mapping[str, str]:
        """What is tuned, and the option that has its values."""
        return {"lr": self.lists["lr"], "batch_size": "batch_sizes", **self.lists}


def _make_ewc(config: Any, candidate: Candidate, _: Sequence[Task]) -> EWC:
    return EWC(
        candidate["strength"],
        quantity=config.quantity,
        structure=config.structure,
        samples=config.samples,
        mode=config.ewc_mode,
    )


def _make_er(config: Any, _: Candidate, tasks: Sequence[Task]) -> ER:
    classes = sum(task.dataset.num_classes if task.classes is None else len(task.classes) for task in tasks)
    return ER(config.per_class * classes, batch_size=config.replay_batch_size)


#: By name, in the paper's order.
METHODS: Mapping[str, Method] = {
    "naive": Method("Naive SGD", "", lambda *_: Naive()),
    "ewc": Method(
        "EWC",
        "",
        _make_ewc,
        {"lr": "ewc_lrs", "strength": "ewc_strengths"},
        ("samples", "quantity", "structure", "ewc_mode"),
    ),
    "agem": Method(
        "A-GEM",
        "",
        lambda config, *_: AGEM(config.per_class, batch_size=config.replay_batch_size),
        options=("per_class", "replay_batch_size"),
    ),
    "er": Method("ER-Reservoir", "", _make_er, options=("per_class", "replay_batch_size")),
    "stable": Method(
        "Stable SGD",
        "naive with a falling rate and dropout",
        lambda *_: Naive(),
        {"lr": "stable_lrs", "decay": "decays", "dropout": "dropouts"},
    ),
    "joint": Method("multi-task (joint)", "all tasks at once", lambda *_: Joint()),
}
#: All that is tuned of some method.
HYPER_PARAMETERS = tuple(dict.fromkeys(name for method in METHODS.values() for name in method.hyper_parameters))


def label_method(name: str) -> str:
    """Return what a method is called; another name, such as that of a stream, as it is."""
    return METHODS[name].label if name in METHODS else name
