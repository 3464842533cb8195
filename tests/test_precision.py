"""Storage forms: master weights, stochastic rounding, compensation, state in 16 and 8 bits, gradients of other dtypes.

The reference is precision.py, from the specification alone; the last section tests the reference itself.
"""

import copy
import functools
import io
import itertools
import math
import pickle
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import precision
import pytest
import torch
from optimizers import BY_ID, CUDA_ON_HOST, OWN_VARIANTS, TARGETS, VARIANTS, Row, generator, gradients, name_of
from precision import (
    BLOCK,
    COMPANIONS,
    EXP_AVG_CODE,
    FORM_BY_ID,
    FORMS,
    HALVES,
    OTHER_CODE,
    PLAIN,
    Case,
    Code,
    Form,
    FormTranscription,
    bits16,
    bits32,
    code_of,
    draws,
    encode_blocks,
    floats,
    from_bits16,
    from_bits32,
    has_codes,
    of_elements,
    philox4x32,
    reconstruct,
    round_away,
    round_nearest,
    round_stochastic,
    split,
)
from reference import State, assert_same_bits, varied_values
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

import fusedopt
from fusedopt._config import _C
from fusedopt._precision import as_bytes, words

Shape = tuple[int, ...]
SetPlace = Callable[[str], None]
SetInt = Callable[[int], None]

ROWS = [*VARIANTS, *OWN_VARIANTS]
# The rules, with every stream, every flag and an lr of both kinds.
KINDS = [BY_ID["adamw-decay-amsgrad-lr32"], BY_ID["radam-decoupled-lr32"], BY_ID["adagrad-decay-lr_decay"]]
ADAM = BY_ID["adam"]

# Around the lanes, the blocks of codes and the units of work. int8 has codes where rows are as long as a block.
SHAPES: list[Shape] = [(1,), (7,), (127,), (128,), (129,), (1000,), (2047,), (), (0,)]
SHAPES += [(5, 300), (3, 128), (2, 4100), (4, 127), (1, 2047), (2, 3, 50)]
FEW_SHAPES: list[Shape] = [(1,), (129,), (5, 300), (3, 128), (2, 3, 50), (1, 1031), ()]

ON_DEVICE = "counts_on_device"  # cuda_on_host, with the step counts and all other numbers on the pretended device
PLACES = [*TARGETS, ON_DEVICE]
OPTIONS = ("master_weights", "rounding", "state_dtype", "seed")


def case_name(case: Case) -> str:
    return case.id


@pytest.fixture
def set_place(request: pytest.FixtureRequest, set_capability: Callable[[str], None]) -> SetPlace:
    """Like set_capability, with one place more."""

    def choose(name: str) -> None:
        set_capability(CUDA_ON_HOST if name == ON_DEVICE else name)
        if name == ON_DEVICE:
            _C.set_cuda_on_host(request.getfixturevalue("cuda_library")._name, True)

    return choose


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


def compare(
    row: Row, which: Sequence[Piece], places: Sequence[str], set_place: SetPlace, steps: int = 12, **more: Any
) -> None:
    """Ours on all these places with the reference."""
    expected = expected_run(row, tuple(which), steps, (1, 2, 3, 7, steps))
    for place in places:
        set_place(place)
        optimizer = make_pieces(row, which, **({**more, **row.on_device()} if place == ON_DEVICE else more))
        params = params_of(optimizer)
        for step, grads in enumerate(zip(*(piece.grads(steps) for piece in which), strict=True), start=1):
            set_grads(params, grads)
            optimizer.step()
            if step in expected:
                expected[step].assert_same(optimizer, f"after step {step} on {place}")


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


# --- the bits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FORMS, ids=case_name)
def test_every_form(case: Case, set_place: SetPlace) -> None:
    compare(KINDS[0], pieces(case), PLACES, set_place)


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


@pytest.mark.parametrize("case", SOME_FORMS, ids=case_name)
@pytest.mark.parametrize("row", [row for row in ROWS if row is not KINDS[0]], ids=name_of)
def test_every_variant(row: Row, case: Case, set_place: SetPlace) -> None:
    compare(row, pieces(case, shapes=FEW_SHAPES), PLACES, set_place, steps=8)


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
MIXED_SHAPES: list[Shape] = [(7,), (3, 300), (129,)]


@pytest.mark.parametrize("row", KINDS, ids=name_of)
def test_groups_of_different_forms_in_one_step(row: Row, set_place: SetPlace) -> None:
    compare(row, pieces(*MIXED, shapes=MIXED_SHAPES), PLACES, set_place, steps=4)


