"""Every scheduler of torch drives the classes as it drives torch's own: same options, same bits.

In float64, where stock torch's square root is correctly rounded, so the reference is torch's for-loop as it is.
"""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizers import BY_ID, Row, generator, name_of
from reference import assert_same_bits
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer, lr_scheduler
from torch.optim.swa_utils import SWALR

STEPS = 12

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
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.5)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, total_iters=4), lr_scheduler.ExponentialLR(o, 0.8)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 0.1, step_size_up=3, cycle_momentum="betas" in o.defaults),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=STEPS, cycle_momentum="betas" in o.defaults),
    "SWALR": lambda o: SWALR(o, swa_lr=0.05, anneal_epochs=7),
}
CYCLE_MOMENTUM = ("CyclicLR", "OneCycleLR")

ROWS = [
    BY_ID[name + lr]
    for name in ("adam-decay", "adamw-decay-amsgrad", "radam", "adagrad-decay-lr_decay")
    for lr in ("", "-lr64")
]


def test_no_scheduler_is_forgotten() -> None:
    assert {*lr_scheduler.__all__, "SWALR"} == {*SCHEDULERS, "LRScheduler"}


def make(cls: Callable[..., Optimizer], lr: float | Tensor, scheduler: str) -> tuple[Optimizer, Any]:
    """An optimizer with two groups that have options of their own, and its scheduler."""
    g = generator(0)
    first, second = (Parameter(torch.randn(n, dtype=torch.float64, generator=g)) for n in (5, 33))
    optimizer = cls([{"params": [first]}, {"params": [second], "lr": 3 * lr, "weight_decay": 0.2}])
    return optimizer, SCHEDULERS[scheduler](optimizer)


def advance(optimizer: Optimizer, scheduler: Any, step: int) -> None:
    g = generator(1 + step)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, dtype=torch.float64, generator=g)
    optimizer.step()
    scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))


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
            advance(optimizer, scheduler, step)
        ours, theirs = (optimizer for optimizer, _ in pairs)
        assert options(ours) == options(theirs)
        seen.append(options(ours))
        for group, other in zip(ours.param_groups, theirs.param_groups, strict=True):
            assert_same_bits(group["params"][0].detach(), other["params"][0].detach())

    changes = sum(before != after for before, after in itertools.pairwise(seen))
    assert changes >= (1 if name == "ConstantLR" else 2)
    if name in CYCLE_MOMENTUM and "betas" in ours.defaults:
        assert len({groups[0]["betas"][0] for groups in seen}) > 2
