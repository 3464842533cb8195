"""Master weights, whole or split, are a training in float32; and weights changed from outside, in all forms."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from optimizers import BY_ID, CUDA_ON_HOST, Row, generator, gradients, name_of
from precision import (
    FORMS,
    HALVES,
    Case,
    bits16,
    bits32,
    floats,
    from_bits16,
    from_bits32,
    reconstruct,
    round_away,
    round_nearest,
    split,
)
from precision_cases import (
    KINDS,
    ROWS,
    Piece,
    Reference,
    SetPlace,
    Shape,
    case_name,
    make,
    params_of,
    set_grad,
    set_grads,
    value_of,
)
from reference import assert_same_bits, varied_values
from torch import Tensor
from torch.nn import Parameter

import fusedopt


@pytest.mark.parametrize("row", [BY_ID["adamw-decay"], KINDS[1], KINDS[2]], ids=name_of)
def test_split_is_a_master(row: Row) -> None:
    """For 10,000 steps of values of all magnitudes, and of updates that end on ties."""
    numel, steps = 300, 10_000
    g = generator(3)
    patterns = torch.randint(-(2**15), 2**15, (numel,), generator=g).to(torch.int16).view(torch.bfloat16)
    wild = [varied_values(numel, torch.bfloat16, g, finite=True), torch.where(patterns.isnan(), 1, patterns)]
    on_ties = torch.ones(64).copysign(torch.randn(64, generator=g)).bfloat16()
    optimizers = []
    for form in (True, "split"):
        params = [Parameter(value.clone()) for value in wild]
        optimizers.append(row.make(params, master_weights=form))
    ties = []
    for form in (True, "split"):  # by exactly lr in each step, half a unit in the last place of what is behind 1
        ties.append(
            fusedopt.Adam([Parameter(on_ties.clone())], lr=2**-8, betas=(0.0, 0.0), eps=0.0, master_weights=form)
        )
    noise = [varied_values(64 * numel, torch.bfloat16, g).view(64, numel) for _ in wild]
    noise = [
        torch.where(grads.isfinite() & (torch.rand(grads.shape, generator=g) < 0.999), grads, 0) for grads in noise
    ]
    signs = torch.ones(64, 64).copysign(torch.randn(64, 64, generator=g)).bfloat16()
    seen_ties = 0
    for step in range(steps):
        for optimizer in optimizers:
            for param, grads in zip(params_of(optimizer), noise, strict=True):
                param.grad = grads[step * 7 % 61]
        for optimizer in ties:
            params_of(optimizer)[0].grad = signs[step * 5 % 59]
        for optimizer in (*optimizers, *ties):
            optimizer.step()
        if step in (0, 1, 2, 10, 100) or step % 1000 == 999:
            for master, halved in (optimizers, ties):
                for p, q in zip(params_of(master), params_of(halved), strict=True):
                    assert_same_bits(q.detach(), p.detach(), f"after step {step}")
                    assert_same_bits(value_of(halved, q), value_of(master, p), f"master after step {step}")
            (param,) = params_of(ties[0])
            seen_ties += int((bits32(floats(ties[0].state[param]["master_param"])) & 0xFFFF == 0x8000).sum())
    assert seen_ties > 0


def float_patterns(count: int) -> np.ndarray:
    """float32 of random bits, and those around every border: of exponents, of bfloat16s, of ties."""
    bits = np.random.default_rng(1).integers(0, 2**32, count, dtype=np.uint32).astype(np.int64)
    low = np.array([0, 1, 2, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF])
    offsets = (np.array([0, 0x10000, 0x3F0000, 0x7E0000, 0x7F0000])[:, None] + low).ravel()
    borders = (np.arange(512)[:, None] << 23) + offsets
    return from_bits32(np.concatenate([bits, borders.ravel()]))


def stepped_in_place(x: np.ndarray, master_weights: bool | str) -> tuple[Tensor, Tensor]:
    """Parameter and companion after a step that leaves the value x alone (lr = 0, no gradient)."""
    p, remainder = split(x)
    param = Parameter(p.clone())
    param.grad = torch.zeros_like(p)
    optimizer = fusedopt.Adam([param], lr=0.0, master_weights=master_weights)
    name, companion = "param_remainder", remainder
    if master_weights is True:
        name, companion = "master_param", torch.from_numpy(x.copy())
    moments = {key: torch.zeros(len(x)) for key in ("exp_avg", "exp_avg_sq")}
    optimizer.state[param].update(step=torch.tensor(5.0), **moments, **{name: companion.clone()})
    optimizer.step()
    return param.detach(), optimizer.state[param][name]


def assert_both_masters_hold(x: np.ndarray) -> None:
    """Split, and whole: read, updated by nothing, stored. None is NaN."""
    expected_p, expected_remainder = split(x)
    p, remainder = stepped_in_place(x, "split")
    assert_same_bits(p, expected_p)
    assert_same_bits(remainder, expected_remainder)
    assert_same_bits(torch.from_numpy(reconstruct(p, remainder)), torch.from_numpy(x))
    p, master = stepped_in_place(x, True)
    assert_same_bits(p, expected_p)
    assert_same_bits(master, torch.from_numpy(x))


def test_split_holds_every_float(capability: str) -> None:
    assert_both_masters_hold(float_patterns(1_000_000))


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_masters_are_a_training_in_float32(row: Row, grad_dtype: torch.dtype) -> None:
    first = varied_values(1500, torch.bfloat16, generator(6))
    grads = list(gradients(1500, grad_dtype, 10))
    twin = Parameter(first.float())
    float32 = row.make([twin])
    optimizers = [row.make([Parameter(first.clone())], master_weights=form) for form in (True, "split")]
    for grad in grads:
        twin.grad = grad.float()
        float32.step()
        for optimizer in optimizers:
            (param,) = params_of(optimizer)
            set_grad(param, grad)
            optimizer.step()
            assert_same_bits(value_of(optimizer, param), twin.detach())
            assert_same_bits(param.detach(), round_away(floats(twin)))
            for name, value in float32.state[twin].items():
                assert_same_bits(optimizer.state[param][name], value, name)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda p: p * -1.5,
    "a_few": lambda p: torch.where(torch.arange(p.numel()).view(p.shape) % 3 == 0, p + 1, p),
    "to_nan": lambda p: torch.where(torch.arange(p.numel()).view(p.shape) % 5 == 0, math.nan, p),
    "to_a_neighbour": lambda p: (p.view(torch.int16) ^ 1).view(p.dtype),
    "the_same": lambda p: p.clone(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("case", [case for case in FORMS if case.dtype in HALVES], ids=case_name)
def test_changed_from_outside(case: Case, change: str, set_place: SetPlace) -> None:
    shapes: list[Shape] = [(129,), (3, 150)]
    which = [Piece(case, shape, i) for i, shape in enumerate(shapes)]
    values = [varied_values(math.prod(s), case.dtype, generator(i), wild=False).view(s) for i, s in enumerate(shapes)]
    for place in ("default", CUDA_ON_HOST):
        set_place(place)
        optimizer = make(KINDS[0], [case] * 2, values)
        reference = Reference(KINDS[0], [case] * 2, values)
        for step in range(3):
            grads = [piece.grads(3)[step] for piece in which]
            set_grads(params_of(optimizer), grads)
            optimizer.step()
            reference.step(grads)
            with torch.no_grad():
                for param, known in zip(params_of(optimizer), reference.known, strict=True):
                    assert_same_bits(param, known.param)
                    known.param = CHANGES[change](known.param)
                    param.copy_(known.param)
        grads = [piece.grads(3)[0] for piece in which]
        set_grads(params_of(optimizer), grads)
        optimizer.step()
        reference.step(grads)
        reference.assert_same(optimizer, f"on {place}")


@pytest.mark.parametrize("value", [0.0, -0.0, math.inf, -math.inf])
def test_a_zero_from_outside_is_a_zero(value: float, capability: str) -> None:
    """With "split", whatever the remainder is: weights that are pruned, or clamped, are no NaNs."""
    param = Parameter(torch.randn(1000, generator=generator(3)).bfloat16())
    optimizer = fusedopt.AdamW([param], master_weights="split")
    for seed in range(3):
        param.grad = torch.randn(1000, generator=generator(seed)).bfloat16()
        optimizer.step()
    with torch.no_grad():
        param.fill_(value)
    assert not optimizer.state_dict(portable=True)["state"][0]["master_param"].isnan().any()
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert not param.isnan().any()
    assert math.isinf(value) or float(param.detach().abs().max()) < 0.01


def test_what_a_change_from_outside_does() -> None:
    """A master begins anew with it; the remainder and the compensation are still added."""
    for form, name in (("master_weights", True), ("master_weights", "split"), ("rounding", "kahan")):
        param = Parameter(torch.tensor([1.0, 1.0], dtype=torch.bfloat16))
        optimizer = fusedopt.Adam([param], lr=1e-3, **{form: name})
        param.grad = torch.ones_like(param)
        optimizer.step()
        left = float(value_of(optimizer, param)[0]) - 1
        assert left == pytest.approx(-1e-3, rel=1e-2) and param[0] == 1
        with torch.no_grad():
            param[1] = 2.0
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.step()
        # In units in the last place the remainder of 2 is twice that of 1.
        kept = {True: 0.0, "split": None, "kahan": left}[name]
        value = float(value_of(optimizer, param)[1])
        if kept is None:
            expected = reconstruct(
                torch.tensor([2.0], dtype=torch.bfloat16), optimizer.state[param]["param_remainder"][:1]
            )
            assert value == float(expected[0]) < 2
        else:
            assert value == pytest.approx(2 + kept, rel=1e-6)
        assert float(value_of(optimizer, param)[0]) == 1 + left


# --- the reference itself --------------------------------------------------------------------------------------------


def test_reference_split() -> None:
    x = float_patterns(300_000)
    p, remainder = split(x)
    assert_same_bits(torch.from_numpy(reconstruct(p, remainder)), torch.from_numpy(x))
    # Every pair but those of a NaN is that of one float: here 65,536 remainders of a few bfloat16s.
    for bits in (0x0001, 0x3F80, 0xBF7F, 0x7F7F, 0x8001, 0xFF00):
        every = torch.arange(-(2**15), 2**15).to(torch.int16).unsqueeze(-1).view(torch.uint8)
        values = reconstruct(from_bits16(np.full(2**16, bits), torch.bfloat16), every)
        again_p, again = split(values)
        assert (bits16(again_p) == bits).all() and torch.equal(again, every)


def test_reference_round_away() -> None:
    x = torch.tensor([1.0 + 2**-8, -1.0 - 2**-8, 1.0 + 3 * 2**-8, 1.0 + 2**-9, 3.4e38, math.inf, math.nan])
    wanted = torch.tensor([1.0 + 2**-7, -1.0 - 2**-7, 1.0 + 2**-6, 1.0, 3.3961775e38, math.inf, math.nan])
    assert_same_bits(round_away(x.numpy()), wanted.bfloat16())
    patterns = float_patterns(100_000)
    tie = bits32(patterns) & 0xFFFF == 0x8000
    away, even = bits16(round_away(patterns)), bits16(round_nearest(patterns, torch.bfloat16))
    assert (away[~tie & ~np.isnan(patterns)] == even[~tie & ~np.isnan(patterns)]).all()
