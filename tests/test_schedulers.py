"""Every scheduler drives the classes as it drives torch's own: same options, same bits. And our own scheduler."""

import copy
import io
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from optimizers import BY_ID, Row, generator, name_of
from reference import assert_same_bits, torch_loop_step
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer, lr_scheduler
from torch.optim.swa_utils import SWALR

import fusedopt
from fusedopt._optimizer import FusedOptimizer
from fusedopt.lr_scheduler import DecayingWarmRestarts

STEPS = 12
BATCHES = 4  # per epoch, where fractions of epochs are counted


def cyclic(mode: str, **more: Any) -> Callable[[Optimizer], Any]:
    def make(o: Optimizer) -> Any:
        return lr_scheduler.CyclicLR(
            o, [1e-3, 2e-3], [0.1, 0.2], 2, 3, mode=mode, cycle_momentum="betas" in o.defaults, **more
        )

    return make


# By class, and what is special behind a blank.
SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9 if epoch % 2 else 1.05),
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=3, gamma=0.3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5, 6], gamma=0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, total_iters=4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=9),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.7),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=10, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3, T_mult=2),
    "CosineAnnealingWarmRestarts epochs": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=1, eta_min=1e-5),
    "CosineAnnealingWarmRestarts epochs longer": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 1, T_mult=2),
    "DecayingWarmRestarts": lambda o: DecayingWarmRestarts(o, T_0=3, decay=0.5),
    "DecayingWarmRestarts epochs longer": lambda o: DecayingWarmRestarts(o, 1, T_mult=2, eta_min=1e-5, decay=0.5),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.5)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, total_iters=4), lr_scheduler.ExponentialLR(o, 0.8)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "CyclicLR triangular": cyclic("triangular"),
    "CyclicLR triangular2": cyclic("triangular2"),
    "CyclicLR exp_range": cyclic("exp_range", gamma=0.9),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=STEPS, cycle_momentum="betas" in o.defaults),
    "SWALR": lambda o: SWALR(o, swa_lr=0.05, anneal_epochs=7),
}
CYCLES_BETA1 = ("CyclicLR", "OneCycleLR")

ROWS = [
    BY_ID[name + lr]
    for name in ("adam-decay", "adamw-decay-amsgrad", "radam", "adagrad-decay-lr_decay")
    for lr in ("", "-lr32", "-lr64")
]


def test_no_scheduler_is_forgotten() -> None:
    classes = {name.split()[0] for name in SCHEDULERS}
    assert {*lr_scheduler.__all__, "SWALR", "DecayingWarmRestarts"} == {*classes, "LRScheduler"}


def make(cls: Callable[..., Optimizer], lr: float | Tensor, scheduler: str) -> tuple[Optimizer, Any]:
    """An optimizer with two groups that have options of their own, and its scheduler."""
    g = generator(0)
    first, second = (Parameter(torch.randn(n, dtype=torch.float64, generator=g)) for n in (5, 33))
    optimizer = cls([{"params": [first]}, {"params": [second], "lr": 3 * lr, "weight_decay": 0.2}])
    return optimizer, SCHEDULERS[scheduler](optimizer)


def advance(optimizer: Optimizer, scheduler: Any, step: int, epochs: bool) -> None:
    """One step of both; an lr that is a tensor must be written in place."""
    g = generator(1 + step)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, dtype=torch.float64, generator=g)
    if isinstance(optimizer, FusedOptimizer):
        optimizer.step()
    else:
        torch_loop_step(optimizer)
    before = [group["lr"] for group in optimizer.param_groups]
    if epochs:
        scheduler.step((step + 1) / BATCHES)
    else:
        scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
    for group, lr in zip(optimizer.param_groups, before, strict=True):
        assert group["lr"] is lr or not isinstance(lr, Tensor)


