"""Host cost of the step of DTensors: a mesh of one process, so that nothing but their handling differs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

import fusedopt

from .harness import (
    FUSED,
    OURS,
    Contender,
    Quick,
    Row,
    Spread,
    at_least,
    interleave,
    make_parameters,
    ratio_row,
    seconds,
)

NUMBER = 1000


def distributed(params: list[Parameter]) -> list[Parameter]:
    mesh = init_device_mesh("cpu", (1,))

    def parted(tensor: torch.Tensor) -> DTensor:
        return distribute_tensor(tensor.detach(), mesh, (Shard(0),))

    made = [Parameter(parted(param)) for param in params]
    for new, param in zip(made, params, strict=True):
        assert param.grad is not None
        new.grad = parted(param.grad)
    return made


def check() -> None:
    plain = make_parameters([10] * 20)
    params = distributed(plain)
    for each in (plain, params):
        fusedopt.Adam(each, max_grad_norm=1.0).step()
    for param, expected in zip(params, plain, strict=True):
        assert isinstance(param, DTensor)
        assert torch.equal(param.to_local(), expected)


def dtensors(quick: Quick) -> Iterator[Row]:
    """All of step() for 1,000 DTensors of 10 elements, gradients kept: hooks, profiler range and all."""
    torch.set_num_threads(1)  # the work is nothing, and torch's fused step of such tensors has one thread
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    check()
    plain = make_parameters([10] * NUMBER)
    params = distributed(plain)

    def clip_and_step(optimizer: Optimizer) -> None:
        clip_grad_norm_(params, 1.0)
        optimizer.step()

    theirs = torch.optim.Adam(params, fused=True)
    contenders: dict[str, Callable[[], object]] = {
        OURS: fusedopt.Adam(params).step,
        FUSED: theirs.step,
        "fusedopt, clipping": fusedopt.Adam(params, max_grad_norm=1.0).step,
        "torch clip, fused": partial(clip_and_step, theirs),
        "fusedopt, tensors": fusedopt.Adam(plain).step,
    }
    calls = {OURS: 20, "fusedopt, clipping": 20, "fusedopt, tensors": 20}
    timed = {name: Contender(run, calls=calls.get(name, 1)) for name, run in contenders.items()}
    samples = interleave(timed, rounds=7)
    ours = [value * 1e6 for value in samples[OURS].values()]
    yield Row("1,000 DTensors", Spread.of(ours), "us", None, {FUSED: seconds(samples, FUSED)})
    yield ratio_row("1,000 DTensors: faster than torch fused", samples, FUSED, OURS, at_least(10))
    yield ratio_row(
        "with clipping: faster than torch", samples, "torch clip, fused", "fusedopt, clipping", at_least(10)
    )
    yield ratio_row("of 1,000 tensors", samples, OURS, "fusedopt, tensors")
    dist.destroy_process_group()


BENCHMARKS = {"dtensors": dtensors}