def test_a_parameter_without_a_gradient_keeps_its_position(set_place: SetPlace) -> None:
    """Draws are by position among all parameters, and by each one's own step count."""
    which = pieces(*MIXED, shapes=MIXED_SHAPES)
    lacking = [{0, 4, 9, 30}, {3, 4}, set(), {1, 12, 13, 14, 32}]
    for place in PLACES:
        set_place(place)
        optimizer = make_pieces(KINDS[0], which, **(KINDS[0].on_device() if place == ON_DEVICE else {}))
        reference = Reference(KINDS[0], [piece.case for piece in which], [piece.value for piece in which])
        for step, without in enumerate(lacking):
            grads = [None if i in without else piece.grads(4)[step] for i, piece in enumerate(which)]
            set_grads(params_of(optimizer), grads)
            optimizer.step()
            reference.step(grads)
            reference.assert_same(optimizer, f"after step {step} on {place}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_what_is_for_16_bits_changes_no_other_parameter(row: Row, dtype: torch.dtype) -> None:
    case = Case("", dtype, Form())
    for options in ({"master_weights": True}, {"master_weights": "split"}, {"rounding": "stochastic"}, {"seed": 9}):
        which = pieces(case, shapes=[(7,), (3, 300)])
        plain, other = make_pieces(row, which), row.make([Parameter(p.value.clone()) for p in which], **options)
        for optimizer in (plain, other):
            run_some(optimizer, which, 0, 3)
        assert_same_training(other, plain)


@pytest.mark.parametrize("case", PLAIN, ids=case_name)
def test_defaults_given_change_nothing(case: Case) -> None:
    which = pieces(case, shapes=[(7,), (3, 300)])
    plain, other = KINDS[0].make([Parameter(p.value.clone()) for p in which]), make_pieces(KINDS[0], which)
    for optimizer in (plain, other):
        run_some(optimizer, which, 0, 3)
    assert_same_training(other, plain)
    assert {name: other.param_groups[0][name] for name in OPTIONS} == Form().options()


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


# --- threads, units of work, layouts ---------------------------------------------------------------------------------

LARGE: list[Shape] = [(7,), (), (5, 300), (3, 2047), (20_001,), (0,), (2, 4100), (129,)]


@pytest.mark.parametrize("row", KINDS, ids=name_of)
def test_threads_and_chunks(row: Row, capability: str, threads: SetInt, chunk_size: SetInt) -> None:
    """The bits are those of one thread, which are the reference's."""
    which = pieces(*(FORM_BY_ID[case.id] for case in MIXED if case.id in FORM_BY_ID), shapes=LARGE)
    results = []
    for count, chunk in ((1, 1 << 40), (1, 100), (2, 128), (3, 1000), (3, 4096)):
        threads(count)
        chunk_size(chunk)
        optimizer = make_pieces(row, which)
        run_some(optimizer, which, 0, 2, 2)
        results.append((f"with {count} threads, chunks of {chunk}", optimizer))
    for when, optimizer in results[1:]:
        assert_same_training(optimizer, results[0][1], when)
    expected_run(row, tuple(which), 2, (2,))[2].assert_same(results[-1][1], "in parallel")


@pytest.mark.parametrize("chunk", [1, 7, 63, 64, 65])
def test_tiny_chunks(chunk: int, capability: str, threads: SetInt, chunk_size: SetInt) -> None:
    """Smaller than a lane, an eight of draws or a block of codes."""
    which = pieces(*SOME_FORMS, shapes=[(3, 150), (129,)])
    expected = expected_run(KINDS[0], tuple(which), 2, (2,))[2]
    chunk_size(chunk)
    for count in (1, 3):
        threads(count)
        optimizer = make_pieces(KINDS[0], which)
        run_some(optimizer, which, 0, 2, 2)
        expected.assert_same(optimizer, f"with {count} threads")


def strided_like(value: Tensor, layout: str) -> Tensor:
    """The same values, laid out in another way."""
    if layout == "transposed":
        return value.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "channels_last":
        return value.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        wide = torch.zeros(*value.shape[:-1], value.shape[-1] + 5, dtype=value.dtype)
        wide[..., 2:-3] = value
        return wide[..., 2:-3]
    if layout == "every_other":
        wide = torch.zeros(*value.shape, 2, dtype=value.dtype)
        wide[..., 1] = value
        return wide[..., 1]
    return value.flip(0).contiguous().flip(0) if layout == "copied" else value.clone()


LAYOUTS = ("contiguous", "transposed", "channels_last", "sliced", "every_other")


@pytest.mark.parametrize("case", [*SOME_FORMS, FORM_BY_ID["bfloat16-stochastic-int8"]], ids=case_name)
def test_layouts(case: Case, capability: str) -> None:
    """Of parameters and gradients: draws and blocks are by the index of a contiguous one."""
    shape: Shape = (3, 5, 6, 7)
    which = [Piece(case, shape, seed) for seed in range(len(LAYOUTS) ** 2)]
    ways = list(itertools.product(LAYOUTS, LAYOUTS))
    params = [Parameter(piece.value.clone()) for piece in which]
    for param, (layout, _) in zip(params, ways, strict=True):
        param.data = strided_like(param.detach(), layout)
    row = KINDS[0]
    optimizer = row.make(params, **case.form.options())
    reference = Reference(row, [case] * len(which), [piece.value for piece in which])
    for grads in zip(*(piece.grads(3) for piece in which), strict=True):
        set_grads(params, [strided_like(grad, layout) for grad, (_, layout) in zip(grads, ways, strict=True)])
        optimizer.step()
        reference.step(grads)
    reference.assert_same(optimizer, str(ways))
    for param in params:
        like = torch.empty_like(param, memory_format=torch.preserve_format)
        for name in {"master_param"} & optimizer.state[param].keys():
            assert optimizer.state[param][name].stride() == like.stride()


def test_state_of_another_layout(capability: str) -> None:
    """Of what is not codes."""
    for name in ("bfloat16-master", "bfloat16-split", "bfloat16-kahan-state16", "float16-stochastic"):
        which = pieces(FORM_BY_ID[name], shapes=[(6, 70), (3, 300)])
        optimizer = make_pieces(KINDS[0], which)
        reference = Reference(KINDS[0], [piece.case for piece in which], [piece.value for piece in which])
        for step in range(4):
            grads = [piece.grads(4)[step] for piece in which]
            set_grads(params_of(optimizer), grads)
            optimizer.step()
            reference.step(grads)
            for state, layout in zip(optimizer.state.values(), ("transposed", "every_other"), strict=True):
                for key, value in state.items():
                    if key == "param_remainder":
                        state[key] = as_bytes(strided_like(words(value), layout))
                    elif key != "step":
                        state[key] = strided_like(value, layout)
        reference.assert_same(optimizer, name)


# --- master weights --------------------------------------------------------------------------------------------------


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


def test_convert_leaves_other_dtypes_alone() -> None:
    params = [Parameter(torch.randn(5, 300, dtype=dtype)) for dtype in (torch.float64, torch.complex64)]
    optimizer = fusedopt.AdamW(params)
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(copy.deepcopy(saved), convert=True)
    for i, param in enumerate(params):
        for name, value in saved["state"][i].items():
            assert_same_bits(optimizer.state[param][name], value)


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


def test_statistics_of_codes_where_a_part_has_no_block() -> None:
    """The last block reaches behind 2 * 4,096 elements, into a part that an earlier step had left full."""
    first, second = (Parameter(torch.randn(rows, 200, generator=generator(rows)).bfloat16()) for rows in (164, 41))
    optimizer = fusedopt.Adam([first, second], state_dtype="int8", stats=True)
    for with_first in (True, False):
        first.grad = 100 * torch.ones_like(first) if with_first else None
        second.grad = torch.ones_like(second)
        optimizer.step()
    assert optimizer.stats()["0.1"]["grad_norm"] == pytest.approx(math.sqrt(second.numel()), rel=1e-6)


def test_an_average_of_compensated_weights_that_sit_out() -> None:
    """It is of what is stored, as beside a step."""
    param, other = (Parameter(torch.randn(300, generator=generator(i)).bfloat16()) for i in range(2))
    optimizer = fusedopt.Adam([param, other], rounding="kahan", ema_decay=0.0)
    for step in range(4):
        param.grad = torch.randn(300, generator=generator(step)).bfloat16() if step < 3 else None
        other.grad = torch.ones_like(other)
        optimizer.step()
        assert_same_bits(optimizer.state[param]["ema"], param.detach())


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


REMEDIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "master": {"master_weights": True},
    "split": {"master_weights": "split"},
    "stochastic": {"rounding": "stochastic", "state_dtype": torch.float32},
    "kahan": {"rounding": "kahan", "state_dtype": torch.float32},
}


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


