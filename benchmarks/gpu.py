"""On a GPU: fusedopt against its rivals, the bandwidth of a copy, and its targets (`benchmarks/gpu.sh` runs this too).

Every contender is checked before it is timed, on a small case of the same pattern: fusedopt's parameters and state on
the GPU must have the bits of fusedopt's on the CPU, the others' must be close to them. Who is wrong gets no rows. The
contenders of a benchmark share parameters, gradients and moments and take turns; each has step counts of its own.
Three times are measured, of one step each:

device  between two events around the step. The device is kept busy until the host has enqueued it all, so that no
        wait for the host counts; where that failed, a row says so.
host    of step() alone, the device being idle when it begins.
wall    from before step() until the device is done, the device being idle when it begins.

Before a device or a wall time the L2 cache is filled with something else. Each benchmark is a process of its own.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import fusedopt
from fusedopt._config import _C

from . import harness, phase
from .checks import Renew, assigned, kept
from .harness import (
    COMPILED,
    FIRST_STEPS,
    FOREACH,
    FUSED,
    KINDS,
    LOOP,
    MI,
    OURS,
    SMALL_QUARTERS,
    Contender,
    Quick,
    Row,
    Samples,
    Skipped,
    Spread,
    Target,
    at_least,
    at_most,
    available,
    make_optimizer,
    make_optimizers,
    ratio_row,
)
from .phase import ALL, AMP, AMP_OWN, CLIP, EMA, SKIP, STATS, TORCH, WAYS
from .sparse import LOOKUPS, WIDTH, distinct

sys.path.append(str(harness.ROOT / "tests"))
from reference import assert_same_bits

DEVICE = "cuda"
KI = 2**10
CAPTURABLE = "fusedopt capturable"
COPY, FLOOR = "copy", "floor"
KINDS |= {
    CAPTURABLE: (fusedopt, {"capturable": True}),
    COMPILED: (torch.optim, {"foreach": True, "capturable": True}),  # what the compiler makes of it anyhow
}
REFUSED = "REFUSED, wrong result"
Shape = tuple[int, ...]


def make_parameters(shapes: Sequence[Shape], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Parameter]:
    """Separately allocated parameters on the device, each with a gradient: standard normal, both."""
    g = torch.Generator(DEVICE).manual_seed(seed)

    def values(shape: Shape) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=DEVICE).normal_(generator=g)

    params = [Parameter(values(shape)) for shape in shapes]
    for param in params:
        param.grad = values(param.shape)
    return params


# --- correctness ---------------------------------------------------------------------------------------------------

# Of a rival: relative to the value or to the tensor's mean magnitude, whichever is more. 16-bit rivals round every
# operation, we round what is stored. The learning rate of a check is large, so that what an update adds shows.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
CHECK_LR = {torch.float32: 1e-2, torch.bfloat16: 0.1}


def assert_close(actual: Tensor, expected: Tensor, message: str) -> None:
    tolerance = TOLERANCE[expected.dtype]
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, f"{message}: another dtype or shape"
    a, e = actual.detach().to(expected.device).float(), expected.detach().float()
    allowed = tolerance * torch.maximum(e.abs(), e.abs().mean())
    excess = (a - e).abs() / allowed
    assert bool((excess <= 1).all()), f"{message}: off by {float(excess.max()):.3g} x the tolerance, {tolerance:g}"


Trained = tuple[list[Parameter], Any]  # with their optimizer


def assert_same_training(name: str, same: Callable[..., None], actual: Trained, expected: Trained) -> None:
    for at, (param, twin) in enumerate(zip(actual[0], expected[0], strict=True)):
        same(param, twin, f"{name}: parameter {at}")
        for key, value in expected[1].state[twin].items():
            same(actual[1].state[param][key], value, f"{name}: {key} of parameter {at}")


def trained(
    kind: str, values: list[Tensor], grads: list[list[Tensor]], device: str, renew: Renew, **options: Any
) -> Trained:
    """Parameters of these values, and their optimizer, after a step with each of the lists of gradients."""
    params = [Parameter(value.to(device, copy=True)) for value in values]
    sources = [grad.to(device, copy=True) for grad in grads[0]]
    for param, source in zip(params, sources, strict=True):
        param.grad = source
    optimizer = make_optimizer(kind, params, **options)
    for step_grads in grads:
        for source, grad in zip(sources, step_grads, strict=True):
            source.copy_(grad)
        renew(params, sources)
        optimizer.step()
    return params, optimizer


def check(
    shapes: Sequence[Shape],
    kinds: Sequence[str],
    dtype: torch.dtype = torch.float32,
    renew: Renew = kept,
    algorithm: str = "Adam",
    first: list[Tensor] | None = None,
    **options: Any,
) -> tuple[list[str], list[Row]]:
    """The kinds, of those available, whose steps on the device are right, and a note about each other one.

    `first` holds the first step's gradients, on the CPU, if they are to be special. Raises AssertionError if fusedopt
    itself is wrong.
    """
    g = torch.Generator().manual_seed(1)
    values = [torch.randn(shape, generator=g).to(dtype) for shape in shapes]
    first = first or [torch.randn(shape, generator=g) for shape in shapes]
    grads = [[(grad * 0.75**step).to(dtype) for grad in first] for step in range(FIRST_STEPS[algorithm] + 2)]
    options = {"lr": CHECK_LR[dtype], "algorithm": algorithm, **options}
    expected = trained(OURS, values, grads, "cpu", renew, **options)

    right: list[str] = []
    notes: list[Row] = []
    for kind in [kind for kind in kinds if available(kind, algorithm)]:
        same = assert_same_bits if kind in (OURS, CAPTURABLE) else assert_close
        try:
            actual = trained(kind, values, grads, DEVICE, renew, **options)
            assert_same_training(kind, same, actual, expected)
            right.append(kind)
        except AssertionError as wrong:
            if kind == OURS:
                raise
            notes.append(Row(f"{kind}, checked", note=f"{REFUSED}: {wrong}"))
    return right, notes


# --- timing --------------------------------------------------------------------------------------------------------

Measure = Callable[[str, Contender], float]


def take_turns(contenders: Mapping[str, Contender], measure: Measure, rounds: int, warmup: int = 2) -> Samples:
    """As harness.interleave, with a measure of one's own, and every contender in every round of the warm-up."""
    names = list(contenders)
    samples: Samples = {name: {} for name in names}
    gc.collect()
    gc.disable()
    try:
        for round_ in range(-warmup, rounds):
            for at in range(len(names)):
                name = names[(round_ + at) % len(names)]
                if round_ >= 0 and round_ % contenders[name].every:
                    continue
                value = measure(name, contenders[name])
                if round_ >= 0:
                    samples[name][round_] = value
    finally:
        gc.enable()
    return samples


