"""Independent references for the tests: torch's for-loop made exact, a NumPy transcription, and a float64 oracle.

Nothing here is shared with the code under test. The operation order that the transcriptions write down was found by
experiment against torch's for-loop (2.13, AVX2 and AVX-512), which they equal bit for bit in float32 and float64.
"""

import abc
import contextlib
import ctypes
import ctypes.util
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

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

    def sqrt_(self: Tensor) -> Tensor:
        return self.copy_(sqrt(self))

    before = {name: vars(torch.Tensor).get(name) for name in ("sqrt", "sqrt_")}  # usually they are inherited
    torch.Tensor.sqrt, torch.Tensor.sqrt_ = sqrt, sqrt_
    try:
        yield
    finally:
        for name, own in before.items():
            if own is None:
                delattr(torch.Tensor, name)
            else:
                setattr(torch.Tensor, name, own)


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
            for name in {"exp_avg", "exp_avg_sq"} & optimizer.state[param].keys():
                moment = _real(optimizer.state[param][name])
                zero = torch.zeros_like(moment).copysign(moment)
                moment.copy_(torch.where(moment.abs() < smallest, zero, moment))


def torch_loop_step(optimizer: torch.optim.Optimizer) -> None:
    """One step of torch's for-loop with a correctly rounded square root and the flush rule.

    torch's scalar code (the elements after the last whole vector, and every element of a strided tensor) differs from
    its vectors in the sign of a zero in two corners. Keep them out of inputs:
    - a stored max_exp_avg_sq of -0 (no step produces one; give second moments as `varied_values(...).abs()`);
    - a gradient of -0 where 1 - beta1 rounds to 1 in opmath (beta1 = 0); the transcription has the vectors' sign.
    """
    for group in optimizer.param_groups:
        if group["foreach"] is not False or group.get("fused"):
            raise ValueError("the reference is torch's for-loop: build it with foreach=False and not fused")
    with correctly_rounded_sqrt():
        optimizer.step()
    flush_moments(optimizer)


# --- transcriptions --------------------------------------------------------------------------------------------------

State = dict[str, Tensor]
Arrays = dict[str, np.ndarray]

_libm = ctypes.CDLL(ctypes.util.find_library("m"))
_libm.fma.argtypes, _libm.fma.restype = [ctypes.c_double] * 3, ctypes.c_double
_fma64 = np.vectorize(_libm.fma, otypes=[np.float64])


def _fma(a: Any, b: Any, c: np.ndarray) -> np.ndarray:
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


class _Lr:
    """lr in torch's arithmetic of scalars: a float is double; a Tensor rounds every operation to its dtype.

    A bfloat16 or float16 lr meets the other operand in float32.
    """

    def __init__(self, lr: float | Tensor) -> None:
        dtype = lr.dtype if isinstance(lr, Tensor) else torch.float64
        self._stored, self._op = _NUMPY[dtype], _NUMPY[_opmath(dtype)]
        self.value = self._op(float(lr))

    def over(self, x: float) -> float:
        with np.errstate(all="ignore"):
            return float(self._stored(self.value / self._op(x)))

    def decay(self, weight_decay: float) -> float:
        """1 - lr * weight_decay."""
        with np.errstate(all="ignore"):
            product = self._stored(self.value * self._op(weight_decay))
            return float(self._stored(self._op(1) - self._op(product)))


