"""Networks by name, and weights from a file."""

from collections import Counter, OrderedDict
from collections.abc import Sequence
from copy import deepcopy
from difflib import get_close_matches
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, Self, TypeGuard, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from curvlab.errors import CurvlabError, UnsupportedError, first_line

_NAMES = ("mlp", "cnn", "shallow_cnn", "resnet20")
_TORCHVISION = "torchvision:"


def mlp(inputs: int, hidden: Sequence[int], outputs: int, dropout: float = 0.0) -> nn.Sequential:
    """Return a fully connected ReLU network with the submodules flatten, fc1, relu1, fc2 and so on.

    Args:
        inputs: Number of values per sample; samples of any shape are flattened.
        hidden: Width of each hidden layer; empty for a linear model.
        outputs: Number of outputs.
        dropout: Dropout probability of the hidden units; if it is not 0, drop1 follows relu1 and so on.

    Raises:
        CurvlabError: A width is less than 1, or ``dropout`` is not in [0, 1).

    Examples:
        >>> [name for name, _ in mlp(784, (30, 30), 10).named_children()]
        ['flatten', 'fc1', 'relu1', 'fc2', 'relu2', 'fc3']
    """
    widths = (inputs, *hidden, outputs)
    if min(widths) < 1:
        raise CurvlabError(f"mlp cannot have the widths {'-'.join(map(str, widths))}: each must be at least 1")
    if not 0 <= dropout < 1:
        raise CurvlabError(f"dropout must be at least 0 and below 1, not {dropout}")
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for i, (before, after) in enumerate(pairwise(widths), start=1):
        layers[f"fc{i}"] = nn.Linear(before, after)
        if i <= len(hidden):
            layers[f"relu{i}"] = nn.ReLU()
            if dropout:
                layers[f"drop{i}"] = nn.Dropout(dropout)
    return nn.Sequential(layers)


def cnn(sample_shape: tuple[int, ...], outputs: int) -> nn.Sequential:
    """Return a small convolutional network: two blocks of 3x3 convolution, ReLU and 2x2 pooling, then a linear layer.

    Args:
        sample_shape: ``(C, H, W)`` with H and W at least 4.
        outputs: Number of outputs.

    Raises:
        CurvlabError: ``sample_shape`` is not such a shape.
    """
    if len(sample_shape) != 3 or min(sample_shape[1:]) < 4:
        raise CurvlabError(f"cnn takes images (C, H, W) of at least 4x4, not samples of shape {sample_shape}; use mlp")
    channels, height, width = sample_shape
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, 16, 3, padding=1),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(16, 32, 3, padding=1),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc=nn.Linear(32 * (height // 4) * (width // 4), outputs),
        )
    )


