"""What the analysis ``dlcft`` compares: settings, and methods with the network and the loss of each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from curvlab.continual import Task, split_classes, split_data
from curvlab.continual.outputs import Head, LossName
from curvlab.continual.strategies import DER, DLCFT, ER, EWC, MAS, OSLA, Joint, LwF, Naive, Strategy
from curvlab.data import Dataset
from curvlab.linearize import linearize

if TYPE_CHECKING:
    from curvlab.analyze.dlcft.options import DlcftConfig

Setting = Literal["data", "data_long", "task", "class"]
MethodName = Literal[
    "fine_tuning",
    "lwf",
    "ewc",
    "mas",
    "osla",
    "osla_tkfac",
    "er",
    "der",
    "derpp",
    "dlcft_diag",
    "dlcft_kfac",
    "dlcft_tkfac",
    "dlcft_no_replay",
    "dlcft_no_regularization",
    "dlcft_kfac_no_regularization",
    "dlcft_neither",
    "joint",
    "joint_linear",
]
#: What is chosen for a method: values of its lists in the configuration, by the names of the lists.
Point = dict[str, float]

_LISTS = (
    "nonlinear_lrs",
    "linear_lrs",
    "lwf_strengths",
    "ewc_strengths",
    "mas_strengths",
    "osla_strengths",
    "der_alphas",
    "dlcft_strengths",
)

#: By name: what it is called, and how the network's outputs are read.
SETTINGS: dict[Setting, tuple[str, Head]] = {
    "data": ("data-IL", "single"),
    "data_long": ("data-IL, long", "single"),
    "task": ("task-IL", "masked"),
    "class": ("class-IL", "growing"),
}


@dataclass(frozen=True)
class Method:
    """A method.

    Attributes:
        label: What it is called.
        settings: Where it is run.
        make: Makes it of a configuration, a setting, and the strength that was chosen (0 without one).
        strengths: Name of the list of strengths that are tried; None if it has no strength.
        linear: Whether the network is linearized and the loss the squared error of scaled one-hot targets; else the
            network is as it is and the loss cross-entropy.
        wide: Whether in class-IL all outputs count from the start, as in the authors' code of DER: a sample is then
            kept with its outputs for later classes, too.
    """

    label: str
    settings: tuple[Setting, ...]
    make: Callable[["DlcftConfig", Setting, float], Strategy]
    strengths: str | None = None
    linear: bool = False
    wide: bool = False

    def head(self, setting: Setting) -> Head:
        """Return which outputs count in a setting."""
        return "single" if self.wide and setting == "class" else SETTINGS[setting][1]

    @property
    def loss(self) -> LossName:
        """The loss that is minimised."""
        return "squared_error" if self.linear else "cross_entropy"

    @property
    def lists(self) -> tuple[str, ...]:
        """The lists of the configuration of which a value each is chosen."""
        return ("linear_lrs" if self.linear else "nonlinear_lrs", *([self.strengths] if self.strengths else []))

    def points(self, config: "DlcftConfig") -> list[Point]:
        """Return all combinations of the values in the method's lists."""
        return [
            dict(zip(self.lists, values, strict=True)) for values in product(*(getattr(config, n) for n in self.lists))
        ]


def canonical(config: "DlcftConfig", name: MethodName) -> dict[str, Any]:
    """Return the lists that have no part in a method, as they are by default: no cell is then run twice."""
    fields = type(config).model_fields
    unused = {*_LISTS, "selection_seeds"} - {*METHODS[name].lists}
    return {other: fields[other].default for other in unused}


def network(method: Method, model: nn.Module) -> nn.Module:
    """Return the network that a method trains, of one that is pre-trained and ends with a linear layer."""
    return linearize(model, head=last_linear(model)) if method.linear else model


def last_linear(model: nn.Module) -> str:
    """Return the name of the last linear layer."""
    names: list[str] = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return names[-1]


def tasks_of(config: "DlcftConfig", setting: Setting) -> int:
    """Return how many tasks a setting has."""
    return {"data": config.data_tasks, "data_long": config.long_tasks}.get(setting, config.class_tasks)


def stream(config: "DlcftConfig", dataset: Dataset, setting: Setting, seed: int) -> tuple[Task, ...]:
    """Return the tasks of a setting: equal parts of the data, random classes, or classes in their order.

    Raises:
        CurvlabError: The data set cannot be split so.
    """
    tasks = tasks_of(config, setting)
    validation = config.validation // tasks
    if setting in ("data", "data_long"):
        return split_data(dataset, tasks=tasks, seed=seed, validation=validation)
    return split_classes(dataset, tasks=tasks, seed=seed if setting == "task" else None, validation=validation)


