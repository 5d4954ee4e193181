"""Deep linear continual fine-tuning."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from curvlab.continual.buffers import Reservoir
from curvlab.continual.options import check_whole
from curvlab.continual.strategies.last_layer import last_linear
from curvlab.continual.strategies.osla import OSLA
from curvlab.continual.strategies.quadratic import around_here
from curvlab.errors import CurvlabError
from curvlab.matrices import KFAC, Composite, CurvatureMatrix
from curvlab.matrices.kronecker import Factors
from curvlab.parameters import ParameterSpace
from curvlab.quantities import Quantity
from curvlab.structures import Structure, parse_structure

if TYPE_CHECKING:
    from curvlab.continual.learner import Batch, Learner


class DLCFT(OSLA):
    """Deep linear continual fine-tuning (Shon et al., 2022), for data-, task- and class-incremental streams.

    The network is a pre-trained one, linearized but for its last layer, the loss the squared error of scaled one-hot
    targets: then the loss of a past task is a quadratic in the parameters below the last layer (and in those of the
    last layer, though not in both together), so that a penalty can be exact and its curvature does not vanish as the
    task is learnt::

        run(stream, linearize(model, head="fc"), DLCFT(), loss="squared_error", target_scale=15.0, optimizer="adam",
            lr=1e-4)

    With another network or loss it is the method without these two ingredients, as in the paper's ablation.

    Minimised is the mean over the tasks so far, ``(loss + replay + 1/2 (theta - mu)' L (theta - mu)) / (t + 1)`` after
    ``t`` tasks, with ``mu`` the last solution and ``L`` the sum of ``strength`` times their curvature (``OSLA``, which
    has the sum in place of the mean). The division is that of the authors' code and of the paper's objective: steps do
    not grow with the number of tasks. So the ``loss`` that a run records of a task is divided, too. With TK-FAC, merges
    keep the exact trace of every layer, in all settings. For the squared error a merge is exact in the last layer with
    ``kfac`` and ``rescaled``, whose ``S`` are alike there; the factors of TK-FAC's own paper are scaled otherwise, and
    their mean is not that of ``z z'``.

    With a ``growing`` head, new outputs come with rows of zeros in the last layer (its rows are set to zero before the
    first task, but for those of that task's classes), and ``classifier_regularization`` gives them the curvature of the
    past: all earlier samples had the target 0 there, whose squared error has the Hessian ``E[z z']`` in the new row,
    ``z`` the inputs of the last layer, which needs no old sample. So the layer's factor ``S`` becomes a multiple of the
    identity over all outputs so far, and ``A = E[z z']`` stays. It is as if the outputs had been there from the start.

    The memory of ``replay``, whose size and rule are not published, is a reservoir of the past tasks; a step draws as
    many of its samples as there are new ones, and adds their mean loss with weight 1.

    Memory: a matrix and a vector; with ``exact``, factors a task. ``buffer_size`` samples.

    Args:
        strength: Factor of every task's curvature.
        quantity: Of ``curvlab.estimate``; for the squared error ``fisher`` is the Gauss-Newton matrix. The authors draw
            targets, which is ``fisher:samples=1`` and costs one backward pass in place of one an output.
        structure: ``kfac``, or ``tkfac`` with the authors' factors (``rescaled``) or those of its paper; with ``exact``
            any that has sums.
        merge: ``average`` (the authors' code), ``exact`` or ``nearest``; see ``OSLA``.
        classifier_regularization: Protect the rows of new outputs, too; for ``growing`` heads.
        buffer_size: Samples that are kept for replay; None for no replay.
        backend: Of ``curvlab.estimate``.
        params: Glob patterns of the parameters to protect; None for all.
        samples: Training samples of a task that the curvature is estimated on, drawn at random; None for all.

    Raises:
        CurvlabError: An option is not one of these, or no backend computes the curvature.
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
        params: Sequence[str] | str | None = None,
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
        """See ``Strategy``.

        Raises:
            CurvlabError: The head grows, and its new outputs cannot be protected.
        """
        super().start(learner)
        self.memory = None if self.buffer_size is None else Reservoir(self.buffer_size)
        if learner.outputs.head != "growing":
            return
        self.last = last_linear(learner, "DLCFT with a growing head")
        if self.classifier_regularization:
            self._check_regularization(learner)
        rows, layer = ~_counting(learner, 0), learner.model.get_submodule(self.last)
        with torch.no_grad():
            for tensor in (*layer.parameters(), *layer.buffers()):  # the latter: where it is linearized, too
                tensor[rows] = 0.0

    def before_task(self, learner: "Learner") -> None:
        """See ``Strategy``."""
        if self.precision is None or not self.classifier_regularization or learner.outputs.head != "growing":
            return
        before, now = (_counting(learner, task) for task in (learner.task - 1, learner.task))
        self.precision = with_new_outputs(self.precision, self.last, before, now)
        self.penalty = around_here(self.precision, learner)

    def loss(self, learner: "Learner", batch: "Batch") -> Tensor:
        """See ``Strategy``."""
        tasks = learner.task + 1
        drawn = {} if self.memory is None else self.memory.draw(learner.batch_size, learner.generator)
        if not drawn:
            return learner.loss(learner.model(batch.x), batch.y, batch.task) / tasks
        outputs = learner.model(torch.cat([batch.x, drawn["x"]]))
        new, old = outputs.split([len(batch.x), len(drawn["x"])])
        return (learner.loss(new, batch.y, batch.task) + learner.loss(old, drawn["y"], drawn["task"])) / tasks

    def after_backward(self, learner: "Learner") -> None:
        """See ``Strategy``."""
        self.penalty.add_gradient_(learner.parameters, 1 / (learner.task + 1))

    def after_task(self, learner: "Learner") -> None:
        """See ``Strategy``."""
        super().after_task(learner)
        if self.memory is not None:
            samples = learner.samples()
            self.memory.add({"x": samples.x, "y": samples.y, "task": samples.tasks}, learner.generator)

    def _check_regularization(self, learner: "Learner") -> None:
        structure = parse_structure(self.curvature["structure"]).name
        if learner.loss_name != "squared_error":
            raise CurvlabError(
                "classifier_regularization knows the curvature of new outputs with squared_error, not "
                f"{learner.loss_name}: take that loss, or classifier_regularization=False"
            )
        if structure not in ("kfac", "tkfac"):
            raise CurvlabError(
                f"classifier_regularization is of Kronecker factors, and {structure} has none: take kfac or tkfac, or "
                "classifier_regularization=False"
            )
        if (
            f"{self.last}.weight".removeprefix(".")
            not in ParameterSpace.of(learner.model, self.curvature["params"]).names
        ):
            raise CurvlabError(
                f"classifier_regularization protects the rows of {self.last}, which is not among the protected "
                "parameters: add it to params, or take classifier_regularization=False"
            )


def with_new_outputs(matrix: CurvatureMatrix, layer: str, before: Tensor, now: Tensor) -> CurvatureMatrix:
    """Return the curvature of past tasks when new outputs come, whose targets were 0 all along.

    Args:
        matrix: With Kronecker factors of the layer.
        layer: Name of the last layer.
        before: The outputs so far, booleans ``(C,)``.
        now: Those from now on.
    """
    if isinstance(matrix, Composite):
        return Composite([with_new_outputs(p, layer, before, now) for p in matrix.parts], matrix.space, matrix.info)
    if not isinstance(matrix, KFAC) or layer not in matrix.factors:
        return matrix
    a, s = matrix.factors[layer]
    scale = s.diagonal(dim1=1, dim2=2)[:, before].mean(dim=1)
    s = scale[:, None, None] * torch.diag(now.to(s))
    return type(matrix)(matrix.factors | {layer: Factors(a, s)}, matrix.space, matrix.info)


def _counting(learner: "Learner", task: int) -> Tensor:
    """Return which outputs count while a task is the last one that has come, booleans ``(C,)``."""
    counting = learner.outputs.counting(task, task)
    return torch.ones(learner.outputs.count, dtype=torch.bool, device=learner.device) if counting is None else counting
