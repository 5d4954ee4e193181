"""What a run refuses: streams, models and options that do not go together."""

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
from curvlab.training.state import preserve_modes, random_state_restored


def check_options(options: Mapping[str, Any]) -> None:
    """Require that each option of ``run`` itself is in its range.

    Raises:
        CurvlabError: One is not.
    """
    if options["loss"] not in get_args(TaskLoss):
        raise CurvlabError(f"loss is cross_entropy or squared_error, not {options['loss']!r}")
    if options["evaluation"] not in ("test", "validation"):
        raise CurvlabError(f"evaluation is on test or validation, not on {options['evaluation']!r}")
    if options["evaluate_every"] is not None:
        check_whole("evaluate_every", options["evaluate_every"])
    check_positive("target_scale", options["target_scale"])
    if options["target_scale"] != 1 and options["loss"] != "squared_error":
        raise CurvlabError("target_scale belongs to the loss squared_error; leave it at 1")


def check_stream(stream: object, evaluation: Part) -> tuple[Task, ...]:
    """Require tasks with samples of one shape, to learn from and to be evaluated on, and return them.

    Raises:
        CurvlabError: There is no task, one is something else, or has other samples or none.
    """
    if not isinstance(stream, Iterable):
        raise CurvlabError(
            f"a stream is a sequence of tasks, such as permuted(dataset, tasks=5), not {type(stream).__name__}"
        )
    stream = tuple(stream)
    if not stream:
        raise CurvlabError("the stream has no tasks")
    for i, task in enumerate(stream):
        if not isinstance(task, Task):
            raise CurvlabError(f"a stream is a sequence of tasks, and number {i} is {type(task).__name__}")
        if task.dataset.sample_shape != stream[0].dataset.sample_shape:
            raise CurvlabError(
                f"the samples of a stream have one shape, and those of task {i} ({task.name}) have "
                f"{task.dataset.sample_shape}, not {stream[0].dataset.sample_shape}"
            )
        if not task.sizes[evaluation]:
            raise CurvlabError(f"task {i} ({task.name}) has no {evaluation} samples: make the stream with validation=N")
    return stream


def check_loss(stream: Sequence[Task], outputs: Outputs, loss: TaskLoss) -> None:
    """Require that the loss depends on the network in every task.

    Raises:
        CurvlabError: It is the cross-entropy of a single output.
    """
    if loss != "cross_entropy":
        return
    for i, task in enumerate(stream):
        counting = outputs.counting(i, now=i)
        if (outputs.count if counting is None else int(counting.sum())) == 1:
            ways_out = {
                "growing": "begin with a task of several classes, take head='single', or ",
                "single": "give the model an output more, or take ",
            }
            raise CurvlabError(
                f"task {i} ({task.name}) has a single output to choose from with head {outputs.head!r}, so that its "
                "cross-entropy is zero and nothing is learnt: "
                + ways_out.get(outputs.head, "take head='single' or head='growing', or ")
                + "loss='squared_error'"
            )


def check_strategy(strategy: object) -> None:
    """Require a strategy.

    Raises:
        CurvlabError: It is something else.
    """
    if not isinstance(strategy, Strategy):
        name = strategy.__name__ if isinstance(strategy, type) else type(strategy).__name__
        raise CurvlabError(f"strategy is an object such as curvlab.continual.strategies.Naive(), not {name}")


def check_model(model: nn.Module, stream: Sequence[Task]) -> int:
    """Require a model that can be trained on the samples, and return how many outputs it has.

    Raises:
        CurvlabError: It does not take the samples, does not give one vector of outputs for each, has no trainable
            parameters, or holds values that are not finite or not there; or gradients cannot be had here.
    """
    require_module(model)
    if torch.is_inference_mode_enabled():
        raise CurvlabError("a run has to take gradients: call it outside of torch.inference_mode")
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in tensors:
            _check_made(f"{kind} {name}", tensor)
    if all(not p.requires_grad for p in model.parameters()):
        raise CurvlabError("the model has no trainable parameters (requires_grad is False for all)")
    check_weights(model, "at the start of the run")
    with (
        preserve_modes(model),
        random_state_restored(reference(model).device),
        torch.no_grad(),
        translate_model_errors("cannot take the samples"),
    ):
        model.eval()
        outputs = model(take(stream[0].take(torch.arange(1)), slice(None), reference(model))[0])
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != 1:
        shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise CurvlabError(f"the model must return one tensor (N, C); for one sample it returned {shape}")
    return outputs.shape[1]


def _check_made(name: str, tensor: Tensor) -> None:
    fault = None
    if is_lazy(tensor):
        fault = "has no shape yet: call the lazy model once, on a sample"
    elif tensor.is_meta:
        fault = "has no values: it is on the meta device"
    elif tensor.is_inference():
        fault = "cannot be trained, as it was made in torch.inference_mode: build or copy the model outside of it"
    if fault:
        raise CurvlabError(f"the {name} of the model {fault}")
