"""`make bench`: fusedopt on the CPU against its rivals and its targets.

Every benchmark first checks, on a small case of the same pattern, that the steps it is about to time are right: bit
for bit those of the tests' reference. If they are not, its rows are refused. All contenders of a benchmark share one
set of parameters, gradients and moments, and take turns (harness.interleave).
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import fusedopt
from fusedopt._config import _C

from . import harness, phase, precision, sharded
from .harness import (
    FIRST_STEPS,
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
    make_optimizer,
    make_optimizers,
    make_parameters,
    ratio_row,
    seconds,
)

sys.path.append(str(harness.ROOT / "tests"))
from reference import assert_same_bits, torch_loop_step, transcription

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
    steps: int | None = None,
    zero_after: int | None = None,
    algorithm: str = "Adam",
    **options: Any,
) -> None:
    """Raise AssertionError unless fusedopt's parameters and state equal the reference's after some steps."""
    params = make_parameters(sizes, dtype)
    sources = [param.grad for param in params if param.grad is not None]
    ours = make_optimizer(OURS, params, algorithm, **options)
    twins = [Parameter(param.detach().clone()) for param in params]
    theirs = make_optimizer(LOOP, twins, algorithm, **options)
    low_precision = dtype in (torch.bfloat16, torch.float16)
    for step in range(1, (steps or FIRST_STEPS[algorithm] + 2) + 1):
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
    formula, state = transcription(optimizer), optimizer.state[param]
    assert param.grad is not None
    before = {**formula.first_state(param), **state}
    new, after = formula.step(param.detach(), param.grad, before, step)
    state |= {"step": torch.tensor(float(step)), **after}
    with torch.no_grad():
        param.copy_(new)


# --- the benchmarks ------------------------------------------------------------------------------------------------


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
        best = fastest(samples, floors)
        yield ratio_row(f"{title}: of the floor", samples, OURS, best, at_most(1.08))
        if FUSED in rivals:
            yield ratio_row(f"{title}: torch fused of the floor", samples, FUSED, best)
        yield Row(f"{title}: the floor's {floor.bytes_per_element} bytes an element", floor.rate(samples, best), "GB/s")
    for name in rivals:
        if name == FUSED:
            yield ratio_row(f"{title}: of torch fused", samples, OURS, FUSED, target)
        else:
            yield ratio_row(f"{title}: faster than {name}", samples, name, OURS, target if name == rivals[0] else None)


def step64m(quick: Quick) -> Iterator[Row]:
    """A step of 64M float32 in 4 tensors, against torch and against the same memory traffic."""
    yield from large("adam", "Adam", [FUSED, FOREACH, LOOP], at_most(1.02), quick)
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
        samples = interleave(contenders, rounds=7 if quick else 21)
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
    slow_every: int = 10,
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


def radam(quick: Quick) -> Iterator[Row]:
    """RAdam, rectified: 64M elements, and 10,000 tensors of 10."""
    yield from large("64M", "RAdam", [FOREACH, LOOP], at_least(4.5), quick)
    calls, rounds = {OURS: 5, FOREACH: 1}, 4 if quick else 15
    samples = compare_small(10_000, 10, kept, calls, rounds, slow_every=1, algorithm="RAdam")
    yield ratio_row("10,000 x 10: faster than torch foreach", samples, FOREACH, OURS, at_least(50))


def adagrad(quick: Quick) -> Iterator[Row]:
    """Adagrad with dense gradients: the same."""
    yield from large("64M", "Adagrad", [FUSED, FOREACH, LOOP], at_most(1.02), quick)
    calls = {OURS: 5, FUSED: 2} | ({} if quick else {FOREACH: 1})
    samples = compare_small(10_000, 10, kept, calls, 8 if quick else 20, slow_every=5, algorithm="Adagrad")
    for name in list(calls)[1:]:
        yield ratio_row(f"10,000 x 10: faster than {name}", samples, name, OURS)


# --- sparse gradients ----------------------------------------------------------------------------------------------

LOOKUPS, WIDTH = 4096, 64  # rows of an embedding that one step looks up, and the elements of a row
Draw = Callable[[int, torch.Generator], Tensor]


def distinct(rows: int, g: torch.Generator) -> Tensor:
    """A row from each of equal parts of the table, a quarter of them twice; in no order."""
    part = rows // LOOKUPS
    once = torch.arange(LOOKUPS) * part + torch.randint(part, (LOOKUPS,), generator=g)
    twice = once[torch.randperm(LOOKUPS, generator=g)[: LOOKUPS // 4]]
    found = torch.cat([once, twice])
    return found[torch.randperm(found.numel(), generator=g)]


def uniform(rows: int, g: torch.Generator) -> Tensor:
    return torch.randint(rows, (LOOKUPS,), generator=g)


def zipf(rows: int, g: torch.Generator) -> Tensor:
    """As words come up in a text: many rows three times and more."""
    frequency = torch.arange(1, rows + 1, dtype=torch.float64) ** -1.1
    return torch.multinomial(frequency, LOOKUPS, replacement=True, generator=g)


class Table:
    """An embedding, and sparse gradients for so many steps that their rows do not stay in the caches."""

    def __init__(self, rows: int, draw: Draw, batches: int = 50) -> None:
        g = torch.Generator().manual_seed(0)
        self.param = Parameter(torch.ones(rows, WIDTH))
        indices = [draw(rows, g)[None] for _ in range(batches)]
        self._indices = itertools.cycle(indices)
        self._values = torch.randn(indices[0].numel(), WIDTH, generator=g)
        self.renew()

    def renew(self) -> None:
        self.param.grad = torch.sparse_coo_tensor(next(self._indices), self._values, self.param.shape)

    def copy_rows(self, streams: Sequence[Tensor]) -> None:
        """Read the rows of the gradient and write them back."""
        assert self.param.grad is not None
        indices = self.param.grad._indices()[0]
        for stream in streams:
            stream.index_copy_(0, indices, stream.index_select(0, indices))


def check_sparse(draw: Draw) -> None:
    """Raise AssertionError unless steps on a small table give torch's bits."""
    ours = Table(5 * LOOKUPS, draw)
    twin = Parameter(ours.param.detach().clone())
    optimizer, theirs = make_optimizer(OURS, [ours.param], "Adagrad"), make_optimizer(LOOP, [twin], "Adagrad")
    for _ in range(3):
        ours.renew()
        assert ours.param.grad is not None
        twin.grad = ours.param.grad.clone()
        optimizer.step()
        torch_loop_step(theirs)
    assert_same_bits(ours.param, twin, "the parameter")
    for name, value in theirs.state[twin].items():
        assert_same_bits(optimizer.state[ours.param][name], value, name)


