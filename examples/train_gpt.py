"""Train a small GPT with torch.optim, then with fusedopt, on the same batches.

    python examples/train_gpt.py                # both, and a picture of both: train_gpt.png
    python examples/train_gpt.py --optimizer radam  # or adagrad, adam: train_gpt_radam.png, ...
    python examples/train_gpt.py --only torch   # needs no fusedopt
    python examples/train_gpt.py --help

The long runs start from the same weights and set stock torch beside fusedopt: what they learn, and
how long their steps take. They part by an ulp here and there, which the training enlarges. A short
run holds fusedopt against torch's for-loop with a correctly rounded square root, from which it may
not differ by a bit; if it does, the exit status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import corpus
import numpy as np
import torch
from corpus import Batch, Corpus
from gpt import GPT, Shape
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm  # type: ignore[import-untyped]

LIBRARIES = {"torch": "torch.optim", "fusedopt": "fusedopt"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
EXACT_STEPS = 30  # length of the comparison that has to be exact
EVALUATIONS = 6  # how often a long run looks at the held-out text
TAIL = 20  # the final training loss is a mean over this many steps


class Recipe(NamedTuple):
    """How to build an optimizer, in either library."""

    name: str  # of the class
    lr: float  # this and the next unless the command line says otherwise
    weight_decay: float
    settings: dict[str, Any]
    moments: tuple[str, ...]  # the state that fusedopt keeps free of subnormal numbers


BETAS = {"betas": (0.9, 0.95)}
MOMENTS = ("exp_avg", "exp_avg_sq")
OPTIMIZERS = {
    "adam": Recipe("Adam", 3e-3, 0.0, BETAS, MOMENTS),
    "adamw": Recipe("AdamW", 3e-3, 0.1, BETAS, MOMENTS),
    "radam": Recipe("RAdam", 3e-3, 0.1, {**BETAS, "decoupled_weight_decay": True}, MOMENTS),
    "adagrad": Recipe("Adagrad", 1e-2, 0.0, {}, ()),  # its decay is L2; its sums only grow
}


@dataclass
class Run:
    """What one training run leaves behind."""

    title: str
    model: GPT
    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)  # (step, loss)
    step_ms: list[float] = field(default_factory=list)
    optimizer_ms: list[float] = field(default_factory=list)

    @property
    def weights(self) -> Tensor:
        """All weights in one row."""
        return torch.nn.utils.parameters_to_vector(self.model.parameters()).detach().cpu()

    @property
    def final_loss(self) -> float:
        """The training loss at the end, without the noise of single batches."""
        return statistics.fmean(self.losses[-TAIL:])

    @property
    def optimizer_share(self) -> float:
        """The part of the training step that optimizer.step() takes."""
        return statistics.median(self.optimizer_ms) / statistics.median(self.step_ms)


# --- training -------------------------------------------------------------------------------------


def build_model(args: argparse.Namespace) -> GPT:
    """The same initial weights for the same seed, whatever the device and dtype."""
    torch.manual_seed(args.seed)
    model = GPT(Shape(corpus.VOCABULARY, args.context, args.layers, args.heads, args.width))
    return model.to(device=args.device, dtype=DTYPES[args.dtype])


def build_optimizer(library: str, model: GPT, args: argparse.Namespace, **more: Any) -> Optimizer:
    """The optimizer under its own name: the import is all that differs between the libraries."""
    recipe = OPTIMIZERS[args.optimizer]
    optimizer_class: type[Any] = getattr(importlib.import_module(LIBRARIES[library]), recipe.name)
    weights = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]  # biases and the norms' gains
    groups = [
        {"params": weights, "weight_decay": args.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer: Optimizer = optimizer_class(groups, lr=args.lr, **recipe.settings, **more)
    return optimizer


def learning_rate(step: int, steps: int) -> float:
    """A factor that warms up over the first twentieth, then falls along a cosine to a tenth."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    progress = min(1.0, (step - warm_up) / max(1, steps - warm_up))
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def now(device: str) -> float:
    """The time in milliseconds, once the device has done what it was asked to."""
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * time.perf_counter()


