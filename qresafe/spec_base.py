"""What every spec is made of: a closed, immutable model, and the ranges of its numbers."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

# Here and not in `records`, because a judge's spec names outcomes, and specs go without pyarrow.
Axis = Literal["harmful", "benign", "borderline"]
Kind = Literal["harmful", "benign", "borderline", "recombined"]  # of calibration prompts
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
    LATER: ClassVar[frozenset[str]] = frozenset()  # fields that saved runs were made without

    def key_data(self, exclude: set[str] | None = None) -> dict[str, Any]:
        """Return the spec as plain data to hash: as if its `LATER` fields did not exist yet.

        So what was saved before there was an option is found as long as nobody asks for it.

        Args:
            exclude: Fields that do not matter.
        """
        data: dict[str, Any] = self.model_dump(mode="json", exclude=exclude)
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if name in self.LATER and value == field.default:
                data.pop(name, None)
            elif isinstance(value, Spec) and name in data:
                data[name] = value.key_data()
        return data

    @field_validator("*")
    @classmethod
    def _not_empty(cls, value: Any, info: ValidationInfo) -> Any:
        listed = value if isinstance(value, tuple) else (value,)
        if info.field_name not in cls.MAY_BE_EMPTY and any(one == "" for one in listed):
            raise ValueError(EMPTY)
        return value
