"""Watch an optimizer at work: its own measurements, in TensorBoard.

    python examples/telemetry.py
    tensorboard --logdir telemetry_runs
    python examples/telemetry.py --help

A small GPT is trained twice from the same weights, on the same batches: with weights in float32, then in bfloat16.
`fusedopt.AdamW` clips the gradients' norm, and measures in the step itself what it does to every parameter. The table
at the end shows why training in bfloat16 stalls: as the learning rate falls, more and more updates are smaller than
half the distance to the next bfloat16 number, and rounding takes all of such an update away.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import corpus
import torch
from corpus import Corpus
from gpt import GPT, Shape
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

import fusedopt

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError as error:
    sys.exit(f"this example writes for TensorBoard, which cannot be imported ({error}): pip install tensorboard")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MAX_GRAD_NORM = 1.0
SHAPE = Shape(corpus.VOCABULARY, context=64, layers=2, heads=4, width=64)
BATCH = 16
HELD_OUT_BATCHES = 8


class Record(NamedTuple):
    """What stats() said at one step, and the learning rate there."""

    step: int
    lr: float
    stats: dict[str, dict[str, float]]


@dataclass
class Run:
    """What one training run leaves behind."""

    model: GPT
    records: list[Record] = field(default_factory=list)
    clipped: int = 0
    skipped: int = 0
    held_out: float = math.nan

    def lost(self, records: Sequence[Record], names: Sequence[str]) -> float:
        """The share of some parameters' elements whose update was rounded away, over some records."""
        lost = sum(record.stats[name]["lost_updates"] for record in records for name in names)
        sizes = {name: parameter.numel() for name, parameter in self.model.named_parameters()}
        return lost / (len(records) * sum(sizes[name] for name in names))


