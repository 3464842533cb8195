"""Automatic mixed precision: torch.amp.GradScaler drives the classes as it drives torch's."""

import copy
import pickle
from typing import Any

import pytest
import torch
from optimizers import BY_ID, VARIANTS, Row, generator, name_of
from reference import assert_same_bits, correctly_rounded_sqrt, flush_moments, transcription, varied_values
from torch import Tensor
from torch.amp import GradScaler
from torch.nn import Parameter
from torch.optim import Optimizer

import fusedopt

SIZES = (5, 1, 33, 0)
SCALES = [2.0**16, 3.0, 1000.0, 0.1]


def values(numel: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return varied_values(numel, dtype, generator(seed), wild=False)


def make_params(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    return [Parameter(values(n, n).to(dtype)) for n in SIZES]


def all_params(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def make_scaler(scale: float) -> GradScaler:
    scaler = GradScaler("cpu", init_scale=scale, growth_interval=3, growth_factor=1.7)
    scaler.scale(torch.ones(()))  # makes the scale a tensor, as the first loss does
    return scaler


def set_scaled_grads(optimizer: Optimizer, scaler: GradScaler, step: int, infinite: bool = False) -> None:
    for i, p in enumerate(all_params(optimizer)):
        p.grad = values(p.numel(), 100 * step + i, p.dtype) * scaler.get_scale()
    if infinite:
        all_params(optimizer)[1].grad.fill_(torch.inf)


def reference_step(scaler: GradScaler, optimizer: Optimizer) -> None:
    with correctly_rounded_sqrt():
        scaler.step(optimizer)
    if optimizer.state:
        flush_moments(optimizer)


def assert_same_training(ours: Optimizer, theirs: Optimizer) -> None:
    assert len(ours.state) == len(theirs.state)
    for p, q in zip(all_params(ours), all_params(theirs), strict=True):
        assert_same_bits(p.detach(), q.detach())
        for key, value in theirs.state.get(q, {}).items():
            assert_same_bits(ours.state[p][key], value, key)


@pytest.mark.parametrize("unscale", [False, True, None], ids=["fused", "unscale_", "in_turns"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("row", VARIANTS, ids=name_of)
def test_same_bits_as_torchs_loop_under_the_same_scaler(row: Row, scale: float, unscale: bool | None) -> None:
    """Scales of every kind, steps with an inf in between (the first among them), growth and backoff of the scale."""
    ours, theirs = row.make(make_params()), row.make_torch(make_params())
    scalers = make_scaler(scale), make_scaler(scale)
    seen = set()
    for step in range(9):
        for optimizer, scaler in zip((ours, theirs), scalers, strict=True):
            set_scaled_grads(optimizer, scaler, step, infinite=step in (0, 4, 5))
            if unscale or (unscale is None and step % 2):
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_value_(all_params(optimizer), 0.7)
        scalers[0].step(ours)
        reference_step(scalers[1], theirs)
        for scaler in scalers:
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        seen.add(scalers[0].get_scale())
        assert_same_training(ours, theirs)
    assert len(seen) > 2


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("flags", [{}, {"fused": True}, {"foreach": True}, {"differentiable": True}], ids=str)
def test_an_inf_skips_the_step(flags: dict[str, Any], bad: float) -> None:
    optimizer = fusedopt.AdamW(make_params(), **flags)
    scaler = make_scaler(1024.0)
    differentiable = "differentiable" in flags
    if differentiable:  # in place on leaves is not differentiable
        for group in optimizer.param_groups:
            group["params"] = [p.detach() for p in group["params"]]
    for step in range(2):
        set_scaled_grads(optimizer, scaler, step)
        scaler.step(optimizer)
        scaler.update()
    before = [(p.detach().clone(), p._version, copy.deepcopy(optimizer.state[p])) for p in all_params(optimizer)]
    set_scaled_grads(optimizer, scaler, 3)
    all_params(optimizer)[2].grad[17] = bad
    assert scaler.step(optimizer) is None
    scaler.update()
    assert scaler.get_scale() == 512.0
    for p, (data, version, state) in zip(all_params(optimizer), before, strict=True):
        assert_same_bits(p.detach(), data)
        assert p._version == version
        for key, value in state.items():
            assert_same_bits(optimizer.state[p][key], value)
    set_scaled_grads(optimizer, scaler, 4)
    scaler.step(optimizer)
    assert {s["step"].item() for s in optimizer.state.values()} == {3}


def test_an_inf_in_the_first_step_makes_no_state() -> None:
    optimizer = fusedopt.Adam(make_params())
    scaler = make_scaler(2.0)
    set_scaled_grads(optimizer, scaler, 0, infinite=True)
    scaler.step(optimizer)
    assert not any(optimizer.state.values())


@pytest.mark.parametrize("scale", [1024.0, 3000.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
def test_low_precision_parameters(dtype: torch.dtype, scale: float) -> None:
    """Unscaled in float32: the gradient is not rounded to the parameter's dtype in between, and stays scaled."""
    optimizer = BY_ID["adamw-decay"].make(make_params(dtype), eps=1e-4)
    scaler = make_scaler(scale)
    formula = transcription(optimizer)
    expected = [(p.detach(), formula.first_state(p)) for p in make_params(dtype)]
    for step in range(1, 5):
        set_scaled_grads(optimizer, scaler, step)
        grads = [p.grad.clone() for p in all_params(optimizer) if p.grad is not None]
        inv_scale = float(torch.tensor(1.0 / scaler.get_scale()))
        scaler.step(optimizer)
        scaler.update()
        for i, p in enumerate(all_params(optimizer)):
            param, state = expected[i]
            expected[i] = formula.step(param, grads[i], state, step, inv_scale)
            assert p.grad is not None
            assert_same_bits(p.grad, grads[i])
            assert_same_bits(p.detach(), expected[i][0])
            for name, value in expected[i][1].items():
                assert_same_bits(optimizer.state[p][name], value, name)


def test_the_scale_is_only_for_the_step_that_it_was_given_to() -> None:
    ours, plain = fusedopt.Adam(make_params()), fusedopt.Adam(make_params())
    scaler, unit = make_scaler(8.0), make_scaler(1.0)
    set_scaled_grads(ours, scaler, 0), set_scaled_grads(plain, unit, 0)
    scaler.step(ours)
    plain.step()
    assert not hasattr(ours, "grad_scale") and not hasattr(ours, "found_inf")
    set_scaled_grads(ours, unit, 1), set_scaled_grads(plain, unit, 1)
    ours.step(), plain.step()
    assert_same_training(ours, plain)


@pytest.mark.parametrize(
    ("what", "value", "message"),
    [
        (
            "grad_scale",
            lambda: torch.tensor(2.0, dtype=torch.float64),
            r"grad_scale must be a one-element torch\.float32",
        ),
        ("grad_scale", lambda: torch.tensor(2.0, dtype=torch.float16), r"grad_scale must be"),
        ("grad_scale", lambda: torch.tensor(2), r"grad_scale"),
        ("grad_scale", lambda: torch.tensor([2.0, 3.0]), r"grad_scale must be a one-element"),
        ("grad_scale", lambda: torch.empty((), device="meta"), r"grad_scale .*meta"),
        ("grad_scale", lambda: 2.0, r"grad_scale is not a tensor but a float"),
        (
            "found_inf",
            lambda: torch.tensor(0.0, dtype=torch.float64),
            r"found_inf must be a one-element torch\.float32",
        ),
        ("found_inf", lambda: torch.empty((), device="meta"), r"found_inf .*meta"),
        ("found_inf", lambda: True, r"found_inf is not a tensor but a bool"),
    ],
)
def test_wrong_scale_or_verdict(what: str, value: Any, message: str) -> None:
    optimizer = fusedopt.Adam(make_params())
    set_scaled_grads(optimizer, make_scaler(1.0), 0)
    setattr(optimizer, what, value())
    with pytest.raises(RuntimeError, match=f"^Adam: {message}"):
        optimizer.step()
    assert not optimizer.state
    assert all(p._version == 0 for p in all_params(optimizer))
    delattr(optimizer, what)
    optimizer.step()


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_still_honour_the_scaler(way: str) -> None:
    optimizer: Optimizer = fusedopt.AdamW(make_params())
    scaler = make_scaler(256.0)
    set_scaled_grads(optimizer, scaler, 0)
    scaler.step(optimizer)
    scaler.update()
    other = copy.deepcopy(optimizer) if way == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    scalers = scaler, make_scaler(scaler.get_scale())
    for step in (1, 2):
        for o, s in zip((optimizer, other), scalers, strict=True):
            set_scaled_grads(o, s, step, infinite=step == 1)
            s.step(o)
            s.update()
    assert_same_training(other, optimizer)
    assert scalers[1].get_scale() == 128.0
    assert {s["step"].item() for s in other.state.values()} == {2}


def test_one_scaler_for_two_optimizers() -> None:
    ours = [BY_ID["adam"].make(make_params()), BY_ID["adamw-decay"].make(make_params())]
    theirs = [BY_ID["adam"].make_torch(make_params()), BY_ID["adamw-decay"].make_torch(make_params())]
    scalers = make_scaler(3.0), make_scaler(3.0)
    for step in range(4):
        for optimizers, scaler in zip((ours, theirs), scalers, strict=True):
            for optimizer in optimizers:
                set_scaled_grads(optimizer, scaler, step, infinite=step == 1 and optimizer is optimizers[1])
        for optimizer in ours:
            scalers[0].step(optimizer)
        for optimizer in theirs:
            reference_step(scalers[1], optimizer)
        for scaler in scalers:
            scaler.update()
    for a, b in zip(ours, theirs, strict=True):
        assert_same_training(a, b)
    assert ours[0].state[all_params(ours[0])[0]]["step"] == 4
    assert ours[1].state[all_params(ours[1])[0]]["step"] == 3


def test_training_in_autocast() -> None:
    """The whole loop of a user, with a real backward."""
    losses = []
    for cls in (fusedopt.AdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        x = torch.randn(64, 8)
        optimizer, scaler = cls(module.parameters(), lr=1e-2), GradScaler("cpu", init_scale=64.0)
        history = []
        for _ in range(30):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = (module(x).float() - x.sum(1, keepdim=True)).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            history.append(loss.item())
        losses.append(history)
    assert losses[0][-1] < losses[0][0] / 2
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
