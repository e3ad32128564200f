"""What sections of a campaign file are: pydantic models here, dataclasses in `actors.contracts`."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from functools import cache
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, TypeAdapter
from pydantic.fields import FieldInfo

from actors.contracts import Settings


class Section(BaseModel):
    """Every section refuses unknown keys and never coerces strings to numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


SECTIONS = (Section, Settings)


def fields_of(section: Any) -> Mapping[str, FieldInfo]:
    """Return the fields of a section of either kind, as pydantic describes them."""
    if issubclass(section, BaseModel):
        return section.model_fields
    types = get_type_hints(section, include_extras=True)
    return {
        f.name: FieldInfo.from_annotation(types[f.name])
        if f.default is MISSING
        else FieldInfo.from_annotated_attribute(types[f.name], f.default)
        for f in fields(section)
    }


reader: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)
"""What checks and builds a section of either kind; slow to make, so kept."""
