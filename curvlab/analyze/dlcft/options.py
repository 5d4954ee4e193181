"""Options of the analysis ``dlcft``, and its presets."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field

from curvlab.analyze.frame.analysis import Preset
from curvlab.analyze.frame.subject import SubjectConfig
from curvlab.commandline.config import Readers
from curvlab.training.options import FirstOrderName, ScheduleName

Positive = Annotated[float, Field(gt=0)]
Label = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]

Setting = Literal["data", "data_long", "task", "class"]
MethodName = Literal[
    "fine_tuning",
    "linear_probe",
    "lwf",
    "ewc",
    "mas",
    "si",
    "imm",
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
    "oracle",
]
#: The methods that are run by default: those of the publications.
PUBLISHED_METHODS: tuple[MethodName, ...] = tuple(
    name for name in get_args(MethodName) if name not in ("si", "imm", "linear_probe", "oracle")
)

_DLCFT: tuple[MethodName, ...] = tuple(name for name in get_args(MethodName) if name.startswith("dlcft"))
_LAPLACE: tuple[MethodName, ...] = ("osla", "osla_tkfac", *_DLCFT)
_LINEAR: tuple[MethodName, ...] = (*_DLCFT, "joint_linear")
_NONLINEAR: tuple[MethodName, ...] = tuple(name for name in get_args(MethodName) if name not in _LINEAR)

#: The fields with values of hyper-parameters to try.
LISTS = (
    "nonlinear_lrs",
    "linear_lrs",
    "lwf_strengths",
    "ewc_strengths",
    "mas_strengths",
    "osla_strengths",
    "der_alphas",
    "dlcft_strengths",
    "si_strengths",
)


class DlcftConfig(SubjectConfig):
    """Fine-tune a pre-trained network on streams of tasks, linearized with squared error and in its original form."""

    titles: ClassVar[Mapping[str, str]] = {
        **SubjectConfig.titles,
        "settings": "tasks",
        "methods": "methods",
        "steps": "training",
        "nonlinear_lrs": "hyper-parameters",
        "selection_seeds": "evaluation",
    }

    unread: ClassVar[Mapping[str, str]] = {"fine_tune": "with weights, the last layer is always replaced"}
    only_for: ClassVar[Mapping[str, Readers]] = {
        **SubjectConfig.only_for,
        "data_tasks": ("settings", ("data",)),
        "long_tasks": ("settings", ("data_long",)),
        "long_steps": ("settings", ("data_long",)),
        "data_parts": ("settings", ("data", "data_long")),
        "class_tasks": ("settings", ("task", "class")),
        "steps": ("settings", ("data", "task", "class")),
        "buffer_size": ("methods", ("er", "der", "derpp", *_LAPLACE)),
        "draws": ("methods", ("ewc", "imm", *_LAPLACE)),
        "target_scale": ("methods", _LINEAR),
        "linear_optimizer": ("methods", _LINEAR),
        "linear_lrs": ("methods", _LINEAR),
        "nonlinear_optimizer": ("methods", _NONLINEAR),
        "nonlinear_lrs": ("methods", _NONLINEAR),
        "lwf_strengths": ("methods", ("lwf",)),
        "ewc_strengths": ("methods", ("ewc",)),
        "mas_strengths": ("methods", ("mas",)),
        "si_strengths": ("methods", ("si",)),
        "osla_strengths": ("methods", ("osla", "osla_tkfac")),
        "der_alphas": ("methods", ("der", "derpp")),
        "der_beta": ("methods", ("derpp",)),
        "dlcft_strengths": ("methods", _DLCFT),
    }

    classes: tuple[Label, ...] | Literal["all"] = (4, 5, 6, 7, 8, 9)
    """Class indices of the tasks, or all."""
    validation: int = Field(default=120, ge=0)
    """Training samples to hold out per stream, equally many per task, to choose hyper-parameters."""
    samples: int | None = Field(default=None, ge=1)
    """Number of training samples per task for curvatures, drawn at random; none means all."""
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = (100,)
    """Hidden sizes of the mlp; no value gives a linear model."""
    weights: Path | None = None
    """File of pre-trained weights, searched in the current folder and in the data root, instead of pre-training on
    source_classes; the last layer is replaced."""
    fine_tune: bool = False
    """Not read: with weights, the last layer is always replaced."""
    source_classes: tuple[Label, ...] = (0, 1, 2, 3)
    """Classes for pre-training; leave empty with weights."""
    source_steps: int = Field(default=300, ge=1)
    """Steps of pre-training, with Adam at a learning rate of 0.001."""
    slope: float = Field(default=0.01, ge=0, lt=1)
    """Slope of the LeakyReLU that replaces every ReLU; 0 keeps the ReLU."""
    batch_norm: Literal["merged", "frozen"] = "merged"
    """Batch normalisation after pre-training: merged into the preceding convolution, or frozen."""
    settings: tuple[Setting, ...] = ("data", "task", "class")
    """data and data_long (data-IL: parts of the data, all outputs), task (task-IL: some classes per task, only
    their outputs), class (class-IL: the outputs of all classes so far)."""
    stream_samples: int | None = Field(default=None, ge=1)
    """Number of training samples per stream, held-out ones included, drawn at random; none means all."""
    test_samples: int | None = Field(default=None, ge=1)
    """Number of test samples, drawn at random; none means all."""
    data_tasks: int = Field(default=10, ge=2)
    """Number of tasks of data."""
    long_tasks: int = Field(default=50, ge=2)
    """Number of tasks of data_long."""
    data_parts: Literal["random", "skewed"] = "skewed"
    """Tasks of data and data_long: random parts of the data, as in the paper, or parts that mostly have few classes."""
    class_tasks: int = Field(default=3, ge=2)
    """Number of tasks of task and of class, with equally many classes each."""
    methods: tuple[MethodName, ...] = PUBLISHED_METHODS
    """Methods to run. osla: online structured Laplace with K-FAC or TK-FAC; dlcft: the same for the linear network with
    squared error; dlcft_diag has a diagonal. In class, osla and dlcft replay samples. imm merges the solutions of all
    tasks; linear_probe trains the last layer; oracle trains on samples of every task so far. Not all methods are in all
    settings."""
    buffer_size: int = Field(default=100, ge=1)
    """Number of samples kept for replay by er, der and derpp, and in class by osla and dlcft."""
    draws: int | None = Field(default=None, ge=1)
    """Labels drawn from the network per sample for a Fisher; none takes the expectation, one pass per output."""
    steps: int = Field(default=60, ge=1)
    """Training steps per task; the first task of a stream has twice as many."""
    long_steps: int = Field(default=10, ge=1)
    """Training steps per task of data_long; the first task has twice as many."""
    batch_size: int = Field(default=64, ge=1)
    """New samples per step; equally many are replayed."""
    schedule: ScheduleName = "linear"
    """Learning-rate schedule of each task; linear and cosine end at 0."""
    weight_decay: float = Field(default=1e-5, ge=0)
    """Weight decay, as defined by the optimizer in torch.optim."""
    clip_norm: Positive | None = None
    """Maximal gradient norm; none means no clipping."""
    nonlinear_optimizer: FirstOrderName = "adam"
    """Optimizer of methods with the original (non-linear) network; sgd has a momentum of 0.9."""
    linear_optimizer: FirstOrderName = "adam"
    """Optimizer of methods with the linearized network."""
    target_scale: Positive = 15.0
    """Scale of the one-hot targets of squared error."""
    nonlinear_lrs: tuple[Positive, ...] = (3e-3, 1e-2)
    """Learning rates to try for methods with the original network."""
    linear_lrs: tuple[Positive, ...] = (1e-2, 3e-2)
    """Learning rates to try for methods with the linearized network."""
    lwf_strengths: tuple[Positive, ...] = (1.0, 10.0)
    """Strengths to try for lwf."""
    ewc_strengths: tuple[Positive, ...] = (1.0, 10.0)
    """Strengths to try for ewc; 1 is Bayes' rule."""
    mas_strengths: tuple[Positive, ...] = (0.01, 0.1)
    """Strengths to try for mas."""
    osla_strengths: tuple[Positive, ...] = (1.0, 10.0)
    """Strengths to try for osla, with both curvatures; 1 is Bayes' rule."""
    der_alphas: tuple[Positive, ...] = (0.1, 0.5)
    """Weights of the old outputs to try for der and derpp."""
    der_beta: Positive = 0.5
    """Weight of the old labels for derpp."""
    dlcft_strengths: tuple[Positive, ...] = (1.0, 10.0)
    """Strengths to try for dlcft; the authors use 1."""
    si_strengths: tuple[Positive, ...] = (0.1, 1.0)
    """Strengths to try for si."""
    selection_seeds: tuple[Seed, ...] = (1000,)
    """Seeds of the search; candidates are compared by their mean accuracy on held-out samples after the last task."""
    evaluation: Literal["test", "validation"] = "test"
    """Samples for the accuracies of the table."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """One network is pre-trained and streams are drawn per seed; the table has mean and standard deviation."""


_MNIST = DlcftConfig(
    data="mnist",
    hidden=(256,),
    settings=("data", "data_long", "task", "class"),
    data_parts="random",
    stream_samples=2400,
    validation=600,
    test_samples=3000,
    long_tasks=100,
    buffer_size=200,
    source_steps=500,
    steps=80,
    long_steps=20,
    nonlinear_lrs=(3e-3, 1e-2),
    linear_lrs=(3e-3, 1e-2),
    lwf_strengths=(1.0, 3.0, 10.0),
    ewc_strengths=(1.0, 10.0, 100.0),
    mas_strengths=(0.01, 0.1, 1.0),
    osla_strengths=(1.0, 10.0, 100.0),
    der_alphas=(0.1, 0.3, 1.0),
    dlcft_strengths=(1.0, 10.0, 100.0),
    si_strengths=(0.01, 0.1, 1.0),
)
_CIFAR = DlcftConfig(
    data="cifar100",
    classes=tuple(range(20)),
    model="resnet20",
    weights=Path("weights/resnet20_cifar10-12fca82f.th"),
    normalize="imagenet",
    source_classes=(),
    slope=0.0,  # the weights are of a network with ReLU
    validation=200,
    samples=100,
    data_tasks=5,
    data_parts="random",
    class_tasks=5,
    methods=(
        "fine_tuning",
        "ewc",
        "osla",
        "osla_tkfac",
        "der",
        "dlcft_diag",
        "dlcft_kfac",
        "dlcft_tkfac",
        "dlcft_no_regularization",
        "dlcft_kfac_no_regularization",
        "joint",
        "joint_linear",
    ),
    stream_samples=1000,
    test_samples=400,
    buffer_size=100,
    draws=1,
    steps=60,
    batch_size=32,
    nonlinear_lrs=(3e-4, 1e-3),
    linear_lrs=(3e-3, 1e-2),
    lwf_strengths=(1.0, 10.0),
    ewc_strengths=(100.0, 1000.0),
    mas_strengths=(0.01, 0.1),
    osla_strengths=(10.0, 100.0),
    der_alphas=(0.1, 0.5),
    dlcft_strengths=(1.0, 10.0),
)
_PAPER = _CIFAR.model_copy(
    update={
        "device": "cuda",
        "classes": "all",
        "settings": ("data", "data_long", "task", "class"),
        "methods": PUBLISHED_METHODS,
        "stream_samples": None,
        "validation": 5000,
        "samples": None,
        "test_samples": None,
        "data_tasks": 10,
        "long_tasks": 100,
        "class_tasks": 10,
        "buffer_size": 500,
        "steps": 10_000,
        "long_steps": 10_000,
        "batch_size": 128,
        "clip_norm": 1.0,
        "nonlinear_optimizer": "sgd",
        "nonlinear_lrs": (1e-3, 1e-2),
        "linear_lrs": (1e-4, 1e-3),
        "lwf_strengths": (1.0, 10.0, 100.0),
        "ewc_strengths": (1.0, 10.0, 100.0),
        "mas_strengths": (0.01, 0.1, 1.0),
        "osla_strengths": (1.0, 10.0, 100.0),
        "der_alphas": (0.1, 0.3, 1.0),
        "dlcft_strengths": (1.0, 10.0, 100.0),
        "si_strengths": (0.01, 0.1, 1.0),
    }
)
_MIT67 = _PAPER.model_copy(
    update={
        "data": "MIT-67",
        "settings": ("data",),
        "model": "torchvision:resnet18",
        "weights": Path("weights/resnet18-f37072fd.pth"),
        "data_tasks": 4,
        "validation": 536,
        "batch_size": 64,
    }
)

PRESETS = {
    "default": Preset(DlcftConfig(), minutes=3),
    "cpu": Preset(_MNIST, minutes=30, needs=("mnist",)),
    "cpu-cifar100": Preset(_CIFAR, minutes=60, needs=("cifar100", "weights")),
    "paper": Preset(_PAPER, needs=("cifar100", "weights", "gpu")),
    # The folder MIT-67 has train/CLASS/*.jpg and test/CLASS/*.jpg, resized to one size.
    "paper-mit67": Preset(_MIT67, needs=("MIT-67", "weights", "gpu")),
}
