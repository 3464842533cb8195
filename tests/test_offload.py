"""CPU offload gives the bits of the optimizer that it offloads; without a GPU, over parameters on the host.

What a GPU adds, that a copy happens later than it is begun, is played by a device that makes each at the last moment.
"""

import copy
import functools
import gc
import io
import itertools
import pickle
import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from optimizers import (
    AWKWARD,
    BY_ID,
    DTYPES,
    OWN_VARIANTS,
    VARIANTS,
    Row,
    generator,
    gradients,
    name_of,
    parameters,
    split,
)
from precision import FORM_BY_ID, FORMS, Case
from reference import assert_same_bits, varied_values
from test_layouts import COMPLEX, GRADS, LAYOUTS
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torch.optim.optimizer import register_optimizer_step_pre_hook

import fusedopt
from fusedopt import CPUOffload, offload

BUCKETS = [1, 5000, 2**25]  # bytes: each parameter alone, some together, all together
ADAMW = BY_ID["adamw-decay"]
SHAPES = ((40, 7), (7,), (), (3, 0), (130, 20), (2, 3, 4))
Grads = Sequence[Tensor | None]


def all_params(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def assert_same_training(offloaded: Optimizer, ordinary: Optimizer) -> None:
    for i, (p, q) in enumerate(zip(all_params(offloaded), all_params(ordinary), strict=True)):
        assert_same_bits(p.detach(), q.detach(), f"parameter {i}")
    assert_same_state_dict(offloaded.state_dict(), ordinary.state_dict())


def assert_same_state_dict(mine: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert mine["param_groups"] == wanted["param_groups"]
    assert [list(group) for group in mine["param_groups"]] == [list(group) for group in wanted["param_groups"]]
    assert mine["state"].keys() == wanted["state"].keys()
    for i, state in wanted["state"].items():
        assert list(mine["state"][i]) == list(state)
        for name, value in state.items():
            assert_same_bits(mine["state"][i][name], value, f"{name} of parameter {i}")


class Pair:
    """The same training, offloaded and not."""

    def __init__(self, make: Callable[..., Optimizer], initial: Any, **more: Any) -> None:
        mine = {name: more.pop(name) for name in ("bucket_bytes", "overlap_backward") if name in more}
        self.ordinary: Any = make(copy.deepcopy(initial), **more)
        self.offloaded = CPUOffload(copy.deepcopy(initial), make, **mine, **more)
        self.both: tuple[Any, Any] = (self.offloaded, self.ordinary)

    def set_grads(self, grads: Grads) -> None:
        for optimizer in self.both:
            for param, grad in zip(all_params(optimizer), grads, strict=True):
                param.grad, param.grad_dtype = None, None
                param.grad = grad if grad is None else grad.clone()

    def step(self, grads: Grads) -> None:
        self.set_grads(grads)
        for optimizer in self.both:
            optimizer.step()

    def check(self) -> None:
        assert_same_training(*self.both)


def values(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = generator(seed)
    sizes = [torch.Size(shape) for shape in SHAPES]
    return [varied_values(size.numel(), dtype, g, wild=False).view(size) for size in sizes]


def params(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    return [Parameter(value) for value in values(seed, dtype)]


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bucket_bytes", BUCKETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("row", [*VARIANTS, *OWN_VARIANTS], ids=name_of)
def test_same_bits(row: Row, dtype: torch.dtype, bucket_bytes: int) -> None:
    numel = sum(AWKWARD) + 500
    pair = Pair(row.make, parameters(varied_values(numel, dtype, generator(5))), bucket_bytes=bucket_bytes)
    for grad in gradients(numel, dtype, 5):
        pair.step(split(grad))
    pair.check()


@pytest.mark.parametrize("case", FORMS, ids=lambda case: case.id)
def test_low_precision(case: Case) -> None:
    """The draws, too: a parameter's position is what it is without offload."""
    pair = Pair(ADAMW.make, params(dtype=case.dtype), bucket_bytes=3000, **case.form.options())
    for step in range(4):
        pair.step(values(1 + step, case.grad_dtype))
    pair.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, *COMPLEX], ids=name_of)
def test_layouts(dtype: torch.dtype) -> None:
    """Of parameters on the device, and of gradients; the host's are row-major."""
    ours, theirs = (
        [make(dtype, seed).requires_grad_() for seed, make in enumerate(LAYOUTS.values())] for _ in range(2)
    )
    offloaded, ordinary = CPUOffload(ours, ADAMW.make, bucket_bytes=1000), ADAMW.make(theirs)
    for step, make in enumerate(GRADS.values()):
        for params in (ours, theirs):
            for i, param in enumerate(params):
                param.grad = make(param.detach(), 100 * step + i)
        offloaded.step()
        ordinary.step()
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        assert p.stride() == q.stride()
        assert_same_bits(p.detach(), q.detach(), f"parameter {i}")
        for name, value in ordinary.state[q].items():
            assert_same_bits(offloaded.state[p][name], value, name)


def test_buckets() -> None:
    sizes = [param.numel() * 4 for param in params()]  # 1120, 28, 4, 0, 10400, 96
    for bucket_bytes, wanted in [(1, 6), (96, 4), (1151, 4), (1152, 3), (11648, 1)]:
        optimizer = CPUOffload(params(), fusedopt.AdamW, bucket_bytes=bucket_bytes)
        found = [[entry.param for entry in bucket.entries] for bucket in optimizer._buckets]
        assert len(found) == wanted, (bucket_bytes, sizes)
        assert [p is q for p, q in zip(itertools.chain(*found), reversed(all_params(optimizer)), strict=True)] == [
            True
        ] * 6


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_parameter_that_comes_twice() -> None:
    """It is as without offload: an error."""
    param = Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    for optimizer in (CPUOffload([param, param], fusedopt.Adam), fusedopt.Adam([param, param])):
        with pytest.raises(RuntimeError, match="list a tied parameter once"):
            optimizer.step()


def test_parameters_in_one_buffer() -> None:
    buffer = torch.ones(2, 30)
    pair = Pair(ADAMW.make, [Parameter(buffer[0, :13]), Parameter(buffer[0, 13:]), Parameter(buffer[1])])
    pair.step([torch.ones(13), torch.ones(17), torch.ones(30)])
    pair.check()


def test_parameters_without_gradients() -> None:
    pair = Pair(ADAMW.make, params(), bucket_bytes=1200)
    for step, lacking in enumerate([(0, 4), (1, 2, 3), (0, 1, 2, 3, 4, 5), (), (4,)]):
        pair.step([None if i in lacking else grad for i, grad in enumerate(values(1 + step))])
        pair.check()


def test_gradients_change_their_dtype() -> None:
    pair = Pair(ADAMW.make, params(dtype=torch.bfloat16), bucket_bytes=1200)
    for step, dtype in enumerate([torch.bfloat16, torch.float32, torch.float16, torch.bfloat16]):
        pair.step(values(1 + step, dtype))
    pair.check()


# --- groups and options -----------------------------------------------------------------------------------------------


def two_groups() -> list[dict[str, Any]]:
    named = [(f"p{i}", param) for i, param in enumerate(params())]
    return [{"params": named[:2], "lr": 0.1}, {"params": named[2:], "betas": (0.5, 0.9), "ema_decay": None}]


def test_groups() -> None:
    pair = Pair(ADAMW.make, two_groups(), bucket_bytes=1200)
    pair.step(values(1))
    added = Parameter(torch.ones(50))
    for optimizer in pair.both:
        optimizer.add_param_group({"params": [("added", copy.deepcopy(added))], "weight_decay": 0.5})
    for step in range(3):
        for optimizer in pair.both:
            optimizer.param_groups[step % 3].update(lr=0.01 * step, eps=1e-6)
        pair.step([*values(2 + step), torch.ones(50)])
    pair.check()
    assert pair.offloaded.param_groups[1]["param_names"][0] == "p2"
    assert pair.offloaded.defaults == pair.ordinary.defaults


def test_a_group_that_cannot_be_added() -> None:
    optimizer = CPUOffload(params(), fusedopt.AdamW)
    with pytest.raises(ValueError, match=r"CPUOffload: param_groups\[1\]\['params'\]\[0\] is on 'meta'"):
        optimizer.add_param_group({"params": [torch.ones(2, device="meta")]})
    assert len(optimizer.param_groups) == len(optimizer.optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: LambdaLR(o, lambda step: 1 / (1 + step)),
        lambda o: OneCycleLR(o, max_lr=0.1, total_steps=10),  # betas, too
    ],
    ids=["LambdaLR", "OneCycleLR"],
)
@pytest.mark.parametrize("row", ["adamw-decay", "adamw-decay-amsgrad-lr32"])
def test_schedulers(row: str, schedule: Callable[[Optimizer], Any]) -> None:
    pair = Pair(BY_ID[row].make, params(), bucket_bytes=1200)
    schedulers = [schedule(optimizer) for optimizer in pair.both]
    for step in range(5):
        pair.step(values(1 + step))
        for scheduler in schedulers:
            scheduler.step()
    pair.check()


# --- what concerns all gradients --------------------------------------------------------------------------------------

PHASE: dict[str, dict[str, Any]] = {
    "clip": {"max_grad_norm": 1.0},
    "skip": {"skip_nonfinite": True},
    "average": {"ema_decay": 0.9},
    "average_nothing": {"ema_decay": 0.0},
    "stats": {"stats": True},
    "all": {"max_grad_norm": 1.0, "skip_nonfinite": True, "ema_decay": 0.9, "stats": True},
}


@pytest.mark.parametrize("more", [{}, FORM_BY_ID["bfloat16-split-state16"].form.options()], ids=["float32", "split"])
@pytest.mark.parametrize("options", PHASE.values(), ids=PHASE)
def test_phase(options: dict[str, Any], more: dict[str, Any]) -> None:
    dtype = torch.bfloat16 if more else torch.float32
    pair = Pair(ADAMW.make, params(dtype=dtype), bucket_bytes=1200, **options, **more)
    for step in range(6):
        grads: list[Tensor | None] = list(values(1 + step, dtype))
        grads[step % 2] = None
        if step == 3 and (bad := grads[4]) is not None:
            bad[5, 6] = torch.inf
        pair.step(grads)
        pair.check()
        mine, wanted = pair.both
        assert mine.grad_norm == wanted.grad_norm or (mine.grad_norm is None and wanted.grad_norm is None)
        assert mine.skipped_steps == wanted.skipped_steps
        if "stats" in options:
            assert repr(mine.stats()) == repr(wanted.stats())  # nan too
    assert pair.offloaded.skipped_steps == options.get("skip_nonfinite", False)


def test_average_begun_later() -> None:
    pair = Pair(ADAMW.make, params(), bucket_bytes=1)
    for step in range(4):
        for optimizer in pair.both:
            optimizer.param_groups[0]["ema_decay"] = 0.9 if step > 1 else None
        pair.step(values(1 + step))
    pair.check()


def test_average_weights() -> None:
    pair = Pair(ADAMW.make, params(dtype=torch.bfloat16), bucket_bytes=1200, ema_decay=0.5, master_weights=True)
    for step in range(3):
        pair.step(values(1 + step, torch.bfloat16))
    before = [param.detach().clone() for param in all_params(pair.offloaded)]
    with pair.offloaded.ema_weights(), pair.ordinary.ema_weights():
        for p, q in zip(*map(all_params, pair.both), strict=True):
            assert_same_bits(p.detach(), q.detach())
            p.detach().zero_()
        assert not torch.equal(all_params(pair.ordinary)[4], before[4])
        with pytest.raises(RuntimeError, match="the weights are those of ema_weights"):
            pair.offloaded.step()
        with pytest.raises(RuntimeError, match="already in use"), pair.offloaded.ema_weights():
            pass
    for p, old in zip(all_params(pair.offloaded), before, strict=True):
        assert_same_bits(p.detach(), old)
    pair.step(values(9, torch.bfloat16))
    pair.check()


def test_average_without_any() -> None:
    optimizer = CPUOffload(params(), fusedopt.AdamW)
    with pytest.raises(RuntimeError, match="needs ema_decay"), optimizer.ema_weights():
        pass


def loss_of(optimizer: Optimizer, grads: Sequence[Tensor]) -> Tensor:
    """One whose gradients are these."""
    terms = [(param * grad.to(param.device)).sum() for param, grad in zip(all_params(optimizer), grads, strict=True)]
    return torch.stack(terms).sum()


# --- GradScaler -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unscale", [False, True], ids=["fused", "unscale_"])
@pytest.mark.parametrize("kind", [torch.amp.GradScaler, fusedopt.GradScaler], ids=["torch", "fusedopt"])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=["plain", "clip"])
@pytest.mark.parametrize("overlap", [False, True], ids=["in_step", "in_backward"])
def test_grad_scaler(options: dict[str, Any], kind: type[Any], unscale: bool, overlap: bool) -> None:
    pair = Pair(ADAMW.make, params(), bucket_bytes=1200, overlap_backward=overlap, **options)
    scalers = [kind("cpu", init_scale=1000.0, growth_interval=2) for _ in pair.both]
    for step in range(6):
        for optimizer, scaler in zip(pair.both, scalers, strict=True):
            optimizer.zero_grad()
            scaler.scale(loss_of(optimizer, values(1 + step)) * (torch.inf if step in (0, 3) else 1)).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        pair.check()
        assert pair.offloaded.skipped_steps == pair.ordinary.skipped_steps == 1 + (step >= 3)
    pair.step(values(9))  # without a scaler
    pair.check()


