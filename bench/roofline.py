"""Limits of the hardware: its matrix products, its convolutions with batch norm, and other cards' published peaks."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
from common import wait
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["CARDS", "Card", "convolution_seconds", "matmul_peak", "seconds_of", "training_flops"]


class Card(NamedTuple):
    """Published peaks: dense bf16 products that add in fp32, in TFLOP/s, and bandwidth in GB/s."""

    tflops: float
    bandwidth: float


CARDS = {  # the server cards in their SXM form
    "RTX 3090": Card(71.0, 936.0),
    "RTX 4090": Card(165.2, 1008.0),
    "RTX 5090": Card(209.5, 1792.0),
    "A100": Card(312.0, 2039.0),
    "H100": Card(989.4, 3350.0),
    "H200": Card(989.4, 4800.0),
}


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