def options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """What schedulers change: values, and whether the lr is a tensor still."""
    return [
        {"lr": float(group["lr"]), "type": type(group["lr"]), "betas": group.get("betas")}
        for group in optimizer.param_groups
    ]


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_scheduler(row: Row, name: str) -> None:
    """After half of the steps, new optimizers and schedulers go on from the state_dicts."""
    classes = (row.make, row.make_torch)
    pairs = [make(cls, row.kwargs()["lr"], name) for cls in classes]
    seen = []
    for step in range(STEPS):
        if step == STEPS // 2:
            saved = pairs
            pairs = [make(cls, row.kwargs()["lr"], name) for cls in classes]
            for (optimizer, scheduler), (old_optimizer, old_scheduler) in zip(pairs, saved, strict=True):
                for group, old_group in zip(optimizer.param_groups, old_optimizer.param_groups, strict=True):
                    group["params"][0].data.copy_(old_group["params"][0])
                optimizer.load_state_dict(copy.deepcopy(old_optimizer.state_dict()))
                scheduler.load_state_dict(copy.deepcopy(old_scheduler.state_dict()))
        for optimizer, scheduler in pairs:
            advance(optimizer, scheduler, step, "epochs" in name)
        ours, theirs = (optimizer for optimizer, _ in pairs)
        assert options(ours) == options(theirs)
        seen.append(options(ours))
        for group, other in zip(ours.param_groups, theirs.param_groups, strict=True):
            assert_same_bits(group["params"][0].detach(), other["params"][0].detach())

    changes = sum(before != after for before, after in itertools.pairwise(seen))
    assert changes >= (1 if name == "ConstantLR" else 2)
    if name.split()[0] in CYCLES_BETA1 and "betas" in ours.defaults:
        assert len({groups[0]["betas"][0] for groups in seen}) > 2


# --- DecayingWarmRestarts --------------------------------------------------------------------------------------------

ETA_MAX = (0.1, 0.03)  # of two groups


def two_groups(lr_dtype: torch.dtype | None = None) -> Optimizer:
    lrs = ETA_MAX if lr_dtype is None else [torch.tensor(lr, dtype=lr_dtype) for lr in ETA_MAX]
    return fusedopt.Adam([{"params": [Parameter(torch.ones(2))], "lr": lr} for lr in lrs])


def sgdr(epoch: float, eta_max: float, T_0: int, T_mult: int, eta_min: float, decay: float) -> tuple[float, int]:
    """The rate by the paper's equation (5), its bounds multiplied by `decay` at each restart; and the cycle."""
    start, length, cycle = 0, T_0, 0
    while epoch >= start + length:
        start, length, cycle = start + length, length * T_mult, cycle + 1
        eta_max, eta_min = eta_max * decay, eta_min * decay
    return eta_min + 0.5 * (eta_max - eta_min) * (1 + np.cos(np.pi * (epoch - start) / length)), cycle


@pytest.mark.parametrize("lr_dtype", [None, torch.float64, torch.float32], ids=name_of)
@pytest.mark.parametrize("batches", [None, 1, 7, 8])
@pytest.mark.parametrize(("T_0", "T_mult"), [(1, 1), (5, 1), (1, 2), (3, 2), (2, 3), (2, 4)])
def test_decaying_restarts_are_the_closed_form(
    T_0: int, T_mult: int, batches: int | None, lr_dtype: torch.dtype | None
) -> None:
    """In steps, or in fractions of epochs; then to and fro."""
    optimizer = two_groups(lr_dtype)
    scheduler = DecayingWarmRestarts(optimizer, T_0, T_mult, eta_min=1e-3, decay=0.6)
    optimizer.step()
    tensors = [group["lr"] for group in optimizer.param_groups]
    # The rates are at most 0.1; the largest differences are 0.031 eps in float64 and 0.060 in float32.
    tolerance = 0.1 * torch.finfo(lr_dtype or torch.float64).eps
    steps = (
        [(None, i + 1.0) for i in range(40)] if batches is None else [(i / batches,) * 2 for i in range(40 * batches)]
    )
    jumps = [(epoch, epoch) for epoch in (250.5, 0.5, 33.25, float(T_0), 6.5)] + [(None, 7.5), (None, 8.5)]
    for argument, epoch in steps + jumps:
        scheduler.step(argument)
        for group, eta_max, tensor in zip(optimizer.param_groups, ETA_MAX, tensors, strict=True):
            expected, cycle = sgdr(epoch, eta_max, T_0, T_mult, 1e-3, 0.6)
            assert float(group["lr"]) == pytest.approx(expected, rel=0, abs=tolerance), epoch
            assert scheduler.cycle == cycle
            assert lr_dtype is None or group["lr"] is tensor
        assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize("lr_dtype", [None, torch.float32], ids=name_of)
