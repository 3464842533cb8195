"""What do Adagrad's lrs, one for each coordinate, do for a valley, and what if the valley lies askew?

    python examples/studies/adagrad_paths.py

f(x) = 0.1 x1^2 + 2 x2^2 from (-5, -2) is the example of the textbook Dive into Deep Learning, section 12.7; Adagrad is
the one of Duchi, Hazan and Singer (JMLR 12, 2011) in its form x -= lr g / sqrt(s + eps). Along x1 the slope is small,
and so is the sum s of its squares: Adagrad goes there as fast as along x2. That needs a valley along an axis. Turned by
45 degrees, valley and start together, both coordinates see the steep slope. SGD does not mind: its path is turned, too.

Look at the paths on the left against those in the middle; then at the right: solid and dashed, the same but turned.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import study
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim import Optimizer

import fusedopt

CURVATURE = torch.tensor([0.1, 2.0], dtype=torch.float64)
START = torch.tensor([-5.0, -2.0], dtype=torch.float64)
STEPS = 20
LRS = (0.4, 2.0)
TILTS = {"along the axes": 0.0, "turned by 45°": 45.0}  # degrees
OPTIMIZERS: dict[str, Callable[[Tensor, float], Optimizer]] = {
    "Adagrad": lambda x, lr: fusedopt.Adagrad([x], lr=lr, eps=1e-6, eps_inside_sqrt=True),
    "Adam": lambda x, lr: fusedopt.Adam([x], lr=lr),
    "SGD": lambda x, lr: torch.optim.SGD([x], lr=lr),
}
COLOURS = {"Adagrad": "#d55e00", "Adam": "#0072b2", "SGD": "#666666"}


def turn(degrees: float) -> Tensor:
    """The matrix that takes a point to the axes of the valley."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return torch.tensor([[c, s], [-s, c]], dtype=torch.float64)


def height(u: Tensor) -> Tensor:
    """f at points (..., 2) in the axes of the valley."""
    return (CURVATURE * u**2).sum(-1)


def path(name: str, lr: float, degrees: float = 0.0, steps: int = STEPS) -> Tensor:
    """The points (steps + 1, 2) that an optimizer comes to, in its own coordinates."""
    axes = turn(degrees)
    x = (axes.T @ START).requires_grad_()
    optimizer = OPTIMIZERS[name](x, lr)
    points = [x.detach().clone()]
    for _ in range(steps):
        optimizer.zero_grad()
        height(axes @ x).backward()
        optimizer.step()
        points.append(x.detach().clone())
    return torch.stack(points)


def in_valley(name: str, lr: float, degrees: float, steps: int = STEPS) -> Tensor:
    """The same path in the axes of the valley, where all tilts can be compared."""
    return path(name, lr, degrees, steps) @ turn(degrees).T


def sweep(name: str, degrees: float, lrs: np.ndarray) -> np.ndarray:
    """f after STEPS steps with each lr."""
    return np.array([height(in_valley(name, lr, degrees)[-1]).item() for lr in lrs])


# --- the picture ----------------------------------------------------------------------------------


def draw_paths(axes: Axes, lr: float, degrees: float) -> None:
    x1, x2 = np.meshgrid(np.linspace(-6, 3.5, 120), np.linspace(-6, 3.5, 120))
    ground = torch.from_numpy(np.stack([x1, x2], axis=-1))
    levels = [0.02, 0.2, 1, 3, 7, 14, 30]
    axes.contour(x1, x2, height(ground @ turn(degrees).T), levels, colors="#b0b0b0", linewidths=0.7)
    for name, colour in reversed(COLOURS.items()):  # Adagrad on top
        points = path(name, lr, degrees)
        if points[-1].norm() > points[0].norm():
            axes.text(0.97, 0.03, f"{name} diverges", color=colour, ha="right", transform=axes.transAxes)
            continue
        axes.plot(*points.T, "o-", color=colour, ms=3.5, lw=1.4)
        axes.plot(*points[-1], "X", color=colour, ms=11, mec="white", zorder=3)
    axes.plot(0, 0, "k+", ms=14)
    axes.set(xlim=(-6, 3.5), ylim=(-6, 3.5), aspect="equal", xlabel="x1", ylabel="x2")


