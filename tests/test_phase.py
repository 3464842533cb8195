"""The whole optimizer phase in the step: unscale, norm, clip, skip, update, average, measure.

The reference does the same by torch's separate operations, in the documented order.
"""

import contextlib
import copy
import ctypes
import inspect
import io
import itertools
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from optimizers import (
    BY_ID,
    CUDA_ON_HOST,
    DTYPES,
    FLOATS,
    OWN_VARIANTS,
    ROWS,
    TARGETS,
    VARIANTS,
    Row,
    generator,
    name_of,
)
from reference import assert_same_bits, torch_loop_step, transcription, varied_values
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fusedopt
from fusedopt._config import _C

SIZES = (5, 1, 33, 0, 5000, 130)
ON_DEVICE = "counts_on_device"  # cuda_on_host, with the step counts and all other numbers on the pretended device
PLACES = [*TARGETS, ON_DEVICE]


@pytest.fixture
def set_place(request: pytest.FixtureRequest, set_capability: Callable[[str], None]) -> Callable[[str], None]:
    def choose(name: str) -> None:
        set_capability(CUDA_ON_HOST if name == ON_DEVICE else name)
        if name == ON_DEVICE:
            _C.set_cuda_on_host(request.getfixturevalue("cuda_library")._name, True)

    return choose


@pytest.fixture(params=["cpu", CUDA_ON_HOST, ON_DEVICE])
def place(request: pytest.FixtureRequest, set_place: Callable[[str], None]) -> str:
    """The CPU, and the other driver with the step counts on the host and on the device."""
    if request.param != "cpu":
        set_place(request.param)
    return request.param


def make_params(dtype: torch.dtype = torch.float32, sizes: Sequence[int] = SIZES) -> list[Parameter]:
    g = generator(1)
    return [Parameter(varied_values(size, dtype, g, wild=False)) for size in sizes]


def make_grads(step: int, params: Sequence[Tensor], lacking: Sequence[int] = ()) -> list[Tensor | None]:
    g = generator(100 + step)
    grads = [varied_values(p.numel(), p.dtype, g, wild=False).view(p.shape) for p in params]
    return [None if i in lacking else grad for i, grad in enumerate(grads)]