def train(
    title: str,
    build: Callable[[GPT], Optimizer],
    text: Corpus,
    args: argparse.Namespace,
    *,
    steps: int,
    yardstick: Sequence[Batch] = (),
) -> Run:
    """Train a new model for the first `steps` of the `args.steps` that the schedule is made for."""
    model = build_model(args)
    optimizer = build(model)
    schedule = LambdaLR(optimizer, functools.partial(learning_rate, steps=args.steps))
    batches = torch.Generator().manual_seed(args.seed)
    run = Run(title, model)
    every = math.ceil(steps / EVALUATIONS)
    bar = tqdm(range(1, steps + 1), desc=title, unit="step", leave=bool(yardstick))
    for step in bar:
        start = now(args.device)
        batch = corpus.random_batch(text.train, args.batch, args.context, batches)
        loss = model.loss(batch.tokens.to(args.device), batch.targets.to(args.device))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before = now(args.device)
        optimizer.step()
        after = now(args.device)
        schedule.step()

        run.losses.append(loss.item())
        run.step_ms.append(after - start)
        run.optimizer_ms.append(after - before)
        bar.set_postfix(loss=f"{run.losses[-1]:.3f}", refresh=False)
        if yardstick and (step % every == 0 or step == steps):
            run.held_out.append((step, evaluate(model, yardstick, args.device)))
            tqdm.write(f"{title}: step {step:5d}, held-out loss {run.held_out[-1][1]:.4f}")
    return run


@torch.no_grad()
def evaluate(model: GPT, yardstick: Sequence[Batch], device: str) -> float:
    """The mean loss over the held-out batches."""
    losses = (model.loss(b.tokens.to(device), b.targets.to(device)) for b in yardstick)
    return statistics.fmean(loss.item() for loss in losses)


# --- the exact comparison -------------------------------------------------------------------------


def correct_sqrt(x: Tensor) -> Tensor:
    """The float closest to the square root.

    NumPy takes the processor's square root, which IEEE 754 wants correctly rounded. On its way
    through float64 a float32 is rounded twice, which does no harm to a square root.
    """
    return torch.from_numpy(np.sqrt(x.detach().cpu().double().numpy())).to(x.device, x.dtype)


@contextlib.contextmanager
def correctly_rounded_sqrt() -> Iterator[None]:
    """Give Tensor.sqrt, as torch's for-loop optimizers call it, the last bit right."""
    torch.Tensor.sqrt = correct_sqrt  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del torch.Tensor.sqrt  # and the inherited method is back


def build_reference(model: GPT, args: argparse.Namespace) -> Optimizer:
    """torch's for-loop, with subnormal moments turned into zeros the way fusedopt stores them."""

    def flush(optimizer: Optimizer, *_: Any) -> None:
        for state in optimizer.state.values():
            for name in OPTIMIZERS[args.optimizer].moments:
                moment = state[name]
                subnormal = moment.abs() < torch.finfo(moment.dtype).tiny
                moment.copy_(torch.where(subnormal, moment * 0, moment))  # -x * 0 is -0

    # This turns `fused` off as well, which RAdam does not know.
    optimizer = build_optimizer("torch", model, args, foreach=False)
    optimizer.register_step_post_hook(flush)
    return optimizer


