"""How should the learning rate be set? A range test, six schedules, and the models that restarts leave on the way.

    python examples/studies/learning_rates.py

The rate comes from an LR range test (Smith 2015, https://arxiv.org/abs/1506.01186), which raises it until the training
diverges. With it a small network learns scikit-learn's digits: fixed; fixed at a third; with step decay; in triangular
cycles (Smith), beta1 falling while the rate rises; with warm restarts (SGDR, Loshchilov and Hutter 2016,
https://arxiv.org/abs/1608.03983), and the same with bounds that fall at restarts. A snapshot ensemble (Huang et al.
2017, https://arxiv.org/abs/1704.00109) averages what the weights at the end of each cycle predict: several models from
one training.

Look at how far the rate may go; at the error of the fixed rate; and, on the lower right, at the bars above the dots.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import study
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingWarmRestarts, CyclicLR, LRScheduler, StepLR

import fusedopt
from fusedopt.lr_finder import RangeTest, range_test
from fusedopt.lr_scheduler import DecayingWarmRestarts
from fusedopt.snapshot_ensemble import SnapshotEnsemble

TRAINED_ON = 600  # of 1,797 pictures: few enough that the other 1,197 are not all told right
BATCH = 32
CYCLES = 5
SEEDS = range(5)  # for weights, order and Dropout; the first is the one that the findings are about
COLORS = {
    "fixed": "#7f7f7f",
    "fixed, a third": "#56b4e9",
    "step decay": "#0072b2",
    "triangular": "#e69f00",
    "SGDR": "#d55e00",
    "decaying SGDR": "#009e73",
}


class Digits(NamedTuple):
    inputs: Tensor
    targets: Tensor
    held_out: Tensor
    answers: Tensor

    def accuracy(self, scores: Tensor) -> float:
        """In per cent of the held-out pictures."""
        return 100 * (scores.argmax(1) == self.answers).double().mean().item()

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """An epoch, in a new order."""
        return [(self.inputs[i], self.targets[i]) for i in torch.randperm(len(self.inputs)).split(BATCH)]


@dataclass
class Run:
    """What a training leaves behind; of snapshots only if the schedule has cycles."""

    snapshots: SnapshotEnsemble
    lrs: list[float] = field(default_factory=list)  # of every step
    losses: list[float] = field(default_factory=list)  # of every epoch, while training
    accuracies: list[float] = field(default_factory=list)  # held-out, after every epoch
    ends: list[int] = field(default_factory=list)  # after how many steps a cycle had ended
    members: list[float] = field(default_factory=list)  # the held-out accuracy of each snapshot
    ensemble: float = 0.0  # and of their average


def load() -> Digits:
    """Split by class, and standardised by what is trained on."""
    pictures, digits = load_digits(return_X_y=True)
    split = train_test_split(pictures, digits, train_size=TRAINED_ON, stratify=digits, random_state=0)
    scaler = StandardScaler().fit(split[0])
    train, held_out = (torch.tensor(scaler.transform(part), dtype=torch.float32) for part in split[:2])
    return Digits(train, torch.tensor(split[2]), held_out, torch.tensor(split[3]))


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    hidden = (nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 32), nn.ReLU(), nn.Dropout(0.3))
    return nn.Sequential(*hidden, nn.Linear(32, 10))


def find_rate(data: Digits) -> RangeTest:
    """The range test, from the weights of seed 0."""
    model = network(0)
    optimizer = fusedopt.Adam(model.parameters())
    return range_test(model, optimizer, nn.CrossEntropyLoss(), data.batches(), start=1e-5, end=10.0, progress=False)


def schedules(lr: float, steps: int) -> dict[str, Callable[[Optimizer], LRScheduler]]:
    """All from `lr`, but that the second is what is to be tried beside it; stepped after every batch."""
    cycle = steps // CYCLES
    return {
        "fixed": lambda o: ConstantLR(o, factor=1.0),
        "fixed, a third": lambda o: ConstantLR(o, factor=1 / 3, total_iters=steps + 1),
        "step decay": lambda o: StepLR(o, step_size=steps // 3, gamma=0.1),
        "triangular": lambda o: CyclicLR(
            o, lr / 10, lr, cycle // 2, cycle - cycle // 2, base_momentum=0.85, max_momentum=0.95
        ),
        "SGDR": lambda o: CosineAnnealingWarmRestarts(o, T_0=cycle),
        "decaying SGDR": lambda o: DecayingWarmRestarts(o, T_0=cycle, decay=0.7),
    }


def train(data: Digits, lr: float, build: Callable[[Optimizer], LRScheduler], seed: int, epochs: int) -> Run:
    """Train a new network with Adam, and collect snapshots."""
    model, loss_of = network(seed), nn.CrossEntropyLoss()
    optimizer = fusedopt.Adam(model.parameters(), lr=lr)
    scheduler = build(optimizer)
    run = Run(SnapshotEnsemble(model))
    has_cycles = isinstance(scheduler, (CyclicLR, CosineAnnealingWarmRestarts))
    for _ in range(epochs):
        losses = []
        for inputs, targets in data.batches():
            loss = loss_of(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            run.lrs.append(optimizer.param_groups[0]["lr"])
            scheduler.step()
            if has_cycles and run.snapshots.update(scheduler):
                run.ends.append(len(run.lrs))
        run.losses.append(statistics.fmean(losses))
        model.eval()
        with torch.no_grad():
            run.accuracies.append(data.accuracy(model(data.held_out)))
        model.train()
    if has_cycles:
        run.members = [data.accuracy(prediction) for prediction in run.snapshots.predictions(data.held_out)]
        run.ensemble = data.accuracy(run.snapshots(data.held_out))
    return run


def run(quick: bool) -> study.Study:
    """Find a rate, train by six schedules, and average the snapshots."""
    data = load()
    epochs, seeds = (15, SEEDS[:2]) if quick else (60, SEEDS)
    found = find_rate(data)
    lr = found.suggestion()
    steps = epochs * len(data.batches())
    runs = {
        name: [train(data, lr, build, seed, epochs) for seed in seeds] for name, build in schedules(lr, steps).items()
    }
    return study.Study(
        title="Setting the learning rate: a range test, schedules, snapshots",
        question=(
            "Which rate, and what should become of it during the training? An LR range test (Smith 2015) suggests one,"
            " cycles (Smith) and warm restarts (SGDR, Loshchilov and Hutter 2016) change it, and a snapshot ensemble"
            " (Huang et al. 2017) makes use of every restart."
        ),
        findings=findings(lr, runs),
        tables=(by_schedule(runs), by_seed(runs["SGDR"])),
        figure=draw(found, runs),
    )


def final(runs: Sequence[Run]) -> list[float]:
    """The held-out accuracy of each at its end."""
    return [each.accuracies[-1] for each in runs]


def holds(run: Run) -> bool:
    """Whether the ensemble is as good as its best member, which is chosen with hindsight."""
    return run.ensemble >= max(run.members)


def findings(lr: float, runs: dict[str, list[Run]]) -> str:
    means = {name: statistics.fmean(final(of)) for name, of in runs.items()}
    best = max((name for name in means if "fixed" not in name), key=means.__getitem__)
    first, *_ = sgdr = runs["SGDR"]
    return (
        f"Fixed at the range test's {lr:.2g} the training ends at {means['fixed']:.1f} % held-out accuracy (mean of"
        f" {len(sgdr)} seeds), at a third of it at {means['fixed, a third']:.1f} %, and with the best schedule that has"
        f" this peak, {best}, at {means[best]:.1f} %. For seed 0 the"
        f" ensemble of the SGDR run's {len(first.members)} snapshots is right on {first.ensemble:.1f} %,"
        f" {'no less' if holds(first) else 'less'} than its best snapshot's {max(first.members):.1f} %, and it is no"
        f" worse than that for {sum(map(holds, sgdr))} of the {len(sgdr)} seeds."
    )


def by_schedule(runs: dict[str, list[Run]]) -> study.Table:
    rows = []
    for name, of in runs.items():
        accuracies = final(of)
        figures = [statistics.fmean(accuracies), statistics.stdev(accuracies), min(accuracies), max(accuracies)]
        if of[0].members:
            figures.append(statistics.fmean(each.ensemble for each in of))
        cells = [f"{figure:.2f}" for figure in figures] + [""] * (5 - len(figures))
        rows.append((name, f"{statistics.fmean(each.losses[-1] for each in of):.3f}", *cells))
    title = "After the last step: training loss, and held-out accuracy in % over the seeds (spread: standard deviation)"
    return study.Table(title, ("schedule", "loss", "mean", "spread", "worst", "best", "snapshots' ensemble"), rows)


def by_seed(runs: Sequence[Run]) -> study.Table:
    rows = [
        (f"{seed}", *(f"{member:.2f}" for member in each.members), f"{max(each.members):.2f}", f"{each.ensemble:.2f}")
        for seed, each in zip(SEEDS, runs, strict=False)
    ]
    columns = ("seed", *(f"snapshot {i + 1}" for i in range(CYCLES)), "best of them", "ensemble")
    return study.Table("Held-out accuracy in % of the SGDR runs' snapshots (the best: with hindsight)", columns, rows)


def draw(found: RangeTest, runs: dict[str, list[Run]]) -> Figure:
    """The range test, the rates, the course of the training, and the snapshots."""
    figure = Figure(figsize=(12, 8.5), layout="constrained")
    (test, rates), (errors, snapshots) = figure.subplots(2, 2)
    found.plot(test)
    sgdr = runs["SGDR"]
    epochs = len(sgdr[0].accuracies)
    per_epoch = len(sgdr[0].lrs) / epochs
    for name, of in runs.items():
        rates.plot([step / per_epoch for step in range(len(of[0].lrs))], of[0].lrs, color=COLORS[name], label=name)
        error = [
            100 - statistics.fmean(accuracies) for accuracies in zip(*(each.accuracies for each in of), strict=True)
        ]
        errors.plot(range(1, epochs + 1), error, color=COLORS[name])
    ensemble = 100 - statistics.fmean(each.ensemble for each in sgdr)
    errors.plot(epochs, ensemble, "k*", markersize=13)
    note = {"xytext": (-10, -14), "textcoords": "offset points", "ha": "right", "backgroundcolor": "white"}
    errors.annotate("ensemble of SGDR's snapshots", (epochs, ensemble), **note)
    for axes in (rates, errors):
        for end in sgdr[0].ends:
            axes.axvline(end / per_epoch, color="black", linestyle=":", linewidth=0.8, zorder=0, label="ends of cycles")
        axes.set_xlabel("epoch")
    errors.set_yscale("log")
    errors.set_ylim(bottom=0.8 * ensemble)
    errors.yaxis.set_major_formatter("{x:g}")
    errors.yaxis.set_minor_formatter("{x:g}")
    draw_snapshots(snapshots, sgdr)
    test.set_title("The range test suggests a rate")
    rates.set(title="The schedules", ylabel="learning rate")
    errors.set(title=f"Held-out error, mean of {len(sgdr)} seeds", ylabel="error (%)")
    legend = dict(zip(*reversed(rates.get_legend_handles_labels()), strict=True))
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=len(legend))
    return figure


def draw_snapshots(axes: Axes, runs: Sequence[Run]) -> None:
    """The members of each seed as dots, and their ensemble as a bar across them."""
    dots: dict[str, Any] = {"color": "#7f7f7f", "s": 28, "zorder": 2}
    for i, each in enumerate(runs):
        shifts = [i + 0.12 * (j - (len(each.members) - 1) / 2) for j in range(len(each.members))]
        axes.scatter(shifts, each.members, label="snapshots, cycle by cycle" if i == 0 else None, **dots)
        axes.hlines(
            each.ensemble, i - 0.38, i + 0.38, color="black", linewidth=3, label="their ensemble" if i == 0 else None
        )
    axes.set_xticks(range(len(runs)), [f"seed {seed}" for seed in SEEDS[: len(runs)]])
    axes.set(title="Snapshots of the SGDR runs", ylabel="held-out accuracy (%)")
    axes.margins(y=0.2)  # room for the legend
    axes.legend(loc="lower center", ncols=2)


if __name__ == "__main__":
    study.main(run)
