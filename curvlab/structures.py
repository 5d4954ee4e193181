"""The structures that a curvature matrix is held in, as small frozen values with a string form.

``dense``, ``block_diag`` (a block a parameter tensor), ``diag``, ``implicit`` (products only), and the Kronecker
factored ``kfac``, ``ekfac`` and ``tkfac``, a pair of factors a layer: ``kfac:sharing=reduce``, ``kfac:rest=diag``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from curvlab.errors import CurvlabError
from curvlab.forms import form, parse_form


@dataclass(frozen=True)
class Structure:
    """Base of the structures; ``str()`` of one is its string form."""

    name: ClassVar[str]

    def __str__(self) -> str:
        """Return the string form, without the options left at their defaults."""
        return form(self)

    def entries(self, sizes: Sequence[int]) -> int:
        """Return how many numbers a matrix of parameter tensors of these sizes is stored in.

        Of a Kronecker structure: of the parameters that no layer with factors has.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class DenseStructure(Structure):
    """The whole matrix."""

    name: ClassVar[str] = "dense"

    def entries(self, sizes: Sequence[int]) -> int:
        """Return the square of all."""
        return sum(sizes) ** 2


@dataclass(frozen=True)
class BlockDiagStructure(Structure):
    """A dense block a parameter tensor."""

    name: ClassVar[str] = "block_diag"

    def entries(self, sizes: Sequence[int]) -> int:
        """Return the squares of the sizes."""
        return sum(size**2 for size in sizes)


@dataclass(frozen=True)
class DiagStructure(Structure):
    """The diagonal."""

    name: ClassVar[str] = "diag"

    def entries(self, sizes: Sequence[int]) -> int:
        """Return one a parameter."""
        return sum(sizes)


@dataclass(frozen=True)
class ImplicitStructure(Structure):
    """Products alone: nothing is stored, every product goes through the data."""

    name: ClassVar[str] = "implicit"

    def entries(self, sizes: Sequence[int]) -> int:
        """Return none."""
        return 0 * len(sizes)


@dataclass(frozen=True)
class Kronecker(Structure):
    """Base of the structures with Kronecker factors ``S (x) A`` a layer.

    Args:
        sharing: A weight that is applied at ``T`` positions of a sample (a convolution, a Linear layer on tokens) has
            ``expand``: ``A`` from the inputs at every position, ``S`` from the output gradients at every position;
            ``reduce``: from the mean of the inputs and the sum of the gradients over positions (Eschenhagen et al.,
            "Kronecker-factored approximate curvature for modern neural network architectures", 2023).
        rest: What the parameters outside such layers get, ``diag`` or ``block_diag``; None refuses to leave any out.
    """

    sharing: Literal["expand", "reduce"] = "expand"
    rest: Literal["diag", "block_diag"] | None = None

    def __post_init__(self) -> None:
        """Refuse an unknown option."""
        if self.sharing not in ("expand", "reduce"):
            raise CurvlabError(f"{self.name} takes sharing expand or reduce, not {self.sharing!r}")
        if self.rest not in ("diag", "block_diag", None):
            raise CurvlabError(f"{self.name} takes rest diag or block_diag, not {self.rest!r}")

    def entries(self, sizes: Sequence[int]) -> int:
        """Return those of the rest."""
        return sum(size**2 for size in sizes) if self.rest == "block_diag" else sum(sizes)

    def factor_entries(self, outputs: int, columns: int) -> int:
        """Return how many numbers the factors of a layer are stored in.

        Args:
            outputs: Rows of the weight.
            columns: Columns of the weight, the bias among them.
        """
        return outputs**2 + columns**2


@dataclass(frozen=True)
class KFACStructure(Kronecker):
    """Kronecker-factored curvature (Martens and Grosse 2015; convolutions: Grosse and Martens 2016)."""

    name: ClassVar[str] = "kfac"


@dataclass(frozen=True)
class EKFACStructure(Kronecker):
    """K-FAC's eigenbasis with the true second moments along it (George et al. 2018)."""

    name: ClassVar[str] = "ekfac"

    def factor_entries(self, outputs: int, columns: int) -> int:
        """Return those of the eigenvectors and of an eigenvalue a parameter."""
        return super().factor_entries(outputs, columns) + outputs * columns


@dataclass(frozen=True)
class TKFACStructure(Kronecker):
    """Trace-restricted Kronecker factors: the trace of a layer's block is exact (Gao et al. 2021).

    Args:
        sharing: See ``Kronecker``.
        rest: See ``Kronecker``.
        variant: ``gao``: factors weighted by the trace of the other, as in the paper; ``rescaled``: K-FAC's own
            factors, scaled to the exact trace.
    """

    variant: Literal["gao", "rescaled"] = "gao"
    name: ClassVar[str] = "tkfac"

    def __post_init__(self) -> None:
        """Refuse an unknown option."""
        super().__post_init__()
        if self.variant not in ("gao", "rescaled"):
            raise CurvlabError(f"tkfac takes variant gao or rescaled, not {self.variant!r}")


STRUCTURES: dict[str, type[Structure]] = {
    kind.name: kind
    for kind in (
        DenseStructure,
        BlockDiagStructure,
        DiagStructure,
        KFACStructure,
        EKFACStructure,
        TKFACStructure,
        ImplicitStructure,
    )
}


def parse_structure(text: str | Structure) -> Structure:
    """Return the structure of a string form; a structure is returned as it is.

    Raises:
        CurvlabError: The name or an option is unknown, or a value does not fit.

    Examples:
        >>> parse_structure("kfac:sharing=reduce")
        KFACStructure(sharing='reduce', rest=None)
    """
    return text if isinstance(text, Structure) else parse_form(text, "structure", STRUCTURES)
