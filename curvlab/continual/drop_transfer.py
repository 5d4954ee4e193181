"""Drop-transfer of IMM: dropout that replaces dropped weights by those of an earlier solution."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from curvlab.checks import describe_value
from curvlab.continual.options import is_number
from curvlab.errors import CurvlabError, UnsupportedError


def find_dropping_layers(model: nn.Module, names: Collection[str]) -> dict[str, nn.Linear]:
    """Return the linear layers of a model whose weight is among the names, by the name of the weight.

    Raises:
        UnsupportedError: There is none.
    """
    layers = {
        f"{name}.weight".removeprefix("."): module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    found = {name: layer for name, layer in layers.items() if name in names}
    if not found:
        raise UnsupportedError(
            f"drop-transfer is for linear layers; {type(model).__name__} has no linear layer with earlier weights: set "
            "drop to 0"
        )
    return found


@contextmanager
def drop_transfer(model: nn.Module, earlier: Mapping[str, Tensor], rate: float) -> Iterator[None]:
    """Apply drop-transfer to the linear layers of a model inside the context (Lee et al., 2017).

    For each sample, an input of a layer is dropped with probability p. The weights of a dropped input are the earlier
    ones, ``W0``; the others are ``(W - p W0) / (1 - p)``, so that the expected weights are ``W``. The output is
    ``W0 x + (W - W0) dropout(x) + b``. Modules in eval mode are not affected.

    Args:
        model: A module with ``nn.Linear`` layers; hooks are registered on them and removed on exit.
        earlier: Earlier values by parameter name; layers whose weight is not listed are not affected.
        rate: Dropout probability p, at least 0 and below 1.

    Raises:
        CurvlabError: The rate is out of range, or an earlier weight is not a tensor like the present one.
        UnsupportedError: No linear layer is listed in ``earlier``.

    Examples:
        >>> import torch
        >>> layer = nn.Linear(2, 1)
        >>> same = {"weight": layer.weight.detach().clone()}
        >>> with drop_transfer(layer, same, 0.5):
        ...     output = layer(torch.ones(1, 2))
        >>> torch.allclose(output, layer(torch.ones(1, 2)))
        True
    """
    if not is_number(rate) or not 0 <= rate < 1:
        raise CurvlabError(f"the rate of drop-transfer must be at least 0 and below 1, not {rate!r}")
    if not isinstance(earlier, Mapping):
        raise CurvlabError(f"earlier must be a dict of tensors by parameter name, not {describe_value(earlier)}")
    layers = find_dropping_layers(model, earlier)
    for name, layer in layers.items():
        old, new = earlier[name], layer.weight
        kind = (new.shape, new.dtype, new.device)
        if not isinstance(old, Tensor) or (old.shape, old.dtype, old.device) != kind:
            raise CurvlabError(
                f"the earlier {name} must be a tensor of {new.dtype} and shape {tuple(new.shape)} on {new.device}, not "
                f"{describe_value(old)}"
            )
    handles = [
        layer.register_forward_hook(partial(_forward, earlier[name].detach(), rate)) for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _forward(earlier: Tensor, rate: float, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    if not layer.training:
        return output
    assert isinstance(layer, nn.Linear)
    (x,) = inputs
    return F.linear(x, earlier, layer.bias) + F.linear(F.dropout(x, rate), layer.weight - earlier)
