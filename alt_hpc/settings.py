"""What all settings are: strict and frozen, the range of a number beside its key."""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from types import ModuleType
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic_core import to_jsonable_python

LARGEST = 2**31 - 1  # of whole numbers: what Slurm and every library take


class Settings(BaseModel):
    """A section of a config: unknown keys and other types are errors, nothing is converted."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @property
    def content(self) -> dict[str, Any]:
        """What of it decides the content of what is made, as JSON values: all, or a kind says."""
        return {name: self.plain(value) for name, value in self}

    @classmethod
    def plain(cls, value: Any) -> Any:
        """A value as JSON has it; of settings within it, what decides content."""
        if value is None or isinstance(value, str | int | float):
            return value
        if isinstance(value, Settings):
            return value.content
        if isinstance(value, Mapping):
            return {str(name): cls.plain(one) for name, one in value.items()}
        if isinstance(value, list | tuple):
            return [cls.plain(one) for one in value]
        return to_jsonable_python(value)


KIND = "kind "  # begins what pydantic calls a kind, which no key then can be taken for


def _requires_kind(schema: dict[str, Any]) -> None:
    schema["required"] = ["kind", *schema.get("required", [])]


GIVES_KIND = ConfigDict(json_schema_extra=_requires_kind)  # a kind that is not the default


def one_of(kinds: Mapping[str, ModuleType], default: str) -> Any:
    """The type of a section with a `kind:`; its settings stand in the kind's own file."""
    if len(kinds) == 1:
        return kinds[default].Settings

    def kind_of(value: Any) -> str:
        given = value if isinstance(value, dict) else getattr(value, "__dict__", {})
        return KIND + str(given.get("kind", default))

    tagged = tuple(Annotated[module.Settings, Tag(KIND + kind)] for kind, module in kinds.items())
    return Annotated[Union[tagged], Discriminator(kind_of)]  # noqa: UP007


def key(default: Any, about: str) -> Any:
    """A key's default, and what editors show about it."""
    return Field(default, description=about)


def _number(value: Any) -> Any:
    """YAML 1.1 reads 2e-5 as a text."""
    with contextlib.suppress(ValueError):
        return float(value) if isinstance(value, str) else value
    return value


Dtype = Literal["float32", "bfloat16", "float16"]
_READ = BeforeValidator(_number)
Number = Annotated[float, _READ]
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Natural = Annotated[int, Field(ge=0, le=LARGEST)]
Positive = Annotated[float, Field(gt=0), _READ]
NotNegative = Annotated[float, Field(ge=0), _READ]
Share = Annotated[float, Field(gt=0, le=1), _READ]
Part = Annotated[float, Field(ge=0, le=1), _READ]
BelowOne = Annotated[float, Field(ge=0, lt=1), _READ]


def digest(value: Any) -> str:
    """sha256 (hex) of a JSON value in its canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
