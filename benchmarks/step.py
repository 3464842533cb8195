"""A step of each algorithm, against torch's and against the memory traffic that it takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import fusedopt
from fusedopt._config import _C

from . import harness
from .checks import Renew, assigned, backward, check, kept
from .harness import (
    COMPILED,
    FOREACH,
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
    Spread,
    Target,
    at_least,
    at_most,
    fastest,
    interleave,
    make_optimizers,
    make_parameters,
    ratio_row,
    seconds,
)


def large(
    title: str, algorithm: str, rivals: Sequence[str], target: Target, quick: Quick, **options: Any
) -> Iterator[Row]:
    """64M elements by one algorithm; the target is against the first rival, the only one in a quick run."""
    check(SMALL_QUARTERS, algorithm=algorithm, **options)
    params = make_parameters([16 * MI] * 4)
    rivals = rivals[:1] if quick else rivals
    optimizers = make_optimizers(params, rivals, algorithm, **options)
    contenders = {name: Contender(optimizer.step) for name, optimizer in optimizers.items()}
    for name in rivals[1:]:
        contenders[name].every = 4
    if COMPILED in contenders:
        contenders[COMPILED].run = torch.compile(optimizers[COMPILED].step)
        try:
            contenders[COMPILED].run()  # compiles
        except Exception as error:  # whatever a compiler may raise
            yield Row(f"{title}: {COMPILED}", note=f"skipped: {type(error).__name__}: {error}".split("\n")[0])
            del contenders[COMPILED]
    floors: list[str] = []
    try:
        floor = Floor(params, optimizers[OURS])
        contenders |= floor.contenders()
        floors = list(floor.contenders())
    except Skipped as skipped:
        yield Row(f"{title}: traffic floor", note=f"skipped: {skipped}")
    samples = interleave(contenders, rounds=8)
    if floors:
        samples["floor"] = samples[fastest(samples, floors)]
        yield ratio_row(f"{title}: of the floor", samples, OURS, "floor", at_most(1.08))
        if FUSED in rivals:
            yield ratio_row(f"{title}: torch fused of the floor", samples, FUSED, "floor")
        name = f"{title}: the floor's {floor.bytes_per_element} bytes an element"
        yield Row(name, floor.rate(samples, "floor"), "GB/s")
    for name in filter(contenders.get, rivals):
        if name == FUSED:
            yield ratio_row(f"{title}: of torch fused", samples, OURS, FUSED, target)
        else:
            yield ratio_row(f"{title}: faster than {name}", samples, name, OURS, target if name == rivals[0] else None)


def step64m(quick: Quick) -> Iterator[Row]:
    """A step of 64M float32 in 4 tensors, against torch and against the same memory traffic."""
    yield from large("adam", "Adam", [FUSED, FOREACH, LOOP, COMPILED], at_most(1.02), quick)
    yield from large("amsgrad", "Adam", [FUSED], at_most(1.02), quick, amsgrad=True)


def avx2(quick: Quick) -> Iterator[Row]:
    """The same with the narrower instruction sets."""
    usable = [name for name in ("avx512", "avx2", "default") if name in _C.build_info()["cpu_usable"]]
    if len(usable) < 2:
        raise Skipped(f"this machine has {', '.join(usable)} only")
    chosen = _C.build_info()["cpu_capability"]
    try:
        for capability in usable:
            _C.set_cpu_capability(capability)
            check(SMALL_QUARTERS)
        optimizer = make_optimizers(make_parameters([16 * MI] * 4), [OURS])[OURS]

        def prepare(capability: str) -> Callable[[], object]:
            return lambda: _C.set_cpu_capability(capability)

        contenders = {name: Contender(optimizer.step, prepare(name)) for name in usable}
        if "default" in usable[1:]:
            contenders["default"].every = 3  # slow, and without a target
        samples = interleave(contenders, rounds=7)
    finally:
        _C.set_cpu_capability(chosen)
    for name in usable[1:]:
        target = at_most(1.15) if (name, usable[0]) == ("avx2", "avx512") else None
        yield ratio_row(f"64M adam: {name} of {usable[0]}", samples, name, usable[0], target)


def compare_small(
    count: int,
    size: int,
    renew: Renew,
    calls: dict[str, int],
    rounds: int,
    slow_every: int = 1,
    algorithm: str = "Adam",
) -> harness.Samples:
    check([size] * min(count, 1000), renew=renew, algorithm=algorithm)
    params = make_parameters([size] * count)
    sources = [param.grad for param in params if param.grad is not None]
    contenders = {
        name: Contender(
            optimizer.step,
            lambda: renew(params, sources),
            calls=calls[name],
            every=slow_every if name in (FOREACH, LOOP) else 1,
        )
        for name, optimizer in make_optimizers(params, list(calls), algorithm).items()
    }
    return interleave(contenders, rounds)


def small10(quick: Quick) -> Iterator[Row]:
    """10,000 tensors of 10 elements."""
    for renew, target in ((kept, at_least(16)), (assigned, at_least(11)), (backward, at_least(11))):
        calls = {OURS: 5, FUSED: 2} | ({FOREACH: 1, LOOP: 1} if renew is kept and not quick else {})
        samples = compare_small(10_000, 10, renew, calls, rounds=5, slow_every=3)
        for name in list(calls)[1:]:
            title = f"gradients {renew.__name__}: faster than {name}"
            yield ratio_row(title, samples, name, OURS, target if name == FUSED else None)


def small1000(quick: Quick) -> Iterator[Row]:
    """1,000 tensors of 1,000 elements."""
    for renew in (kept, assigned):
        samples = compare_small(1000, 1000, renew, {OURS: 20, FUSED: 10}, rounds=10)
        target = at_least(8) if renew is kept else None
        yield ratio_row(f"gradients {renew.__name__}: faster than torch fused", samples, FUSED, OURS, target)


def host(quick: Quick) -> Iterator[Row]:
    """All of step() for 1,000 tensors of 10 elements: hooks, profiler range and all."""
    for renew, target in ((kept, at_most(150)), (assigned, at_most(280)), (backward, None)):
        samples = compare_small(1000, 10, renew, {OURS: 20, FUSED: 10}, rounds=10)
        title = f"1,000 tensors, gradients {renew.__name__}"
        ours = [value * 1e6 for value in samples[OURS].values()]
        yield Row(title, Spread.of(ours), "us", target, {FUSED: seconds(samples, FUSED)})
        yield ratio_row(f"{title}: faster than torch fused", samples, FUSED, OURS)


def zeros(quick: Quick) -> Iterator[Row]:
    """Steps after long runs of zero gradients, when moments without a flush become subnormal, against ordinary ones."""
    check([1000], steps=1200, zero_after=10)
    block = 20
    for name, wanted, target in ((OURS, 2000, at_most(1.2)), (FUSED, 1000, None)):
        contenders: dict[str, Contender] = {}
        times: list[float] = []
        for when in ("ordinary", "after zeros"):
            (param,) = make_parameters([MI])
            optimizer = fusedopt.Adam([param]) if name == OURS else torch.optim.Adam([param], fused=True)
            for _ in range(10):
                optimizer.step()
            contenders[when] = Contender(optimizer.step, calls=5)
        # The second has a long run of zero gradients: exp_avg shrinks by a tenth a step, to subnormals after some 830.
        assert param.grad is not None
        param.grad.zero_()
        stop = time.monotonic() + 20
        while len(times) < wanted and time.monotonic() < stop:
            start = time.perf_counter()
            optimizer.step()
            times.append(time.perf_counter() - start)
        # Of some steps in a row the fastest, so that a single interruption does not count.
        worst = max(min(times[at : at + block]) for at in range(0, len(times) - block + 1, block))
        samples = interleave(contenders, rounds=8)
        yield ratio_row(f"{name} after zero gradients", samples, "after zeros", "ordinary", target)
        ordinary = seconds(samples, "ordinary")
        yield Row(
            f"{name}: the slowest {block} steps on the way",
            Spread.of([worst / ordinary.low]),
            "x",
            None,
            {"there": Spread.of([worst]), "ordinary": ordinary},
        )


def dtypes(quick: Quick) -> Iterator[Row]:
    """16M elements of the other dtypes."""
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        check([5000] * 3 + [4999] if dtype == torch.float64 else SMALL_QUARTERS, dtype)
        optimizers = make_optimizers(make_parameters([4 * MI] * 4, dtype), [FUSED])
        contenders = {name: Contender(optimizer.step) for name, optimizer in optimizers.items()}
        samples = interleave(contenders, rounds=7)
        yield ratio_row(f"16M {str(dtype).removeprefix('torch.')}: of torch fused", samples, OURS, FUSED)


def radam(quick: Quick) -> Iterator[Row]:
    """RAdam, rectified: 64M elements, and 10,000 tensors of 10."""
    yield from large("64M", "RAdam", [FOREACH, LOOP], at_least(4.5), quick)
    calls = {OURS: 5, FOREACH: 1}
    samples = compare_small(10_000, 10, kept, calls, rounds=5, algorithm="RAdam")
    yield ratio_row("10,000 x 10: faster than torch foreach", samples, FOREACH, OURS, at_least(50))


def adagrad(quick: Quick) -> Iterator[Row]:
    """Adagrad with dense gradients: the same."""
    yield from large("64M", "Adagrad", [FUSED, FOREACH, LOOP], at_most(1.02), quick)
    calls = {OURS: 5, FUSED: 2} | ({} if quick else {FOREACH: 1})
    samples = compare_small(10_000, 10, kept, calls, rounds=7, slow_every=2, algorithm="Adagrad")
    for name in list(calls)[1:]:
        yield ratio_row(f"10,000 x 10: faster than {name}", samples, name, OURS)


BENCHMARKS = {
    "step64m": step64m,
    "avx2": avx2,
    "small10": small10,
    "small1000": small1000,
    "host": host,
    "zeros": zeros,
    "dtypes": dtypes,
    "radam": radam,
    "adagrad": adagrad,
}
