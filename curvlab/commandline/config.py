"""Base class of all options: a frozen, validated pydantic model that can be written as YAML."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import pydantic
from pydantic_core import PydanticCustomError

from curvlab import yaml_file


class Config(pydantic.BaseModel):
    """Base class of the configs: frozen, without unknown fields, and with finite numbers only."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    #: Titles of the groups of options in the help: name of the first field of a group -> title.
    titles: ClassVar[Mapping[str, str]] = {}

    @pydantic.field_validator("*")
    @classmethod
    def _within_64_bits(cls, value: Any) -> Any:
        """Refuse integers that neither torch nor a store can hold."""
        if any(isinstance(number, int) and abs(number) >= 2**63 for number in _items(value)):
            raise PydanticCustomError("out_of_range", "should be less than 2**63")
        return value

    def to_yaml(self) -> str:
        """Return the whole config as YAML, which ``--config`` reads back."""
        return yaml_file.dumps(self.model_dump(mode="json"))


C = TypeVar("C", bound=Config)


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, tuple) else (value,)