def compare_exactly(text: Corpus, args: argparse.Namespace) -> bool:
    """Hold fusedopt against the corrected torch for a few steps; they have to be bit-equal."""
    name = OPTIMIZERS[args.optimizer].name
    steps = min(EXACT_STEPS, args.steps)
    print(f"\nThe exact comparison: {steps} steps, torch's for-loop with its sqrt corrected.")
    if args.dtype == "bfloat16":
        print("  Skipped: in bfloat16 torch rounds after each operation, fusedopt once at the end.")
        return True

    short = functools.partial(train, text=text, args=args, steps=steps)
    with correctly_rounded_sqrt():
        reference = short("corrected torch", lambda model: build_reference(model, args))
        again = short("once more", lambda model: build_reference(model, args))
    ours = short("fusedopt", lambda model: build_optimizer("fusedopt", model, args))

    # A training that does not repeat itself could not tell one optimizer from another.
    repeats = report(f"corrected torch.optim.{name} against itself", reference, again)
    exact = report(f"corrected torch.optim.{name} against fusedopt.{name}", reference, ours)
    print(f"  {why_stock_torch_differs(args)}")
    if not repeats:
        print("  FAILED: the training does not repeat itself, so the comparison says nothing.")
    elif not exact:
        print("  FAILED: the two are not bit-equal.")
    return repeats and exact


def report(title: str, a: Run, b: Run) -> bool:
    """Print how far two runs are apart; true if not a bit differs."""
    equal = a.losses == b.losses and torch.equal(bits(a.weights), bits(b.weights))
    losses, weights = np.max(loss_difference(a, b)), weight_difference(a, b)
    verdict = "bit-equal" if equal else "NOT bit-equal"
    print(f"  {title}: losses differ by {losses:g}, weights by {weights:g}: {verdict}")
    return equal


def bits(x: Tensor) -> Tensor:
    """The bits of floats: these tell -0 from 0."""
    return x.contiguous().view(torch.uint8)


def loss_difference(a: Run, b: Run) -> np.ndarray:
    """Step by step, how far the training losses are apart."""
    difference: np.ndarray = np.abs(np.array(a.losses) - np.array(b.losses))
    return difference


def weight_difference(a: Run, b: Run) -> float:
    """How far the two values of any one weight are apart, at most."""
    return (a.weights.double() - b.weights.double()).abs().max().item()


def why_stock_torch_differs(args: argparse.Namespace) -> str:
    """The reason, with what this machine's square root has to say about it."""
    if args.dtype == "float32":  # every significand there is, under an odd and an even exponent
        x = torch.arange(0x3F800000, 0x40800000, dtype=torch.int32).view(torch.float32)
    else:
        x = torch.linspace(1, 4, 2**22, dtype=torch.float64)
    x = x.to(args.device)
    wrong = (x.sqrt() != correct_sqrt(x)).sum().item() / len(x)
    if wrong == 0:
        return f"torch's {args.dtype} sqrt is correctly rounded here, and so is fusedopt's."
    return (
        f"Stock torch differs because its {args.dtype} sqrt is not correctly rounded: in this"
        f" build, on this processor, {wrong:.2%} of all inputs miss by an ulp, which the"
        " training enlarges; fusedopt's is."
    )


# --- what comes out -------------------------------------------------------------------------------


def print_table(runs: Sequence[Run]) -> None:
    """One column for each run, and below them what lies between the two."""

    def row(title: str, *cells: str) -> None:
        print(f"  {title:<34}" + "".join(f"{cell:>20}" for cell in cells))

    def median(times: list[float]) -> str:
        return f"{statistics.median(times):.3f} ms"

    print()
    row("", *(run.title for run in runs))
    tail = min(TAIL, len(runs[0].losses))
    row(f"train loss, last {tail} steps", *(f"{run.final_loss:.4f}" for run in runs))
    row("held-out loss", *(f"{run.held_out[-1][1]:.4f}" for run in runs))
    row("optimizer.step(), median", *(median(run.optimizer_ms) for run in runs))
    row("whole training step, median", *(median(run.step_ms) for run in runs))
    row("the optimizer's share of it", *(f"{run.optimizer_share:.2%}" for run in runs))
    if len(runs) == 2:
        differences = loss_difference(*runs)
        at = f"(step {differences.argmax() + 1})" if differences.any() else ""
        print()
        row("largest difference of the losses", f"{differences.max():.3g}", at)
        row("largest difference of the weights", f"{weight_difference(*runs):.3g}")


