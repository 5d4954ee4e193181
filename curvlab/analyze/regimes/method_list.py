"""The methods of the analysis ``methods``: label, options, tuned hyper-parameters and strategy of each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from curvlab.analyze.frame.search import Candidate
from curvlab.continual import Task
from curvlab.continual.strategies import AGEM, ER, EWC, IMM, MAS, SI, Joint, LinearProbe, Naive, Oracle, Strategy


@dataclass(frozen=True)
class Method:
    """A method of continual learning.

    Attributes:
        label: Label in tables and figures.
        help: Explanation for ``--help``; empty if the label suffices.
        make: Function of a configuration, a candidate and the tasks that returns the strategy.
        lists: Tuned hyper-parameters except the batch size -> option with the values to try.
        options: Options of this method; methods that do not list them ignore them.
    """

    label: str
    help: str
    make: Callable[[Any, Candidate, Sequence[Task]], Strategy]
    lists: Mapping[str, str] = field(default_factory=lambda: {"lr": "lrs"})
    options: tuple[str, ...] = ()

    @property
    def hyper_parameters(self) -> Mapping[str, str]:
        """All tuned hyper-parameters -> option with the values to try."""
        return {"lr": self.lists["lr"], "batch_size": "batch_sizes", **self.lists}


_CURVATURE = ("samples", "quantity", "structure")


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


def _make_imm(config: Any, *_: Any) -> IMM:
    return IMM(quantity=config.quantity, structure=config.structure, samples=config.samples)


#: Name -> method: the paper's methods in the order of its table, then ours.
METHODS: Mapping[str, Method] = {
    "naive": Method("Naive SGD", "", lambda *_: Naive()),
    "ewc": Method(
        "EWC",
        "",
        _make_ewc,
        {"lr": "ewc_lrs", "strength": "ewc_strengths"},
        (*_CURVATURE, "ewc_mode"),
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
    "si": Method(
        "SI",
        "",
        lambda _, candidate, __: SI(candidate["strength"]),
        {"lr": "ewc_lrs", "strength": "si_strengths"},
    ),
    "mas": Method(
        "MAS",
        "",
        lambda config, candidate, _: MAS(candidate["strength"], samples=config.samples),
        {"lr": "ewc_lrs", "strength": "mas_strengths"},
        ("samples",),
    ),
    "imm": Method("mode-IMM", "merges the solutions of all tasks", _make_imm, options=_CURVATURE),
    "linear_probe": Method("linear probing", "trains the last layer only", lambda *_: LinearProbe()),
    "oracle": Method("oracle", "samples of every task so far at each step", lambda *_: Oracle()),
}
#: The methods of the paper's table.
PAPER = ("naive", "ewc", "agem", "er", "stable", "joint")
#: Hyper-parameters that are tuned for at least one method.
HYPER_PARAMETERS = tuple(dict.fromkeys(name for method in METHODS.values() for name in method.hyper_parameters))
#: Options that only some methods read.
OPTIONS = tuple(
    dict.fromkeys(name for method in METHODS.values() for name in (*method.lists.values(), *method.options))
)


def list_methods(option: str) -> tuple[str, ...]:
    """Return the methods that read an option of ``OPTIONS``."""
    return tuple(name for name, method in METHODS.items() if option in (*method.lists.values(), *method.options))


def label_method(name: str) -> str:
    """Return the label of a method; any other name, such as that of a stream, is returned unchanged."""
    return METHODS[name].label if name in METHODS else name
