"""Steps of AdamW that clip, average, measure or have a GradScaler: ours in one call, torch's by calls around its own.

The benchmarks are the CPU's; benchmarks/gpu.py has its own of the same ways.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

import fusedopt

from . import harness
from .harness import (
    FUSED,
    LOOP,
    MI,
    OURS,
    SMALL_QUARTERS,
    Contender,
    Floor,
    Quick,
    Row,
    Skipped,
    at_least,
    at_most,
    fastest,
    interleave,
    make_optimizer,
    make_parameters,
    ratio_row,
    share_state,
)

sys.path.append(str(harness.ROOT / "tests"))
from reference import assert_same_bits, torch_loop_step

ALGORITHM = "AdamW"
DECAY = 0.999  # of the averages
Step = Callable[[], object]


# --- ways to make a step -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """One kind's way to make a step that does more than update."""

    kind: str
    clips: bool = False
    averages: bool = False
    scaler: Any = None  # the module that has its GradScaler
    options: Mapping[str, Any] = field(default_factory=dict)  # others of ours

    @property
    def reads_first(self) -> bool:
        """Whether ours must have read all gradients before it updates."""
        return self.clips or bool(self.options.get("skip_nonfinite"))

    @property
    def bytes_per_element(self) -> int:
        """What ours must move."""
        return 28 + 4 * self.reads_first + 8 * self.averages

    def make(
        self,
        params: list[Parameter],
        max_norm: float,
        source: Optimizer | None = None,
        scale: float = 1.0,
        **options: Any,
    ) -> tuple[Any, Step]:
        """An optimizer, with the state of `source` if there is one, and what makes a step with it."""
        ours = self.kind == OURS
        if ours:
            options |= self.options
            options |= {"max_grad_norm": max_norm} if self.clips else {}
            options |= {"ema_decay": DECAY} if self.averages else {}
        optimizer = make_optimizer(self.kind, params, ALGORITHM, **options)
        if source is not None:
            share_state(source, optimizer)
        calls: list[Step] = []
        if self.scaler is None:
            calls.append(optimizer.step)
        else:
            device = params[0].device.type
            scaler = self.scaler.GradScaler(device, init_scale=scale, growth_interval=2**30)  # it stays what it is
            scaler.scale(torch.ones((), device=device))  # makes the scale a tensor, as the first loss does
            calls += [partial(scaler.step, optimizer), scaler.update]
        if not ours and self.clips:
            calls.insert(0, partial(clip_grad_norm_, params, max_norm, foreach=True))
            if self.scaler is not None:
                calls.insert(0, partial(scaler.unscale_, optimizer))
        if not ours and self.averages:
            calls.append(partial(average, params, optimizer))

        def step() -> None:
            for call in calls:
                call()

        return optimizer, calls[0] if len(calls) == 1 else step


def average(params: list[Parameter], optimizer: Optimizer) -> None:
    """As torch.optim.swa_utils.AveragedModel with its get_ema_multi_avg_fn: the first time copies."""
    weights = [param.detach() for param in params]
    if "ema" in optimizer.state[params[0]]:
        torch._foreach_lerp_([optimizer.state[param]["ema"] for param in params], weights, 1 - DECAY)
    else:
        for param, weight in zip(params, weights, strict=True):
            optimizer.state[param]["ema"] = weight.clone()


CLIP, SKIP, STATS, EMA, ALL = (f"{OURS} {what}" for what in ("clip", "skip", "stats", "ema", "all"))
CLIP_TORCH, ALL_TORCH = "torch clip, fused", "torch clip, fused, ema"
AMP, AMP_OWN, AMP_TORCH = f"{OURS}, torch scaler", f"{OURS}, its scaler", "torch scaler, clip, fused"
ON_DEVICE = {"fused": True}  # on CUDA: step counts on the device, where the scaler's verdict is, which nobody waits for
WAYS = {
    OURS: Way(OURS),
    CLIP: Way(OURS, clips=True),
    SKIP: Way(OURS, options={"skip_nonfinite": True}),
    STATS: Way(OURS, options={"stats": True}),
    EMA: Way(OURS, averages=True),
    ALL: Way(OURS, clips=True, averages=True, options={"skip_nonfinite": True, "stats": True}),
    CLIP_TORCH: Way(FUSED, clips=True),
    ALL_TORCH: Way(FUSED, clips=True, averages=True),
    AMP: Way(OURS, clips=True, scaler=torch.amp, options=ON_DEVICE),
    AMP_OWN: Way(OURS, clips=True, scaler=fusedopt, options=ON_DEVICE),
    AMP_TORCH: Way(FUSED, clips=True, scaler=torch.amp),
}


