"""`make bench`: fusedopt on the CPU against its rivals and its targets.

Every benchmark first checks, on a small case of the same pattern, that the steps it is about to time are right: bit
for bit those of the tests' reference. If they are not, its rows are refused. All contenders of a benchmark share one
set of parameters, gradients and moments, and take turns (harness.interleave).
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import fusedopt
from fusedopt._config import _C

from . import harness
from .harness import Contender, Row, Skipped, Spread, at_least, at_most, interleave, ratio_row, seconds

sys.path.append(str(harness.ROOT / "tests"))
from reference import Hyper, assert_same_bits, low_precision_step, torch_loop_step

MI = 2**20
OURS, FUSED, FOREACH, LOOP = "fusedopt", "torch fused", "torch foreach", "torch loop"
TORCH_KINDS = {FUSED: {"fused": True}, FOREACH: {"foreach": True}, LOOP: {"foreach": False, "fused": False}}


def make_parameters(sizes: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Parameter]:
    """Separately allocated parameters, each with a gradient: standard normal, both."""
    g = torch.Generator().manual_seed(seed)

    def values(size: int) -> Tensor:
        return torch.empty(size, dtype=dtype).normal_(generator=g)

    params = [Parameter(values(size)) for size in sizes]
    for param in params:
        param.grad = values(param.numel())
    return params


def make_optimizers(params: list[Parameter], kinds: Sequence[str], **options: Any) -> dict[str, Optimizer]:
    """One optimizer of each kind, on the same parameters and the same moments; the step counts are each one's own."""
    ours = fusedopt.Adam(params, **options)
    ours.step()
    optimizers: dict[str, Optimizer] = {OURS: ours}
    for kind in kinds:
        if kind == OURS:
            continue
        optimizers[kind] = torch.optim.Adam(params, **TORCH_KINDS[kind], **options)
        for param in params:
            state = ours.state[param]
            optimizers[kind].state[param] = {**state, "step": state["step"].clone()}
    return optimizers


# --- where a step's gradients come from ----------------------------------------------------------------------------

Renew = Callable[[list[Parameter], list[Tensor]], None]


def kept(params: list[Parameter], grads: list[Tensor]) -> None:
    """The gradient tensors of the step before."""


def assigned(params: list[Parameter], grads: list[Tensor]) -> None:
    """New tensors, assigned to .grad."""
    for param, grad in zip(params, torch._foreach_mul(grads, 1.0), strict=True):
        param.grad = grad


def backward(params: list[Parameter], grads: list[Tensor]) -> None:
    """As in training: zero_grad() and backward."""
    for param in params:
        param.grad = None
    torch.autograd.backward(params, grads)


# --- correctness ---------------------------------------------------------------------------------------------------


def check(
    sizes: Sequence[int],
    dtype: torch.dtype = torch.float32,
    renew: Renew = kept,
    steps: int = 3,
    zero_after: int | None = None,
    **options: Any,
) -> None:
    """Raise AssertionError unless fusedopt's parameters and moments equal the reference's after some steps."""
    params = make_parameters(sizes, dtype)
    sources = [param.grad for param in params if param.grad is not None]
    ours = fusedopt.Adam(params, **options)
    twins = [Parameter(param.detach().clone()) for param in params]
    theirs = torch.optim.Adam(twins, foreach=False, fused=False, **options)
    low_precision = dtype in (torch.bfloat16, torch.float16)
    for step in range(1, steps + 1):
        for source in sources:
            source.mul_(0.0 if zero_after is not None and step > zero_after else 0.75)
        renew(params, sources)
        for twin, source in zip(twins, sources, strict=True):
            twin.grad = source.clone()
        ours.step()
        if low_precision:
            for twin in twins:
                transcribed_step(twin, theirs, step)
        else:
            torch_loop_step(theirs)
    for param, twin in zip(params, twins, strict=True):
        assert_same_bits(param, twin, "the parameter")
        for name, value in theirs.state[twin].items():
            assert_same_bits(ours.state[param][name], value, name)


