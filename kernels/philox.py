"""Philox4x32-10, a counter-based generator: random words that are a pure function of a key and a counter.

It is integer arithmetic, so its bits depend on neither the device nor the batch size nor the compiler.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

__all__ = ["philox"]

MASK = 0xFFFFFFFF


def philox(
    key: tuple[Tensor | int, Tensor | int], counter: tuple[Tensor | int, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10, the counter-based generator of Salmon et al. (2011), "Parallel random numbers".

    Args:
        key: two 32-bit words, as int64 tensors or ints that broadcast with the counter.
        counter: four 32-bit words; at least one is an int64 tensor.

    Returns:
        Four int64 tensors of the broadcast shape, each word in [0, 2**32).
    """
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        (high0, low0), (high1, low1) = _multiply(0xD2511F53, c0), _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = _mix(high1, c1, k0), low1, _mix(high0, c3, k1), low0
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    # one was a tensor, so all are by now
    return cast(tuple[Tensor, Tensor, Tensor, Tensor], (c0, c1 & MASK, c2, c3 & MASK))


def _multiply(constant: int, word: Tensor | int) -> tuple[Tensor | int, Tensor | int]:
    """Upper and lower 32 bits of a product of 32-bit words; more may stand above them."""
    if not torch.compiler.is_compiling():
        product = constant * word  # torch keeps the lower 64 bits of it, which are all
        return product >> 32, product
    # by 16-bit halves, since compilers differ on overflow
    low = constant * (word & 0xFFFF)  # < 2**48
    high = constant * (word >> 16) + (low >> 16)  # < 2**49
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF


def _mix(high: Tensor | int, word: Tensor | int, key: Tensor | int) -> Tensor | int:
    """The lower 32 bits of the exclusive or."""
    mixed = high ^ word
    if isinstance(key, Tensor):
        mixed = mixed ^ key
    else:
        mixed ^= key
    mixed &= MASK  # in place: on a CPU that is worth more than the arithmetic
    return mixed
