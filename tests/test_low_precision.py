"""bfloat16 and float16 are the independent transcription: computed in float32, rounded once where stored."""

import functools

import pytest
import torch
from optimizers import DTYPES, ROWS, VARIANTS, Row, generator, gradients, joined, name_of, parameters, set_grads
from reference import Hyper, Stored, assert_same_bits, low_precision_step, varied_values
from torch import Tensor
from torch.nn import Parameter

import fusedopt

NUMEL = 10_007
HALVES = [torch.bfloat16, torch.float16]
STATES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


@functools.cache
def wild_gradients(dtype: torch.dtype, finite: bool) -> list[Tensor]:
    return list(gradients(NUMEL, dtype, 50, finite=finite))


def assert_stored(actual: dict[str, Tensor], expected: Stored, when: str) -> None:
    assert set(actual) == {"param", "step", *STATES[: len(actual) - 2]}
    for name in actual.keys() - {"step"}:
        wanted = getattr(expected, name)
        assert wanted is not None
        assert_same_bits(actual[name], wanted, f"{name} {when}")


def compare(row: Row, dtype: torch.dtype) -> None:
    initial = varied_values(NUMEL, dtype, generator(6), finite=row.finite)
    params = parameters(initial)
    optimizer = row.make(params)
    hyper = Hyper.from_group(row.make_torch([Parameter(initial)]).param_groups[0])
    zeros = torch.zeros_like(initial)
    expected = Stored(initial, zeros, zeros, zeros if hyper.amsgrad else None)
    for step, grad in enumerate(wild_gradients(dtype, row.finite), start=1):
        set_grads(params, grad)
        optimizer.step()
        expected = low_precision_step(
            expected.param, grad, expected.exp_avg, expected.exp_avg_sq, expected.max_exp_avg_sq, hyper, step
        )
        if step in (1, 2, 3, 10, 25, 50):
            result = joined(params, optimizer)
            assert set(result["step"].tolist()) == {step}
            assert_stored(result, expected, f"after step {step}")


@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_wild_values(row: Row, dtype: torch.dtype) -> None:
    compare(row, dtype)


# Torch's for-loop disagrees with itself about the sign of a zero when beta1 is 0 (see reference.torch_loop_step), so
# this one is compared with the transcription in every dtype.
NO_BETA1 = Row("no_beta1", fusedopt.AdamW, torch.optim.AdamW, {"betas": (0.0, 0.99), "weight_decay": 0.1})


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_beta1_of_zero(dtype: torch.dtype) -> None:
    compare(NO_BETA1, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
@pytest.mark.parametrize("row", VARIANTS, ids=name_of)
def test_every_16_bit_value(row: Row, dtype: torch.dtype, capability: str) -> None:
    """Every pattern as parameter, gradient and state, each stream in an order of its own."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)

    def shuffled(seed: int) -> Tensor:
        return patterns[torch.randperm(patterns.numel(), generator=generator(seed))]

    param = Parameter(shuffled(0))
    param.grad = shuffled(1)
    optimizer = row.make([param])
    hyper = Hyper.from_group(row.make_torch([param]).param_groups[0])
    state = {name: shuffled(seed) for seed, name in enumerate(STATES[: 3 if hyper.amsgrad else 2], start=2)}
    before = [param.detach().clone(), param.grad, *(state[name].clone() if name in state else None for name in STATES)]
    optimizer.state[param] = {"step": torch.tensor(6.0), **state}
    optimizer.step()
    result = joined([param], optimizer)
    assert result["step"].tolist() == [7]
    assert_stored(result, low_precision_step(*before, hyper, step=7), "after one step")
