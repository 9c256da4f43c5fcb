"""Limits of the hardware: its matrix products, its convolutions with batch norm, and cards' published peaks.

And what the work of the kernels needs at least, for the least time that the hardware allows it. FLOPs are additions and
multiplications; n and m are the smaller and the larger of the number of rows and their width.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
from common import wait
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


class Card(NamedTuple):
    """Published peaks: dense products in bf16 and TF32 that add in fp32, and fp32, in TFLOP/s; bandwidth in GB/s."""

    tflops: float
    bandwidth: float
    tf32: float
    fp32: float


CARDS = {  # the server cards in their SXM form
    "RTX 3090": Card(71.0, 936.0, 35.6, 35.6),
    "RTX 4090": Card(165.2, 1008.0, 82.6, 82.6),
    "RTX 5090": Card(209.5, 1792.0, 104.8, 104.8),
    "A100": Card(312.0, 2039.0, 156.0, 19.5),
    "H100": Card(989.4, 3350.0, 494.7, 66.9),
    "H200": Card(989.4, 4800.0, 494.7, 66.9),
}


class Peaks(NamedTuple):
    """Bytes a second, and FLOP/s in float32 accuracy: of products, and of other operations."""

    memory: float
    products: float
    others: float

    def __str__(self) -> str:
        rates = f"{self.products / 1e12:.3g} TFLOP/s in products, {self.others / 1e12:.3g} elsewhere"
        return f"{self.memory / 1e9:,.0f} GB/s, {rates}"


class Work(NamedTuple):
    """What a computation needs at least: bytes to and from memory, FLOPs of products, and other FLOPs."""

    moved: int
    products: int = 0
    others: int = 0


def card_of(machine: str) -> tuple[str, Card] | None:
    """The card that a machine's name tells, and its published peaks; None if they are not known."""
    known = not {"PCIe", "NVL"} & set(re.split(r"[\W_]+", machine))
    return next(((name, card) for name, card in CARDS.items() if known and name.split()[-1] in machine), None)


def peaks_of(device: torch.device) -> tuple[str, Peaks]:
    """Where a machine's peaks are from, and the peaks: published ones of a known card, else measured."""
    if device.type == "cuda" and (found := card_of(torch.cuda.get_device_name(device))):
        short, card = found
        return f"the {short}'s published peaks", published(card)
    a, b = (torch.randn(2048, 2048, device=device) for _ in range(2))
    source = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.zeros_like(source)
    rate = 2 * 2048**3 / seconds_of(lambda: a @ b)
    bandwidth = 12 * source.numel() / seconds_of(lambda: target.add_(source))  # a CPU reads what a copy overwrites
    return "measured peaks", Peaks(bandwidth, rate, rate)


def published(card: Card) -> Peaks:
    """Peaks of a card; three products in TF32 have the accuracy of one in float32."""
    return Peaks(card.bandwidth * 1e9, max(card.fp32, card.tf32 / 3) * 1e12, card.fp32 * 1e12)


def least_seconds(work: Work, peaks: Peaks) -> float:
    """Time of what takes longest, if all else is done meanwhile."""
    return max(need / peak for need, peak in zip(work, peaks, strict=True))


def rate_work(matrices: int, rows: int, width: int, element: int, mode: str, *, shared: bool = False) -> Work:
    """Work of coding rates of [matrices, rows, width], elements of so many bytes.

    Forward: half of the Gram matrix and its diagonal, m n (n + 1), and Cholesky's n³ / 3. Backward: two triangular
    solves with m right-hand sides, 2 m n². The rows are read and, with a gradient, as many numbers written.

    Args:
        mode: forward, backward or both.
        shared: whether all matrices are of the same rows, weighted by a membership in float32.
    """
    n, m = sorted((rows, width))
    forward, backward = m * n * (n + 1) + n**3 // 3, 2 * m * n**2
    flops = {"forward": forward, "backward": backward, "both": forward + backward}[mode]
    tensor = (1 if shared else matrices) * rows * width * element
    memberships = 4 * matrices * rows if shared else 0
    return Work(tensor * (1 if mode == "forward" else 2) + memberships, matrices * flops)