class Timer:
    """The three measures of a step."""

    def __init__(self) -> None:
        self._other = torch.empty(2 * l2_size(), dtype=torch.uint8, device=DEVICE)
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._leads: dict[str, float] = {}  # by contender: seconds by which the host is ahead of the device
        self._waited: Counter[str] = Counter()
        self._taken: Counter[str] = Counter()
        cycles = 10_000_000
        for _ in range(3):  # the last counts: by then the clock is up
            self._begin.record()
            torch.cuda._sleep(cycles)
            self._end.record()
            torch.cuda.synchronize()
        self._cycles_per_second = cycles / (self._begin.elapsed_time(self._end) / 1e3)

    def host(self, name: str, contender: Contender) -> float:
        contender.prepare()
        torch.cuda.synchronize()
        start = time.perf_counter()
        contender.run()
        return time.perf_counter() - start

    def wall(self, name: str, contender: Contender) -> float:
        contender.prepare()
        self._other.fill_(1)
        torch.cuda.synchronize()
        start = time.perf_counter()
        contender.run()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    def device(self, name: str, contender: Contender) -> float:
        if name not in self._leads:
            self.host(name, contender)
            self._leads[name] = min(3 * self.host(name, contender) + 0.3e-3, 0.15)
        contender.prepare()
        torch.cuda.synchronize()
        self._other.fill_(1)
        torch.cuda._sleep(int(self._leads[name] * self._cycles_per_second))
        self._begin.record()
        contender.run()
        self._end.record()
        self._waited[name] += self._begin.query()  # already begun: the device may have waited for the host
        self._taken[name] += 1
        torch.cuda.synchronize()
        return self._begin.elapsed_time(self._end) / 1e3

    def waits(self, title: str) -> Iterator[Row]:
        """A note about each contender whose device times may hold waits for the host."""
        for name, count in self._waited.items():
            if count:
                note = f"the device was not kept busy in {count} of {self._taken[name]} steps: may hold waits"
                yield Row(f"{title}{name}, device time", note=note)
        self._waited.clear()
        self._taken.clear()


def l2_size() -> int:
    return getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 64 * MI


class Copy:
    """torch's copy from device to device, the yardstick of bandwidth: bytes read and bytes written, both counted."""

    def __init__(self, size: int = 2 * KI * MI) -> None:
        self._from = torch.ones(size, dtype=torch.uint8, device=DEVICE)
        self._to = torch.empty_like(self._from)
        self.bytes_moved = 2 * size

    def contender(self) -> Contender:
        return Contender(lambda: self._to.copy_(self._from))

    def rates(self, samples: Samples) -> dict[int, float]:
        return {round_: self.bytes_moved / value for round_, value in samples[COPY].items()}


def step_bytes(params: list[Parameter], optimizer: Optimizer) -> int:
    """What a step must move: parameters and state are read and written, gradients read."""
    states = sum(name != "step" for name in optimizer.state[params[0]])
    return sum(param.numel() * param.element_size() for param in params) * (2 * (1 + states) + 1)


def compare(title: str, samples: Samples, top: str, bottom: str, target: Target | None = None) -> Iterator[Row]:
    """harness.ratio_row, if both took part."""
    if samples.get(top) and samples.get(bottom):
        few = min(len(samples[top]), len(samples[bottom]))
        most = max(len(found) for found in samples.values())
        yield ratio_row(title if few == most else f"{title} ({few} rounds)", samples, top, bottom, target)