# --- gradients fetched in backward ------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Linear(9, 31), nn.Tanh(), nn.Linear(31, 17), nn.Tanh(), nn.Linear(17, 1))
        self.frozen = Parameter(torch.ones(3), requires_grad=False)
        self.unused = Parameter(torch.ones(4))

    def backward(self, seed: int) -> None:
        self.layers(torch.randn(8, 9, generator=generator(seed))).square().sum().backward()


def overlapping(**more: Any) -> tuple[list[Net], CPUOffload, Optimizer]:
    nets = [Net(), Net()]
    offloaded = CPUOffload(nets[0].parameters(), ADAMW.make, bucket_bytes=600, overlap_backward=True, **more)
    return nets, offloaded, ADAMW.make(nets[1].parameters(), **more)


def count_fetches(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    fetched: list[Tensor] = []
    fetch = offload._Transfers.fetch

    def counted(self: Any, host: Tensor, grad: Tensor) -> None:
        fetched.append(grad)
        fetch(self, host, grad)

    monkeypatch.setattr(offload._Transfers, "fetch", counted)
    return fetched


CHANGES: dict[str, Callable[[Net], Any]] = {
    "nothing": lambda net: None,
    "torch_clips": lambda net: nn.utils.clip_grad_norm_(net.parameters(), 0.1),
    "fusedopt_clips": lambda net: fusedopt.clip_grad_norm_(net.parameters(), 0.1),
    "in_place": lambda net: [p.grad.mul_(2) for p in net.parameters() if p.grad is not None],
    "assigned": lambda net: [setattr(p, "grad", p.grad + 1) for p in net.parameters() if p.grad is not None],
    "removed": lambda net: setattr(net.layers[0].bias, "grad", None),
    "set_for_the_unused": lambda net: setattr(net.unused, "grad", torch.ones(4)),
    "begun_anew": lambda net: (net.zero_grad(), net.backward(77)),
    "accumulated": lambda net: net.backward(77),
    "zeroed": lambda net: (net.zero_grad(set_to_none=False), net.backward(77)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_fetched_in_backward(change: str) -> None:
    nets, *both = overlapping()
    for step in range(3):
        for net, optimizer in zip(nets, both, strict=True):
            optimizer.zero_grad()
            net.backward(step)
            CHANGES[change](net)
            optimizer.step()
        assert_same_training(*both)


def test_fetched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = count_fetches(monkeypatch)
    nets, offloaded, _ = overlapping()
    nets[0].backward(0)
    assert len(fetched) == 6  # in backward
    offloaded.step()
    assert len(fetched) == 6
    offloaded.step()  # the same gradients: whether the host still has them nobody can know
    assert len(fetched) == 12
    # Gradient accumulation.
    offloaded.overlap_backward = False
    assert not offloaded.overlap_backward
    nets[0].backward(1)
    assert len(fetched) == 12
    offloaded.overlap_backward = True
    nets[0].backward(2)
    assert len(fetched) == 18
    offloaded.step()
    assert len(fetched) == 18


def test_hooks_of_added_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = count_fetches(monkeypatch)
    nets, offloaded, _ = overlapping()
    added = Parameter(torch.ones(3))
    offloaded.add_param_group({"params": [added]})
    added.sum().backward()
    nets[0].backward(0)
    assert len(fetched) == 7


def test_a_skipped_step_lets_gradients_go() -> None:
    nets, offloaded, _ = overlapping()
    nets[0].backward(0)
    grad = weakref.ref(nets[0].layers[0].weight.grad)
    offloaded.zero_grad()
    assert grad() is None


def test_parameters_keep_no_optimizer_alive() -> None:
    nets, offloaded, _ = overlapping()
    offloaded.step()
    alive = [
        weakref.ref(offloaded),
        weakref.ref(offloaded.optimizer),
        weakref.ref(offloaded._buckets[0].entries[0].host),
    ]
    del offloaded
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3
    nets[0].backward(0)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def through_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


FORM_IDS = [
    "float32-nearest",
    "bfloat16-master",
    "bfloat16-split-state16",
    "bfloat16-stochastic-int8",
    "bfloat16-kahan",
]


@pytest.mark.parametrize("options", PHASE.values(), ids=PHASE)
@pytest.mark.parametrize("form", FORM_IDS)
def test_checkpoints_of_each_other(form: str, options: dict[str, Any]) -> None:
    dtype = torch.bfloat16 if "bfloat16" in form else torch.float32
    more = {**options, **(FORM_BY_ID[form].form.options() if form in FORM_BY_ID else {})}
    pair = Pair(ADAMW.make, params(dtype=dtype), bucket_bytes=1200, **more)
    for step in range(2):
        pair.step(values(1 + step, dtype))
    swapped = Pair(ADAMW.make, params(9, dtype), bucket_bytes=1200, lr=7.0, **more)
    for old, new in ((pair.offloaded, swapped.ordinary), (pair.ordinary, swapped.offloaded)):
        with torch.no_grad():
            for p, q in zip(all_params(old), all_params(new), strict=True):
                q.copy_(p)
        new.load_state_dict(through_file(old.state_dict()))
    for again in (pair, swapped):
        for step in range(2):
            again.step(values(5 + step, dtype))
        again.check()
    assert_same_training(swapped.offloaded, pair.offloaded)


@pytest.mark.parametrize("first", ["weights", "state"])
def test_portable_and_converted(first: str) -> None:
    pair = Pair(ADAMW.make, params(dtype=torch.bfloat16), bucket_bytes=1200, master_weights="split")
    for step in range(2):
        pair.step(values(1 + step, torch.bfloat16))
    with torch.no_grad():
        for optimizer in pair.both:
            all_params(optimizer)[0].mul_(2)
    saved = [optimizer.state_dict(portable=True) for optimizer in pair.both]
    assert_same_state_dict(saved[0], saved[1])
    other = Pair(ADAMW.make, params(9, torch.bfloat16), bucket_bytes=1, rounding="kahan", state_dtype="int8")

    def load_weights() -> None:
        for old, new in zip(pair.both, other.both, strict=True):
            for p, q in zip(all_params(old), all_params(new), strict=True):
                q.detach().copy_(p.detach())

    if first == "weights":
        load_weights()
    for optimizer in other.both:
        optimizer.load_state_dict(through_file(saved[0]), convert=True)
    if first == "state":
        load_weights()
    for step in range(2):
        other.step(values(5 + step, torch.bfloat16))
    other.check()


def test_a_checkpoint_that_does_not_fit() -> None:
    optimizer = CPUOffload(params(dtype=torch.bfloat16), fusedopt.AdamW, master_weights="split")
    other = fusedopt.AdamW(params(dtype=torch.bfloat16))
    for p in all_params(other):
        p.grad = torch.ones_like(p)
    other.step()
    saved = other.state_dict()
    saved["param_groups"][0]["master_weights"] = "split"
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"has 'exp_avg' in torch\.bfloat16, and its options need torch\.float32"):
        optimizer.load_state_dict(saved)
    assert_same_state_dict(optimizer.state_dict(), before)


def test_hooks_on_checkpoints_and_steps() -> None:
    calls = []
    optimizer = CPUOffload(params(), fusedopt.AdamW, bucket_bytes=1)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.register_state_dict_post_hook(lambda o, d: {**d, "mine": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, d: calls.append(d["mine"]))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("loaded"))
    of_all = register_optimizer_step_pre_hook(lambda *_: calls.append("before any"))
    for p in all_params(optimizer):
        p.grad = torch.ones_like(p)
    assert optimizer.step(lambda: 5.0) == 5.0
    of_all.remove()
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["before any", "before", "after", 1, "loaded"]


# --- weights that change otherwise ------------------------------------------------------------------------------------

ELSEWHERE: dict[str, Callable[[Any], Any]] = {
    "in_place": lambda o: [p.detach().mul_(0.5) for p in all_params(o)],
    "data": lambda o: [setattr(p, "data", p.data * 3) for p in all_params(o)],
    "loaded": lambda o: nn.ParameterList(all_params(o)).load_state_dict(nn.ParameterList(params(8)).state_dict()),
    "unseen": lambda o: ([p.data.mul_(0.5) for p in all_params(o)], getattr(o, "read_params", int)()),
}


@pytest.mark.parametrize("change", ELSEWHERE)
@pytest.mark.parametrize("way", ["", "master", "split", "kahan"])
def test_weights_change_elsewhere(way: str, change: str) -> None:
    dtype = torch.bfloat16 if way else torch.float32
    options = FORM_BY_ID[f"bfloat16-{way}"].form.options() if way else {}
    pair = Pair(ADAMW.make, params(dtype=dtype), bucket_bytes=1200, **options)
    for step in range(3):
        pair.step(values(1 + step, dtype))
        for optimizer in pair.both:
            ELSEWHERE[change](optimizer)
    pair.step(values(9, dtype))
    pair.check()


# --- a device that copies at the last moment --------------------------------------------------------------------------


class Stream:
    """Work in order. Lazy, each piece is done when something waits for it; eager, when what it waits for is done."""

    def __init__(self, eager: bool = False) -> None:
        self.eager = eager
        self.work: list[tuple[Callable[[], Any], Event]] = []
        self.done = 0

    def add(self, work: Callable[[], Any], behind: "Event | None" = None) -> None:
        self.work.append((work, behind or Event(self, 0)))
        while self.eager and self.done < len(self.work) and self.work[self.done][1].is_past:
            self.run(self.done + 1)

    def now(self) -> "Event":
        return Event(self, len(self.work))

    def run(self, count: int) -> None:
        while self.done < count:
            work, behind = self.work[self.done]
            behind.wait()
            self.done += 1
            work()


@dataclass
class Event:
    stream: Stream
    count: int

    @property
    def is_past(self) -> bool:
        return self.stream.done >= self.count

    def wait(self) -> None:
        self.stream.run(self.count)


class Late(offload._Transfers):
    """As a GPU that is as slow as it may be, or whose copies are as early as they may be."""

    current, eager = Stream(), False

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.coming, self.going = Stream(self.eager), Stream(self.eager)

    def fetch(self, host: Tensor, grad: Tensor) -> None:
        self.coming.add(functools.partial(host.copy_, grad), self.current.now())

    def fetched(self) -> Any:
        return self.coming.now()

    def wait(self, event: Any) -> None:
        event.wait()

    def begin_sending(self) -> None:
        self.going.add(int, self.current.now())

    def send(self, param: Tensor, host: Tensor) -> None:
        torch.autograd.graph.increment_version(param)  # when the copy is begun
        self.going.add(functools.partial(param.data.copy_, host))

    def end_sending(self) -> None:
        self.current.add(int, self.going.now())

    def wait_sent(self) -> None:
        self.going.now().wait()


@pytest.fixture(params=[False, True], ids=["lazy", "eager"])
def current(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Stream:
    """The current stream, which is lazy."""
    monkeypatch.setattr(offload, "_Transfers", Late)
    monkeypatch.setattr(Late, "eager", request.param)
    monkeypatch.setattr(Late, "current", Stream())
    return Late.current


class Looks:
    """Looks at the weights, for which the device finds time later."""

    def __init__(self, current: Stream, offloaded: Optimizer, ordinary: Optimizer) -> None:
        self.current, self.offloaded, self.ordinary = current, offloaded, ordinary
        self.seen: list[list[Tensor]] = []
        self.wanted: list[list[Tensor]] = []

    def look(self) -> None:
        self.wanted.append([param.detach().clone() for param in all_params(self.ordinary)])
        self.current.add(lambda: self.seen.append([param.detach().clone() for param in all_params(self.offloaded)]))

    def check(self) -> None:
        self.current.now().wait()
        for weights, others in zip(self.seen, self.wanted, strict=True):
            for value, other in zip(weights, others, strict=True):
                assert_same_bits(value, other)


@pytest.mark.parametrize("bucket_bytes", [1, 1200, 2**25])
@pytest.mark.parametrize("options", [{}, PHASE["all"]], ids=["plain", "all"])
def test_what_is_waited_for(options: dict[str, Any], bucket_bytes: int, current: Stream) -> None:
    """A step has the gradients, and what follows it on the stream has its weights, though the host is far ahead."""
    pair = Pair(ADAMW.make, params(), bucket_bytes=bucket_bytes, **options)
    looks = Looks(current, *pair.both)

    def step(number: int) -> None:
        pair.set_grads(values(number))
        for param in all_params(pair.offloaded):
            assert param.grad is not None
            current.add(functools.partial(param.grad.data.copy_, param.grad.clone()))
            param.grad.fill_(torch.nan)  # until then
        for optimizer in pair.both:
            optimizer.step()

    for number in range(4):
        step(number)
        looks.look()
    if "ema_decay" in options:
        with pair.offloaded.ema_weights(), pair.ordinary.ema_weights():
            looks.look()
        looks.look()
        step(9)
        looks.look()
    looks.check()
    pair.check()


def test_what_is_waited_for_in_backward(current: Stream) -> None:
    nets, offloaded, ordinary = overlapping()
    looks = Looks(current, offloaded, ordinary)
    for step in range(3):
        for net, optimizer in zip(nets, (offloaded, ordinary), strict=True):
            optimizer.zero_grad()
            net.backward(step)
        looks.look()
        for optimizer in (offloaded, ordinary):
            optimizer.step()
        looks.look()
        looks.check()
        assert_same_training(offloaded, ordinary)


# --- errors -----------------------------------------------------------------------------------------------------------


class Wrapped(Tensor):
    """As DTensor, one without memory of its own."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapped":
        made: Wrapped = Tensor._make_wrapper_subclass(cls, inner.shape)
        return made

    def __tensor_flatten__(self) -> Any: ...

    @staticmethod
    def __tensor_unflatten__(*args: Any) -> Any: ...

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError  # refused before anything is computed with it


BUFFER = torch.ones(9)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: CPUOffload(params(), torch.optim.AdamW), TypeError, "must make an optimizer of fusedopt, got AdamW"),
        (lambda: CPUOffload(params(), fusedopt.AdamW, bucket_bytes=0), ValueError, "bucket_bytes must be .* got 0"),
        (lambda: CPUOffload(params(), fusedopt.AdamW, bucket_bytes=1e6), ValueError, "bucket_bytes must be"),
        (lambda: CPUOffload(params(), fusedopt.AdamW, lr=-1.0), ValueError, "Invalid learning rate: -1.0"),
        (lambda: CPUOffload(params(), fusedopt.AdamW, max_grad_norm=-1.0), ValueError, "AdamW: .*max_grad_norm"),
        (lambda: CPUOffload(params(), fusedopt.AdamW, momentum=1), TypeError, "momentum"),
        (lambda: CPUOffload([], fusedopt.AdamW), ValueError, "empty parameter list"),
        (lambda: CPUOffload(params(), fusedopt.AdamW, differentiable=True), ValueError, "cannot be offloaded"),
        (
            lambda: CPUOffload([("a", Parameter(torch.ones(2))), ("b", torch.ones(2, device="meta"))], fusedopt.Adam),
            ValueError,
            r"CPUOffload: param_groups\[0\]\['params'\]\[1\] \('b'\) is on 'meta'",
        ),
        (
            lambda: CPUOffload([Parameter(torch.ones(3).expand(2, 3))], fusedopt.Adam),
            ValueError,
            r"param_groups\[0\]\['params'\]\[0\] has elements that share memory; clone it",
        ),
        (
            lambda: CPUOffload([{"params": [BUFFER[3:]]}, {"params": [torch.ones(3), BUFFER[:4]]}], fusedopt.Adam),
            ValueError,
            r"param_groups\[0\]\['params'\]\[0\] shares memory with param_groups\[1\]\['params'\]\[1\]; list a tied",
        ),
        (
            lambda: CPUOffload([Wrapped(torch.ones(2))], fusedopt.Adam),
            TypeError,
            r"param_groups\[0\]\['params'\]\[0\] is a Wrapped; give it the local tensors",
        ),
    ],
)
def test_cannot_be_made(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def give_sparse_gradient(optimizer: CPUOffload) -> None:
    param = all_params(optimizer)[4]
    param.grad = None
    param.grad = torch.ones(130, 20).to_sparse()


def change_dtype(optimizer: CPUOffload) -> None:
    param = all_params(optimizer)[1]
    param.grad = None
    param.data = param.data.half()


BAD_STEPS: dict[str, tuple[Callable[[CPUOffload], Any], type[Exception], str]] = {
    "sparse": (give_sparse_gradient, RuntimeError, r"param_groups[0]['params'][4] has a sparse gradient"),
    "dtype": (
        change_dtype,
        RuntimeError,
        "param_groups[0]['params'][1] was (torch.float32, (7,), device(type='cpu')) (dtype, shape, device) and is "
        "(torch.float16, (7,), device(type='cpu')) now",
    ),
    "added": (lambda o: o.param_groups[0]["params"].append(torch.ones(2)), RuntimeError, "add_param_group() adds"),
    "removed": (lambda o: o.param_groups[0]["params"].pop(), RuntimeError, "has other parameters"),
    "reversed": (lambda o: o.param_groups[0]["params"].reverse(), RuntimeError, "has other parameters"),
    "differentiable": (lambda o: o.param_groups[0].update(differentiable=True), ValueError, "cannot be offloaded"),
    "lr": (lambda o: o.param_groups[0].update(lr="fast"), TypeError, "AdamW: param_groups[0]['lr']"),
}


@pytest.mark.parametrize("bad", BAD_STEPS)
def test_a_step_that_cannot_be_made(bad: str) -> None:
    breaks, error, message = BAD_STEPS[bad]
    optimizer = CPUOffload(params(), fusedopt.AdamW, bucket_bytes=1200)
    everything = all_params(optimizer)
    for p in everything:
        p.grad = torch.ones_like(p)
    optimizer.step()
    breaks(optimizer)
    before = [p.detach().clone() for p in everything]
    with pytest.raises(error, match=re.escape(message)):
        optimizer.step()
    for p, old in zip(everything, before, strict=True):
        assert_same_bits(p.detach(), old)
    assert all(host.grad is None for host in all_params(optimizer.optimizer))


def test_cannot_be_copied() -> None:
    optimizer = CPUOffload(params(), fusedopt.AdamW)
    for make in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"CPUOffload: it has streams and pinned memory; save its state_dict\(\)"):
            make(optimizer)


# --- on a GPU: not yet run --------------------------------------------------------------------------------------------

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: not yet run on a GPU")


class OnGPU:
    """The same training offloaded from a GPU, and on the CPU. Gradients are late, and weights are wanted early."""

    def __init__(self, make: Callable[..., Optimizer], initial: Sequence[Tensor], **more: Any) -> None:
        mine = {name: more.pop(name) for name in ("bucket_bytes", "overlap_backward") if name in more}
        self.ours = [Parameter(value.cuda()) for value in initial]
        self.theirs = [Parameter(value.clone()) for value in initial]
        self.offloaded, self.ordinary = CPUOffload(self.ours, make, **mine, **more), make(self.theirs, **more)

    def step(self, grads: Sequence[Tensor]) -> None:
        torch.cuda._sleep(10_000_000)  # some milliseconds: nothing is there yet when it is asked for
        for optimizer in (self.offloaded, self.ordinary):
            optimizer.zero_grad()
            loss_of(optimizer, grads).backward()
            optimizer.step()

    def check(self) -> None:
        for p, q in zip(self.ours, self.theirs, strict=True):
            assert_same_bits(p.detach().cpu(), q.detach())  # the copy waits for the current stream, no more
        assert_same_state_dict(self.offloaded.state_dict(), self.ordinary.state_dict())


@on_gpu
def test_gpu_same_bits() -> None:
    for row, dtype, size, overlap in itertools.product(VARIANTS, DTYPES[::2], BUCKETS, (False, True)):
        pair = OnGPU(row.make, values(dtype=dtype), bucket_bytes=size, overlap_backward=overlap)
        for step in range(4):
            pair.step(values(1 + step, dtype))
            pair.check()
        entries = [entry for bucket in pair.offloaded._buckets for entry in bucket.entries if entry.param.numel()]
        assert all(entry.host.is_pinned() and entry.grad.is_pinned() for entry in entries)


@on_gpu
def test_gpu_phase() -> None:
    for options in PHASE.values():
        pair = OnGPU(ADAMW.make, values(dtype=torch.bfloat16), bucket_bytes=1200, master_weights="split", **options)
        for step in range(4):
            pair.step(values(1 + step, torch.bfloat16))
        pair.check()
        if "ema_decay" in options:
            with pair.offloaded.ema_weights(), pair.ordinary.ema_weights():
                pair.check()
            pair.check()


@on_gpu
def test_gpu_grad_scaler() -> None:
    for unscale in (False, True):
        pair = OnGPU(ADAMW.make, values(), bucket_bytes=1200, overlap_backward=True)
        scalers = torch.amp.GradScaler("cuda", init_scale=1000.0), torch.amp.GradScaler("cpu", init_scale=1000.0)
        for step in range(4):
            for optimizer, scaler in zip((pair.offloaded, pair.ordinary), scalers, strict=True):
                optimizer.zero_grad()
                scaler.scale(loss_of(optimizer, values(1 + step)) * (torch.inf if step == 2 else 1)).backward()
                if unscale:
                    scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
            pair.check()


@on_gpu
def test_gpu_refuses_capture() -> None:
    optimizer = CPUOffload([Parameter(torch.ones(5, device="cuda"))], fusedopt.AdamW)
    with pytest.raises(RuntimeError, match="no part of a CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
