"""The independent reference for storage forms: how float32 values are stored as parameters and state, in NumPy.

Nothing here is shared with the code under test. The arithmetic is that of reference.py's transcriptions, in float32:
a form decides only how their operands are read and how their results are written.
"""

import functools
import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from reference import State, transcription
from torch import Tensor

UINT32 = 0xFFFFFFFF

# --- draws -----------------------------------------------------------------------------------------------------------


def philox4x32(counter: np.ndarray, key: np.ndarray, rounds: int = 7) -> np.ndarray:
    """Philox4x32 (Salmon et al. 2011): counters (..., 4) and keys (..., 2) of 32 bits to random words (..., 4)."""
    counter, key = (np.asarray(words, dtype=np.uint64) for words in (counter, key))
    c0, c1, c2, c3 = np.moveaxis(counter, -1, 0)
    k0, k1 = np.moveaxis(key, -1, 0)
    mask, half = np.uint64(UINT32), np.uint64(32)
    for _ in range(rounds):
        first, second = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (second >> half) ^ c1 ^ k0, second & mask, (first >> half) ^ c3 ^ k1, first & mask
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & mask, (k1 + np.uint64(0xBB67AE85)) & mask
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), axis=-1).astype(np.uint32)


@functools.lru_cache(maxsize=2048)
def draws(numel: int, seed: int, position: int, step: int) -> np.ndarray:
    """The draws (0 to 65,535, as int64) of a parameter's elements in row-major order, and of three state tensors':
    shape (4, numel)."""
    groups = -(-numel // 256)
    counters = np.arange(16 * groups, dtype=np.uint64)
    counter = np.empty((len(counters), 4), dtype=np.uint64)
    counter[:, 0], counter[:, 1] = counters & np.uint64(UINT32), counters >> np.uint64(32)
    counter[:, 2], counter[:, 3] = step & UINT32, position
    words = philox4x32(counter, np.array([seed & UINT32, seed >> 32], dtype=np.uint64))
    eights = np.stack([words & 0xFFFF, words >> 16], axis=-1).reshape(-1, 8).astype(np.int64)  # low, then high
    r = np.empty((4, groups, 2, 128), dtype=np.int64)
    for tensor, half in itertools.product(range(4), range(2)):
        total = eights
        for bit in range(3):
            if (2 * tensor + half) >> bit & 1:
                total = total ^ np.roll(eights, -(bit + 1), axis=1)
        r[tensor, :, half] = total.reshape(groups, 128)
    r = r.reshape(4, -1)[:, :numel]
    r.flags.writeable = False  # it is cached
    return r


# --- 16 bits ---------------------------------------------------------------------------------------------------------


def bits32(x: np.ndarray) -> np.ndarray:
    """The bits of float32 values, as int64: room for what is added."""
    return np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).astype(np.int64)