def transcribed_step(param: Parameter, optimizer: Optimizer, step: int) -> None:
    """The reference for 16-bit dtypes, where torch's loop rounds every operation and we round what is stored."""
    state = optimizer.state[param]
    names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if optimizer.param_groups[0]["amsgrad"] else [])]
    for name in names:
        state.setdefault(name, torch.zeros_like(param))
    assert param.grad is not None
    moments = [state.get(name) for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")]
    new = low_precision_step(
        param.detach(), param.grad, *moments, hyper=Hyper.from_group(optimizer.param_groups[0]), step=step
    )
    with torch.no_grad():
        param.copy_(new.param)
        for name in names:
            state[name].copy_(getattr(new, name))


# --- the traffic floor ---------------------------------------------------------------------------------------------


class Floor:
    """benchmarks/floor.cpp on the streams of an optimizer's step."""

    def __init__(self, params: list[Parameter], optimizer: Optimizer) -> None:
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "floor.so"
            harness.compile_library(Path(__file__).with_name("floor.cpp"), library)
            self._run = ctypes.CDLL(str(library)).fusedopt_floor
        streams = [
            [param.grad, param, *(value for name, value in optimizer.state[param].items() if name != "step")]
            for param in params
        ]
        self.bytes_per_element = 4 * (2 * len(streams[0]) - 1)
        self.numel = sum(param.numel() for param in params)
        pointers = [stream.data_ptr() for row in streams for stream in row if stream is not None]
        self._streams = (ctypes.c_void_p * len(pointers))(*pointers)
        self._sizes = (ctypes.c_int64 * len(params))(*[param.numel() for param in params])
        self._counts = (ctypes.c_int64(len(params)), ctypes.c_int(len(streams[0])))

    def runner(self, chunk: int) -> Callable[[], object]:
        threads, mask = ctypes.c_int(torch.get_num_threads()), ctypes.c_uint32(0)
        return lambda: self._run(self._streams, self._sizes, *self._counts, ctypes.c_int64(chunk), threads, mask)

    def contenders(self) -> dict[str, Contender]:
        """The elements shared out beforehand, and taken in small pieces."""
        share = -(-self.numel // torch.get_num_threads())
        return {
            "floor (static)": Contender(self.runner(share)),
            "floor (dynamic)": Contender(self.runner(_C.chunk_size())),
        }


# --- the benchmarks ------------------------------------------------------------------------------------------------

Quick = bool
SMALL_QUARTERS = [50_000] * 3 + [49_999]  # enough for two threads


def step64m(quick: Quick) -> Iterator[Row]:
    """A step of 64M float32 in 4 tensors, against torch and against the same memory traffic."""
    for title, options in (("adam", {}), ("amsgrad", {"amsgrad": True})):
        check(SMALL_QUARTERS, **options)
        params = make_parameters([16 * MI] * 4)
        others = [FUSED] if quick or options else [FUSED, FOREACH, LOOP]
        optimizers = make_optimizers(params, others, **options)
        contenders = {name: Contender(optimizer.step) for name, optimizer in optimizers.items()}
        for name in {FOREACH, LOOP} & contenders.keys():
            contenders[name].every = 5
        floors: list[str] = []
        try:
            floor = Floor(params, optimizers[OURS])
            contenders |= floor.contenders()
            floors = list(floor.contenders())
        except Skipped as skipped:
            yield Row(f"{title}: traffic floor", note=f"skipped: {skipped}")
        samples = interleave(contenders, rounds=7 if quick else 25)
        if floors:
            best = min(floors, key=lambda name: seconds(samples, name).median)
            yield ratio_row(f"{title}: of the floor", samples, OURS, best, at_most(1.08))
            yield ratio_row(f"{title}: torch fused of the floor", samples, FUSED, best)
            rates = [floor.bytes_per_element * floor.numel / value / 1e9 for value in samples[best].values()]
            yield Row(f"{title}: the floor's {floor.bytes_per_element} bytes an element", Spread.of(rates), "GB/s")
        yield ratio_row(f"{title}: of torch fused", samples, OURS, FUSED, at_most(1.02))
        for name in others[1:]:
            yield ratio_row(f"{title}: faster than {name}", samples, name, OURS)


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
        samples = interleave(contenders, rounds=7 if quick else 21)
    finally:
        _C.set_cpu_capability(chosen)
    for name in usable[1:]:
        target = at_most(1.15) if (name, usable[0]) == ("avx2", "avx512") else None
        yield ratio_row(f"64M adam: {name} of {usable[0]}", samples, name, usable[0], target)


def compare_small(
    count: int, size: int, renew: Renew, calls: dict[str, int], rounds: int, slow_every: int = 10
) -> harness.Samples:
    check([size] * min(count, 1000), renew=renew)
    params = make_parameters([size] * count)
    sources = [param.grad for param in params if param.grad is not None]
    contenders = {
        name: Contender(
            optimizer.step,
            lambda: renew(params, sources),
            calls=calls[name],
            every=slow_every if name in (FOREACH, LOOP) else 1,
        )
        for name, optimizer in make_optimizers(params, list(calls)).items()
    }
    return interleave(contenders, rounds)


def small10(quick: Quick) -> Iterator[Row]:
    """10,000 tensors of 10 elements."""
    rounds = 8 if quick else 20
    for renew, target in ((kept, at_least(16)), (assigned, at_least(11)), (backward, at_least(11))):
        calls = {OURS: 5, FUSED: 2} | ({FOREACH: 1, LOOP: 1} if renew is kept and not quick else {})
        samples = compare_small(10_000, 10, renew, calls, rounds, slow_every=7)
        for name in list(calls)[1:]:
            title = f"gradients {renew.__name__}: faster than {name}"
            yield ratio_row(title, samples, name, OURS, target if name == FUSED else None)


def small1000(quick: Quick) -> Iterator[Row]:
    """1,000 tensors of 1,000 elements."""
    for renew in (kept, assigned):
        samples = compare_small(1000, 1000, renew, {OURS: 20, FUSED: 10}, rounds=10 if quick else 40)
        target = at_least(8) if renew is kept else None
        yield ratio_row(f"gradients {renew.__name__}: faster than torch fused", samples, FUSED, OURS, target)


def host(quick: Quick) -> Iterator[Row]:
    """All of step() for 1,000 tensors of 10 elements: hooks, profiler range and all."""
    for renew, target in ((kept, at_most(150)), (assigned, at_most(280)), (backward, None)):
        samples = compare_small(1000, 10, renew, {OURS: 20, FUSED: 10}, rounds=10 if quick else 40)
        title = f"1,000 tensors, gradients {renew.__name__}"
        ours = [value * 1e6 for value in samples[OURS].values()]
        yield Row(title, Spread.of(ours), "us", target, {FUSED: seconds(samples, FUSED)})


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
        samples = interleave(contenders, rounds=9 if quick else 25)
        yield ratio_row(f"{name} after {len(times)} zero gradients", samples, "after zeros", "ordinary", target)
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
        samples = interleave(contenders, rounds=7 if quick else 21)
        yield ratio_row(f"16M {str(dtype).removeprefix('torch.')}: of torch fused", samples, OURS, FUSED)


def import_time(quick: Quick) -> Iterator[Row]:
    """What importing fusedopt adds to importing torch, each in a fresh process."""
    code = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"
    times: dict[str, list[float]] = {"torch": [], "torch, fusedopt": []}
    for round_ in range(-1, 7 if quick else 11):
        for modules, found in times.items():
            command = [sys.executable, "-c", code.format(modules)]
            out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tempfile.gettempdir())
            if round_ >= 0:
                found.append(float(out.stdout))
    alone, both = times.values()
    value = Spread.of([(b - a) * 1e3 for a, b in zip(alone, both, strict=True)])
    spreads = {f"import {modules}": Spread.of(found) for modules, found in times.items()}
    yield Row("import fusedopt adds", value, "ms", at_most(50), spreads)


def build(quick: Quick) -> Iterator[Row]:
    """A wheel from a clean copy of the source, without and with the CUDA kernels."""
    if quick:
        raise Skipped("not in a quick run")
    if importlib.util.find_spec("pip") is None:
        raise Skipped("no pip in this environment")
    for cuda, title, most in (("off", "without CUDA", 30), ("on", "with CUDA", 60)):
        if cuda == "on" and not shutil.which("nvcc"):
            yield Row(f"a wheel {title}", note="skipped: no nvcc")
            continue
        with tempfile.TemporaryDirectory() as folder:
            source, wheels = Path(folder) / "source", Path(folder) / "wheels"
            ignored = shutil.ignore_patterns(".*", "build", "benchmarks", "*.egg-info", "*.so", "__pycache__")
            shutil.copytree(harness.ROOT, source, ignore=ignored)
            command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(wheels), "."]
            environment = {**os.environ, "FUSEDOPT_CUDA": cuda}
            cpu, start = harness.children_cpu(), time.perf_counter()
            built = subprocess.run(command, cwd=source, capture_output=True, text=True, env=environment)
            took, cpu = time.perf_counter() - start, harness.children_cpu() - cpu
            if built.returncode:
                raise Skipped(f"pip wheel failed: {(built.stderr or built.stdout).strip().splitlines()[-1]}")
            (wheel,) = wheels.glob("*.whl")
            size = wheel.stat().st_size / 1e6
        yield Row(
            f"pip wheel {title} (once, isolated)", Spread.of([took]), "s", at_most(most), {"CPU": Spread.of([cpu])}
        )
        yield Row(f"the wheel's size {title}", Spread.of([size]), "MB", at_most(3))