def against_copy(
    title: str, samples: Samples, copy: Copy, size: int, names: Sequence[str], target: Target | None = None
) -> Iterator[Row]:
    """What part of the copy's bandwidth steps achieve that must move so many bytes; the target is fusedopt's."""
    rates = copy.rates(samples)
    samples[FLOOR] = {round_: size / rate for round_, rate in rates.items()}
    yield Row(f"{title}{COPY} (read + written)", Spread.of([rate / 1e9 for rate in rates.values()]), "GB/s")
    for name in names:
        yield from compare(f"{title}{name}: of copy", samples, FLOOR, name, target if name == OURS else None)


def launches(name: str, contender: Contender) -> Row:
    """What one step enqueues, by torch.profiler."""
    contender.run()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    try:
        with tempfile.TemporaryDirectory() as folder:
            with torch.profiler.profile(activities=activities) as profile:
                contender.run()
                torch.cuda.synchronize()
            path = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(path))
            count = Counter(event.get("cat") for event in json.loads(path.read_text())["traceEvents"])
    except Exception as error:
        return Row(f"kernels of {name}", note=f"skipped: the profiler failed: {error}")
    if not count["kernel"]:
        return Row(f"kernels of {name}", note="skipped: the profiler saw none")
    note = f"{count['kernel']} kernels, {count['gpu_memcpy']} copies, {count['gpu_memset']} memsets"
    return Row(f"kernels of {name}", Spread.of([count["kernel"]]), "", note=note)


# --- the patterns --------------------------------------------------------------------------------------------------

LLAMA_SCALE = 0.385  # of the dimensions: 998 million elements


def llama_shapes(scale: float) -> list[Shape]:
    """The 291 tensors of Llama-2-7B, their dimensions scaled and rounded to a multiple of 8."""
    model, hidden, vocabulary = (8 * round(dim * scale / 8) for dim in (4096, 11008, 32000))
    attention: list[Shape] = [(model, model)] * 4
    layer = [*attention, (hidden, model), (hidden, model), (model, hidden), (model,), (model,)]
    return [(vocabulary, model), *layer * 32, (model,), (vocabulary, model)]


def gpt2_shapes(model: int = 768, vocabulary: int = 50257, context: int = 1024) -> list[Shape]:
    """The 148 tensors of GPT-2, 124M elements unless scaled down."""
    norm: list[Shape] = [(model,), (model,)]

    def linear(inputs: int, outputs: int) -> list[Shape]:
        return [(inputs, outputs), (outputs,)]

    attention = [*norm, *linear(model, 3 * model), *linear(model, model)]
    layer = [*attention, *norm, *linear(model, 4 * model), *linear(4 * model, model)]
    return [(vocabulary, model), (context, model), *layer * 12, *norm]


Pattern = tuple[list[Shape], list[Shape]]  # as it is, and small


def llama() -> Pattern:
    return llama_shapes(LLAMA_SCALE), llama_shapes(1 / 64)


def gpt2() -> Pattern:
    return gpt2_shapes(), gpt2_shapes(48, 503, 64)


def rounds_for(quick: Quick) -> int:
    return 20 if quick else 30


# --- the benchmarks ------------------------------------------------------------------------------------------------


def model(pattern: Pattern, dtype: torch.dtype, quick: Quick, algorithm: str = "Adam", **options: Any) -> Iterator[Row]:
    """Device times of a model's step: of the copy's bandwidth, and of the rivals."""
    shapes, small = pattern
    rivals = [kind for kind in (FUSED, FOREACH, LOOP) if available(kind, algorithm)]
    wanted = [OURS, CAPTURABLE, *(rivals[:1] if quick else rivals)]
    kinds, notes = check(small, wanted, dtype, algorithm=algorithm, **options)
    yield from notes
    params = make_parameters(shapes, dtype)
    optimizers = make_optimizers(params, kinds, algorithm, **options)
    copy, timer = Copy(), Timer()
    contenders = {name: Contender(optimizer.step) for name, optimizer in optimizers.items()}
    samples = take_turns({**contenders, COPY: copy.contender()}, timer.device, rounds_for(quick))
    size = step_bytes(params, optimizers[OURS])
    yield from against_copy("", samples, copy, size, [OURS, CAPTURABLE, rivals[0]], at_least(0.93))
    yield from compare("of torch fused's time", samples, OURS, FUSED, at_most(1.0))
    for name in (FOREACH, LOOP):
        yield from compare(f"faster than {name}", samples, name, OURS)
    yield from timer.waits("")


def llama_float32(quick: Quick) -> Iterator[Row]:
    """A billion float32 elements in the shapes of Llama-2-7B."""
    yield from model(llama(), torch.float32, quick)


def llama_bfloat16(quick: Quick) -> Iterator[Row]:
    """The same in bfloat16, state too."""
    yield from model(llama(), torch.bfloat16, quick)


def llama_amsgrad(quick: Quick) -> Iterator[Row]:
    """The same in float32 with AMSGrad."""
    yield from model(llama(), torch.float32, quick, amsgrad=True)


