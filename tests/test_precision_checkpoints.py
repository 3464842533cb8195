"""Every storage form, saved, copied and loaded without a bit lost; portable checkpoints; conversions between forms."""

import copy
import io
import pickle
import re
import warnings

import numpy as np
import pytest
import torch
from optimizers import BY_ID, Row, name_of
from precision import (
    FORM_BY_ID,
    FORMS,
    PLAIN,
    Case,
    Form,
    FormTranscription,
    bits16,
    code_of,
    floats,
    of_elements,
    round_away,
)
from precision_cases import (
    OPTIONS,
    ROWS,
    SOME_FORMS,
    Piece,
    Reference,
    Shape,
    assert_same_training,
    case_name,
    make,
    make_pieces,
    moments_of,
    params_of,
    pieces,
    run_some,
    set_grads,
    snapshot,
    value_of,
)
from reference import assert_same_bits
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import fusedopt

SAVED_SHAPES: list[Shape] = [(7,), (3, 300), (2, 129)]
SAVING = BY_ID["adamw-decay-amsgrad-lr32"]


# --- saving and loading ----------------------------------------------------------------------------------------------


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


# --- portable, and converted -----------------------------------------------------------------------------------------


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
