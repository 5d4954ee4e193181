"""What each backend can and cannot do for a model, and what it would cost, before a long computation is begun."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch

from curvlab.checks import shown
from curvlab.doctor.model import find_faults, find_layers_without_factors, find_remarks
from curvlab.doctor.probe import Probe, make_cell, summarise
from curvlab.doctor.text import write_lines
from curvlab.errors import CurvlabError
from curvlab.estimators.linearized import to_first_order
from curvlab.estimators.registry import BACKENDS
from curvlab.estimators.verification import kronecker_layers
from curvlab.parameters import ParameterSpace
from curvlab.problem import Problem
from curvlab.progress import progress
from curvlab.quantities import Quantity, parse_quantity
from curvlab.randomness import preserved_random_state
from curvlab.structures import STRUCTURES, Kronecker, parse_structure

__all__ = ["Diagnosis", "doctor"]


@dataclass(frozen=True)
class Diagnosis:
    """What ``doctor`` found; ``str()`` of it is to be read.

    Attributes:
        summary: Model, loss, data, and what a plain forward and backward pass over the data takes.
        findings: What stands in the way or is unusual about the model, a phrase each.
        cells: A row a quantity, structure and backend, with the columns ``quantity``, ``structure``, ``backend``;
            ``supported``: ``yes``; ``no``; ``absent``, where the backend has no such cell for any model; ``not tried``,
            where the matrix is too large for a probe; ``auto``: whether ``backend="auto"`` takes it;
            ``backward_passes``: over the data, as the quantity needs them;
            ``seconds``: predicted, for ``implicit`` those of a product, NaN where measuring takes long;
            ``passes``: the same in plain forward and backward passes; ``peak_bytes``: predicted, of the tensors beyond
            model and data, without what kernels use inside; ``matrix_bytes``: of the result; ``obstacle``: what stands
            in the way, and what would work.
    """

    summary: str
    findings: tuple[str, ...]
    cells: pd.DataFrame

    def __str__(self) -> str:
        """Return all of it as text."""
        cells: list[dict[str, Any]] = self.cells.to_dict("records")  # type: ignore[assignment]
        return "\n".join(write_lines(self.summary, self.findings, cells))


def doctor(
    problem: Problem,
    quantity: Quantity | str | Sequence[Quantity | str] = "fisher",
    params: Sequence[str] | str | None = None,
    *,
    progress: bool = False,
) -> Diagnosis:
    """Say what each backend can and cannot do for a model, and what it would cost.

    Every cell of structure and backend is tried on a few samples: what it refuses there is refused in the words of
    ``estimate``, which name the way out. Where it is quick, one batch and two follow, and time and memory of the
    whole are extrapolated from these, as far as ten seconds of measuring go: a cell that comes after these, or alone
    would take as long, has no prediction. Nothing of the model is changed.

    Args:
        problem: Model, loss and data. What is wrong with them is told, not raised.
        quantity: One or several of ``curvlab.quantities`` or their string forms.
        params: Glob patterns of parameter names; None for all trainable ones.
        progress: Show a progress bar on a terminal.

    Raises:
        CurvlabError: It is given no problem, a quantity is unknown, or a pattern matches nothing.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 3))
        >>> data = torch.zeros(4, 4), torch.tensor([0, 1, 2, 0])
        >>> print(doctor(Problem(model, "cross_entropy", data)))
        Sequential of 67 parameters in float32, cross_entropy.
        - 1 (Dropout) is in train mode, where a sample's output is random or depends on its batch: call model.eval()
        Nothing can be computed before this is mended.
        >>> cells = doctor(Problem(model.eval(), "cross_entropy", data), "empirical_fisher").cells
        >>> list(cells[cells.auto & (cells.structure == "kfac")].supported)
        ['yes']
    """
    if not isinstance(problem, Problem):
        raise CurvlabError(
            "doctor takes a problem, Problem(model, 'cross_entropy', data) with your loss and data, not "
            f"a {type(problem).__name__}"
        )
    given = [quantity] if isinstance(quantity, (str, Quantity)) else quantity
    if not isinstance(given, Sequence) or not given:
        raise CurvlabError(f"quantity is one or several, such as 'fisher' or ['fisher', 'ggn'], not {shown(quantity)}")
    quantities = [parse_quantity(q) for q in given]
    space = ParameterSpace.of(problem.model, params)
    faults, remarks = list(find_faults(problem.model)), list(find_remarks(problem.model))
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            preserved_random_state(),
            warnings.catch_warnings(),  # whatever a library does to the filters
        ):
            problem.check()
            layers, reasons = kronecker_layers(to_first_order(problem), space)
            probe = Probe(problem, params, layers)
            names = list(STRUCTURES)
            if layers and reasons:
                names += [f"{name}:rest=diag" for name, kind in STRUCTURES.items() if issubclass(kind, Kronecker)]
            pairs = [(q, parse_structure(name)) for q in quantities for name in names]
            with _bar("doctor", len(pairs) * len(BACKENDS), progress) as advance:
                cells = []
                for pair in pairs:
                    for cell in probe.cells(*pair):
                        cells.append(cell)
                        advance()
    except CurvlabError as error:  # what the cells say is caught where they are tried
        cells = [
            make_cell(q, s, b, "no", obstacle=str(error)) for q in quantities for s in STRUCTURES for b in BACKENDS
        ]
        return Diagnosis(summarise(problem, space), (*(faults or [str(error)]), *remarks), pd.DataFrame(cells))
    findings = (*faults, *remarks, *find_layers_without_factors(reasons), *probe.many_rows(quantities))
    return Diagnosis(probe.summary(), findings, pd.DataFrame(cells))


_bar = progress  # the argument of ``doctor`` hides the function's name there
