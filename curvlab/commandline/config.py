"""The base of all options: a frozen pydantic model, checked, that can be written as YAML."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import pydantic
from pydantic_core import PydanticCustomError

from curvlab import yaml_file


class Config(pydantic.BaseModel):
    """Base of the configs: frozen, no unknown fields, and finite numbers only."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    #: Titles for groups of options in the help, each under the name of the group's first field.
    titles: ClassVar[Mapping[str, str]] = {}

    @pydantic.field_validator("*")
    @classmethod
    def _within_64_bits(cls, value: Any) -> Any:
        """Refuse a whole number that neither torch nor a store can hold."""
        if any(isinstance(number, int) and abs(number) >= 2**63 for number in _items(value)):
            raise PydanticCustomError("out_of_range", "should be less than 2**63")
        return value

    def to_yaml(self) -> str:
        """Return the whole config as YAML; ``--config`` reads it back."""
        return yaml_file.dumps(self.model_dump(mode="json"))


C = TypeVar("C", bound=Config)


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, tuple) else (value,)