# --- bad input -------------------------------------------------------------------------------------------------------

INVALID: list[tuple[str, Any]] = [
    *(("master_weights", value) for value in ("Split", "true", 2, torch.float32, 0.5)),
    *(("rounding", value) for value in ("up", "", None, 1, torch.bfloat16)),
    *(("state_dtype", value) for value in (torch.float16, torch.float64, torch.int8, torch.uint8, "int4", "bf16", 8)),
    *(("seed", value) for value in (-1, 2**64, 1.5, "0", None)),
]


@pytest.mark.parametrize(("option", "value"), INVALID, ids=str)
@pytest.mark.parametrize("cls", [fusedopt.Adam, fusedopt.AdamW, fusedopt.RAdam, fusedopt.Adagrad])
def test_invalid_options(cls: type[Optimizer], option: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"{cls.__name__}.*{option}"):
        cls([torch.ones(3)], **{option: value})
    params = [Parameter(torch.ones(3, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)]
    optimizer = cls([{"params": [p]} for p in params])
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(2):
        before = snapshot(optimizer)
        optimizer.param_groups[1][option] = value
        with pytest.raises((ValueError, TypeError), match=rf"{cls.__name__}.*param_groups\[1\].*{option}"):
            optimizer.step()
        optimizer.param_groups[1][option] = Form().options()[option]
        assert snapshot(optimizer) == before
        optimizer.step()


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
@pytest.mark.parametrize("master_weights", [True, "split"])
@pytest.mark.parametrize("cls", [fusedopt.AdamW, fusedopt.RAdam, fusedopt.Adagrad])
def test_masters_are_not_rounded(cls: type[Optimizer], master_weights: Any, rounding: str) -> None:
    with pytest.raises(ValueError, match=rf"{cls.__name__}.*(rounding.*master_weights|master_weights.*rounding)"):
        cls([torch.ones(3)], master_weights=master_weights, rounding=rounding)
    param = Parameter(torch.ones(3, dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    optimizer = cls([param], master_weights=master_weights)
    optimizer.step()
    optimizer.param_groups[0]["rounding"] = rounding
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=rf"{cls.__name__}.*param_groups\[0\]"):
        optimizer.step()
    assert snapshot(optimizer) == before


@dataclass(frozen=True)
class Bad:
    """A form, a parameter and a way to break it, after some steps or before the first."""

    id: str
    options: dict[str, Any]
    dtype: torch.dtype
    breaks: Callable[[Optimizer, Tensor], Any]
    message: str = ""
    fresh: bool = False  # can be broken before the first step, too
    rule: str = "adam"


def replace(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Optimizer, Tensor], None]:
    def apply(optimizer: Optimizer, param: Tensor) -> None:
        optimizer.state[param][name] = change(optimizer.state[param][name])

    return apply


def remove(name: str) -> Callable[[Optimizer, Tensor], Any]:
    return lambda optimizer, param: optimizer.state[param].pop(name)


def set_option(**options: Any) -> Callable[[Optimizer, Tensor], Any]:
    return lambda optimizer, param: optimizer.param_groups[1].update(options)


def set_sparse_grad(optimizer: Optimizer, param: Tensor) -> None:
    param.grad = None
    param.grad = torch.ones(param.shape, dtype=param.dtype).to_sparse(1)


INT8 = {"state_dtype": "int8"}
BAD = [
    Bad("split_in_float16", {}, torch.float16, set_option(master_weights="split"), "split", fresh=True),
    *(
        Bad(f"{name}_in_{name_of(dtype)}", {}, dtype, set_option(state_dtype=state), "state_dtype", fresh=True)
        for dtype in (torch.float64, torch.complex64, torch.complex128)
        for name, state in (("int8", "int8"), ("bfloat16", torch.bfloat16), ("float32", torch.float32))
    ),
    *(
        Bad(f"sparse_{'_'.join(map(str, options))}", options, torch.bfloat16, set_sparse_grad, "sparse", rule="adagrad")
        for options in (*list(REMEDIES.values())[1:], INT8, {"state_dtype": torch.bfloat16})
    ),
    *(
        Bad(f"codes_{how}_{name}", INT8, dtype, replace(name, change), name)
        for dtype in (torch.float32, torch.bfloat16)
        for name in ("exp_avg", "exp_avg_sq")
        for how, change in {
            "transposed": lambda t: t.t().contiguous().t(),
            "strided": lambda t: strided_like(t, "every_other"),
            "short": lambda t: t[:, :-1].contiguous(),
            "float": lambda t: t.float(),
            "int8": lambda t: t.view(torch.int8),
        }.items()
        if (dtype, name) != (torch.bfloat16, "exp_avg")
    ),
    *(
        Bad(f"scales_{how}", INT8, torch.bfloat16, replace("scales", change), "scales")
        for how, change in {
            "short": lambda t: t[:, :-1].contiguous(),
            "flat": lambda t: t.flatten(),
            "one_stream": lambda t: t[:, :, :1].contiguous(),
            "double": lambda t: t.double(),
            "bfloat16": lambda t: t.bfloat16(),
        }.items()
    ),
    Bad("no_scales", INT8, torch.float32, remove("scales"), "scales"),
    Bad("no_master", REMEDIES["master"], torch.bfloat16, remove("master_param"), "master_param"),
    Bad("no_remainder", REMEDIES["split"], torch.bfloat16, remove("param_remainder"), "param_remainder"),
    Bad("no_compensation", REMEDIES["kahan"], torch.float16, remove("compensation"), "compensation"),
    Bad("no_exp_avg", REMEDIES["master"], torch.bfloat16, remove("exp_avg"), "exp_avg"),
    Bad(
        "master_of_16_bits",
        REMEDIES["master"],
        torch.bfloat16,
        replace("master_param", Tensor.bfloat16),
        "master_param",
    ),
    Bad(
        "master_of_another_shape", REMEDIES["master"], torch.float16, replace("master_param", Tensor.flatten), "master"
    ),
    Bad("long_remainder", REMEDIES["split"], torch.bfloat16, replace("param_remainder", Tensor.int), "param_remainder"),
    Bad("float_compensation", REMEDIES["kahan"], torch.bfloat16, replace("compensation", Tensor.float), "compensation"),
    Bad("state_of_16_bits", REMEDIES["split"], torch.bfloat16, replace("exp_avg_sq", Tensor.bfloat16), "exp_avg_sq"),
    Bad(
        "state_of_32_bits",
        {"state_dtype": torch.bfloat16},
        torch.float32,
        replace("exp_avg", Tensor.float),
        "exp_avg",
    ),
    Bad("switched_to_masters", {}, torch.bfloat16, set_option(master_weights=True)),
    Bad("switched_to_split", {}, torch.bfloat16, set_option(master_weights="split")),
    Bad("switched_to_kahan", {}, torch.bfloat16, set_option(rounding="kahan"), "compensation"),
    Bad("switched_to_codes", {}, torch.float32, set_option(state_dtype="int8")),
]


def check_bad(bad: Bad, steps: int) -> None:
    row, shape = BY_ID[bad.rule], (4, 2 * BLOCK)
    params = [Parameter(torch.ones(shape)), Parameter(torch.ones(shape, dtype=bad.dtype))]
    optimizer = row.make([{"params": params[:1]}, {"params": params[1:], **bad.options}])
    for _ in range(steps):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    for param in params:
        param.grad = torch.ones_like(param)
    bad.breaks(optimizer, params[1])
    before = snapshot(optimizer)
    for _ in range(2):  # not only the first time
        with pytest.raises(RuntimeError, match=rf"^{row.ours.__name__}: param_groups\[1\].*{bad.message}"):
            optimizer.step()
        assert snapshot(optimizer) == before, "the step that failed changed something"


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.id)
def test_bad_input(bad: Bad, set_place: SetPlace) -> None:
    for place in ("default", CUDA_ON_HOST):
        set_place(place)
        check_bad(bad, 2)
        if bad.fresh:
            check_bad(bad, 0)


