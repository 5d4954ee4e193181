"""Simultaneous training of several copies of a network, each with its own quadratic penalty."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from curvlab.checks import whole_number
from curvlab.errors import CurvlabError
from curvlab.parameters import ParameterSpace
from curvlab.training.samples import Samples, reference, take
from curvlab.training.state import derive_seed, restore_modes

_CHUNK = 1000  # samples per forward pass of an evaluation


class TrainedCopies(NamedTuple):
    """Result of ``train_copies``, for K copies and E evaluations.

    Attributes:
        parameters: Parameters by name, ``(K, *shape)``.
        steps: Steps after which the copies were evaluated.
        accuracy: Accuracies (0 to 1) by name of the samples, ``(E, K)``, float64; NaN if a copy diverged.
    """

    parameters: dict[str, Tensor]
    steps: list[int]
    accuracy: dict[str, Tensor]


def train_copies(
    model: nn.Module,
    data: Samples,
    weights: Tensor,
    *,
    lr: float,
    steps: int,
    every: int,
    evaluation: Mapping[str, Samples],
    batch_size: int = 100,
    seed: int = 0,
) -> TrainedCopies:
    """Train K copies of a network with Adam on the same batches, and evaluate them during training.

    Copy k minimises ``cross_entropy + 1/2 sum_j weights[k, j] (theta_j - theta0_j)^2``, where ``theta0`` are the
    parameters of the model, which is not changed. This is EWC for two tasks with K combinations of strength and
    importance. The copies are trained as one batched network (``torch.func.vmap``), which takes about half the time of
    K separate trainings of a small network on a CPU.

    Args:
        model: A deterministic module with one output ``(N, C)``; it is used in eval mode.
        data: Inputs ``(N, ...)`` and class indices ``(N,)``.
        weights: ``(K, P)``, in the order of ``curvlab.parameters.ParameterSpace``; a row of zeros means no penalty.
        lr: Learning rate of Adam.
        steps: Number of training steps.
        every: Steps between evaluations; the last step is always evaluated.
        evaluation: Samples to evaluate on, by name.
        batch_size: Samples per step; each epoch has a new order.
        seed: Seed of the orders.

    Raises:
        CurvlabError: A number is out of range, or ``weights`` has the wrong shape.

    Examples:
        >>> x, y = torch.eye(3), torch.tensor([0, 1, 2])
        >>> model = nn.Linear(3, 3)
        >>> held = torch.tensor([[0.0], [1e6]]).expand(2, 12)
        >>> trained = train_copies(model, (x, y), held, lr=0.1, steps=50, every=50, evaluation={"all": (x, y)})
        >>> trained.accuracy["all"][0, 0].item(), trained.parameters["weight"].shape
        (1.0, torch.Size([2, 3, 3]))
    """
    steps, every = whole_number(steps, "steps", 1), whole_number(every, "every", 1)
    batch_size = whole_number(batch_size, "batch_size", 1)
    if not 0 < lr < math.inf:
        raise CurvlabError(f"lr must be above 0 and finite, not {lr}")
    space, like = ParameterSpace.of(model), reference(model)
    if weights.ndim != 2 or weights.shape[1] != space.total:
        raise CurvlabError(f"weights must have shape (copies, {space.total}), not {tuple(weights.shape)}")
    own = dict(model.named_parameters())
    centres = {name: own[name].detach() for name in space.names}
    copies = len(weights)
    parameters = {name: p.repeat(copies, *[1] * p.ndim).requires_grad_() for name, p in centres.items()}
    pulls = vmap(space.unflatten)(weights.to(like)) if bool(weights.any()) else {}
    optimizer = torch.optim.Adam(parameters.values(), lr=lr, fused=True)
    x, y = take(data, slice(None), like)
    trained = TrainedCopies(parameters, [], {name: torch.empty(0, copies, dtype=torch.float64) for name in evaluation})

    def forward(inputs: Tensor) -> Tensor:
        outputs: Tensor = vmap(lambda one: functional_call(model, one, (inputs,)))(parameters)
        return outputs

    with restore_modes(model), torch.enable_grad():
        model.eval()
        order = torch.empty(0, dtype=torch.long)
        for step in range(1, steps + 1):
            if not len(order):
                generator = torch.Generator().manual_seed(derive_seed(seed, step))
                order = torch.randperm(len(x), generator=generator)
            batch, order = order[:batch_size].to(like.device), order[batch_size:]
            optimizer.zero_grad()
            losses = F.cross_entropy(forward(x[batch]).flatten(0, 1), y[batch].repeat(copies), reduction="none")
            (losses.sum() / len(batch)).backward()
            for name, pull in pulls.items():
                parameter = parameters[name]
                assert parameter.grad is not None
                parameter.grad.addcmul_(pull, parameter.detach() - centres[name])
            optimizer.step()
            if step % every == 0 or step == steps:
                trained.steps.append(step)
                for name, samples in evaluation.items():
                    row = _accuracy(forward, take(samples, slice(None), like), copies)
                    trained.accuracy[name] = torch.cat([trained.accuracy[name], row[None]])
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    return trained


@torch.no_grad()
def _accuracy(forward: Callable[[Tensor], Tensor], samples: Samples, copies: int) -> Tensor:
    x, y = samples
    right = torch.zeros(copies, dtype=torch.float64)
    for start in range(0, len(x), _CHUNK):
        outputs = forward(x[start : start + _CHUNK])
        hits = (outputs.argmax(dim=2) == y[start : start + _CHUNK]).sum(dim=1)
        right += torch.where(outputs.isfinite().flatten(1).all(dim=1), hits.double(), math.nan).cpu()
    return right / len(x)
