"""What is rounded, and to what: draws, stochastic and compensated rounding, codes of 8 bits."""

import itertools
import math
from typing import Any

import numpy as np
import precision
import pytest
import torch
from optimizers import generator, name_of
from precision import (
    BLOCK,
    EXP_AVG_CODE,
    HALVES,
    OTHER_CODE,
    Code,
    draws,
    encode_blocks,
    of_elements,
    philox4x32,
    round_stochastic,
)
from precision_cases import REMEDIES, moments_of, set_grads, value_of
from reference import assert_same_bits
from torch import Tensor
from torch.nn import Parameter

import fusedopt

# --- rounding --------------------------------------------------------------------------------------------------------


def steps_around(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The neighbours in a 16-bit dtype below and above finite float32 values, as doubles."""
    nearest = x.to(dtype)
    exact, found = x.double(), nearest.double()
    up = torch.nextafter(nearest, torch.full_like(nearest, math.inf)).double()
    down = torch.nextafter(nearest, torch.full_like(nearest, -math.inf)).double()
    return torch.where(found > exact, down, found), torch.where(found < exact, up, found)


@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
def test_stochastic_rounding_is_unbiased(dtype: torch.dtype) -> None:
    """10^7 draws: a mean error of zero, each within a step, none related to that of a neighbour or of another step."""
    numel, steps = 1_000_000, 10
    first = (torch.randn(numel, generator=generator(1)) * 0.3).to(dtype)
    first[: numel // 10] *= 1e-6  # float16's subnormals
    param, twin = Parameter(first.clone()), Parameter(first.float())
    stochastic = fusedopt.Adam([param], lr=1e-3, rounding="stochastic", state_dtype=torch.float32, seed=5)
    float32 = fusedopt.Adam([twin], lr=1e-3)
    total, outward, variance, related = 0.0, 0.0, 0.0, np.zeros(5)
    before = None
    for step in range(steps):
        grad = torch.randn(numel, generator=generator(100 + step)).to(dtype)
        with torch.no_grad():
            param.copy_(first)
            twin.copy_(first)
        set_grads([param, twin], [grad, grad.float()])
        stochastic.step()
        float32.step()
        x, stored = twin.detach(), param.detach().double()
        below, above = steps_around(x, dtype)
        assert bool(((stored == below) | (stored == above)).all())
        width = (above - below).where(above > below, 1.0)
        up = (x.double() - below) / width  # the probability of rounding up
        error = (stored - x.double()) / width
        total += error.sum().item()
        outward += (error * x.sign()).sum().item()
        variance += (up * (1 - up)).sum().item()
        related[:4] += [float((error[lag:] * error[:-lag]).sum()) for lag in (1, 8, 127, 128)]
        if before is not None:
            related[4] += float((error * before).sum())
        before = error
    assert abs(total) < 4 * math.sqrt(variance)
    assert abs(outward) < 4 * math.sqrt(variance)  # what both signs have, and their sum does not
    assert variance > 0.05 * numel * steps
    # A product of two independent errors has at most the variance 1/16; the mean of ours is variance / draws.
    assert (np.abs(related) < 4 * math.sqrt(numel * steps) * variance / (numel * steps)).all()


def rounded(seed: int = 0, position: int = 0, count: int = 0, stretch: int = 1) -> Tensor:
    params = [Parameter(torch.ones(4096, dtype=torch.bfloat16)) for _ in range(position + 1)]
    optimizer = fusedopt.Adam(params, lr=1e-3, rounding="stochastic", seed=seed)
    for _ in range(stretch):
        params[-1].grad = torch.ones(4096, dtype=torch.bfloat16)
        if count:
            state = {name: torch.zeros(4096, dtype=torch.bfloat16) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[params[-1]] = {"step": torch.tensor(float(count)), **state}
        optimizer.step()
    return params[-1].detach()


def test_draws_depend_on_seed_step_and_position() -> None:
    first = rounded()
    assert_same_bits(rounded(), first)
    for other in ({"seed": 1}, {"seed": 2**32}, {"seed": 2**64 - 1}, {"position": 1}, {"position": 300}):
        assert bool((rounded(**other) != first).any()), other
    # A step more with the same values before it: the bias corrections are 1 by then.
    assert bool((rounded(count=60_000) != rounded(count=60_001)).any())
    assert_same_bits(rounded(count=60_000), rounded(count=60_000))


def test_the_streams_of_a_parameter_have_other_draws() -> None:
    """exp_avg and exp_avg_sq of one element are rounded up independently, also of the parameter."""
    numel = 200_000
    param = Parameter(torch.zeros(numel, dtype=torch.bfloat16))
    param.grad = torch.full((numel,), 0.3, dtype=torch.bfloat16)
    optimizer = fusedopt.Adam([param], betas=(0.7, 0.7), lr=0.1, rounding="stochastic")
    optimizer.step()
    state = optimizer.state[param]
    ups = []
    for stored in (param.detach(), state["exp_avg"], state["exp_avg_sq"]):
        values = stored.double()
        assert len(values.unique()) == 2
        ups.append((values == values.max()).double())
    for first, second in itertools.combinations(ups, 2):
        correlation = float(torch.corrcoef(torch.stack([first, second]))[0, 1])
        assert abs(correlation) < 4 / math.sqrt(numel)


@pytest.mark.parametrize("remedy", REMEDIES)
def test_a_weight_of_one(remedy: str, capability: str) -> None:
    """At lr 1e-3 it never moves in plain bfloat16; with each remedy as in float32, in its value or in the mean."""
    numel, steps = 4000, 100
    param, twin = Parameter(torch.ones(numel, dtype=torch.bfloat16)), Parameter(torch.ones(numel))
    optimizer, float32 = fusedopt.Adam([param], lr=1e-3, **REMEDIES[remedy]), fusedopt.Adam([twin], lr=1e-3)
    for _ in range(steps):
        param.grad, twin.grad = torch.ones_like(param), torch.ones_like(twin)
        optimizer.step()
        float32.step()
    wanted, found = twin.detach()[0].item(), value_of(optimizer, param).double()
    assert wanted == pytest.approx(0.9, abs=1e-3)
    if remedy == "plain":
        assert bool((param == 1).all())
    elif remedy == "stochastic":
        # Near 1 a unit in the last place is 2^-8, a draw's standard deviation at most half of it: 100 of them of 4,000
        # elements have at most this standard error.
        assert abs(float(found.mean()) - wanted) < 4 * 0.5 * 2**-8 * math.sqrt(steps / numel)
    elif remedy == "kahan":
        # The compensation is at most 2^-9 and has 8 bits: it is rounded by 2^-18 at most in each step.
        assert bool(((found - wanted).abs() <= steps * 2**-18).all())
    else:
        assert_same_bits(value_of(optimizer, param), twin.detach())


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, "int8", None], ids=str)
def test_second_moments_decay(state_dtype: Any) -> None:
    """By 0.999 a step, where to nearest each change is rounded away."""
    shape, steps = (40, 256), 1000
    param = Parameter(torch.ones(shape, dtype=torch.bfloat16))
    optimizer = fusedopt.Adam([param], betas=(0.9, 0.999), state_dtype=state_dtype)
    param.grad = torch.randn(shape, generator=generator(2)).to(torch.bfloat16)
    optimizer.step()
    first = moments_of(optimizer, param)["exp_avg_sq"].double()
    param.grad = torch.zeros_like(param)
    for _ in range(steps):
        optimizer.step()
    last = moments_of(optimizer, param)["exp_avg_sq"].double()
    ratio = (last / first)[first > 0]
    if state_dtype is None:
        assert bool((ratio == 1).all())
        return
    # bfloat16: the ratio's standard deviation is 0.02 to 0.03, its mean's 3e-4. int8: the scale is what decays, by
    # 0.999 and rounding errors of 6e-8 a step; elements follow it.
    error = float(ratio.std()) / math.sqrt(ratio.numel())
    assert abs(float(ratio.mean()) - 0.999**steps) < 4 * error + 1e-4
    assert error < 2e-3


# --- codes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False], ids=["exp_avg", "exp_avg_sq"])
def test_an_inf_takes_its_block_along(signed: bool, capability: str) -> None:
    """And no other: in a block with an inf or nan nothing that could be told from another value is left."""
    param = Parameter(torch.ones(3, 2 * BLOCK))
    param.grad = torch.ones(3, 2 * BLOCK)
    param.grad[1, 3] = math.inf if signed else 1e30  # whose square is inf
    optimizer = fusedopt.Adam([param], state_dtype="int8")
    optimizer.step()
    scales = optimizer.state[param]["scales"]
    bad = torch.zeros(3, 2, 2, dtype=torch.bool)
    bad[1, 0] = torch.tensor([signed, True])
    assert torch.equal(~scales.isfinite(), bad)
    moments = moments_of(optimizer, param)["exp_avg" if signed else "exp_avg_sq"]
    assert not moments[1, 3].isfinite()
    assert torch.equal(moments.isfinite().view(3, 2, BLOCK).all(-1), ~bad[:, :, 0 if signed else 1])


def test_codes_under_another_default_dtype() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        param = Parameter(torch.randn(4, 300, dtype=torch.bfloat16))
        param.grad = torch.randn(4, 300, dtype=torch.bfloat16)
        optimizer = fusedopt.Adam([param], state_dtype="int8")
        optimizer.step()
        assert optimizer.state[param]["scales"].dtype == torch.float32
        assert optimizer.state_dict(portable=True)["state"][0]["exp_avg"].dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize("bits, is_nan", [(118.9, False), (119.1, True)], ids=str)
def test_a_magnitude_too_large_for_codes(bits: float, is_nan: bool) -> None:
    """Of 2 ** 119 and more in exp_avg: its block is nan, and no other. (exp_avg_sq is infinite then, and nan, too.)"""
    param = Parameter(torch.zeros(2, 256))
    param.grad = torch.ones(2, 256)
    param.grad[1, 3] = 2.0 ** (bits + 1)
    optimizer = fusedopt.Adam([param], betas=(0.5, 0.999), state_dtype="int8")
    optimizer.step()
    nan = optimizer.state[param]["scales"].isnan()
    assert nan.tolist() == [[[False, False], [False, False]], [[is_nan, True], [False, False]]]
    moment = optimizer.state_dict(portable=True)["state"][0]["exp_avg"]
    assert bool(moment[1, :128].isnan().all()) == is_nan and not moment[0].isnan().any()
    # The scale is rounded, and its product with the largest code: 2 ** -23 in all.
    assert is_nan or float(moment[1, 3]) == pytest.approx(2.0**bits, rel=2**-23)


def test_codes_are_converted_in_the_default_modes() -> None:
    """Where the caller lets subnormals be zero, checkpoints have the same bits."""
    param = Parameter(torch.zeros(2, 256))
    param.grad = torch.full((2, 256), 6.5e-16)
    param.grad[:, ::2] = 3.45e-18  # whose squares, rounded up or down, are subnormal or not
    optimizer = fusedopt.Adam([param], state_dtype="int8")
    optimizer.step()
    wanted = optimizer.state_dict(portable=True)["state"][0]["exp_avg_sq"]
    assert bool(((wanted > 0) & (wanted < torch.finfo(torch.float32).tiny)).any())
    other = fusedopt.Adam([Parameter(torch.zeros(2, 256))], state_dtype="int8")
    assert torch.set_flush_denormal(True)
    try:
        found = optimizer.state_dict(portable=True)["state"][0]["exp_avg_sq"]
        other.load_state_dict(optimizer.state_dict(portable=True), convert=True)
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(found, wanted)
    assert bool((next(iter(other.state.values()))["exp_avg_sq"] > 0).all())


def test_a_first_sum_that_is_not_zero() -> None:
    """Adagrad's initial_accumulator_value, in every form as near as it can be stored."""
    for state_dtype, within in ((None, 2**-8), (torch.float32, 0), (torch.bfloat16, 2**-8), ("int8", 2**-4)):
        param = Parameter(torch.zeros(2, 2 * BLOCK, dtype=torch.bfloat16))
        optimizer = fusedopt.Adagrad([param], initial_accumulator_value=0.1, state_dtype=state_dtype)
        param.grad = torch.zeros_like(param)
        optimizer.step()
        (total,) = moments_of(optimizer, param).values()
        assert bool(((total - np.float32(0.1)).abs() <= 0.1 * within).all())


# --- the reference itself --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "seven", "ten"),
    [
        (
            "00000000 " * 4,
            "00000000 " * 2,
            "5f6fb709 0d893f64 4f121f81 4f730a48",
            "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        ),
        (
            "ffffffff " * 4,
            "ffffffff " * 2,
            "5207ddc2 45165e59 4d8ee751 8c52f662",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "4dfccaba 190a87f0 c47362ba b6b5242a",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter: str, key: str, seven: str, ten: str) -> None:
    """Random123's, of 7 rounds and of 10."""
    words = [np.array([int(word, 16) for word in text.split()], dtype=np.uint64) for text in (counter, key)]
    assert [f"{int(word):08x}" for word in philox4x32(*words)] == seven.split()
    assert [f"{int(word):08x}" for word in philox4x32(*words, rounds=10)] == ten.split()


def test_draws() -> None:
    """An element at a time, from the words that are its own."""
    seed, position, step = 0x0123456789ABCDEF, 5, 12
    r = draws(1003, seed, position, step)
    assert r.shape == (4, 1003) and r.min() >= 0 and r.max() < 2**16
    key = np.array([seed & 0xFFFFFFFF, seed >> 32])
    for i in (0, 1, 2, 7, 8, 127, 128, 255, 256, 500, 1002):
        words = philox4x32(np.array([i // 256 * 16 + i % 128 // 8, 0, step, position]), key)
        u = [int(word) >> 16 * half & 0xFFFF for word in words for half in range(2)]
        j, behind = i % 8, i % 256 >= 128
        one, two, three = u[(j + 1) % 8], u[(j + 2) % 8], u[(j + 3) % 8]
        assert r[0, i] == u[j] ^ (one if behind else 0)
        assert r[1, i] == u[j] ^ (one ^ two if behind else two)
        assert r[2, i] == u[j] ^ (one ^ three if behind else three)
        assert r[3, i] == u[j] ^ (one ^ two ^ three if behind else two ^ three)


def test_draws_of_a_counter_are_sums_of_different_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """As sums modulo 2 they are pairwise independent if no two are of the same eighths: here draw j has bit j alone."""
    words = np.array([1 << 2 * j | 2 << 2 * j + 16 for j in range(4)], dtype=np.uint32)
    monkeypatch.setattr(precision, "philox4x32", lambda counter, _: np.tile(words, (len(counter), 1)))
    r = draws.__wrapped__(256, 0, 0, 1)
    sums = set(r[:, :8].flatten().tolist()) | set(r[:, 128:136].flatten().tolist())
    assert len(sums) == 64 and 0 not in sums


@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
def test_reference_rounding_is_unbiased(dtype: torch.dtype) -> None:
    """All 65,536 draws of a few values: within a step, and the mean is the value."""
    info = torch.finfo(dtype)
    values = [0.0, -0.0, 1.0, 1.0 + 2**-12, -1.2345, 0.1, 3e4, -6.6e-5, 6.1e-5, 1e-7, 3.3e-8, -(2.0**-30)]
    values += [float(info.max), float(info.smallest_normal) * 0.7, float(info.smallest_normal)]
    for value in values:
        x = np.full(2**16, value, dtype=np.float32)
        stored = round_stochastic(x, dtype, np.arange(2**16))
        found = stored.double()
        below, above = steps_around(torch.from_numpy(x[:1]), dtype)
        assert bool(((found == below) | (found == above)).all()), value
        width = float(above - below)
        # bfloat16 cuts off 16 bits, float16 13 of normal values; others were rounded as what is above one of them.
        assert abs(float(found.mean()) - float(x[0])) <= (2.0**-38 if dtype == torch.float16 else 0) + width * 1e-12
        assert bool((stored.view(torch.int16) < 0).all()) == np.signbit(x[0])


def test_reference_rounding_of_the_largest() -> None:
    """Beyond the largest float16, half of what is half-way goes to inf; from 65,536 all."""
    draw = np.arange(2**16)
    for value, share in ((65504.0, 0.0), (65520.0, 0.5), (65535.996, 1.0), (65536.0, 1.0), (1e30, 1.0)):
        stored = round_stochastic(np.full(2**16, value, dtype=np.float32), torch.float16, draw)
        assert float(stored.isinf().double().mean()) == pytest.approx(share, abs=2e-4)
    for dtype in HALVES:
        odd = np.tile(np.array([math.inf, -math.inf, math.nan], dtype=np.float32), 1000)
        assert_same_bits(round_stochastic(odd, dtype, draw[:3000] * 21), torch.from_numpy(odd).to(dtype))


CODES = [EXP_AVG_CODE, OTHER_CODE, *(Code(True, e, 7 - e) for e in (3, 5)), Code(False, 5, 3)]


@pytest.mark.parametrize("code", CODES, ids=str)
def test_reference_codes(code: Code) -> None:
    """Increasing values up to one in [1, 2); each is encoded as itself, whatever the draw."""
    assert code.fields * (2 if code.signed else 1) == 256
    assert (np.diff(code.values) > 0).all() and 1 <= code.largest < 2 and code.values[0] == 0
    codes = np.arange(256)
    for scale in (1.0, 2.0**-90, 2.0**100, 0.37, 1e-25):
        scales = np.full(256, scale, dtype=np.float32)
        values = code.decode(codes, scales)
        amax = np.full(256, values.max(), dtype=np.float32)
        # The inverse is rounded: then a subnormal code's value may fall one draw in 65,536 short of it.
        exact = math.frexp(scale)[0] == 0.5
        normal = codes % code.fields >= 2**code.mantissa_bits
        for r in (0, 1, 2, 3, 1000, 32768, 65530, 65535):
            same = code.encode(values, amax, np.full(256, r)) == codes
            assert (same | (~normal & (r == 0) & (not exact))).all(), (scale, r)
    zero = code.encode(np.full(256, 1e-39, dtype=np.float32), np.zeros(256, dtype=np.float32), codes * 257)
    assert (zero == 0).all()


@pytest.mark.parametrize("code", CODES, ids=str)
def test_reference_codes_are_unbiased(code: Code) -> None:
    """All draws of a few values: one of the two codes around, in the mean the value."""
    scale, amax = np.ones(2**16, dtype=np.float32), np.full(2**16, code.largest)
    smallest = float(code.values[1])
    for value in (0.7, 0.123, 0.9999, float(code.largest) * 0.99, smallest * 1.3, smallest * 3.7):
        x = np.full(2**16, value, dtype=np.float32)
        found = code.decode(code.encode(x, amax, np.arange(2**16)), scale).astype(np.float64)
        above = np.searchsorted(code.values, x[0])
        assert set(found) <= {float(code.values[above - 1]), float(code.values[above])}
        width = float(code.values[above] - code.values[above - 1])
        assert abs(found.mean() - float(x[0])) < width * 2**-15
    tiny = np.full(2**16, smallest * 0.01, dtype=np.float32)
    codes = code.encode(tiny, amax, np.arange(2**16))
    assert codes.mean() == pytest.approx(0.01, rel=0.05) if code.signed else (codes == 1).all()


def test_reference_blocks() -> None:
    """Blocks end with a row; each has the scale of its own largest, which is stored as the largest code."""
    shape, block = (3, 300), 128
    x = np.random.default_rng(1).standard_normal(900).astype(np.float32)
    x[128:256] = 0
    x[300 + 256] = 100.0
    x[700] = np.nan
    codes, scales = encode_blocks(x, shape, block, EXP_AVG_CODE, np.zeros(900, dtype=np.int64))
    assert scales.shape == (3, 3)
    assert scales[0, 1] == 0 and np.isnan(scales[2, 0]) and np.isfinite(np.delete(scales, 6)).all()
    decoded = EXP_AVG_CODE.decode(codes, of_elements(scales, shape, block)).reshape(shape)
    assert decoded[1, 256] == pytest.approx(100.0, rel=1e-6) and codes[556] == EXP_AVG_CODE.fields - 1
    assert np.isnan(decoded[2, :128]).all() and not np.isnan(decoded[2, 128:]).any()
    assert not decoded[0, 128:256].any()
    assert np.abs(decoded[0] - x[:300]).max() < 0.3
