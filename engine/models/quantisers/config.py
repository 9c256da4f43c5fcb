"""Config of the codes of tokens. It does not import torch, so that `--help` is instant."""

import math
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ....configs.errors import InputError
from ....configs.section import Kind


class QuantiserConfig(Kind):
    """What codes the tokens of an encoder get.

    Attributes:
        quantises: whether they get any.
        follows: whether codes follow the tokens without a loss.
        draws: whether codes are drawn while training.
    """

    quantises: ClassVar[bool] = False
    follows: ClassVar[bool] = False
    draws: ClassVar[bool] = False

    @property
    def beside(self) -> bool:
        """Whether codes describe the tokens without a gradient to them."""
        return False

    @property
    def parts(self) -> int:
        """Number G of parts of equal width into which a token is cut; each has codes of its own."""
        return 1

    @property
    def num_codes(self) -> int:
        """Number K of codes of a part."""
        return 0


class NoQuantiserConfig(QuantiserConfig):
    """Tokens have no codes."""

    kind: Literal["none"] = "none"

    def build(self, width: int) -> None:
        """Nothing."""


class CodesConfig(QuantiserConfig):
    """Tokens get codes."""

    quantises = True

    place: Literal["side", "path"] = "side"
    """side: codes describe the tokens, without a gradient to them; path: codes take the place of the tokens."""
    groups: int = Field(default=1, ge=1)
    """Number of parts of equal width into which a token is cut; each has codes of its own."""

    @property
    def parts(self) -> int:
        return self.groups

    @property
    def beside(self) -> bool:
        return self.place == "side"


class EMAQuantiserConfig(CodesConfig):
    """Codes are moving averages of the tokens that were nearest to them (VQ-VAE)."""

    made_by = ".ema:EMACodebook"
    follows = True

    kind: Literal["ema"] = "ema"
    codes: int = Field(default=256, ge=2)
    """Number of codes of each part."""
    decay: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the averages."""
    redraw: float = Field(default=0.3, ge=0, lt=1)
    """Codes that are nearest to fewer tokens than this share of what each would have are drawn anew from the batch; 0
    keeps them."""
    redraw_every: int = Field(default=1, ge=1)
    """Forward passes in training, one for each micro-batch, from one such time to the next."""

    @property
    def num_codes(self) -> int:
        return self.codes


class FSQQuantiserConfig(CodesConfig):
    """A few numbers of each token are rounded to a few levels each; no code has to be learnt (FSQ)."""

    made_by = ".fsq:FSQ"

    kind: Literal["fsq"] = "fsq"
    levels: list[Annotated[int, Field(ge=2, le=1000)]] = Field(default=[8, 6, 5], min_length=1)
    """Levels of each number; their product is the number of codes, at most 65,536."""

    @model_validator(mode="after")
    def _check_levels(self) -> Self:
        if self.num_codes > 2**16:
            raise InputError(f"make {self.num_codes} codes; at most 65536 are allowed", "levels")
        return self

    @property
    def num_codes(self) -> int:
        return math.prod(self.levels)


class GumbelQuantiserConfig(CodesConfig):
    """Codes are learnt by gradients; while training, one is drawn that is likely to be near (Gumbel-softmax)."""

    made_by = ".gumbel:GumbelCodebook"
    draws = True

    kind: Literal["gumbel"] = "gumbel"
    size: int = Field(default=256, ge=2)
    """Number of codes of each part."""
    sharpness: float = Field(default=10.0, gt=0)
    """Logits are minus this times a squared distance, over the mean of these."""
    temperatures: list[Annotated[float, Field(gt=0)]] = Field(default=[1.0, 0.1], min_length=2, max_length=2)
    """Temperature of the softmax through which gradients pass, at first and at last; it changes linearly."""
    temperature_steps: int = Field(default=4000, ge=1)
    """Forward passes in training, one for each micro-batch, until the last temperature."""

    @property
    def num_codes(self) -> int:
        return self.size


AnyQuantiser = Annotated[
    NoQuantiserConfig | EMAQuantiserConfig | FSQQuantiserConfig | GumbelQuantiserConfig, Field(discriminator="kind")
]