def factor_work(matrices: int, n: int) -> Work:
    """Work of log-determinants and inverses of symmetric float32 matrices.

    Cholesky takes n³ / 3 and the inverse from the factor 2 n³ / 3; a triangle is read, and the inverse written.
    """
    return Work(4 * matrices * (n * (n + 1) // 2 + n**2), matrices * n**3)


def sigreg_work(samples: int, width: int, slices: int, knots: int, mode: str, size: int = 4) -> Work:
    """Work of SIGReg of numbers of `size` bytes, with knots at positive t; directions are drawn, and need not be read.

    Either way: a product with the directions, 2 samples width slices, and 6 FLOPs for each projection and knot.
    Forward these are 2 for each of cos(k x) = 2 cos(x) cos((k - 1) x) - cos((k - 2) x) and of the sine, and 2 to add
    them up; backward, 3 for each of two series in cosines and sines by Clenshaw's recurrence.
    """
    passes = 2 if mode == "both" else 1
    tensor = size * samples * width
    moved = tensor if mode == "forward" else 2 * tensor
    return Work(moved, passes * 2 * samples * width * slices, passes * 6 * samples * slices * knots)


def seconds_of(work: Callable[[], object], repetitions: int = 5) -> float:
    """Median seconds, after two warm-up runs."""
    times = []
    for repetition in range(repetitions + 2):
        wait()
        started = time.perf_counter()
        work()
        wait()
        if repetition >= 2:
            times.append(time.perf_counter() - started)
    return median(times)


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best square matrix product."""
    rates = []
    for size in (4096, 8192, 16384) if device.type == "cuda" else (1024, 2048, 4096):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        rates.append(2 * size**3 / seconds_of(lambda a=a, b=b: a @ b))
    return max(rates)


def training_flops(loss: Callable[[], Tensor]) -> int:
    """FLOPs of products and convolutions of a loss and its backward, as torch counts them (custom kernels are not)."""
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    return counter.get_total_flops()


class _Layer(NamedTuple):
    conv: nn.Conv2d
    norm: nn.BatchNorm2d
    shape: tuple[int, ...]


def convolution_seconds(encoder: nn.Module, images: Tensor, dtype: torch.dtype, *, backward: bool) -> float:
    """Seconds of the encoder's convolutions, each repeated alone with its batch norm and ReLU.

    A training step would take this time if nothing else cost anything and each layer ran as it does alone: without
    residual sums, poolings, the weights' update, and layers that evict each other's caches. On a GPU each is
    compiled, as in the step, which may fuse still more across layers. 0 for an encoder without convolutions that a
    batch norm follows.

    Args:
        encoder: the encoder whose layers are timed.
        images: N images in the shape that the encoder takes, [N, C, H, W] or [N, 1, C, H, W].
        dtype: dtype of the activations.
        backward: whether gradients are computed too.
    """
    layers = _layers(encoder, images)
    alike: dict[tuple, int] = {}
    for conv, _, shape in layers:
        key = (*shape, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
        alike[key] = alike.get(key, 0) + 1
    total, first = 0.0, next(iter(layers), None)
    for layer in layers:
        conv, norm, shape = layer
        count = alike.pop((*shape, conv.out_channels, conv.kernel_size, conv.stride, conv.padding), 0)
        if count:
            total += count * seconds_of(_alone(conv, norm, shape, dtype, backward, pixels=layer is first))
    return total


def _layers(encoder: nn.Module, images: Tensor) -> list[_Layer]:
    """Each convolution with the batch norm that follows it, and the shape of its input."""
    shapes, norms, outputs = {}, {}, {}

    def seen(module, inputs, output):
        if isinstance(module, nn.Conv2d):
            shapes[module], outputs[output.data_ptr()] = tuple(inputs[0].shape), module
        elif isinstance(module, nn.BatchNorm2d) and inputs[0].data_ptr() in outputs:
            norms[outputs[inputs[0].data_ptr()]] = module

    hooks = [module.register_forward_hook(seen) for module in encoder.modules()]
    with torch.no_grad():
        encoder(images[:2])
    for hook in hooks:
        hook.remove()
    return [_Layer(conv, norms[conv], (len(images), *shape[1:])) for conv, shape in shapes.items() if conv in norms]


def _alone(conv: nn.Conv2d, norm: nn.BatchNorm2d, shape: tuple[int, ...], dtype, backward: bool, *, pixels: bool):
    device = conv.weight.device
    x = torch.randn(shape, device=device).to(dtype).to(memory_format=torch.channels_last)
    block = nn.Sequential(
        nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=False),
        nn.BatchNorm2d(conv.out_channels),
        nn.Identity() if conv.kernel_size == (1, 1) else nn.ReLU(),  # shortcuts have none
    ).to(device, memory_format=torch.channels_last)
    block[0].to(dtype)
    if device.type == "cuda":
        torch.compiler.reset()
        block.compile(dynamic=False)
    with torch.no_grad():
        slope = torch.ones_like(block(x))
    wanted = [p for p in block.parameters() if backward]
    if backward and not pixels:  # images need no gradient
        wanted.append(x.requires_grad_())

    def work() -> None:
        with torch.set_grad_enabled(backward):
            y = block(x)
        if backward:
            torch.autograd.grad(y, wanted, slope)

    return work