class Transcription(abc.ABC):
    """An algorithm's step in NumPy, from the options of a parameter group.

    Computes in opmath (float64 for float64, else float32) and rounds only what is stored, once. One case is not
    torch's: a 0-d float32 parameter with a float64 Tensor lr, which torch computes in float64.
    """

    names: tuple[str, ...]  # of the state

    def __init__(self, group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.group, self.defaults = group, defaults

    def first_state(self, param: Tensor) -> State:
        return {name: torch.zeros_like(param).detach() for name in self.names}

    def step(
        self,
        param: Tensor,
        grad: Tensor,
        state: State,
        count: int,
        inv_scale: float | None = None,
        clip: float | None = None,
    ) -> tuple[Tensor, State]:
        """Return the parameter and its state after one step, whose count is `count`. The arguments are left alone."""
        op = _NUMPY[_opmath(param.dtype)]

        def load(tensor: Tensor) -> np.ndarray:
            return tensor.detach().to(_opmath(param.dtype)).flatten().numpy().astype(op, copy=True)

        with np.errstate(all="ignore"):
            g = load(grad)
            if inv_scale is not None:
                g = g * op(inv_scale)
            if clip is not None:
                g = g * op(clip)
            if self.group["maximize"]:
                g = -g
            p, new = self._step(op, load(param), g, {name: load(state[name]) for name in self.names}, count)
            return _store(p, param), {name: _store(values, param) for name, values in new.items()}

    @abc.abstractmethod
    def _step(self, op: Any, p: np.ndarray, g: np.ndarray, state: Arrays, count: int) -> tuple[np.ndarray, Arrays]:
        """`step` in arrays of opmath, whose type is `op`."""

    def oracle(self, param: Tensor, grads: Iterable[Tensor]) -> np.ndarray:
        """The parameter after one step per gradient, by the textbook formula in float64 and with no flush."""
        sign = -1 if self.group["maximize"] else 1
        p = param.detach().double().numpy().copy()
        state = {name: value.double().numpy() for name, value in self.first_state(param).items()}
        for count, grad in enumerate(grads, start=1):
            p = self._textbook(p, sign * grad.detach().double().numpy(), state, count)
        return p

    @abc.abstractmethod
    def _textbook(self, p: np.ndarray, g: np.ndarray, state: Arrays, count: int) -> np.ndarray:
        """Return the parameter; the state is updated in place."""


class AdamTranscription(Transcription):
    def __init__(self, group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        super().__init__(group, defaults)
        self.amsgrad = group.get("amsgrad", False)
        self.names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if self.amsgrad else 2]

    def _step(self, op: Any, p: np.ndarray, g: np.ndarray, state: Arrays, count: int) -> tuple[np.ndarray, Arrays]:
        group, lr = self.group, _Lr(self.group["lr"])
        beta1, beta2 = group["betas"]
        m, v = state["exp_avg"], state["exp_avg_sq"]
        if group["weight_decay"] != 0:
            if group["decoupled_weight_decay"]:
                p = p * op(lr.decay(group["weight_decay"]))
            else:
                g = _fma(p, op(group["weight_decay"]), g)
        weight1, weight2 = op(1 - beta1), op(1 - beta2)
        difference = g - m
        m = _fma(weight1, difference, m) if weight1 < op(0.5) else _fma(weight1 - op(1), difference, g)
        v = _fma(weight2 * g, g, op(beta2) * v)
        largest, new = v, {"exp_avg": self._flush(m), "exp_avg_sq": self._flush(v)}
        if self.amsgrad:
            before = state["max_exp_avg_sq"]
            largest = np.where((before > v) | np.isnan(before), before, v)  # NaN if either is; a tie takes v
            new["max_exp_avg_sq"] = largest
        return self._update(op, p, m, largest, lr, count), new

    def _flush(self, moment: np.ndarray) -> np.ndarray:
        if self.group["eps"] < FLUSH_MIN_EPS:
            return moment
        tiny = np.abs(moment) < np.finfo(moment.dtype).tiny
        return np.where(tiny, np.copysign(moment.dtype.type(0), moment), moment)

    def _update(self, op: Any, p: np.ndarray, m: np.ndarray, v: np.ndarray, lr: _Lr, count: int) -> np.ndarray:
        beta1, beta2 = self.group["betas"]
        denom = np.sqrt(v) / op((1 - beta2**count) ** 0.5) + op(self.group["eps"])
        return p + (op(-lr.over(1 - beta1**count)) * m) / denom

    def _textbook(self, p: np.ndarray, g: np.ndarray, state: Arrays, count: int) -> np.ndarray:
        group, lr = self.group, float(self.group["lr"])
        beta1, beta2 = group["betas"]
        if group["decoupled_weight_decay"]:
            p = p - lr * group["weight_decay"] * p
        else:
            g = g + group["weight_decay"] * p
        state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * g
        state["exp_avg_sq"] = v = beta2 * state["exp_avg_sq"] + (1 - beta2) * g**2
        if self.amsgrad:
            state["max_exp_avg_sq"] = v = np.maximum(state["max_exp_avg_sq"], v)
        return p - lr * self._direction(state["exp_avg"] / (1 - beta1**count), np.sqrt(v), count)

    def _direction(self, m_hat: np.ndarray, root: np.ndarray, count: int) -> np.ndarray:
        return m_hat / (root / math.sqrt(1 - self.group["betas"][1] ** count) + self.group["eps"])


class RAdamTranscription(AdamTranscription):
    def __init__(self, group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        super().__init__(group, defaults)
        self.degenerate = group.get("degenerate_to_sgd", True)
        self.optimized = group.get("optimized_update", True)

    def rho(self, count: int) -> float:
        beta2 = self.group["betas"][1]
        return 2 / (1 - beta2) - 1 - 2 * count * beta2**count / (1 - beta2**count)

    def rect(self, count: int) -> float:
        rho, rho_inf = self.rho(count), 2 / (1 - self.group["betas"][1]) - 1
        return ((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)) ** 0.5

    def _update(self, op: Any, p: np.ndarray, m: np.ndarray, v: np.ndarray, lr: _Lr, count: int) -> np.ndarray:
        beta1, beta2 = self.group["betas"]
        correction, eps = op((1 - beta2**count) ** 0.5), op(self.group["eps"])
        change = m / op(1 - beta1**count) * op(lr.value)
        if self.rho(count) > 5:
            root = np.sqrt(v)
            adaptive = op(1) / (root + eps) * correction if self.optimized else op(1) / (root / correction + eps)
            return p - change * adaptive * op(self.rect(count))
        return p - change if self.degenerate else p

    def _direction(self, m_hat: np.ndarray, root: np.ndarray, count: int) -> np.ndarray:
        if self.rho(count) <= 5:
            return m_hat * self.degenerate
        correction, eps = math.sqrt(1 - self.group["betas"][1] ** count), self.group["eps"]
        adaptive = correction / (root + eps) if self.optimized else 1 / (root / correction + eps)
        return m_hat * self.rect(count) * adaptive


class AdagradTranscription(Transcription):
    names = ("sum",)

    def __init__(self, group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        super().__init__(group, defaults)
        self.inside = group.get("eps_inside_sqrt", False)

    def first_state(self, param: Tensor) -> State:
        return {"sum": torch.full_like(param, self.defaults["initial_accumulator_value"]).detach()}

    def _denom(self, total: np.ndarray, eps: Any) -> np.ndarray:
        return np.sqrt(total + eps) if self.inside else np.sqrt(total) + eps

    def _step(self, op: Any, p: np.ndarray, g: np.ndarray, state: Arrays, count: int) -> tuple[np.ndarray, Arrays]:
        group = self.group
        if group["weight_decay"] != 0:
            g = _fma(p, op(group["weight_decay"]), g)
        total = _fma(g, g, state["sum"])
        rate = op(-_Lr(group["lr"]).over(1 + (count - 1) * group["lr_decay"]))
        return p + (rate * g) / self._denom(total, op(group["eps"])), {"sum": total}

    def _textbook(self, p: np.ndarray, g: np.ndarray, state: Arrays, count: int) -> np.ndarray:
        group = self.group
        g = g + group["weight_decay"] * p
        state["sum"] = state["sum"] + g**2
        rate = float(group["lr"]) / (1 + (count - 1) * group["lr_decay"])
        return p - rate * g / self._denom(state["sum"], group["eps"])


def transcription(optimizer: torch.optim.Optimizer, group: int = 0) -> Transcription:
    """Return the transcription of one group of an optimizer, torch's or ours."""
    kinds = {
        torch.optim.RAdam: RAdamTranscription,
        torch.optim.Adagrad: AdagradTranscription,
        torch.optim.Adam: AdamTranscription,
    }
    (kind,) = (made for cls, made in kinds.items() if isinstance(optimizer, cls))
    return kind(optimizer.param_groups[group], optimizer.defaults)


# --- accuracy ------------------------------------------------------------------------------------------------------


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
