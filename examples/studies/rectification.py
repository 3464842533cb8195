"""RAdam's rectification: what it is, and what it does for a transformer without warm-up.

    python examples/studies/rectification.py

Liu et al. 2019 (https://arxiv.org/abs/1908.03265) explain Adam's need for warm-up by the variance of its first adaptive
rates, which rest on few gradients: RAdam scales a step by r_t, and does not adapt while r_t is undefined. Their
controls let Adam do without warm-up in other ways: Adam-2k averages the second moment for 2,000 steps before anything
else moves, Adam-eps bounds the adaptive rate by a large eps. Ma and Yarats 2019 (https://arxiv.org/abs/1910.04209)
hold that what harms is the size of the first steps.

Look at r_t as fusedopt.RAdam applies it; at the loss of a GPT whose norms follow the residual additions, which is what
needs warm-up (Xiong et al. 2020, https://arxiv.org/abs/2002.04745); below, at its gradients in the first ten steps of
Adam (the paper's figure 2); and in the table at how far each method has moved by then.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import study
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from study import Study, Table
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import fusedopt

sys.path.append(str(Path(__file__).parents[1]))
import corpus
from corpus import Corpus
from gpt import GPT, Block, Shape

BETA2S = (0.9999, 0.999, 0.99, 0.9, 0.8, 0.6, 0.5)
R_STEPS = 5000

SHAPE = Shape(corpus.VOCABULARY, context=32, layers=8, heads=4, width=32)
BATCH = 8
LR = 6e-3
BETAS = (0.9, 0.99)  # 0.999 would average over more steps than this training has
WAIT = 1 / 3  # of the training's steps: the warm-up, and what Adam-2k waits
EARLY = 10  # steps after which the paper finds the gradients distorted
WATCHED = 40  # steps whose gradients are drawn
EXPONENTS = (-9.0, -1.0)  # of 10: the range of the gradients' histograms
BINS = 80


# --- r_t ------------------------------------------------------------------------------------------


def rho(beta2: float, step: int) -> float:
    """How many gradients the second moment rests on: 1 at first, less than `step` later, below rho_inf.

    Hence it cannot pass 5 before step 6, nor 4 before step 5, and never passes 5 with beta2 <= 2/3.
    """
    return 2 / (1 - beta2) - 1 - 2 * step * beta2**step / (1 - beta2**step)


def rectification(beta2: float, step: int) -> float:
    """r_t by the formula (the paper's algorithm 2, with torch's rho_t > 5), 0 where it is not used."""
    rho_t, rho_inf = rho(beta2, step), 2 / (1 - beta2) - 1
    if rho_t <= 5:
        return 0.0
    return math.sqrt((rho_t - 4) * (rho_t - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho_t))


def measured_rectification(beta2s: Sequence[float], steps: int) -> np.ndarray:
    """r_t as fusedopt.RAdam applies it, (steps, beta2s), 0 where it takes no step.

    Under a gradient of 1 both moments are 1 once their bias is corrected: without eps, a step is lr * r_t long.
    """
    params = [torch.zeros(1, dtype=torch.float64) for _ in beta2s]
    groups = [{"params": [p], "betas": (0.9, beta2)} for p, beta2 in zip(params, beta2s, strict=True)]
    optimizer = fusedopt.RAdam(groups, lr=1.0, eps=0.0, degenerate_to_sgd=False)
    r = np.empty((steps, len(params)))
    for row in r:
        for p in params:
            p.grad = torch.ones_like(p)
            p.zero_()  # or the step's last digits would be lost in the sum
        optimizer.step()
        row[:] = [abs(p.item()) for p in params]
    return r


def first_step(holds: np.ndarray) -> int | None:
    """The first step, counted from 1, at which something holds."""
    return int(np.argmax(holds)) + 1 if holds.any() else None


# --- training -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """A way to begin; waits are shares of the training's steps."""

    optimizer: Callable[..., Optimizer]
    color: str
    warm_up: float = 0.0  # while the rate grows to its full size
    frozen: float = 0.0  # before the first step, while only the second moment is averaged


METHODS = {
    "Adam": Method(fusedopt.Adam, "#d55e00"),
    "Adam with warm-up": Method(fusedopt.Adam, "#0072b2", warm_up=WAIT),
    "RAdam": Method(fusedopt.RAdam, "#009e73"),
    "Adam-2k": Method(fusedopt.Adam, "#e69f00", frozen=WAIT),
    # The paper's 1e-4 is below most of this model's first gradients, and helps little: 3.09 against 3.15 with 1e-8.
    "Adam-eps": Method(partial(fusedopt.Adam, eps=1e-2), "#cc79a7"),
}


@dataclass
class Run:
    """What one training leaves behind."""

    model: GPT
    losses: list[float] = field(default_factory=list)
    histograms: list[np.ndarray] = field(default_factory=list)  # of log10 |gradient|, for the first WATCHED steps
    medians: list[float] = field(default_factory=list)  # of |gradient|, for the same
    moved: float = math.nan  # by the weights in the first EARLY steps, root mean square
    held_out: float = math.nan  # loss at the end, in nats a byte


