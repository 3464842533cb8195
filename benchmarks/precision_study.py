"""What rounding takes from a training in bfloat16, and what each of the remedies gives back.

    python -m benchmarks.precision_study               # the tables, results/precision_study.json, docs/precision.png
    python -m benchmarks.precision_study --quick       # about a minute, and nothing is written
    python -m benchmarks.precision_study --steps 1200  # as long as `make train`
    python -m benchmarks.precision_study --redraw      # the tables and the picture, from the JSON

The GPT of `make train` with its recipe, in fewer steps: once with its learning rate, at which any difference, however
small, has grown to hundredths of the loss, or a tenth, by the end; and once with a tenth, at which it is not, and
rounding takes more. About 20 minutes on one core.

All runs see the same batches in the same order. A seed draws the initial weights, of which every variant starts from
the same bfloat16 values, and the stochastic roundings. So what a loss differs by, seed by seed, is due to the variant,
and float32's spread over the seeds is that of the initial weights alone.

There are two references. float32 is the one that counts. But a forward and backward pass in bfloat16 moves the
loss too, whatever the optimizer does: autocast has such passes over float32 weights.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from . import harness

sys.path.append(str(harness.ROOT / "examples"))
import corpus
import train_gpt

RESULTS = harness.ROOT / "benchmarks" / "results" / "precision_study.json"
PICTURE = harness.ROOT / "docs" / "precision.png"
STUDIES = ((1.0, 320), (0.1, 100))  # times the learning rate of `make train`, in so many steps
SEEDS = (0, 1, 2)
QUICK_STEPS, QUICK_SEEDS = 10, (0, 1)
DATA_SEED = 0  # of the batches, for all seeds
TAIL = train_gpt.TAIL  # the final training loss is a mean over this many steps
LATE = 4  # lost updates are counted over the last quarter
POINTS = 40  # of a curve as it is kept and drawn: each the mean of as many steps as it stands for

FLOAT32, AUTOCAST = "float32", "float32, autocast bf16"
PLAIN, MASTERS, SPLIT = "bf16 plain", "bf16, masters", "bf16, split masters"
REFERENCES = (FLOAT32, AUTOCAST)
BF16, F32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Variant:
    """How weights and state are stored, and how the picture shows it: a colour for each way to keep the weights."""

    weights: torch.dtype
    color: str
    line: Any = "-"
    options: dict[str, Any] = field(default_factory=dict)
    autocast: bool = False


DASHED, DOTTED = (0, (5, 2)), (0, (1.5, 1.5))
VARIANTS = {
    FLOAT32: Variant(F32, "#000000"),
    AUTOCAST: Variant(F32, "#8a8a8a", DASHED, autocast=True),
    "float32, bf16 state": Variant(F32, "#a0522d", DASHED, {"state_dtype": BF16}),
    "float32, int8 state": Variant(F32, "#a0522d", DOTTED, {"state_dtype": "int8"}),
    PLAIN: Variant(BF16, "#d62728", "-"),
    "bf16, float32 state": Variant(BF16, "#ff8c69", DASHED, {"state_dtype": F32}),
    MASTERS: Variant(BF16, "#1f77b4", "-", {"master_weights": True}),
    SPLIT: Variant(BF16, "#0b2e4f", DASHED, {"master_weights": "split"}),
    "bf16, split masters, int8 state": Variant(
        BF16, "#17a2b8", DOTTED, {"master_weights": "split", "state_dtype": "int8"}
    ),
    "bf16 stochastic, float32 state": Variant(BF16, "#2ca02c", "-", {"rounding": "stochastic", "state_dtype": F32}),
    "bf16 stochastic": Variant(BF16, "#0f5d0f", DASHED, {"rounding": "stochastic"}),
    "bf16 stochastic, int8 state": Variant(BF16, "#8fbc3f", DOTTED, {"rounding": "stochastic", "state_dtype": "int8"}),
    "bf16 Kahan": Variant(BF16, "#9467bd", "-", {"rounding": "kahan"}),
}


# --- training ------------------------------------------------------------------------------------------------------


def recipe(seed: int, steps: int, scale: float) -> argparse.Namespace:
    """As `make train` has it, but for these; `scale` is the learning rate's."""
    words = ["--only", "fusedopt", "--seed", str(seed), "--steps", str(steps)]
    args: argparse.Namespace = train_gpt.parse_arguments(words)
    args.lr = float(f"{args.lr * scale:g}")
    return args