def draw(lrs: np.ndarray, heights: dict[tuple[str, str], np.ndarray], steps: int) -> Figure:
    figure = Figure(figsize=(13, 8.2), layout="constrained")
    grid = figure.subplots(2, 3, width_ratios=(1, 1, 1.15))
    for row, lr in zip(grid, LRS, strict=True):
        for axes, (tilt, degrees) in zip(row, TILTS.items(), strict=False):
            draw_paths(axes, lr, degrees)
            axes.set_title(f"lr {lr:g}, valley {tilt}")
    for name, colour in COLOURS.items():
        grid[0, 0].plot([], [], "o-", color=colour, label=name)
    grid[0, 0].plot([], [], "kX", ms=9, label=f"after {STEPS} steps")
    grid[0, 0].legend(loc="lower right")
    far, swept = grid[:, 2]
    for (tilt, degrees), style in zip(TILTS.items(), ("-", "--"), strict=True):
        for name, colour in COLOURS.items():
            far.plot(in_valley(name, LRS[1], degrees, steps).norm(dim=1), style, color=colour)
            swept.plot(lrs, heights[name, tilt], style, color=colour)
        far.plot([], [], style, color="black", label=tilt)
    far.set(yscale="log", ylim=(1e-5, 30), xlabel="step", ylabel="distance from the minimum")
    far.set_title(f"lr {LRS[1]:g}, {steps} steps")
    far.legend(loc="lower left", framealpha=1)
    swept.set(xscale="log", yscale="log", ylim=(1e-12, 100), xlabel="lr", ylabel=f"f after {STEPS} steps")
    swept.set_title(f"every lr, {STEPS} steps")
    return figure


# --- what is told ---------------------------------------------------------------------------------


def number(value: float) -> str:
    return f"{value:.6f}" if abs(value) < 100 else f"{value:.1e}"


def run(quick: bool) -> study.Study:
    """Adagrad, Adam and SGD in a valley along the axes and in one that is turned by 45 degrees."""
    lrs = np.geomspace(0.05, 10, 9 if quick else 47)
    heights = {(name, tilt): sweep(name, degrees, lrs) for name in OPTIMIZERS for tilt, degrees in TILTS.items()}

    ends = []
    for lr in LRS:
        for name in OPTIMIZERS:
            cells = [f"{name}, lr {lr:g}"]
            for degrees in TILTS.values():
                end = in_valley(name, lr, degrees)[-1]
                cells += [*map(number, end.tolist()), f"{height(end):.1e}"]
            ends.append(cells)
    least = {key: (lrs[found.argmin()], found.min()) for key, found in heights.items()}
    best = [(name, *(value for tilt in TILTS for value in least[name, tilt])) for name in OPTIMIZERS]

    low, high = (", ".join(map(number, path("Adagrad", lr)[-1].tolist())) for lr in LRS)
    change = "; ".join(f"{name} {f:.1g} and {turned:.1g}" for name, _, f, _, turned in best)
    findings = (
        f"{STEPS} steps of Adagrad end at ({low}) with lr {LRS[0]:g} and at ({high}) with lr {LRS[1]:g}. With the "
        f"best of {len(lrs)} rates for each, f ends, along the axes and turned, at: {change}."
    )
    return study.Study(
        title="Adagrad's paths through a valley",
        question="Adagrad gives each coordinate a rate of its own: what is that worth in f(x) = 0.1 x1^2 + 2 x2^2 from "
        "(-5, -2), the example of Dive into Deep Learning (12.7), and what if f is turned by 45 degrees?",
        findings=findings,
        tables=[
            study.Table(
                f"Where {STEPS} steps end (the turned valley's points in its own axes)",
                ["", "x1", "x2", "f", "turned: x1", "x2", "f"],
                ends,
            ),
            study.Table(
                f"The lr that is best for {STEPS} steps",
                ["", "lr", "f", "turned: lr", "f"],
                [[name, *(f"{value:.2g}" for value in values)] for name, *values in best],
            ),
        ],
        figure=draw(lrs, heights, 100),
    )


if __name__ == "__main__":
    study.main(run)
