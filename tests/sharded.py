"""What the ranks of tests/test_sharded.py do."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from optimizers import BY_ID, FLOATS, Row, generator
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement
from torch.nn import Parameter

import fusedopt
from fusedopt._config import _C

# Of 2 and of 4 ranks: even, uneven, with empty shards, rows of codes and of too few elements for them, no dimension.
SHAPES = ((8, 6), (7, 5), (3, 200), (6, 300), (13,), (1, 256), (5, 3, 4), (0, 4))
SHARD = (Shard(0),)
DRAWN: dict[str, Any] = {"rounding": "stochastic", "state_dtype": "int8"}
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def mesh_of(*sizes: int) -> DeviceMesh:
    return init_device_mesh("cpu", sizes, mesh_dim_names=("a", "b", "c")[: len(sizes)])


def values(shapes: Iterable[Sequence[int]], dtype: torch.dtype, seed: int) -> list[Tensor]:
    g = generator(seed)
    return [torch.randn(*shape, generator=g).to(dtype) for shape in shapes]


def full(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def here(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def part(whole: Tensor, like: Any) -> Tensor:
    """What this rank has of a whole tensor that is placed as a DTensor: without communication."""
    if not isinstance(like, DTensor):
        return whole
    at = like.device_mesh.get_coordinate()
    for i, placement in enumerate(like.placements):
        if isinstance(placement, Shard):
            chunks = whole.chunk(like.device_mesh.size(i), placement.dim)
            whole = chunks[at[i]] if at[i] < len(chunks) else whole.narrow(placement.dim, 0, 0)
    return whole


def placed(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as a DTensor that is placed as another; a copy of it, if the other is none."""
    if not isinstance(like, DTensor):
        return whole.clone()
    here = part(whole, like).clone()
    shape, stride = whole.shape, whole.stride()
    return DTensor.from_local(here, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)


def assert_same(parted: torch.optim.Optimizer, whole: torch.optim.Optimizer, what: str) -> None:
    """Parameters and all state: the same bits, and all state placed as its parameter."""
    pairs = zip(parted.param_groups, whole.param_groups, strict=True)
    for group, other in pairs:
        for index, (p, q) in enumerate(zip(group["params"], other["params"], strict=True)):
            assert_equal(here(p.detach()), part(q.detach(), p), f"{what}: parameter {index}")
            state, expected = parted.state[p], whole.state[q]
            assert list(state) == list(expected), f"{what}: {list(state)} and {list(expected)}"
            for name, value in state.items():
                if name != "step" and isinstance(p, DTensor):
                    assert isinstance(value, DTensor), f"{what}: {name} of {index}"
                    assert value.placements == p.placements, f"{what}: {name} of {index}"
                    assert value.device_mesh == p.device_mesh, f"{what}: {name} of {index}"
                assert value.shape == expected[name].shape, f"{what}: {name} of {index}"
                assert_equal(here(value), part(expected[name], value), f"{what}: {name} of parameter {index}")


def assert_equal(got: Tensor, expected: Tensor, what: str) -> None:
    assert got.dtype == expected.dtype, what
    assert got.shape == expected.shape, f"{what}: {got.shape} and {expected.shape}"
    same = got.contiguous().view(torch.uint8) if got.dim() else got.reshape(1).view(torch.uint8)
    other = expected.contiguous().view(torch.uint8) if expected.dim() else expected.reshape(1).view(torch.uint8)
    assert torch.equal(same, other), f"{what}: {(got != expected).sum().item()} of {got.numel()} differ"


