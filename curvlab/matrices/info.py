"""The provenance of a matrix."""

import math
from dataclasses import dataclass, fields

from curvlab.checks import describe_value
from curvlab.errors import CurvlabError


@dataclass(frozen=True)
class Info:
    """The provenance of a matrix.

    Attributes:
        quantity: String form of the quantity.
        structure: String form of the structure.
        loss: Name of the loss.
        backend: Name of the backend.
        num_samples: Number ``N`` of samples in the data.
        samples: Number of Monte Carlo labels per sample; None for an exact expectation.
        seed: Random seed of the Monte Carlo labels.
        batch_size: Batch size of the computation; None for the batches of the data.
        seconds: Wall time.
        rejected: What was not used, with the reason: backends, Kronecker factors of parameters (which have a diagonal
            or a block instead), rules for parameters.
    """

    quantity: str
    structure: str
    loss: str
    backend: str
    num_samples: int
    samples: int | None = None
    seed: int | None = None
    batch_size: int | None = None
    seconds: float = 0.0
    rejected: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the fields, so that a file can store and restore them.

        Raises:
            CurvlabError: A field has a wrong type, is negative or is not finite.
        """
        if not isinstance(self.rejected, (tuple, list)) or not all(isinstance(reason, str) for reason in self.rejected):
            raise CurvlabError(f"rejected of a matrix's info cannot be {describe_value(self.rejected)}")
        object.__setattr__(self, "rejected", tuple(self.rejected))  # JSON has lists only
        for field in fields(self)[:-1]:
            value = getattr(self, field.name)
            kind = (int, float) if field.type is float else field.type
            number = isinstance(value, (int, float))
            if (
                not isinstance(value, kind)  # type: ignore[arg-type]
                or isinstance(value, bool)
                or (number and not (value >= 0 and math.isfinite(value)))
            ):
                raise CurvlabError(f"{field.name} of a matrix's info cannot be {describe_value(value)}")
