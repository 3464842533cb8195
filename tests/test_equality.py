"""float32 and float64 are torch's for-loop with a correctly rounded square root, bit for bit."""

import functools
from collections.abc import Callable

import pytest
import torch
from optimizers import FLOATS, KNOWN_ROWS, VARIANTS, Row, generator, gradients, joined, name_of, parameters, set_grads
from reference import assert_same_bits, torch_loop_step, varied_values
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

NUMEL = 10_007


@functools.cache
def wild_gradients(dtype: torch.dtype, finite: bool) -> list[Tensor]:
    return list(gradients(NUMEL, dtype, 50, finite=finite))


def assert_same(ours: list[Parameter], optimizer: Optimizer, whole: Parameter, expected: Optimizer, when: str) -> None:
    """Compare ours, in pieces, with torch's, in one: the parameter and every state tensor."""
    actual, wanted = joined(ours, optimizer), joined([whole], expected)
    assert list(actual) == list(wanted)
    for name, value in actual.items():
        target = wanted[name].expand(len(ours)) if name == "step" else wanted[name]
        assert_same_bits(value, target, f"{name} {when}")


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("row", KNOWN_ROWS, ids=name_of)
def test_wild_values(row: Row, dtype: torch.dtype) -> None:
    initial = varied_values(NUMEL, dtype, generator(), finite=row.finite)
    whole, ours = Parameter(initial.clone()), parameters(initial)
    optimizer, expected = row.make(ours), row.make_torch([whole])
    first_half = None
    for step, grad in enumerate(wild_gradients(dtype, row.finite), start=1):
        whole.grad, kept = grad.clone(), grad.clone()
        set_grads(ours, grad)
        torch_loop_step(expected)
        optimizer.step()
        assert_same_bits(grad, kept, f"gradient after step {step}")  # read, never written
        if step in (1, 2, 3, 10, 25, 50):
            assert_same(ours, optimizer, whole, expected, f"after step {step}")
        if step == 25:
            first_half = whole.detach().clone()
    # The inputs are wild, yet most of what was compared still moved at the end: it was not all inf and nan.
    assert first_half is not None
    assert (whole.detach().isfinite() & (whole != first_half)).double().mean() > 0.25


def sparse_in_time(numel: int, seed: int) -> Callable[[int], Tensor]:
    """Ordinary gradients; a third of the elements gets only zeros for hundreds of steps, another rarely any other.

    So their moments decay: exp_avg, from 1e-20 and smaller, reaches the subnormals within the stretch.
    """
    g = generator(seed)
    scale = 10 ** (-32 * torch.rand(numel, generator=g, dtype=torch.float64)).to(torch.float32)
    third = torch.arange(numel) % 3

    def grad(step: int) -> Tensor:
        values = torch.randn(numel, generator=g)
        pausing = (third == 1) & (step % 500 >= 20)
        rare = (third == 2) & (torch.rand(numel, generator=g) > 0.01)
        return torch.where(pausing | rare, torch.zeros(()), values * torch.where(third == 0, torch.ones(()), scale))

    return grad


@pytest.mark.parametrize("row", VARIANTS, ids=name_of)
def test_long_run(row: Row) -> None:
    numel, dtype = 100_000, torch.float32
    gradient = sparse_in_time(numel, seed=3)
    initial = torch.randn(numel, generator=generator(4), dtype=dtype)
    whole, ours = Parameter(initial.clone()), parameters(initial)
    optimizer, expected = row.make(ours), row.make_torch([whole])
    has_moments = not isinstance(expected, torch.optim.Adagrad)
    flushed = 0
    for step in range(1, 1001):
        whole.grad = gradient(step)
        set_grads(ours, whole.grad)
        before = expected.state[whole]["exp_avg"].clone() if step == 450 and has_moments else None
        torch_loop_step(expected)
        optimizer.step()
        if before is not None:
            flushed = int(((before != 0) & (expected.state[whole]["exp_avg"] == 0)).sum())
        if step % 250 == 0:
            assert_same(ours, optimizer, whole, expected, f"after step {step}")
    if has_moments and row.id != "adam-decay":  # L2 decay leaves no gradient at zero
        assert flushed > 0