def print_sample(run: Run, args: argparse.Namespace) -> None:
    """Let the model write some Python."""
    text = run.model.write(b"def ", 400, temperature=0.7, seed=args.seed)
    print(f"\nA sample from the model trained with {run.title}:\n")
    for line in text.decode(errors="replace").split("\n"):
        # A stray control character would upset the terminal.
        print("  | " + "".join(c if c.isprintable() else "\ufffd" for c in line))


def draw(runs: Sequence[Run], out: Path) -> None:
    """Both loss curves, what lies between them, and the optimizers' times."""
    # The curves coincide: a thin dark one on a thick light one shows both.
    lines: list[dict[str, Any]] = [
        {"color": "#f6b26b", "linewidth": 4.0, "solid_capstyle": "round"},
        {"color": "#1c3f6e", "linewidth": 1.1, "linestyle": (0, (4, 2))},
    ]
    marks: list[dict[str, Any]] = [
        {"color": "#f6b26b", "s": 130, "edgecolor": "white"},
        {"color": "#1c3f6e", "s": 26, "edgecolor": "white"},
    ]
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(3.4, 1), height_ratios=(2.2, 1))
    both = len(runs) == 2
    top = figure.add_subplot(grid[0, 0] if both else grid[:, 0])
    bars = figure.add_subplot(grid[:, 1])

    steps = np.arange(1, len(runs[0].losses) + 1)
    for run, line, mark in zip(runs, lines, marks, strict=False):
        top.plot(steps, run.losses, label=f"{run.title}, training", **line)
        label = f"{run.title}, held out"
        top.scatter(*zip(*run.held_out, strict=True), label=label, zorder=3, **mark)
    top.set_title("A small GPT on the source of Python's standard library")
    top.set_ylabel("loss (nats per byte)")
    top.legend()
    top.grid(alpha=0.3)

    last = top
    if both:
        last = figure.add_subplot(grid[1, 0], sharex=top)
        top.tick_params(labelbottom=False)
        last.set_ylabel("absolute difference\nof the training losses")
        last.grid(alpha=0.3)
        differences = loss_difference(*runs)
        if differences.any():
            # A logarithm has no place for a zero: leave a gap there.
            shown = np.where(differences > 0, differences, np.nan)
            last.semilogy(steps, shown, ".-", color="#7a3b69", markersize=3, linewidth=0.8)
        else:
            last.set_yticks([])
            last.text(0.5, 0.5, "none: every loss is equal", transform=last.transAxes, ha="center")
    last.set_xlabel("training step")

    times = [statistics.median(run.optimizer_ms) for run in runs]
    names = ["\n".join(run.title.rsplit(".", 1)) for run in runs]
    colors = [line["color"] for line, _ in zip(lines, runs, strict=False)]
    drawn = bars.bar(names, times, color=colors, width=0.6)
    bars.bar_label(drawn, fmt="%.2f ms", padding=3)
    bars.set_title("optimizer.step()")
    bars.set_ylabel("median time (ms)")
    bars.margins(x=0.25, y=0.1)
    figure.savefig(out, dpi=130)


