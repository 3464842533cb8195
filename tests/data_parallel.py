"""What tests/test_data_parallel.py runs on every rank; a plain module, for ranks import it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from optimizers import OWN_VARIANTS, VARIANTS, generator
from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR

import fusedopt

STEPS, MIDDLE = 6, 3
ROWS = {row.id: row for row in (*VARIANTS, *OWN_VARIANTS)}
Options = Mapping[str, Any]
States = list[dict[str, Tensor]]


class Net(Module):
    """Odd sizes, so that views into a bucket begin anywhere; a parameter that is never used, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(13, 37)
        self.gain = torch.nn.Parameter(torch.ones(()))
        self.unused = torch.nn.Parameter(torch.ones(3))
        self.frozen = torch.nn.Parameter(torch.ones(37), requires_grad=False)
        self.second = torch.nn.Linear(37, 129, bias=False)
        self.third = torch.nn.Linear(129, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(inputs) * self.frozen) * self.gain
        out: Tensor = self.third(torch.tanh(self.second(hidden)))
        return out


def make_net(dtype: torch.dtype = torch.float32, *, unused: bool = True) -> Net:
    torch.manual_seed(5)
    net = Net().to(dtype)
    if not unused:
        del net.unused
    return net


def backward(net: Module, step: int, rank: int, dtype: torch.dtype) -> None:
    """The gradients of one rank's batch."""
    inputs = torch.randn(6, 13, generator=generator(100 * step + rank)).to(dtype)
    net(inputs).float().square().mean().backward()


def detached(params: list[Any]) -> list[Tensor]:
    return [param.detach().clone() for param in params]


def as_file(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def states_of(optimizer: Optimizer, params: list[Any]) -> States:
    """The state of each parameter, empty where there is none."""
    return [{name: value.clone() for name, value in optimizer.state.get(p, {}).items()} for p in params]


# --- DistributedDataParallel ------------------------------------------------------------------------------------------


def replicas(
    row: str,
    dtype: torch.dtype,
    options: Options,
    ddp_options: Options,
    set_to_none: bool = True,
    offload: bool = False,
) -> dict[str, Any]:
    """A training with DDP: its weights and state, the gradients that each step saw, and in how many buffers."""
    net = make_net(dtype, unused=ddp_options.get("find_unused_parameters", False))
    ddp = DistributedDataParallel(net, bucket_cap_mb=0.005, **ddp_options)  # a limit this small makes two buckets
    params = list(net.parameters())
    optimizer: Any = ROWS[row].make(params, **options)
    if offload:
        more = {"bucket_bytes": 3000, "overlap_backward": True}
        optimizer = fusedopt.CPUOffload(params, ROWS[row].make, **more, **options)
    scheduler = ExponentialLR(optimizer, 0.9)
    grads, norms, buffers = [], [], []
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none)
        backward(ddp, step, dist.get_rank(), dtype)
        grads.append([None if p.grad is None else p.grad.clone() for p in params])
        buffers.append(len({p.grad.untyped_storage().data_ptr() for p in params if p.grad is not None}))
        optimizer.step()
        scheduler.step()
        norms.append(optimizer.grad_norm)
    result = {"params": detached(params), "states": states_of(optimizer, params)}
    return {**result, "grads": grads, "norms": norms, "buffers": buffers}


# --- ZeroRedundancyOptimizer ------------------------------------------------------------------------------------------


def make_sharded(
    row: str, dtype: torch.dtype, options: Options, zero_options: Options
) -> tuple[DistributedDataParallel, list[Any], Any]:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns of torch.jit, which it uses, when imported

    net = make_net(dtype, unused=False)
    ddp = DistributedDataParallel(net, bucket_cap_mb=0.005, gradient_as_bucket_view=True)
    params = [param for param in net.parameters() if param.requires_grad]
    made = ROWS[row]
    return (
        ddp,
        params,
        ZeroRedundancyOptimizer(params, made.ours, **{**made.kwargs(), **made.own, **options}, **zero_options),
    )


def sharded(
    row: str,
    dtype: torch.dtype,
    options: Options,
    zero_options: Options,
    loaded: bytes | None = None,
    clip: float = 0.0,
) -> dict[str, Any]:
    """A training with DDP and ZeRO-1, from the beginning or from a file; with a file of its middle."""
    rank = dist.get_rank()
    ddp, params, optimizer = make_sharded(row, dtype, options, zero_options)
    scheduler = ExponentialLR(optimizer, 0.9)
    begin, saved = 0, b""
    if loaded is not None:
        checkpoint = torch.load(io.BytesIO(loaded), weights_only=True)
        ddp.module.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])
        begin = scheduler.last_epoch
    grads = []
    for step in range(begin, STEPS):
        optimizer.zero_grad()
        backward(ddp, step, rank, dtype)
        grads.append([p.grad.clone() for p in params])
        if clip:
            fusedopt.clip_grad_norm_(params, clip)
        optimizer.step()
        scheduler.step()
        if step + 1 == MIDDLE:
            optimizer.consolidate_state_dict(to=0)
            if rank == 0:
                live = {"model": ddp.module, "optimizer": optimizer, "scheduler": scheduler}
                saved = as_file({name: what.state_dict() for name, what in live.items()})
    at = {param: index for index, param in enumerate(params)}
    shard = [at[param] for group in optimizer.optim.param_groups for param in group["params"]]
    result = {"params": detached(params), "states": states_of(optimizer.optim, params)}
    return {**result, "grads": grads, "saved": saved, "shard": shard, "norm": optimizer.optim.grad_norm}


def overlapped(row: str) -> str:
    """What ZeRO says about our classes with overlap_with_ddp=True."""
    try:
        make_sharded(row, torch.float32, {}, {"overlap_with_ddp": True})
    except ValueError as error:
        return str(error)
    return ""
