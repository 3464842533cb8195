"""Storage forms: master weights, stochastic rounding, compensation, state in 16 and 8 bits, gradients of other dtypes.

The reference is precision.py, from the specification alone; the last sections of these files test the reference itself.
Tests of one subject are in test_precision_masters.py, test_precision_rounding.py (and of codes),
test_precision_checkpoints.py and test_precision_phase.py.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from optimizers import BY_ID, CUDA_ON_HOST, ON_DEVICE, PLACES, Row, name_of
from precision import BLOCK, COMPANIONS, FORM_BY_ID, FORMS, PLAIN, Case, Form
from precision_cases import (
    FEW_SHAPES,
    KINDS,
    MIXED,
    OPTIONS,
    REMEDIES,
    ROWS,
    SOME_FORMS,
    Piece,
    Reference,
    SetPlace,
    Shape,
    assert_same_training,
    case_name,
    expected_run,
    make_pieces,
    ordinary,
    params_of,
    pieces,
    run_some,
    set_grads,
    snapshot,
)
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import fusedopt
from fusedopt._precision import as_bytes, words

SetInt = Callable[[int], None]
ADAM = BY_ID["adam"]


# --- the bits --------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("case", FORMS, ids=case_name)
def test_every_form(case: Case, set_place: SetPlace) -> None:
    compare(KINDS[0], pieces(case), PLACES, set_place)


@pytest.mark.parametrize("case", SOME_FORMS, ids=case_name)
@pytest.mark.parametrize("row", [row for row in ROWS if row is not KINDS[0]], ids=name_of)
def test_every_variant(row: Row, case: Case, set_place: SetPlace) -> None:
    compare(row, pieces(case, shapes=FEW_SHAPES), PLACES, set_place, steps=8)


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


# --- the reference itself --------------------------------------------------------------------------------------------


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
