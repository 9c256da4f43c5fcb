"""Config of CRATE's layers. It does not import torch, so that `--help` is instant."""

from typing import Literal

from pydantic import Field

from ....configs.section import Section


class CrateLayers(Section):
    """Settings of layers that compress by attention in subspaces and then sparsify: CRATE's."""

    num_layers: int = Field(default=2, ge=1)
    """Number of layers."""
    num_heads: int = Field(default=4, ge=1)
    """Number of subspaces of each layer."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of the attention's weights and output."""
    coding: Literal["square", "overcomplete"] = "square"
    """Dictionary of the sparse coding: square, without a residual (CRATE), or four times as wide as a token, with a
    dictionary of its own for the synthesis and a residual (CRATE-alpha)."""
    step: float = Field(default=0.1, gt=0)
    """Step size of the sparse coding."""
    threshold: float = Field(default=0.1, ge=0)
    """Weight of the l1 norm of the codes."""
    longest_step: float | None = Field(default=None, gt=0)
    """After each training step, dictionaries D are shrunk to step * |D|² of about this at most; null only warns above
    1.8. Below 2, a step of the sparse coding never raises its objective."""