def llama_radam(quick: Quick) -> Iterator[Row]:
    """The same in float32 by RAdam, rectified; torch has no fused one."""
    yield from model(llama(), torch.float32, quick, "RAdam")


def llama_adagrad(quick: Quick) -> Iterator[Row]:
    """The same in float32 by Adagrad."""
    yield from model(llama(), torch.float32, quick, "Adagrad")


FORMS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "bfloat16, plain": (torch.bfloat16, {}),
    "bfloat16, masters": (torch.bfloat16, {"master_weights": True}),
    "bfloat16, split": (torch.bfloat16, {"master_weights": "split"}),
    "bfloat16, stochastic": (torch.bfloat16, {"rounding": "stochastic"}),
    "bfloat16, kahan": (torch.bfloat16, {"rounding": "kahan"}),
    "float32, int8": (torch.float32, {"state_dtype": "int8"}),
    "bfloat16, split, int8": (torch.bfloat16, {"master_weights": "split", "state_dtype": "int8"}),
}


def forms(quick: Quick) -> Iterator[Row]:
    """How parameters and state are stored: 64M elements by Adam, of the copy's bandwidth and of float32's time."""
    copy, timer = Copy(), Timer()
    contenders, sizes = {COPY: copy.contender()}, {}
    for name, (dtype, options) in FORMS.items():
        params = make_parameters([(4096, 4096)] * 4, dtype)
        optimizer = make_optimizers(params, [OURS], "Adam", **options)[OURS]
        optimizer.step()
        tensors = [tensor for state in optimizer.state.values() for key, tensor in state.items() if key != "step"]
        written = sum(tensor.nbytes for tensor in [*params, *tensors])
        sizes[name] = 2 * written + sum(param.nbytes for param in params)
        contenders[name] = Contender(optimizer.step)
    samples = take_turns(contenders, timer.device, rounds_for(quick))
    for name, size in sizes.items():
        rates = copy.rates(samples)
        samples[FLOOR] = {round_: size / rate for round_, rate in rates.items()}
        yield from compare(f"{name}: of copy", samples, FLOOR, name, at_least(0.93))
        yield from compare(f"{name}: of float32's time", samples, name, "float32")
    yield from timer.waits("")


def sparse(quick: Quick) -> Iterator[Row]:
    """Adagrad on an embedding, with coalesced gradients for 4,096 of its 1M rows of 64."""
    torch.sparse.check_sparse_tensor_invariants.disable()  # explicitly: else torch's step warns
    g = torch.Generator().manual_seed(0)

    def gradient(rows: int) -> Tensor:
        values = torch.randn(LOOKUPS, WIDTH, generator=g)
        return torch.sparse_coo_tensor(distinct(rows, g).unique()[None], values, (rows, WIDTH), is_coalesced=True)

    rows = 5 * LOOKUPS
    kinds, notes = check([(rows, WIDTH)], [OURS, LOOP], algorithm="Adagrad", first=[gradient(rows)])
    yield from notes
    param = Parameter(torch.ones(MI, WIDTH, device=DEVICE))
    grads = itertools.cycle([gradient(MI).to(DEVICE) for _ in range(8)])

    def renew() -> None:
        param.grad = next(grads)

    renew()
    optimizers = make_optimizers([param], kinds, "Adagrad")
    contenders = {name: Contender(optimizer.step, renew) for name, optimizer in optimizers.items()}
    timer = Timer()
    for title, measure in (("device", timer.device), ("wall", timer.wall), ("host", timer.host)):
        samples = take_turns(contenders, measure, rounds_for(quick))
        yield from compare(f"{title}: faster than {LOOP}", samples, LOOP, OURS)
        yield from timer.waits("")
    for name, contender in contenders.items():
        yield launches(name, contender)


def gpt2_float32(quick: Quick) -> Iterator[Row]:
    """GPT-2's tensors: all three times, and the kernels of a step."""
    shapes, small = gpt2()
    kinds, notes = check(small, [OURS, CAPTURABLE, FUSED, FOREACH, LOOP])
    yield from notes
    params = make_parameters(shapes)
    optimizers = make_optimizers(params, kinds)
    copy, timer = Copy(), Timer()
    contenders = {name: Contender(optimizer.step) for name, optimizer in optimizers.items()}
    samples = take_turns({**contenders, COPY: copy.contender()}, timer.device, rounds_for(quick))
    size = step_bytes(params, optimizers[OURS])
    yield from against_copy("", samples, copy, size, [OURS, CAPTURABLE, FUSED])
    yield from compare("device: of torch fused's time", samples, OURS, FUSED)
    for name in (FOREACH, LOOP):
        yield from compare(f"device: faster than {name}", samples, name, OURS)
    yield from timer.waits("")
    for title, measure in (("wall", timer.wall), ("host", timer.host)):
        samples = take_turns(contenders, measure, rounds_for(quick))
        for name in list(contenders)[1:]:
            yield from compare(f"{title}: faster than {name}", samples, name, OURS)
    for name, contender in contenders.items():
        yield launches(name, contender)