# --- saving and loading ----------------------------------------------------------------------------------------------

SAVED_SHAPES: list[Shape] = [(7,), (3, 300), (2, 129)]
SAVING = BY_ID["adamw-decay-amsgrad-lr32"]


def copied(way: str, row: Row, case: Case, optimizer: Optimizer) -> Optimizer:
    """The optimizer, with parameters of its own."""
    if way == "pickle":
        return pickle.loads(pickle.dumps(optimizer))
    if way == "deepcopy":
        return copy.deepcopy(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    if way == "file":
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        saved = torch.load(file)
    options = case.form.options() if way == "state_dict" else {}
    fresh = row.make([Parameter(param.detach().clone()) for param in params_of(optimizer)], **options)
    other_form = fresh.param_groups[0]["state_dtype"], *(fresh.param_groups[0][name] for name in OPTIONS[:2])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fresh.load_state_dict(saved)
    # What a tensor was cast from, or a group's options were instead, is said; here only the latter may be.
    group = fresh.param_groups[0]
    changes = other_form != (group["state_dtype"], *(group[name] for name in OPTIONS[:2]))
    assert len(said) == changes
    assert all("from the checkpoint" in str(warning.message) and warning.filename == __file__ for warning in said)
    return fresh


@pytest.mark.parametrize("name", ["exp_avg", "scales", "param_remainder"])
def test_state_of_another_shape_is_not_loaded(name: str) -> None:
    param = Parameter(torch.randn(4, 300).bfloat16())
    param.grad = torch.randn(4, 300).bfloat16()
    optimizer = fusedopt.Adam([param], master_weights="split", state_dtype="int8")
    optimizer.step()
    saved, before = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())
    saved["state"][0][name] = saved["state"][0][name][:, :1]
    shape, wanted = {
        "exp_avg": ((4, 1), (4, 300)),
        "scales": ((4, 1, 2), (4, 3, 2)),
        "param_remainder": ((4, 1, 2), (4, 300, 2)),
    }[name]
    with pytest.raises(
        ValueError, match=re.escape(f"{name!r} of shape {shape}, and a parameter of shape (4, 300) needs {wanted}")
    ):
        optimizer.load_state_dict(saved)
    for key, value in before["state"][0].items():
        assert_same_bits(optimizer.state[param][key], value)


