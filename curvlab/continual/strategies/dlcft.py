"""Deep linear continual fine-tuning."""

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from curvlab.continual.buffers import Reservoir
from curvlab.continual.options import check_whole
from curvlab.continual.strategies.last_layer import find_last_linear
from curvlab.continual.strategies.osla import OSLA
from curvlab.continual.strategies.quadratic import make_penalty
from curvlab.errors import CurvlabError
from curvlab.matrices import KFAC, Composite, CurvatureMatrix
from curvlab.matrices.kronecker import Factors
from curvlab.parameters import ParameterSpace, Selection
from curvlab.quantities import Quantity
from curvlab.structures import Structure, parse_structure

if TYPE_CHECKING:
    from curvlab.continual.learner import Batch, Learner


class DLCFT(OSLA):
    """Deep linear continual fine-tuning (Shon et al., 2022), for data-, task- and class-incremental streams.

    The network is pre-trained and linearized except for its last layer, and the loss is the squared error of scaled
    one-hot targets. Then the loss of a past task is quadratic in the parameters below the last layer (and in those of
    the last layer, but not in both together), so that a quadratic penalty can be exact, and its curvature does not
    vanish as the task is learnt::

        run(stream, linearize(model, head="fc"), DLCFT(), loss="squared_error", target_scale=15.0, optimizer="adam",
            lr=1e-4)

    With another network or loss, this is the method without these two components, as in the ablation of the paper.

    The objective after ``t`` tasks is the mean over the tasks so far,
    ``(loss + replay + 1/2 (theta - mu)' L (theta - mu)) / (t + 1)``, where ``mu`` is the last solution and ``L`` the
    sum of ``strength`` times the curvature of each task. (``OSLA`` has the sum over tasks in place of the mean.) The
    division is in the authors' code and in the objective of the paper: steps do not grow with the number of tasks. The
    ``loss`` in the records of a run is divided, too. With TK-FAC, merges keep the exact trace of every layer, in all
    settings. For the squared error, a merge is exact in the last layer with ``kfac`` and ``rescaled``, whose factor
    ``S`` is the same for all tasks there. The factors of the TK-FAC paper have another scale, and their mean is not the
    mean of ``z z'``.

    With a ``growing`` head, the rows of new outputs in the last layer start at zero. (Before the first task, all rows
    except those of its classes are set to zero.) ``classifier_regularization`` gives new outputs the curvature of the
    past tasks: all earlier samples had the target 0 there, whose squared error has the Hessian ``E[z z']`` in the new
    row, where ``z`` is the input of the last layer. This needs no stored samples. The factor ``S`` of the layer becomes
    a multiple of the identity over all outputs so far, and ``A = E[z z']`` stays, as if all outputs had existed from
    the start.

    The memory for replay, whose size and rule are not published, is a reservoir of the past tasks. Each step draws as
    many stored samples as there are new ones, and adds their mean loss with weight 1.

    Memory: a matrix and a vector; with ``exact``, factors for each task. With replay, ``buffer_size`` samples.

    Args:
        strength: Factor of every task's curvature.
        quantity: Quantity of ``curvlab.estimate``; for the squared error ``fisher`` is the Gauss-Newton matrix. The
            authors draw targets, which is ``fisher:samples=1`` and costs one backward pass instead of one per output.
        structure: ``kfac``, or ``tkfac`` with the authors' factors (``rescaled``) or those of its paper; with ``exact``
            any structure that supports sums.
        merge: ``average`` (the authors' code), ``exact`` or ``nearest``; see ``OSLA``.
        classifier_regularization: Whether to protect the rows of new outputs; for ``growing`` heads.
        buffer_size: Maximum number of samples stored for replay; None for no replay.
        backend: Backend of ``curvlab.estimate``.
        params: Selection (as for ``curvlab.estimate``) of the parameters to protect; None for all.
        samples: Number of training samples of a task for the curvature, drawn at random; None for all.

    Raises:
        CurvlabError: An option is invalid, or no backend computes the curvature.
    """

    def __init__(
        self,
        strength: float = 1.0,
        *,
        quantity: Quantity | str = "fisher",
        structure: Structure | str = "tkfac:variant=rescaled",
        merge: Literal["exact", "average", "nearest"] = "average",
        classifier_regularization: bool = True,
        buffer_size: int | None = None,
        backend: str = "auto",
        params: Selection | None = None,
        samples: int | None = None,
    ) -> None:
        super().__init__(
            strength,
            quantity=quantity,
            structure=structure,
            merge=merge,
            backend=backend,
            params=params,
            samples=samples,
        )
        if buffer_size is not None:
            check_whole("buffer_size", buffer_size)
        self.classifier_regularization, self.buffer_size = classifier_regularization, buffer_size

    def start(self, learner: "Learner") -> None:
        """Implement the hook of ``Strategy``.

        Raises:
            CurvlabError: The head is ``growing``, and its new outputs cannot be protected.
        """
        super().start(learner)
        self.memory = None if self.buffer_size is None else Reservoir(self.buffer_size)
        if learner.outputs.head != "growing":
            return
        self.last = find_last_linear(learner, "DLCFT with a growing head")
        if self.classifier_regularization:
            self._check_regularization(learner)
        rows, layer = ~_active_outputs(learner, 0), learner.model.get_submodule(self.last)
        with torch.no_grad():
            for tensor in (*layer.parameters(), *layer.buffers()):  # a linearized layer has its point as buffers
                tensor[rows] = 0.0

    def before_task(self, learner: "Learner") -> None:
        """Implement the hook of ``Strategy``."""
        if self.precision is None or not self.classifier_regularization or learner.outputs.head != "growing":
            return
        before, now = (_active_outputs(learner, task) for task in (learner.task - 1, learner.task))
        self.precision = extend_to_new_outputs(self.precision, self.last, before, now)
        self.penalty = make_penalty(self.precision, learner)

    def loss(self, learner: "Learner", batch: "Batch") -> Tensor:
        """Implement the hook of ``Strategy``."""
        tasks = learner.task + 1
        drawn = {} if self.memory is None else self.memory.draw(learner.batch_size, learner.generator)
        if not drawn:
            return learner.loss(learner.model(batch.x), batch.y, batch.task) / tasks
        outputs = learner.model(torch.cat([batch.x, drawn["x"]]))
        new, old = outputs.split([len(batch.x), len(drawn["x"])])
        return (learner.loss(new, batch.y, batch.task) + learner.loss(old, drawn["y"], drawn["task"])) / tasks

    def after_backward(self, learner: "Learner") -> None:
        """Implement the hook of ``Strategy``."""
        self.penalty.add_gradient_(learner.parameters, 1 / (learner.task + 1))

    def after_task(self, learner: "Learner") -> None:
        """Implement the hook of ``Strategy``."""
        super().after_task(learner)
        if self.memory is not None:
            samples = learner.samples()
            self.memory.add({"x": samples.x, "y": samples.y, "task": samples.tasks}, learner.generator)

    def _check_regularization(self, learner: "Learner") -> None:
        structure = parse_structure(self.curvature["structure"]).name
        if learner.loss_name != "squared_error":
            raise CurvlabError(
                "classifier_regularization requires the loss squared_error, not "
                f"{learner.loss_name}: use that loss, or classifier_regularization=False"
            )
        if structure not in ("kfac", "tkfac"):
            raise CurvlabError(
                f"classifier_regularization requires Kronecker factors, which {structure} does not have: use kfac or "
                "tkfac, or classifier_regularization=False"
            )
        if (
            f"{self.last}.weight".removeprefix(".")
            not in ParameterSpace.of(learner.model, self.curvature["params"]).names
        ):
            raise CurvlabError(
                f"classifier_regularization protects the rows of {self.last}, which is not among the protected "
                "parameters: add it to params, or use classifier_regularization=False"
            )