def small1000(quick: Quick) -> Iterator[Row]:
    """10,000 tensors of 1,000 elements."""
    for renew in (kept, assigned):
        shapes: list[Shape] = [(1000,)] * 10_000
        wanted = [OURS, FUSED] if quick or renew is assigned else [OURS, CAPTURABLE, FUSED, FOREACH, LOOP]
        kinds, notes = check(shapes[:1000], wanted, renew=renew)
        yield from notes
        params = make_parameters(shapes)
        optimizers = make_optimizers(params, kinds)
        contenders = renewing(optimizers, params, renew)
        copy, timer, title = Copy(), Timer(), f"{renew.__name__}: "
        samples = take_turns(contenders, timer.wall, rounds_for(quick))
        target = at_least(5) if renew is kept else None
        yield from compare(f"{title}wall: faster than {FUSED}", samples, FUSED, OURS, target)
        for name in (CAPTURABLE, FOREACH, LOOP):
            yield from compare(f"{title}wall: faster than {name}", samples, name, OURS)
        with_copy = {name: contender for name, contender in contenders.items() if name != LOOP}
        with_copy[COPY] = copy.contender()
        samples = take_turns(with_copy, timer.device, rounds_for(quick))
        yield from compare(f"{title}device: faster than {FUSED}", samples, FUSED, OURS)
        size = step_bytes(params, optimizers[OURS])
        yield from against_copy(title, samples, copy, size, [OURS, CAPTURABLE, FUSED])
        yield from timer.waits(title)
    yield Row(COMPILED, note="skipped: not tried on so many tensors")


def renewing(optimizers: Mapping[str, Optimizer], params: list[Parameter], renew: Renew) -> dict[str, Contender]:
    """A contender of each, whose gradients are renewed before each step; the slow ones rarely take part."""
    sources = [param.grad for param in params if param.grad is not None]
    every = {LOOP: 10 if len(params) > 2000 else 2}
    return {
        name: Contender(optimizer.step, lambda: renew(params, sources), every=every.get(name, 1))
        for name, optimizer in optimizers.items()
    }


def host(quick: Quick) -> Iterator[Row]:
    """step() as the host sees it, for tensors of 10 elements."""
    timer = Timer()
    for count in (291, 1000, 10_000):
        for renew in (kept, assigned):
            shapes: list[Shape] = [(10,)] * count
            rivals = [FUSED] if quick or renew is assigned else [CAPTURABLE, FUSED, FOREACH, LOOP]
            kinds, notes = check(shapes[:1000], [OURS, *rivals], renew=renew)
            yield from notes
            params = make_parameters(shapes)
            contenders = renewing(make_optimizers(params, kinds), params, renew)
            samples = take_turns(contenders, timer.host, rounds_for(quick))
            title = f"{count:,} {renew.__name__}: of {{}}'s time"
            for name in rivals:
                target = at_most(0.1) if name == FUSED else None
                yield from compare(title.format(name), samples, OURS, name, target)
    yield Row(COMPILED, note="skipped: not tried on so many tensors")


# --- clipping, skipping, averaging, measuring ----------------------------------------------------------------------


def check_ways(shapes: Sequence[Shape], names: Sequence[str]) -> tuple[list[str], list[Row]]:
    """As `check`, of benchmarks/phase.py's ways."""
    g = torch.Generator().manual_seed(1)
    values = [torch.randn(shape, generator=g) for shape in shapes]
    grads = [[0.75**step * torch.randn(shape, generator=g) for shape in shapes] for step in range(3)]
    max_norm = 0.1 * math.sqrt(sum(value.numel() for value in values))

    def trained_by(way: phase.Way, device: str) -> Trained:
        params = [Parameter(value.to(device, copy=True)) for value in values]
        optimizer, step = way.make(params, max_norm, scale=3.0, lr=CHECK_LR[torch.float32])
        for step_grads in grads:
            for param, grad in zip(params, step_grads, strict=True):
                param.grad = grad.to(device, copy=True)
            step()
        return params, optimizer

    right: list[str] = []
    notes: list[Row] = []
    for name in names:
        way = WAYS[name]
        try:
            actual, expected = trained_by(way, DEVICE), trained_by(replace(way, kind=OURS), "cpu")
            assert_same_training(name, assert_same_bits if way.kind == OURS else assert_close, actual, expected)
            if way.kind == OURS and way.reads_first:
                assert_same_bits(actual[1].grad_norm, expected[1].grad_norm, f"{name}: the norm")
            if way.options.get("stats"):
                assert actual[1].stats() == expected[1].stats(), f"{name}: other statistics"
            right.append(name)
        except AssertionError as wrong:
            if way.kind == OURS:
                raise
            notes.append(Row(f"{name}, checked", note=f"{REFUSED}: {wrong}"))
    return right, notes


def own_launches(steps: Mapping[str, Callable[[], object]]) -> Iterator[Row]:
    """How many kernels fusedopt launches in a step: one, and one more to read the gradients first."""
    for name, step in steps.items():
        way = WAYS[name]
        if way.kind == OURS:
            before = _C.units_run()["cuda"]
            step()
            count = _C.units_run()["cuda"] - before
            yield Row(f"launches of {name}", Spread.of([count]), "", at_most(2 if way.reads_first else 1))


