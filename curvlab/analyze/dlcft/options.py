"""The options of the analysis ``dlcft``, and its presets."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field

from curvlab.analyze.frame.analysis import Preset
from curvlab.analyze.frame.subject import SubjectConfig
from curvlab.training.optimization import OptimizerName, ScheduleName

Positive = Annotated[float, Field(gt=0)]
Label = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]

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

#: The fields with the values of hyper-parameters that are tried.
LISTS = (
    "nonlinear_lrs",
    "linear_lrs",
    "lwf_strengths",
    "ewc_strengths",
    "mas_strengths",
    "osla_strengths",
    "der_alphas",
    "dlcft_strengths",
)


class DlcftConfig(SubjectConfig):
    """Fine-tune a pre-trained network on streams of tasks, linearized with squared error and as it is."""

    titles: ClassVar[Mapping[str, str]] = {
        **SubjectConfig.titles,
        "settings": "tasks",
        "methods": "methods",
        "steps": "training",
        "nonlinear_lrs": "hyper-parameters",
        "selection_seeds": "evaluation",
    }

    classes: tuple[Label, ...] | Literal["all"] = (4, 5, 6, 7, 8, 9)
    """Class indices that the tasks are made of, or all."""
    validation: int = Field(default=120, ge=0)
    """Training samples that a stream holds out, equally many of each task, to choose hyper-parameters on."""
    samples: int | None = Field(default=None, ge=1)
    """Take curvatures on so many training samples of a task, random ones; none means all."""
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = (100,)
    """Hidden sizes of the mlp; no number for a linear model."""
    weights: Path | None = None
    """Start from the weights in this file, looked for here and in the data root, instead of pre-training on source
    classes; the last layer is a new one."""
    fine_tune: bool = False
    """Has no effect here: with weights the last layer is always a new one."""
    source_classes: tuple[Label, ...] = (0, 1, 2, 3)
    """Classes that the network is pre-trained on; no number with weights."""
    source_steps: int = Field(default=300, ge=1)
    """Steps of pre-training, with Adam at a learning rate of 0.001."""
    slope: float = Field(default=0.01, ge=0, lt=1)
    """Slope of the LeakyReLU that replaces every ReLU; 0 keeps the ReLU."""
    batch_norm: Literal["merged", "frozen"] = "merged"
    """Batch normalisation after pre-training: merged into the convolution before it, or a fixed map."""
    settings: tuple[Setting, ...] = ("data", "task", "class")
    """data and data_long (data-IL: random parts of the data, one head), task (task-IL: some classes each, whose outputs
    alone count), class (class-IL: the outputs of the classes so far count)."""
    stream_samples: int | None = Field(default=None, ge=1)
    """Training samples of a stream, held-out ones included, random ones; none means all."""
    test_samples: int | None = Field(default=None, ge=1)
    """Test on so many samples, random ones; none means all."""
    data_tasks: int = Field(default=10, ge=2)
    """Tasks of data."""
    long_tasks: int = Field(default=50, ge=2)
    """Tasks of data_long."""
    class_tasks: int = Field(default=3, ge=2)
    """Tasks of task and of class, with equally many classes each."""
    methods: tuple[MethodName, ...] = get_args(MethodName)
    """osla: online structured Laplace, with K-FAC or TK-FAC; dlcft: the same of the linear network with squared error;
    with diag, EWC's curvature. Those of class keep samples for replay. A setting runs those that it has."""
    buffer_size: int = Field(default=100, ge=1)
    """Samples kept for replay, of er, der, derpp, and in class of osla and dlcft."""
    draws: int | None = Field(default=None, ge=1)
    """Draw so many labels of the network a sample for a Fisher; none takes the expectation, at a pass an output."""
    steps: int = Field(default=60, ge=1)
    """Steps of a task; the first one of a stream has twice as many."""
    long_steps: int = Field(default=10, ge=1)
    """Steps of a task of data_long; the first one has twice as many."""
    batch_size: int = Field(default=64, ge=1)
    """New samples a step; as many are replayed."""
    schedule: ScheduleName = "linear"
    """Learning-rate schedule of a task; linear and cosine end at 0."""
    weight_decay: float = Field(default=1e-5, ge=0)
    """As the optimizer of torch.optim understands it."""
    clip_norm: Positive | None = None
    """Largest norm of a gradient; none means no limit."""
    nonlinear_optimizer: OptimizerName = "adam"
    """Optimizer of methods with the original (non-linear) network; sgd has a momentum of 0.9."""
    linear_optimizer: OptimizerName = "adam"
    """Optimizer of methods with the linearized network."""
    target_scale: Positive = 15.0
    """Value of the one-hot targets of squared error, in place of 1."""
    nonlinear_lrs: tuple[Positive, ...] = (3e-3, 1e-2)
    """Learning rates tried for methods with the original network."""
    linear_lrs: tuple[Positive, ...] = (1e-2, 3e-2)
    """Learning rates tried for methods with the linearized network."""
    lwf_strengths: tuple[Positive, ...] = (1.0, 10.0)
    """Strengths tried for lwf."""
    ewc_strengths: tuple[Positive, ...] = (1.0, 10.0)
    """Strengths tried for ewc; 1 is Bayes' rule."""
    mas_strengths: tuple[Positive, ...] = (0.01, 0.1)
    """Strengths tried for mas."""
    osla_strengths: tuple[Positive, ...] = (1.0, 10.0)
    """Strengths tried for osla, with either curvature; 1 is Bayes' rule."""
    der_alphas: tuple[Positive, ...] = (0.1, 0.5)
    """Weights of the old outputs that are tried for der and derpp."""
    der_beta: Positive = 0.5
    """Weight of the old labels for derpp."""
    dlcft_strengths: tuple[Positive, ...] = (1.0, 10.0)
    """Strengths tried for dlcft; the authors' is 1."""
    selection_seeds: tuple[Seed, ...] = (1000,)
    """Candidates are trained for each, and judged by their mean accuracy on the held-out samples after all tasks."""
    evaluation: Literal["test", "validation"] = "test"
    """What the table is measured on."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """A network is pre-trained, and streams are drawn, for each; the table has mean and standard deviation."""


_MNIST = DlcftConfig(
    data="mnist",
    hidden=(256,),
    settings=("data", "data_long", "task", "class"),
    stream_samples=2400,
    validation=600,
    test_samples=3000,
    long_tasks=100,
    buffer_size=200,
    source_steps=500,
    steps=100,
    long_steps=20,
    nonlinear_lrs=(1e-3, 3e-3, 1e-2),
    linear_lrs=(1e-3, 3e-3, 1e-2),
    lwf_strengths=(1.0, 3.0, 10.0),
    ewc_strengths=(1.0, 10.0, 100.0),
    mas_strengths=(0.01, 0.1, 1.0),
    osla_strengths=(1.0, 10.0, 100.0),
    der_alphas=(0.1, 0.3, 1.0),
    dlcft_strengths=(1.0, 10.0, 100.0),
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
    class_tasks=5,
    methods=(
        "fine_tuning",
        "ewc",
        "osla",
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
    steps=20,
    batch_size=32,
    nonlinear_lrs=(1e-4, 3e-4, 1e-3),
    linear_lrs=(1e-3, 3e-3, 1e-2),
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
        "methods": get_args(MethodName),
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
    }
)

PRESETS = {
    "default": Preset(DlcftConfig(), minutes=3),
    "cpu": Preset(_MNIST, minutes=45, needs=("mnist",)),
    "cpu-cifar100": Preset(_CIFAR, minutes=60, needs=("cifar100", "weights")),
    "paper": Preset(_PAPER, needs=("cifar100", "weights", "gpu")),
}
