"""What torch has no reference for is the independent transcription: computed in opmath, rounded once where stored.

That is bfloat16 and float16, and options that torch does not have.
"""

import functools

import pytest
import torch
from optimizers import (
    DTYPES,
    FLOATS,
    OWN_VARIANTS,
    ROWS,
    VARIANTS,
    Row,
    generator,
    gradients,
    joined,
    name_of,
    parameters,
    set_grads,
)
from reference import State, assert_same_bits, transcription, varied_values
from torch import Tensor
from torch.nn import Parameter

import fusedopt

NUMEL = 10_007
HALVES = [torch.bfloat16, torch.float16]


@functools.cache
def wild_gradients(dtype: torch.dtype, finite: bool) -> list[Tensor]:
    return list(gradients(NUMEL, dtype, 50, finite=finite))


def assert_stored(actual: State, param: Tensor, state: State, when: str) -> None:
    assert set(actual) == {"param", "step", *state}
    for name, wanted in {"param": param, **state}.items():
        assert_same_bits(actual[name], wanted, f"{name} {when}")


def compare(row: Row, dtype: torch.dtype, steps: int = 50) -> None:
    initial = varied_values(NUMEL, dtype, generator(6), finite=row.finite)
    params = parameters(initial)
    optimizer = row.make(params)
    formula = transcription(optimizer)
    expected, state = initial, formula.first_state(initial)
    for step, grad in enumerate(wild_gradients(dtype, row.finite)[:steps], start=1):
        set_grads(params, grad)
        optimizer.step()
        expected, state = formula.step(expected, grad, state, step)
        if step in (1, 2, 3, 10, 25, steps):
            result = joined(params, optimizer)
            assert set(result["step"].tolist()) == {step}
            assert_stored(result, expected, state, f"after step {step}")


@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_wild_values(row: Row, dtype: torch.dtype) -> None:
    compare(row, dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("row", [row for row in ROWS if row.own], ids=name_of)
def test_options_that_torch_does_not_have(row: Row, dtype: torch.dtype) -> None:
    compare(row, dtype, steps=50 if dtype == torch.float32 else 12)  # NumPy has no fma for float64: libm's is slow


# Torch's for-loop disagrees with itself about the sign of a zero when beta1 is 0 (see reference.torch_loop_step), so
# this one is compared with the transcription in every dtype.
NO_BETA1 = Row("no_beta1", fusedopt.AdamW, torch.optim.AdamW, {"betas": (0.0, 0.99), "weight_decay": 0.1})


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_beta1_of_zero(dtype: torch.dtype) -> None:
    compare(NO_BETA1, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
@pytest.mark.parametrize("row", [*VARIANTS, *OWN_VARIANTS], ids=name_of)
def test_every_16_bit_value(row: Row, dtype: torch.dtype, capability: str) -> None:
    """Every pattern as parameter, gradient and state, each stream in an order of its own."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)

    def shuffled(seed: int) -> Tensor:
        return patterns[torch.randperm(patterns.numel(), generator=generator(seed))]

    param = Parameter(shuffled(0))
    param.grad = shuffled(1)
    optimizer = row.make([param])
    formula = transcription(optimizer)
    state = {name: shuffled(seed) for seed, name in enumerate(formula.names, start=2)}
    expected = formula.step(param, param.grad, state, 7)
    optimizer.state[param] = {"step": torch.tensor(6.0), **state}
    optimizer.step()
    result = joined([param], optimizer)
    assert result["step"].tolist() == [7]
    assert_stored(result, *expected, "after one step")
