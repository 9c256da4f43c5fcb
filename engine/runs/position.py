"""A position in training."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from pydantic import Field

__all__ = ["Position"]

Count = Annotated[int, Field(ge=0, lt=2**32)]


class Position(NamedTuple):
    """How far a run has come. Training is divided into segments; an epoch is one kind of them."""

    segment: Count
    """Complete segments."""
    step: Count = 0
    """Steps of the next segment that are done."""
