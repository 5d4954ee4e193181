"""The nodes of torch's autograd graph."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor


def walk(outputs: Iterable[Tensor]) -> Iterator[tuple[Any, list[Any]]]:
    """Yield every node of the autograd graph of some tensors once, with the nodes of its inputs.

    The node of an input without gradient is None.

    Examples:
        >>> import torch
        >>> x = torch.ones(2, requires_grad=True)
        >>> [type(node).__name__ for node, _ in walk([x * 2 + x])]
        ['AddBackward0', 'AccumulateGrad', 'MulBackward0']
    """
    waiting: list[Any] = [output.grad_fn for output in outputs]
    seen = {None}
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        inputs = [further for further, _ in node.next_functions]
        waiting += inputs
        yield node, inputs