@pytest.mark.parametrize("T_mult", [1, 2, 3])
def test_without_decay_it_is_torchs(T_mult: int, lr_dtype: torch.dtype | None) -> None:
    """Rates and state, whatever the steps; for T_mult=3 torch restarts late at 121, where a logarithm is rounded."""
    optimizers = two_groups(lr_dtype), two_groups(lr_dtype)
    theirs = lr_scheduler.CosineAnnealingWarmRestarts(optimizers[0], 1, T_mult, 1e-3)
    ours = DecayingWarmRestarts(optimizers[1], 1, T_mult, 1e-3, decay=1)
    for optimizer in optimizers:
        optimizer.step()
    for epoch in (None, None, 0.3, None, 120.9, 121.0, 121.1, None, 2.7, None):
        ours.step(epoch)
        theirs.step(epoch)
        state = ours.state_dict()
        assert state.pop("decay") == 1
        assert state == theirs.state_dict()
        assert options(optimizers[0]) == options(optimizers[1])


@pytest.mark.parametrize("lr_dtype", [None, torch.float32], ids=name_of)
@pytest.mark.parametrize("T_mult", [1, 2])
def test_decaying_restarts_resume(T_mult: int, lr_dtype: torch.dtype | None) -> None:
    """From files, in the middle of a cycle; the decay is part of the state."""
    optimizer = two_groups(lr_dtype)
    scheduler = DecayingWarmRestarts(optimizer, 2, T_mult, 1e-3, decay=0.5)
    optimizer.step()
    scheduler.step(7.25)
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), scheduler.state_dict()), file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    again = two_groups(lr_dtype)
    resumed = DecayingWarmRestarts(again, 9, decay=0.9)
    again.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    for _ in range(9):
        assert (options(again), resumed.cycle) == (options(optimizer), scheduler.cycle)
        for o, s in ((optimizer, scheduler), (again, resumed)):
            o.step()
            s.step()
    assert scheduler.cycle > 2


def test_decaying_restarts_from_last_epoch() -> None:
    optimizer, other = two_groups(), two_groups()
    scheduler = DecayingWarmRestarts(optimizer, 4, decay=0.5)
    optimizer.step()
    for _ in range(10):
        scheduler.step()
    for group, eta_max in zip(other.param_groups, ETA_MAX, strict=True):
        group["initial_lr"] = eta_max
    late = DecayingWarmRestarts(other, 4, last_epoch=9, decay=0.5)  # which is, in torch's words, the last one seen
    assert (options(other), late.cycle) == (options(optimizer), scheduler.cycle)
    assert late.cycle == 2


def test_decaying_restarts_and_a_group_that_comes_later() -> None:
    """As in torch, the next step is an error until the scheduler has a rate for it; then it takes part."""
    for make in (lr_scheduler.CosineAnnealingWarmRestarts, partial(DecayingWarmRestarts, decay=0.5)):
        optimizer = two_groups()
        scheduler = make(optimizer, 2)
        optimizer.step()
        optimizer.add_param_group({"params": [Parameter(torch.ones(3))], "lr": 0.2})
        with pytest.raises(ValueError, match="zip"):
            scheduler.step()
        scheduler.base_lrs.append(0.2)
        scheduler.step(4)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25 * lr for lr in (*ETA_MAX, 0.2)]


def test_decaying_restarts_behind_a_warm_up() -> None:
    """SequentialLR holds it at epoch -1 meanwhile."""
    optimizer = two_groups()
    restarts = DecayingWarmRestarts(optimizer, 2, decay=0.5)
    warm_up = lr_scheduler.LinearLR(optimizer, 0.5, total_iters=2)
    sequence = lr_scheduler.SequentialLR(optimizer, [warm_up, restarts], [2])
    optimizer.step()
    seen = []
    for _ in range(7):
        seen.append((optimizer.param_groups[0]["lr"], restarts.cycle))
        sequence.step()
    factors = [0.5, 0.75, 1.0, 0.5, 0.5, 0.25, 0.25]
    assert [lr for lr, _ in seen] == pytest.approx([0.1 * factor for factor in factors], rel=1e-15)
    assert [cycle for _, cycle in seen] == [0, 0, 0, 0, 1, 1, 2]


@pytest.mark.parametrize("decay", [0.0, -0.5, 1.5, math.nan])
def test_decay_out_of_range(decay: float) -> None:
    with pytest.raises(ValueError, match=rf"Expected decay above 0 and at most 1 .* got {decay}"):
        DecayingWarmRestarts(two_groups(), 2, decay=decay)
