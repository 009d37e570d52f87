"""What every spec is made of: a closed, immutable model, and the ranges of its numbers."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

# Here and not in `records`, because a judge's spec names outcomes, and specs go without pyarrow.
Outcome = Literal["refused", "partial", "complied", "incoherent", "undecided"]

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Weight = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]


EMPTY = "must not be empty"


class Spec(BaseModel):
    """Immutable, and closed: a key that is not declared is an error, and so is an empty text."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    MAY_BE_EMPTY: ClassVar[frozenset[str]] = frozenset()  # the fields where "" means something

    @field_validator("*")
    @classmethod
    def _not_empty(cls, value: Any, info: ValidationInfo) -> Any:
        listed = value if isinstance(value, tuple) else (value,)
        if info.field_name not in cls.MAY_BE_EMPTY and any(one == "" for one in listed):
            raise ValueError(EMPTY)
        return value
