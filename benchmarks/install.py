"""What it takes to get there: the import, the first step, the build."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from . import harness
from .harness import FUSED, OURS, Quick, Row, Skipped, Spread, at_most

# A fresh process: import torch, import the library, make the optimizer of 100 tensors, and its first and second step.
START = """
import gc, sys, time
marks = [time.perf_counter()]
def mark():
    marks.append(time.perf_counter())
import torch
mark()
import {module}
mark()
params = [torch.nn.Parameter(torch.ones(1000)) for _ in range(100)]
for param in params:
    param.grad = torch.ones(1000)
gc.collect()
gc.disable()  # whose turn it is to collect what the imports left is chance
mark()
optimizer = {module}.Adam(params{options})
mark()
optimizer.step()
mark()
optimizer.step()
mark()
print(*(after - before for before, after in zip(marks, marks[1:])))
"""


def start(quick: Quick) -> Iterator[Row]:
    """In fresh processes: what importing fusedopt adds to importing torch, and how long the first step takes."""
    contenders = {OURS: ("fusedopt", ""), FUSED: ("torch.optim", ", fused=True")}
    found: dict[str, list[list[float]]] = {name: [] for name in contenders}
    for round_ in range(-1, 2 if quick else 5):
        for name, (module, options) in contenders.items():
            command = [sys.executable, "-c", START.format(module=module, options=options)]
            out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tempfile.gettempdir())
            if round_ >= 0:
                found[name].append([float(word) for word in out.stdout.split()])
    columns = {name: [Spread.of(column) for column in zip(*times, strict=True)] for name, times in found.items()}
    added = Spread.of([times[1] * 1e3 for times in found[OURS]])
    yield Row("import fusedopt adds", added, "ms", at_most(50), {"import torch": columns[OURS][0]})
    for title, at in (("making the optimizer of 100 tensors", 3), ("its first step", 4), ("its second step", 5)):
        value = Spread.of([times[at] * 1e3 for times in found[OURS]])
        yield Row(title, value, "ms", None, {name: spreads[at] for name, spreads in columns.items()})
    # Torch's own is imported with torch.
    whole = {name: [times[1] + times[3] + times[4] for times in found[name]] for name in contenders}
    ratio = Spread.of([other / own for other, own in zip(whole[FUSED], whole[OURS], strict=True)])
    spreads = {name: Spread.of(times) for name, times in whole.items()}
    yield Row("import, making it, first step: faster than torch fused", ratio, "x", None, spreads)


def build(quick: Quick) -> Iterator[Row]:
    """A wheel from a clean copy of the source, without and with the CUDA kernels."""
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


BENCHMARKS = {"start": start, "build": build}