def make_ways(params: list[Parameter], names: Sequence[str]) -> tuple[dict[str, Optimizer], dict[str, Step]]:
    """The named ways on the same parameters, gradients, moments and averages; and OURS, which has made the moments.

    torch's clips in place: after its first turn the gradients' norm is what it clips to, and it goes on to multiply
    them, by 1 but for a rounding. So ours clips to half of that, and halves them in every step. Scales are 1. So no
    value drifts; and no time depends on them.
    """
    max_norm = math.sqrt(sum(param.numel() for param in params)) / 2  # half the norm that the gradients begin with
    plain, step = WAYS[OURS].make(params, max_norm)
    step()
    optimizers, steps = {OURS: plain}, {OURS: step}
    averaging: Optimizer | None = None
    for name in names:
        if name == OURS:
            continue
        way = WAYS[name]
        norm = max_norm / 2 if way.kind == OURS else max_norm
        source = averaging if averaging is not None and way.averages else plain
        optimizers[name], steps[name] = way.make(params, norm, source)
        if way.averages and averaging is None:
            steps[name]()  # makes the averages
            averaging = optimizers[name]
    return optimizers, steps


# --- correctness ---------------------------------------------------------------------------------------------------


def assert_norm(norm: Tensor, tensors: Sequence[Tensor]) -> None:
    """Assert that it is the tensors' norm, but for one unit in the last place."""
    exact = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))
    ulp = float(norm.nextafter(torch.full_like(norm, math.inf)) - norm)
    assert abs(float(norm) - exact) <= ulp, f"the norm is {float(norm)!r}, expected {exact!r}"


def scale_down(tensors: list[Tensor], norm: Tensor, max_norm: float) -> None:
    """As torch.nn.utils.clip_grad_norm_, with a norm that need not be torch's."""
    torch._foreach_mul_(tensors, (max_norm / (norm + 1e-6)).clamp(max=1.0))


def check(sizes: Sequence[int], name: str, scale: float = 3.0) -> None:
    """Raise AssertionError unless this way of ours has the bits of torch's, with our norm, and measures what is so."""
    way, max_norm = WAYS[name], 0.1 * math.sqrt(sum(sizes))
    params = make_parameters(sizes)
    twins = [Parameter(param.detach().clone()) for param in params]
    ours, step = way.make(params, max_norm, scale=scale)
    theirs = make_optimizer(LOOP, twins, ALGORITHM)
    inv_scale = torch.tensor(scale if way.scaler else 1.0).double().reciprocal().float()
    for _ in range(3):
        before = [param.detach().clone() for param in params]
        for param, twin in zip(params, twins, strict=True):
            assert param.grad is not None
            twin.grad = param.grad.mul_(0.75) * inv_scale
        grads = [twin.grad for twin in twins if twin.grad is not None]
        measured = [grad.clone() for grad in grads]
        step()
        if way.clips:
            norm = ours.grad_norm
            assert_norm(norm, grads)
            scale_down(grads, norm, max_norm)
        torch_loop_step(theirs)
        if way.averages:
            average(twins, theirs)
        if way.options.get("stats"):
            assert_stats(ours, measured, before, params)
    if way.scaler or way.options.get("skip_nonfinite"):
        assert params[-1].grad is not None
        params[-1].grad[-1] = math.inf
        step()
        assert int(ours.skipped_steps) == 1, "a step was not skipped"
    for param, twin in zip(params, twins, strict=True):
        assert_same_bits(param, twin, f"{name}: the parameter")
        for key, value in theirs.state[twin].items():
            assert_same_bits(ours.state[param][key], value, f"{name}: {key}")


def assert_stats(
    optimizer: Any, grads: Sequence[Tensor], before: Sequence[Tensor], params: Sequence[Parameter]
) -> None:
    for found, grad, old, param in zip(optimizer.stats().values(), grads, before, params, strict=True):
        new = param.detach()
        for key, expected in (("grad_norm", grad), ("param_norm", new), ("update_norm", new.double() - old.double())):
            norm = float(expected.double().norm())
            assert math.isclose(found[key], norm, rel_tol=1e-5), f"{key} is {found[key]!r}, expected {norm!r}"


def check_clip_grad_norm(params: list[Parameter]) -> None:
    """Raise AssertionError unless fusedopt.clip_grad_norm_ does what torch's would, with our norm."""
    max_norm = 0.1 * math.sqrt(sum(param.numel() for param in params))
    expected = [param.grad.clone() for param in params if param.grad is not None]
    norm = fusedopt.clip_grad_norm_(params, max_norm)
    assert_norm(norm, expected)
    scale_down(expected, norm, max_norm)
    for param, grad in zip(params, expected, strict=True):
        assert param.grad is not None
        assert_same_bits(param.grad, grad, "the gradient")


# --- the benchmarks ------------------------------------------------------------------------------------------------


