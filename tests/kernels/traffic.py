"""Count the bytes that every kernel moves, and print them beside the bytes that it has to move.

Run by test_aot.py in a process of its own; by hand, with `--write`, it renews budget.json. A binary does not tell its
traffic, which depends on the sizes of the tensors. So the kernels run in Triton's interpreter, on sizes of several
tiles in each dimension: what loads and stores ask for, without what they mask, is counted exactly, and is the same on
every machine. Whether a cache would serve a load is not asked.

A kernel has to read once each address that it reads before it has written it, and to write once each that it writes;
scratch memory counts as a result.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.runtime.interpreter as interpreter
from aot import all_kernels, full_name, renew

from seqjepa.kernels import AdamWEMA, coding_rate, ema_update_, sigreg
from seqjepa.kernels.internal import matmul
from seqjepa.kernels.token_statistics import token_statistics_attention


class Counting:
    """Stands before the interpreter's memory, and keeps the addresses of each launch in the order of time."""

    def __init__(self):
        self.memory, self.launches = interpreter._interpreter, defaultdict(list)
        self.current: list[tuple[np.ndarray, bool, int]] = []  # addresses, whether they are written, bytes of each
        run = interpreter.InterpretedFunction.run

        def kept(kernel, *args, **kwargs):
            self.current = []
            self.launches[full_name(kernel)].append(self.current)
            return run(kernel, *args, **kwargs)

        interpreter._interpreter, interpreter.InterpretedFunction.run = self, kept

    def __getattr__(self, name: str):
        return getattr(self.memory, name)

    def load(self, pointers, mask, other, dtype):
        self.current.append((pointers[mask], False, np.dtype(dtype).itemsize))
        return self.memory.load(pointers, mask, other, dtype)

    def store(self, pointers, values, mask):
        self.current.append((pointers[mask], True, values.itemsize))
        return self.memory.store(pointers, values, mask)

    def atomic_rmw(self, operation, pointers, values, mask, order):
        self.current += [(pointers[mask], written, values.itemsize) for written in (False, True)]
        return self.memory.atomic_rmw(operation, pointers, values, mask, order)


def traffic(launch: list[tuple[np.ndarray, bool, int]]) -> tuple[int, int]:
    """Bytes that a launch moves, and bytes that it has to move."""
    counts = [len(addresses) for addresses, *_ in launch]
    addresses = np.concatenate([addresses for addresses, *_ in launch])
    written, sizes = (np.repeat([access[field] for access in launch], counts) for field in (1, 2))
    _, first = np.unique(addresses, return_index=True)  # the first access to each address
    _, results = np.unique(addresses[written], return_index=True)
    needed = sizes[first][~written[first]].sum() + sizes[written][results].sum()
    return int(sizes.sum()), int(needed)


def values(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def differentiated(function, z: torch.Tensor) -> None:
    function(z.requires_grad_()).sum().backward()


def rate(z: torch.Tensor) -> torch.Tensor:
    return coding_rate(z, eps=0.5)


def rate_alone() -> None:
    with torch.no_grad():
        rate(values(256, 160))


def on_hopper(multiprocessors: int) -> None:
    """A rate whose products have tiles that no other GPU has, in a precision that the interpreter knows."""
    shapes = [shape | {"PRECISION": "ieee"} for shape in matmul.product_shapes(matmul.HOPPER)]
    square = matmul.gram_shape(matmul.HOPPER) | {"PRECISION": "ieee"}
    with (
        patch.object(matmul, "product_shapes", lambda _: shapes),
        patch.object(matmul, "gram_shape", lambda _: square),
        patch.object(matmul, "_multiprocessors", lambda _: multiprocessors),
    ):
        differentiated(rate, values(384, 192))


def tokens(causal: bool) -> None:
    temperature = torch.ones(4)
    differentiated(
        lambda w: token_statistics_attention(w, temperature, causal=causal),
        values(2, 100, 4, 160, dtype=torch.bfloat16),
    )


def average(live: bool) -> None:
    teacher, student = ([values(9000), values(70, 90)] for _ in range(2))
    copies = [t.bfloat16() for t in teacher] if live else None
    ema_update_(teacher, student, torch.tensor(0.9), live=copies)


def step() -> None:
    parameters = [values(9000), values(70, 90)]
    for p in parameters:
        p.grad = values(*p.shape)
    AdamWEMA(parameters, ema_decay=0.9).step()


CASES = {
    "rate of (384, 192)": lambda: differentiated(rate, values(384, 192)),
    "rate of (384, 192) on an H100": lambda: on_hopper(132),
    "rate of (384, 192) on eight of its multiprocessors": lambda: on_hopper(8),
    "rate of (320, 400), the library's factor": lambda: differentiated(rate, values(320, 400)),
    "rate of (4500, 48)": lambda: differentiated(rate, values(4500, 48)),
    "rates of (3, 80, 144)": lambda: differentiated(rate, values(3, 80, 144)),
    "rate of (256, 160) alone": rate_alone,
    "sigreg of (384, 96), 160 slices": lambda: differentiated(
        lambda z: sigreg(z, num_slices=160, seed=0), values(384, 96)
    ),
    "tokens (2, 100, 4, 160)": lambda: tokens(causal=False),
    "causal tokens (2, 100, 4, 160)": lambda: tokens(causal=True),
    "average of 15,300": lambda: average(live=False),
    "average of 15,300 and live copy": lambda: average(live=True),
    "step of 15,300": step,
}


def main() -> None:
    counting = Counting()
    measured, launched = {}, set()
    for case, work in CASES.items():
        counting.launches.clear()
        work()
        launched |= counting.launches.keys()
        for kernel, launches in counting.launches.items():
            moved, needed = (sum(numbers) for numbers in zip(*map(traffic, launches), strict=True))
            measured[f"{kernel}, {case}"] = {"bytes": moved, "of_needed": round(moved / needed, 2)}
    if "--write" in sys.argv:
        renew({"traffic": measured})
    print(json.dumps({"measured": measured, "missing": sorted(all_kernels() - launched)}))


if __name__ == "__main__":
    main()
