"""Faults and unusual properties of a model."""

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from curvlab.problem import is_stochastic


def find_faults(model: nn.Module) -> Iterator[str]:
    """Yield all faults for which ``Problem.check`` refuses a model; ``check`` itself raises the first only."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        # A buffer may be minus infinity by design, such as an attention mask.
        bad = ~tensor.isfinite() if isinstance(tensor, nn.Parameter) else tensor.isnan()
        if bool(bad.any()):
            yield f"the model's {name} holds {int(bad.sum())} NaN or infinite values"
    without_statistics, training = [], []
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            without_statistics.append(_describe(name, module))
        elif module.training and is_stochastic(module):
            training.append(_describe(name, module))
    if without_statistics:
        yield (
            f"{_enumerate(without_statistics)} {_be(without_statistics)} without running statistics, so a sample's "
            "output always depends on its batch: use track_running_stats=True"
        )
    if training:
        yield (
            f"{_enumerate(training)} {_be(training)} in train mode, where a sample's output is random or depends on "
            "its batch: call model.eval()"
        )


def find_remarks(model: nn.Module) -> Iterator[str]:
    """Yield unusual properties that are not faults: in-place operations, tied and frozen parameters."""
    in_place = [_describe(name, m) for name, m in model.named_modules() if getattr(m, "inplace", False) is True]
    if in_place:
        yield f"in place: {_enumerate(in_place)}"
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for first, *others in names.values():
        if others:
            yield f"tied: {first} is also {_enumerate(others)}; it is counted once"
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    if frozen:
        yield f"frozen (requires_grad=False) and left out: {_enumerate(frozen)}"


def find_layers_without_factors(reasons: Mapping[str, str]) -> Iterator[str]:
    """Yield one phrase per reason why parameters have no Kronecker factors.

    Args:
        reasons: Reasons by parameter name.
    """
    by_reason: dict[str, list[str]] = {}
    for parameter, reason in reasons.items():
        by_reason.setdefault(reason, []).append(parameter)
    for reason, parameters in by_reason.items():
        yield f"no Kronecker factors for {_enumerate(parameters)}: {'it' if len(parameters) == 1 else 'each'} {reason}"


def _describe(name: str, module: nn.Module) -> str:
    return f"{name or 'the model'} ({type(module).__name__})"


def _enumerate(names: Sequence[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _be(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"
