"""Where Adam's step multiplies by a reciprocal, the quotients are those of a division (csrc/rules/quotient.h)."""

import functools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.nn import Parameter

import fusedopt

BETA2S = (0.95, 0.999, 0.9999, 1 - 2.0**-30)
# Most divisors have a reciprocal that is right for all; five of these have not, and are divided by.
STEPS = (1, 2, 3, 9, 25, 1000)
WORST, EACH = 64, 8


@functools.cache
def middle_quotients(divisor: np.float32, count: int) -> np.ndarray:
    """The floats in [1, 2) whose quotients come nearest to the middle between two floats."""
    c = int(np.frexp(divisor)[0] * 2**24)
    x = np.arange(2**23, 2**24, dtype=np.int64)
    # Quotients of 25 bits, odd ones of which are middles: x * 2 ** shift = c * odd.
    rest = np.where(x >= c, x << 24, x << 25) % (2 * c)
    return np.float32(x[np.argpartition(np.abs(rest - c), count)[:count]] * 2.0**-23)


def squares(roots: np.ndarray, beta2: float) -> np.ndarray:
    """What exp_avg_sq must be for its root to be one of these, after a step with a gradient of 0; nan if nothing."""
    found = np.full_like(roots, np.nan)
    for ulps in range(-6, 7):
        value = (np.float32(roots.astype(np.float64) ** 2 / beta2).view(np.int32) + np.int32(ulps)).view(np.float32)
        found = np.where(np.sqrt(np.float32(beta2) * value) == roots, value, found)
    return found


def correction(beta2: float, step: int) -> np.float32:
    return np.float32((1 - beta2**step) ** 0.5)


def params_of(beta2: float) -> Iterator[tuple[int, Parameter, dict]]:
    """For each step count a parameter of zeros, and its state before that step."""
    for step in STEPS:
        value = squares(middle_quotients(correction(beta2, step), WORST), beta2)
        value = np.repeat(value[~np.isnan(value)], EACH)
        assert len(value) > WORST * EACH / 2
        moment = np.random.default_rng(step).uniform(0.5, 1, len(value)).astype(np.float32)
        state = {"step": torch.tensor(step - 1.0), "exp_avg": torch.tensor(moment), "exp_avg_sq": torch.tensor(value)}
        param = Parameter(torch.zeros(len(value)))
        param.grad = torch.zeros_like(param)
        yield step, param, state


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize("beta2", BETA2S, ids=str)
def test_quotients_nearest_to_the_middle(beta2: float) -> None:
    """A wrong one would show in one of the divisions by it."""
    known = list(params_of(beta2))
    optimizer = fusedopt.Adam([param for _, param, _ in known], lr=1e-3, betas=(0.9, beta2), eps=0)
    for _, param, state in known:
        optimizer.state[param].update(state)
    optimizer.step()
    for step, param, state in known:
        root, moment = np.sqrt(state["exp_avg_sq"].numpy()), state["exp_avg"].numpy()
        step_size = np.float32(-(1e-3 / (1 - 0.9**step)))
        wanted = (step_size * moment) / (root / correction(beta2, step))
        found = param.detach().numpy()
        assert (found.view(np.int32) == wanted.view(np.int32)).all(), step


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize("beta2", [0.5, 0.999], ids=str)
def test_quotients_of_zero_and_infinity(beta2: float) -> None:
    """0 / 0 is nan, x / inf is 0, and nan remains: with a reciprocal that is exact (0.5 ** 60 is lost in 1) or not."""
    param = Parameter(torch.ones(5))
    optimizer = fusedopt.Adam([param], lr=1e-3, betas=(0.9, beta2), eps=0)
    averages = torch.tensor([0.0, torch.inf, torch.nan, 2.0**-148, 3e38])
    moments = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])
    optimizer.state[param] = {"step": torch.tensor(59.0), "exp_avg": moments, "exp_avg_sq": averages}
    param.grad = torch.zeros(5)
    optimizer.step()
    assert param[0].isnan() and param[2].isnan()
    assert param[1] == 1 and param[3] == 1 and param[4] == 1