class PostNormBlock(Block):
    """The original transformer's order: each norm comes after the addition."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.mlp(x))


def build_model(seed: int) -> GPT:
    """The blocks keep torch's initial weights, as GPT's own are for norms that come first."""
    torch.manual_seed(seed)
    model = GPT(SHAPE)
    model.blocks = nn.Sequential(*(PostNormBlock(SHAPE) for _ in range(SHAPE.layers)))
    return model


def train(method: Method, text: Corpus, seed: int, steps: int) -> Run:
    """Train for `steps` updates, while the rate falls linearly to 0.

    Adam-2k: a step at lr = 0 moves only the moments, and the first moment is zeroed before the first update. The step
    count is kept: then the second moment's bias correction is right, and the first moment grows from zero over some ten
    steps, uncorrected, as in the authors' code.
    """
    model = build_model(seed)
    result = Run(model)
    start = parameters_to_vector(model.parameters()).detach()
    optimizer = method.optimizer(model.parameters(), lr=LR, betas=BETAS)
    warm_up, frozen = round(method.warm_up * steps), round(method.frozen * steps)

    def factor(count: int) -> float:
        step = count - frozen
        return 0.0 if step < 0 else min(1.0, (step + 1) / max(1, warm_up)) * (1 - step / steps)

    schedule = LambdaLR(optimizer, factor)
    batches = torch.Generator().manual_seed(seed)
    for step in range(-frozen, steps):
        batch = corpus.random_batch(text.train, BATCH, SHAPE.context, batches)
        loss = model.loss(batch.tokens, batch.targets)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            for state in optimizer.state.values():  # Adam-2k's; the others have none yet
                state["exp_avg"].zero_()
        optimizer.step()
        schedule.step()
        if step >= 0:
            result.losses.append(loss.item())
        if 0 <= step < WATCHED:
            gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).abs()
            result.medians.append(gradients.median().item())
            result.histograms.append(torch.histc(gradients.log10(), BINS, *EXPONENTS).numpy() / len(gradients))
        if step == EARLY - 1:
            result.moved = (parameters_to_vector(model.parameters()).detach() - start).square().mean().sqrt().item()
    with torch.no_grad():
        (batch,) = corpus.spread_batches(text.held_out, 1, 256, SHAPE.context)
        result.held_out = model.loss(batch.tokens, batch.targets).item()
    return result


# --- the answer -----------------------------------------------------------------------------------


def run(quick: bool) -> Study:
    """Show when and how much RAdam rectifies, and whether that replaces the warm-up of a small post-norm GPT."""
    r = measured_rectification(BETA2S, R_STEPS)
    text = corpus.load()
    seeds, steps = (1, 40) if quick else (3, 250)
    runs = {name: [train(method, text, seed, steps) for seed in range(seeds)] for name, method in METHODS.items()}
    return Study(
        title="RAdam: the rectification, and training without warm-up",
        question=(
            "Adam needs warm-up because its first adaptive rates rest on few gradients, says Liu et al. 2019"
            " (arXiv:1908.03265): when does RAdam begin to adapt, how far does it hold back, and does that, or do the"
            " paper's two controls, replace the warm-up of a small post-norm transformer?"
        ),
        findings=findings(r, runs),
        tables=[rectification_table(r), training_table(runs)],
        figure=draw(r, runs),
    )


def largest_difference(r: np.ndarray) -> np.ndarray:
    """How far the measured r_t is from the formula's at most, relatively, for each of BETA2S."""
    formula = np.array([[rectification(beta2, step) for beta2 in BETA2S] for step in range(1, len(r) + 1)])
    return np.max(np.abs(r - formula) / np.where(formula > 0, formula, 1), axis=0)


def findings(r: np.ndarray, runs: Mapping[str, Sequence[Run]]) -> str:
    """Two sentences."""
    begins = {beta2: first_step(column > 0) for beta2, column in zip(BETA2S, r.T, strict=True)}
    never = " and ".join(f"{beta2:g}" for beta2, begin in begins.items() if begin is None)
    first = (
        f"With beta2 = 0.999 fusedopt.RAdam adapts from step {begins[0.999]} on, with {never} never, and the r_t of its"
        f" steps is the formula's to within {largest_difference(r).max():.0e}."
    )
    loss = {name: float(np.mean([run.held_out for run in some])) for name, some in runs.items()}
    cold, warm = loss["Adam"], loss["Adam with warm-up"]
    if cold <= warm:
        return (
            f"{first} Adam did not need warm-up in this run: held-out loss {cold:.2f} without it, {warm:.2f} with it."
        )
    closed = {name: loss[name] < (cold + warm) / 2 for name in ("RAdam", "Adam-eps", "Adam-2k")}
    by = ", ".join(f"{'' if good else 'not '}by {name} ({loss[name]:.2f})" for name, good in closed.items())
    return (
        f"{first} Adam ends at a held-out loss of {cold:.2f} without warm-up and {warm:.2f} with it, and more than half"
        f" of that gap is closed {by}."
    )


