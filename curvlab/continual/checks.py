"""Checks of the stream, the model, the method and the options of a run."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from curvlab.continual.options import check_positive, check_whole
from curvlab.continual.outputs import Outputs, TaskLoss
from curvlab.continual.strategies.base import Strategy
from curvlab.continual.task import Part, Task
from curvlab.errors import CurvlabError
from curvlab.training.samples import check_weights, reference, require_module, take, translate_model_errors
from curvlab.training.state import fork_random_state, restore_modes


def check_options(options: Mapping[str, Any]) -> None:
    """Check the options that belong to ``run`` itself.

    Raises:
        CurvlabError: An option is out of its range.
    """
    if options["loss"] not in get_args(TaskLoss):
        raise CurvlabError(f"loss must be cross_entropy or squared_error, not {options['loss']!r}")
    if options["evaluation"] not in ("test", "validation"):
        raise CurvlabError(f"evaluation must be test or validation, not {options['evaluation']!r}")
    if options["evaluate_every"] is not None:
        check_whole("evaluate_every", options["evaluate_every"])
    check_positive("target_scale", options["target_scale"])
    if options["target_scale"] != 1 and options["loss"] != "squared_error":
        raise CurvlabError("target_scale belongs to the loss squared_error; leave it at 1")


def check_stream(stream: object, evaluation: Part) -> tuple[Task, ...]:
    """Return the tasks as a tuple, after a check that all have samples of the same shape.

    Raises:
        CurvlabError: There is no task, an element is not a ``Task``, the sample shapes differ, or a task has no
            samples to evaluate on.
    """
    if not isinstance(stream, Iterable):
        raise CurvlabError(
            f"a stream must be a sequence of tasks, such as permuted(dataset, tasks=5), not {type(stream).__name__}"
        )
    stream = tuple(stream)
    if not stream:
        raise CurvlabError("the stream has no tasks; give at least one")
    for i, task in enumerate(stream):
        if not isinstance(task, Task):
            raise CurvlabError(f"a stream must be a sequence of tasks, but element {i} is {type(task).__name__}")
        if task.dataset.sample_shape != stream[0].dataset.sample_shape:
            raise CurvlabError(
                f"all samples of a stream must have the same shape, but those of task {i} ({task.name}) have "
                f"{task.dataset.sample_shape}, not {stream[0].dataset.sample_shape}"
            )
        if not task.sizes[evaluation]:
            raise CurvlabError(f"task {i} ({task.name}) has no {evaluation} samples: use validation=N for the stream")
    return stream


def check_loss(stream: Sequence[Task], outputs: Outputs, loss: TaskLoss) -> None:
    """Check that the loss depends on the network in every task.

    Raises:
        CurvlabError: A task has the cross-entropy of a single output.
    """
    if loss != "cross_entropy":
        return
    for i, task in enumerate(stream):
        active = outputs.active_mask(i, now=i)
        if (outputs.count if active is None else int(active.sum())) == 1:
            ways_out = {
                "growing": "start with a task of several classes, use head='single', or use ",
                "single": "give the model at least two outputs, or use ",
            }
            raise CurvlabError(
                f"task {i} ({task.name}) has a single active output with head {outputs.head!r}, so its "
                "cross-entropy is always zero and nothing is learnt: "
                + ways_out.get(outputs.head, "use head='single' or head='growing', or use ")
                + "loss='squared_error'"
            )


def check_strategy(strategy: object) -> None:
    """Check that the strategy is a ``Strategy``.

    Raises:
        CurvlabError: It is another object, or a class.
    """
    if not isinstance(strategy, Strategy):
        name = strategy.__name__ if isinstance(strategy, type) else type(strategy).__name__
        raise CurvlabError(f"strategy must be an instance such as curvlab.continual.strategies.Naive(), not {name}")


def check_model(model: nn.Module, stream: Sequence[Task]) -> int:
    """Return the number of outputs of a model, after a check that it can be trained on the samples.

    Raises:
        CurvlabError: The model does not accept the samples, does not return one output vector per sample, has no
            trainable parameters, or contains NaN, infinite or uninitialised values; or inference mode is active.
    """
    require_module(model)
    if torch.is_inference_mode_enabled():
        raise CurvlabError("a run needs gradients: call it outside of torch.inference_mode")
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in tensors:
            _check_initialised(f"{kind} {name}", tensor)
    if all(not p.requires_grad for p in model.parameters()):
        raise CurvlabError("the model has no trainable parameters; set requires_grad=True for at least one")
    check_weights(model, "at the start of the run")
    with (
        restore_modes(model),
        fork_random_state(reference(model).device),
        torch.no_grad(),
        translate_model_errors("cannot take the samples"),
    ):
        model.eval()
        outputs = model(take(stream[0].take(torch.arange(1)), slice(None), reference(model))[0])
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != 1:
        shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise CurvlabError(f"the model must return one tensor of shape (N, C); for one sample it returned {shape}")
    return outputs.shape[1]


def _check_initialised(name: str, tensor: Tensor) -> None:
    fault = None
    if is_lazy(tensor):
        fault = "has no shape yet: call the lazy model once on a sample"
    elif tensor.is_meta:
        fault = "has no values: it is on the meta device"
    elif tensor.is_inference():
        fault = "cannot be trained, as it was created in torch.inference_mode: build or copy the model outside of it"
    if fault:
        raise CurvlabError(f"the {name} of the model {fault}")
