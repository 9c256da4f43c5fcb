"""One rank of test_sharded.py: optimiser and average on parameters that FSDP2 has sharded, compared with whole ones.

Run by torchrun over gloo; prints nothing, fails by assertion. Every rank has the same data, so that FSDP's averaged
gradient is the gradient of one process, and keeps an unsharded copy, which torch's own AdamW and lerp train.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from seqjepa.kernels import EMA, AdamWEMA, ema_update_

SETTINGS = {"lr": 1e-2, "weight_decay": 0.1}


def network(seed: int = 0) -> nn.Sequential:
    """Five and three rows: two processes hold unequal shards."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def sharded(module: nn.Module, mesh: DeviceMesh, **settings) -> nn.Module:
    return fully_shard(copy.deepcopy(module), mesh=mesh, **settings)


def backward(module: nn.Module, step: int, scale: float = 1.0) -> None:
    images = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
    (scale * module(images).square().mean()).backward()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.detach().full_tensor()


def same(tensors, expected) -> None:
    for got, want in zip(tensors, expected, strict=True):
        torch.testing.assert_close(whole(got), want.detach(), rtol=1e-6, atol=1e-7)


def optimiser_and_teacher(mesh: DeviceMesh) -> None:
    """Steps with clipped gradients, and with scaled ones of which one, in one process's shard, is infinite."""
    plain, teacher = network(), network(1)
    ours, follower = sharded(plain, mesh), sharded(teacher, mesh, reshard_after_forward=True)
    images = torch.ones(2, 6)
    optimizer = AdamWEMA(
        ours.parameters(), **SETTINGS, ema_decay=0.9, teacher=zip(ours.parameters(), follower.parameters(), strict=True)
    )
    reference = torch.optim.AdamW(plain.parameters(), **SETTINGS, fused=True)
    for step in range(3):
        with torch.no_grad():
            torch.testing.assert_close(follower(images), teacher(images))
        for module, one in ((ours, optimizer), (plain, reference)):
            backward(module, step)
            nn.utils.clip_grad_norm_(module.parameters(), 0.05)
            one.step()
            one.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(list(teacher.parameters()), list(plain.parameters()), 0.1)
    same(ours.parameters(), plain.parameters())
    same(follower.parameters(), teacher.parameters())

    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(torch.zeros(()))  # it makes its scale where it first sees a tensor
    before = [whole(p).clone() for p in (*ours.parameters(), *follower.parameters())]
    backward(ours, 3, scale=64.0)
    if mesh.get_local_rank() == 0:
        ours[0].weight.grad.to_local()[0, 0] = float("inf")
    scaler.step(optimizer)
    same([*ours.parameters(), *follower.parameters()], before)
    scaler.update(64.0)
    optimizer.zero_grad()
    backward(ours, 4, scale=64.0)
    scaler.step(optimizer)
    backward(plain, 4)
    reference.step()
    same(ours.parameters(), plain.parameters())
    same([p.grad for p in ours.parameters()], [p.grad for p in plain.parameters()])  # the scale is taken out of them

    ours[0].weight.grad = None  # it stays, its teacher follows it
    expected = 0.9 * whole(follower[0].weight) + 0.1 * whole(ours[0].weight)
    optimizer.step()
    same([follower[0].weight], [expected])


def own_teachers_and_checkpoints(mesh: DeviceMesh) -> None:
    """They are sharded like their parameters, and go through torch's distributed state dicts, whole or by shards."""
    whole_state, by_shards = StateDictOptions(full_state_dict=True), StateDictOptions()
    for options in (whole_state, by_shards):
        ours = sharded(network(), mesh)
        optimizer = AdamWEMA(ours.parameters(), **SETTINGS, ema_decay=0.9)
        backward(ours, 0)
        optimizer.step()
        optimizer.zero_grad()
        saved = copy.deepcopy(get_optimizer_state_dict(ours, optimizer, options=options))
        again = sharded(network(2), mesh)
        again.load_state_dict(ours.state_dict())
        other = AdamWEMA(again.parameters(), lr=1.0, ema_decay=0.0)
        set_optimizer_state_dict(again, other, saved, options=options)
        for module, one in ((ours, optimizer), (again, other)):
            backward(module, 1)
            one.step()
        for p, q in zip(ours.parameters(), again.parameters(), strict=True):
            assert torch.equal(whole(p), whole(q))
            assert torch.equal(whole(optimizer.teacher_of(p)), whole(other.teacher_of(q)))
            assert not torch.equal(whole(p), whole(optimizer.teacher_of(p)))


def average(mesh: DeviceMesh) -> None:
    """By modules, by lists with a live copy in bfloat16, and by EMA; a student that is placed otherwise is fetched."""
    teacher, student = network(), network(1)
    ours, theirs = sharded(teacher, mesh), sharded(student, mesh)
    live = [p.detach().bfloat16() for p in ours.parameters()]
    ema = EMA(teacher, 0.75)
    fully_shard(ema.teacher, mesh=mesh)
    ema_update_(list(ours.parameters()), theirs.parameters(), 0.75, live=live)
    images = torch.ones(2, 6)
    with torch.no_grad():
        ema(images), theirs(images)  # without a backward pass FSDP does not shard the root's weights again
        ema.update(theirs)
        torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 0.25)
        torch.testing.assert_close(ema(images), teacher(images))
    ema.teacher.reshard()
    same(ours.parameters(), teacher.parameters())
    same(ema.teacher.parameters(), teacher.parameters())
    for p, half in zip(ours.parameters(), live, strict=True):
        assert torch.equal(whole(half), whole(p).bfloat16())

    columns, rows = torch.randn(4, 6, generator=torch.Generator().manual_seed(5)), torch.zeros(4, 6)
    moved = distribute_tensor(rows, mesh, [Shard(0)])
    for placement in (Shard(1), Replicate()):
        ema_update_([moved], [distribute_tensor(columns, mesh, [placement])], 0.5)
    same([moved], [0.75 * columns])


def refusals(mesh: DeviceMesh) -> None:
    ours, plain = sharded(network(), mesh), network()
    with pytest.raises(ValueError, match="not sharded, the one that belongs to it a DTensor"):
        AdamWEMA(ours.parameters(), teacher=zip(ours.parameters(), plain.parameters(), strict=True))
    with pytest.raises(ValueError, match="shard both alike"):
        ema_update_(plain, ours, 0.5)
    with pytest.raises(ValueError, match="make the EMA first and then shard both alike"):
        EMA(ours)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    pairs = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("all", "alone"))
    for mesh in (pairs["all"], pairs["alone"]):
        optimiser_and_teacher(mesh)
        own_teachers_and_checkpoints(mesh)
        average(mesh)
        refusals(mesh)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