def rectification_table(r: np.ndarray) -> Table:
    """The first rectified steps and r_t; rho_t is 5 at no step, so that > 5 (torch's) and >= 5 agree."""
    rows = []
    for beta2, column, difference in zip(BETA2S, r.T, largest_difference(r), strict=True):
        rhos = np.array([rho(beta2, step) for step in range(1, len(r) + 1)])
        begins = [first_step(holds) for holds in (column > 0, rhos > 5, rhos >= 5, rhos > 4)]
        values = [column[step - 1] for step in (begins[0] or 1, 100, len(r))]
        cells = [*(str(step or "never") for step in begins), *(f"{value:.4f}" for value in values)]
        rows.append([f"{beta2:g}", *cells, f"{difference:.0e}"])
    return Table(
        "The first rectified step: fusedopt.RAdam's, and where rho_t passes a threshold; r_t as measured",
        ["beta2", "fusedopt", "rho_t > 5", ">= 5", "> 4", "first r_t", "r_100", f"r_{len(r)}", "off the formula"],
        rows,
    )


def training_table(runs: Mapping[str, Sequence[Run]]) -> Table:
    """Means over the seeds."""
    rows = []
    for name, some in runs.items():
        losses = [run.held_out for run in some]
        spread = f"{min(losses):.3f} to {max(losses):.3f}"
        moved = np.mean([run.moved for run in some])
        left = np.mean([run.medians[EARLY] / run.medians[0] for run in some])
        rows.append([name, f"{np.mean(losses):.3f}", spread, f"{moved:.4f}", f"{left:.2f}"])
    some = runs["Adam"]
    return Table(
        f"A post-norm GPT of {SHAPE.layers} layers after {len(some[0].losses)} steps (seeds: {len(some)})",
        ["", "held-out loss", "over seeds", f"RMS move in {EARLY} steps", "median |gradient| then / at first"],
        rows,
    )


def draw(r: np.ndarray, runs: Mapping[str, Sequence[Run]]) -> Figure:
    """r_t and the losses; below, the gradients of the first seed."""
    figure = Figure(figsize=(13, 8.5), layout="constrained")
    above, below = figure.subfigures(2, 1)
    axes = above.subplots(1, 2)
    draw_rectification(axes[0], r)
    draw_losses(axes[1], runs)
    below.suptitle("Distribution of |gradient| over the weights, step by step (one seed), and its median")
    axes = below.subplots(1, len(runs), sharey=True)
    for ax, (name, some) in zip(axes, runs.items(), strict=True):
        draw_gradients(ax, name, some[0])
    axes[0].set_ylabel("|gradient|")
    return figure


def draw_rectification(ax: Axes, r: np.ndarray) -> None:
    """r_t over the steps, and the formula at some of them."""
    steps = np.arange(1, len(r) + 1)
    some = np.unique(np.geomspace(1, len(r), 25).astype(int))
    for i, (beta2, column) in enumerate(zip(BETA2S, r.T, strict=True)):
        color = colormaps["viridis"](i / len(BETA2S))
        ax.plot(steps, column, color=color, label=f"{beta2:g}: {first_step(column > 0) or 'never'}")
        ax.plot(some, [rectification(beta2, int(step)) for step in some], ".", color=color)
    ax.set(xscale="log", xlabel="step", ylabel="r_t", title="r_t of fusedopt.RAdam (lines), and by the formula (dots)")
    ax.legend(title="beta2: first step", loc="upper left")


def draw_losses(ax: Axes, runs: Mapping[str, Sequence[Run]]) -> None:
    """The training losses, smoothed: their mean over the seeds, and their range."""
    for name, some in runs.items():
        losses = np.array([np.convolve(run.losses, np.full(10, 0.1), "valid") for run in some])
        steps = np.arange(10, 10 + losses.shape[1])
        color = METHODS[name].color
        ax.plot(steps, losses.mean(0), color=color, lw=2, label=name)
        ax.fill_between(steps, losses.min(0), losses.max(0), color=color, alpha=0.15, lw=0)
    ax.set(xlabel="step", ylabel="mean training loss of 10 steps, nats a byte")
    ax.set_title(f"A post-norm GPT: mean and range over {len(some)} seed{'s' * (len(some) > 1)}")
    ax.legend()


def draw_gradients(ax: Axes, name: str, run: Run) -> None:
    """The histograms of log |gradient| side by side, step after step, and the medians."""
    shares = np.array(run.histograms).T
    steps = np.arange(1, shares.shape[1] + 1)
    ax.pcolormesh(steps, np.logspace(*EXPONENTS, BINS + 1)[1:], shares, cmap="Greys", vmin=0, vmax=0.06)
    ax.plot(steps, run.medians, color=METHODS[name].color, lw=3)
    ax.axvline(EARLY, color="black", lw=1, ls=":")
    ax.set(xlabel="step", yscale="log", title=name)


if __name__ == "__main__":
    study.main(run)
