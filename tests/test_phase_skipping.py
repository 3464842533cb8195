"""Steps that are skipped, by skip_nonfinite or by a GradScaler, and what a GradScaler has to do with a step."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from optimizers import BY_ID, CUDA_ON_HOST, ON_DEVICE, VARIANTS, Row, generator, name_of
from phase_cases import Separate, bytes_of, make_grads, make_params, params_of, set_grads
from reference import assert_same_bits
from torch import Tensor
from torch.nn import Parameter

import fusedopt

# --- skipping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["cpu", ON_DEVICE], indirect=True)
@pytest.mark.parametrize("more", [{}, {"max_grad_norm": 1.0, "ema_decay": 0.9, "stats": True}], ids=["alone", "all"])
def test_a_nonfinite_gradient_anywhere_changes_no_byte(more: dict[str, Any], place: str) -> None:
    """In the last element of the last tensor, then in 1,000 random places."""
    params = make_params(sizes=(5, 130, 1, 4100, 33))
    optimizer = fusedopt.AdamW(params, skip_nonfinite=True, amsgrad=True, **more)
    for step in range(2):
        set_grads(params, make_grads(step, params))
        optimizer.step()
    before, versions = bytes_of(optimizer), [p._version for p in params]
    set_grads(params, make_grads(9, params))
    flat = [p.grad for p in params if p.grad is not None]
    total = sum(grad.numel() for grad in flat)
    g = generator(5)
    places = [total - 1, *torch.randint(total, (1000,), generator=g).tolist()]
    for count, index in enumerate(places, start=1):
        for grad in flat:
            if index < grad.numel():
                break
            index -= grad.numel()
        kept = grad[index].item()
        grad[index] = (math.inf, -math.inf, math.nan)[count % 3]
        optimizer.step()
        grad[index] = kept
        assert bytes_of(optimizer) == before
        if count % 100 == 1:
            assert optimizer.skipped_steps == count
    if place == "cpu":
        assert [p._version for p in params] == versions
    optimizer.step()
    assert optimizer.skipped_steps == len(places)
    assert all(now != then for now, then in zip(bytes_of(optimizer), before, strict=True))
    assert {state["step"].item() for state in optimizer.state.values()} == {3}


def test_a_first_step_that_is_skipped_makes_no_state() -> None:
    params = make_params()
    optimizer = fusedopt.Adam(params, skip_nonfinite=True, ema_decay=0.9)
    set_grads(params, [torch.full_like(p, math.nan) for p in params])
    optimizer.step()
    assert not optimizer.state and optimizer.skipped_steps == 1


def test_counts_on_the_host_cannot_be_skipped_by_the_device(set_place: Callable[[str], None]) -> None:
    params = make_params()
    optimizer = fusedopt.Adam(params, skip_nonfinite=True)
    set_grads(params, make_grads(0, params))
    set_place(CUDA_ON_HOST)  # numbers are the host's there
    with pytest.raises(RuntimeError, match=r"step count is on the CPU, but the GPU decides .* skip_nonfinite=True"):
        optimizer.step()


# --- GradScaler ------------------------------------------------------------------------------------------------------


def set_scaled_grads(params: Sequence[Tensor], scaler: torch.amp.GradScaler, step: int) -> None:
    set_grads(params, [None if g is None else g * scaler.get_scale() for g in make_grads(step, params, (1,))])
    if step in (0, 3, 4):
        assert params[2].grad is not None
        params[2].grad[7] = (math.inf, math.nan)[step % 2]


@pytest.mark.parametrize("unscale", [False, True], ids=["in_step", "unscale_"])
@pytest.mark.parametrize("more", [{}, {"max_grad_norm": 0.5, "ema_decay": 0.9, "stats": True}], ids=["alone", "all"])
@pytest.mark.parametrize("row", VARIANTS, ids=name_of)
def test_our_scaler_is_torchs(row: Row, more: dict[str, Any], unscale: bool) -> None:
    """The same bits and the same scales as torch's own, with ours and with theirs."""
    optimizers = [row.make(make_params(), **more) for _ in range(2)]
    kinds = (fusedopt.GradScaler, torch.amp.GradScaler)
    scalers = [kind("cpu", init_scale=1024.0, growth_interval=2, growth_factor=1.7) for kind in kinds]
    for step in range(8):
        for optimizer, scaler in zip(optimizers, scalers, strict=True):
            scaler.scale(torch.ones(()))
            set_scaled_grads(params_of(optimizer), scaler, step)
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        for p, q in zip(*map(params_of, optimizers), strict=True):
            assert_same_bits(p, q, f"after step {step}")
            assert optimizers[0].state[p].keys() == optimizers[1].state[q].keys()
            for name, value in optimizers[1].state[q].items():
                assert_same_bits(optimizers[0].state[p][name], value, name)
    assert optimizers[0].skipped_steps == optimizers[1].skipped_steps == 3
    counts = [optimizers[0].state[p].get("step", 0) for p in params_of(optimizers[0])]
    assert counts == [5, 0, 5, 5, 5, 5]


