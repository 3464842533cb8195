"""What comes before every timing: where a step's gradients come from, and the proof that the steps are right."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from . import harness
from .harness import FIRST_STEPS, LOOP, OURS, make_optimizer, make_parameters

sys.path.append(str(harness.ROOT / "tests"))
from reference import assert_same_bits, torch_loop_step, transcription

# --- where a step's gradients come from ----------------------------------------------------------------------------

Renew = Callable[[list[Parameter], list[Tensor]], None]


def kept(params: list[Parameter], grads: list[Tensor]) -> None:
    """The gradient tensors of the step before."""


def assigned(params: list[Parameter], grads: list[Tensor]) -> None:
    """New tensors, assigned to .grad."""
    for param, grad in zip(params, torch._foreach_mul(grads, 1.0), strict=True):
        param.grad = grad


def backward(params: list[Parameter], grads: list[Tensor]) -> None:
    """As in training: zero_grad() and backward."""
    for param in params:
        param.grad = None
    torch.autograd.backward(params, grads)


# --- correctness ---------------------------------------------------------------------------------------------------


def check(
    sizes: Sequence[int],
    dtype: torch.dtype = torch.float32,
    renew: Renew = kept,
    steps: int | None = None,
    zero_after: int | None = None,
    algorithm: str = "Adam",
    **options: Any,
) -> None:
    """Raise AssertionError unless fusedopt's parameters and state equal the reference's after some steps."""
    params = make_parameters(sizes, dtype)
    sources = [param.grad for param in params if param.grad is not None]
    ours = make_optimizer(OURS, params, algorithm, **options)
    twins = [Parameter(param.detach().clone()) for param in params]
    theirs = make_optimizer(LOOP, twins, algorithm, **options)
    low_precision = dtype in (torch.bfloat16, torch.float16)
    for step in range(1, (steps or FIRST_STEPS[algorithm] + 2) + 1):
        for source in sources:
            source.mul_(0.0 if zero_after is not None and step > zero_after else 0.75)
        renew(params, sources)
        for twin, source in zip(twins, sources, strict=True):
            twin.grad = source.clone()
        ours.step()
        if low_precision:
            for twin in twins:
                transcribed_step(twin, theirs, step)
        else:
            torch_loop_step(theirs)
    for param, twin in zip(params, twins, strict=True):
        assert_same_bits(param, twin, "the parameter")
        for name, value in theirs.state[twin].items():
            assert_same_bits(ours.state[param][name], value, name)


def transcribed_step(param: Parameter, optimizer: Optimizer, step: int) -> None:
    """The reference for 16-bit dtypes, where torch's loop rounds every operation and we round what is stored."""
    formula, state = transcription(optimizer), optimizer.state[param]
    assert param.grad is not None
    before = {**formula.first_state(param), **state}
    new, after = formula.step(param.detach(), param.grad, before, step)
    state |= {"step": torch.tensor(float(step)), **after}
    with torch.no_grad():
        param.copy_(new)
