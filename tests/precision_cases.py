"""What the tests of storage forms share: inputs, and the same training by ours and by the reference, precision.py."""

import copy
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from optimizers import BY_ID, OWN_VARIANTS, VARIANTS, Row, generator, gradients
from precision import BLOCK, FORM_BY_ID, PLAIN, Case, Form, FormTranscription, has_codes, of_elements, reconstruct
from reference import State, assert_same_bits, varied_values
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

Shape = tuple[int, ...]
SetPlace = Callable[[str], None]

ROWS = [*VARIANTS, *OWN_VARIANTS]
# The rules, with every stream, every flag and an lr of both kinds.
KINDS = [BY_ID["adamw-decay-amsgrad-lr32"], BY_ID["radam-decoupled-lr32"], BY_ID["adagrad-decay-lr_decay"]]

# Around the lanes, the blocks of codes and the units of work. int8 has codes where rows are as long as a block.
SHAPES: list[Shape] = [(1,), (7,), (127,), (128,), (129,), (1000,), (2047,), (), (0,)]
SHAPES += [(5, 300), (3, 128), (2, 4100), (4, 127), (1, 2047), (2, 3, 50)]
FEW_SHAPES: list[Shape] = [(1,), (129,), (5, 300), (3, 128), (2, 3, 50), (1, 1031), ()]

OPTIONS = ("master_weights", "rounding", "state_dtype", "seed")

SOME_FORMS = [
    FORM_BY_ID[name]
    for name in (
        "bfloat16-master",
        "bfloat16-split-int8-grad_float32",
        "bfloat16-stochastic-state16",
        "bfloat16-kahan-int8",
        "float16-master-state16",
        "float16-stochastic",
        "float16-kahan-int8",
        "float32-nearest-int8",
        "float32-nearest-state16-grad_float16",
    )
]

MIXED = [
    FORM_BY_ID["bfloat16-stochastic"],
    PLAIN[0],
    FORM_BY_ID["bfloat16-split-int8"],
    PLAIN[1],
    FORM_BY_ID["float16-kahan-state16"],
    FORM_BY_ID["bfloat16-nearest-grad_float32"],
    PLAIN[2],
    FORM_BY_ID["float32-nearest-int8"],
    FORM_BY_ID["float16-master-grad_bfloat16"],
    PLAIN[3],
    FORM_BY_ID["bfloat16-stochastic-int8"],
]

REMEDIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "master": {"master_weights": True},
    "split": {"master_weights": "split"},
    "stochastic": {"rounding": "stochastic", "state_dtype": torch.float32},
    "kahan": {"rounding": "kahan", "state_dtype": torch.float32},
}


def case_name(case: Case) -> str:
    return case.id


# --- inputs ----------------------------------------------------------------------------------------------------------


