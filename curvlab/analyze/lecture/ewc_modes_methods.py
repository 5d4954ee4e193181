"""The options of the analysis ``ewc_modes``, and the methods that it compares."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from curvlab.analyze.frame.search import Candidate
from curvlab.analyze.frame.subject import SubjectConfig
from curvlab.commandline.config import Readers
from curvlab.continual.outputs import Head
from curvlab.continual.strategies import EWC, IMM, L2, MAS, OSLA, SI, LwF, Naive, Strategy
from curvlab.training.options import OptimizerName

StreamName = Literal["permuted", "class"]
Positive = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]

#: Head of each stream.
HEADS: Mapping[str, Head] = {"permuted": "single", "class": "growing"}
STREAM_LABELS = {"permuted": "permuted pixels", "class": "class-incremental"}


@dataclass(frozen=True)
class EwcModesMethod:
    """A method.

    Attributes:
        label: Name in tables and figures.
        make: Function that makes the method from a configuration and a strength.
        strengths: Name of the option with the strengths; None if the method has no strength.
    """

    label: str
    make: Callable[[Any, float], Strategy]
    strengths: str | None = "ewc_strengths"


def _ewc(mode: Any, gamma: str | None = None) -> Callable[[Any, float], EWC]:
    def make(config: Any, strength: float) -> EWC:
        return EWC(
            strength,
            quantity=config.quantity,
            structure=config.structure,
            samples=config.samples,
            mode=mode,
            gamma=1.0 if gamma is None else getattr(config, gamma),
        )

    return make


def _imm(mode: Any) -> Callable[[Any, float], IMM]:
    return lambda config, strength: IMM(mode, quantity=config.quantity, samples=config.samples, l2=strength)


#: The methods by name.
METHODS: Mapping[str, EwcModesMethod] = {
    "naive": EwcModesMethod("naive", lambda *_: Naive(), None),
    "l2": EwcModesMethod("plain L2", lambda _, strength: L2(strength), "l2_strengths"),
    "ewc_separate": EwcModesMethod("EWC separate", _ewc("separate")),
    "ewc_online": EwcModesMethod("EWC online", _ewc("online", "online_gamma")),
    "ewc_average": EwcModesMethod("EWC average", _ewc("average")),
    "ewc_moving_average": EwcModesMethod("EWC moving average", _ewc("moving_average", "average_gamma")),
    "si": EwcModesMethod("SI", lambda _, strength: SI(strength), "si_strengths"),
    "mas": EwcModesMethod("MAS", lambda config, strength: MAS(strength, samples=config.samples), "mas_strengths"),
    "osla": EwcModesMethod(
        "OSLA", lambda config, strength: OSLA(strength, samples=config.samples, merge="average"), "osla_strengths"
    ),
    "lwf": EwcModesMethod("LwF", lambda _, strength: LwF(strength), "lwf_strengths"),
    "imm_mean": EwcModesMethod("IMM mean", _imm("mean"), "imm_strengths"),
    "imm_mode": EwcModesMethod("IMM mode", _imm("mode"), "imm_strengths"),
}
#: The forms of EWC that keep one matrix.
ONLINE = ("ewc_online", "ewc_average", "ewc_moving_average")
#: The options with strengths.
LISTS = tuple(dict.fromkeys(method.strengths for method in METHODS.values() if method.strengths))


class EwcModesConfig(SubjectConfig):
    """Train on streams of tasks with forms of EWC and related methods, each with its best strength."""

    titles: ClassVar[Mapping[str, str]] = {
        **SubjectConfig.titles,
        "streams": "tasks",
        "methods": "methods",
        "epochs": "training",
        "selection_seeds": "hyper-parameters",
        "evaluation": "evaluation",
    }
    only_for: ClassVar[Mapping[str, Readers]] = {
        **SubjectConfig.only_for,
        "task_samples": ("streams", ("permuted",)),
        "class_methods": ("streams", ("class",)),
        "structure": ("methods", tuple(name for name in METHODS if name.startswith("ewc"))),
        "online_gamma": ("methods", ("ewc_online",)),
        "average_gamma": ("methods", ("ewc_moving_average",)),
        **{
            option: ("methods", tuple(name for name, method in METHODS.items() if method.strengths == option))
            for option in LISTS
        },
    }

    validation: int = Field(default=200, ge=0)
    """Number of training samples of a task that are held out to choose strengths (of all tasks together if they split
    the classes). No method is trained on them."""
    samples: int | None = Field(default=None, ge=1)
    """Number of training samples of a task for the importance, drawn at random; none means all."""
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = (100,)
    """Hidden sizes of the mlp; no number for a linear model."""
    streams: tuple[StreamName, ...] = ("permuted", "class")
    """permuted: every task has its own order of the pixels; class: tasks split the classes, and the outputs of all
    classes so far count (class-incremental)."""
    tasks: int = Field(default=5, ge=2)
    """Number of tasks of a stream."""
    task_samples: int | None = Field(default=None, ge=1)
    """permuted: number of training samples of a task, always the same random ones; none means all."""
    test_samples: int | None = Field(default=None, ge=1)
    """Number of test samples, always the same random ones; none means all."""
    methods: tuple[str, ...] = Field(
        default=tuple(METHODS),
        description=", ".join(f"{name} ({method.label})" for name, method in METHODS.items()) + ".",
    )
    class_methods: tuple[str, ...] = ("naive", "l2", "ewc_separate", "si", "mas")
    """Methods that are also run on the stream class."""
    quantity: str = "fisher"
    """Importance of EWC and IMM: fisher, fisher:samples=K, empirical_fisher, or masq:batch_size=B,norm=sumsq."""
    structure: str = "diag"
    """Structure of the curvature of EWC: diag, kfac, tkfac and so on."""
    online_gamma: float = Field(default=0.9, ge=0, le=1)
    """EWC online: factor on the past curvature at every new task; 1 is the sequential Bayesian update."""
    average_gamma: float = Field(default=0.5, ge=0, lt=1)
    """EWC moving average: factor on the past curvature at every new task."""
    ewc_strengths: tuple[Positive, ...] = (0.1, 1.0, 10.0, 100.0, 1000.0)
    """Strengths of all forms of EWC."""
    l2_strengths: tuple[Positive, ...] = (1e-3, 1e-2, 1e-1, 1.0)
    """Strengths of plain L2."""
    si_strengths: tuple[Positive, ...] = (0.01, 0.1, 1.0, 10.0, 100.0)
    """Strengths of SI."""
    mas_strengths: tuple[Positive, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    """Strengths of MAS."""
    osla_strengths: tuple[Positive, ...] = (1.0, 10.0, 100.0, 1000.0)
    """Strengths of OSLA."""
    lwf_strengths: tuple[Positive, ...] = (0.1, 1.0, 10.0)
    """Strengths of LwF."""
    imm_strengths: tuple[Positive, ...] = (1e-3, 1e-2, 1e-1)
    """Strengths of the L2-transfer of IMM."""
    epochs: int = Field(default=6, ge=1)
    """Passes over the samples of each task."""
    optimizer: OptimizerName = "adam"
    """Optimizer; every task has a new one."""
    lr: float = Field(default=3e-3, gt=0)
    """Learning rate."""
    batch_size: int = Field(default=32, ge=1)
    """Samples per step."""
    selection_seeds: tuple[Seed, ...] = (1000,)
    """Seeds of the trials. Strengths are compared by the mean accuracy on the held-out samples after all tasks."""
    evaluation: Literal["test", "validation"] = "test"
    """What the table is measured on."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Tasks are drawn and a network is trained for each; the table has mean and standard deviation."""


def select_methods(config: EwcModesConfig, stream: str) -> list[str]:
    """Return the methods that are run on a stream."""
    return [name for name in config.methods if stream == "permuted" or name in config.class_methods]


def candidates(config: EwcModesConfig, method: str) -> list[Candidate]:
    """Return the strengths that are tried for a method; a single empty candidate for one without a strength."""
    option = METHODS[method].strengths
    return [{}] if option is None else [{"strength": strength} for strength in getattr(config, option)]


def single_run(config: EwcModesConfig, stream: str, method: str, candidate: Candidate, **changes: Any) -> Any:
    """Return the configuration of one stream, method and strength; ``changes`` are further fields."""
    lists: dict[str, tuple[float, ...]] = dict.fromkeys(LISTS, ())
    option = METHODS[method].strengths
    if option is not None:
        lists[option] = (candidate["strength"],)
    names = {"streams": (stream,), "methods": (method,), "class_methods": (method,), "selection_seeds": ()}
    return config.model_copy(update={**lists, **names, **changes})