def phase(quick: Quick) -> Iterator[Row]:
    """AdamW of 64M elements: clipping, statistics and averages in the step."""
    for name in (CLIP, SKIP, STATS, EMA, ALL):
        check(SMALL_QUARTERS, name)
    params = make_parameters([16 * MI] * 4)
    optimizers, steps = make_ways(params, [CLIP, SKIP, STATS, EMA, ALL, CLIP_TORCH, ALL_TORCH])
    contenders = {name: Contender(step) for name, step in steps.items()}
    floors: dict[str, Floor] = {}
    try:
        floors = {"reads": Floor(params), "floor": Floor(params, optimizers[OURS])}
    except Skipped as skipped:
        yield Row("clip: traffic floor", note=f"skipped: {skipped}")
    passes = {name: floor.contenders(name) for name, floor in floors.items()}
    for found in passes.values():
        contenders |= found
    samples = interleave(contenders, rounds=9)
    if floors:
        reads, floor = (fastest(samples, list(found)) for found in passes.values())
        samples["floor"] = {round_: value + samples[floor][round_] for round_, value in samples[reads].items()}
        yield ratio_row("clip: of the floor, 4 + 28 bytes", samples, CLIP, "floor", at_most(1.10))
        yield Row("the floor's pass that reads", floors["reads"].rate(samples, reads), "GB/s")
    yield ratio_row("clip: faster than torch", samples, CLIP_TORCH, CLIP, at_least(1.2))
    yield ratio_row("skip: of the step without", samples, SKIP, OURS)
    yield ratio_row("stats: of the step without", samples, STATS, OURS, at_most(1.08))
    yield ratio_row("ema: of the step without", samples, EMA, OURS, at_most(36 / 28 * 1.05))
    yield ratio_row("clip, skip, ema, stats: faster than torch", samples, ALL_TORCH, ALL)


def amp(quick: Quick) -> Iterator[Row]:
    """The same under a GradScaler: unscale, look for infs, clip, step."""
    for name in (AMP, AMP_OWN):
        check(SMALL_QUARTERS, name)
    _, steps = make_ways(make_parameters([16 * MI] * 4), [AMP, AMP_OWN, AMP_TORCH])
    del steps[OURS]
    samples = interleave({name: Contender(step) for name, step in steps.items()}, rounds=9)
    yield ratio_row("torch's scaler: faster than torch", samples, AMP_TORCH, AMP, at_least(1.15))
    yield ratio_row("fusedopt's scaler: faster than torch", samples, AMP_TORCH, AMP_OWN, at_least(1.4))


def many(quick: Quick) -> Iterator[Row]:
    """Clipping in the step of 10,000 tensors of 10 elements."""
    check([10] * 1000, CLIP)
    _, steps = make_ways(make_parameters([10] * 10_000), [CLIP, CLIP_TORCH])
    contenders = {name: Contender(steps[name], calls=calls) for name, calls in ((CLIP, 5), (CLIP_TORCH, 2))}
    samples = interleave(contenders, rounds=8)
    yield ratio_row("10,000 x 10, clip: faster than torch", samples, CLIP_TORCH, CLIP, at_least(14))


TORCH = "torch foreach"


def clippers(params: list[Parameter], calls: Mapping[str, int] = {}) -> dict[str, Contender]:
    """fusedopt.clip_grad_norm_ and torch's: each finds gradients that it must halve."""
    clips: dict[str, Callable[..., Tensor]] = {
        OURS: fusedopt.clip_grad_norm_,
        TORCH: partial(clip_grad_norm_, foreach=True),
    }
    grads = [param.grad for param in params if param.grad is not None]
    saved = [grad.clone() for grad in grads]
    max_norm = math.sqrt(sum(param.numel() for param in params)) / 2
    return {
        name: Contender(
            partial(clip, params, max_norm), partial(torch._foreach_copy_, grads, saved), calls=calls.get(name, 1)
        )
        for name, clip in clips.items()
    }


def clip_norm(quick: Quick) -> Iterator[Row]:
    """clip_grad_norm_ by itself: 64M elements, and 10,000 tensors of 10."""
    for title, sizes, small, calls in (
        ("64M", [16 * MI] * 4, SMALL_QUARTERS, {}),
        ("10,000 x 10", [10] * 10_000, [10] * 1000, {OURS: 5, TORCH: 2}),
    ):
        check_clip_grad_norm(make_parameters(small))
        samples = interleave(clippers(make_parameters(sizes), calls), rounds=9)
        yield ratio_row(f"{title}: faster than torch's", samples, TORCH, OURS)


BENCHMARKS: dict[str, Callable[[Quick], Iterator[Row]]] = {
    "phase": phase,
    "phase-amp": amp,
    "phase-many": many,
    "clip-norm": clip_norm,
}
