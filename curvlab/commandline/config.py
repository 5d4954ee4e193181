"""Base class of all options: a frozen, validated pydantic model that can be written as YAML."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import pydantic
from pydantic_core import PydanticCustomError

from curvlab import yaml_file

NO_EFFECT = "no_effect"  # type of the error for a field that is not read

#: Name of a field, and its values.
Readers = tuple[str, tuple[Any, ...] | Callable[[], tuple[Any, ...]]]


class Config(pydantic.BaseModel):
    """Base class of the configs: frozen, without unknown fields, and with finite numbers only."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    #: Titles of the groups of options in the help: name of the first field of a group -> title.
    titles: ClassVar[Mapping[str, str]] = {}
    #: Inherited fields that are not read: name -> what is used instead. Only their default value is accepted.
    unread: ClassVar[Mapping[str, str]] = {}
    #: Fields that are read for some values of another field only: name -> the other field, and its values (or a
    #: function that returns them, if others can be added). If the other field is not read either, neither is this one.
    only_for: ClassVar[Mapping[str, Readers]] = {}

    @pydantic.field_validator("*")
    @classmethod
    def _within_64_bits(cls, value: Any) -> Any:
        """Refuse integers that neither torch nor a store can hold."""
        if any(isinstance(number, int) and abs(number) >= 2**63 for number in _items(value)):
            raise PydanticCustomError("out_of_range", "should be less than 2**63")
        return value

    @pydantic.field_validator("*")
    @classmethod
    def _read(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        """Refuse another value than the default for a field that is not read."""
        name = info.field_name
        if name is not None and name in cls.unread and value != cls.model_fields[name].default:
            raise PydanticCustomError(
                NO_EFFECT, "has no effect here ({instead}): leave it out", {"instead": cls.unread[name]}
            )
        return value

    def find_readers(self, name: str) -> tuple[str, tuple[Any, ...]] | None:
        """Return the other field whose value makes a field unread, and the values that would not; None if it is read.

        A tuple of the other field counts as its entries; an empty one as ``()``.
        """
        if name not in self.only_for:
            return None
        other, given = self.only_for[name]
        values = given() if callable(given) else given
        if any(value in values for value in _items(getattr(self, other)) or ((),)):
            return self.find_readers(other)
        return other, values

    def to_yaml(self) -> str:
        """Return the whole config as YAML, which ``--config`` reads back."""
        return yaml_file.dumps(self.model_dump(mode="json"))


C = TypeVar("C", bound=Config)


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, tuple) else (value,)