def set_grads(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = None if grad is None else grad.clone()


def params_of(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def opmath(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def unscaled(grads: Sequence[Tensor | None], inv_scale: float | None) -> list[Tensor]:
    """The gradients that there are, in opmath."""
    found = [grad.to(opmath(grad.dtype)) for grad in grads if grad is not None]
    return found if inv_scale is None else [grad * inv_scale for grad in found]


def exact_norm(grads: Sequence[Tensor], order: float = 2.0) -> float:
    values = torch.cat([grad.double().abs().flatten() for grad in grads])
    if order == math.inf:
        return values.max().item()
    return math.sqrt(math.fsum((values**2).tolist())) if values.isfinite().all() else math.nan


def within_an_ulp(actual: Tensor, exact: float) -> bool:
    """Within one unit in the last place of its dtype of what an exact norm rounds to."""
    wanted = torch.tensor(exact, dtype=actual.dtype)
    up, down = (torch.nextafter(wanted, torch.tensor(x, dtype=actual.dtype)) for x in (math.inf, -math.inf))
    return bool(down <= actual <= up) or (math.isnan(exact) and not actual.isfinite())


class Separate:
    """An optimizer and what is around it by torch's operations, one after the other, on parameters of their own."""

    def __init__(self, row: Row, ours: Optimizer, dtype: torch.dtype) -> None:
        self.options = ours.param_groups[0]
        self.params = [Parameter(p.detach().clone()) for p in params_of(ours)]
        self.formula = None
        if row.own or dtype not in FLOATS:
            self.formula = transcription(ours)
            self.state = [self.formula.first_state(p) for p in self.params]
            self.counts = [0] * len(self.params)
        else:
            self.optimizer = row.make_torch(self.params)
        module = torch.nn.ParameterList(self.params)
        decay = self.options["ema_decay"]
        self.averaged = None if decay is None else AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.module = module

    def step(self, grads: Sequence[Tensor | None], norm: Tensor | None, inv_scale: float | None = None) -> bool:
        """Whether it was not skipped. `norm`: what ours measured, whose last bit may not be torch's."""
        if self.options["skip_nonfinite"] and not all(g.isfinite().all() for g in unscaled(grads, inv_scale)):
            return False
        coefficient = None
        if self.options["max_grad_norm"] is not None:
            assert norm is not None
            coefficient = torch.clamp(self.options["max_grad_norm"] / (norm + 1e-6), max=1.0)
        if self.formula is not None:
            self._transcribed(grads, inv_scale, coefficient)
        else:
            set_grads(self.params, grads)
            for param in self.params:
                if param.grad is not None and inv_scale is not None:
                    param.grad.mul_(inv_scale)
                if param.grad is not None and coefficient is not None:
                    param.grad.mul_(coefficient)
            torch_loop_step(self.optimizer)
        if self.averaged is not None:
            self.averaged.update_parameters(self.module)
        return True

    def _transcribed(self, grads: Sequence[Tensor | None], inv_scale: float | None, coefficient: Tensor | None) -> None:
        assert self.formula is not None
        clip = None if coefficient is None else coefficient.item()
        for i, grad in enumerate(grads):
            if grad is None:
                continue
            self.counts[i] += 1
            param = self.params[i].detach()
            new, self.state[i] = self.formula.step(param, grad, self.state[i], self.counts[i], inv_scale, clip)
            param.copy_(new)

    def state_of(self, i: int) -> dict[str, Tensor]:
        if self.formula is not None:
            return self.state[i] if self.counts[i] else {}
        return {k: v for k, v in self.optimizer.state.get(self.params[i], {}).items() if k != "step"}

    def assert_same(self, ours: Optimizer, when: str) -> None:
        averages = list(self.averaged.module.parameters()) if self.averaged is not None else []
        for i, param in enumerate(params_of(ours)):
            assert_same_bits(param, self.params[i], f"parameter {i} {when}")
            state = ours.state.get(param, {})
            for name, value in self.state_of(i).items():
                assert_same_bits(state[name], value, f"{name} of parameter {i} {when}")
            if averages:
                # Of a parameter that never moved there is none: it is the average.
                assert_same_bits(state.get("ema", param), averages[i].detach(), f"ema of parameter {i} {when}")


def expected_stats(before: Tensor, after: Tensor, grad: Tensor, lost: int | None) -> dict[str, float]:
    op = opmath(before.dtype)
    old, new, g = before.to(op), after.to(op), grad.to(op)
    ratios = ((new - old).abs() / old.abs())[old.isfinite() & (old != 0)]
    norms = {
        "grad_norm": g.double().norm(),
        "param_norm": new.double().norm(),
        "update_norm": (new.double() - old.double()).norm(),
    }
    found: dict[str, float] = {name: norm.to(op).item() for name, norm in norms.items()}
    found["max_relative_update"] = ratios.max().item() if ratios.numel() else 0.0
    found["nonfinite_grads"] = int((~g.isfinite()).sum())
    if lost is not None:
        found["lost_updates"] = lost
    return found


def assert_close_stats(actual: dict[str, float], expected: dict[str, float], dtype: torch.dtype, when: str) -> None:
    for name, value in expected.items():
        # Norms are sums of 16 squares in opmath, then in double: 2.2e-8 was the largest relative error seen (float32),
        # so they round to a neighbour at most.
        tolerance = 1.2e-7 if name.endswith("_norm") else 0
        assert actual[name] == pytest.approx(value, rel=tolerance, abs=0, nan_ok=True), f"{name} {when}"
        if dtype != torch.float64 and not math.isnan(actual[name]):
            assert float(np.float32(actual[name])) == actual[name], f"{name} is no float {when}"


COMBINATIONS = [
    {"max_grad_norm": clip, "norm_type": order, "skip_nonfinite": skip, "ema_decay": ema, "stats": stats}
    for (clip, order), skip, ema, stats in itertools.product(
        [(None, 2.0), (0.7, 2.0), (0.7, math.inf)], [False, True], [None, 0.9], [False, True]
    )
]


def combination_name(options: dict[str, Any]) -> str:
    clip = {(None, 2.0): "", (0.7, 2.0): "clip", (0.7, math.inf): "clip_inf"}[
        options["max_grad_norm"], options["norm_type"]
    ]
    flags = [name for name in ("skip_nonfinite", "ema_decay", "stats") if options[name]]
    return "+".join([clip, *flags]).strip("+") or "nothing"


def run_beside_reference(
    row: Row, options: dict[str, Any], place: str, dtype: torch.dtype = torch.float32, steps: int = 6
) -> None:
    """Steps with all gradients, with some missing, one with an inf, and with a scale that comes and goes."""
    if options["skip_nonfinite"] and place == CUDA_ON_HOST:
        options = {**options, "skip_nonfinite": False}  # the device decides, and must count
    params = make_params(dtype)
    if place == ON_DEVICE:
        options = {**options, **row.on_device()}
    ours = row.make(params, **options)
    theirs = Separate(row, ours, dtype)
    for step in range(steps):
        grads = make_grads(step, params, lacking={1: (2,), 3: (0, 4)}.get(step, ()))
        if step == 2 and options["skip_nonfinite"]:
            last = grads[5]
            assert last is not None
            last[-1] = math.inf
        scale = 3.0 if step % 2 else None
        inv_scale = None if scale is None else float(torch.tensor(1.0 / scale))
        if scale is not None:
            grads = [grad if grad is None else grad * scale for grad in grads]
            ours.grad_scale, ours.found_inf = torch.tensor(scale), torch.tensor(0.0)
            if options["skip_nonfinite"]:
                del ours.found_inf
        set_grads(params, grads)
        kept = [None if p.grad is None else p.grad.clone() for p in params]
        before = [p.detach().clone() for p in params]
        ours.step()
        for name in {"grad_scale", "found_inf"} & vars(ours).keys():
            delattr(ours, name)
        when = f"after step {step}"
        for p, grad in zip(params, kept, strict=True):
            if grad is not None:
                assert p.grad is not None
                assert_same_bits(p.grad, grad, f"the gradient {when}")  # read, never written
        norm = ours.grad_norm
        if options["max_grad_norm"] is not None:
            assert norm is not None and norm.dtype == opmath(dtype) and norm.shape == ()
            assert within_an_ulp(norm, exact_norm(unscaled(grads, inv_scale), options["norm_type"])), when
        moved = theirs.step(grads, norm, inv_scale)
        theirs.assert_same(ours, when)
        if options["stats"]:
            found = ours.stats()
            assert list(found) == [f"0.{i}" for i, grad in enumerate(grads) if grad is not None]
            for i, grad in enumerate(grads):
                if grad is None:
                    continue
                (g,) = unscaled([grad], inv_scale)
                expected = expected_stats(before[i], params[i].detach(), g, None if moved else 0)
                assert_close_stats(found[f"0.{i}"], expected, dtype, f"of parameter {i} {when}")
    assert ours.skipped_steps == (1 if options["skip_nonfinite"] else 0)


@pytest.mark.parametrize("options", COMBINATIONS, ids=combination_name)
@pytest.mark.parametrize("row", [*VARIANTS, *OWN_VARIANTS], ids=name_of)
def test_every_combination(row: Row, options: dict[str, Any], place: str) -> None:
    run_beside_reference(row, options, place)


EVERYTHING = {"max_grad_norm": 0.7, "norm_type": 2.0, "skip_nonfinite": True, "ema_decay": 0.99, "stats": True}


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_everything_on_every_row(row: Row) -> None:
    run_beside_reference(row, EVERYTHING, "cpu", steps=4)


@pytest.mark.parametrize("options", [EVERYTHING, {**EVERYTHING, "ema_decay": 0.3, "norm_type": math.inf}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("row", [BY_ID["adamw-decay"], BY_ID["radam"], BY_ID["adagrad"]], ids=name_of)
def test_other_dtypes(row: Row, dtype: torch.dtype, options: dict[str, Any], place: str) -> None:
    run_beside_reference(row, options, place, dtype)


# --- the norm ----------------------------------------------------------------------------------------------------


def norm_of(grads: Sequence[Tensor], order: float = 2.0, **more: Any) -> Tensor:
    params = [Parameter(torch.zeros_like(grad, memory_format=torch.preserve_format)) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer = fusedopt.Adam(params, max_grad_norm=1.0, norm_type=order, **more)
    optimizer.step()
    assert optimizer.grad_norm is not None
    return optimizer.grad_norm


def various_grads(dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Of all sizes and layouts: transposed, sliced, expanded, 0-d, empty, complex."""
    g = generator(7)
    grads = []
    for dtype in dtypes:
        grads += [varied_values(size, dtype, g, finite=True) for size in (1, 31, 32, 33, 4095, 4096, 4097, 20_011, 0)]
        grads.append(varied_values(60 * 70, dtype, g, wild=False).view(60, 70).t())
        grads.append(varied_values(300 * 40, dtype, g, wild=False).view(300, 40)[:, 3:20])
        grads.append(varied_values(1, dtype, g, wild=False).expand(77))
        grads.append(varied_values(1, dtype, g, wild=False).view(()))
    return grads


@pytest.mark.parametrize("order", [2.0, math.inf])
@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.bfloat16, torch.float16], DTYPES, [torch.float64]], ids=str)
def test_the_norms_bits_depend_on_nothing(
    dtypes: list[torch.dtype],
    order: float,
    set_place: Callable[[str], None],
    threads: Callable[[int], None],
    chunk_size: Callable[[int], None],
) -> None:
    grads = various_grads(dtypes)
    expected = norm_of(grads, order)
    assert within_an_ulp(expected, exact_norm(grads, order))
    assert expected.dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
    for count, size in ((1, 64), (2, 64), (3, 1000), (3, 5000)):
        threads(count)
        chunk_size(size)
        assert_same_bits(norm_of(grads, order), expected)
    for place in PLACES:
        set_place(place)
        more = {"capturable": True} if place == ON_DEVICE else {}
        assert_same_bits(norm_of(grads, order, **more), expected, place)


def test_the_norm_of_complex_gradients() -> None:
    g = generator(3)
    grads = [varied_values(1000, dtype, g, wild=False) for dtype in (torch.complex64, torch.complex64)]
    norm = norm_of(grads)
    assert within_an_ulp(norm, exact_norm([torch.view_as_real(grad) for grad in grads]))
    with pytest.raises(RuntimeError, match=r"params'\]\[0\]: the parameter is complex, .* norm_type=2\.0"):
        norm_of(grads, math.inf)


def test_the_norm_is_over_all_groups() -> None:
    params = make_params()
    optimizer = fusedopt.AdamW([{"params": params[:2]}, {"params": params[2:], "lr": 0.1}], max_grad_norm=1.0)
    grads = make_grads(0, params)
    set_grads(params, grads)
    optimizer.step()
    assert optimizer.grad_norm is not None
    assert within_an_ulp(optimizer.grad_norm, exact_norm([grad for grad in grads if grad is not None]))


def test_a_norm_of_doubles_that_overflows_is_not_a_gradient_that_is_infinite() -> None:
    param = Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = fusedopt.Adam([param], max_grad_norm=1.0, skip_nonfinite=True)
    param.grad = torch.tensor([1e200, 1.0, 1.0], dtype=torch.float64)
    optimizer.step()
    assert optimizer.grad_norm == math.inf and optimizer.skipped_steps == 0
    assert optimizer.state[param]["step"] == 1


def test_the_coefficient_is_torchs() -> None:
    """Bit for bit, at and around 1, where the 1e-6 shows."""
    for norm, most in [(1.0, 1.0), (1.0, 1.000001), (1e-7, 1e-7), (3.0, 0.1), (1e-6, 1e-6), (0.0, 1.0), (5.0, 0.0)]:
        grad = torch.tensor([norm, 0.0])
        ours, theirs = (Parameter(torch.ones(2)) for _ in range(2))
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        fusedopt.clip_grad_norm_([ours], most)
        torch.nn.utils.clip_grad_norm_([theirs], most, foreach=False)
        assert_same_bits(ours.grad, theirs.grad, f"norm {norm}, at most {most}")
        adagrad, expected = fusedopt.Adagrad([ours], max_grad_norm=most), torch.optim.Adagrad([theirs])
        ours.grad = grad.clone()
        adagrad.step()
        expected.step()
        assert_same_bits(adagrad.state[ours]["sum"], expected.state[theirs]["sum"])


def test_a_nonfinite_norm_clips_as_in_torch() -> None:
    for bad in (math.inf, math.nan):
        ours, theirs = ([Parameter(torch.ones(3)) for _ in range(2)] for _ in range(2))
        optimizer, expected = fusedopt.Adam(ours, max_grad_norm=1.0), torch.optim.Adam(theirs, foreach=False)
        for params in (ours, theirs):
            params[0].grad, params[1].grad = torch.tensor([1.0, bad, 2.0]), torch.ones(3)
        optimizer.step()
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        torch_loop_step(expected)
        for p, q in zip(ours, theirs, strict=True):
            assert_same_bits(p, q)


# --- clip_grad_norm_ -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["cpu", CUDA_ON_HOST])
@pytest.mark.parametrize("order", [2.0, 2, math.inf, "inf", 1.0, 3.0])
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_clip_grad_norm(dtype: torch.dtype, order: Any, place: str, set_place: Callable[[str], None]) -> None:
    if place != "cpu":
        set_place(place)
    for most in (0.5, 1e6):
        params, twins = make_params(dtype, (5, 1, 33, 5000)), make_params(dtype, (5, 1, 33, 5000))
        grads = make_grads(0, params, lacking=(1,))
        set_grads(params, grads)
        set_grads(twins, grads)
        versions = [p.grad._version for p in params if p.grad is not None]
        norm = fusedopt.clip_grad_norm_(iter(params), most, order)
        theirs = torch.nn.utils.clip_grad_norm_(twins, most, order)
        assert (norm.dtype, norm.shape) == (theirs.dtype, theirs.shape)
        assert norm.item() == pytest.approx(theirs.item(), rel=1e-6)  # torch's adds up in float32
        if float(order) in (2.0, math.inf):
            assert within_an_ulp(norm, exact_norm([g for g in grads if g is not None], float(order)))
        coefficient = torch.clamp(most / (norm + 1e-6), max=1.0)
        for param, grad, version in zip(
            [p for p in params if p.grad is not None], [g for g in grads if g is not None], versions, strict=True
        ):
            assert param.grad is not None
            assert_same_bits(param.grad, grad * coefficient)
            assert param.grad._version > version


def test_clip_grad_norm_of_one_tensor_and_of_none() -> None:
    param = Parameter(torch.ones(4))
    assert fusedopt.clip_grad_norm_(param, 1.0) == 0
    param.grad = torch.full((4,), 3.0)
    assert fusedopt.clip_grad_norm_(param, 1.0) == 6
    assert param.grad.norm() == pytest.approx(1.0, rel=1e-6)
    assert fusedopt.clip_grad_norm_([], 1.0) == 0


def test_clip_grad_norm_refuses_what_is_not_finite() -> None:
    for bad in (math.inf, math.nan):
        param = Parameter(torch.ones(2))
        param.grad = torch.tensor([1.0, bad])
        with pytest.raises(RuntimeError, match=r"norm of order 2\.0 of the gradients is (inf|nan), so they were not"):
            fusedopt.clip_grad_norm_([param], 1.0, error_if_nonfinite=True)
        assert param.grad[0] == 1


def test_clip_grad_norm_of_what_torch_knows_better() -> None:
    """Gradients in one memory, and tensors whose gradient is of another kind."""
    shared = torch.ones(6)
    params, twins = ([Parameter(torch.ones(4)) for _ in range(2)] for _ in range(2))
    for tensors, memory in ((params, shared), (twins, shared.clone())):
        tensors[0].grad, tensors[1].grad = memory[:4], memory[2:]
    fusedopt.clip_grad_norm_(params, 0.5)
    torch.nn.utils.clip_grad_norm_(twins, 0.5)
    for p, q in zip(params, twins, strict=True):
        assert p.grad is not None and q.grad is not None
        assert_same_bits(p.grad, q.grad)
    # Transposed and sliced ones are the native path's.
    param = Parameter(torch.ones(5, 4))
    param.grad = torch.arange(20.0).view(4, 5).t()
    norm = fusedopt.clip_grad_norm_([param], 1.0)
    assert_same_bits(param.grad, torch.arange(20.0).view(4, 5).t() * (1.0 / (norm + 1e-6)))


# --- skipping ------------------------------------------------------------------------------------------------------


def bytes_of(optimizer: Optimizer) -> list[bytes]:
    tensors = [p.detach() for p in params_of(optimizer)]
    for state in optimizer.state.values():
        tensors += [value for _, value in sorted(state.items())]
    return [tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"" for tensor in tensors]


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


# --- GradScaler ----------------------------------------------------------------------------------------------------


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


# --- the moving average --------------------------------------------------------------------------------------------


class Averaged:
    """An optimizer with ema_decay beside torch's average of the same weights."""

    def __init__(self, decay: float = 0.9, cls: type[Optimizer] = fusedopt.AdamW, **more: Any) -> None:
        self.params = make_params()
        self.optimizer = cls(self.params, ema_decay=decay, **more)
        self.module = torch.nn.ParameterList(self.params)
        self.average = AveragedModel(self.module, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def step(self, number: int, lacking: Sequence[int] = (), average: bool = True) -> None:
        set_grads(self.params, make_grads(number, self.params, lacking))
        self.optimizer.step()
        if average:
            self.average.update_parameters(self.module)
        self.check(f"after step {number}")

    def check(self, when: str) -> None:
        for i, (param, average) in enumerate(zip(self.params, self.average.module.parameters(), strict=True)):
            state = self.optimizer.state.get(param, {})
            assert_same_bits(state.get("ema", param), average.detach(), f"ema of parameter {i} {when}")


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.5, 0.9, 0.999, 1.0])
def test_average_of_parameters_that_come_and_go(decay: float, place: str) -> None:
    run = Averaged(decay, **({"capturable": True} if place == ON_DEVICE else {}))
    # The third has no gradient at first, the first pauses, the last never has one.
    for step, lacking in enumerate([(2, 5), (2, 5), (0, 2, 5), (0, 5), (5,), (0, 1, 2, 3, 4, 5), (2, 5), (5,)]):
        run.step(step, lacking)


@pytest.mark.parametrize("place", ["cpu", ON_DEVICE], indirect=True)
def test_average_of_steps_that_are_skipped(place: str) -> None:
    """Also skipped first steps: the average begins with the first that is not."""
    run = Averaged(skip_nonfinite=True)
    for step in range(6):
        skipped = step in (0, 1, 3)
        grads = make_grads(step, run.params)
        if skipped:
            assert grads[4] is not None
            grads[4][0] = math.inf
        set_grads(run.params, grads)
        run.optimizer.step()
        if not skipped:
            run.average.update_parameters(run.module)
        run.check(f"after step {step}")
    assert run.optimizer.skipped_steps == 3


def test_average_switched_on_late_and_off() -> None:
    run = Averaged()
    run.optimizer.param_groups[0]["ema_decay"] = None
    for step in range(2):
        set_grads(run.params, make_grads(step, run.params))
        run.optimizer.step()
    assert not any("ema" in state for state in run.optimizer.state.values())
    run.optimizer.param_groups[0]["ema_decay"] = 0.9
    for step in range(2, 5):
        run.step(step, lacking=(1,) if step == 3 else ())
    run.optimizer.param_groups[0]["ema_decay"] = None
    run.step(5, average=False)
    run.optimizer.param_groups[0]["ema_decay"] = 0.9
    run.step(6)


def test_groups_have_averages_of_their_own() -> None:
    params, twins = make_params(), make_params()
    optimizer = fusedopt.Adam([{"params": params[:2], "ema_decay": 0.5}, {"params": params[2:]}], ema_decay=None)
    expected = [torch.nn.ParameterList(group) for group in (twins[:2],)]
    average = AveragedModel(expected[0], multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for step in range(4):
        set_grads(params, make_grads(step, params))
        optimizer.step()
        with torch.no_grad():
            for p, q in zip(params, twins, strict=True):
                q.copy_(p)
        average.update_parameters(expected[0])
    for p, q in zip(params[:2], average.module.parameters(), strict=True):
        assert_same_bits(optimizer.state[p]["ema"], q.detach())
    assert all("ema" not in optimizer.state[p] for p in params[2:])


@pytest.mark.parametrize("way", ["state_dict", "file", "deepcopy", "pickle"])
def test_averages_are_saved(way: str) -> None:
    run = Averaged()
    for step in range(3):
        run.step(step, lacking=(2,) if step < 2 else ())
    if way in ("state_dict", "file"):
        saved = run.optimizer.state_dict()
        if way == "file":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file)
        run.optimizer = fusedopt.AdamW(run.params)
        run.optimizer.load_state_dict(copy.deepcopy(saved))
        assert run.optimizer.param_groups[0]["ema_decay"] == 0.9
    else:
        copied = copy.deepcopy(run) if way == "deepcopy" else pickle.loads(pickle.dumps(run.optimizer))
        if way == "deepcopy":
            run = copied
        else:
            run.optimizer = copied
            run.params = params_of(copied)
            run.module = torch.nn.ParameterList(run.params)
    run.check("as loaded")
    for step in range(3, 6):
        run.step(step)


def test_ema_weights() -> None:
    run = Averaged()
    for step in range(3):
        run.step(step, lacking=(5,))
    before = [p.detach().clone() for p in run.params]
    averages = [p.detach().clone() for p in run.average.module.parameters()]
    addresses = [p.data_ptr() for p in run.params]
    saved = bytes_of(run.optimizer)
    with pytest.raises(KeyError, match="anything"), run.optimizer.ema_weights():
        for p, average in zip(run.params, averages, strict=True):
            assert_same_bits(p.detach(), average)
        assert torch.is_grad_enabled()
        with pytest.raises(RuntimeError, match=r"^AdamW: the weights are those of ema_weights\(\)"):
            run.optimizer.step()
        with pytest.raises(RuntimeError, match="already in use"), run.optimizer.ema_weights():
            pass
        with torch.no_grad():
            run.params[0].zero_()  # whatever is done to them is undone
        raise KeyError("anything")
    for p, value in zip(run.params, before, strict=True):
        assert_same_bits(p.detach(), value)
    assert bytes_of(run.optimizer) == saved
    assert [p.data_ptr() for p in run.params] == addresses
    run.step(3)
    with pytest.raises(RuntimeError, match="needs ema_decay"), fusedopt.Adam(make_params()).ema_weights():
        pass


# --- statistics ----------------------------------------------------------------------------------------------------


def test_stats_have_the_parameters_names() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    optimizer = fusedopt.Adam(model.named_parameters(), stats=True)
    with pytest.raises(RuntimeError, match=r"^Adam: stats\(\) needs stats=True, and a step"):
        optimizer.stats()
    model(torch.ones(2, 3)).sum().backward()
    model[0].bias.grad = None
    optimizer.step()
    assert list(optimizer.stats()) == ["0.weight", "1.weight", "1.bias"]
    assert list(optimizer.stats()["1.bias"]) == [
        "grad_norm",
        "param_norm",
        "update_norm",
        "max_relative_update",
        "nonfinite_grads",
        "lost_updates",
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_updates_that_are_rounded_away(dtype: torch.dtype, place: str) -> None:
    """Why training in 16 bits stalls: at lr 1e-3 a weight of 1 never moves, one of 0.01 does."""
    more: dict[str, Any] = {"capturable": True} if place == ON_DEVICE else {}
    param = Parameter(torch.cat([torch.ones(4500), torch.full((500,), 0.01), torch.ones(10)]).to(dtype))
    param.grad = torch.ones_like(param)
    param.grad[-10:] = 0  # no update, so none is lost
    optimizer = fusedopt.Adam([param], lr=1e-4, stats=True, **more)
    optimizer.step()
    moved = int((param != torch.cat([torch.ones(4500), torch.full((500,), 0.01), torch.ones(10)]).to(dtype)).sum())
    assert moved == 500
    assert optimizer.stats()["0.0"]["lost_updates"] == 4500


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_stats_of_wild_values(dtype: torch.dtype, set_place: Callable[[str], None]) -> None:
    """Squares that opmath cannot hold, inf and nan; the same on all instruction sets."""
    found = []
    for place in TARGETS:
        set_place(place)
        g = generator(11)
        # Magnitudes that a float cannot square, some pieces small throughout, some with an inf.
        params = [
            Parameter(varied_values(9000, dtype, g, wild=False)),
            Parameter(varied_values(300, dtype, g, wild=False) * 1e-25),
            Parameter(varied_values(300, dtype, g, wild=False) * 1e25),
            Parameter(torch.zeros(40, dtype=dtype)),
            Parameter(varied_values(5000, dtype, g)),
        ]
        before = [p.detach().clone() for p in params]
        grads = [varied_values(p.numel(), dtype, g, finite=i == 0) for i, p in enumerate(params)]
        grads[1] = varied_values(300, dtype, g, wild=False) * 1e-30
        set_grads(params, grads)
        optimizer = fusedopt.Adagrad(params, lr=1e-2, stats=True)
        optimizer.step()
        stats = optimizer.stats()
        for i, p in enumerate(params):
            expected = expected_stats(before[i], p.detach(), grads[i], None)
            if dtype == torch.float32 and i in (1, 2):
                expected.pop("update_norm")  # of squares that a float cannot hold, as the docstring says
            assert_close_stats(stats[f"0.{i}"], expected, dtype, f"of parameter {i} on {place}")
        if place != CUDA_ON_HOST:
            found.append(repr(stats))
    assert len(set(found)) == 1


# --- sparse gradients ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("width", [1, 7, 16, 70])
@pytest.mark.parametrize("coalesced", [True, False], ids=["coalesced", "repeats"])
def test_sparse_beside_dense(coalesced: bool, width: int, place: str) -> None:
    """The norm is that of the summed rows; each value is clipped; rows that are not touched are averaged too."""
    options: dict[str, Any] = {"max_grad_norm": 0.7, "ema_decay": 0.9, "stats": True}
    options["skip_nonfinite"] = place != CUDA_ON_HOST
    more = {"fused": True} if place == ON_DEVICE else {}
    params = [
        Parameter(torch.randn(50, width, generator=generator(1))),
        Parameter(torch.randn(40, generator=generator(2))),
    ]
    optimizer = fusedopt.Adagrad(params, lr=0.1, **options, **more)
    twins = [Parameter(p.detach().clone()) for p in params]
    expected = torch.optim.Adagrad(twins, lr=0.1, foreach=False)
    module = torch.nn.ParameterList(twins)
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for step in range(5):
        g = generator(10 + step)
        indices = torch.randperm(50, generator=g)[:12] if coalesced else torch.randint(0, 20, (12,), generator=g)
        values = torch.randn(12, width, generator=g)
        dense = torch.randn(40, generator=g)
        skipped = step == 2 and options["skip_nonfinite"]
        if skipped:
            values[-1, -1] = math.nan
        params[0].grad = torch.sparse_coo_tensor(indices[None], values, (50, width))
        if coalesced:
            params[0].grad = params[0].grad.coalesce()
            indices, values = params[0].grad._indices()[0], params[0].grad._values()
        params[1].grad = None if step == 3 else dense
        before = params[0].detach().clone()
        optimizer.step()
        norm = optimizer.grad_norm
        assert norm is not None
        summed = torch.sparse_coo_tensor(indices[None], values.double(), (50, width)).to_dense()
        if not skipped:
            # Two and more float32 values are added up in float32 first.
            exact = exact_norm([summed, *([] if step == 3 else [dense])])
            assert norm.item() == pytest.approx(exact, rel=1.2e-7)
            coefficient = torch.clamp(0.7 / (norm + 1e-6), max=1.0)
            on_device = place != "cpu" and not coalesced
            clipped = torch.sparse_coo_tensor(indices[None], values, (50, width))
            clipped = clipped.coalesce() * coefficient if on_device else clipped * coefficient
            twins[0].grad = clipped
            twins[1].grad = None if step == 3 else dense * coefficient
            torch_loop_step(expected)
            average.update_parameters(module)
        for i, (p, q, a) in enumerate(zip(params, twins, average.module.parameters(), strict=True)):
            assert_same_bits(p, q, f"parameter {i} after step {step}")
            assert_same_bits(optimizer.state[p]["ema"], a.detach(), f"ema of {i} after step {step}")
        stats = optimizer.stats()["0.0"]
        assert stats["nonfinite_grads"] == int(skipped)
        assert stats["update_norm"] == pytest.approx((params[0].detach() - before).double().norm().item(), rel=1.2e-7)
    assert optimizer.skipped_steps == int(options["skip_nonfinite"])


# --- around it -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["cpu"], indirect=True)
def test_gradient_accumulation(place: str) -> None:
    """Two backwards a step: what is clipped and averaged is their sum."""
    torch.manual_seed(0)
    model = torch.nn.Linear(20, 3)
    twin = copy.deepcopy(model)
    optimizer = fusedopt.AdamW(model.parameters(), max_grad_norm=0.1, ema_decay=0.9, skip_nonfinite=True)
    row = BY_ID["adamw-decay"]
    theirs = Separate(row, optimizer, torch.float32)
    theirs.optimizer.param_groups[0]["weight_decay"] = 0.01
    for _ in range(4):
        inputs = torch.randn(2, 8, 20)
        model.zero_grad()
        twin.zero_grad()
        for batch in inputs:
            model(batch).square().mean().backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        theirs.step(grads, optimizer.grad_norm)
        theirs.assert_same(optimizer, "with accumulation")


NUMBER, DECAY, ORDER, FLAG = "a number that is not negative", "a number from 0 to 1", r"2\.0 or inf", "True or False"
BAD_OPTIONS: list[tuple[str, Any, type[Exception], str]] = [
    ("max_grad_norm", -1.0, ValueError, NUMBER),
    ("max_grad_norm", math.nan, ValueError, NUMBER),
    ("max_grad_norm", "much", TypeError, NUMBER),
    ("max_grad_norm", True, TypeError, NUMBER),
    ("max_grad_norm", [1.0], TypeError, NUMBER),
    ("max_grad_norm", torch.ones(2), TypeError, NUMBER),
    ("norm_type", 1.0, ValueError, ORDER),
    ("norm_type", -math.inf, ValueError, ORDER),
    ("norm_type", "two", TypeError, ORDER),
    ("ema_decay", 1.5, ValueError, DECAY),
    ("ema_decay", -0.1, ValueError, DECAY),
    ("ema_decay", "0.9", TypeError, DECAY),
    ("ema_decay", False, TypeError, DECAY),
    ("skip_nonfinite", "no", TypeError, FLAG),
    ("stats", 1, ValueError, FLAG),
]


@pytest.mark.parametrize(("name", "value", "error", "wanted"), BAD_OPTIONS, ids=str)
@pytest.mark.parametrize("cls", [fusedopt.Adam, fusedopt.AdamW, fusedopt.RAdam, fusedopt.Adagrad])
def test_options_out_of_range(cls: Any, name: str, value: Any, error: type[Exception], wanted: str) -> None:
    with pytest.raises(error, match=rf"^{cls.__name__}: {name} must be {wanted}.*, got .*"):
        cls(make_params(), **{name: value})
    params = make_params()
    optimizer = cls(params)
    set_grads(params, make_grads(0, params))
    optimizer.param_groups[0][name] = value
    with pytest.raises(error, match=rf"^{cls.__name__}: param_groups\[0\]\['{name}'\] must be {wanted}.*, got .*"):
        optimizer.step()
    assert all(p._version == 0 for p in params)


@pytest.mark.parametrize(
    ("name", "value"), [("max_grad_norm", 2.0), ("norm_type", math.inf), ("skip_nonfinite", True), ("stats", True)]
)
def test_what_concerns_all_groups_must_be_the_same(name: str, value: Any) -> None:
    params = make_params()
    optimizer = fusedopt.Adam([{"params": params[:1]}, {"params": params[1:], name: value}])
    set_grads(params, make_grads(0, params))
    message = rf"^Adam: param_groups\[1\]\['{name}'\] is .*, not what it is in param_groups\[0\].*: set it in all"
    with pytest.raises(ValueError, match=message):
        optimizer.step()


def test_differentiable_steps_know_none_of_it() -> None:
    for name, value in (("max_grad_norm", 1.0), ("ema_decay", 0.9), ("skip_nonfinite", True), ("stats", True)):
        optimizer = fusedopt.Adam(make_params(), differentiable=True, **{name: value})
        with pytest.raises(RuntimeError, match=rf"\['{name}'\] is .*, which torch's own step does not know"):
            optimizer.step()


def test_nothing_was_measured() -> None:
    params = make_params()
    optimizer = fusedopt.Adam(params)
    set_grads(params, make_grads(0, params))
    optimizer.step()
    assert optimizer.grad_norm is None
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    del optimizer.found_inf
    assert optimizer.grad_norm is None and optimizer.skipped_steps == 1
    optimizer = fusedopt.Adam(params)
    assert optimizer.skipped_steps == 0 and optimizer.skipped_steps.dtype == torch.int64


def test_each_norm_is_a_tensor_of_its_own() -> None:
    params = make_params()
    optimizer = fusedopt.Adam(params, max_grad_norm=1.0)
    norms = []
    for step in range(3):
        set_grads(params, make_grads(step, params))
        optimizer.step()
        norms.append(optimizer.grad_norm)
    assert len({norm.item() for norm in norms if norm is not None}) == 3


@pytest.fixture
def launches(set_place: Callable[[str], None]) -> Iterator[Callable[[], int]]:
    set_place(ON_DEVICE)
    last = _C.units_run()["cuda"]

    def since() -> int:
        nonlocal last
        before, last = last, _C.units_run()["cuda"]
        return last - before

    yield since


def test_launches(launches: Callable[[], int]) -> None:
    """Two where something is decided by all gradients before the first write, else one."""
    for options, wanted in [
        ({}, 1),
        ({"ema_decay": 0.9, "stats": True}, 1),
        ({"max_grad_norm": 1.0}, 2),
        ({"skip_nonfinite": True}, 2),
        ({"max_grad_norm": 1.0, "skip_nonfinite": True, "ema_decay": 0.9, "stats": True}, 2),
    ]:
        params = make_params()
        optimizer = fusedopt.Adam(params, capturable=True, **options)
        for step in range(3):
            set_grads(params, make_grads(step, params))
            optimizer.step()
            assert launches() == wanted, options
    # GradScaler has just decided.
    optimizer = fusedopt.Adam(params, capturable=True, skip_nonfinite=True)
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(0.0), torch.tensor(1.0)
    optimizer.step()
    assert launches() == 1
    for param in params:
        assert param.grad is not None
    fusedopt.clip_grad_norm_(params, 1.0)
    assert launches() == 2


@pytest.mark.parametrize("more", [{}, {"stats": True, "ema_decay": 0.9}], ids=["clip", "all"])
def test_captured(more: dict[str, Any], set_place: Callable[[str], None], request: pytest.FixtureRequest) -> None:
    """A captured step measures, clips and skips at every replay; update_captured() gives it another max_grad_norm."""
    library = request.getfixturevalue("cuda_library")
    options: dict[str, Any] = {"max_grad_norm": 0.7, "skip_nonfinite": True, "capturable": True, **more}
    pairs = [make_params() for _ in range(2)]
    on_device, on_cpu = (fusedopt.AdamW(params, **options) for params in pairs)
    for params in pairs:
        set_grads(params, make_grads(0, params))

    def step_both(step: Callable[[], Any], number: int, infinite: bool = False) -> None:
        for params in pairs:
            for param, grad in zip(params, make_grads(number, params), strict=True):
                assert param.grad is not None and grad is not None
                param.grad.copy_(grad)
            if infinite:
                assert params[5].grad is not None
                params[5].grad[-1] = math.inf
        set_place(ON_DEVICE)
        step()
        set_place("default")
        on_cpu.step()
        for p, q in zip(*pairs, strict=True):
            assert_same_bits(p, q, f"after step {number}")
            for name, value in on_cpu.state[q].items():
                assert_same_bits(on_device.state[p][name], value, f"{name} after step {number}")
        assert on_device.grad_norm is not None and on_cpu.grad_norm is not None
        assert_same_bits(on_device.grad_norm, on_cpu.grad_norm)
        assert on_device.skipped_steps == on_cpu.skipped_steps

    for number in range(2):
        step_both(on_device.step, number)
    set_place(ON_DEVICE)
    with capture(library):
        on_device.step()
    for number in range(2, 5):
        step_both(library.fusedopt_replay, number, infinite=number == 3)
    for optimizer in (on_device, on_cpu):
        optimizer.param_groups[0]["max_grad_norm"] = 0.01
    set_place(ON_DEVICE)
    on_device.update_captured()
    step_both(library.fusedopt_replay, 5)
    assert on_cpu.skipped_steps == 1
    set_place(ON_DEVICE)
    for name, value in [("norm_type", math.inf), ("stats", not more), ("ema_decay", None if more else 0.5)]:
        group = on_device.param_groups[0]
        kept, group[name] = group[name], value
        with pytest.raises(RuntimeError, match="has changed since it was captured"):
            on_device.update_captured()
        group[name] = kept
    on_device.update_captured()
    library.fusedopt_forget_graph()


@contextlib.contextmanager
def capture(library: ctypes.CDLL) -> Iterator[None]:
    capturing = ctypes.c_int64.in_dll(library, "fusedopt_capturing")
    library.fusedopt_forget_graph()
    capturing.value = 1
    try:
        yield
    finally:
        capturing.value = 0


def test_a_captured_step_tells_the_scaler(set_place: Callable[[str], None], cuda_library: ctypes.CDLL) -> None:
    """Also when its options have been updated; and what it writes to is not freed."""
    set_place(ON_DEVICE)
    params = make_params()
    optimizer = fusedopt.AdamW(params, capturable=True, stats=True)
    set_grads(params, make_grads(0, params))
    verdict = torch.zeros(())
    optimizer._report_inf = verdict
    optimizer.step()
    optimizer._report_inf = verdict
    with capture(cuda_library):
        optimizer.step()
    optimizer.update_captured()
    assert params[0].grad is not None
    params[0].grad[0] = math.inf
    before = bytes_of(optimizer)
    written = optimizer._stepper.stats.data_ptr()
    # Another parameter, so other statistics.
    optimizer.add_param_group({"params": make_params(sizes=(3,))})
    params_of(optimizer)[-1].grad = torch.ones(3)
    optimizer.step()
    assert optimizer._stepper.stats.data_ptr() != written
    before = bytes_of(optimizer)
    cuda_library.fusedopt_replay()
    assert verdict == 1 and bytes_of(optimizer) == before
    cuda_library.fusedopt_forget_graph()


def test_what_a_capture_needs_must_be_there(set_place: Callable[[str], None], cuda_library: ctypes.CDLL) -> None:
    set_place(ON_DEVICE)
    params = make_params()
    optimizer = fusedopt.AdamW(params, capturable=True)
    set_grads(params, make_grads(0, params))
    optimizer.step()
    optimizer.param_groups[0]["max_grad_norm"] = 1.0
    with capture(cuda_library), pytest.raises(RuntimeError, match="make a step with these options before capturing"):
        optimizer.step()
    optimizer.param_groups[0]["max_grad_norm"] = None
    with capture(cuda_library):
        optimizer.step()
    optimizer.param_groups[0]["max_grad_norm"] = 1.0
    with pytest.raises(RuntimeError, match=r"max_grad_norm.* capture anew"):
        optimizer.update_captured()
    cuda_library.fusedopt_forget_graph()


def test_parameters_that_are_removed_are_forgotten() -> None:
    """Nothing is written to the memory of one that was only averaged."""
    a, b = make_params(sizes=(10, 10))
    optimizer = fusedopt.AdamW([{"params": [a]}, {"params": [b]}], ema_decay=0.5)
    set_grads([a, b], make_grads(0, [a, b]))
    optimizer.step()
    b.grad = None
    with torch.no_grad():
        b.add_(1.0)
    optimizer.step()
    optimizer.param_groups.pop()
    average = optimizer.state.pop(b)["ema"]
    before = average.clone()
    optimizer.step()
    assert_same_bits(average, before)


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


def test_averages_that_are_switched_off_are_not_shown() -> None:
    params = make_params()
    optimizer = fusedopt.AdamW([{"params": params[:2]}, {"params": params[2:]}], ema_decay=0.5)
    for step in range(2):
        set_grads(params, make_grads(step, params))
        optimizer.step()
    optimizer.param_groups[1]["ema_decay"] = None
    optimizer.step()
    now = [p.detach().clone() for p in params]
    with optimizer.ema_weights():
        for i, (p, value) in enumerate(zip(params, now, strict=True)):
            assert torch.equal(p, value) == (i >= 2)


def test_stats_of_names_that_groups_share_and_of_a_step_that_raised() -> None:
    layers = [torch.nn.Linear(2, 2) for _ in range(2)]
    optimizer = fusedopt.Adam([{"params": list(layer.named_parameters())} for layer in layers], stats=True)
    for layer in layers:
        for p in layer.parameters():
            p.grad = torch.ones_like(p)
    optimizer.step()
    found = optimizer.stats()
    assert list(found) == ["weight", "bias", "1.weight", "1.bias"]
    layers[0].weight.grad = None
    optimizer.state[layers[1].bias]["exp_avg"] = torch.zeros(3)
    with pytest.raises(RuntimeError, match="exp_avg"):
        optimizer.step()
    assert optimizer.stats() == found
    del optimizer.param_groups[0]["params"][0]
    with pytest.raises(RuntimeError, match="added or removed"):
        optimizer.stats()


def test_subclasses_with_defaults_of_their_own() -> None:
    class Clipped(fusedopt.AdamW):
        def __init__(self, params: Any, lr: float = 1e-3, max_grad_norm: float | None = 1.0, **more: Any) -> None:
            super().__init__(params, lr, max_grad_norm=max_grad_norm, **more)

    assert Clipped(make_params()).param_groups[0]["max_grad_norm"] == 1.0
    assert list(inspect.signature(Clipped).parameters) == ["params", "lr", "max_grad_norm", "more"]


def test_measurements_under_torch_compile() -> None:
    """The first step too: dynamo loses what is written to an object's __dict__."""
    params = make_params()
    optimizer = fusedopt.AdamW(params, max_grad_norm=1.0, stats=True)
    set_grads(params, make_grads(0, params))
    torch.compile(lambda: optimizer.step(), backend="eager")()
    assert optimizer.grad_norm is not None and len(optimizer.stats()) == len(params)


def test_statistics_of_parameters_that_come_and_go() -> None:
    """Where they are written moves, also for rows that sat the last step out."""
    part = 4096
    params = make_params(sizes=(4, 30 * part, 40 * part))
    _, b, c = params
    grads = make_grads(0, params)
    optimizer = fusedopt.Adagrad(params, stats=True)
    set_grads(params, grads)
    c.grad = None
    optimizer.step()
    set_grads(params, grads)
    b.grad = None
    optimizer.step()
    optimizer.param_groups[0]["stats"] = False
    optimizer.step()
    kept = optimizer._stepper.stats.clone()
    set_grads(params, grads)
    optimizer.step()
    assert_same_bits(optimizer._stepper.stats, kept)


def test_an_average_put_into_the_state_by_hand_is_moved() -> None:
    params = make_params(sizes=(4, 4))
    optimizer = fusedopt.AdamW(params, ema_decay=0.5)
    params[0].grad = torch.ones(4)
    for _ in range(2):
        optimizer.step()
    value = params[1].detach().clone()
    optimizer.state[params[1]] = {"step": torch.tensor(1.0), "ema": torch.full((4,), 9.0)}
    optimizer.step()
    assert_same_bits(optimizer.state[params[1]]["ema"], torch.lerp(torch.full((4,), 9.0), value, 0.5))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("place", ["cpu", ON_DEVICE], indirect=True)
@pytest.mark.parametrize("late", [False, True], ids=["at_once", "switched_on_late"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_averages_begin_with_the_first_step_that_is_not_skipped(place: str, late: bool, sparse: bool) -> None:
    """Of all parameters, also of those whose gradient comes only then."""
    more = {"fused": True} if place == ON_DEVICE else {}
    params = [Parameter(torch.ones(4, 2)), Parameter(torch.ones(3))]
    optimizer = fusedopt.Adagrad(params, lr=0.1, skip_nonfinite=True, ema_decay=None if late else 0.9, **more)

    def grad(value: float) -> Tensor:
        dense = torch.full((4, 2), value)
        return dense.to_sparse(1) if sparse else dense

    if late:
        params[0].grad = grad(1.0)
        optimizer.step()
        optimizer.param_groups[0]["ema_decay"] = 0.9
    params[0].grad = grad(math.nan)
    optimizer.step()
    params[0].grad, params[1].grad = grad(1.0), torch.ones(3)
    optimizer.step()
    for param in params:
        assert_same_bits(optimizer.state[param]["ema"], param.detach())
    before = [param.detach().clone() for param in params]
    optimizer.step()
    for param, old in zip(params, before, strict=True):
        assert_same_bits(optimizer.state[param]["ema"], torch.lerp(old, param.detach(), 1 - 0.9))


def test_a_scale_below_one_is_looked_at_all_the_same() -> None:
    """torch's check is of the scaled gradients, which may be finite where the unscaled are not."""
    param = Parameter(torch.ones(2))
    optimizer, scaler = fusedopt.AdamW([param], skip_nonfinite=True), torch.amp.GradScaler("cpu", init_scale=1e-5)
    scaler.scale(torch.ones(()))
    param.grad = torch.tensor([3e38, 1.0])
    scaler.step(optimizer)
    assert torch.equal(param, torch.ones(2)) and optimizer.skipped_steps == 1


def test_defaults_of_the_process_do_not_matter() -> None:
    params = make_params()
    optimizer, scaler = fusedopt.AdamW(params, max_grad_norm=1.0), fusedopt.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    set_grads(params, make_grads(0, params))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert optimizer.skipped_steps.device == torch.device("cpu")
            scaler.step(optimizer)
            assert fusedopt.clip_grad_norm_(params, 1.0).device == torch.device("cpu")
    finally:
        torch.set_default_dtype(torch.float32)
    assert optimizer.grad_norm is not None and optimizer.grad_norm.dtype == torch.float32


def test_nothing_behind_a_tail_is_counted() -> None:
    """Without eps the padding of the last lane is 0 / 0."""
    param = Parameter(torch.ones(5))
    param.grad = torch.ones(5)
    optimizer = fusedopt.Adagrad([param], lr=1e-12, eps=0.0, stats=True)
    optimizer.step()
    found = optimizer.stats()["0.0"]
    assert found["lost_updates"] == 5 and found["nonfinite_grads"] == 0 and found["update_norm"] == 0