@pytest.mark.parametrize("way", ["pickle", "deepcopy", "state_dict", "without_options", "file"])
@pytest.mark.parametrize("case", FORMS, ids=case_name)
def test_training_goes_on(case: Case, way: str) -> None:
    """Bit for bit, with the checkpoint's options, and no tensor cast (which would warn, and warnings are errors)."""
    which = pieces(case, shapes=SAVED_SHAPES)
    optimizer = make_pieces(SAVING, which)
    run_some(optimizer, which, 0, 3)
    other = copied(way, SAVING, case, optimizer)
    assert {name: other.param_groups[0][name] for name in OPTIONS} == case.form.in_groups()
    assert_same_training(other, optimizer, "as loaded")
    for each in (optimizer, other):
        run_some(each, which, 3, 6)
    assert_same_training(other, optimizer, "trained on")


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_training_goes_on_with_every_variant(row: Row) -> None:
    for case in SOME_FORMS:
        which = pieces(case, shapes=SAVED_SHAPES)
        optimizer = make_pieces(row, which)
        run_some(optimizer, which, 0, 3)
        other = copied("without_options", row, case, optimizer)
        for each in (optimizer, other):
            run_some(each, which, 3, 5)
        assert_same_training(other, optimizer, case.id)


def test_a_group_of_another_form_is_added() -> None:
    first, second = FORM_BY_ID["bfloat16-split-int8"], FORM_BY_ID["float16-stochastic"]
    which = pieces(first, second, shapes=SAVED_SHAPES)
    values = [piece.value for piece in which]
    optimizer = make(SAVING, [first] * 3, values[:3])
    reference = Reference(SAVING, [piece.case for piece in which], values)
    for step in range(4):
        if step == 2:
            added = [Parameter(value.clone()) for value in values[3:]]
            optimizer.add_param_group({"params": added, **second.form.options()})
        grads: list[Tensor | None] = [piece.grads(4)[step] for piece in which]
        if step < 2:
            grads[3:] = [None] * 3
        set_grads(params_of(optimizer), grads[: len(params_of(optimizer))])
        optimizer.step()
        reference.step(grads)
    reference.assert_same(optimizer, "with the group that was added")


def test_options_of_a_group_are_those_of_the_constructor() -> None:
    optimizer = fusedopt.Adam([{"params": [torch.ones(1)]}, {"params": [torch.ones(1)], "seed": 4}], seed=2**64 - 1)
    assert [group["seed"] for group in optimizer.param_groups] == [2**64 - 1, 4]
    optimizer.add_param_group({"params": [torch.ones(1)]})
    assert {name: optimizer.param_groups[2][name] for name in OPTIONS} == {**Form().options(), "seed": 2**64 - 1}


@pytest.mark.parametrize("case", [*FORMS, *PLAIN], ids=case_name)
@pytest.mark.parametrize("row", [SAVING, BY_ID["radam"], BY_ID["adagrad"]], ids=name_of)
def test_portable(row: Row, case: Case) -> None:
    which = pieces(case, shapes=SAVED_SHAPES)
    optimizer = make_pieces(row, which)
    run_some(optimizer, which, 0, 3)
    before = snapshot(optimizer)
    saved = optimizer.state_dict(portable=True)
    assert snapshot(optimizer) == before
    assert not set(OPTIONS) & set().union(*saved["param_groups"])
    formula = FormTranscription(optimizer, case.form)
    has_value = case.form.companion(case.dtype) is not None
    for i, param in enumerate(params_of(optimizer)):
        state = saved["state"][i]
        names = ["step", *formula.formula.names, *["master_param"] * has_value]
        assert list(state) == names
        if case.dtype != torch.float64:
            # Where the options are the defaults the state may stay what torch has, too.
            is_torchs = case.form.options() == Form().options()
            for name, value in moments_of(optimizer, param).items():
                assert_same_bits(state[name].float(), value, name)
                assert state[name].dtype == torch.float32 or (is_torchs and state[name].dtype == case.dtype)
        if has_value:
            assert state["master_param"].dtype == torch.float32
            assert_same_bits(state["master_param"], value_of(optimizer, param).view(param.shape))
    theirs = row.theirs([Parameter(param.detach().clone()) for param in params_of(optimizer)], **row.kwargs())
    theirs.load_state_dict(saved)
    params = params_of(theirs)
    for param in params:
        param.grad = torch.ones_like(param)
    kept = [param.detach().clone() for param in params]
    theirs.step()
    assert any(bool((param != value).any()) for param, value in zip(params, kept, strict=True))
    assert {float(theirs.state[param]["step"]) for param in params} == {4.0}