BENCHMARKS: dict[str, Callable[[Quick], Iterator[Row]]] = {
    "step64m": step64m,
    "avx2": avx2,
    "small10": small10,
    "small1000": small1000,
    "host": host,
    "zeros": zeros,
    "dtypes": dtypes,
    "import": import_time,
    "build": build,
}


def run(name: str, quick: Quick) -> list[Row]:
    """Run one benchmark, printing its rows as they come."""
    rows: list[Row] = []
    try:
        for row in BENCHMARKS[name](quick):
            rows.append(row)
            harness.print_rows(name, [row])
    except (Skipped, AssertionError) as reason:
        kind = "skipped" if isinstance(reason, Skipped) else "REFUSED, wrong result"
        rows.append(Row("", note=f"{kind}: {reason}"))
        harness.print_rows(name, rows[-1:])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats, and no build: under 90 seconds")
    parser.add_argument("--only", action="append", choices=BENCHMARKS, help="this benchmark (may be repeated)")
    parser.add_argument("--json", type=Path, help="where to write the results (default: results/, a full run only)")
    args = parser.parse_args()

    facts = harness.machine()
    print(f"{facts['processor']}, {facts['cores']} cores, {facts['threads']} threads; ", end="")
    print(f"torch {facts['torch']}, fusedopt {facts['fusedopt']} ({facts['compiler']})\n")
    harness.print_header()
    company, begin = harness.Company(), time.monotonic()
    results: dict[str, list[Row]] = {}
    took: dict[str, float] = {}
    for name in args.only or BENCHMARKS:
        start = time.monotonic()
        # In a process of its own: the heap that earlier benchmarks scattered would slow later ones by a tenth.
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            results[name] = process.submit(run, name, args.quick).result()
        took[name] = round(time.monotonic() - start, 1)

    facts |= {
        "seconds": round(time.monotonic() - begin),
        "seconds_by_benchmark": took,
        "used_by_others": round(company.share(), 3),
    }
    verdicts = [row.verdict for rows in results.values() for row in rows]
    print(f"\n{verdicts.count('meets')} targets met, {verdicts.count('MISSES')} missed; {facts['seconds']} s, ", end="")
    print(f"{facts['used_by_others']:.0%} of the machine used by others meanwhile")
    print("seconds: " + ", ".join(f"{name} {value:g}" for name, value in took.items()))
    path = args.json or (None if args.quick or args.only else harness.default_path())
    if path:
        harness.write_json(path, facts, results)
        print(f"written: {path}")


if __name__ == "__main__":
    main()
