"""Settings and methods of the analysis ``dlcft``, with the network and the loss of each method."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from torch import nn

from curvlab.analyze.dlcft.options import LISTS, DlcftConfig, MethodName, Setting
from curvlab.continual import Task, split_classes, split_data
from curvlab.continual.outputs import Head, TaskLoss
from curvlab.continual.strategies import (
    DER,
    DLCFT,
    ER,
    EWC,
    IMM,
    MAS,
    OSLA,
    SI,
    Joint,
    LinearProbe,
    LwF,
    Naive,
    Oracle,
    Strategy,
)
from curvlab.data import Dataset
from curvlab.linearize import linearize

#: Name -> label, and head (which outputs are used).
SETTINGS: dict[Setting, tuple[str, Head]] = {
    "data": ("data-IL", "single"),
    "data_long": ("data-IL, long", "single"),
    "task": ("task-IL", "masked"),
    "class": ("class-IL", "growing"),
}

_SKEW = 0.9  # share of the samples of a skewed part that are chosen by their class


@dataclass(frozen=True)
class DlcftMethod:
    """A method of continual learning.

    Attributes:
        label: Label in tables and figures.
        settings: The settings in which it is run.
        make: Function of a configuration, a setting and a strength (0 if there is none) that returns the strategy.
        strengths: Name of the option with the strengths to try; None if the method has no strength.
        linear: Whether the network is linearized and trained with the squared error to scaled one-hot targets;
            otherwise the original network is trained with cross-entropy.
        wide: Whether all outputs are used from the start in class-IL, as in the authors' code of DER, so that the
            buffer also stores the outputs for later classes.
    """

    label: str
    settings: tuple[Setting, ...]
    make: Callable[[DlcftConfig, Setting, float], Strategy]
    strengths: str | None = None
    linear: bool = False
    wide: bool = False

    def head(self, setting: Setting) -> Head:
        """Return which outputs are used in a setting."""
        return "single" if self.wide and setting == "class" else SETTINGS[setting][1]

    @property
    def loss(self) -> TaskLoss:
        """The training loss."""
        return "squared_error" if self.linear else "cross_entropy"

    @property
    def lists(self) -> tuple[str, ...]:
        """Names of the options with the values to try."""
        return ("linear_lrs" if self.linear else "nonlinear_lrs", *([self.strengths] if self.strengths else []))

    def candidates(self, config: DlcftConfig) -> list[dict[str, float]]:
        """Return all combinations of ``lr`` and, if the method has one, ``strength``."""
        values = product(*(getattr(config, name) for name in self.lists))
        return [dict(zip(("lr", "strength"), given, strict=False)) for given in values]

    def choose(self, candidate: Mapping[str, float]) -> dict[str, tuple[float, ...]]:
        """Return the option values for a single candidate, with unused lists reset to their defaults.

        Configurations that differ only in unused options then describe the same run.
        """
        fields = DlcftConfig.model_fields
        unused = {name: fields[name].default for name in (*LISTS, "selection_seeds") if name not in self.lists}
        return unused | dict(zip(self.lists, ((value,) for value in candidate.values()), strict=True))


def adapt(model: nn.Module, method: DlcftMethod) -> nn.Module:
    """Return a pre-trained network with a final linear layer for a method: linearized if the method is linear."""
    return linearize(model, head=find_last_linear(model)) if method.linear else model


def find_last_linear(model: nn.Module) -> str:
    """Return the name of the last linear layer."""
    names: list[str] = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return names[-1]


def count_tasks(config: DlcftConfig, setting: Setting) -> int:
    """Return the number of tasks of a setting."""
    return {"data": config.data_tasks, "data_long": config.long_tasks}.get(setting, config.class_tasks)


def split(config: DlcftConfig, dataset: Dataset, setting: Setting, seed: int) -> tuple[Task, ...]:
    """Return the tasks of a setting: equal parts of the data, random classes, or classes in order.

    Of a skewed part, nine of ten samples are of few classes.

    Raises:
        CurvlabError: The data set cannot be split into these tasks.
    """
    tasks = count_tasks(config, setting)
    validation = config.validation // tasks
    if setting in ("data", "data_long"):
        skew = _SKEW if config.data_parts == "skewed" else 0.0
        return split_data(dataset, tasks=tasks, seed=seed, validation=validation, skew=skew)
    return split_classes(dataset, tasks=tasks, seed=seed if setting == "task" else None, validation=validation)


def count_steps(config: DlcftConfig, setting: Setting) -> int:
    """Return the number of steps per task of a setting; the first task has twice as many."""
    return config.long_steps if setting == "data_long" else config.steps


def list_steps(config: DlcftConfig, name: MethodName, setting: Setting, *, half: bool = False) -> Sequence[int]:
    """Return the steps of each task; joint training uses all steps in the last task, or half of them."""
    each = count_steps(config, setting)
    counts = [2 * each] + [each] * (count_tasks(config, setting) - 1)
    return [*counts[:-1], sum(counts) // (2 if half else 1)] if name.startswith("joint") else counts


def _curvature(config: DlcftConfig, structure: str) -> dict[str, Any]:
    drawn = "" if config.draws is None else f":samples={config.draws}"
    return {"quantity": f"fisher{drawn}", "structure": structure, "samples": config.samples}


_KFAC, _TKFAC = "kfac", "tkfac:variant=rescaled"


def _osla(structure: str) -> Callable[[DlcftConfig, Setting, float], Strategy]:
    def make(config: DlcftConfig, setting: Setting, strength: float) -> Strategy:
        if setting != "class":
            return OSLA(strength, merge="average", **_curvature(config, structure))
        # The ablation of the paper in class-IL: DLCFT with the original network and cross-entropy.
        return DLCFT(
            strength,
            classifier_regularization=False,
            buffer_size=config.buffer_size,
            **_curvature(config, structure),
        )

    return make


def _dlcft(
    structure: str, *, regularization: bool = True, replay: bool = True
) -> Callable[[DlcftConfig, Setting, float], Strategy]:
    def make(config: DlcftConfig, setting: Setting, strength: float) -> Strategy:
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

METHODS: dict[MethodName, DlcftMethod] = {
    "fine_tuning": DlcftMethod("fine-tuning", _ALL, lambda *_: Naive()),
    "linear_probe": DlcftMethod("linear probing", _ALL, lambda *_: LinearProbe()),
    "lwf": DlcftMethod("LwF", (*_BY_DATA, "task"), lambda _, __, strength: LwF(strength), "lwf_strengths"),
    "ewc": DlcftMethod(
        "EWC",
        (*_BY_DATA, "task"),
        lambda config, _, strength: EWC(strength, mode="online", **_curvature(config, "diag")),
        "ewc_strengths",
    ),
    "mas": DlcftMethod(
        "MAS",
        (*_BY_DATA, "task"),
        lambda config, _, strength: MAS(strength, samples=config.samples),
        "mas_strengths",
    ),
    "si": DlcftMethod("SI", (*_BY_DATA, "task"), lambda _, __, strength: SI(strength), "si_strengths"),
    "imm": DlcftMethod("mode-IMM", (*_BY_DATA, "task"), lambda config, _, __: IMM(**_curvature(config, "diag"))),
    "osla": DlcftMethod("OSLA (K-FAC)", _ALL, _osla(_KFAC), "osla_strengths"),
    "osla_tkfac": DlcftMethod("OSLA (TK-FAC)", (*_BY_DATA, "class"), _osla(_TKFAC), "osla_strengths"),
    "er": DlcftMethod("ER", _REPLAY, lambda config, _, __: ER(config.buffer_size)),
    "der": DlcftMethod(
        "DER", _REPLAY, lambda config, _, strength: DER(config.buffer_size, alpha=strength), "der_alphas", wide=True
    ),
    "derpp": DlcftMethod(
        "DER++",
        _REPLAY,
        lambda config, _, strength: DER(config.buffer_size, alpha=strength, beta=config.der_beta),
        "der_alphas",
        wide=True,
    ),
    "dlcft_diag": DlcftMethod("DLCFT (diagonal)", ("data",), _dlcft("diag"), "dlcft_strengths", linear=True),
    "dlcft_kfac": DlcftMethod("DLCFT (K-FAC)", _ALL, _dlcft(_KFAC), "dlcft_strengths", linear=True),
    "dlcft_tkfac": DlcftMethod("DLCFT (TK-FAC)", _ALL, _dlcft(_TKFAC), "dlcft_strengths", linear=True),
    "dlcft_no_replay": DlcftMethod(
        "DLCFT (TK-FAC), no replay", ("class",), _dlcft(_TKFAC, replay=False), "dlcft_strengths", linear=True
    ),
    "dlcft_no_regularization": DlcftMethod(
        "DLCFT (TK-FAC), classifier not regularised",
        ("class",),
        _dlcft(_TKFAC, regularization=False),
        "dlcft_strengths",
        linear=True,
    ),
    "dlcft_kfac_no_regularization": DlcftMethod(
        "DLCFT (K-FAC), classifier not regularised",
        ("class",),
        _dlcft(_KFAC, regularization=False),
        "dlcft_strengths",
        linear=True,
    ),
    "dlcft_neither": DlcftMethod(
        "DLCFT (TK-FAC), neither",
        ("class",),
        _dlcft(_TKFAC, regularization=False, replay=False),
        "dlcft_strengths",
        linear=True,
    ),
    "joint": DlcftMethod("joint", ("data", "task", "class"), lambda *_: Joint()),
    "joint_linear": DlcftMethod("joint, linear", ("data", "task", "class"), lambda *_: Joint(), linear=True),
    "oracle": DlcftMethod("oracle", ("data", "task", "class"), lambda *_: Oracle()),
}
#: The methods that train on the samples of all tasks: upper bounds of the others.
BOUNDS: tuple[MethodName, ...] = ("joint", "joint_linear", "oracle")