def finite_pieces(case: Case) -> list[Piece]:
    """Of which no value is an inf or nan for some steps: those that the codes can hold."""
    as_codes = Case(
        case.id, case.dtype, Form(**{**case.form.options(), "state_dtype": "int8"}, grad_dtype=case.grad_dtype)
    )
    return [Piece(as_codes, shape, i) for i, shape in enumerate([(3, 300), (2, 129)])]


CONVERTED = ["", "master", "split", "stochastic-int8", "kahan", "nearest-state16", "split-state16", "master-int8"]
CONVERTED = [f"bfloat16-{name}" if name else "bfloat16" for name in CONVERTED]


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


def case_called(name: str) -> Case:
    return FORM_BY_ID[name] if name in FORM_BY_ID else next(case for case in PLAIN if case.id == name)


def assert_nearest_codes(stored: Tensor, x: Tensor, scales: Tensor, name: str) -> None:
    """Decoded values, flat, within half a step of what they encode; positive second moments stay positive."""
    code = code_of(name)
    scale = of_elements(scales.numpy(), tuple(x.shape)).astype(np.float64)
    y = np.abs(x.double().numpy().ravel()) / np.where(scale > 0, scale, 1)
    above = np.minimum(np.searchsorted(code.values, y), code.fields - 1)
    gap = np.where(above > 0, code.values[above] - code.values[above - 1], code.values[1]).astype(np.float64)
    error = np.abs(stored.double().numpy().ravel() - x.double().numpy().ravel())
    # The smallest positive code stands for what would be nearer to zero.
    most = np.where((y < code.values[1]) & (name != "exp_avg"), code.values[1], gap / 2)
    assert (error <= most * np.where(scale > 0, scale, 0) * (1 + 1e-5) + np.where(scale > 0, 0, 2e-38)).all()
    if name != "exp_avg":
        assert bool(((stored.flatten() > 0) | (x.flatten() == 0) | torch.from_numpy(scale == 0)).all())


@pytest.mark.parametrize("portable", [False, True], ids=["as_saved", "portable"])
@pytest.mark.parametrize("to", CONVERTED)
@pytest.mark.parametrize("source", CONVERTED)
def test_convert(source: str, to: str, portable: bool) -> None:
    """The live options stay; the values are the checkpoint's, rounded to nearest where the form has fewer bits."""
    saver, loader = case_called(source), case_called(to)
    which = finite_pieces(saver)
    old = make(SAVING, [saver] * 2, [piece.value for piece in which])
    run_some(old, which, 0, 3)
    new = make(SAVING, [loader] * 2, [param.detach() for param in params_of(old)])
    new.load_state_dict(old.state_dict(portable=True) if portable else old.state_dict(), convert=True)
    assert {name: new.param_groups[0][name] for name in OPTIONS} == loader.form.in_groups()
    for p, q in zip(params_of(old), params_of(new), strict=True):
        assert_same_bits(q.detach(), p.detach())
        assert old.state[p]["step"] == new.state[q]["step"]
        wanted, found = moments_of(old, p), moments_of(new, q)
        stored = loader.form.stored_state(q)
        names = FormTranscription(new, loader.form).first_state(q.detach())
        assert set(new.state[q]) == {"step", *names}
        for k, (name, value) in enumerate(wanted.items()):
            assert new.state[q][name].dtype == stored
            if stored == torch.uint8:
                assert_nearest_codes(found[name], value, new.state[q]["scales"][:, :, k], name)
            else:
                assert_same_bits(found[name], value.to(stored).float(), name)
        before, after = value_of(old, p), value_of(new, q)
        companion = loader.form.companion(q.dtype)
        # Kahan's ties were rounded to even: as a master or its remainder, such a value has another parameter.
        fits = torch.from_numpy(bits16(round_away(before.numpy())) == bits16(p))
        assert fits.double().mean() > 0.9
        if companion == "compensation":
            kept = fits | torch.tensor(not portable)
            left = before - floats_of(p)
            assert_same_bits(new.state[q][companion].flatten()[kept] + 0, left[kept].to(q.dtype) + 0)  # either zero
        elif companion == "param_remainder":
            assert_same_bits(after[fits], before[fits])
        elif companion == "master_param":
            assert_same_bits(after, before)
    run_some(new, which, 3, 5)


def floats_of(param: Tensor) -> Tensor:
    return torch.from_numpy(floats(param))