def available_gib() -> float:
    found = re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())
    return int(found[1]) / MI if found else 0.0


def sparse(quick: Quick) -> Iterator[Row]:
    """Adagrad on an embedding, 4,096 of whose rows of 64 are looked up: sparse gradients, not coalesced."""
    torch.sparse.check_sparse_tensor_invariants.disable()  # explicitly: else torch's step warns
    rounds = 10 if quick else 40
    for draw, target in ((distinct, at_least(4)), (uniform, None), (zipf, None)):
        check_sparse(draw)
        table = Table(MI, draw)
        contenders = {
            name: Contender(optimizer.step, table.renew, calls=10 if name == OURS else 3)
            for name, optimizer in make_optimizers([table.param], [LOOP], "Adagrad").items()
        }
        samples = interleave(contenders, rounds)
        yield ratio_row(f"1M rows, {draw.__name__}: faster than torch loop", samples, LOOP, OURS, target)

    # Rows that lie further apart take the processor longer to reach, whoever asks: a plain copy of them is beside it.
    large_rows = 4 if available_gib() > 6 else 2
    contenders = {}
    for rows in (1, large_rows):
        table = Table(rows * MI, distinct)
        (optimizer,) = make_optimizers([table.param], [], "Adagrad").values()
        contenders[f"{rows}M rows"] = Contender(optimizer.step, table.renew, calls=10)
        streams = [table.param.detach(), optimizer.state[table.param]["sum"]]
        contenders[f"{rows}M rows copied"] = Contender(partial(table.copy_rows, streams), table.renew, calls=10)
    samples = interleave(contenders, rounds)
    few, few_copied, many, many_copied = contenders
    yield ratio_row(f"{many}: of {few}", samples, many, few)
    yield ratio_row(f"{many_copied}: of {few_copied}", samples, many_copied, few_copied)
    slower = {key: value - samples[few_copied][key] for key, value in samples[many_copied].items()}
    samples["as many, as far apart"] = {key: value + slower[key] for key, value in samples[few].items()}
    yield ratio_row(f"{many}: of {few}, as far apart", samples, many, "as many, as far apart", at_most(1.15))


# --- installing ----------------------------------------------------------------------------------------------------


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
    "radam": radam,
    "adagrad": adagrad,
    "sparse": sparse,
    **phase.BENCHMARKS,
    **precision.BENCHMARKS,
    **sharded.BENCHMARKS,
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
    parser.add_argument("--quick", action="store_true", help="fewer repeats, and no build: two minutes")
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