def phase_large(quick: Quick) -> Iterator[Row]:
    """AdamW of 64M elements in 4 tensors: clipping, skipping, statistics and averages in the step."""
    names = [OURS, CLIP, SKIP, STATS, EMA, ALL, phase.CLIP_TORCH, phase.ALL_TORCH]
    right, notes = check_ways([(size,) for size in SMALL_QUARTERS], names)
    yield from notes
    params = make_parameters([(16 * MI,)] * 4)
    _, steps = phase.make_ways(params, right)
    copy, timer = Copy(), Timer()
    contenders = {name: Contender(step) for name, step in steps.items()}
    samples = take_turns({**contenders, COPY: copy.contender()}, timer.device, rounds_for(quick))
    for name in (CLIP, SKIP, STATS, EMA, ALL):
        size = WAYS[name].bytes_per_element * sum(param.numel() for param in params)
        samples[FLOOR] = {round_: size / rate for round_, rate in copy.rates(samples).items()}
        yield from compare(f"{name}: of copy", samples, FLOOR, name)
    for name in (CLIP, SKIP, STATS, EMA, ALL):
        yield from compare(f"{name}: of the step without", samples, name, OURS)
    yield from compare(f"{CLIP}: faster than torch", samples, phase.CLIP_TORCH, CLIP)
    yield from compare(f"{ALL}: faster than torch", samples, phase.ALL_TORCH, ALL)
    yield from timer.waits("")
    yield from own_launches(steps)


def phase_amp(quick: Quick) -> Iterator[Row]:
    """The same under a GradScaler: unscale, look for infs, clip, step."""
    right, notes = check_ways([(size,) for size in SMALL_QUARTERS], [AMP, AMP_OWN, phase.AMP_TORCH])
    yield from notes
    _, steps = phase.make_ways(make_parameters([(16 * MI,)] * 4), right)
    del steps[OURS]
    timer = Timer()
    contenders = {name: Contender(step) for name, step in steps.items()}
    for title, measure in (("device", timer.device), ("wall", timer.wall)):
        samples = take_turns(contenders, measure, rounds_for(quick))
        for whose, name in (("torch's", AMP), ("fusedopt's", AMP_OWN)):
            yield from compare(f"{title}, {whose} scaler: faster", samples, phase.AMP_TORCH, name)
        yield from timer.waits("")
    yield from own_launches(steps)


def phase_many(quick: Quick) -> Iterator[Row]:
    """Clipping in the step of 10,000 tensors of 10 elements."""
    shapes: list[Shape] = [(10,)] * 10_000
    right, notes = check_ways(shapes[:1000], [CLIP, phase.CLIP_TORCH])
    yield from notes
    _, steps = phase.make_ways(make_parameters(shapes), right)
    del steps[OURS]
    timer = Timer()
    contenders = {name: Contender(step) for name, step in steps.items()}
    for title, measure in (("wall", timer.wall), ("host", timer.host)):
        samples = take_turns(contenders, measure, rounds_for(quick))
        yield from compare(f"{title}: faster than torch", samples, phase.CLIP_TORCH, CLIP)


def clip_norm(quick: Quick) -> Iterator[Row]:
    """clip_grad_norm_ by itself: 64M elements in 4 tensors, and 10,000 tensors of 10."""
    timer = Timer()
    for title, size, count in (("64M", 16 * MI, 4), ("10,000 x 10", 10, 10_000)):
        phase.check_clip_grad_norm(make_parameters([(min(size, 50_000),)] * min(count, 1000)))
        contenders = phase.clippers(make_parameters([(size,)] * count))
        for what, measure in (("device", timer.device), ("wall", timer.wall)):
            samples = take_turns(contenders, measure, rounds_for(quick))
            yield from compare(f"{title}, {what}: faster than torch's", samples, TORCH, OURS)
            yield from timer.waits(f"{title}, ")


# --- those that need parameters of their own -----------------------------------------------------------------------

Maker = Callable[[list[Parameter], dict[str, Any]], tuple[Optimizer, Callable[[], object]]]
COMPILE_LIMIT = 60.0


