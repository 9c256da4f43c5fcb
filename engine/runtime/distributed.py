"""Several processes as one: batch statistics of the whole batch, of which each process holds a part.

`seqjepa.kernels.collectives` says what the gradients of sums and gathered rows are.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather, pad_across_processes
from torch import Tensor, nn

from ...configs.errors import InputError
from ...kernels.collectives import gather_rows, name_of, sum_over_processes


def world() -> dist.ProcessGroup | None:
    """The group of all processes; None where there is one."""
    return dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None


def joined_mean(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Mean over the processes of each element; `x` itself where there is one process."""
    name, size = name_of(group)
    return sum_over_processes(x, name) / size if name else x


def total_over(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum over the processes of each element, the same on all of them; `x` itself where there is one process."""
    name, _ = name_of(group)
    return sum_over_processes(x, name) if name else x


def joined_rows(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Rows of all processes in order of rank, [B, ...] to [processes * B, ...]; B is the same everywhere.

    The gradient is that of the joined batch times the number of processes, as with `group=` in `seqjepa.kernels`.
    """
    name, size = name_of(group)
    return gather_rows(x.flatten(1), name, size).unflatten(1, x.shape[1:]) if name else x


def of_main(accelerator: Accelerator, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What the main process measures, on every process; the others wait."""
    found = [measure() if accelerator.is_main_process else None]
    broadcast_object_list(found)
    return found[0] or {}


def average_gradients(module: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Replace each gradient by its mean over the processes, which have gradients of the same parameters."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    if group is not None and gradients:
        whole = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(whole, group=group)
        whole /= group.size()
        for gradient, mean in zip(gradients, whole.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def uneven_rows(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Rows of all processes in order of rank, without gradient; each may have another number of them, or none."""
    if group is None:
        return x
    if x.dtype == torch.bool:  # padding would make it int64, on the processes that pad
        return uneven_rows(x.byte(), group).bool()
    counts: Any = gather(torch.tensor([len(x)], device=x.device))
    rows: Any = gather(pad_across_processes(x))
    parts = rows.tensor_split(group.size())
    return torch.cat([part[:count] for part, count in zip(parts, counts.tolist(), strict=True)])


class JoinedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the rows of all processes, [N, C, ...] to the same; N is the same everywhere.

    `nn.SyncBatchNorm` for any device: torch's own works on GPUs alone. Statistics and sums are float32, the running
    statistics have a momentum, and evaluation is that of torch's batch norm.
    """

    group_name, num_processes = "", 1  # of the processes that share a batch; "" if there is one
    momentum: float
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def _check_input_dim(self, x: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        name, size = self.group_name, self.num_processes
        if not self.training or not name:
            return super().forward(x)
        axes = [0, *range(2, x.ndim)]
        shape = [1, -1] + [1] * (x.ndim - 2)
        count = x.numel() // x.shape[1] * size
        mean = sum_over_processes(x.float().sum(axes), name) / count
        centred = x.float() - mean.view(shape)
        variance = sum_over_processes(centred.square().sum(axes), name) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = torch.rsqrt(variance + self.eps)
        if self.affine:
            return (centred * (scale * self.weight).view(shape) + self.bias.view(shape)).to(x.dtype)
        return (centred * scale.view(shape)).to(x.dtype)


def join_batch_norms(module: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Replace every batch norm in a module by a `JoinedBatchNorm` with the same name and state."""
    for name, child in module.named_children():
        if isinstance(child, (nn.BatchNorm1d, nn.BatchNorm2d)):
            joined = JoinedBatchNorm(child.num_features, child.eps, child.momentum, child.affine)
            joined.load_state_dict(child.state_dict())
            joined.requires_grad_(child.affine and child.weight.requires_grad)
            joined.group_name, joined.num_processes = name_of(group)
            setattr(module, name, joined)
        else:
            join_batch_norms(child, group)


def check_agreement(accelerator: Accelerator, facts: dict[str, str]) -> None:
    """Check that each fact is the same on every process.

    Raises:
        InputError: names the first fact that is not, and the processes that differ from process 0.
    """
    if accelerator.num_processes == 1:
        return
    numbers = [int.from_bytes(hashlib.sha256(fact.encode()).digest()[:7], "big") for fact in facts.values()]
    gathered: Any = accelerator.gather(torch.tensor([numbers], device=accelerator.device))
    for name, found in zip(facts, gathered.T.tolist(), strict=True):
        if others := [rank for rank, value in enumerate(found) if value != found[0]]:
            ranks = ", ".join(map(str, others))
            raise InputError(f"{name} of process {ranks} is not that of process 0: all must run the same")
