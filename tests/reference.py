"""Independent references for the tests: torch's for-loop made exact, a NumPy transcription, and a float64 oracle.

Nothing here is shared with the code under test. The operation order that `low_precision_step` writes down was found
by experiment against torch's for-loop (2.13, AVX2 and AVX-512), which it equals bit for bit in float32 and float64.
"""

import contextlib
import ctypes
import ctypes.util
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

FLUSH_MIN_EPS = 1e-10  # groups with a smaller eps are not flushed: see design, "Subnormal numbers"

_NUMPY: dict[torch.dtype, type] = {
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.float16: np.float16,
}
with contextlib.suppress(ModuleNotFoundError):  # needed for this dtype's references alone
    import ml_dtypes

    _NUMPY[torch.bfloat16] = ml_dtypes.bfloat16

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _opmath(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


# --- torch's for-loop, exactly -----------------------------------------------------------------------------------


@contextlib.contextmanager
def correctly_rounded_sqrt() -> Iterator[None]:
    """Make `Tensor.sqrt` correctly rounded for real tensors; torch's own (MKL) is not.

    Going through float64 rounds twice, which is harmless for a square root: 53 >= 2 * 24 + 2.
    """

    def sqrt(self: Tensor) -> Tensor:
        with np.errstate(invalid="ignore"):
            return torch.as_tensor(np.sqrt(self.detach().double().numpy())).to(self.dtype)

    had_own = "sqrt" in vars(torch.Tensor)  # usually it is inherited
    original = torch.Tensor.sqrt
    torch.Tensor.sqrt = sqrt
    try:
        yield
    finally:
        if had_own:
            torch.Tensor.sqrt = original
        else:
            del torch.Tensor.sqrt


def flush_moments(optimizer: torch.optim.Optimizer) -> None:
    """Apply the flush rule to the state of every parameter that has just been stepped.

    Elements of exp_avg and exp_avg_sq below opmath's smallest normal number become zeros of the same sign.
    """
    for group in optimizer.param_groups:
        if group["eps"] < FLUSH_MIN_EPS:
            continue
        for param in group["params"]:
            if param.grad is None:
                continue
            smallest = torch.finfo(_opmath(param.dtype)).tiny
            for name in ("exp_avg", "exp_avg_sq"):
                moment = _real(optimizer.state[param][name])
                zero = torch.zeros_like(moment).copysign(moment)
                moment.copy_(torch.where(moment.abs() < smallest, zero, moment))


def torch_loop_step(optimizer: torch.optim.Optimizer) -> None:
    """One step of torch's for-loop with a correctly rounded square root and the flush rule.

    torch's scalar code (the elements after the last whole vector, and every element of a strided tensor) differs from
    its vectors in the sign of a zero in two corners. Keep them out of inputs:
    - a stored max_exp_avg_sq of -0 (no step produces one; give second moments as `varied_values(...).abs()`);
    - a gradient of -0 where 1 - beta1 rounds to 1 in opmath (beta1 = 0); `low_precision_step` has the vectors' sign.
    """
    for group in optimizer.param_groups:
        if group["foreach"] is not False or group["fused"] is not False:
            raise ValueError("the reference is torch's for-loop: build it with foreach=False, fused=False")
    with correctly_rounded_sqrt():
        optimizer.step()
    flush_moments(optimizer)


# --- hyperparameters -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hyper:
    """The hyperparameters of one Adam or AdamW group."""

    lr: float | Tensor = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False
    amsgrad: bool = False
    maximize: bool = False

    @classmethod
    def from_group(cls, group: Mapping[str, Any]) -> "Hyper":
        """Take them from a torch.optim.Adam or AdamW parameter group."""
        names = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize")
        return cls(decoupled=group["decoupled_weight_decay"], **{name: group[name] for name in names})

    def scalars(self, step: int) -> tuple[float, float, float]:
        """The decoupled decay factor, step_size and bias_correction2_sqrt of a step, before rounding to opmath.

        With lr as a Tensor each operation is rounded to lr's dtype; a bfloat16 or float16 lr meets the other operand
        in float32. A float lr is the float64 case.
        """
        dtype = self.lr.dtype if isinstance(self.lr, Tensor) else torch.float64
        stored, op = _NUMPY[dtype], _NUMPY[_opmath(dtype)]
        lr = op(float(self.lr))
        bias_correction1 = 1 - self.betas[0] ** step
        bias_correction2 = 1 - self.betas[1] ** step
        with np.errstate(all="ignore"):
            decay = stored(op(1) - op(stored(lr * op(self.weight_decay))))
            step_size = stored(lr / op(bias_correction1))
        return float(decay), float(step_size), bias_correction2**0.5


# --- the transcription ---------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """What one step writes back."""

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None


_libm = ctypes.CDLL(ctypes.util.find_library("m"))
_libm.fma.argtypes, _libm.fma.restype = [ctypes.c_double] * 3, ctypes.c_double
_fma64 = np.vectorize(_libm.fma, otypes=[np.float64])


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c rounded once, in the arrays' dtype: float32, or float64 (slow: libm, an element at a time)."""
    a, b, c = np.broadcast_arrays(a, b, c)
    if c.dtype == np.float64:
        return _fma64(a, b, c) if c.size else c.copy()
    # The product is exact in float64, but the sum is not: rounding it to nearest there and again to float32 can go
    # wrong when the first rounding lands on a tie of the second. So round it to odd: an inexact sum takes the
    # neighbour whose last bit is 1, which is never such a tie and stays on the true value's side of every one.
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)  # exact (Knuth's TwoSum)
    even = total.view(np.int64) & 1 == 0
    inexact = np.isfinite(error) & (error != 0)
    total = np.where(inexact & even, np.nextafter(total, np.copysign(np.inf, error)), total)
    return total.astype(np.float32)