@pytest.mark.parametrize(
    "to", ["bfloat16-stochastic-int8", "bfloat16-split", "bfloat16-kahan", "bfloat16-nearest-state16"]
)
@pytest.mark.parametrize("source", ["bfloat16-master", "bfloat16-stochastic-int8", "bfloat16-nearest-state16"])
def test_a_checkpoint_of_another_form_is_refused(source: str, to: str) -> None:
    """A portable one says nothing of forms, so it is taken for one of the live form, which it is not."""
    saver, loader = case_called(source), case_called(to)
    which = finite_pieces(saver)
    old = make(SAVING, [saver] * 2, [piece.value for piece in which])
    new = make(SAVING, [loader] * 2, [piece.value for piece in which])
    run_some(old, which, 0, 2)
    run_some(new, which, 0, 1)
    before = snapshot(new)
    with pytest.raises((RuntimeError, ValueError), match=r"convert=True"):
        new.load_state_dict(old.state_dict(portable=True))
    assert snapshot(new) == before
    run_some(new, which, 1, 2)


def test_a_portable_checkpoint_of_masters_is_one_of_masters() -> None:
    """It matches, so nothing is converted."""
    case = FORM_BY_ID["bfloat16-master"]
    which = pieces(case, shapes=SAVED_SHAPES)
    old = make_pieces(SAVING, which)
    run_some(old, which, 0, 3)
    new = make(SAVING, [case] * 3, [param.detach() for param in params_of(old)])
    new.load_state_dict(copy.deepcopy(old.state_dict(portable=True)))
    for each in (old, new):
        run_some(each, which, 3, 5)
    assert_same_training(new, old)


def test_a_first_sum_that_is_not_zero() -> None:
    """Adagrad's initial_accumulator_value, in every form as near as it can be stored."""
    for state_dtype, within in ((None, 2**-8), (torch.float32, 0), (torch.bfloat16, 2**-8), ("int8", 2**-4)):
        param = Parameter(torch.zeros(2, 2 * BLOCK, dtype=torch.bfloat16))
        optimizer = fusedopt.Adagrad([param], initial_accumulator_value=0.1, state_dtype=state_dtype)
        param.grad = torch.zeros_like(param)
        optimizer.step()
        (total,) = moments_of(optimizer, param).values()
        assert bool(((total - np.float32(0.1)).abs() <= 0.1 * within).all())


# --- the phase around the update -------------------------------------------------------------------------------------


def ordinary(case: Case, shape: Shape, seed: int, *, grad: bool = False) -> Tensor:
    dtype = case.grad_dtype if grad else case.dtype
    return varied_values(math.prod(shape), dtype, generator(seed), wild=False).view(shape)


PHASE_CASES = [*MIXED, FORM_BY_ID["bfloat16-split-grad_float32"], FORM_BY_ID["bfloat16-master"]]
PHASE_SHAPES: list[Shape] = [(130,), (3, 300)]


class Phase:
    """Ours with options of the phase, and the reference with torch's average."""

    def __init__(self, place: str, row: Row = KINDS[0], cases: Sequence[Case] = PHASE_CASES, **more: Any) -> None:
        self.layout = [(case, shape) for case in cases for shape in PHASE_SHAPES]
        values = [ordinary(case, shape, i) for i, (case, shape) in enumerate(self.layout)]
        self.cases = [case for case, _ in self.layout]
        more = {**more, **(row.on_device() if place == ON_DEVICE else {})}
        self.optimizer = make(row, self.cases, values, **more)
        self.reference = Reference(row, self.cases, values)
        self.averages: list[Tensor] | None = None
        self.decay = more.get("ema_decay")

    def grads(self, step: int) -> list[Tensor]:
        return [ordinary(c, shape, 100 * step + 50 + i, grad=True) for i, (c, shape) in enumerate(self.layout)]

    def expect(self, grads: Sequence[Tensor], inv_scale: float | None = None, clip: float | None = None) -> None:
        """The reference's step, and the averages of what it leaves."""
        self.reference.step(grads, inv_scale, clip)
        if self.decay is None:
            return
        now = []
        for known, case in zip(self.reference.known, self.cases, strict=True):
            value = known.param
            if case.form.companion(case.dtype) in ("master_param", "param_remainder"):
                value = torch.from_numpy(known.formula.value(known.param, known.state)).view(value.shape)
            now.append(value.clone())
        if self.averages is None:
            self.averages = now
        else:
            average = get_ema_multi_avg_fn(self.decay)
            for old, new in zip(self.averages, now, strict=True):
                average([old], [new], torch.tensor(1))

    def check(self, when: str) -> None:
        self.reference.assert_same(self.optimizer, when)
        for i, (param, wanted) in enumerate(zip(params_of(self.optimizer), self.averages or (), strict=False)):
            assert list(self.optimizer.state[param])[-1] == "ema"
            assert_same_bits(self.optimizer.state[param]["ema"], wanted, f"ema of parameter {i} {when}")


def exact_norm(grads: Sequence[Tensor]) -> float:
    return math.sqrt(math.fsum(float(grad.double().square().sum()) for grad in grads))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("row", KINDS, ids=name_of)
def test_clipping_and_averages(row: Row, place: str, set_place: SetPlace) -> None:
    """The norm is over gradients of all dtypes; the averages are of the float32 values where there are some."""
    set_place(place)
    phase = Phase(place, row, max_grad_norm=0.7, ema_decay=0.9, stats=True)
    for step in range(4):
        grads = phase.grads(step)
        kept = [grad.clone() for grad in grads]
        set_grads(params_of(phase.optimizer), grads)
        phase.optimizer.step()
        norm = phase.optimizer.grad_norm
        assert norm is not None
        assert float(norm) == pytest.approx(exact_norm(grads), rel=2**-23)
        theirs = [Parameter(grad.double()) for grad in grads]
        for twin in theirs:
            twin.grad = twin.detach().clone()
        total = torch.nn.utils.clip_grad_norm_(theirs, 0.7)
        assert float(norm) == pytest.approx(float(total), rel=2**-23)
        phase.expect(grads, clip=torch.clamp(0.7 / (norm + 1e-6), max=1.0).item())
        phase.check(f"after step {step}")
        for grad, before in zip(grads, kept, strict=True):
            assert_same_bits(grad, before)  # read, never written
        stats = phase.optimizer.stats()
        for found, grad, case in zip(stats.values(), grads, phase.cases, strict=True):
            assert found["grad_norm"] == pytest.approx(float(grad.double().norm()), rel=1e-6)
            assert found["nonfinite_grads"] == 0 and math.isfinite(found["update_norm"])
            may_be_lost = case.dtype != torch.float32 and case.form.companion(case.dtype) is None
            assert found["update_norm"] > 0 or may_be_lost


