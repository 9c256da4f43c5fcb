"""One rank of test_distributed.py: rates, statistics and gradients of its share of a batch, compared with the whole.

Run by torchrun over gloo; prints nothing, fails by assertion. The whole batch is the same on every rank, so that each
can compute by itself what one process would.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from seqjepa.kernels import SIGReg, coding_rate, coding_rate_stats, sigreg
from seqjepa.kernels.collectives import sum_over_processes


def whole_batch(rows: int, width: int, offset: float) -> torch.Tensor:
    """Rows far from zero, and each process's far from the others': subtracting them late would lose digits."""
    z = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)) + offset
    z[:, 0] += 3 * torch.arange(4).repeat_interleave(rows // 4)
    return z


def share(rows, even):
    """Rows of this process: as many as the others', or from none to most of them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    power = 1 if even else 2
    return slice(*(rows * number**power // world**power for number in (rank, rank + 1)))


def check(name, got, expected, tolerance):
    if not expected.numel():  # the gradient of no rows
        assert got.shape == expected.shape
        return
    error = (got - expected).norm() / expected.norm()
    assert error <= tolerance, f"{name}: relative error {error:.1e} on rank {dist.get_rank()}"


def compare(loss, z, mine):
    """Loss and gradient of my rows, and of the whole batch in one process."""
    part = z[mine].clone().requires_grad_()
    distributed = loss(part, dist.group.WORLD)
    distributed.sum().backward()
    whole = z.clone().requires_grad_()
    alone = loss(whole, None)
    alone.sum().backward()
    return distributed, alone, part.grad, whole.grad[mine] * dist.get_world_size()


class Undefined(torch.autograd.Function):
    """The identity, whose gradient is defined on the first process only."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad if dist.get_rank() == 0 else None


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world = dist.get_world_size()

    # (40, 64): by its own number of rows one process would take the side of the columns, another that of the rows
    for (rows, width), center, even in itertools.product(
        ((24, 6), (8, 30), (40, 40), (40, 64)), (True, False), (True, False)
    ):
        z = whole_batch(rows, width, offset=50 if center else 0)  # uncentred, it would be the condition number
        mine = share(rows, even)

        # condition numbers reach 2,500: gradients in float32 are good to 2e-7 of them
        def rate(z, group, center=center):
            return coding_rate(z, eps=0.5, center=center, group=group)

        got, alone, gradient, expected = compare(rate, z, mine)
        check(f"rate {rows} x {width}, center={center}", got, alone, 1e-5)
        check(f"its gradient {rows} x {width}, center={center}", gradient, expected, 2e-4)

        stats = coding_rate_stats(z[mine], eps=0.5, center=center, group=dist.group.WORLD)
        for name, one, other in zip(stats._fields, stats, coding_rate_stats(z, eps=0.5, center=center), strict=True):
            check(f"{name} {rows} x {width}, center={center}", one, other, 1e-4)

        if rows >= width:
            weights = torch.rand(3, rows, generator=torch.Generator().manual_seed(1))

            def class_rate(z, group, weights=weights, mine=mine, center=center):
                return coding_rate(
                    z, eps=0.5, center=center, weights=weights[:, mine] if group else weights, group=group
                )

            got, alone, gradient, expected = compare(class_rate, z, mine)
            check("class rates", got, alone, 1e-5)
            check("gradient of class rates", gradient, expected, 2e-4)

            def of_weights(weights, group, z=z, mine=mine, center=center):
                rows = z[mine] if group else z
                return coding_rate(rows, eps=0.5, center=center, weights=weights.mT, group=group)

            _, _, gradient, expected = compare(of_weights, weights.mT, mine)
            check("gradient of the weights of classes", gradient, expected, 2e-4)

    for rows, even in itertools.product((24, 8), (True, False)):
        z = whole_batch(rows, 10, offset=0)
        mine = share(rows, even)

        def statistic(z, group):
            return sigreg(z, num_slices=30, seed=4, group=group)

        def of_module(z, group):
            module = SIGReg(30, seed=4, group=group)
            value = module(z)
            assert module.stuck == 0
            module(torch.zeros_like(z))
            assert module.stuck == 1  # by the number of samples of all
            return value

        for loss in (statistic, of_module):
            got, alone, gradient, expected = compare(loss, z, mine)
            check("sigreg", got, alone, 1e-5)
            check("its gradient", gradient, expected, 1e-5)

    for loss in (lambda z, group: coding_rate(z, eps=0.5, group=group), statistic):
        none = torch.zeros(0, 10, requires_grad=True)  # no process has a row
        value = loss(none, dist.group.WORLD)
        value.backward()
        assert value == 0

    # under torch.func reverse mode is there, and forward mode is refused; both want the same of all processes
    z = whole_batch(24, 10, offset=0)
    mine, group = share(24, even=False), dist.group.WORLD
    for loss in (lambda z, group: coding_rate(z, eps=0.5, group=group), statistic):
        expected = torch.func.grad(lambda z, loss=loss: loss(z, None))(z)[mine] * world
        check("under torch.func", torch.func.grad(lambda z, loss=loss: loss(z, group))(z[mine]), expected, 1e-5)
        with pytest.raises(RuntimeError, match="has no forward-mode derivative over several processes"):
            torch.func.jvp(lambda z, loss=loss: loss(z, group), (z[mine],), (z[mine],))
    mine = share(24, even=True)

    # a process whose gradient is undefined takes part in the backward pass of the others
    x = torch.zeros(3, requires_grad=True)
    Undefined.apply(sum_over_processes(x, group.group_name)).sum().backward()
    check("a gradient that is undefined on all processes but one", x.grad, torch.ones(3), 0)

    # what data-parallel training makes of it: the weights' gradient is the one of a single process
    torch.manual_seed(0)
    model = nn.Linear(12, 10)
    images = torch.randn(24, 12, generator=torch.Generator().manual_seed(3))
    wrapped = DistributedDataParallel(model)
    features = wrapped(images[mine])
    loss = sigreg(features, num_slices=30, seed=4, group=dist.group.WORLD)
    (loss - coding_rate(features, alpha=2.0, group=dist.group.WORLD)).backward()
    parallel = model.weight.grad.clone()
    model.zero_grad()
    features = model(images)
    (sigreg(features, num_slices=30, seed=4) - coding_rate(features, alpha=2.0)).backward()
    check("gradient of the weights", parallel, model.weight.grad, 1e-5)

    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
