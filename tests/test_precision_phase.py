"""The phase around the update, of every storage form: clipping, averages, steps skipped, scales and statistics."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from optimizers import ON_DEVICE, PLACES, Row, generator, name_of
from precision import FORM_BY_ID, Case
from precision_cases import (
    FEW_SHAPES,
    KINDS,
    MIXED,
    SOME_FORMS,
    Reference,
    SetPlace,
    Shape,
    case_name,
    expected_run,
    make,
    make_pieces,
    ordinary,
    params_of,
    pieces,
    run_some,
    set_grads,
    snapshot,
)
from reference import assert_same_bits
from torch import Tensor
from torch.nn import Parameter
from torch.optim.swa_utils import get_ema_multi_avg_fn

import fusedopt

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