def test_averages_are_shown(set_place: SetPlace) -> None:
    """ema_weights() gives each parameter its average, rounded to its dtype, and puts back what was there."""
    phase = Phase("default", ema_decay=0.9)
    for step in range(3):
        set_grads(params_of(phase.optimizer), phase.grads(step))
        phase.optimizer.step()
        phase.expect(phase.grads(step))
    before = snapshot(phase.optimizer)
    assert phase.averages is not None
    with phase.optimizer.ema_weights():
        for param, average in zip(params_of(phase.optimizer), phase.averages, strict=True):
            assert_same_bits(param.detach(), average.to(param.dtype))
    assert snapshot(phase.optimizer) == before
    set_grads(params_of(phase.optimizer), phase.grads(3))
    phase.optimizer.step()
    phase.expect(phase.grads(3))
    phase.check("after the averages were shown")


@pytest.mark.parametrize("place", ["default", ON_DEVICE])
def test_a_skipped_step_changes_no_byte(place: str, set_place: SetPlace) -> None:
    set_place(place)
    phase = Phase(place, skip_nonfinite=True, max_grad_norm=5.0, ema_decay=0.9)
    skipped = 0
    for step in range(2 + 2 * len(phase.layout)):
        grads = phase.grads(step)
        if step >= 2 and step % 2:
            grads[(step // 2) % len(grads)].view(-1)[-1] = (math.inf, math.nan)[step // 2 % 2]
        before = snapshot(phase.optimizer)
        set_grads(params_of(phase.optimizer), grads)
        phase.optimizer.step()
        if step >= 2 and step % 2:
            skipped += 1
            assert snapshot(phase.optimizer) == before
            continue
        norm = phase.optimizer.grad_norm
        assert norm is not None
        phase.expect(grads, clip=torch.clamp(5.0 / (norm + 1e-6), max=1.0).item())
        phase.check(f"after step {step}")
    assert phase.optimizer.skipped_steps == skipped > 0


@pytest.mark.parametrize("kind", [fusedopt.GradScaler, torch.amp.GradScaler], ids=["ours", "torch"])
def test_grad_scaler(kind: type[torch.amp.GradScaler]) -> None:
    phase = Phase("default", ema_decay=0.9)
    scaler = kind("cpu", init_scale=512.0, growth_interval=100)
    for step in range(4):
        scaler.scale(torch.ones(()))
        inv_scale = float(torch.tensor(1 / scaler.get_scale()))
        grads = [grad * scaler.get_scale() for grad in phase.grads(step)]
        if step == 2:
            grads[3].view(-1)[5] = math.inf
        before = snapshot(phase.optimizer)
        set_grads(params_of(phase.optimizer), grads)
        scaler.step(phase.optimizer)
        scaler.update()
        if step == 2:
            assert snapshot(phase.optimizer) == before
        else:
            phase.expect(grads, inv_scale=inv_scale)
        phase.check(f"after step {step}")
    assert scaler.get_scale() == 256.0


@pytest.mark.parametrize("case", SOME_FORMS, ids=case_name)
def test_measuring_changes_no_bit(case: Case, capability: str) -> None:
    which = pieces(case, shapes=FEW_SHAPES)
    expected = expected_run(KINDS[0], tuple(which), 3, (3,))[3]
    optimizer = make_pieces(KINDS[0], which, stats=True)
    run_some(optimizer, which, 0, 3, 3)
    expected.assert_same(optimizer, "with stats")


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


@pytest.mark.parametrize("case", FORMS, ids=case_name)
def test_reference_forms_follow_float32(case: Case) -> None:
    """The transcription of every form stays near that of float32, so no form of the reference is nonsense."""
    shape = (3, 300)
    first = ordinary(case, shape, 1)
    twin = Case("", torch.float32, Form(grad_dtype=case.form.grad_dtype or case.dtype))
    reference, exact = Reference(ADAM, [case], [first]), Reference(ADAM, [twin], [first.float()])
    for step in range(10):
        grad = ordinary(case, shape, 10 + step, grad=True)
        reference.step([grad])
        exact.step([grad])
    (known,), (wanted,) = reference.known, exact.known
    assert list(known.state)[:2] == ["exp_avg", "exp_avg_sq"]
    assert len(set(COMPANIONS) & set(known.state)) == (case.form.companion(case.dtype) is not None)
    value = torch.from_numpy(known.formula.value(known.param, known.state))
    error = (value - wanted.param.flatten()).abs().max()
    exact_state = known.formula.form.stored_state(known.param) == torch.float32
    if case.dtype == torch.float32 or case.form.master_weights:
        assert float(error) < (1e-7 if exact_state else 3e-3)  # 10 steps of 1e-3
    else:
        assert float(error) < 0.1  # a few units in the last place of numbers up to 4
