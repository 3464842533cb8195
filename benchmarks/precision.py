"""Adam with parameters and state in fewer bits: what it stores, what it moves, and what a step takes.

    python -m benchmarks.cpu --only precision --json precision.json

A step of 64M elements is compared with the larger of two bounds, both measured in the same run:

- traffic: the bytes that its streams have, read and written, at the rate of benchmarks/floor.cpp with the streams of
  float32 Adam. How many bytes is computed, not measured: a stream that a step reads counts once, one that it also
  writes twice.
- arithmetic: two divisions and a square root an element, as Adam's formula has them, in the vectors that the compiler
  takes for them, on data that stays in the caches (benchmarks/floor.cpp). As many processes as there are threads do it,
  all at once. It is the CPU's time, for what else runs on the machine hits short turns harder than long steps, and
  would flatter those; of three sizes and all rounds the lowest.

"in cache" is the step's own arithmetic, conversions, draws and codes included, of small parameters, measured in the
same way, the calls too; not a bound. float32 Adam's can be below the bound: where a division has the same bits, it
multiplies.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from fusedopt._config import _C

from . import harness
from .harness import (
    FUSED,
    MI,
    OURS,
    Contender,
    Floor,
    Quick,
    Row,
    Samples,
    Skipped,
    Spread,
    Target,
    arithmetic,
    at_least,
    at_most,
    fastest,
    interleave,
    make_optimizer,
    ratio_row,
    seconds,
)

sys.path.append(str(harness.ROOT / "tests"))
from reference import assert_same_bits

LARGE, SMALL = [(4096, 4096)] * 4, [(41, 1003)] * 4  # small: enough for two threads, and blocks that are cut short
SHORT = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", "int8": "int8"}
BYTES = {torch.float32: 4.0, torch.bfloat16: 2.0, torch.float16: 2.0, "int8": 1 + 4 / 128}  # a scale for 128 codes
PLAIN, MASTER, SPLIT, STOCHASTIC, KAHAN = "plain", "master", "split", "stochastic", "kahan"
WAYS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    MASTER: {"master_weights": True},
    SPLIT: {"master_weights": "split"},
    STOCHASTIC: {"rounding": "stochastic"},
    KAHAN: {"rounding": "kahan"},
}


# --- what is stored ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Combination:
    """A dtype of parameters, how they are kept, and a `state_dtype`; and what to use it for."""

    param: torch.dtype
    way: str
    state_dtype: torch.dtype | str | None
    use: str
    grad: torch.dtype | None = None  # None: the parameter's
    kind: str = OURS
    quick: bool = False

    @property
    def grads(self) -> torch.dtype:
        return self.grad or self.param

    @property
    def state(self) -> torch.dtype | str:
        if self.state_dtype is not None:
            return self.state_dtype
        return torch.float32 if self.way in (MASTER, SPLIT) else self.param

    @property
    def state_is_plain(self) -> bool:
        """Whether it is 16 bits rounded to nearest."""
        return self.way == PLAIN and self.state_dtype is None and self.param != torch.float32

    @property
    def name(self) -> str:
        words = [SHORT[self.param]] + ([self.way] if self.way != PLAIN else [])
        words += ["/", SHORT[self.state]] + (["nearest"] if self.state_is_plain and self.kind == OURS else [])
        words += [f"({SHORT[self.grad]} grads)"] if self.grad else []
        return " ".join([self.kind] * (self.kind != OURS) + words)

    @property
    def companion(self) -> float:
        """Bytes of what is kept beside the parameter."""
        return {MASTER: 4.0, SPLIT: 2.0, KAHAN: BYTES[self.param]}.get(self.way, 0.0)

    @property
    def updated(self) -> float:
        """Bytes that a step reads and writes."""
        return BYTES[self.param] + self.companion + 2 * BYTES[self.state]

    @property
    def stored(self) -> float:
        """Bytes of an element's weights, gradient and state."""
        return self.updated + BYTES[self.grads]

    @property
    def moved(self) -> float:
        """Bytes of an element that a step reads and writes."""
        return 2 * self.updated + BYTES[self.grads]

    @property
    def speed(self) -> Target | None:
        """How much faster than float32 Adam a step should be."""
        if self.kind != OURS:
            return None
        if self.param == torch.bfloat16 and self.state == torch.bfloat16 and not self.companion:
            return at_least(1.4)
        return at_least(1.2) if self.param == torch.float32 and self.state == "int8" else None

    def make(self, weights: Sequence[Tensor], grads: Sequence[Tensor]) -> Optimizer:
        """An optimizer of copies of these, which has made its first step; the gradients are shared if they may be."""
        params = [Parameter(weight.to(self.param, copy=True)) for weight in weights]
        for param, grad in zip(params, grads, strict=True):
            if self.grad is not None:
                param.grad_dtype = self.grad
            param.grad = grad
        options = {**WAYS[self.way], "state_dtype": self.state_dtype} if self.kind == OURS else {}
        optimizer = make_optimizer(self.kind, params, **options)
        optimizer.step()
        return optimizer


