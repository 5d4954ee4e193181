"""Faults and unusual properties of a model."""

from collections.abc import Iterator, Sequence

from torch import nn

from curvlab.problem import is_stochastic
from curvlab.text import enumerate_names


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
            f"{enumerate_names(without_statistics)} {_be(without_statistics)} without running statistics, so a "
            "sample's output always depends on its batch: use track_running_stats=True"
        )
    if training:
        yield (
            f"{enumerate_names(training)} {_be(training)} in train mode, where a sample's output is random or depends "
            "on its batch: call model.eval()"
        )


def find_remarks(model: nn.Module) -> Iterator[str]:
    """Yield unusual properties that are not faults: in-place operations, tied and frozen parameters."""
    in_place = [_describe(name, m) for name, m in model.named_modules() if getattr(m, "inplace", False) is True]
    if in_place:
        yield f"in place: {enumerate_names(in_place)}"
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for first, *others in names.values():
        if others:
            yield f"tied: {first} is also {enumerate_names(others)}; it is counted once"
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    if frozen:
        yield f"frozen (requires_grad=False) and left out: {enumerate_names(frozen)}"


def _describe(name: str, module: nn.Module) -> str:
    return f"{name or 'the model'} ({type(module).__name__})"


def _be(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"