def both(
    row: Row,
    mesh: DeviceMesh,
    placements: Sequence[Sequence[Placement] | None],
    shapes: Sequence[Sequence[int]] = SHAPES,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """An optimizer of DTensors, and one of the whole tensors. Placements in turn; None: a plain tensor."""
    whole = [Parameter(value) for value in values(shapes, dtype, 0)]
    parted = [
        Parameter(p.detach().clone() if place is None else distribute_tensor(p.detach(), mesh, place))
        for p, place in zip(whole, itertools.cycle(placements), strict=False)
    ]
    return row.make(parted, **options), row.make(whole, **options)


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def set_grads(
    parted: torch.optim.Optimizer, whole: torch.optim.Optimizer, seed: int, dtype: torch.dtype | None = None
) -> None:
    for p, q in zip(params_of(parted), params_of(whole), strict=True):
        q.grad = torch.randn(q.shape, generator=generator(seed + q.numel())).to(dtype or q.dtype)
        q.grad *= 3  # so that some are clipped
        p.grad = placed(q.grad, p)


def same_bits(
    names: Sequence[str],
    mesh_sizes: Sequence[int],
    placements: Sequence[Sequence[Placement] | None],
    dtype: torch.dtype,
    options: dict[str, Any],
    shapes: Sequence[Sequence[int]] = SHAPES,
    steps: int = 3,
) -> None:
    """Steps of DTensors are those of the whole tensors."""
    mesh = mesh_of(*mesh_sizes)
    for name in names:
        parted, whole = both(BY_ID[name], mesh, placements, shapes, dtype, **options)
        for step in range(steps):
            set_grads(parted, whole, step)
            parted.step()
            whole.step()
        assert_same(parted, whole, name)


def mixed_lists() -> None:
    """Plain tensors, DTensors on a mesh of one dimension and of two, in one list and one step."""
    flat, square = mesh_of(4), init_device_mesh("cpu", (2, 2), mesh_dim_names=("x", "y"))
    whole = [Parameter(value) for value in values(SHAPES, torch.float32, 0)]
    ways = itertools.cycle([(flat, SHARD), None, (square, (Replicate(), Shard(0))), (flat, (Replicate(),))])
    parted = [
        Parameter(p.detach().clone() if way is None else distribute_tensor(p.detach(), *way))
        for p, way in zip(whole, ways, strict=False)
    ]
    for more in ({}, {"max_grad_norm": 1.0}):
        copies = [[p.detach().clone() for p in params] for params in (parted, whole)]
        optimizers = [BY_ID["adamw-decay"].make(params, **more) for params in copies]
        for step in range(3):
            set_grads(*optimizers, step)
            for optimizer in optimizers:
                optimizer.step()
        if not more:
            assert_same(*optimizers, "mixed")
        else:
            assert_near(*optimizers)


def assert_near(parted: torch.optim.Optimizer, whole: torch.optim.Optimizer) -> None:
    """Within an ulp of the norm, and so what is clipped by it."""
    norm, expected = parted.grad_norm, whole.grad_norm
    assert norm.dtype == expected.dtype
    assert abs(norm - expected) <= torch.finfo(norm.dtype).eps * expected, (norm, expected)
    if norm == expected:
        assert_same(parted, whole, "clipped")
    else:
        for p, q in zip(params_of(parted), params_of(whole), strict=True):
            torch.testing.assert_close(full(p.detach()), q.detach(), rtol=1e-6, atol=1e-9)


class Net(nn.Module):
    """Weights of even and uneven shapes, some with fewer rows than there are ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, 256)
        self.hidden = nn.Sequential(nn.Linear(256, 13), nn.LayerNorm(13), nn.GELU(), nn.Linear(13, 256))
        self.out = nn.Linear(256, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.embedding(x)
        return self.out(h + self.hidden(h))


def sharded_net(dtype: torch.dtype = torch.float32, **options: Any) -> Net:
    torch.manual_seed(0)
    net = Net().to(dtype)
    fully_shard(net.hidden, **options)
    fully_shard(net, **options)
    return net


def backward(net: nn.Module, step: int, scale: float = 1.0) -> None:
    """Of data that each rank has of its own."""
    g = generator(100 * step + dist.get_rank())
    x, y = torch.randint(3, (4, 6), generator=g), torch.randint(5, (24,), generator=g)
    loss = nn.functional.cross_entropy(net(x).flatten(0, 1).float(), y)
    (loss * scale).backward()


def copy_grads(net: nn.Module, whole: nn.Module) -> None:
    for p, q in zip(net.parameters(), whole.parameters(), strict=True):
        q.grad = full(p.grad)


def fsdp_trains(names: Sequence[str], dtype: torch.dtype, options: dict[str, Any]) -> None:
    """FSDP2's training is, for the gradients that it finds, that of the whole model."""
    for name in names:
        net = sharded_net(dtype)
        torch.manual_seed(0)
        whole = Net().to(dtype)
        optimizers = [BY_ID[name].make(model.parameters(), **options) for model in (net, whole)]
        for step in range(3):
            backward(net, step)
            copy_grads(net, whole)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        assert any(p.to_local().numel() == 0 for p in net.parameters()) == (dist.get_rank() == 3)
        if "max_grad_norm" in options:
            assert_near(*optimizers)
        else:
            assert_same(*optimizers, name)


def clips_in_place(norm_type: float) -> None:
    """clip_grad_norm_ of DTensors, of which some gradients are Partial, and of plain tensors."""
    mesh = mesh_of(dist.get_world_size())
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        parted, whole = both(BY_ID["adam"], mesh, [SHARD, (Replicate(),), None], dtype=dtype)
        set_grads(parted, whole, 0)
        for p, q in zip(params_of(parted), params_of(whole), strict=True):
            if isinstance(p, DTensor) and p.placements[0].is_replicate():
                # Halves that add up to the gradient, with an error that is not added up: ranks differ.
                share = q.grad / dist.get_world_size()
                p.grad = DTensor.from_local(share, mesh, (Partial(),), run_check=False)
        norm = fusedopt.clip_grad_norm_(params_of(parted), 1.0, norm_type)
        expected = fusedopt.clip_grad_norm_(params_of(whole), 1.0, norm_type)
        assert type(norm) is Tensor
        assert norm.dtype == expected.dtype
        assert abs(norm - expected) <= torch.finfo(norm.dtype).eps * expected, (norm, expected)
        for p, q in zip(params_of(parted), params_of(whole), strict=True):
            rtol = 4 * torch.finfo(dtype).eps  # an ulp of the norm, and two roundings
            torch.testing.assert_close(full(p.grad), q.grad, rtol=rtol, atol=0)
            assert not isinstance(p, DTensor) or p.grad.placements == p.placements
        with_inf = params_of(parted)[0]
        if dist.get_rank() == 0:
            with_inf.grad.to_local()[0] = torch.inf
        try:
            fusedopt.clip_grad_norm_(params_of(parted), 1.0, norm_type, error_if_nonfinite=True)
        except RuntimeError as error:
            assert "is inf" in str(error)
        else:
            raise AssertionError("an inf of one rank is all ranks'")


def skips_together() -> None:
    """An inf or nan on one rank: no rank steps, and all count it."""
    for bad in (torch.inf, torch.nan):
        net = sharded_net()
        optimizer = fusedopt.AdamW(net.parameters(), skip_nonfinite=True)
        backward(net, 0)
        optimizer.step()
        before = [full(p.detach()).clone() for p in net.parameters()]
        backward(net, 1)
        if dist.get_rank() == dist.get_world_size() - 1:
            next(p for p in net.parameters() if p.grad.to_local().numel()).grad.to_local().view(-1)[-1] = bad
        optimizer.step()
        assert optimizer.skipped_steps.item() == 1
        assert optimizer.state[next(net.parameters())]["step"].item() == 1
        for p, q in zip(net.parameters(), before, strict=True):
            assert_equal(full(p.detach()), q, "skipped")
        optimizer.zero_grad()
        backward(net, 2)
        optimizer.step()
        assert optimizer.skipped_steps.item() == 1
        assert optimizer.state[next(net.parameters())]["step"].item() == 2


def norm_without_gradients_here() -> None:
    """A rank that has no gradient takes part in the norm of those that have, and finds it."""
    mesh = mesh_of(dist.get_world_size())
    parted, whole = both(BY_ID["adam"], mesh, [SHARD], shapes=((8, 3), (4, 2)), max_grad_norm=1.0)
    set_grads(parted, whole, 0)
    first = [q.grad.chunk(dist.get_world_size())[0].flatten() for q in params_of(whole)]
    if dist.get_rank() > 0:
        for p in params_of(parted):
            p.grad = None
    parted.step()
    torch.testing.assert_close(parted.grad_norm, torch.cat(first).norm(), rtol=1e-6, atol=0)


def verdicts_without_gradients_here() -> None:
    """An inf on one rank, and no gradient on the others: all skip, averages too, and GradScalers agree."""
    mesh = mesh_of(dist.get_world_size())
    for scaler in (None, fusedopt.GradScaler("cpu", init_scale=4.0)):
        for good_steps in (2, 0):  # the averages have begun, or not
            placements = [SHARD, (Replicate(),)]
            parted, _ = both(
                BY_ID["adam"], mesh, placements, [(8, 3), (4, 2)], ema_decay=0.5, skip_nonfinite=not scaler
            )
            for step in range(good_steps + 2):
                is_bad = step == good_steps
                loss = torch.zeros(()) if scaler is None else scaler.scale(torch.zeros(()))
                assert loss == 0
                for p in params_of(parted):
                    grad = torch.full(p.shape, torch.inf if is_bad else 0.5 + step)
                    p.grad = placed(grad, p) if dist.get_rank() == 0 or not is_bad else None
                before = [here(p.detach()).clone() for p in params_of(parted)]
                averages = [here(parted.state[p]["ema"]).clone() for p in params_of(parted) if p in parted.state]
                if scaler is None:
                    parted.step()
                else:
                    scaler.step(parted)
                    scaler.update()
                if is_bad:
                    for p, q in zip(params_of(parted), before, strict=True):
                        assert torch.equal(here(p.detach()), q)
                    for p, q in zip(params_of(parted), averages, strict=False):
                        assert torch.equal(here(parted.state[p]["ema"]), q)
                    assert parted.skipped_steps == 1
                    assert scaler is None or scaler.get_scale() == (2.0 if good_steps else 1.0)
            replica = params_of(parted)[1]
            found = here(parted.state[replica]["ema"])
            of_rank_0 = found.clone()
            dist.broadcast(of_rank_0, 0)
            assert torch.equal(found, of_rank_0)


def dtypes_of_gradients() -> None:
    """What is measured does not depend on which gradients a rank has."""
    mesh = mesh_of(dist.get_world_size())
    single, double = (distribute_tensor(torch.ones(4, 3, dtype=dtype), mesh, SHARD) for dtype in FLOATS)
    optimizer = fusedopt.Adam([single, double], skip_nonfinite=True)
    single.grad, double.grad = torch.ones_like(single), torch.ones_like(double)
    if dist.get_rank() == 1:
        double.grad = None
        single.grad.to_local().fill_(torch.inf)
    optimizer.step()
    assert optimizer.skipped_steps == 1 and optimizer.grad_norm == torch.inf
    assert optimizer.grad_norm.dtype == torch.float64
    assert bool((single.to_local() == 1).all())


def loaded_elsewhere() -> None:
    """State that is placed otherwise is not loaded, converted or not, and nothing changes."""
    mesh = mesh_of(2, 2)
    options = {"master_weights": True, "state_dtype": torch.bfloat16}
    for convert in (False, True):
        optimizers = []
        for placements in ((Shard(0), Shard(1)), (Shard(1), Shard(0)), None):
            parted, whole = both(BY_ID["adam"], mesh, [placements], [(8, 6)], torch.bfloat16, **options)
            set_grads(parted, whole, 0)
            parted.step()
            optimizers.append(parted)
        for saver, loader, message in ((0, 1, "placed otherwise"), (0, 2, "as a DTensor"), (2, 0, "as a plain tensor")):
            (p,) = params_of(optimizers[loader])
            before = optimizers[loader].state[p]["exp_avg"]
            saved = optimizers[saver].state_dict()
            load = partial(optimizers[loader].load_state_dict, saved, convert=convert)
            expect(ValueError, message, load, "set_optimizer_state_dict")
            assert optimizers[loader].state[p]["exp_avg"] is before


def no_dtensor_any_more() -> None:
    """A list may lose its DTensors."""
    mesh = mesh_of(2)
    parted, whole = both(BY_ID["adam"], mesh, [SHARD], [(4, 3)], max_grad_norm=1.0)
    set_grads(parted, whole, 0)
    parted.step()
    plain = Parameter(torch.ones(3))
    plain.grad = torch.ones(3)
    parted.param_groups[0]["params"] = [plain]
    parted.step()
    torch.testing.assert_close(parted.grad_norm, torch.tensor(3.0).sqrt(), rtol=1e-6, atol=0)
    other = init_device_mesh("cpu", (2, 1))
    (p,) = params_of(both(BY_ID["adam"], mesh, [SHARD], [(4, 3)])[0])
    p.grad = distribute_tensor(torch.ones(4, 3), other, (Shard(0), Replicate()))
    expect(RuntimeError, "the gradient of parameter 0 is on", lambda: fusedopt.clip_grad_norm_([p], 1.0))
    assert p.grad is not None


def partial_gradients() -> None:
    """A gradient that is still to be added up over ranks is, before it is used."""
    mesh = mesh_of(dist.get_world_size())
    for more in ({}, {"max_grad_norm": 1.0}):
        parted, whole = both(BY_ID["adamw-decay"], mesh, [SHARD, (Replicate(),)], **more)
        for step in range(2):
            set_grads(parted, whole, step)
            for p, q in zip(params_of(parted), params_of(whole), strict=True):
                mine = q.grad if dist.get_rank() == 0 else torch.zeros_like(q.grad)
                p.grad = DTensor.from_local(mine, mesh, (Partial(),), run_check=False)
            parted.step()
            whole.step()
        assert_near(parted, whole) if more else assert_same(parted, whole, "partial")


def new_parts() -> None:
    """FSDP2 gives a DTensor another local tensor where it shards anew, and the DTensor stays the same object."""
    mesh = mesh_of(dist.get_world_size())
    for name in ("adamw-decay", "adagrad"):
        parted, whole = both(BY_ID[name], mesh, [SHARD])
        set_grads(parted, whole, 0)
        grads = [p.grad for p in params_of(parted)]
        for step in range(6):
            old = []
            for p, q, grad in zip(params_of(parted), params_of(whole), grads, strict=True):
                q.grad = torch.randn(q.shape, generator=generator(step + q.numel()))
                grad._local_tensor.copy_(part(q.grad, p))
                p.grad = grad
                changed = [(), (p,), (grad,), parted.state[p].values(), (p, grad), ()][step]
                for tensor in changed:
                    if isinstance(tensor, DTensor):
                        was = tensor._local_tensor
                        old.append((was, was.detach().clone()))
                        tensor._local_tensor = was.detach().clone()
            parted.step()
            whole.step()
            for was, before in old:
                assert torch.equal(was, before), "what is no part any more was written"
        assert_same(parted, whole, name)


def another_place() -> None:
    """The draws of a part that has become another part of the whole are those of its new place."""
    mesh = mesh_of(2)
    shape, options = (4, 64), {"rounding": "stochastic"}
    there = 1 - dist.get_rank()  # a mesh of the ranks in the other order
    turned = DeviceMesh("cpu", [1, 0])
    for change in (False, True):
        parted, whole = both(BY_ID["adam"], mesh, [SHARD], [shape], torch.bfloat16, **options)
        set_grads(parted, whole, 0)
        parted.step()
        whole.step()
        if change:
            (p,), (q,) = params_of(parted), params_of(whole)
            state = parted.state[p]
            moments = [(state[key], whole.state[q][key]) for key in ("exp_avg", "exp_avg_sq")]
            for tensor, full_value in ((p, q.detach()), *moments):
                tensor._local_tensor.copy_(full_value[2 * there : 2 * there + 2])
                tensor._spec = distribute_tensor(full_value, turned, SHARD)._spec
            q.grad = torch.randn(shape, generator=generator(1)).bfloat16()
            p.grad = DTensor.from_local(q.grad[2 * there : 2 * there + 2], turned, SHARD, run_check=False)
            parted.step()
            whole.step()
        mine = slice(2 * there, 2 * there + 2) if change else slice(2 * (1 - there), 2 * (1 - there) + 2)
        for p, q in zip(params_of(parted), params_of(whole), strict=True):
            assert_equal(p.to_local().detach(), q.detach()[mine], "turned" if change else "as it was")


def wrong_state() -> None:
    """State that is no DTensor, or is placed otherwise, is an error that says so; nothing changes."""
    mesh = mesh_of(2)
    wrongs = {
        "is no DTensor, and the parameter is one": lambda value: value.to_local(),
        "redistribute it": lambda value: value.redistribute(placements=(Replicate(),)),
        "on DeviceMesh": lambda value: DTensor.from_local(value.to_local().clone(), DeviceMesh("cpu", [1, 0]), SHARD),
    }
    for message, change in wrongs.items():
        parted, whole = both(BY_ID["adam"], mesh, [SHARD], [(4, 3), (6, 2)])
        set_grads(parted, whole, 0)
        parted.step()
        state = parted.state[params_of(parted)[1]]
        state["exp_avg"] = change(state["exp_avg"])
        before = [p.to_local().clone() for p in params_of(parted)]
        expect(RuntimeError, message, parted.step, "['params'][1]: state 'exp_avg'")
        for p, q in zip(params_of(parted), before, strict=True):
            assert torch.equal(p.to_local(), q)
    plain = Parameter(torch.ones(4, 3))
    plain.grad = torch.ones(4, 3)
    optimizer = fusedopt.Adam([plain])
    optimizer.step()
    optimizer.state[plain]["exp_avg"] = distribute_tensor(optimizer.state[plain]["exp_avg"], mesh, SHARD)
    expect(RuntimeError, "is a DTensor, and the parameter is none", optimizer.step)


def cut_codes() -> None:
    """Codes of columns that are no whole blocks are an error, the same one on all ranks."""
    for size, placements, shape, message in (
        ((4,), (Shard(1),), (4, 384), "into pieces of 96 elements, and 8-bit state needs multiples of 128"),
        ((2, 2), (Shard(1), Shard(1)), (4, 256), "into pieces of 64 elements"),
        ((2, 2), (Shard(1), Shard(2)), (4, 3, 1), "along several dimensions behind the first, [1, 2]"),
    ):
        parted, whole = both(BY_ID["adam"], mesh_of(*size), [placements], [shape], **DRAWN, dtype=torch.bfloat16)
        set_grads(parted, whole, 0)
        expect(RuntimeError, message, parted.step)


def expect(kind: type[Exception], message: str, function: Any, *more: str) -> None:
    try:
        function()
    except kind as error:
        for part in (message, *more):
            assert part in str(error), str(error)
    else:
        raise AssertionError(f"no {kind.__name__}: {message}")


def with_the_cuda_source(library: str) -> None:
    """The kernels' source on the host: two launches of the norm, between which the totals are added up; and draws."""
    mesh = mesh_of(dist.get_world_size())
    results = {}
    for way in ("", library):
        _C.set_cuda_on_host(way, False)
        try:
            parted, whole = both(BY_ID["adamw-decay"], mesh, [SHARD, None, (Replicate(),)], max_grad_norm=0.5)
            drawn, undrawn = both(
                BY_ID["adam"], mesh, [(Shard(1),), SHARD], [(8, 512), (7, 300)], torch.bfloat16, **DRAWN
            )
            for step in range(3):
                set_grads(parted, whole, step)
                set_grads(drawn, undrawn, step)
                before = _C.units_run()["cuda"]
                parted.step()
                assert _C.units_run()["cuda"] - before == (3 if way else 0)  # the norm, the decision, the step
                drawn.step()
            norm = fusedopt.clip_grad_norm_(params_of(parted), 0.1)
            tensors = [here(p.detach()) for optimizer in (parted, drawn) for p in params_of(optimizer)]
            states = [here(v) for o in (parted, drawn) for p in params_of(o) for v in o.state[p].values()]
            grads = [here(p.grad) for p in params_of(parted)]
            results[way] = [*tensors, *states, *grads, parted.grad_norm, norm]
        finally:
            _C.set_cuda_on_host("", False)
    for got, expected in zip(results[library], results[""], strict=True):
        assert_equal(got, expected, "by the CUDA source")


# --- torch.distributed.checkpoint ------------------------------------------------------------------------------------


def optimizer_of(library: str, name: str, net: nn.Module, options: dict[str, Any]) -> torch.optim.Optimizer:
    row = BY_ID[name]
    if library == "torch":
        return row.make_torch(net.parameters(), **options)
    return row.make(net.parameters(), **options)


def step_with(optimizer: torch.optim.Optimizer, net: nn.Module, seed: int) -> None:
    """A step with gradients that do not depend on the number of ranks."""
    for p in net.parameters():
        grad = torch.randn(p.shape, generator=generator(seed + p.numel())).to(p.dtype)
        p.grad = placed(grad, p)
    optimizer.step()
    optimizer.zero_grad()


def contents(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All parameters and state, whole."""
    found = {}
    for name, p in net.named_parameters():
        found[name] = full(p.detach()).clone()
        found |= {f"{name}: {key}": full(value).clone() for key, value in optimizer.state[p].items()}
    return found


def saved(
    directory: str, library: str, name: str, dtype: torch.dtype, options: dict[str, Any], how: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Save after two steps. What was saved, and what a third step makes of it."""
    net = sharded_net(dtype)
    optimizer = optimizer_of(library, name, net, options)
    for step in range(2):
        step_with(optimizer, net, step)
    before = contents(net, optimizer)
    if how == "full":
        model_state, optimizer_state = get_state_dict(net, optimizer, options=FULL)
        if dist.get_rank() == 0:
            torch.save({"model": model_state, "optimizer": optimizer_state}, f"{directory}/full.pt")
        dist.barrier()
    else:
        flat = StateDictOptions(flatten_optimizer_state_dict=how == "flat")
        model_state, optimizer_state = get_state_dict(net, optimizer, options=flat)
        state = {"model": model_state, "optimizer": optimizer_state}
        if how == "async":
            own_group = dist.new_group(backend="gloo")  # its collectives may not meet those of the training
            pending = dcp.async_save(state, checkpoint_id=directory, process_group=own_group)
            for step in range(5):  # go on meanwhile: it must not be saved
                step_with(optimizer, net, 10 + step)
            pending.result()
        else:
            dcp.save(state, checkpoint_id=directory)
    net = sharded_net(dtype)
    other = optimizer_of(library, name, net, options)
    for step in range(3):
        step_with(other, net, step)
    return before, contents(net, other)


def loaded(
    directory: str, library: str, name: str, dtype: torch.dtype, options: dict[str, Any], how: str, fresh: bool = True
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Load into another model. What was loaded, and what a step makes of it."""
    net = sharded_net(dtype)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1)
    optimizer = optimizer_of(library, name, net, options)
    if not fresh:
        step_with(optimizer, net, 50)  # it has a state, of other shards perhaps
    if how == "full":
        found: dict[str, Any] = {"model": {}, "optimizer": {}}
        if dist.get_rank() == 0:
            found = torch.load(f"{directory}/full.pt", weights_only=True)
        broadcast = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(net, found["model"], options=broadcast)
        set_optimizer_state_dict(net, optimizer, found["optimizer"], options=broadcast)
    else:
        flat = StateDictOptions(flatten_optimizer_state_dict=how == "flat")
        model_state, optimizer_state = get_state_dict(net, optimizer, options=flat)
        state = {"model": model_state, "optimizer": optimizer_state}
        # torch's checkpoints lack our options, which then stay as they are.
        dcp.load(state, checkpoint_id=directory, planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
        both_states = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        set_state_dict(net, optimizer, **both_states, options=flat)
    before = contents(net, optimizer)
    step_with(optimizer, net, 2)
    return before, contents(net, optimizer)


def hidden_step(name: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """get_state_dict makes a step with lr = 0, so that there is state: it changes no parameter."""
    net = sharded_net(dtype)
    with torch.no_grad():
        for p in net.parameters():
            p.to_local().view(-1)[::3] = -0.0
    before = [full(p.detach()).clone() for p in net.parameters()]
    optimizer = optimizer_of("fusedopt", name, net, options)
    get_optimizer_state_dict(net, optimizer)
    assert all(optimizer.state[p] for p in net.parameters())
    for p, q in zip(net.parameters(), before, strict=True):
        if options.get("rounding") == "kahan":
            assert torch.equal(full(p.detach()), q)  # p + c is 0.0 for p = -0.0
        else:
            assert_equal(full(p.detach()), q, f"{name}: hidden step")
        for key, value in optimizer.state[p].items():
            if key in ("master_param", "ema"):
                assert torch.equal(full(value), q.to(value.dtype)), key