def shallow_cnn(sample_shape: tuple[int, ...], outputs: int) -> nn.Sequential:
    """Return a network of a 3x3 convolution, ReLU, 2x2 pooling, a ReLU layer of 100 units and a linear layer.

    On MNIST it is Conv(1, 32, 3), FC(5408, 100), FC(100, 10): the network of Shon et al. (2022), "DLCFT", that their
    code uses for the curvature during training.

    Args:
        sample_shape: ``(C, H, W)`` with H and W at least 4.
        outputs: Number of outputs.

    Raises:
        CurvlabError: ``sample_shape`` is not such a shape.
    """
    if len(sample_shape) != 3 or min(sample_shape[1:]) < 4:
        raise CurvlabError(
            f"shallow_cnn takes images (C, H, W) of at least 4x4, not samples of shape {sample_shape}; use mlp"
        )
    channels, height, width = sample_shape
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, 32, 3),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(32 * ((height - 2) // 2) * ((width - 2) // 2), 100),
            relu2=nn.ReLU(),
            fc2=nn.Linear(100, outputs),
        )
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation, and a shortcut without parameters (option A).

    If the block halves the image size and increases the number of channels, the shortcut takes every second pixel and
    pads with zero channels, half of them before and half after.
    """

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.relu2 = nn.ReLU()
        self.stride = stride
        self.padding = (after - before) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, before, H, W)`` to ``(N, after, H / stride, W / stride)``."""
        residual = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu2(residual + self.shortcut(x))
        return out

    def shortcut(self, x: Tensor) -> Tensor:
        """Return the shortcut: the input of the block, or every second pixel of it with padded channels."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))


class ResNet20(nn.Module):
    """The ResNet-20 of He et al., "Deep residual learning for image recognition", CVPR 2016, section 4.2.

    Widths 16, 32, 64; names conv1, bn1, layer{1,2,3}.{0,1,2}.{conv1,bn1,conv2,bn2}, linear, as in common CIFAR
    checkpoints. Inputs are images ``(N, 3, 32, 32)``.

    Args:
        outputs: Number of outputs.
    """

    def __init__(self, outputs: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu1 = nn.ReLU()
        self.layer1 = _stage(16, 16, stride=1)
        self.layer2 = _stage(16, 32, stride=2)
        self.layer3 = _stage(32, 64, stride=2)
        self.linear = nn.Linear(64, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs, shape ``(N, outputs)``."""
        features = self.layer3(self.layer2(self.layer1(self.relu1(self.bn1(self.conv1(x))))))
        out: Tensor = self.linear(features.mean(dim=(2, 3)))
        return out


def _stage(before: int, after: int, stride: int) -> nn.Sequential:
    return nn.Sequential(BasicBlock(before, after, stride), BasicBlock(after, after, 1), BasicBlock(after, after, 1))


def build(
    name: str,
    sample_shape: tuple[int, ...],
    outputs: int,
    *,
    hidden: Sequence[int] = (),
    dropout: float = 0.0,
    seed: int = 0,
    weights: Path | None = None,
    new_head: bool = False,
) -> nn.Module:
    """Return a network for samples of a given shape, on the CPU, in train mode, with PyTorch's initialisation.

    Args:
        name: ``mlp``, ``cnn``, ``shallow_cnn``, ``resnet20``, or a classification model of torchvision, such as
            ``torchvision:resnet18``.
        sample_shape: Shape of one input.
        outputs: Number of outputs.
        hidden: Widths of the hidden layers of ``mlp``; ignored by other networks.
        dropout: Dropout probability after each hidden layer of ``mlp``; must be 0 for other networks.
        seed: Seed of the initialisation; the global random state does not change.
        weights: File of the weights (see ``load_weights``).
        new_head: Whether to keep the initial last layer, for weights that were trained for other outputs.

    Raises:
        CurvlabError: The name is unknown, the network does not fit the samples, or the weights do not fit the network.

    Examples:
        >>> model = build("mlp", (1, 8, 8), 10, hidden=(16,))
        >>> [tuple(p.shape) for p in model.parameters()]
        [(16, 64), (16,), (10, 16), (10,)]
    """
    if outputs < 1 or not sample_shape or min(sample_shape) < 1:
        raise CurvlabError(f"sizes must be at least 1, but sample_shape is {sample_shape} and outputs is {outputs}")
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # torch.manual_seed would also seed the GPUs.
        torch.default_generator.manual_seed(seed)
        model = _construct(name, sample_shape, outputs, hidden, dropout)
        _check_fit(model, name, sample_shape, outputs)
    if weights is not None:
        load_weights(model, weights, new_head=new_head)
    return model


def _construct(
    name: str, sample_shape: tuple[int, ...], outputs: int, hidden: Sequence[int], dropout: float
) -> nn.Module:
    if name == "mlp":
        return mlp(prod(sample_shape), hidden, outputs, dropout)
    if dropout:
        raise CurvlabError(f"dropout belongs to mlp, not to {name}; leave dropout at 0")
    if name == "cnn":
        return cnn(sample_shape, outputs)
    if name == "shallow_cnn":
        return shallow_cnn(sample_shape, outputs)
    if name == "resnet20":
        if sample_shape != (3, 32, 32):
            raise CurvlabError(f"resnet20 takes images of shape (3, 32, 32), not {sample_shape}; use cnn or mlp")
        return ResNet20(outputs)
    # Imported here because the import takes longer than building the networks above.
    from torchvision import models

    theirs = models.list_models(module=models)
    short = name.removeprefix(_TORCHVISION)
    if name.startswith(_TORCHVISION) and short in theirs:
        # These two return a tuple in train mode unless their auxiliary heads are removed.
        two_heads: dict[str, Any] = {"aux_logits": False, "init_weights": True}
        options = two_heads if short in ("googlenet", "inception_v3") else {}
        return cast(nn.Module, models.get_model(short, weights=None, num_classes=outputs, **options))
    full_names = {key: _TORCHVISION + key for key in theirs} | {name: name for name in _NAMES}
    near = get_close_matches(short.lower(), full_names, n=1, cutoff=0.5)
    hint = f"; did you mean {full_names[near[0]]!r}?" if near else ""
    raise CurvlabError(f"there is no model {name!r}{hint} (available: {', '.join(_NAMES)} and torchvision:NAME)")


def _check_fit(model: nn.Module, name: str, sample_shape: tuple[int, ...], outputs: int) -> None:
    """Check the output shape on two samples of zeros, in eval mode, so that the model does not change."""
    model.eval()
    try:
        with torch.no_grad():
            out = model(torch.zeros(2, *sample_shape))
    except Exception as error:  # a network can raise any exception for a wrong shape
        reason = first_line(error)
        raise CurvlabError(
            f"{name} fails on samples of shape {sample_shape} ({reason}); choose another model"
        ) from error
    finally:
        model.train()
    if not isinstance(out, Tensor) or out.shape != (2, outputs):
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise CurvlabError(
            f"{name} returns {got} for two samples, not a tensor of shape (2, {outputs}); choose another model"
        )


def load_weights(model: nn.Module, path: str | Path, *, new_head: bool = False) -> None:
    """Load weights from a file into a model; the model is changed only if all weights fit.

    Args:
        model: The network, on any device and in any floating-point dtype.
        path: A ``.safetensors`` file, or a file of ``torch.save`` (``.pt``, ``.pth``, ``.th``) with a state dict or a
            dictionary that has one under ``state_dict`` or ``model``. A prefix ``module.`` of all names (DataParallel)
            is removed.
        new_head: Whether to keep the model's last linear layer and ignore its weights in the file.

    Raises:
        CurvlabError: The file is missing, damaged or not a state dict, belongs to another architecture, or has NaN or
            infinite weights; or, with ``new_head``, the model has no linear layer.
    """
    path = Path(path).expanduser()
    state = _state_dict(path)
    own = model.state_dict()
    if new_head:
        heads = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        if not heads:
            raise CurvlabError(
                f"new_head needs a linear layer, and {type(model).__name__} has none; use new_head=False"
            )
        head_keys = [f"{heads[-1]}.{key}".removeprefix(".") for key in ("weight", "bias")]
        state = {key: tensor for key, tensor in state.items() if key not in head_keys}
        state |= {key: own[key] for key in head_keys if key in own}
    # Checkpoints from before PyTorch 0.4.1 lack these counters, which do not affect the outputs.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    misfits = [f"no {key}" for key in missing] + [f"an unexpected {key}" for key in unexpected]
    for key in (key for key in own if key in state):
        if state[key].shape != own[key].shape:
            misfits.append(f"{key} of shape {tuple(state[key].shape)} instead of {tuple(own[key].shape)}")
        elif state[key].is_floating_point() != own[key].is_floating_point():
            misfits.append(f"{key} in {state[key].dtype} instead of {own[key].dtype}")
    if misfits:
        more = f" and {len(misfits) - 3} more" if len(misfits) > 3 else ""
        raise CurvlabError(
            f"{path} belongs to another architecture: it has {', '.join(misfits[:3])}{more}; "
            "choose the model it was saved from"
        )
    for key, tensor in state.items():
        if not tensor.to(own[key].dtype).isfinite().all():
            raise CurvlabError(f"{path}: {key} holds NaN or infinite weights; choose another checkpoint")
    model.load_state_dict(own | state)


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """A ``BatchNorm2d`` that uses its running statistics also in train mode."""

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode and ignore ``mode``."""
        del mode
        return super().train(False)


def freeze_batch_norm(model: nn.Module) -> None:
    """Freeze every ``BatchNorm2d`` of a model, in place: running statistics, weight and bias no longer change.

    Use this to fine-tune a pre-trained network whose function must be the same in training and evaluation.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        >>> freeze_batch_norm(model)
        >>> model.train()[1].training
        False
    """
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = FrozenBatchNorm2d
            module.eval().requires_grad_(False)


class _LayerTracer(fx.Tracer):
    """Tracer that does not trace into layers, including our subclasses of torch's layers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _BatchNorm) or super().is_leaf_module(m, module_qualified_name)


def merge_batch_norm(model: nn.Module) -> nn.Module:
    """Return a copy of a model in which each batch normalisation is merged into the convolution before it.

    The merged convolution has a bias, and is trainable if the original one is. An ``Identity`` replaces the
    normalisation, so that the other names do not change. The result equals the model in eval mode, with the running
    statistics. A normalisation is not merged if its input is not the output of a convolution that nothing else uses.

    Raises:
        UnsupportedError: The forward pass cannot be traced by ``torch.fx``, for example because it depends on values.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        >>> merge_batch_norm(model)
        Sequential(
          (0): Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
          (2): ReLU()
        )
    """
    model = deepcopy(model)
    try:
        graph = _LayerTracer().trace(model)
    except Exception as error:  # a forward pass can raise any exception for the placeholders of torch.fx
        reason = first_line(error)
        raise UnsupportedError(
            f"the forward pass of {type(model).__name__} cannot be traced ({reason}), so batch normalisation cannot be "
            "merged: use freeze_batch_norm instead"
        ) from error
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    # A direct use of a weight is a separate operation in the graph.
    calls.update(str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr")
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        convolution, norm = (model.get_submodule(str(n.target)) for n in (before, node))
        alone = calls[node.target] == calls[before.target] == 1
        if alone and _can_merge(convolution, norm) and owners[id(convolution.weight)] == 1:
            _merge(convolution, norm)
            model.set_submodule(str(node.target), nn.Identity())
    return model


def _can_merge(convolution: nn.Module, norm: nn.Module) -> bool:
    return (
        type(convolution) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        and type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, FrozenBatchNorm2d)
        and norm.running_mean is not None
        and not any(m._forward_hooks or m._forward_pre_hooks for m in (convolution, norm))
    )


def _merge(convolution: Any, norm: Any) -> None:
    """Merge a batch normalisation in eval mode into the weight and bias of a convolution, in place."""
    weight = convolution.weight.detach().double()
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    shift = -norm.running_mean.double() * scale
    if norm.affine:
        gain, bias = norm.weight.detach().double(), norm.bias.detach().double()
        scale, shift = scale * gain, shift * gain + bias
    if convolution.bias is not None:
        shift = shift + scale * convolution.bias.detach().double()
    merged = weight * scale.view(-1, *[1] * (weight.ndim - 1))
    for key, value in (("weight", merged), ("bias", shift)):
        trained = convolution.weight.requires_grad
        setattr(convolution, key, nn.Parameter(value.to(convolution.weight.dtype), requires_grad=trained))


def _state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CurvlabError(f"{path}: no such file; check the path of the weights")
    try:
        content: Any
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers can raise any exception for a damaged file
        raise CurvlabError(
            f"{path} cannot be read as weights: it is truncated, has another format, or contains other objects than "
            "tensors; copy it again, or save the weights with torch.save(model.state_dict(), path)"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not _is_state_dict(content):
        raise CurvlabError(
            f"{path} contains no state dict: save one with torch.save(model.state_dict(), path), "
            "directly or under the key state_dict or model"
        )
    if all(key.startswith("module.") for key in content):
        return {key.removeprefix("module."): value for key, value in content.items()}
    return dict(content)


def _is_state_dict(content: object) -> TypeGuard[dict[str, Tensor]]:
    return (
        isinstance(content, dict)
        and len(content) > 0
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())
    )