def train(variant: Variant, args: argparse.Namespace, text: corpus.Corpus) -> dict[str, Any]:
    """One run: its losses, the share of updates lost in each step, and the held-out loss at the end."""
    seed, steps = args.seed, args.steps
    model = train_gpt.build_model(args).bfloat16().to(variant.weights)
    # The norm is clipped in the step, in float32; clip_grad_norm_ would round every clipped gradient to bfloat16.
    options = variant.options | {"stats": True, "max_grad_norm": 1.0, "seed": seed}
    optimizer: Any = train_gpt.build_optimizer("fusedopt", model, args, **options)
    peaks = [group["lr"] for group in optimizer.param_groups]
    numel = sum(param.numel() for param in model.parameters())
    batches = torch.Generator().manual_seed(DATA_SEED)
    losses, lost = [], []
    for step in range(steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * train_gpt.learning_rate(step, steps)
        tokens, targets = corpus.random_batch(text.train, args.batch, args.context, batches)
        with torch.autocast("cpu", torch.bfloat16, enabled=variant.autocast):
            loss = model.loss(tokens, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        lost.append(sum(found["lost_updates"] for found in optimizer.stats().values()) / numel)
    yardstick = corpus.spread_batches(text.held_out, 16, 16, args.context)
    with torch.autocast("cpu", torch.bfloat16, enabled=variant.autocast):
        held_out = train_gpt.evaluate(model, yardstick, "cpu")
    stored = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    stored += [param.detach() for param in model.parameters()]
    return {
        "seed": seed,
        "training": statistics.fmean(losses[-TAIL:]),
        "held_out": held_out,
        "lost_late": statistics.fmean(lost[-max(1, steps // LATE) :]),
        "bytes_per_weight": round(sum(value.nbytes for value in stored) / numel, 2),
        "losses": thin(losses),
        "lost": thin(lost),
    }


def windows(steps: int) -> list[range]:
    """The steps, from 0, that each point of a curve stands for."""
    size = math.ceil(steps / POINTS)
    return [range(start, min(start + size, steps)) for start in range(0, steps, size)]


def thin(curve: Sequence[float]) -> list[float]:
    return [round(statistics.fmean(curve[i] for i in window), 6) for window in windows(len(curve))]


def study(text: corpus.Corpus, scale: float, steps: int, seeds: Sequence[int]) -> dict[str, Any]:
    """All variants with all seeds, at one learning rate."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    lr = recipe(0, steps, scale).lr
    start = time.perf_counter()
    for seed in seeds:
        for name, variant in VARIANTS.items():
            run = train(variant, recipe(seed, steps, scale), text)
            runs[name].append(run)
            took = time.perf_counter() - start
            print(
                f"{took:6.0f} s  lr {lr:g}  seed {seed}  {name:32} {run['training']:.4f}", file=sys.stderr, flush=True
            )
    return {
        "lr": lr,
        "steps": steps,
        "steps_per_point": len(windows(steps)[0]),
        "seconds": round(time.perf_counter() - start),
        "runs": runs,
    }


def facts(seeds: Sequence[int]) -> dict[str, Any]:
    """What holds for all runs."""
    chosen = vars(recipe(0, 1, 1.0))
    keep = ("optimizer", "weight_decay", "layers", "heads", "width", "context", "batch")
    return {
        **harness.machine(),
        "seeds": list(seeds),
        "data_seed": DATA_SEED,
        "recipe": {key: chosen[key] for key in keep} | train_gpt.OPTIMIZERS[chosen["optimizer"]].settings,
        "variants": {
            name: {
                "weights": str(variant.weights).removeprefix("torch."),
                "autocast": variant.autocast,
                **{key: str(value).removeprefix("torch.") for key, value in variant.options.items()},
            }
            for name, variant in VARIANTS.items()
        },
    }


# --- what comes out ------------------------------------------------------------------------------------------------


def values(found: dict[str, Any], name: str, what: str) -> list[Any]:
    """One for each seed."""
    return [run[what] for run in found["runs"][name]]


def spread(numbers: Sequence[float]) -> float:
    return max(numbers) - min(numbers)


def gaps(found: dict[str, Any], name: str, reference: str, what: str) -> list[float]:
    """How far each seed's loss lies above the reference's with the same seed."""
    pairs = zip(values(found, name, what), values(found, reference, what), strict=True)
    return [loss - right for loss, right in pairs]


def verdict(found: dict[str, Any], name: str, reference: str, what: str) -> str:
    """Whether the mean gap is within the reference's spread over the seeds; if not, whether that is for the worse."""
    if name == reference:
        return "—"
    gap = statistics.fmean(gaps(found, name, reference, what))
    if abs(gap) <= spread(values(found, reference, what)):
        return "yes"
    return "**no, worse**" if gap > 0 else "**no, better**"


def print_tables(found: dict[str, Any]) -> None:
    print(f"\n### Learning rate {found['lr']:g}, {found['steps']} steps")
    seeds = len(found["runs"][FLOAT32])
    titles = {
        "training": f"Training loss, mean of the last {min(TAIL, found['steps'])} steps",
        "held_out": "Held-out loss at the end",
    }
    columns = ["weights and state", "bytes of both", "lost updates", "loss", "spread"]
    columns += ["less float32", "within its spread?", "less autocast", "within its spread?"]
    for what, title in titles.items():
        print(f"\n{title} (nats per byte); {seeds} seeds: means, and max - min. Gaps are paired by seed.\n")
        print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
        for name in VARIANTS:
            numbers = values(found, name, what)
            row = [
                name,
                f"{values(found, name, 'bytes_per_weight')[0]:.2f}",
                f"{100 * statistics.fmean(values(found, name, 'lost_late')):.2g} %",
                f"{statistics.fmean(numbers):.4f}",
                f"{spread(numbers):.4f}",
            ]
            for reference in REFERENCES:
                gap = gaps(found, name, reference, what)
                same = name == reference
                row.append("—" if same else f"{statistics.fmean(gap):+.4f} ({min(gap):+.4f} .. {max(gap):+.4f})")
                row.append(verdict(found, name, reference, what))
            print(f"| {' | '.join(row)} |")
        for reference in REFERENCES:
            outside = [name for name in VARIANTS if verdict(found, name, reference, what).startswith("**")]
            print(f"\nNot within the spread of {reference}: {'; '.join(outside) or 'none'}.")
            if PLAIN not in outside:
                print("Plain bf16 is within it as well: here this test does not tell a remedy from none.")
    same = all(
        values(found, MASTERS, key) == values(found, SPLIT, key) for key in ("losses", "training", "held_out", "lost")
    )
    print(
        "\nLost updates: of all elements, those whose update was not zero and left the stored value as it was; the mean"
        f" over the last 1/{LATE} of the steps. What stochastic rounding loses in one step it does not lose on average."
        f"\n{MASTERS} and {SPLIT}: the same losses? {'Yes' if same else '**No**'}."
    )


def mean_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(points) for points in zip(*curves, strict=True)]


def draw(studies: Sequence[dict[str, Any]], out: Path) -> None:
    """A column for each learning rate: the loss, how far it is from float32's, and what is lost to rounding."""
    figure = Figure(figsize=(13, 14.5), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    rows = figure.subplots(3, len(studies), squeeze=False, height_ratios=(1, 1.15, 1))
    for found, (top, apart, bars) in zip(studies, rows.T, strict=True):
        draw_curves(found, top, apart)
        draw_lost(found, bars)
    for bars in rows[2, 1:]:
        bars.tick_params(labelleft=False)
    handles, labels = rows[0, 0].get_legend_handles_labels()
    band, band_label = rows[1, 0].get_legend_handles_labels()
    figure.legend(handles + band, labels + band_label, loc="outside lower center", ncols=4, handlelength=3.4)
    figure.suptitle("A small GPT in bfloat16: what rounding takes, and what the remedies give back", fontsize=14)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def draw_curves(found: dict[str, Any], top: Axes, apart: Axes) -> None:
    steps = [1 + statistics.fmean(window) for window in windows(found["steps"])]
    right = values(found, FLOAT32, "losses")
    band = [spread(points) for points in zip(*right, strict=True)]
    label = "float32's spread over the seeds"
    apart.fill_between(steps, [-x for x in band], band, label=label, color="#000000", alpha=0.1, linewidth=0)
    widths = {FLOAT32: 2.2, MASTERS: 3.2}  # split masters lie on masters: the dashes show both
    for name, variant in VARIANTS.items():
        style: dict[str, Any] = {"color": variant.color, "linestyle": variant.line}
        style["linewidth"] = widths.get(name, 1.7)
        top.plot(steps, mean_curve(values(found, name, "losses")), label=name, **style)
        differences = [
            [loss - reference for loss, reference in zip(*pair, strict=True)]
            for pair in zip(values(found, name, "losses"), right, strict=True)
        ]
        apart.plot(steps, mean_curve(differences), **style)
    top.set_title(f"Learning rate {found['lr']:g}: training loss, mean of {len(right)} seeds")
    top.set_ylabel("loss (nats per byte)")
    apart.set_title("The same less float32's with the same seed")
    apart.set_ylabel("difference of the losses")
    for axes in (top, apart):
        axes.set_xlabel(f"training step (points: means of {found['steps_per_point']})")
        axes.grid(alpha=0.3)


def draw_lost(found: dict[str, Any], bars: Axes) -> None:
    places = range(len(VARIANTS))
    colors = [variant.color for variant in VARIANTS.values()]
    shares = [100 * statistics.fmean(values(found, name, "lost_late")) for name in VARIANTS]
    drawn = bars.barh(places, shares, color=colors, height=0.65)
    bars.bar_label(drawn, fmt="%.2g %%", padding=3, fontsize=9)
    bars.set_title("Updates lost to rounding, last quarter of the steps")
    bars.set_xlabel("share of all elements (%)")
    bars.set_xlim(0, 100)
    bars.set_yticks(places, list(VARIANTS), fontsize=9)
    bars.set_ylim(len(VARIANTS) - 0.4, -0.6)
    bars.grid(alpha=0.3, axis="x")
    bars.set_axisbelow(True)


def write_json(known: dict[str, Any], studies: Sequence[dict[str, Any]], path: Path) -> None:
    """One line for each fact and each run."""
    lines = [f" {json.dumps(name)}: {json.dumps(fact)}" for name, fact in known.items()]
    listed = []
    for found in studies:
        about = ", ".join(f"{json.dumps(key)}: {json.dumps(fact)}" for key, fact in found.items() if key != "runs")
        variants = []
        for name, runs in found["runs"].items():
            each = ",\n".join(f"    {json.dumps(run)}" for run in runs)
            variants.append(f"   {json.dumps(name)}: [\n{each}\n   ]")
        listed.append(f'  {{{about}, "runs": {{\n' + ",\n".join(variants) + "\n  }}")
    lines.append(' "studies": [\n' + ",\n".join(listed) + "\n ]")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train a small GPT in bfloat16 with each remedy against rounding.")
    parser.add_argument("--quick", action="store_true", help="a minute: too few steps to conclude anything from")
    lengths = ", ".join(f"{steps} at {scale:g} times its learning rate" for scale, steps in STUDIES)
    parser.add_argument("--steps", type=int, help=f"of each run (default: {lengths})")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--redraw", action="store_true", help="train nothing: read the JSON")
    written = "default: {}; --quick: nowhere"
    parser.add_argument("--json", type=Path, help=written.format("results/precision_study.json"))
    parser.add_argument("--picture", type=Path, help=written.format("docs/precision.png"))
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    path, picture = args.json, args.picture
    if not args.quick:
        path, picture = path or RESULTS, picture or PICTURE
    if args.redraw:
        studies = json.loads((path or RESULTS).read_text())["studies"]
    else:
        text = corpus.load()
        seeds = QUICK_SEEDS if args.quick else SEEDS
        studies = [
            study(text, scale, args.steps or (QUICK_STEPS if args.quick else steps), seeds) for scale, steps in STUDIES
        ]
        if path:
            write_json(facts(seeds), studies, path)
    for found in studies:
        print_tables(found)
    if picture:
        draw(studies, picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