def extend_to_new_outputs(matrix: CurvatureMatrix, layer: str, before: Tensor, now: Tensor) -> CurvatureMatrix:
    """Return the curvature of past tasks, extended to new outputs whose targets were 0 in all past tasks.

    Args:
        matrix: Matrix with Kronecker factors of the layer.
        layer: Name of the last layer.
        before: Active outputs of the past tasks, booleans ``(C,)``.
        now: Active outputs from now on, booleans ``(C,)``.
    """
    if isinstance(matrix, Composite):
        parts = [extend_to_new_outputs(part, layer, before, now) for part in matrix.parts]
        return Composite(parts, matrix.space, matrix.info)
    if not isinstance(matrix, KFAC):
        return matrix
    own = {f"{layer}.{kind}".removeprefix(".") for kind in ("weight", "bias")}
    extended = dict(matrix.factors)
    for key, block in matrix.layers.items():
        if own & {block.weight, block.bias}:
            a, s = matrix.factors[key]
            scale = s.diagonal(dim1=1, dim2=2)[:, before].mean(dim=1)
            extended[key] = Factors(a, scale[:, None, None] * torch.diag(now.to(s)))
    return type(matrix)(extended, matrix.space, matrix.info)


def _active_outputs(learner: "Learner", task: int) -> Tensor:
    """Return the active outputs while a task is the current one, booleans ``(C,)``."""
    active = learner.outputs.active_mask(task, task)
    return torch.ones(learner.outputs.count, dtype=torch.bool, device=learner.device) if active is None else active
