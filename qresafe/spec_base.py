"""What every spec is made of: a closed, immutable model, and the ranges of its numbers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

# Here and not in `records`, because a judge's spec names outcomes, and specs go without pyarrow.
Outcome = Literal["refused", "partial", "complied", "incoherent", "undecided"]

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Weight = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]


class Spec(BaseModel):
    """Immutable, and closed: a key that is not declared is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