def test_our_scaler_for_others_optimizers() -> None:
    results = []
    for kind in (fusedopt.GradScaler, torch.amp.GradScaler):
        params = make_params()
        optimizer, scaler = torch.optim.AdamW(params), kind("cpu", init_scale=8.0)
        for step in range(5):
            scaler.scale(torch.ones(()))
            set_scaled_grads(params, scaler, step)
            scaler.step(optimizer)
            scaler.update()
        results.append((params, scaler.get_scale()))
    assert results[0][1] == results[1][1]
    for p, q in zip(results[0][0], results[1][0], strict=True):
        assert_same_bits(p, q)


def test_our_scaler_does_not_write_the_gradients() -> None:
    """Torch's check multiplies them all by 1."""
    params = make_params()
    optimizer, scaler = fusedopt.AdamW(params), fusedopt.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    set_grads(params, make_grads(0, params))
    versions = [p.grad._version for p in params if p.grad is not None]
    scaler.step(optimizer)
    assert [p.grad._version for p in params if p.grad is not None] == versions


@pytest.mark.parametrize("place", [ON_DEVICE], indirect=True)
@pytest.mark.parametrize("mine", [True, False], ids=["ours", "stock"])
def test_a_scaler_on_the_device(mine: bool, place: str) -> None:
    """What GradScaler leaves on the optimizer lies on the device there."""
    params, twins = make_params(), make_params()
    on_device = fusedopt.AdamW(params, fused=True, max_grad_norm=0.5, ema_decay=0.9)
    row = BY_ID["adamw-decay"]
    theirs = Separate(row, row.make(twins, weight_decay=0.01, max_grad_norm=0.5, ema_decay=0.9), torch.float32)
    theirs.optimizer.param_groups[0]["weight_decay"] = 0.01
    skipped = 0
    for step in range(6):
        infinite = step in (0, 3)
        grads = [None if g is None else g * 8.0 for g in make_grads(step, params)]
        if infinite:
            assert grads[4] is not None
            grads[4][4999] = math.nan
        skipped += infinite
        set_grads(params, grads)
        on_device.grad_scale = torch.tensor(8.0)
        on_device.found_inf = torch.tensor(float(infinite and not mine))
        if mine:
            on_device._report_inf = verdict = torch.zeros(())
        on_device.step()
        if mine:
            assert verdict == infinite
        if not infinite:
            theirs.step(grads, on_device.grad_norm, 0.125)
        theirs.assert_same(on_device, f"after step {step}")
        assert on_device.skipped_steps == skipped


@pytest.mark.parametrize("kind", [fusedopt.GradScaler, torch.amp.GradScaler], ids=["ours", "torchs"])
def test_what_comes_in_behind_unscale_is_skipped_too(kind: Any) -> None:
    params = make_params()
    optimizer, scaler = fusedopt.AdamW(params, skip_nonfinite=True), kind("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    set_grads(params, make_grads(0, params))
    scaler.unscale_(optimizer)
    assert params[4].grad is not None
    params[4].grad[3] = math.nan
    before = bytes_of(optimizer)
    scaler.step(optimizer)
    assert bytes_of(optimizer) == before and optimizer.skipped_steps == 1


@pytest.mark.parametrize("kind", [fusedopt.GradScaler, torch.amp.GradScaler], ids=["ours", "torchs"])
def test_an_optimizer_without_gradients_under_a_scaler(kind: Any) -> None:
    used, unused = (fusedopt.AdamW(make_params()) for _ in range(2))
    scaler = kind("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    set_grads(params_of(used), make_grads(0, params_of(used)))
    for optimizer in (used, unused):
        scaler.step(optimizer)
    scaler.update()
    assert used.state and not unused.state


def test_a_step_that_raises_leaves_no_scale_behind() -> None:
    params = make_params()
    optimizer, scaler = fusedopt.AdamW(params, ema_decay=0.9), fusedopt.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    set_grads(params, make_grads(0, params))
    with pytest.raises(RuntimeError, match="step after it"), optimizer.ema_weights():
        scaler.step(optimizer)
    assert not {"grad_scale", "found_inf", "_report_inf"} & vars(optimizer).keys()
    with pytest.raises(AttributeError):
        scaler.step(None)


def test_a_scale_below_one_is_looked_at_all_the_same() -> None:
    """torch's check is of the scaled gradients, which may be finite where the unscaled are not."""
    param = Parameter(torch.ones(2))
    optimizer, scaler = fusedopt.AdamW([param], skip_nonfinite=True), torch.amp.GradScaler("cpu", init_scale=1e-5)
    scaler.scale(torch.ones(()))
    param.grad = torch.tensor([3e38, 1.0])
    scaler.step(optimizer)
    assert torch.equal(param, torch.ones(2)) and optimizer.skipped_steps == 1