def combinations() -> Iterator[Combination]:
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    yield Combination(f32, PLAIN, None, "the measure of all others", quick=True)
    yield Combination(f32, PLAIN, bf16, "weights must stay float32, less state")
    yield Combination(f32, PLAIN, "int8", "weights must stay float32, least state", quick=True)
    yield Combination(f32, PLAIN, None, "for comparison", kind=FUSED)
    lost = "small updates are lost"
    for param in (bf16, f16):
        quick = param == bf16
        yield Combination(param, PLAIN, None, f"torch's bits; {lost}", quick=quick)
        yield Combination(param, PLAIN, f32, f"exact moments, but {lost}")
        yield Combination(param, PLAIN, bf16, f"unbiased moments, but {lost}")
        yield Combination(param, PLAIN, "int8", f"least state, but {lost}")
        yield Combination(param, PLAIN, None, f"for comparison; {lost}", kind=FUSED, quick=quick)
        yield Combination(param, MASTER, None, "others want the float32 weights")
        yield Combination(param, MASTER, bf16, "the same, less state")
        yield Combination(param, MASTER, "int8", "the same, least state")
        if param == bf16:  # float16 has no split
            yield Combination(param, SPLIT, None, "the first choice: float32's bits in less memory", quick=quick)
            yield Combination(param, SPLIT, bf16, "less state")
            yield Combination(param, SPLIT, "int8", "least memory with exact weights", quick=quick)
            yield Combination(param, SPLIT, None, "gradients accumulated in float32", grad=f32)
        yield Combination(param, STOCHASTIC, f32, "no masters, exact moments")
        if param == f16:
            yield Combination(param, STOCHASTIC, None, "no masters, float16 only")
        yield Combination(param, STOCHASTIC, bf16, "no masters, less state", quick=quick)
        yield Combination(param, STOCHASTIC, "int8", "least memory of all", quick=quick)
        yield Combination(param, KAHAN, f32, "nothing random, exact moments")
        if param == f16:
            yield Combination(param, KAHAN, None, "nothing random in the weights, float16 only")
        yield Combination(param, KAHAN, bf16, "nothing random in the weights, less state")
        yield Combination(param, KAHAN, "int8", "nothing random in the weights, least state")


COMBINATIONS = list(combinations())
BASE = COMBINATIONS[0]  # float32 Adam


def assert_stored(combination: Combination, optimizer: Optimizer) -> float:
    """The bytes a parameter that weights, gradients and state have, each storage once; raise unless as computed."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    tensors = [tensor for param in params for tensor in (param, param.grad, *optimizer.state[param].values())]
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    stored: float = sum(storages.values()) / sum(param.numel() for param in params)
    assert math.isclose(stored, combination.stored, rel_tol=1e-3), (
        f"{combination.name} stores {stored:.4f} bytes a parameter, expected {combination.stored:.4f}"
    )
    return stored


# --- correctness ---------------------------------------------------------------------------------------------------


def values(shapes: Sequence[tuple[int, int]], seed: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.empty(shape).normal_(generator=g) for shape in shapes]


def check(combination: Combination) -> None:
    """Raise AssertionError unless some steps have the bits of the portable target's, in one thread."""
    chosen, threads = _C.build_info()["cpu_capability"], torch.get_num_threads()
    weights, grads = values(SMALL, 0), [grad.to(combination.grads) for grad in values(SMALL, 1)]

    def stepped(capability: str, num_threads: int) -> Optimizer:
        _C.set_cpu_capability(capability)
        torch.set_num_threads(num_threads)
        try:
            optimizer = combination.make(weights, grads)
            for _ in range(2):
                optimizer.step()
        finally:
            _C.set_cpu_capability(chosen)
            torch.set_num_threads(threads)
        return optimizer

    ours, portable = stepped(chosen, threads), stepped("default", 1)
    for param, twin in zip(ours.param_groups[0]["params"], portable.param_groups[0]["params"], strict=True):
        assert_same_bits(param, twin, f"{combination.name}: the parameter")
        assert list(ours.state[param]) == list(portable.state[twin]), f"{combination.name}: the state's names"
        for name, value in portable.state[twin].items():
            assert_same_bits(ours.state[param][name], value, f"{combination.name}: {name}")


