"""What every benchmark shares: contenders, interleaved timing, ratios, the traffic floor, the table and the JSON."""

from __future__ import annotations

import ctypes
import functools
import gc
import inspect
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import fusedopt
from fusedopt._config import _C

ROOT = Path(__file__).resolve().parent.parent


class Skipped(Exception):
    """This machine lacks what a benchmark needs; the message says what."""


@dataclass(frozen=True)
class Spread:
    """A median, and the first and the last decile; of several processes those that lie furthest apart."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        deciles = statistics.quantiles(values, n=10, method="inclusive")
        return cls(deciles[4], deciles[0], deciles[8])

    @classmethod
    def over(cls, spreads: Sequence[Spread]) -> Spread:
        medians, lows, highs = ([getattr(each, part) for each in spreads] for part in ("median", "low", "high"))
        return cls(statistics.median(medians), min(lows), max(highs))


@dataclass(frozen=True)
class Target:
    """A bound on a row's median: at most, or at least."""

    bound: float
    at_least: bool = False

    def met_by(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.bound:g}"


def at_most(bound: float) -> Target:
    return Target(bound)


def at_least(bound: float) -> Target:
    return Target(bound, at_least=True)


@dataclass
class Row:
    """One line of the table: a quantity, and where there is one, its target; or a note instead of both."""

    name: str
    value: Spread | None = None
    unit: str = "x"  # x: a ratio of times
    target: Target | None = None
    times: dict[str, Spread] = field(default_factory=dict)  # the seconds that a ratio is of
    note: str = ""
    at: float | None = None  # of a row that is a point of a curve: its place, and `times` are all that were measured

    @property
    def verdict(self) -> str:
        if self.value is None or self.target is None:
            return ""
        return "meets" if self.target.met_by(self.value.median) else "MISSES"

    @classmethod
    def over(cls, rows: Sequence[Row]) -> Row:
        """The same row of several processes; where one of them could not measure it, that is the row."""
        for row in rows:
            if row.value is None:
                return row
        times = {name: Spread.over([row.times[name] for row in rows]) for name in rows[0].times}
        return replace(rows[0], value=Spread.over([row.value for row in rows if row.value]), times=times)


@dataclass
class Contender:
    """`run` is timed; `prepare` goes before each run, untimed.

    A turn is `calls` runs and gives one sample, their mean. A contender with `every` = n takes part in each n-th round,
    and in all that warm up.
    """

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    calls: int = 1
    every: int = 1


Samples = dict[str, dict[int, float]]  # by contender, by round: seconds


def interleave(contenders: Mapping[str, Contender], rounds: int, warmup: int = 1) -> Samples:
    """Time all contenders by turns, A B C, B C A, ..., so that drift and noise hit all alike."""
    names = list(contenders)
    samples: Samples = {name: {} for name in names}
    timers = {name: timeit.Timer(contender.run, contender.prepare) for name, contender in contenders.items()}
    gc.collect()
    gc.disable()
    try:
        for round_ in range(-warmup, rounds):
            for at in range(len(names)):
                name = names[(round_ + at) % len(names)]
                contender = contenders[name]
                if round_ >= 0 and round_ % contender.every:
                    continue
                total = sum(timers[name].timeit(1) for _ in range(contender.calls))
                if round_ >= 0:
                    samples[name][round_] = total / contender.calls
    finally:
        gc.enable()
    return samples


def seconds(samples: Samples, name: str) -> Spread:
    return Spread.of(list(samples[name].values()))


def fastest(samples: Samples, names: Sequence[str]) -> str:
    return min(names, key=lambda name: seconds(samples, name).median)


def ratio_row(title: str, samples: Samples, top: str, bottom: str, target: Target | None = None) -> Row:
    """The row of time `top` over time `bottom`, paired by round."""
    common = [round_ for round_ in samples[top] if round_ in samples[bottom]]
    value = Spread.of([samples[top][round_] / samples[bottom][round_] for round_ in common])
    return Row(title, value, "x", target, {name: seconds(samples, name) for name in (top, bottom)})


def point_row(title: str, samples: Samples, at: float) -> Row:
    """A point of a curve: how many times as long as ours torch's fused step takes, and everyone's time."""
    times = {name: seconds(samples, name) for name in samples}
    return replace(ratio_row(title, samples, FUSED, OURS), times=times, at=at)


# --- what is compared ----------------------------------------------------------------------------------------------

