"""The norm that a step clips by, in the step and in clip_grad_norm_: exact, and the same bits however it is found."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from optimizers import CUDA_ON_HOST, DTYPES, FLOATS, ON_DEVICE, PLACES, generator, name_of
from phase_cases import exact_norm, make_grads, make_params, set_grads, within_an_ulp
from reference import assert_same_bits, torch_loop_step, varied_values
from torch import Tensor
from torch.nn import Parameter

import fusedopt

# --- the norm --------------------------------------------------------------------------------------------------------


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


def test_each_norm_is_a_tensor_of_its_own() -> None:
    params = make_params()
    optimizer = fusedopt.Adam(params, max_grad_norm=1.0)
    norms = []
    for step in range(3):
        set_grads(params, make_grads(step, params))
        optimizer.step()
        norms.append(optimizer.grad_norm)
    assert len({norm.item() for norm in norms if norm is not None}) == 3


# --- clip_grad_norm_ -------------------------------------------------------------------------------------------------


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
