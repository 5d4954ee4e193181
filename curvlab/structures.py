"""The structures in which a curvature matrix is stored, as frozen dataclasses with a string form.

They are ``dense``, ``block_diag`` (one block per parameter tensor), ``diag``, ``implicit`` (matrix-vector products
only) and the Kronecker-factored ``kfac``, ``ekfac`` and ``tkfac`` (one pair of factors per layer). The string form can
contain options: ``kfac:sharing=reduce``, ``kfac:rest=block_diag``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from curvlab.errors import CurvlabError
from curvlab.forms import parse_form, string_form


@dataclass(frozen=True)
class Structure:
    """Base class of the structures; ``str(structure)`` is its string form."""

    name: ClassVar[str]

    def __str__(self) -> str:
        """Return the string form; options with their default values are left out."""
        return string_form(self)

    def entries(self, sizes: Sequence[int]) -> int:
        """Return the number of stored entries for parameter tensors of the given sizes.

        For a Kronecker structure, this counts only the parameters outside the layers with factors.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class DenseStructure(Structure):
    """The full matrix."""

    name: ClassVar[str] = "dense"

    def entries(self, sizes: Sequence[int]) -> int:
        """Return the square of the total size."""
        return sum(sizes) ** 2


@dataclass(frozen=True)
class BlockDiagStructure(Structure):
    """One dense block per parameter tensor."""

    name: ClassVar[str] = "block_diag"

    def entries(self, sizes: Sequence[int]) -> int:
        """Return the sum of the squared sizes."""
        return sum(size**2 for size in sizes)


@dataclass(frozen=True)
class DiagStructure(Structure):
    """The diagonal."""

    name: ClassVar[str] = "diag"

    def entries(self, sizes: Sequence[int]) -> int:
        """Return the total size."""
        return sum(sizes)


@dataclass(frozen=True)
class ImplicitStructure(Structure):
    """Matrix-vector products only: nothing is stored, and every product is a pass over the data."""

    name: ClassVar[str] = "implicit"

    def entries(self, sizes: Sequence[int]) -> int:
        """Return 0."""
        return 0 * len(sizes)


@dataclass(frozen=True)
class Kronecker(Structure):
    """Base class of the structures with Kronecker factors ``S (x) A`` per layer.

    Args:
        sharing: Treatment of a weight that is applied at ``T`` positions of a sample (a convolution, a Linear layer on
            tokens). ``expand``: ``A`` from the inputs and ``S`` from the output gradients at every position.
            ``reduce``: from the mean of the inputs and the sum of the gradients over positions (Eschenhagen et al.,
            "Kronecker-factored approximate curvature for modern neural network architectures", 2023).
        rest: Structure of the parameters outside the layers with factors (normalisations, tied weights, parameters of
            a user's own module): ``diag`` or ``block_diag``. With None (``rest=none`` in the string form), such
            parameters raise an error.
        bias: ``joint``: one block for the weight and bias of a layer, with the bias as last column. ``separate``: a
            block for each, without the entries between them; that of the bias is ``S``. This is the layout of
            NNGeometry and Laplace.

    Raises:
        CurvlabError: An option has an unknown value.
    """

    sharing: Literal["expand", "reduce"] = "expand"
    rest: Literal["diag", "block_diag"] | None = "diag"
    bias: Literal["joint", "separate"] = "joint"

    def __post_init__(self) -> None:
        """Check the options."""
        if self.sharing not in ("expand", "reduce"):
            raise CurvlabError(f"sharing of {self.name} must be expand or reduce, not {self.sharing!r}")
        if self.rest not in ("diag", "block_diag", None):
            raise CurvlabError(f"rest of {self.name} must be diag, block_diag or none, not {self.rest!r}")
        if self.bias not in ("joint", "separate"):
            raise CurvlabError(f"bias of {self.name} must be joint or separate, not {self.bias!r}")

    def entries(self, sizes: Sequence[int]) -> int:
        """Return the number of stored entries of the parameters outside the layers."""
        return sum(size**2 for size in sizes) if self.rest == "block_diag" else sum(sizes)

    def factor_entries(self, outputs: int, columns: int, diagonal: bool = False) -> int:
        """Return the number of stored entries for one layer.

        Args:
            outputs: Number of rows of the weight.
            columns: Number of columns of the weight, including the bias.
            diagonal: Whether the factor of the inputs is diagonal, as that of an embedding.
        """
        return outputs**2 + (columns if diagonal else columns**2)


@dataclass(frozen=True)
class KFACStructure(Kronecker):
    """Kronecker-factored curvature (Martens and Grosse 2015; convolutions: Grosse and Martens 2016).

    Args:
        sharing: See ``Kronecker``.
        rest: See ``Kronecker``.
        bias: See ``Kronecker``.
        factors: ``both``, or ``inputs``: ``S`` is the identity, so that a layer's block is ``I (x) A``, for every
            quantity and unit, and no gradient is computed (FOOF: Benzing, "Gradient descent on neurons and its link to
            approximate second-order optimization", 2022).
    """

    factors: Literal["both", "inputs"] = "both"
    name: ClassVar[str] = "kfac"

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if self.factors not in ("both", "inputs"):
            raise CurvlabError(f"factors of kfac must be both or inputs, not {self.factors!r}")


@dataclass(frozen=True)
class EKFACStructure(Kronecker):
    """K-FAC's eigenbasis with the true second moments along it (George et al. 2018)."""

    name: ClassVar[str] = "ekfac"

    def factor_entries(self, outputs: int, columns: int, diagonal: bool = False) -> int:
        """Return the number of entries of the eigenvectors, plus one eigenvalue per parameter."""
        return super().factor_entries(outputs, columns, diagonal) + outputs * columns


@dataclass(frozen=True)
class TKFACStructure(Kronecker):
    """Trace-restricted Kronecker factors: the trace of a layer's block is exact (Gao et al. 2021).

    Args:
        sharing: See ``Kronecker``.
        rest: See ``Kronecker``.
        bias: See ``Kronecker``.
        variant: ``gao``: each factor is weighted by the trace of the other, as in the paper; ``rescaled``: the factors
            of K-FAC, scaled to the exact trace.
    """

    variant: Literal["gao", "rescaled"] = "gao"
    name: ClassVar[str] = "tkfac"

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if self.variant not in ("gao", "rescaled"):
            raise CurvlabError(f"variant of tkfac must be gao or rescaled, not {self.variant!r}")


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


def is_forward_only(structure: Structure) -> bool:
    """Return whether a structure has the factors of the inputs only: no gradient is needed."""
    return isinstance(structure, KFACStructure) and structure.factors == "inputs"


def parse_structure(text: str | Structure) -> Structure:
    """Parse the string form of a structure; return a structure unchanged.

    Raises:
        CurvlabError: The name or an option is unknown, or a value is not valid.

    Examples:
        >>> parse_structure("kfac:sharing=reduce")
        KFACStructure(sharing='reduce', rest='diag', bias='joint', factors='both')
    """
    return text if isinstance(text, Structure) else parse_form(text, "structure", STRUCTURES)