Quick = bool
MI = 2**20
SMALL_QUARTERS = [50_000] * 3 + [49_999]  # enough for two threads
OURS, FUSED, FOREACH, LOOP = "fusedopt", "torch fused", "torch foreach", "torch loop"
COMPILED = "torch compiled"  # its step is to be given to torch.compile
# The module that has the class, and the options that choose.
KINDS: dict[str, tuple[Any, dict[str, bool]]] = {
    OURS: (fusedopt, {}),
    FUSED: (torch.optim, {"fused": True}),
    FOREACH: (torch.optim, {"foreach": True}),
    LOOP: (torch.optim, {"foreach": False}),
    COMPILED: (torch.optim, {"foreach": True}),
}
FIRST_STEPS = {"Adam": 1, "RAdam": 6, "Adagrad": 1}  # untimed: RAdam's sixth is the first that is rectified


def make_parameters(
    sizes: Sequence[int | tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Parameter]:
    """Separately allocated parameters, each with a gradient: standard normal, both."""
    g = torch.Generator().manual_seed(seed)

    def values(size: int | tuple[int, ...]) -> Tensor:
        return torch.empty(size, dtype=dtype).normal_(generator=g)

    params = [Parameter(values(size)) for size in sizes]
    for param in params:
        param.grad = values(param.shape)
    return params


def available(kind: str, algorithm: str) -> bool:
    """Whether the algorithm has this kind: torch's RAdam has no fused one."""
    module, chosen = KINDS[kind]
    return chosen.keys() <= inspect.signature(getattr(module, algorithm)).parameters.keys()


def make_optimizer(kind: str, params: Sequence[Parameter], algorithm: str = "Adam", **options: Any) -> Optimizer:
    module, chosen = KINDS[kind]
    return getattr(module, algorithm)(params, **chosen, **options)


def make_optimizers(
    params: list[Parameter], kinds: Sequence[str], algorithm: str = "Adam", **options: Any
) -> dict[str, Optimizer]:
    """One optimizer of each available kind, on the same parameters and state; the step counts are each one's own."""
    ours = make_optimizer(OURS, params, algorithm, **options)
    for _ in range(FIRST_STEPS[algorithm]):
        ours.step()
    optimizers = {OURS: ours}
    for kind in kinds:
        if kind == OURS or not available(kind, algorithm):
            continue
        optimizers[kind] = share_state(ours, make_optimizer(kind, params, algorithm, **options))
    return optimizers


def share_state(source: Optimizer, made: Optimizer) -> Optimizer:
    """Give an optimizer the state of another on the same parameters; the step counts are its own."""
    on_device = any(made.defaults.get(option) for option in ("fused", "capturable", "skip_nonfinite"))
    for param, state in source.state.items():
        step = state["step"].to(param.device if on_device else "cpu", copy=True)
        made.state[param] = {**state, "step": step}
    return made


# --- the traffic floor ---------------------------------------------------------------------------------------------


@functools.cache
def compiled_floor() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "floor.so"
        compile_library(Path(__file__).with_name("floor.cpp"), library)
        return ctypes.CDLL(str(library))


def arithmetic(values: Tensor) -> None:
    """A square root and two divisions of each float32, in place: ones stay ones."""
    assert values.dtype == torch.float32 and values.is_contiguous()
    count, one = ctypes.c_int64(values.numel()), ctypes.c_float(1)
    compiled_floor().fusedopt_arithmetic(ctypes.c_void_p(values.data_ptr()), count, one, one)


class Floor:
    """benchmarks/floor.cpp on the streams of an optimizer's step; without an optimizer, on the gradients alone."""

    def __init__(self, params: list[Parameter], optimizer: Optimizer | None = None) -> None:
        self._run = compiled_floor().fusedopt_floor
        streams: list[list[Tensor | None]] = [[param.grad] for param in params]
        if optimizer is not None:
            for row, param in zip(streams, params, strict=True):
                row += [param, *(value for name, value in optimizer.state[param].items() if name != "step")]
        self.bytes_per_element = 4 * (2 * len(streams[0]) - 1)
        self.numel = sum(param.numel() for param in params)
        pointers = [stream.data_ptr() for row in streams for stream in row if stream is not None]
        self._streams = (ctypes.c_void_p * len(pointers))(*pointers)
        self._sizes = (ctypes.c_int64 * len(params))(*[param.numel() for param in params])
        self._counts = (ctypes.c_int64(len(params)), ctypes.c_int(len(streams[0])))

    def runner(self, chunk: int) -> Callable[[], object]:
        threads, mask = ctypes.c_int(torch.get_num_threads()), ctypes.c_uint32(0)
        return lambda: self._run(self._streams, self._sizes, *self._counts, ctypes.c_int64(chunk), threads, mask)

    def contenders(self, name: str = "floor") -> dict[str, Contender]:
        """The elements shared out beforehand, and taken in small pieces."""
        share = -(-self.numel // torch.get_num_threads())
        return {
            f"{name} (static)": Contender(self.runner(share)),
            f"{name} (dynamic)": Contender(self.runner(_C.chunk_size())),
        }

    def rate(self, samples: Samples, name: str) -> Spread:
        """GB/s."""
        return Spread.of([self.bytes_per_element * self.numel / value / 1e9 for value in samples[name].values()])


# --- where it ran --------------------------------------------------------------------------------------------------


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the working tree, read from its files; None outside a repository."""
    git = ROOT / ".git"
    try:
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        ref = git / head.removeprefix("ref: ")
        if ref.exists():
            return ref.read_text().strip()
        packed = (git / "packed-refs").read_text().splitlines()
        return next(line.split()[0] for line in packed if line.endswith(" " + head.removeprefix("ref: ")))
    except (OSError, StopIteration):
        return None


def machine() -> dict[str, Any]:
    memory = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    info = _C.build_info()
    return {
        "machine": platform.machine(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(int(memory[1]) / 2**20, 1) if memory else None,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "fusedopt": fusedopt.__version__,
        "fusedopt_cpu_capability": info["cpu_capability"],
        "compiler": info["compiler"],
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def available_memory() -> int:
    """Bytes that could be had without swapping; 0 where nobody says."""
    found = re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())
    return int(found[1]) * 1024 if found else 0


def children_cpu() -> float:
    """Seconds of CPU that ended child processes have used."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


class Company:
    """How much of the machine other processes took meanwhile: figures from a busy machine are not worth much."""

    def __init__(self) -> None:
        self._begin = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        idle = fields[3] + fields[4]
        usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        own = sum(usage.ru_utime + usage.ru_stime for usage in usages)
        return (sum(fields) - idle) / os.sysconf("SC_CLK_TCK"), own, time.monotonic()

    def share(self) -> float:
        """Of all cores' time since this was made, the part that others used."""
        busy, own, wall = (now - then for now, then in zip(self._now(), self._begin, strict=True))
        return max(0.0, (busy - own) / (wall * (os.cpu_count() or 1)))


# --- a compiler for small helpers ----------------------------------------------------------------------------------


def compile_library(source: Path, target: Path) -> None:
    """Build a shared library tuned for this machine, or raise Skipped."""
    error = "no compiler found"
    for compiler in filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")):
        command = [
            compiler,
            "-std=c++17",
            "-O3",
            "-march=native",
            "-fno-math-errno",
            "-shared",
            "-fPIC",
            str(source),
            "-o",
            str(target),
        ]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
            return
        except FileNotFoundError:
            continue
        except subprocess.CalledProcessError as failed:
            error = f"{compiler}: {failed.stderr.strip().splitlines()[-1] if failed.stderr else failed}"
    raise Skipped(error)


# --- reports -------------------------------------------------------------------------------------------------------


def show_time(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(value) >= size or unit == "us":
            return f"{value / size:.3g} {unit}" if abs(value) < 1000 * size else f"{value / size:.0f} {unit}"
    raise AssertionError


def show_value(row: Row) -> tuple[str, str]:
    if row.value is None:
        return "", ""
    low, high = f"{row.value.low:.3g}", f"{row.value.high:.3g}"
    return f"{row.value.median:.3g} {row.unit}", "" if low == high else f"{low} .. {high}"


def print_rows(benchmark: str, rows: Sequence[Row]) -> None:
    for row in rows:
        value, spread = show_value(row)
        times = ", ".join(f"{name} {show_time(time_.median)}" for name, time_ in row.times.items())
        target = str(row.target) if row.target else ""
        columns = (
            f"{benchmark:10} {row.name:42} {value:>9} {spread:>15}  {target:>8} {row.verdict:6} {row.note or times}"
        )
        print(columns.rstrip(), flush=True)


def print_header() -> None:
    print(f"{'':10} {'':46} {'median':>9} {'spread':>15}  {'target':>8} {'':6} of")


def as_json(benchmark: str, row: Row) -> dict[str, Any]:
    return {
        "benchmark": benchmark,
        **asdict(row),
        "target": str(row.target) if row.target else None,
        "meets": row.verdict == "meets" if row.verdict else None,
    }


def write_json(path: Path, facts: Mapping[str, Any], results: Mapping[str, Sequence[Row]]) -> None:
    rows = [as_json(benchmark, row) for benchmark, found in results.items() for row in found]
    path.parent.mkdir(parents=True, exist_ok=True)
    argv = [Path(arg).name if Path(arg).is_absolute() else arg for arg in sys.argv[1:]]  # no place of this machine
    path.write_text(json.dumps({**facts, "argv": argv, "rows": rows}, indent=1) + "\n")


def default_path(kind: str = "cpu") -> Path:
    name = re.sub(r"\((r|tm)\)|processor|\bcpu\b", " ", processor().lower())
    slug = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
    return ROOT / "benchmarks" / "results" / f"{kind}-{slug}.json"
