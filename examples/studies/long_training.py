"""Why does Adam get worse after training for very long?

    python examples/studies/long_training.py

The question is https://datascience.stackexchange.com/questions/25024: a linear model with 1,000 weights fits 64 random
points; with Adam's defaults the loss falls from 92 to about 2e-12 in 300 steps, and thousands of steps later it rises
to about 2e-3. The data and the first weights here are those of the question, number by number (see `problem`); seeds 0
to 7 instead of the question's do the same, and are back above 1e-4 at steps 2,882 to 3,458.

The answer is in the lower row: lr times the largest eigenvalue of P^-1 H, over (2 + 2 beta1) / (1 - beta1), where H is
the Hessian of the loss and P = diag(sqrt(v_hat) + eps) is what Adam divides by. For as long as P stays what it is, an
error along that eigenvector dies out if this ratio is below 1, and grows if it is above, however small it is and
however exact the arithmetic. The bound is 38 for beta1 = 0.9, and the 2 of gradient descent without momentum (Cohen et
al. 2022, "Adaptive Gradient Methods at the Edge of Stability", https://arxiv.org/abs/2207.14484). Here H is constant;
but once the points are fitted there are no gradients to speak of, v decays by beta2 a step, and the ratio climbs to 1.
Then the loss blows up, fills v again, and both hover at that edge from there on.

Look at the loss where the ratio below it reaches 1: the dotted line is that step for Adam's defaults. What holds P up
(AMSGrad, a large eps), or takes lr down as fast as the root of v, keeps the ratio from 1; clipping takes the large
gradients out of v, and gets there sooner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import study
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR

import fusedopt

SEED = 545345  # the question's
POINTS, INPUTS = 64, 1000
FITTED, WORSE = 1e-10, 1e-4  # losses: below the first the points are fitted; above the second that has been lost


@dataclass(frozen=True)
class Variant:
    """A way to train, and where it is drawn."""

    make: Callable[[Sequence[Tensor]], Optimizer]
    column: int
    colour: str
    style: str = "-"
    steps: int = 5000
    dtype: torch.dtype = torch.float32
    decay: float = 1.0  # what a step multiplies lr with


VARIANTS = {
    "Adam": Variant(fusedopt.Adam, 0, "#0072b2"),
    "Adam float64": Variant(fusedopt.Adam, 0, "#56b4e9", "--", dtype=torch.float64),
    "Adam clipped at 1": Variant(lambda p: fusedopt.Adam(p, max_grad_norm=1.0), 0, "#e69f00"),
    "AMSGrad": Variant(lambda p: fusedopt.Adam(p, amsgrad=True), 1, "#009e73"),
    "Adam √beta2 decay": Variant(fusedopt.Adam, 1, "#cc79a7", "--", decay=0.999**0.5),
    "Adam eps 0.1": Variant(lambda p: fusedopt.Adam(p, eps=0.1), 1, "#d55e00"),
    "SGD lr 3e-4": Variant(lambda p: torch.optim.SGD(p, lr=3e-4), 1, "#666666"),
    "Adam lr 1e-4": Variant(lambda p: fusedopt.Adam(p, lr=1e-4), 2, "#0072b2", steps=20_000),
    "Adam lr 1e-5": Variant(lambda p: fusedopt.Adam(p, lr=1e-5), 2, "#56b4e9", steps=20_000),
}
COLUMNS = ("Adam: the loss comes back", "what keeps it stable", "a smaller rate puts it off")


class Problem(NamedTuple):
    """The points, and the weights to start from, in float64."""

    x: Tensor  # (POINTS, INPUTS)
    y: Tensor  # (POINTS, 1)
    weight: Tensor  # (1, INPUTS)
    bias: Tensor  # (1,)


class Course(NamedTuple):
    """What a training leaves behind."""

    losses: np.ndarray  # before each step
    ratio_steps: np.ndarray
    ratios: np.ndarray  # after each of these steps


def problem(seed: int = SEED) -> Problem:
    """What x = randn(64, 1000), y = randn(64, 1), Linear(1000, 1) were for torch.manual_seed(seed) in 2017.

    torch's streams have changed since (its first loss is now 69.6 and no longer 91.7; the rest of the story is the
    same). They were a Mersenne twister, like NumPy's, and the transform of Box and Muller, number by number.
    """
    stream = np.random.RandomState(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.from_numpy(stream.randint(2**32, size=shape, dtype=np.uint32) / 2**32)

    def normal(*shape: int) -> Tensor:
        angle, u = uniform(int(np.prod(shape)) // 2, 2).T
        radius = (-2 * (-u).log1p()).sqrt()
        angle = 2 * torch.pi * angle
        return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1).reshape(shape)

    bound = INPUTS**-0.5  # of Linear's initial weights
    x, y = normal(POINTS, INPUTS), normal(POINTS, 1)
    return Problem(x, y, (2 * uniform(1, INPUTS) - 1) * bound, (2 * uniform(1) - 1) * bound)


def stability_ratio(optimizer: Optimizer, design: Tensor) -> float:
    """lr times the largest eigenvalue of P^-1 H, over the bound of stability.

    `design` (points, weights) holds each weight's factor, so that H = 2 design^T design. The eigenvalues of P^-1 H
    other than 0 are those of 2 design P^-1 design^T, which is symmetric, and small.
    """
    (group,) = optimizer.param_groups
    beta1, denom = 0.0, torch.ones(design.shape[1], dtype=design.dtype)
    if isinstance(optimizer, fusedopt.Adam):
        beta1, beta2 = group["betas"]
        states = [optimizer.state[param] for param in group["params"]]
        moment = "max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"
        exp_avg_sq = torch.cat([state[moment].flatten() for state in states]).to(design)
        denom = (exp_avg_sq / (1 - beta2 ** states[0]["step"].item())).sqrt() + group["eps"]
    largest = torch.linalg.eigvalsh(2 * (design / denom) @ design.T)[-1].item()
    ratio: float = group["lr"] * largest * (1 - beta1) / (2 + 2 * beta1)
    return ratio


def train(variant: Variant, steps: int, every: int = 10, seed: int = SEED) -> Course:
    """Full-batch training with the summed squared error; the ratio is measured in every `every`-th step."""
    x, y, weight, bias = problem(seed)
    design = torch.cat([x, torch.ones(POINTS, 1, dtype=x.dtype)], dim=1)
    x, y = x.to(variant.dtype), y.to(variant.dtype)
    model = torch.nn.Linear(INPUTS, 1, dtype=variant.dtype)
    model.load_state_dict({"weight": weight, "bias": bias})
    optimizer = variant.make(list(model.parameters()))
    schedule = ExponentialLR(optimizer, variant.decay)
    losses, ratios = [], []
    for step in range(steps):
        loss = (model(x) - y).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % every == 0:
            ratios.append(stability_ratio(optimizer, design))
        schedule.step()
    return Course(np.array(losses), np.arange(0, steps, every), np.array(ratios))


def first(steps: np.ndarray, condition: np.ndarray) -> int | None:
    """The first of the steps for which the condition holds."""
    return int(steps[condition.argmax()]) if condition.any() else None


def crossing(course: Course) -> int | None:
    """The first step after which the training is unstable."""
    return first(course.ratio_steps, course.ratios > 1)


def rise(course: Course, level: float = WORSE) -> int | None:
    """The first step with a loss above `level` after the points were fitted."""
    fitted = np.logical_or.accumulate(course.losses < FITTED)
    return first(np.arange(len(fitted)), fitted & (course.losses > level))


# --- the picture ----------------------------------------------------------------------------------


def draw(courses: dict[str, Course]) -> Figure:
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    grid = figure.subplots(2, 3, sharex="col", sharey="row", height_ratios=(3, 2), width_ratios=(5, 5, 4))
    for name, course in courses.items():
        variant = VARIANTS[name]
        upper, lower = grid[:, variant.column]
        upper.semilogy(course.losses, variant.style, color=variant.colour, lw=0.9, label=name)
        lower.semilogy(course.ratio_steps, course.ratios, variant.style, color=variant.colour, lw=1.8)
    for title, (upper, lower) in zip(COLUMNS, grid.T, strict=True):
        upper.set(title=title, ylim=(1e-31, 1e3))
        upper.legend(loc=(0.16, 0.14))
        lower.axhline(1, color="black", lw=1)
        lower.set(xlabel="step", ylim=(1e-4, 1e3))
        for axes in (upper, lower):
            axes.grid(alpha=0.25)
            axes.margins(x=0.01)
    grid[0, 0].set_ylabel("loss (summed squared error)")
    grid[1, 0].set_ylabel("lr λmax(P⁻¹H) / bound")
    grid[1, 1].text(0.02, 1.5, "unstable above 1", transform=grid[1, 1].get_yaxis_transform())
    crossed = crossing(courses["Adam"])
    if crossed is not None:
        for axes in grid[:, 0]:
            axes.axvline(crossed, color="black", lw=1.2, ls=":")
        grid[0, 0].text(crossed + 200, 1e-19, f"step {crossed:,}:\nAdam becomes\nunstable")
    return figure


# --- what is told ---------------------------------------------------------------------------------


def count(step: int | None) -> str:
    return "never" if step is None else f"{step:,}"


def row(name: str, course: Course) -> list[str]:
    """One of the table."""
    fitted = course.losses.min() < FITTED
    return [
        name,
        f"{len(course.losses):,}",
        f"{course.losses.min():.1e}",
        f"{course.losses.argmin():,}",
        f"{course.losses[-1]:.1e}",
        f"{course.ratios.max():.3g}",
        count(crossing(course)),
        count(rise(course)) if fitted else "never fitted",
    ]


def findings(courses: dict[str, Course]) -> str:
    """Two sentences, from the numbers."""
    adam, double = courses["Adam"], courses["Adam float64"]
    story = f"Adam's loss falls to {adam.losses.min():.1e}, in float64 to {double.losses.min():.1e}"
    crossed, back, double_back = crossing(adam), rise(adam), rise(double)
    if crossed is None or back is None or double_back is None or back < crossed:
        story += ", and has not come back in this run."
    else:
        story += (
            f", but is above {WORSE:g} again at step {back:,} (float64: {double_back:,}, so that rounding is not the "
            f"cause), {back - crossed} steps after v, which forgets the gradients of the start, has let the "
            "preconditioned curvature pass the bound of stability."
        )
    stable = [name for name, course in courses.items() if crossing(course) is None]
    unstable = [f"{name} (step {count(crossing(course))})" for name, course in courses.items() if name not in stable]
    worst = max((courses[name].losses[-1] for name in stable), default=float("nan"))
    return (
        f"{story} The bound is never passed, and the last loss at most {worst:.1e}, with {', '.join(stable)}; "
        f"it is passed with {', '.join(unstable)}."
    )


def run(quick: bool) -> study.Study:
    """Train a linear model in nine ways for longer than is good, and watch how stable the steps are."""
    courses = {
        name: train(v, 1000 if quick else v.steps, every=v.steps // (50 if quick else 500))
        for name, v in VARIANTS.items()
    }
    columns = (
        "",
        "steps",
        "lowest loss",
        "at step",
        "last loss",
        "largest ratio",
        "ratio > 1 at",
        f"lost (> {WORSE:g}) at",
    )
    return study.Study(
        title="Why Adam gets worse after training for very long",
        question="A linear model with 1,000 weights fits 64 points exactly, yet thousands of steps later Adam's loss "
        "rises again, and SGD's does not: why (datascience.stackexchange.com/questions/25024)?",
        findings=findings(courses),
        tables=[
            study.Table(
                "Loss and stability (the ratio is looked at 500 times in each run)",
                columns,
                [row(*entry) for entry in courses.items()],
            )
        ],
        figure=draw(courses),
    )


if __name__ == "__main__":
    study.main(run)