# --- the command line -----------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line, and turn down what could only fail later."""
    parser = argparse.ArgumentParser(
        description="Train a small GPT with torch.optim and with fusedopt, and compare them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def whole(text: str) -> int:
        if int(text) < 1:
            raise argparse.ArgumentTypeError("it has to be at least 1")
        return int(text)

    model = parser.add_argument_group("the model")
    model.add_argument("--layers", type=whole, default=4, help="transformer blocks")
    model.add_argument("--heads", type=whole, default=4, help="attention heads")
    model.add_argument("--width", type=whole, default=128, help="numbers per token")
    model.add_argument("--context", type=whole, default=64, help="tokens (bytes) per window")

    training = parser.add_argument_group("the training")
    training.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="which class")
    training.add_argument("--only", choices=(*LIBRARIES, "both"), default="both", help="whose")
    training.add_argument("--batch", type=whole, default=16, help="windows per step")
    training.add_argument("--steps", type=whole, default=1200, help="steps of each long run")
    rates = ", ".join(f"{recipe.lr:g} for {name}" for name, recipe in OPTIMIZERS.items())
    training.add_argument(
        "--lr",
        type=float,
        default=argparse.SUPPRESS,
        help=f"peak learning rate (default: {rates})",
    )
    decays = ", ".join(f"{recipe.weight_decay:g} for {name}" for name, recipe in OPTIMIZERS.items())
    training.add_argument(
        "--weight-decay",
        type=float,
        default=argparse.SUPPRESS,
        help=f"for matrices; biases and norms have none (default: {decays})",
    )
    training.add_argument("--seed", type=int, default=0, help="for weights, batches and sample")

    machine = parser.add_argument_group("the machine")
    machine.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights")
    machine.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train")
    machine.add_argument("--threads", type=whole, help="CPU threads; None leaves it to PyTorch")
    machine.add_argument(
        "--out",
        type=Path,
        default=argparse.SUPPRESS,
        help="the picture (default: train_gpt.png for adamw, train_gpt_adam.png for adam, ...)",
    )

    # These defaults depend on the optimizer; SUPPRESS keeps argparse's own word on them out of the help.
    args = parser.parse_args(argv, argparse.Namespace(lr=None, weight_decay=None, out=None))
    recipe = OPTIMIZERS[args.optimizer]
    if args.lr is None:
        args.lr = recipe.lr
    if args.weight_decay is None:
        args.weight_decay = recipe.weight_decay
    if args.out is None:
        args.out = Path("train_gpt.png" if args.optimizer == "adamw" else f"train_gpt_{args.optimizer}.png")
    if args.width % args.heads:
        parser.error(f"--width {args.width} does not divide into {args.heads} heads")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no such device")
    if not args.out.parent.is_dir():
        parser.error(f"--out {args.out}: there is no such folder")
    if args.only != "torch":
        try:
            importlib.import_module("fusedopt")
        except ImportError as error:
            parser.error(f"fusedopt cannot be imported ({error}); --only torch needs none")
    return args


def be_deterministic() -> None:
    """The same run has to give the same bits, or the exact comparison means nothing."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Filling new memory with NaN comes with it, as a debugging aid, and costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cuda.enable_mem_efficient_sdp(False)  # its gradient is not deterministic


def main(argv: Sequence[str] | None = None) -> int:
    """Train, compare, show; the exit status says whether the exact comparison held."""
    args = parse_arguments(argv)
    be_deterministic()
    if args.threads:
        torch.set_num_threads(args.threads)
    start = time.perf_counter()

    text = corpus.load()
    parameters = sum(p.numel() for p in build_model(args).parameters())
    print(
        f"{text.files} modules of the standard library: {len(text.train):,} bytes to train on,"
        f" {len(text.held_out):,} held out\n"
        f"{parameters:,} weights in {args.dtype}, on {args.device},"
        f" {torch.get_num_threads()} CPU threads, torch {torch.__version__}\n"
    )
    yardstick = corpus.spread_batches(text.held_out, 16, 16, args.context)
    name = OPTIMIZERS[args.optimizer].name
    runs = []
    for library in LIBRARIES if args.only == "both" else (args.only,):
        build = functools.partial(build_optimizer, library, args=args)
        title = f"{LIBRARIES[library]}.{name}"
        runs.append(train(title, build, text, args, steps=args.steps, yardstick=yardstick))

    print_sample(runs[-1], args)
    print_table(runs)
    draw(runs, args.out)
    exact = compare_exactly(text, args) if args.only == "both" else True
    print(f"\n{args.out} written; {time.perf_counter() - start:.0f} s in all")
    return 0 if exact else 1


if __name__ == "__main__":
    sys.exit(main())