def outsider(
    name: str, make: Maker, shapes: list[Shape], dtype: torch.dtype, quick: Quick, state_too: bool, **options: Any
) -> Iterator[Row]:
    """A rival with parameters, gradients and state of its own, against fusedopt.

    It is checked against fusedopt, whose own check is another benchmark's, on these very parameters: compiling it for
    a small case would take as long again.
    """
    params, twins = make_parameters(shapes, dtype), make_parameters(shapes, dtype)
    ours = make_optimizer(OURS, params, **options)
    try:
        theirs, step = make(twins, options)
        theirs.step()  # makes the state
        start = time.monotonic()
        step()
        torch.cuda.synchronize()
        took = time.monotonic() - start
        if name == COMPILED:
            yield Row(f"{name}: its first step, once", Spread.of([took]), "s")
        if took > COMPILE_LIMIT:
            raise Skipped(f"{name}: the first step took {took:.0f} s")
        for _ in range(2):
            step()
    except Skipped:
        raise
    except Exception as error:
        raise Skipped(f"{name} failed: {first_line(error)}") from error
    for _ in range(4):
        ours.step()
    for at, (param, twin) in enumerate(zip(params, twins, strict=True)):
        assert_close(twin, param, f"{name}: parameter {at}")
        for key in ours.state[param] if state_too else ():
            if key != "step":
                assert_close(theirs.state[twin][key], ours.state[param][key], f"{name}: {key} of parameter {at}")

    copy, timer = Copy(), Timer()
    contenders = {OURS: Contender(ours.step), name: Contender(step)}
    samples = take_turns({**contenders, COPY: copy.contender()}, timer.device, rounds_for(quick))
    yield from compare(f"device: faster than {name}", samples, name, OURS)
    samples[FLOOR] = {round_: step_bytes(params, ours) / rate for round_, rate in copy.rates(samples).items()}
    yield from compare(f"{name}: of copy", samples, FLOOR, name)
    yield from timer.waits("")
    samples = take_turns(contenders, timer.host, rounds_for(quick))
    yield from compare(f"host: faster than {name}", samples, name, OURS)
    yield launches(name, contenders[name])


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


# Module, class, and the options with which it does what Adam does, in float32.
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "apex": ("apex.optimizers", "FusedAdam", {"adam_w_mode": False}),
    "Transformer Engine": ("transformer_engine.pytorch.optimizers", "FusedAdam", {"adam_w_mode": False}),
    "DeepSpeed": ("deepspeed.ops.adam", "FusedAdam", {"adam_w_mode": False}),
    "bitsandbytes": ("bitsandbytes.optim", "Adam", {}),
    "optimi": ("optimi", "Adam", {}),
    "flashoptim": ("flashoptim", "FlashAdam", {"quantize": False, "master_weight_bits": None}),
}


def others(quick: Quick) -> Iterator[Row]:
    """Other libraries, where they are installed: float32, doing the same work as Adam."""
    for name, (module, algorithm, chosen) in OTHERS.items():
        try:
            make_other = partial(getattr(importlib.import_module(module), algorithm), **chosen)
        except Exception as error:  # whatever an import may raise
            yield Row(name, note=f"skipped: not importable: {first_line(error)}")
            continue

        def make(
            params: list[Parameter], options: dict[str, Any], make_other: Callable[..., Optimizer] = make_other
        ) -> tuple[Optimizer, Callable[[], object]]:
            made = make_other(params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, **options)
            return made, made.step

        for pattern in (gpt2(), llama()):
            title = f"{len(pattern[0])} tensors, {name}"
            try:
                for row in outsider(name, make, pattern[0], torch.float32, quick, state_too=False):
                    row.name = f"{len(pattern[0])} tensors, {row.name}"
                    yield row
            except Skipped as reason:
                yield Row(title, note=f"skipped: {reason}")
            except AssertionError as wrong:
                yield Row(title, note=f"{REFUSED}: {wrong}")
            torch.cuda.empty_cache()


def compiled(shapes: list[Shape], dtype: torch.dtype, quick: Quick, **options: Any) -> Iterator[Row]:
    if quick:
        raise Skipped("not in a quick run")

    def make(params: list[Parameter], options: dict[str, Any]) -> tuple[Optimizer, Callable[[], object]]:
        optimizer = make_optimizer(COMPILED, params, **options)

        def step() -> None:
            optimizer.step()

        return optimizer, torch.compile(step, fullgraph=False)

    yield from outsider(COMPILED, make, shapes, dtype, quick, state_too=True, **options)


def compiled_gpt2(quick: Quick) -> Iterator[Row]:
    """torch.compile of torch's foreach step: GPT-2."""
    yield from compiled(gpt2()[0], torch.float32, quick)


def compiled_llama(quick: Quick) -> Iterator[Row]:
    """torch.compile of torch's foreach step: the shapes of Llama-2-7B."""
    yield from compiled(llama()[0], torch.float32, quick)


def compiled_bfloat16(quick: Quick) -> Iterator[Row]:
    """The same in bfloat16."""
    yield from compiled(llama()[0], torch.bfloat16, quick)


def compiled_amsgrad(quick: Quick) -> Iterator[Row]:
    """The same in float32 with AMSGrad."""
    yield from compiled(llama()[0], torch.float32, quick, amsgrad=True)


BENCHMARKS: dict[str, Callable[[Quick], Iterator[Row]]] = {
    "llama": llama_float32,
    "bf16": llama_bfloat16,
    "gpt2": gpt2_float32,
    "small": small1000,
    "host": host,
    "amsgrad": llama_amsgrad,
    "radam": llama_radam,
    "adagrad": llama_adagrad,
    "sparse": sparse,
    "forms": forms,
    "phase": phase_large,
    "phase-amp": phase_amp,
    "phase-many": phase_many,
    "clip-norm": clip_norm,
    "others": others,
    "comp-gpt2": compiled_gpt2,
    "comp-llama": compiled_llama,
    "comp-bf16": compiled_bfloat16,
    "comp-ams": compiled_amsgrad,
}