def _store(values: np.ndarray, like: Tensor) -> Tensor:
    """Round opmath values once, to nearest even, to `like`'s dtype and shape."""
    rounded = np.ascontiguousarray(values.astype(_NUMPY[like.dtype]))
    bits = rounded.view(f"i{rounded.itemsize}")
    return torch.from_numpy(bits).view(like.dtype).reshape(like.shape)


def low_precision_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    hyper: Hyper,
    step: int,
    inv_scale: float | None = None,
) -> Stored:
    """One Adam or AdamW step in opmath, rounding only what is stored; `step` is the count after this step.

    Works for any real dtype; bfloat16 and float16 are computed in float32. The arguments are left alone. One case is
    not torch's: a 0-d float32 parameter with a float64 Tensor lr, which torch decays (decoupled) in float64.
    """
    op = _NUMPY[_opmath(param.dtype)]
    smallest = np.finfo(op).tiny

    def load(tensor: Tensor) -> np.ndarray:
        return tensor.detach().to(_opmath(param.dtype)).flatten().numpy().astype(op, copy=True)

    def flush(moment: np.ndarray) -> np.ndarray:
        if hyper.eps < FLUSH_MIN_EPS:
            return moment
        return np.where(np.abs(moment) < smallest, np.copysign(op(0), moment), moment)

    decay, step_size, bias_correction2_sqrt = hyper.scalars(step)
    weight_decay = op(hyper.weight_decay)
    weight1, weight2 = op(1 - hyper.betas[0]), op(1 - hyper.betas[1])
    p, g, m, v = load(param), load(grad), load(exp_avg), load(exp_avg_sq)
    with np.errstate(all="ignore"):
        if inv_scale is not None:
            g = g * op(inv_scale)
        if hyper.maximize:
            g = -g
        if hyper.weight_decay != 0:
            if hyper.decoupled:
                p = p * op(decay)
            else:
                g = _fma(p, weight_decay, g)
        difference = g - m
        m = _fma(weight1, difference, m) if weight1 < op(0.5) else _fma(weight1 - op(1), difference, g)
        v = _fma(weight2 * g, g, op(hyper.betas[1]) * v)
        largest = v
        if hyper.amsgrad:
            assert max_exp_avg_sq is not None
            previous = load(max_exp_avg_sq)
            largest = np.where((previous > v) | np.isnan(previous), previous, v)  # NaN if either is; a tie takes v
        denom = np.sqrt(largest) / op(bias_correction2_sqrt) + op(hyper.eps)
        p = p + (op(-step_size) * m) / denom
        return Stored(
            _store(p, param),
            _store(flush(m), exp_avg),
            _store(flush(v), exp_avg_sq),
            _store(largest, max_exp_avg_sq) if hyper.amsgrad and max_exp_avg_sq is not None else None,
        )


# --- accuracy ------------------------------------------------------------------------------------------------------