def steps(config: "DlcftConfig", name: MethodName, setting: Setting) -> Sequence[int]:
    """Return the steps of each task, twice as many for the first one; joint training has all of them at the end."""
    each = config.long_steps if setting == "data_long" else config.steps
    counts = [2 * each] + [each] * (tasks_of(config, setting) - 1)
    return [*counts[:-1], sum(counts)] if name.startswith("joint") else counts


def _curvature(config: "DlcftConfig", structure: str) -> dict[str, Any]:
    drawn = "" if config.draws is None else f":samples={config.draws}"
    return {"quantity": f"fisher{drawn}", "structure": structure, "samples": config.samples}


_KFAC, _TKFAC = "kfac", "tkfac:variant=rescaled"


def _osla(structure: str) -> Callable[["DlcftConfig", Setting, float], Strategy]:
    def make(config: "DlcftConfig", setting: Setting, strength: float) -> Strategy:
        if setting != "class":
            return OSLA(strength, merge="average", **_curvature(config, structure))
        # What the ablation of the paper has in class-IL: all of DLCFT but the linear network and the squared error.
        return DLCFT(
            strength,
            classifier_regularization=False,
            buffer_size=config.buffer_size,
            **_curvature(config, structure),
        )

    return make


def _dlcft(
    structure: str, *, regularization: bool = True, replay: bool = True
) -> Callable[["DlcftConfig", Setting, float], Strategy]:
    def make(config: "DlcftConfig", setting: Setting, strength: float) -> Strategy:
        return DLCFT(
            strength,
            merge="exact" if structure == "diag" else "average",
            classifier_regularization=regularization,
            buffer_size=config.buffer_size if replay and setting == "class" else None,
            **_curvature(config, structure),
        )

    return make


_BY_DATA: tuple[Setting, ...] = ("data", "data_long")
_REPLAY: tuple[Setting, ...] = ("task", "class")
_ALL: tuple[Setting, ...] = ("data", "data_long", "task", "class")

METHODS: dict[MethodName, Method] = {
    "fine_tuning": Method("fine-tuning", _ALL, lambda *_: Naive()),
    "lwf": Method("LwF", (*_BY_DATA, "task"), lambda _, __, strength: LwF(strength), "lwf_strengths"),
    "ewc": Method(
        "EWC",
        (*_BY_DATA, "task"),
        lambda config, _, strength: EWC(strength, mode="online", **_curvature(config, "diag")),
        "ewc_strengths",
    ),
    "mas": Method(
        "MAS",
        (*_BY_DATA, "task"),
        lambda config, _, strength: MAS(strength, samples=config.samples),
        "mas_strengths",
    ),
    "osla": Method("OSLA (K-FAC)", _ALL, _osla(_KFAC), "osla_strengths"),
    "osla_tkfac": Method("OSLA (TK-FAC)", (*_BY_DATA, "class"), _osla(_TKFAC), "osla_strengths"),
    "er": Method("ER", _REPLAY, lambda config, _, __: ER(config.buffer_size)),
    "der": Method(
        "DER", _REPLAY, lambda config, _, strength: DER(config.buffer_size, alpha=strength), "der_alphas", wide=True
    ),
    "derpp": Method(
        "DER++",
        _REPLAY,
        lambda config, _, strength: DER(config.buffer_size, alpha=strength, beta=config.der_beta),
        "der_alphas",
        wide=True,
    ),
    "dlcft_diag": Method("DLCFT (diagonal)", ("data",), _dlcft("diag"), "dlcft_strengths", linear=True),
    "dlcft_kfac": Method("DLCFT (K-FAC)", _ALL, _dlcft(_KFAC), "dlcft_strengths", linear=True),
    "dlcft_tkfac": Method("DLCFT (TK-FAC)", _ALL, _dlcft(_TKFAC), "dlcft_strengths", linear=True),
    "dlcft_no_replay": Method(
        "DLCFT (TK-FAC), no replay", ("class",), _dlcft(_TKFAC, replay=False), "dlcft_strengths", linear=True
    ),
    "dlcft_no_regularization": Method(
        "DLCFT (TK-FAC), classifier not regularised",
        ("class",),
        _dlcft(_TKFAC, regularization=False),
        "dlcft_strengths",
        linear=True,
    ),
    "dlcft_kfac_no_regularization": Method(
        "DLCFT (K-FAC), classifier not regularised",
        ("class",),
        _dlcft(_KFAC, regularization=False),
        "dlcft_strengths",
        linear=True,
    ),
    "dlcft_neither": Method(
        "DLCFT (TK-FAC), neither of the two",
        ("class",),
        _dlcft(_TKFAC, regularization=False, replay=False),
        "dlcft_strengths",
        linear=True,
    ),
    "joint": Method("joint", ("data", "task", "class"), lambda *_: Joint()),
    "joint_linear": Method("joint, linear", ("data", "task", "class"), lambda *_: Joint(), linear=True),
}
