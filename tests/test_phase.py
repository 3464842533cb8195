"""The whole optimizer phase in the step: unscale, norm, clip, skip, update, average, measure.

The reference does the same by torch's separate operations, in the documented order (phase_cases.py). Tests of one part
are in test_phase_norm.py, test_phase_skipping.py (and GradScaler), test_phase_averages.py and test_phase_stats.py.
"""

import contextlib
import copy
import ctypes
import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from optimizers import BY_ID, CUDA_ON_HOST, DTYPES, ON_DEVICE, OWN_VARIANTS, ROWS, VARIANTS, Row, generator, name_of
from phase_cases import (
    Separate,
    assert_close_stats,
    bytes_of,
    exact_norm,
    expected_stats,
    make_grads,
    make_params,
    opmath,
    params_of,
    set_grads,
    unscaled,
    within_an_ulp,
)
from reference import assert_same_bits, torch_loop_step
from torch.nn import Parameter
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fusedopt
from fusedopt._config import _C

# --- every combination -----------------------------------------------------------------------------------------------

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


# --- sparse gradients ------------------------------------------------------------------------------------------------


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


# --- options ---------------------------------------------------------------------------------------------------------

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


def test_subclasses_with_defaults_of_their_own() -> None:
    class Clipped(fusedopt.AdamW):
        def __init__(self, params: Any, lr: float = 1e-3, max_grad_norm: float | None = 1.0, **more: Any) -> None:
            super().__init__(params, lr, max_grad_norm=max_grad_norm, **more)

    assert Clipped(make_params()).param_groups[0]["max_grad_norm"] == 1.0
    assert list(inspect.signature(Clipped).parameters) == ["params", "lr", "max_grad_norm", "more"]


# --- launches and captured steps -------------------------------------------------------------------------------------


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


# --- around it -------------------------------------------------------------------------------------------------------


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


def test_measurements_under_torch_compile() -> None:
    """The first step too: dynamo loses what is written to an object's __dict__."""
    params = make_params()
    optimizer = fusedopt.AdamW(params, max_grad_norm=1.0, stats=True)
    set_grads(params, make_grads(0, params))
    torch.compile(lambda: optimizer.step(), backend="eager")()
    assert optimizer.grad_norm is not None and len(optimizer.stats()) == len(params)


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
