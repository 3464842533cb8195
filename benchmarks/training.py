"""What an optimizer does to a whole training: tokens per second, its share of a step, and the memory it takes."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import torch

from . import harness
from .checks import check
from .harness import FOREACH, FUSED, LOOP, MI, OURS, SMALL_QUARTERS, Quick, Row, Spread

sys.path.append(str(harness.ROOT / "examples"))
import corpus
import train_gpt

# The recipe of `make train`.
ARGS = train_gpt.parse_arguments([])
WARMUP = 2


class Training:
    """The GPT of `make train`, with one kind of AdamW: a call is a training step."""

    def __init__(self, kind: str, text: corpus.Corpus) -> None:
        _, chosen = harness.KINDS[kind]
        self.model = train_gpt.build_model(ARGS)
        library = "fusedopt" if kind == OURS else "torch"
        self.optimizer = train_gpt.build_optimizer(library, self.model, ARGS, **chosen)
        self.batches = torch.Generator().manual_seed(0)
        self.text = text
        self.step_seconds: list[float] = []
        self.optimizer_seconds: list[float] = []

    def __call__(self) -> None:
        tokens, targets = corpus.random_batch(self.text.train, ARGS.batch, ARGS.context, self.batches)
        start = time.perf_counter()
        loss = self.model.loss(tokens, targets)
        self.optimizer.zero_grad()
        loss.backward()
        before = time.perf_counter()
        self.optimizer.step()
        after = time.perf_counter()
        self.step_seconds.append(after - start)
        self.optimizer_seconds.append(after - before)


def gpt(quick: Quick) -> Iterator[Row]:
    """The training of `make train`: tokens per second with each AdamW, and the share of the step that it takes."""
    check(SMALL_QUARTERS, algorithm="AdamW", steps=3)
    text = corpus.load()
    trainings = {kind: Training(kind, text) for kind in (OURS, FUSED, FOREACH, LOOP)}
    rounds = WARMUP + 20
    names = list(trainings)
    for round_ in range(rounds):
        for at in range(len(names)):
            trainings[names[(round_ + at) % len(names)]]()
    tokens = ARGS.batch * ARGS.context
    for name, training in trainings.items():
        steps, optimizers = training.step_seconds[WARMUP:], training.optimizer_seconds[WARMUP:]
        times = {"step": Spread.of(steps), "optimizer": Spread.of(optimizers)}
        rate = Spread.of([tokens / value for value in steps])
        yield Row(f"{name}: tokens per second", rate, "/s", None, times)
        share = Spread.of([100 * part / whole for part, whole in zip(optimizers, steps, strict=True)])
        yield Row(f"{name}: the optimizer's share", share, "%")
    ours = trainings.pop(OURS).step_seconds[WARMUP:]
    for name, training in trainings.items():
        theirs = training.step_seconds[WARMUP:]
        ratio = Spread.of([other / own for other, own in zip(theirs, ours, strict=True)])
        times = {name: Spread.of(theirs), OURS: Spread.of(ours)}
        yield Row(f"a training step: faster than {name}", ratio, "x", None, times)


# A fresh process: how much its memory has grown at most, from before the first step to after the third.
MEMORY = """
import sys, torch, fusedopt
def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
params = [torch.nn.Parameter(torch.ones({size})) for _ in range({count})]
for param in params:
    param.grad = torch.ones({size})
optimizer = {module}.AdamW(params{options})
small = torch.nn.Parameter(torch.ones(4))
small.grad = torch.ones(4)
{module}.AdamW([small]{options}).step()  # imports what torch imports at the first step
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = status("VmRSS")
for _ in range(3):
    optimizer.step()
print((status("VmHWM") - before) / ({size} * {count}))
"""


def memory(quick: Quick) -> Iterator[Row]:
    """The peak of what a process gains by AdamW's steps, in bytes an element: its state and what it uses meanwhile."""
    size, count = (MI, 16) if quick else (4 * MI, 16)
    for kind in (OURS, FUSED, FOREACH, LOOP):
        module, chosen = harness.KINDS[kind]
        options = "".join(f", {name}={value}" for name, value in chosen.items())
        code = MEMORY.format(size=size, count=count, module=module.__name__, options=options)
        command = [sys.executable, "-c", code]
        out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tempfile.gettempdir())
        target = harness.at_most(8.5) if kind == OURS else None
        yield Row(f"{kind}: peak beside weights and gradients", Spread.of([float(out.stdout)]), "B/el", target)


BENCHMARKS: dict[str, Callable[[Quick], Iterator[Row]]] = {"gpt": gpt, "memory": memory}