def learning_rate(step: int, steps: int) -> float:
    """A factor that warms up over the first twentieth, then falls along a cosine to a hundredth."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.01 + 0.495 * (1 + math.cos(math.pi * min(1.0, (step - warm_up) / max(1, steps - warm_up))))


def train(dtype: str, text: Corpus, args: argparse.Namespace) -> Run:
    """Train a new model, and write what the optimizer measures."""
    torch.manual_seed(args.seed)
    model = GPT(SHAPE).to(device=args.device, dtype=DTYPES[dtype])
    # Named parameters give stats() its names.
    optimizer = fusedopt.AdamW(
        model.named_parameters(),
        lr=args.lr,
        betas=(0.9, 0.95),
        max_grad_norm=MAX_GRAD_NORM,
        skip_nonfinite=True,  # decided by the same pass as the norm
        stats=True,
    )
    schedule = LambdaLR(optimizer, functools.partial(learning_rate, steps=args.steps))
    batches = torch.Generator().manual_seed(args.seed)
    run = Run(model)
    waiting: list[tuple[int, Tensor, Tensor]] = []  # losses and norms not yet read
    # Of an earlier run into the same folder, TensorBoard is to show nothing.
    with SummaryWriter(str(args.out / dtype), purge_step=0) as writer:
        for step in range(1, args.steps + 1):
            batch = corpus.random_batch(text.train, BATCH, SHAPE.context, batches)
            loss = model.loss(batch.tokens.to(args.device), batch.targets.to(args.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            lr = float(schedule.get_last_lr()[0])
            schedule.step()

            # Neither waits for the device. grad_norm is the norm before clipping.
            norm = optimizer.grad_norm
            assert norm is not None
            waiting.append((step, loss.detach(), norm))
            if step % args.every == 0 or step == args.steps:
                run.records.append(Record(step, lr, optimizer.stats()))  # the only wait
                write_steps(writer, run, waiting)
                write_record(writer, run, run.records[-1])
                run.skipped = int(optimizer.skipped_steps)
                writer.add_scalar("all/skipped_steps", run.skipped, step)
    run.held_out = evaluate(model, text, args)
    return run


def write_steps(writer: SummaryWriter, run: Run, waiting: list[tuple[int, Tensor, Tensor]]) -> None:
    """What there is of every step since the last time."""
    for step, loss, norm in waiting:
        writer.add_scalar("all/loss", loss.item(), step)
        writer.add_scalar("all/grad_norm", norm.item(), step)
        run.clipped += norm.item() > MAX_GRAD_NORM
    waiting.clear()


def write_record(writer: SummaryWriter, run: Run, record: Record) -> None:
    """A chart for each statistic of each parameter; TensorBoard folds those of one statistic together."""
    for name, measured in record.stats.items():
        for statistic, value in measured.items():
            writer.add_scalar(f"{statistic}/{name}", value, record.step)
    writer.add_scalar("all/lr", record.lr, record.step)
    writer.add_scalar("all/lost_share", run.lost([record], list(record.stats)), record.step)


@torch.no_grad()
def evaluate(model: GPT, text: Corpus, args: argparse.Namespace) -> float:
    """The mean loss over the same held-out batches for every model."""
    batches = corpus.spread_batches(text.held_out, HELD_OUT_BATCHES, BATCH, SHAPE.context)
    return statistics.fmean(model.loss(b.tokens.to(args.device), b.targets.to(args.device)).item() for b in batches)


def print_table(runs: dict[str, Run], args: argparse.Namespace) -> None:
    """One column for each dtype."""

    def row(title: str, cells: Sequence[str]) -> None:
        print(f"  {title:<44}" + "".join(f"{cell:>12}" for cell in cells))

    def shares(title: str, records: slice, names: Sequence[str]) -> None:
        row(title, [f"{run.lost(run.records[records], names):.1%}" for run in runs.values()])

    first = next(iter(runs.values()))
    kinds: dict[str, list[str]] = defaultdict(list)
    for name, parameter in first.model.named_parameters():
        kind = "embeddings" if name.startswith(("token", "position")) else "matrices"
        kinds[kind if parameter.ndim > 1 else "gains" if "norm" in name and "weight" in name else "biases"].append(name)
    every = [name for names in kinds.values() for name in names]
    # The warm-up's rates are small as well: leave it out.
    begin = sum(record.step <= args.steps // 20 for record in first.records[:-1])
    third = max(1, (len(first.records) - begin) // 3)

    print()
    row("", list(runs))
    row("held-out loss at the end", [f"{run.held_out:.4f}" for run in runs.values()])
    row("steps clipped, and skipped", [f"{run.clipped}, {run.skipped}" for run in runs.values()])
    print("  updates lost to rounding, of all weights")
    shares(f"    learning rate around {first.records[begin].lr:.1e}", slice(begin, begin + third), every)
    shares(f"    learning rate down to {first.records[-1].lr:.1e}", slice(-third, None), every)
    for kind, names in sorted(kinds.items()):
        shares(f"      of {kind}", slice(-third, None), names)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train a small GPT in float32 and in bfloat16; write what the optimizer measures for TensorBoard.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def whole(text: str) -> int:
        if int(text) < 1:
            raise argparse.ArgumentTypeError("it has to be at least 1")
        return int(text)

    parser.add_argument("--steps", type=whole, default=300, help="steps of each training")
    parser.add_argument("--every", type=whole, default=10, help="steps from one call of stats() to the next")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="for weights and batches")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train")
    parser.add_argument("--out", type=Path, default=Path("telemetry_runs"), help="a folder in it for each dtype")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no such device")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Train in both dtypes, and show what became of the updates."""
    args = parse_arguments(argv)
    start = time.perf_counter()
    text = corpus.load()
    runs = {dtype: train(dtype, text, args) for dtype in DTYPES}
    print_table(runs, args)
    print(f"\n{time.perf_counter() - start:.0f} s in all. To look at every parameter's curves:")
    print(f"  tensorboard --logdir {args.out}")


if __name__ == "__main__":
    main()
