"""The augmented forward pass: hidden states and their tangents, layer by layer, for modules with a rule.

The pass computes the hidden states at the point of linearization, which do not depend on the parameters, together with
their directional derivatives along the displacement of the parameters. Only the tangents have a graph, so that a
backward pass costs as much as that of the plain model. The rules are those of Table 4 in the supplement of Shon et al.,
"DLCFT: Deep linear continual fine-tuning for general incremental learning" (2022), after Mu, Liang and Li, "Gradients
as features for deep representation learning" (ICLR 2020), and further rules for eval-mode batch normalisation, dropout
and residual blocks.

A tangent is None if it is zero for every displacement: for the inputs, and after frozen layers.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvlab.linearize.point import point_value
from curvlab.linearize.pushforward import rounds
from curvlab.models import BasicBlock, FrozenBatchNorm2d, ResNet20

Tangent = Tensor | None
Pair = tuple[Tensor, Tangent]


def has_rule(model: nn.Module) -> bool:
    """Return whether all modules of a model have a rule and no hooks, which a rule would ignore."""
    return all(
        type(module) in _RULES
        and not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
        and not vars(module).get("return_indices")
        for module in model.modules()
    )


def push(model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the outputs at the point of linearization, and their change along the parameter displacement."""
    outputs, tangent = _push(model, inputs, None)
    return outputs, torch.zeros_like(outputs) if tangent is None else tangent


def _push(module: nn.Module, x: Tensor, t: Tangent) -> Pair:
    return _RULES[type(module)](module, x, t)


def _identity(_: Any, x: Tensor, t: Tangent) -> Pair:
    return x, t


def _linear_map(module: Any, x: Tensor, t: Tangent) -> Pair:
    return module.forward(x), None if t is None else module.forward(t)


def _linear(module: nn.Linear, x: Tensor, t: Tangent) -> Pair:
    weight, bias = _values(module)
    out = F.linear(x, weight, bias)
    change = None if t is None else F.linear(t, weight)
    if not _displaced(module):
        return out, change
    if rounds(x):
        return out, _add(change, F.linear(x, module.weight - weight, _moved_bias(module, bias)))
    # The difference of two products is cheaper than the product with a difference, which needs a pass over the weights.
    return out, _add(change, F.linear(x, module.weight, module.bias) - out)


def _convolution(module: nn.Conv2d, x: Tensor, t: Tangent) -> Pair:
    weight, bias = _values(module)
    out = module._conv_forward(x, weight, bias)
    change = None if t is None else module._conv_forward(t, weight, None)
    if _displaced(module):
        change = _add(change, module._conv_forward(x, module.weight - weight, _moved_bias(module, bias)))
    return out, change


def _batch_norm(module: nn.BatchNorm2d, x: Tensor, t: Tangent) -> Pair:
    mean, variance = module.running_mean, module.running_var
    assert mean is not None
    assert variance is not None
    weight, bias = _values(module)
    out = F.batch_norm(x, mean, variance, weight, bias, eps=module.eps)
    scale = (variance + module.eps).rsqrt() if weight is None else weight * (variance + module.eps).rsqrt()
    change = None if t is None else t * scale.view(-1, 1, 1)
    if _displaced(module):
        moved_weight = torch.zeros_like(mean) if weight is None else module.weight - weight
        moved_bias = None if bias is None else module.bias - bias
        change = _add(change, F.batch_norm(x, mean, variance, moved_weight, moved_bias, eps=module.eps))
    return out, change


def _relu(_: nn.ReLU, x: Tensor, t: Tangent) -> Pair:
    # The backward kernel masks a tensor by the sign of another one in a single pass.
    return x.relu(), None if t is None else torch.ops.aten.threshold_backward(t, x, 0.0)


def _leaky_relu(module: nn.LeakyReLU, x: Tensor, t: Tangent) -> Pair:
    slope = module.negative_slope
    change = None if t is None else torch.ops.aten.leaky_relu_backward(t, x, slope, False)
    return F.leaky_relu(x, slope), change


def _max_pool(module: nn.MaxPool2d, x: Tensor, t: Tangent) -> Pair:
    options = module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode
    if t is None:
        return F.max_pool2d(x, *options), None
    out, indices = F.max_pool2d(x, *options, return_indices=True)
    return out, t.flatten(-2).gather(-1, indices.flatten(-2)).view_as(indices)


def _dropout(module: nn.Dropout, x: Tensor, t: Tangent) -> Pair:
    if not module.training or not module.p:
        return x, t
    mask = F.dropout(torch.ones_like(x), module.p)  # one mask for both: given the mask, dropout is linear
    return x * mask, None if t is None else t * mask


def _sequential(module: nn.Sequential, x: Tensor, t: Tangent) -> Pair:
    for child in module:
        x, t = _push(child, x, t)
    return x, t


def _basic_block(block: BasicBlock, x: Tensor, t: Tangent) -> Pair:
    residual, change = x, t
    for module in (block.conv1, block.bn1, block.relu1, block.conv2, block.bn2):
        residual, change = _push(module, residual, change)
    if t is not None:
        change = _add(change, block.shortcut(t))
    return _push(block.relu2, residual + block.shortcut(x), change)


def _resnet20(model: ResNet20, x: Tensor, t: Tangent) -> Pair:
    for module in (model.conv1, model.bn1, model.relu1, model.layer1, model.layer2, model.layer3):
        x, t = _push(module, x, t)
    return _push(model.linear, x.mean(dim=(2, 3)), None if t is None else t.mean(dim=(2, 3)))


def _values(module: Any) -> tuple[Any, Any]:
    """Return the weight and bias at the point of linearization; constants keep their value."""
    return tuple(
        value if (at := point_value(module, key)) is None else at
        for key, value in (("weight", module.weight), ("bias", module.bias))
    )  # type: ignore[return-value]


def _moved_bias(module: Any, bias: Tangent) -> Tangent:
    return None if bias is None or module.bias is None else module.bias - bias


def _displaced(module: nn.Module) -> bool:
    """Return whether a parameter of the module can differ from its value at the point of linearization."""
    return any(point_value(module, key) is not None for key in ("weight", "bias"))


def _add(one: Tangent, other: Tensor) -> Tensor:
    return other if one is None else one + other


_RULES: dict[type[nn.Module], Callable[[Any, Tensor, Tangent], Pair]] = {
    nn.Identity: _identity,
    nn.Linear: _linear,
    nn.Conv2d: _convolution,
    nn.BatchNorm2d: _batch_norm,
    FrozenBatchNorm2d: _batch_norm,
    nn.ReLU: _relu,
    nn.LeakyReLU: _leaky_relu,
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _linear_map,
    nn.AdaptiveAvgPool2d: _linear_map,
    nn.Flatten: _linear_map,
    nn.Dropout: _dropout,
    nn.Sequential: _sequential,
    BasicBlock: _basic_block,
    ResNet20: _resnet20,
}
