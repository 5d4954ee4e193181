"""``doctor``: which backends support a model, and the predicted cost, before a long computation."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from curvlab.checks import describe_value
from curvlab.doctor.model import find_faults, find_remarks
from curvlab.doctor.probe import Probe, make_row, summarise
from curvlab.doctor.text import write_lines
from curvlab.errors import CurvlabError
from curvlab.estimators.linearized import to_first_order
from curvlab.estimators.registry import BACKENDS
from curvlab.estimators.verification import describe_parameters_without_factors, kronecker_layers
from curvlab.parameters import ParameterSpace, Selection
from curvlab.problem import Problem
from curvlab.progress import progress
from curvlab.quantities import Quantity, parse_quantity
from curvlab.randomness import preserve_random_state
from curvlab.structures import STRUCTURES, parse_structure

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Diagnosis", "doctor"]


@dataclass(frozen=True)
class Diagnosis:
    """Result of ``doctor``; ``str()`` gives a readable report.

    Attributes:
        summary: Model, loss, data, and the time of a plain forward and backward pass over the data.
        findings: Problems and unusual properties of the model, one phrase each.
        combinations: One row per combination of quantity, structure and backend, with the columns ``quantity``,
            ``structure``, ``backend``; ``supported``: ``yes``, ``no``, ``absent`` (the backend does not have the
            combination for any model) or ``not tried`` (the matrix is too large to try); ``auto``: whether
            ``backend="auto"`` uses this backend; ``backward_passes``: number of backward passes over the data;
            ``seconds``: predicted time, for ``implicit`` that of one product, NaN if measuring takes too long;
            ``check``, ``forward``, ``backward``, ``sums``, ``eigenvectors``: predicted seconds of its phases;
            ``passes``: the same time in plain forward and backward passes; ``peak_bytes``: predicted memory of the
            tensors in addition to model and data, without the workspace of kernels; ``small``, ``medium``, ``large``:
            samples at once with ``estimate(memory=...)``; ``matrix_bytes``: size of the result; ``obstacle``: the
            reason if it is not supported, and an alternative.
    """

    summary: str
    findings: tuple[str, ...]
    combinations: "pd.DataFrame"

    def __str__(self) -> str:
        """Return the report as text."""
        rows: list[dict[str, Any]] = self.combinations.to_dict("records")  # type: ignore[assignment]
        return "\n".join(write_lines(self.summary, self.findings, rows))


def doctor(
    problem: Problem,
    quantity: Quantity | str | Sequence[Quantity | str] = "fisher",
    params: Selection | None = None,
    *,
    progress: bool = False,
) -> Diagnosis:
    """Find out which combinations of structure and backend support a model, and predict their cost.

    Every combination is tried on a few samples. If it fails, the reason is the error message of ``estimate``, which
    also names an alternative. If it is fast, it is measured on one batch and on two batches, and time and memory for
    all data are extrapolated. The measurements take ten seconds in total: a combination that comes later, or that alone
    would take longer, has no prediction. The model is not changed.

    Args:
        problem: Model, loss and data. Faults in them are reported, not raised.
        quantity: One or several of ``curvlab.quantities`` or their string forms.
        params: Selection of parameters: glob patterns of names, compiled regular expressions, or a function of name
            and parameter (``curvlab.parameters.Selection``); None for all trainable ones.
        progress: Show a progress bar on a terminal.

    Raises:
        CurvlabError: The argument is not a problem, a quantity is unknown, or a pattern matches nothing.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 3))
        >>> data = torch.zeros(4, 4), torch.tensor([0, 1, 2, 0])
        >>> print(doctor(Problem(model, "cross_entropy", data)))
        Sequential of 67 parameters in float32, cross_entropy.
        - 1 (Dropout) is in train mode, where a sample's output is random or depends on its batch: call model.eval()
        Nothing can be computed until this is corrected.
        >>> table = doctor(Problem(model.eval(), "cross_entropy", data), "empirical_fisher").combinations
        >>> list(table[table.auto & (table.structure == "kfac")].supported)
        ['yes']
    """
    import pandas as pd

    if not isinstance(problem, Problem):
        raise CurvlabError(
            f"doctor needs a problem, such as Problem(model, 'cross_entropy', data), not a {type(problem).__name__}"
        )
    given = [quantity] if isinstance(quantity, (str, Quantity)) else quantity
    if not isinstance(given, Sequence) or not given:
        raise CurvlabError(
            "quantity must be one quantity or several, such as 'fisher' or ['fisher', 'ggn'], not "
            f"{describe_value(quantity)}"
        )
    quantities = [parse_quantity(q) for q in given]
    space = ParameterSpace.of(problem.model, params)
    faults, remarks = list(find_faults(problem.model)), list(find_remarks(problem.model))
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            preserve_random_state(),
            warnings.catch_warnings(),  # a library may change the filters
        ):
            problem.check()
            layers, reasons = kronecker_layers(to_first_order(problem), space)
            probe = Probe(problem, params, layers)
            pairs = [(q, parse_structure(name)) for q in quantities for name in STRUCTURES]
            with _bar("doctor", len(pairs) * len(BACKENDS), progress) as advance:
                rows = []
                for pair in pairs:
                    for row in probe.try_backends(*pair):
                        rows.append(row)
                        advance()
    except CurvlabError as error:  # of the problem; errors of single combinations are caught in the probe
        rows = [make_row(q, s, b, "no", obstacle=str(error)) for q in quantities for s in STRUCTURES for b in BACKENDS]
        return Diagnosis(summarise(problem, space), (*(faults or [str(error)]), *remarks), pd.DataFrame(rows))
    findings = (*faults, *remarks, *describe_parameters_without_factors(reasons), *probe.suggest_sampling(quantities))
    return Diagnosis(probe.summary(), findings, pd.DataFrame(rows))


_bar = progress  # the argument of ``doctor`` hides the function's name there