def from_bits32(bits: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray((bits & UINT32).astype(np.uint32)).view(np.float32)


def bits16(tensor: Tensor) -> np.ndarray:
    """The bits of a tensor of 16-bit values, flat, as int64."""
    flat = tensor.detach().cpu().flatten().contiguous()
    return flat.view(torch.int16).numpy().view(np.uint16).astype(np.int64)


def from_bits16(bits: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray((bits & 0xFFFF).astype(np.uint16)).view(np.int16)).view(dtype)


def floats(tensor: Tensor) -> np.ndarray:
    """Flat float32 values."""
    return tensor.detach().cpu().to(torch.float32).flatten().numpy().copy()


def round_nearest(x: np.ndarray, dtype: torch.dtype) -> Tensor:
    """To nearest, ties to even."""
    return torch.from_numpy(np.ascontiguousarray(x)).to(dtype)


def round_away(x: np.ndarray) -> Tensor:
    """To bfloat16, to nearest, ties away from zero."""
    b = bits32(x)
    return from_bits16(np.where(np.isnan(x), (b >> 16) | 0x40, (b + 0x8000) >> 16), torch.bfloat16)


def round_stochastic(x: np.ndarray, dtype: torch.dtype, r: np.ndarray) -> Tensor:
    """To bfloat16 or float16: up with the probability of the part cut off, as far as 16 or 13 bits of draw tell."""
    nearest, b = bits16(round_nearest(x, dtype)), bits32(x)
    if dtype == torch.bfloat16:
        return from_bits16(np.where(np.isfinite(x), (b + r) >> 16, nearest), dtype)
    sign, a = (b >> 16) & 0x8000, b & 0x7FFFFFFF
    smallest = np.float32(2**-14)  # normal: what is below is rounded as what is above
    with np.errstate(all="ignore"):
        above = bits32(np.abs(x) + smallest) - (1 << 23)
    z = np.where(a < bits32(smallest), above, a)
    h = np.minimum((z + (r >> 3) - 0x38000000) >> 13, 0x7C00)
    return from_bits16(np.where(a < bits32(np.float32(65536)), sign | h, nearest), dtype)


def split(x: np.ndarray) -> tuple[Tensor, Tensor]:
    """A float32 as a bfloat16 and what is missing, the two bytes of an int16."""
    b = bits32(x)
    remainder = torch.from_numpy(np.where(np.isnan(x), 0, b & 0xFFFF).astype(np.uint16).view(np.int16))
    return round_away(x), remainder.unsqueeze(-1).view(torch.uint8)


def reconstruct(p: Tensor, remainder: Tensor) -> np.ndarray:
    """A zero or an infinity that has another's remainder, which would make it a NaN, is itself."""
    high = bits16(p) << 16
    joined = from_bits32(
        (high + remainder.detach().contiguous().view(torch.int16).flatten().numpy().astype(np.int64)) & 0xFFFFFFFF
    )
    return np.where(np.isnan(joined), from_bits32(high), joined)


# --- 8 bits ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Code:
    """A float of 8 bits: a sign if `signed`, then a field of exponent and mantissa; the largest lies in [1, 2)."""

    signed: bool
    exponent_bits: int
    mantissa_bits: int

    @property
    def bias(self) -> int:
        return 2**self.exponent_bits - 1

    @property
    def fields(self) -> int:
        return 2 ** (self.exponent_bits + self.mantissa_bits)

    @functools.cached_property
    def values(self) -> np.ndarray:
        """Of each field."""
        m, bias, f = self.mantissa_bits, self.bias, np.arange(self.fields)
        subnormal = np.ldexp(f.astype(np.float64), 1 - bias - m)
        normal = np.ldexp(1 + (f % 2**m) / 2**m, (f >> m) - bias)
        return np.where(f < 2**m, subnormal, normal).astype(np.float32)

    @property
    def largest(self) -> np.float32:
        return self.values[-1]

    def scale(self, amax: np.ndarray) -> np.ndarray:
        """Of a block whose largest magnitude is given."""
        with np.errstate(all="ignore"):
            scale = (amax * np.float32(1 / float(self.largest))).astype(np.float32)
            found = np.where(scale >= np.float32(2**-112), scale, np.float32(0))
            return np.where(amax < 2.0 ** (112 + self.bias), found, np.nan).astype(np.float32)

    def encode(self, x: np.ndarray, amax: np.ndarray, r: np.ndarray) -> np.ndarray:
        """With the block's largest magnitude and the draw of each element. Where the scale is 0 or nan, so are all."""
        m, bias = self.mantissa_bits, self.bias
        with np.errstate(all="ignore"):
            y = (np.abs(x) * (self.largest / amax).astype(np.float32)).astype(np.float32)
            smallest = np.float32(2.0 ** (1 - bias))
            above = (y + smallest).astype(np.float32)
        z = np.where(y >= smallest, bits32(y), bits32(above) - (1 << 23))
        field = ((z + (r << (7 - m)) + (1 << (6 - m))) >> (23 - m)) - ((127 - bias) << m)
        if self.signed:
            field = field | (np.signbit(x).astype(np.int64) * self.fields)
        else:
            field = np.where(x > 0, np.maximum(field, 1), field)
        return np.where(self.scale(amax) > 0, field, 0).astype(np.uint8)

    def decode(self, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
        codes = codes.astype(np.int64)
        value = self.values[codes % self.fields]
        if self.signed:
            value = np.where(codes >= self.fields, -value, value)
        with np.errstate(all="ignore"):
            return (value * scale).astype(np.float32)


EXP_AVG_CODE = Code(signed=True, exponent_bits=3, mantissa_bits=4)
OTHER_CODE = Code(signed=False, exponent_bits=4, mantissa_bits=4)
BLOCK = 128


def code_of(name: str) -> Code:
    """That of the state of this name."""
    return EXP_AVG_CODE if name == "exp_avg" else OTHER_CODE


def rows_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """The parameter as (d0, L)."""
    d0 = shape[0] if shape else 1
    return d0, math.prod(shape) // d0 if d0 else 0


def has_codes(shape: tuple[int, ...], block: int = BLOCK) -> bool:
    """Whether int8 state of this shape is stored in codes, and not in float32."""
    return rows_of(shape)[1] >= block


def of_elements(scales: np.ndarray, shape: tuple[int, ...], block: int = BLOCK) -> np.ndarray:
    """What each block, (d0, blocks), has, for each element, flat."""
    return np.repeat(scales, block, axis=1)[:, : rows_of(shape)[1]].reshape(-1)


def encode_blocks(
    x: np.ndarray, shape: tuple[int, ...], block: int, code: Code, r: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Codes, flat, and scales, (d0, blocks), of flat values."""
    d0, length = rows_of(shape)
    blocks = -(-length // block)
    padded = np.zeros((d0, blocks * block), dtype=np.float32)
    padded[:, :length] = np.abs(x).reshape(d0, length)
    amax = padded.reshape(d0, blocks, block).max(axis=2)  # NaN if one is
    return code.encode(x, of_elements(amax, shape, block), r), code.scale(amax)


def decode_blocks(codes: np.ndarray, scales: np.ndarray, shape: tuple[int, ...], block: int, code: Code) -> np.ndarray:
    return code.decode(codes, of_elements(scales, shape, block))


# --- forms -----------------------------------------------------------------------------------------------------------

HALVES = (torch.bfloat16, torch.float16)
COMPANIONS = ("master_param", "param_remainder", "compensation")


@dataclass(frozen=True)
class Form:
    """How a parameter and its state are stored: the options of its group, and its gradient's dtype if it is another."""

    master_weights: bool | str = False
    rounding: str = "nearest"
    state_dtype: torch.dtype | str | None = None
    seed: int = 0
    grad_dtype: torch.dtype | None = None

    def options(self) -> dict[str, Any]:
        names = ("master_weights", "rounding", "state_dtype", "seed")
        return {name: getattr(self, name) for name in names}

    def in_groups(self) -> dict[str, Any]:
        """The same as param_groups have it: a dtype by its name."""
        options = self.options()
        dtype = options["state_dtype"]
        return options | {"state_dtype": dtype and str(dtype).removeprefix("torch.")}

    def companion(self, dtype: torch.dtype) -> str | None:
        """What a parameter of this dtype has beside it."""
        if dtype not in HALVES:
            return None
        if self.master_weights:
            return "param_remainder" if self.master_weights == "split" else "master_param"
        return "compensation" if self.rounding == "kahan" else None

    def stored_state(self, param: Tensor) -> torch.dtype:
        """uint8 where it is codes."""
        if self.state_dtype == "int8":
            return torch.uint8 if has_codes(tuple(param.shape)) else torch.float32
        if isinstance(self.state_dtype, torch.dtype):
            return self.state_dtype
        has_master = self.companion(param.dtype) in ("master_param", "param_remainder")
        return torch.float32 if has_master else param.dtype

    def is_plain(self, param: Tensor, grad: Tensor) -> bool:
        return replace(self, seed=0, grad_dtype=None) == Form() and grad.dtype == param.dtype


@dataclass(frozen=True)
class Case:
    """A form and the dtype of the parameters stored so."""

    id: str
    dtype: torch.dtype
    form: Form

    @property
    def grad_dtype(self) -> torch.dtype:
        return self.form.grad_dtype or self.dtype


class FormTranscription:
    """A transcription's step on a parameter that is stored in a form, with its whole state but `step`."""

    def __init__(self, optimizer: torch.optim.Optimizer, form: Form, group: int = 0) -> None:
        self.formula, self.form = transcription(optimizer, group), form

    def first_state(self, param: Tensor) -> State:
        """In the spec's order. A first `sum` that is not zero is no part of the spec for codes."""
        shape, stored = tuple(param.shape), self.form.stored_state(param)
        first = {name: floats(value) for name, value in self.formula.first_state(param.float()).items()}
        if param.dtype == torch.float64:
            return self.formula.first_state(param)
        assert stored != torch.uint8 or not any(values.any() for values in first.values())
        state = {name: torch.from_numpy(values).to(stored).view(shape) for name, values in first.items()}
        if stored == torch.uint8:
            d0, length = rows_of(shape)
            state["scales"] = torch.zeros(d0, -(-length // BLOCK), len(first))
        companion = self.form.companion(param.dtype)
        if companion == "master_param":
            state[companion] = param.detach().float().contiguous()
        elif companion is not None:
            state[companion] = (
                torch.zeros(*shape, 2, dtype=torch.uint8)
                if companion == "param_remainder"
                else torch.zeros(shape, dtype=param.dtype)
            )
        return state

    def value(self, param: Tensor, state: State) -> np.ndarray:
        """The parameter in float32, flat."""
        p, companion = floats(param), self.form.companion(param.dtype)
        if companion == "param_remainder":
            return reconstruct(param, state[companion])
        if companion == "compensation":
            with np.errstate(all="ignore"):
                return p + floats(state[companion])
        if companion is None:
            return p
        master = floats(state[companion])
        rounded = round_away(master) if param.dtype == torch.bfloat16 else round_nearest(master, param.dtype)
        same = (bits16(param) == bits16(rounded)) | (np.isnan(p) & np.isnan(floats(rounded)))
        return np.where(same, master, p)

    def store(self, x: np.ndarray, dtype: torch.dtype, r: np.ndarray) -> tuple[Tensor, State]:
        """The parameter, flat, and its companion."""
        companion = self.form.companion(dtype)
        if companion == "param_remainder":
            p, remainder = split(x)
            return p, {companion: remainder}
        if companion == "master_param":
            p = round_away(x) if dtype == torch.bfloat16 else round_nearest(x, dtype)
            return p, {companion: torch.from_numpy(x)}
        if self.form.rounding == "stochastic" and dtype in HALVES:
            return round_stochastic(x, dtype, r), {}
        p = round_nearest(x, dtype)
        if companion is None:
            return p, {}
        with np.errstate(all="ignore"):
            lost = np.where(np.isfinite(floats(p)), x - floats(p), np.float32(0)).astype(np.float32)
        return p, {companion: round_nearest(lost, dtype)}

    def moments(self, state: State) -> State:
        """What the rule keeps, in float32."""
        found = {}
        for k, name in enumerate(self.formula.names):
            stored = state[name]
            values = floats(stored)
            if stored.dtype == torch.uint8 and name not in COMPANIONS:
                scales = state["scales"][:, :, k].numpy()
                values = decode_blocks(stored.flatten().numpy(), scales, tuple(stored.shape), BLOCK, code_of(name))
            found[name] = torch.from_numpy(values).view(stored.shape)
        return found

    def store_moments(self, moments: State, stored: torch.dtype, r: np.ndarray) -> State:
        state: State = {}
        scales = []
        for k, name in enumerate(self.formula.names):
            shape, values, r_k = moments[name].shape, floats(moments[name]), r[1 + k]
            if stored == torch.uint8:
                codes, block_scales = encode_blocks(values, tuple(shape), BLOCK, code_of(name), r_k)
                state[name] = torch.from_numpy(codes).view(shape)
                scales.append(torch.from_numpy(block_scales))
            elif stored in HALVES:
                state[name] = round_stochastic(values, stored, r_k).view(shape)
            else:
                state[name] = torch.from_numpy(values).view(shape)
        if scales:
            state["scales"] = torch.stack(scales, dim=-1)
        return state

    def step(
        self,
        param: Tensor,
        grad: Tensor,
        state: State,
        count: int,
        position: int = 0,
        inv_scale: float | None = None,
        clip: float | None = None,
    ) -> tuple[Tensor, State]:
        """Return the parameter, at this position of its optimizer, and its state after the step of this count."""
        if param.dtype == torch.float64 or self.form.is_plain(param, grad):
            return self.formula.step(param, grad, state, count, inv_scale, clip)
        x = torch.from_numpy(self.value(param, state)).view(param.shape)
        new, moments = self.formula.step(x, grad, self.moments(state), count, inv_scale, clip)
        r = draws(param.numel(), self.form.seed, position, count)
        p, companion = self.store(floats(new), param.dtype, r[0])
        after = self.store_moments(moments, self.form.stored_state(param), r)
        of_bytes = {"param_remainder": (2,)}
        after.update({name: value.view((*param.shape, *of_bytes.get(name, ()))) for name, value in companion.items()})
        return p.view(param.shape), after


# --- rows ------------------------------------------------------------------------------------------------------------

_WAYS: dict[str, dict[str, Any]] = {
    "master": {"master_weights": True},
    "split": {"master_weights": "split"},
    "stochastic": {"rounding": "stochastic", "seed": 0xFEDCBA9876543210},
    "kahan": {"rounding": "kahan"},
    "nearest": {},
}
_STATES: dict[str, dict[str, Any]] = {
    "": {},
    "state32": {"state_dtype": torch.float32},
    "state16": {"state_dtype": torch.bfloat16, "seed": 7},
    "int8": {"state_dtype": "int8", "seed": 2**32 + 5},
}
_GRADS: dict[str, dict[str, Any]] = {
    f"grad_{dtype}".replace("torch.", ""): {"grad_dtype": dtype} for dtype in (torch.float32, *HALVES)
}


def _case(dtype: torch.dtype, *names: str) -> Case:
    merged: dict[str, Any] = {}
    for name in names:
        merged.update((_WAYS | _STATES | _GRADS)[name])
    return Case("-".join([str(dtype).removeprefix("torch."), *filter(None, names)]), dtype, Form(**merged))


_BF16, _F16, _F32 = torch.bfloat16, torch.float16, torch.float32

FORMS = [
    *(_case(_BF16, way, state) for way in _WAYS for state in _STATES if (way, state) != ("nearest", "")),
    *(_case(_F16, way, state) for way in ("master", "stochastic", "kahan") for state in ("", "state16", "int8")),
    *(_case(_F16, "nearest", state) for state in ("state32", "state16", "int8")),
    *(_case(_F32, "nearest", state) for state in ("state16", "int8")),
    # Of a parameter in float32 these change nothing.
    *(_case(_F32, way, "") for way in ("master", "split", "stochastic", "kahan")),
    # Gradients of another dtype. Without any option the state of 16 bits is rounded stochastically all the same.
    *(_case(_BF16, way, "", grad) for way in _WAYS for grad in ("grad_float32", "grad_float16")),
    *(_case(_BF16, way, "int8", "grad_float32") for way in ("split", "stochastic")),
    *(
        _case(_F16, way, "", f"grad_{g}")
        for way in ("master", "stochastic", "nearest")
        for g in ("float32", "bfloat16")
    ),
    *(_case(_F32, "nearest", state, f"grad_{g}") for state in ("", "state16") for g in ("bfloat16", "float16")),
    _case(_F32, "nearest", "int8", "grad_bfloat16"),
]
FORM_BY_ID = {case.id: case for case in FORMS}
assert len(FORM_BY_ID) == len(FORMS)

PLAIN = [Case(str(dtype).removeprefix("torch."), dtype, Form()) for dtype in (_F32, torch.float64, _BF16, _F16)]
