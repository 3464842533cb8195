"""Where does Adam go wrong however long it runs, and what does AMSGrad do about it?

    python examples/studies/counterexample.py

The three problems are those of Reddi, Kale and Kumar 2018, "On the Convergence of Adam and Beyond" (theorem 1 and
figure 1, https://openreview.net/forum?id=ryQu7f-RZ): in step t one pays f_t(x) = slope_t x, for x in [-1, 1]. A large
slope is rare and asks for x = -1, small ones are frequent and ask for +1; together they ask for -1. Adam divides the
large one by the v that it has just raised, and the small ones by a v that has fallen since: they win, and x goes to +1,
the worst of all points. AMSGrad divides by the largest v so far, which is the same for all of them.

The step sizes fall as 1 / sqrt(t), as the theory has it (Adagrad's do so by themselves), and after every step x is put
back into [-1, 1]. The paper has no bias correction and no eps; both change only the first steps here.

Look at the upper row: +1 is the wrong end. Below is the average regret: what was paid a step beyond what the best fixed
x would have paid. It should go to 0, and a straight line on these axes does; Adam's bends. In the second problem much
of it is the swing within each period, which all of them have and which falls as 1 / sqrt(t).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import study
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import fusedopt

Betas = tuple[float, float]
QUICK_STEPS = 10_000


def every(period: int, large: float, small: float) -> Callable[[int], Tensor]:
    """Slopes (steps, 1) for a number of steps: `large` in the first of each period, else -`small`."""
    return lambda steps: torch.where(torch.arange(steps) % period == 0, large, -small)[:, None]


def at_random(probability: float, large: float, small: float, copies: int) -> Callable[[int], Tensor]:
    """Slopes (steps, copies) for a number of steps: `large` with a probability, else -`small`."""

    def draw(steps: int) -> Tensor:
        chance = torch.rand(steps, copies, generator=torch.Generator().manual_seed(1))
        return torch.where(chance < probability, large, -small)

    return draw


@dataclass(frozen=True)
class Problem:
    """What is paid, and how the optimizers are set for it."""

    title: str
    slopes: Callable[[int], Tensor]
    steps: int
    lr: float  # of the first step
    betas: Betas
    optimizers: tuple[str, ...]


OPTIMIZERS: dict[str, Callable[[Tensor, float, Betas], Optimizer]] = {
    "Adam": lambda x, lr, betas: fusedopt.Adam([x], lr, betas),
    "AMSGrad": lambda x, lr, betas: fusedopt.Adam([x], lr, betas, amsgrad=True),
    "RAdam": lambda x, lr, betas: fusedopt.RAdam([x], lr, betas),
    "RAdam amsgrad": lambda x, lr, betas: fusedopt.RAdam([x], lr, betas, amsgrad=True),
    "Adagrad": lambda x, lr, betas: fusedopt.Adagrad([x], lr),
}
STYLES = {
    "Adam": ("#0072b2", "-"),
    "AMSGrad": ("#009e73", "-"),
    "RAdam": ("#56b4e9", "--"),
    "RAdam amsgrad": ("#cc79a7", "--"),
    "Adagrad": ("#d55e00", "-"),
}
PROBLEMS = {
    # With beta2 = 0.1 RAdam finds the variance intractable for ever, and is SGD: it does not belong here.
    "theorem 1": Problem(
        "3x in every 3rd step, else -x (theorem 1)",
        every(3, 3.0, 1.0),
        steps=10_000,
        lr=0.5,
        betas=(0.0, 1 / (1 + 3.0**2)),
        optimizers=("Adam", "AMSGrad", "Adagrad"),
    ),
    "periodic": Problem(
        "1010x in every 101st step, else -10x",
        every(101, 1010.0, 10.0),
        steps=150_000,
        lr=3.0,
        betas=(0.9, 0.99),
        optimizers=tuple(OPTIMIZERS),
    ),
    # The mean slope is 0.2, among slopes of 1010 and -10: to tell its sign takes some 300,000 steps.
    "random": Problem(
        "1010x with probability 0.01, else -10x",
        at_random(0.01, 1010.0, 10.0, copies=16),
        steps=500_000,
        lr=1.0,
        betas=(0.9, 0.99),
        optimizers=("Adam", "AMSGrad"),
    ),
}


class Walk(NamedTuple):
    """Where an optimizer went, at times that are evenly spaced on a logarithmic axis."""

    steps: np.ndarray  # (times,)
    points: np.ndarray  # (times, copies): the mean of x since the time before
    regrets: np.ndarray  # (times, copies): what was paid a step beyond what the best fixed x would have paid
    final: np.ndarray  # (copies,): the mean of x over the last hundredth of the steps


def walk(name: str, problem: Problem, steps: int) -> Walk:
    """Run one optimizer from x = 0; the copies of the problem are the elements of its only parameter."""
    slopes = problem.slopes(steps)
    x = torch.zeros(slopes.shape[1])
    optimizer = OPTIMIZERS[name](x, problem.lr, problem.betas)
    own_decay = isinstance(optimizer, fusedopt.Adagrad)
    schedule = LambdaLR(optimizer, lambda t: 1.0 if own_decay else (t + 1) ** -0.5)
    path = torch.empty_like(slopes)
    for t in range(steps):
        path[t] = x
        x.grad = slopes[t]
        optimizer.step()
        x.clamp_(-1, 1)
        schedule.step()
    return summary(path, slopes)


def summary(path: Tensor, slopes: Tensor) -> Walk:
    """Of all points (steps, copies) and the slopes met there."""
    ends = np.unique(np.geomspace(1, len(path), 120).round().astype(int))
    widths = torch.from_numpy(np.diff(ends, prepend=0))[:, None]
    before = torch.from_numpy(ends - 1)

    def total(values: Tensor) -> Tensor:
        return values.cumsum(0, dtype=torch.float64)[before]

    points = torch.diff(total(path), dim=0, prepend=torch.zeros(1, path.shape[1])) / widths
    best = -total(slopes).abs()  # the least of slope x over [-1, 1] is at one end
    regrets = (total(slopes * path) - best) / torch.from_numpy(ends)[:, None]
    return Walk(ends, points.numpy(), regrets.numpy(), path[-len(path) // 100 :].mean(0).numpy())


# --- the picture ----------------------------------------------------------------------------------


def draw(walks: dict[str, dict[str, Walk]]) -> Figure:
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    grid = figure.subplots(2, len(walks), sharex="col", sharey="row", height_ratios=(3, 2))
    for (upper, lower), (key, found) in zip(grid.T, walks.items(), strict=True):
        for name, course in found.items():
            colour, style = STYLES[name]
            shown = course.steps >= course.steps[-1] / 1000  # three decades
            steps, points, regrets = course.steps[shown], course.points[shown], course.regrets[shown]
            upper.plot(steps, points.mean(1), style, color=colour, lw=2, label=name)
            lower.plot(steps, regrets.mean(1), style, color=colour, lw=2)
            if points.shape[1] > 1:
                low, high = np.quantile(points, (0.1, 0.9), axis=1)
                upper.fill_between(steps, low, high, color=colour, alpha=0.2, lw=0)
        upper.set(title=PROBLEMS[key].title, xscale="log", ylim=(-1.1, 1.1))
        lower.set(xscale="log", yscale="log", xlabel="step")
        for axes in (upper, lower):
            axes.grid(alpha=0.25)
            axes.margins(x=0.01)
    grid[0, 0].set_ylabel("x (the best is -1, the worst is +1)")
    grid[1, 0].set_ylabel("average regret")
    grid[0, -1].text(0.02, 0.01, "bands: 80 % of the copies", transform=grid[0, -1].transAxes)
    figure.legend(*grid[0, 1].get_legend_handles_labels(), loc="outside upper center", ncols=len(STYLES))
    return figure


# --- what is told ---------------------------------------------------------------------------------


def ending(course: Walk) -> str:
    """The final point, over the copies if there are some."""
    spread = f" ± {course.final.std():.2f}" if len(course.final) > 1 else ""
    return f"{course.final.mean():+.2f}{spread}"


def findings(walks: dict[str, dict[str, Walk]]) -> str:
    """Two sentences, from the numbers."""
    ends = {name: ", ".join(ending(found[name]) for found in walks.values()) for name in ("Adam", "AMSGrad")}
    sides: dict[bool, list[str]] = {True: [], False: []}
    for name, course in walks["periodic"].items():
        sides[course.final.mean() > 0].append(f"{name} ({ending(course)}, regret {course.regrets[-1].mean():.2f})")
    return (
        f"The best x is -1 in all three problems, and Adam ends at {ends['Adam']}, AMSGrad at {ends['AMSGrad']}. "
        f"In the periodic one {', '.join(sides[True]) or 'none'} end on the wrong side of 0, and "
        f"{', '.join(sides[False]) or 'none'} on the right one."
    )


def table(title: str, walks: dict[str, dict[str, Walk]], cell: Callable[[Walk], str]) -> study.Table:
    """A row for each optimizer, a column for each problem."""
    rows = [[name, *(cell(found[name]) if name in found else "" for found in walks.values())] for name in OPTIMIZERS]
    return study.Table(title, ["", *walks], rows)


def run(quick: bool) -> study.Study:
    """Let Adam, AMSGrad, RAdam and Adagrad minimize linear functions that Adam is known to get wrong."""
    walks = {
        key: {name: walk(name, problem, QUICK_STEPS if quick else problem.steps) for name in problem.optimizers}
        for key, problem in PROBLEMS.items()
    }
    return study.Study(
        title="The counter-example that AMSGrad was made for",
        question="Adam can converge to the worst point of a convex problem: does it, and do AMSGrad, RAdam and Adagrad "
        "(Reddi, Kale and Kumar 2018, theorem 1 and figure 1)?",
        findings=findings(walks),
        tables=[
            table("x at the end, where -1 is the best (± over copies)", walks, ending),
            table("Average regret at the end", walks, lambda course: f"{course.regrets[-1].mean():.3f}"),
        ],
        figure=draw(walks),
    )


if __name__ == "__main__":
    study.main(run)