def tame_values(numel: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Of many magnitudes, runs of zeros and of what is tiny among them, whose squares are finite.

    In codes one inf or nan takes its whole block along: wild values would leave nothing to compare.
    """
    g = generator(seed)
    decades = 4.0 if dtype == torch.float16 else 12.0
    exponents = decades * (2 * torch.rand(numel, generator=g, dtype=torch.float64) - 1)
    values = torch.randn(numel, generator=g, dtype=torch.float64) * 10**exponents
    kinds = torch.tensor([1.0, 1.0, 1e-6, 0.0, 1e-15, 1e-28], dtype=torch.float64)
    runs = torch.randint(len(kinds), (numel // 100 + 1,), generator=g).repeat_interleave(100)[:numel]
    return (values * kinds[runs]).to(dtype)


@functools.lru_cache(maxsize=512)
def first_value(case: Case, shape: Shape, seed: int) -> Tensor:
    numel = math.prod(shape)
    if case.form.state_dtype == "int8" and has_codes(shape):
        return tame_values(numel, case.dtype, seed).view(shape)
    return varied_values(numel, case.dtype, generator(seed)).view(shape)


@functools.lru_cache(maxsize=512)
def grads_of(case: Case, shape: Shape, steps: int, seed: int) -> list[Tensor]:
    """One a step; each element keeps its magnitude. Never written to."""
    numel, dtype = math.prod(shape), case.grad_dtype
    if case.form.state_dtype != "int8" or not has_codes(shape):
        return [grad.view(shape) for grad in gradients(numel, dtype, steps, seed)]
    g, usual = generator(seed), tame_values(numel, dtype, seed + 1)
    grads = []
    for step in range(steps):
        noise = 2 * torch.rand(numel, generator=g, dtype=torch.float64) - 1
        grad = (usual * noise).to(dtype)
        if step == 5 and numel > 2 * BLOCK:
            grad[-1] = math.nan
        grads.append(grad.view(shape))
    return grads


@dataclass(frozen=True)
class Piece:
    """A parameter: its case, shape and the seed of its values."""

    case: Case
    shape: Shape
    seed: int

    @property
    def value(self) -> Tensor:
        return first_value(self.case, self.shape, self.seed)

    def grads(self, steps: int) -> list[Tensor]:
        return grads_of(self.case, self.shape, steps, self.seed + 1000)


def pieces(*cases: Case, shapes: Sequence[Shape] = tuple(SHAPES)) -> list[Piece]:
    """Those of all shapes, case after case."""
    return [Piece(case, shape, i) for case in cases for i, shape in enumerate(shapes)]


def ordinary(case: Case, shape: Shape, seed: int, *, grad: bool = False) -> Tensor:
    dtype = case.grad_dtype if grad else case.dtype
    return varied_values(math.prod(shape), dtype, generator(seed), wild=False).view(shape)


# --- ours and the reference ------------------------------------------------------------------------------------------


def set_grad(param: Tensor, grad: Tensor | None) -> None:
    """Also one of another dtype."""
    param.grad = None
    if grad is not None:
        if grad.dtype != param.dtype or param.grad_dtype != grad.dtype:
            param.grad_dtype = grad.dtype
        param.grad = grad


def set_grads(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    for param, grad in zip(params, grads, strict=True):
        set_grad(param, grad)


def params_of(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def make(row: Row, cases: Sequence[Case], values: Sequence[Tensor], **more: Any) -> Optimizer:
    """A group for each run of one case; the parameters keep the values' layouts."""
    groups = []
    for case, run in itertools.groupby(zip(cases, values, strict=True), key=lambda pair: pair[0]):
        params = [Parameter(value.clone(memory_format=torch.preserve_format)) for _, value in run]
        groups.append({"params": params, **case.form.options()})
    return row.make(groups, **more)


def make_pieces(row: Row, which: Sequence[Piece], **more: Any) -> Optimizer:
    return make(row, [piece.case for piece in which], [piece.value for piece in which], **more)


@dataclass
class Known:
    """What the reference knows of a parameter."""

    formula: FormTranscription
    param: Tensor
    state: State
    count: int = 0


class Reference:
    """The same training by the transcription."""

    def __init__(self, row: Row, cases: Sequence[Case], values: Sequence[Tensor], **more: Any) -> None:
        options = row.make([torch.ones(1)], **more)
        self.known = []
        for case, value in zip(cases, values, strict=True):
            formula = FormTranscription(options, case.form)
            param = value.detach().clone(memory_format=torch.contiguous_format)
            self.known.append(Known(formula, param, formula.first_state(param)))

    def step(self, grads: Sequence[Tensor | None], inv_scale: float | None = None, clip: float | None = None) -> None:
        for position, (known, grad) in enumerate(zip(self.known, grads, strict=True)):
            if grad is not None:
                known.count += 1
                known.param, known.state = known.formula.step(
                    known.param, grad, known.state, known.count, position, inv_scale, clip
                )

    def assert_same(self, optimizer: Optimizer, when: str) -> None:
        for i, (known, param) in enumerate(zip(self.known, params_of(optimizer), strict=True)):
            where = f"parameter {i} {tuple(param.shape)} {when}"
            assert_same_bits(param.detach(), known.param, where)
            if known.count:
                assert_same_state(optimizer.state[param], known.state, known.count, where)

    def copy(self) -> "Reference":
        """As it is now: a step replaces tensors and writes none."""
        other = copy.copy(self)
        other.known = [copy.copy(known) for known in self.known]
        return other


def assert_same_state(actual: dict[str, Any], expected: State, count: int, where: str) -> None:
    """The names in order, the bits; the codes of a block that holds an inf or nan may be any."""
    assert [name for name in actual if name != "ema"] == ["step", *expected], where
    assert float(actual["step"]) == count, where
    for k, (name, value) in enumerate(expected.items()):
        found = actual[name]
        if value.dtype == torch.uint8 and name != "param_remainder":
            scales = of_elements(expected["scales"][:, :, k].numpy(), tuple(value.shape))
            assert found.is_contiguous(), where
            assert found.dtype == torch.uint8 and found.shape == value.shape, where
            kept = torch.from_numpy(np.isfinite(scales))
            assert_same_bits(found.flatten()[kept], value.flatten()[kept], f"{name} of {where}")
        else:
            assert_same_bits(found, value, f"{name} of {where}")


@functools.lru_cache(maxsize=4)
def expected_run(row: Row, which: tuple[Piece, ...], steps: int, at: tuple[int, ...]) -> dict[int, Reference]:
    """The reference after some of the steps."""
    reference = Reference(row, [piece.case for piece in which], [piece.value for piece in which])
    found = {}
    for step, grads in enumerate(zip(*(piece.grads(steps) for piece in which), strict=True), start=1):
        reference.step(grads)
        if step in at:
            found[step] = reference.copy()
    return found


def snapshot(optimizer: Optimizer) -> list[Any]:
    """All that a step may change, as bytes, and the options."""

    def raw(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            return id(tensor)
        return tensor.dtype, tuple(tensor.shape), tensor.detach().contiguous().flatten().view(torch.uint8).tolist()

    seen: list[Any] = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    for param in params_of(optimizer):
        seen.append(raw(param) if param.numel() else ())
        seen.append(
            {name: raw(value) if value.numel() else () for name, value in optimizer.state.get(param, {}).items()}
        )
    return seen


def run_some(optimizer: Optimizer, which: Sequence[Piece], first: int, last: int, total: int = 8) -> None:
    """Steps first to last of these pieces' gradients."""
    for grads in list(zip(*(piece.grads(total) for piece in which), strict=True))[first:last]:
        set_grads(params_of(optimizer), grads)
        optimizer.step()


def assert_same_training(actual: Optimizer, expected: Optimizer, when: str = "") -> None:
    for i, (p, q) in enumerate(zip(params_of(actual), params_of(expected), strict=True)):
        assert_same_bits(p.detach(), q.detach(), f"parameter {i} {when}")
        mine, theirs = actual.state[p], expected.state[q]
        assert list(mine) == list(theirs)
        for name, value in theirs.items():
            assert_same_bits(mine[name], value, f"{name} of parameter {i} {when}")


def value_of(optimizer: Optimizer, param: Tensor) -> Tensor:
    """The float32 that the next step begins with, flat."""
    state, p = optimizer.state[param], param.detach()
    if "param_remainder" in state:
        return torch.from_numpy(reconstruct(p, state["param_remainder"]))
    if "compensation" in state:
        return (p.float() + state["compensation"].float()).flatten()
    return state.get("master_param", p).float().flatten()


def moments_of(optimizer: Optimizer, param: Tensor) -> State:
    """exp_avg, ... in float32."""
    state = {name: value for name, value in optimizer.state[param].items() if name != "step"}
    found = FormTranscription(optimizer, Form())
    return found.moments(state)