# --- running them --------------------------------------------------------------------------------------------------


def work(name: str, quick: Quick, rows: Connection) -> None:
    """A benchmark's own process: sends its rows as they come."""
    try:
        for row in BENCHMARKS[name](quick):
            rows.send(row)
    except Skipped as reason:
        rows.send(Row("", note=f"skipped: {reason}"))
    except AssertionError as wrong:
        rows.send(Row("", note=f"{REFUSED}: {wrong}"))
    except Exception as error:
        traceback.print_exc()
        rows.send(Row("", note=f"FAILED: {first_line(error)}"))
    rows.close()


def run(name: str, quick: Quick, limit: float) -> list[Row]:
    """Run one benchmark, printing its rows as they come, and end it if it takes too long."""
    found: list[Row] = []

    def add(row: Row) -> None:
        found.append(row)
        harness.print_rows(name, [row])

    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(name, quick, sender))
    stop = time.monotonic() + limit
    process.start()
    sender.close()
    try:
        while receiver.poll(max(0.0, stop - time.monotonic())):
            add(receiver.recv())
        add(Row("", note=f"{'skipped' if name.startswith('comp-') else 'FAILED'}: ended after {limit:.0f} s"))
    except EOFError:  # it is through
        process.join(30)
        if process.exitcode != 0:
            add(Row("", note=f"FAILED: the process ended with {process.exitcode}"))
    finally:
        if process.is_alive():
            process.kill()
        process.join()
    return found


def limit_of(name: str) -> float:
    """Seconds for a benchmark, its process's start included."""
    return COMPILE_LIMIT + 25 if name.startswith("comp-") else 150.0


def driver_version() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def machine() -> dict[str, Any]:
    gpu = torch.cuda.get_device_properties(0)
    facts = harness.machine()
    return facts | {
        "gpu": gpu.name,
        "capability": f"{gpu.major}.{gpu.minor}",
        "multiprocessors": gpu.multi_processor_count,
        "l2_bytes": l2_size(),
        "gpu_memory_gib": round(gpu.total_memory / 2**30, 1),
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "fusedopt_cuda": _C.build_info()["cuda"],
        "commit": facts["commit"] or os.environ.get("COMMIT"),
    }


def why_not() -> str | None:
    """Why nothing can be measured here."""
    if not torch.cuda.is_available():
        return "no CUDA device: not yet run on a GPU"
    reason = _C.why_no_cuda() if hasattr(_C, "why_no_cuda") else "this build has no CUDA kernels"
    return f"fusedopt cannot step on this GPU: {reason}" if reason else None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="20 rounds, fewer rivals, no torch.compile")
    parser.add_argument("--only", action="append", choices=BENCHMARKS, help="this benchmark (may be repeated)")
    parser.add_argument("--json", type=Path, help="where to write the results (default: results/, a full run only)")
    parser.add_argument("--seconds", type=float, default=3600, help="begin nothing after this time, and end it by then")
    args = parser.parse_args()
    if reason := why_not():
        sys.exit(reason)

    facts = machine()
    print(f"{facts['gpu']}, {facts['multiprocessors']} multiprocessors, {facts['l2_bytes'] / MI:g} MiB of L2; ", end="")
    print(f"driver {facts['driver']}, torch {facts['torch']}, CUDA {facts['cuda']}; ", end="")
    print(f"fusedopt {facts['fusedopt']}, commit {facts['commit']}\n")
    harness.print_header()
    path = args.json
    if path is None and not args.quick and not args.only:
        slug = re.sub(r"[^a-z0-9]+", "-", facts["gpu"].lower()).strip("-")
        path = harness.ROOT / "benchmarks" / "results" / f"gpu-{slug}.json"
    results: dict[str, list[Row]] = {}
    took: dict[str, float] = {}
    begin = time.monotonic()
    for name in args.only or BENCHMARKS:
        start = time.monotonic()
        left = args.seconds - (start - begin)
        if left < 20:
            results[name] = [Row("", note=f"skipped: {args.seconds:g} s are over")]
            harness.print_rows(name, results[name])
        else:
            results[name] = run(name, args.quick, min(limit_of(name), left))
        took[name] = round(time.monotonic() - start, 1)
        if path:  # now: what comes next may be ended from outside
            harness.write_json(path, facts | {"seconds_by_benchmark": took}, results)

    rows = [row for found in results.values() for row in found]
    verdicts = [row.verdict for row in rows]
    bad = [name for name, found in results.items() if any(row.note.startswith((REFUSED, "FAILED")) for row in found)]
    print(f"\n{verdicts.count('meets')} targets met, {verdicts.count('MISSES')} missed; {sum(took.values()):.0f} s")
    print("seconds: " + ", ".join(f"{name} {value:g}" for name, value in took.items()))
    if path:
        print(f"written: {path}")
    if bad:
        sys.exit(f"wrong or failed in: {', '.join(bad)}")


if __name__ == "__main__":
    main()