# --- steps in the caches -------------------------------------------------------------------------------------------

CACHED_SIZES = (MI // 16, MI // 4, MI)  # elements of a process: the small are slowed by calls, the large by the caches
CACHED = 8 * MI  # elements that each process updates in a turn


class Workers:
    """A process for each thread: threads would wait for one another, for the GIL or at the end of every short step."""

    def __init__(self) -> None:
        context = get_context("spawn")
        self._ends: list[Any] = []
        self._lowest: dict[tuple[Combination | None, int], float] = {}
        for _ in range(torch.get_num_threads()):
            here, there = context.Pipe()
            context.Process(target=work, args=(there,), daemon=True).start()
            there.close()
            self._ends.append(here)

    def steps(self, combination: Combination | None, size: int) -> Contender:
        """Without a combination: the arithmetic that is the bound."""

        def run() -> None:
            for end in self._ends:
                end.send((combination, size))
            took = max(end.recv() for end in self._ends)
            self._lowest[combination, size] = min(took, self._lowest.get((combination, size), math.inf))

        return Contender(run)

    def seconds(self, combination: Combination | None, size: int) -> float:
        """Of CPU, for an element in each process, in the fastest turn."""
        return self._lowest[combination, size] / CACHED

    def close(self) -> None:
        for end in self._ends:
            end.close()


def work(connection: Connection) -> None:
    """Make steps as asked, until nobody asks any more."""
    torch.set_num_threads(1)
    make = lru_cache(maxsize=4 * AT_ONCE)(make_cached)
    while True:
        try:
            combination, size = connection.recv()
        except EOFError:
            return
        run = make(combination, size)
        start = time.process_time()
        for _ in range(CACHED // size):
            run()
        connection.send(time.process_time() - start)


def make_cached(combination: Combination | None, size: int) -> Callable[[], object]:
    shapes = [(size // 4096, 4096)]
    if combination:
        return combination.make(values(shapes, 0), [grad.to(combination.grads) for grad in values(shapes, 1)]).step
    ones = torch.ones(size)
    arithmetic(ones)
    assert bool((ones == 1).all())
    return lambda: arithmetic(ones)


# --- the benchmark -------------------------------------------------------------------------------------------------

AT_ONCE = 5  # combinations that take turns, beside float32 Adam: more might not fit into memory
BOUNDS = TRAFFIC, ARITHMETIC = "traffic", "arithmetic"
OF_ITS_BOUND = "of its bound"
Rates = dict[str, list[float]]


def precision(quick: Quick) -> Iterator[Row]:
    """Adam of 64M elements by parameter dtype, masters or rounding, and state: bytes, bounds, speed."""
    chosen = [combination for combination in COMBINATIONS if combination.quick or not quick]
    for combination in chosen:
        if combination.kind == OURS:
            check(combination)
    weights, grads = values(LARGE, 0), values(LARGE, 1)
    base = BASE.make(weights, grads)
    others = [combination for combination in chosen if combination != BASE]
    floors: dict[str, Contender] = {}
    try:
        floor = Floor(base.param_groups[0]["params"], base)
        floors = floor.contenders()
    except Skipped as skipped:
        yield Row("traffic floor", note=f"skipped: {skipped}")
    rates: Rates = {"GB/s": [], "ns": []}
    workers = Workers()
    try:
        for begin in range(0, len(others), AT_ONCE):
            batch = ([BASE] if begin == 0 else []) + others[begin : begin + AT_ONCE]
            yield from compare(batch, base, weights, grads, floors, workers, rates)
    finally:
        workers.close()
    if floors:
        yield Row(f"traffic: the floor's {floor.bytes_per_element} bytes", Spread.of(rates["GB/s"]), "GB/s")
        yield Row("arithmetic: an element, all threads", Spread.of(rates["ns"]), "ns")


def compare(
    batch: Sequence[Combination],
    base: Optimizer,
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    floors: Mapping[str, Contender],
    workers: Workers,
    rates: Rates,
) -> Iterator[Row]:
    """Some combinations by turns with float32 Adam and both bounds; `rates` gets what the bounds are of."""
    numel = sum(weight.numel() for weight in weights)
    of_dtype = {torch.float32: grads}
    cached = {f"{ARITHMETIC} {size}": workers.steps(None, size) for size in CACHED_SIZES}
    contenders = {BASE.name: Contender(base.step), **floors}
    stored = {BASE.name: assert_stored(BASE, base)}
    for combination in batch:
        name, dtype = combination.name, combination.grads
        if combination != BASE:
            if dtype not in of_dtype:
                of_dtype[dtype] = [grad.to(dtype) for grad in grads]
            optimizer = combination.make(weights, of_dtype[dtype])
            stored[name] = assert_stored(combination, optimizer)
            contenders[name] = Contender(optimizer.step)
        if combination.kind == OURS:
            cached[f"{name} in cache"] = workers.steps(combination, CACHED_SIZES[1])
    samples = interleave(contenders | cached, rounds=4)
    each = numel / torch.get_num_threads()
    lowest = min(workers.seconds(None, size) for size in CACHED_SIZES) * each
    samples[ARITHMETIC] = dict.fromkeys(samples[BASE.name], lowest)
    rates["ns"].append(lowest / numel * 1e9)
    if floors:
        best = fastest(samples, list(floors))
        rates["GB/s"] += [BASE.moved * numel / value / 1e9 for value in samples[best].values()]
    for combination in batch:
        name = combination.name
        note = f"computed {combination.stored:.4f}; a step moves {combination.moved:.4g} (computed)"
        yield Row(f"{name}: bytes", Spread.of([stored[name]]), "B", note=note)
        if floors:
            samples[TRAFFIC] = scaled(samples, best, combination.moved / BASE.moved)
            in_cache = workers.seconds(combination, CACHED_SIZES[1]) * each if combination.kind == OURS else None
            yield of_bound(combination, samples, in_cache)
        if combination != BASE:
            yield ratio_row(f"{name}: faster than f32", samples, BASE.name, name, combination.speed)


def scaled(samples: Samples, name: str, factor: float) -> dict[int, float]:
    return {round_: value * factor for round_, value in samples[name].items()}


def of_bound(combination: Combination, samples: Samples, in_cache: float | None) -> Row:
    """The row of a step's time over the larger bound; its times tell which that is (`named`)."""
    name = combination.name
    binds = max(BOUNDS, key=lambda bound: seconds(samples, bound).median)
    target = at_most(1.15) if combination.kind == OURS else None
    row = ratio_row(f"{name}: {OF_ITS_BOUND}", samples, name, binds, target)
    row.times = {title: seconds(samples, key) for title, key in (("step", name), *((b, b) for b in BOUNDS))}
    if in_cache is not None:
        row.times["in cache"] = Spread.of([in_cache])
    return row


def named(name: str, medians: Mapping[str, float]) -> str:
    """A row's name, with the bound that is the larger by the medians of its times."""
    if not name.endswith(OF_ITS_BOUND):
        return name
    return name.replace(OF_ITS_BOUND, f"of {max(BOUNDS, key=medians.__getitem__)}")


BENCHMARKS: dict[str, Callable[[Quick], Iterator[Row]]] = {"precision": precision}


# --- the README's table --------------------------------------------------------------------------------------------


def markdown(medians: Mapping[str, float]) -> str:
    """The table of rows' medians, by their names."""
    long = {dtype: str(dtype).removeprefix("torch.") for dtype in SHORT}
    lines = [
        "| parameters | masters, rounding | state | bytes per parameter | bytes moved per step | of float32's time "
        "| when |",
        "|---|---|---|--:|--:|--:|---|",
    ]
    for combination in COMBINATIONS:
        name = combination.name
        if f"{name}: bytes" not in medians:
            continue
        param, state = long[combination.param], long[combination.state]
        param += f", {long[combination.grad]} gradients" if combination.grad else ""
        param += f" ({combination.kind})" if combination.kind != OURS else ""
        state += ", nearest" if combination.state_is_plain else ""
        way = "" if combination.way == PLAIN else combination.way
        time = 1 / medians.get(f"{name}: faster than f32", 1.0)
        stored, moved = (f"{value:.4g}" for value in (medians[f"{name}: bytes"], combination.moved))
        lines.append(f"| {param} | {way} | {state} | {stored} | {moved} | {time:.2f} | {combination.use} |")
    return "\n".join(lines)