def oracle(param: Tensor, grads: Iterable[Tensor], hyper: Hyper) -> np.ndarray:
    """The parameter after one step per gradient, by the textbook formula in float64 and with no flush."""
    beta1, beta2 = hyper.betas
    lr = float(hyper.lr)
    p = param.detach().double().numpy().copy()
    m, v, largest = np.zeros_like(p), np.zeros_like(p), np.zeros_like(p)
    for step, grad in enumerate(grads, start=1):
        g = grad.detach().double().numpy() * (-1 if hyper.maximize else 1)
        if hyper.decoupled:
            p = p - lr * hyper.weight_decay * p
        else:
            g = g + hyper.weight_decay * p
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        largest = np.maximum(largest, v)
        m_hat = m / (1 - beta1**step)
        v_hat = (largest if hyper.amsgrad else v) / (1 - beta2**step)
        p = p - lr * m_hat / (np.sqrt(v_hat) + hyper.eps)
    return p


def mean_ulp(actual: Tensor, expected: np.ndarray) -> float:
    """Mean distance from a float64 oracle, in units in the last place of `actual`'s dtype at the oracle's value."""
    info = torch.finfo(actual.dtype)
    exponent = np.maximum(np.frexp(expected)[1] - 1, math.frexp(info.tiny)[1] - 1)
    ulp = np.ldexp(info.eps, exponent)
    return float(np.mean(np.abs(actual.detach().double().numpy() - expected) / ulp))


# --- inputs and comparison -----------------------------------------------------------------------------------------


def varied_values(
    numel: int, dtype: torch.dtype, generator: torch.Generator, *, finite: bool = False, wild: bool = True
) -> Tensor:
    """Values of every kind: ordinary, log-uniform magnitudes, zeros of both signs, subnormals, a few inf and nan.

    `finite=True` leaves out inf and nan; `wild=False` gives only ordinary ones (standard normal).
    """
    if dtype.is_complex:
        parts = varied_values(2 * numel, dtype.to_real(), generator, finite=finite, wild=wild)
        return torch.view_as_complex(parts.reshape(numel, 2))
    info = torch.finfo(dtype)
    ordinary = torch.randn(numel, dtype=torch.float64, generator=generator)
    if not wild:
        return ordinary.to(dtype)

    def uniform() -> Tensor:
        return torch.rand(numel, dtype=torch.float64, generator=generator)

    sign = ordinary.sign()
    widest = 300 if dtype == torch.float64 else 30
    low, high = max(-widest, math.log10(info.smallest_normal)), min(widest, math.log10(info.max) - 0.01)
    special = torch.where(uniform() < 0.5, sign * math.inf, math.nan)
    kinds = [
        (0.40, ordinary),
        (0.80, sign * 10 ** (low + (high - low) * uniform())),
        (0.89, sign * 0.0),
        (0.98, sign * info.smallest_normal * uniform()),
        (1.00, ordinary if finite else special),
    ]
    kind = uniform()
    values = ordinary
    for below, candidate in reversed(kinds):
        values = torch.where(kind < below, candidate, values)
    return values.to(dtype)


def assert_same_bits(actual: Tensor, expected: Tensor, message: str = "") -> None:
    """Assert equality bit for bit (so -0 is not +0), except that any NaN equals any NaN."""
    head = f"{message}: " if message else ""
    for what in ("dtype", "shape"):
        a, e = getattr(actual, what), getattr(expected, what)
        assert a == e, f"{head}{what} {a}, expected {e}"
    a, e = (_real(t.detach().cpu().resolve_conj().resolve_neg()).flatten() for t in (actual, expected))
    bits = _BITS[a.element_size()]
    wrong = (a.view(bits) != e.view(bits)) & ~(a.isnan() & e.isnan())
    if not wrong.any():
        return
    first = int(wrong.nonzero()[0])
    mask = 2 ** (8 * a.element_size()) - 1

    def show(values: Tensor) -> str:
        return f"{values[first].item()!r} (0x{int(values.view(bits)[first]) & mask:0{2 * a.element_size()}x})"

    where: Any = first
    if actual.is_complex():
        where = f"{first // 2}.{('real', 'imag')[first % 2]}"
    raise AssertionError(
        f"{head}{int(wrong.sum())} of {a.numel()} differ, first at [{where}]: {show(a)}, expected {show(e)}"
    )
