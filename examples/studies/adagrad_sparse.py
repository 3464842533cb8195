"""When are Adagrad's rates, one for each feature, worth it?

    python examples/studies/adagrad_sparse.py

Adagrad (Duchi, Hazan and Singer, JMLR 12, 2011) was made for sparse features: a rare one has had few gradients, so its
sum of squares is small and its rate still large. Three problems, each optimizer with the best lr of the same grid:

 - a linear regression (scikit-learn's diabetes data in batches of 10, in place of the airfoil data of Dive into Deep
   Learning, 12.7): no feature is rare, and the exact least-squares loss is the floor;
 - a network of three hidden layers (scikit-learn's digits): does a rate that can only shrink stop it before Adam?
 - text: from which module of Python's standard library are these ten lines? A linear model of the words, with sparse
   gradients. Of each file's chunks three fifths are learned, one chooses the lr, and one is held out.

Look at the lower row: who is ahead after one pass and at the end; on which chunks; and the rate of each word.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import study
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_diabetes, load_digits
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.preprocessing import scale
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.utils.rnn import pad_sequence
from torch.optim import SGD, Optimizer, SparseAdam

import fusedopt

DENSE = {"Adagrad": fusedopt.Adagrad, "Adam": fusedopt.Adam, "SGD": SGD}
SPARSE = {"Adagrad": fusedopt.Adagrad, "SparseAdam": SparseAdam, "SGD": SGD}
COLOURS = {"Adagrad": "#d55e00", "Adam": "#0072b2", "SparseAdam": "#0072b2", "SGD": "#666666"}
DENSE_LRS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
SPARSE_LRS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
SEEDS = 3  # dense: chance decides much in a network
LOOKS = 5  # at the text's model in a pass
LINES = 10  # of a chunk of text
GROUPS = {"0-3": (0, 3), "4-10": (4, 10), "11-30": (11, 30), "> 30": (31, 10**9)}  # words by frequency


class Task(NamedTuple):
    """What is to be learned."""

    model: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    inputs: Tensor
    targets: Tensor
    batch: int


class Look(NamedTuple):
    """What is seen of a training at one time."""

    score: float  # chooses the lr: the less the better
    rates: Tensor  # Adagrad's own
    right: Tensor | None = None  # for each held-out example: is it named rightly?


class Run(NamedTuple):
    """A training from its start to its last look."""

    lr: float
    looks: list[Look]

    @property
    def score(self) -> float:
        """The mean over the last fifth of the looks, since batches make noise; infinite if the training diverged."""
        last = self.looks[-max(1, len(self.looks) // 5) :]
        return float(np.nan_to_num(np.mean([look.score for look in last]), nan=np.inf))


Runs = dict[str, Run]  # of each optimizer, the one with the best lr


def train(
    task: Task,
    build: Callable[..., Optimizer],
    lr: float,
    passes: int,
    look: Callable[[nn.Module, Optimizer], Look],
    looks: int = 1,
    seed: int = 0,
) -> Run:
    """Learn for some passes, with so many looks in each. The seed gives the first weights and the examples' order."""
    torch.manual_seed(seed)
    model = task.model()
    optimizer = build(model.parameters(), lr=lr)
    seen = []
    for _ in range(passes):
        batches = torch.randperm(len(task.inputs)).split(task.batch)
        times = {round(len(batches) * (i + 1) / looks) for i in range(looks)}
        for step, batch in enumerate(batches, 1):
            optimizer.zero_grad()
            task.loss(model(task.inputs[batch]), task.targets[batch]).backward()
            optimizer.step()
            if step in times:
                with torch.no_grad():
                    seen.append(look(model, optimizer))
    return Run(lr, seen)


def best(runs: Iterable[Run]) -> Run:
    return min(runs, key=lambda run: run.score)


def own_rates(optimizer: Optimizer, param: Tensor) -> Tensor:
    """What Adagrad multiplies the gradient of each element with; NaN for other optimizers."""
    if not isinstance(optimizer, fusedopt.Adagrad):
        return torch.full_like(param, torch.nan)
    group = optimizer.param_groups[0]
    return group["lr"] / (optimizer.state[param]["sum"].sqrt() + group["eps"])


# --- a linear regression, and a network -----------------------------------------------------------


def learn_dense(task: Task, passes: int, lrs: Sequence[float]) -> Runs:
    """Medians over the seeds. The score is the loss over all examples, the rate the median of the last layer's."""

    def look(model: nn.Module, optimizer: Optimizer) -> Look:
        *_, weight, _ = model.parameters()
        loss = task.loss(model(task.inputs), task.targets)
        return Look(loss.item(), own_rates(optimizer, weight).median())

    def learn(build: Callable[..., Optimizer], lr: float) -> Run:
        runs = [train(task, build, lr, passes, look, seed=seed).looks for seed in range(SEEDS)]
        return Run(lr, [Look(*np.median([look[:2] for look in looks], 0)) for looks in zip(*runs, strict=True)])

    return {name: best(learn(build, lr) for lr in lrs) for name, build in DENSE.items()}


def regression(passes: int, lrs: Sequence[float]) -> Runs:
    """The score says by which part the loss exceeds that of least squares."""
    x, y = (scale(values) for values in load_diabetes(return_X_y=True))
    floor = np.linalg.lstsq(x, y, rcond=None)[1].item() / len(y)
    x, y = torch.tensor(x).float(), torch.tensor(y).float()[:, None]
    # Half the squared error, as in the textbook.
    task = Task(lambda: nn.Linear(10, 1), lambda output, target: mse_loss(output, target) / 2, x, y, batch=10)
    runs = learn_dense(task, passes, lrs)
    return {
        name: Run(run.lr, [look._replace(score=2 * look.score / floor - 1) for look in run.looks])
        for name, run in runs.items()
    }


def network(passes: int, lrs: Sequence[float]) -> Runs:
    x, y = map(torch.tensor, load_digits(return_X_y=True))

    def model() -> nn.Module:
        hidden = [layer for _ in range(3) for layer in (nn.Linear(64, 64), nn.ReLU())]
        return nn.Sequential(*hidden, nn.Linear(64, 10))

    return learn_dense(Task(model, cross_entropy, x.float() / 16, y, batch=128), passes, lrs)


# --- text -----------------------------------------------------------------------------------------


class Text(NamedTuple):
    """Chunks of source: each one's words, every word once."""

    words: Tensor  # (chunks, most words of a chunk): their numbers, filled up with the size of the vocabulary
    module: Tensor  # (chunks,): where it comes from
    part: Tensor  # (chunks,): 0 is held out, 1 chooses the lr, 2 to 4 are learned
    frequency: Tensor  # (vocabulary,): in how many learned chunks a word is
    telling: Tensor  # (chunks,): the frequency of the word that tells the chunk's module best; 0 if none does


def load_text(modules: int) -> Text:
    """The largest modules of the standard library, but none with a _ in front: some of these belong to one machine."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(folder.glob("[!_]*.py"), key=lambda path: (-path.stat().st_size, path.name))[:modules]
    if len(files) < modules:
        raise SystemExit(f"{modules} modules of Python's standard library are needed, {folder} has {len(files)}")
    chunks, where = [], []
    for number, path in enumerate(files):
        lines = path.read_text("utf-8", errors="replace").splitlines()
        starts = range(0, len(lines), LINES)
        chunks += ["\n".join(lines[start : start + LINES]) for start in starts]
        where += [(number, i % 5) for i in range(len(starts))]
    module, part = torch.tensor(where).T

    learned = part >= 2
    vectorizer = CountVectorizer(binary=True).fit([chunks[i] for i in learned.nonzero()])
    table = vectorizer.transform(chunks)
    vocabulary = table.shape[1]
    rows = [torch.from_numpy(row).long() for row in np.split(table.indices, table.indptr[1:-1])]
    words = pad_sequence(rows, batch_first=True, padding_value=vocabulary)

    counts = torch.zeros(modules, vocabulary + 1)  # the learned chunks of a module that a word is in
    counts.index_put_((module[learned, None], words[learned]), torch.ones(()), accumulate=True)
    counts[:, vocabulary] = 0
    frequency = counts.sum(0)
    # The share of a word's chunks that are this module's; the 1 lowers that of a word that was hardly seen.
    purity, place = (counts[module[:, None], words] / (frequency[words] + 1)).max(1, keepdim=True)
    telling = torch.where(purity > 0, frequency[words.gather(1, place)], 0)
    return Text(words, module, part, frequency[:vocabulary], telling[:, 0])


def text_model(text: Text) -> nn.EmbeddingBag:
    """The scores of the modules are the sums of what the words say for each; a row belongs to a word."""
    vocabulary, modules = len(text.frequency), int(text.module.max()) + 1
    model = nn.EmbeddingBag(vocabulary + 1, modules, mode="sum", padding_idx=vocabulary, sparse=True)
    nn.init.zeros_(model.weight)
    return model


def learn_text(text: Text, passes: int, lrs: Sequence[float]) -> tuple[Runs, Runs]:
    """The runs with the best lr for one pass, and with the best lr for all.

    The score is the share of wrong answers where the lr is chosen; a word's rate is by the mean of its row's sums.
    """
    learned, choosing, held_out = text.part >= 2, text.part == 1, text.part == 0
    task = Task(lambda: text_model(text), cross_entropy, text.words[learned], text.module[learned], batch=32)

    def look(model: nn.Module, optimizer: Optimizer) -> Look:
        chosen, right = (model(text.words[part]).argmax(1) == text.module[part] for part in (choosing, held_out))
        return Look(1 - share(chosen), own_rates(optimizer, model.weight)[:-1].pow(-2).mean(1).rsqrt(), right)

    runs = {name: [train(task, build, lr, passes, look, LOOKS) for lr in lrs] for name, build in SPARSE.items()}
    once = {name: best(Run(run.lr, run.looks[:LOOKS]) for run in each) for name, each in runs.items()}
    return once, {name: best(each) for name, each in runs.items()}


def share(yes: Tensor) -> float:
    return yes.float().mean().item()


def by_group(frequency: Tensor, values: Tensor) -> list[Tensor]:
    """The values, parted by how frequent their words are."""
    return [values[(frequency >= low) & (frequency <= high)] for low, high in GROUPS.values()]


def accuracies(text: Text, run: Run) -> list[float]:
    """The share of right answers at the end: of all, and by the frequency of the word that tells most."""
    right = run.looks[-1].right
    return [share(right), *map(share, by_group(text.telling[text.part == 0], right))]


# --- the picture ----------------------------------------------------------------------------------


def draw_runs(axes: Axes, runs: Runs, what: Callable[[Look], float], looks: int = 1) -> None:
    for name, run in runs.items():
        passes = np.arange(1, len(run.looks) + 1) / looks
        axes.plot(passes, [what(look) for look in run.looks], color=COLOURS[name], label=f"{name}, lr {run.lr:g}")
    axes.set_xlabel("passes over the examples")


def draw(linear: Runs, deep: Runs, once: Runs, full: Runs, text: Text) -> Figure:
    figure = Figure(figsize=(14, 8.4), layout="constrained")
    (excess, losses, shrinking), (answers, groups, words) = figure.subplots(2, 3)
    colour, rate = COLOURS["Adagrad"], "lr / (sqrt(sum) + eps)"

    draw_runs(excess, linear, lambda look: 100 * look.score)
    excess.set(yscale="log", ylabel="loss above that of least squares, %", title="Regression: ten dense features")
    draw_runs(losses, deep, lambda look: look.score)
    losses.set(yscale="log", ylabel="training loss", title="Network")
    medians = np.array([look.rates for look in deep["Adagrad"].looks])
    x = np.arange(1, len(medians) + 1)
    shrinking.loglog(x, medians, color=colour, label="Adagrad, median of the last layer")
    shrinking.loglog(x, medians[0] / np.sqrt(x), "k:", label="1 / sqrt(passes)")
    shrinking.set(xlabel="passes over the examples", ylabel=rate, title="Network: Adagrad's own rate")

    draw_runs(answers, full, lambda look: 100 * share(look.right), LOOKS)
    answers.set(ylabel="held-out chunks named rightly, %", title="Text: sparse features")
    for runs, style, label in ((once, "o-", "after one pass"), (full, "^--", "after all passes")):
        for name, run in runs.items():
            groups.plot(list(GROUPS), 100 * np.array(accuracies(text, run)[1:]), style, color=COLOURS[name])
        groups.plot([], [], f"k{style}", label=label)
    groups.set(xlabel="learned chunks with the word that tells most", ylabel="held-out chunks named rightly, %")
    groups.set_title("Text: what rare words tell, and frequent ones")
    own, frequency = full["Adagrad"].looks[-1].rates.numpy(), text.frequency.numpy()
    words.loglog(frequency, own, ".", color=colour, ms=3, alpha=0.2, rasterized=True)
    words.loglog([], [], "o", color=colour, label="Adagrad, one word")
    words.axhline(full["SGD"].lr, color=COLOURS["SGD"], label="SGD, all words")
    x = np.array([1, frequency.max()])
    level = np.median((own * np.sqrt(frequency))[frequency > 30])
    words.loglog(x, level / np.sqrt(x), "k:", label="1 / sqrt(chunks)")
    words.set(xlabel="learned chunks with the word", ylabel=rate, title="Text: Adagrad's own rates")
    for axes in figure.axes:
        axes.legend()
    return figure


# --- what is told ---------------------------------------------------------------------------------


def percent(values: Iterable[float]) -> list[str]:
    return [f"{100 * value:.1f}" for value in values]


def listed(names: Iterable[str], values: Iterable[float]) -> str:
    return ", ".join(f"{name} {value} %" for name, value in zip(names, percent(values), strict=True))


def run(quick: bool) -> study.Study:
    """Adagrad, Adam and SGD in a linear regression, in a network, and on sparse text."""
    every = 2 if quick else 1
    linear = regression(2 if quick else 15, DENSE_LRS[::every])
    deep = network(2 if quick else 30, DENSE_LRS[::every])
    text, passes = load_text(8 if quick else 50), 2 if quick else 4
    once, full = learn_text(text, passes, SPARSE_LRS[every - 1 :: every])

    early, late = ({name: accuracies(text, run) for name, run in runs.items()} for runs in (once, full))
    answers = [
        [name, f"{after}", f"{runs[name].lr:g}", *percent(right)]
        for after, runs, rights in ((1, once, early), (passes, full, late))
        for name, right in rights.items()
    ]
    own = [f"{rates.median():.2g}" for rates in by_group(text.frequency, full["Adagrad"].looks[-1].rates)]
    dense = [
        [name, f"{run.lr:g}", *percent([run.score]), f"{deep[name].lr:g}", f"{deep[name].score:.2g}"]
        for name, run in linear.items()
    ]
    _, rare, *_, frequent = 100 * np.subtract(early["Adagrad"], early["SGD"])
    early_all, late_all = (listed(SPARSE, (right[0] for right in rights.values())) for rights in (early, late))
    seen = deep["Adagrad"].looks
    middle, end = seen[(len(seen) - 1) // 2], seen[-1]
    findings = (
        f"After one pass over sparse text {early_all} of the held-out chunks are named rightly, Adagrad against SGD "
        f"{rare:+.1f} points where the word that tells most is in at most 3 learned chunks, {frequent:+.1f} where it "
        f"is in more than 30; after {passes} passes {late_all}. Where no feature is rare, the regression ends above "
        f"least squares by {listed(DENSE, (linear[name].score for name in DENSE))}, and the network with "
        f"{deep['Adagrad'].score / deep['Adam'].score:.2g} times Adam's loss, while in the second half of its passes "
        f"Adagrad's rate falls by {1 - end.rates / middle.rates:.0%}, its loss by {1 - end.score / middle.score:.0%}."
    )
    by_frequency = "by how many learned chunks have the"
    held_out = text.telling[text.part == 0]
    sizes = map(len, by_group(held_out, held_out))
    tables = [
        study.Table(
            f"Held-out chunks named rightly, %: all, and {by_frequency} word that tells most (how many these are)",
            [
                "",
                "passes",
                "lr",
                f"all {len(held_out)}",
                *(f"{name}: {n}" for name, n in zip(GROUPS, sizes, strict=True)),
            ],
            answers,
        ),
        study.Table(f"Adagrad's own rates, medians, {by_frequency} word", ["", *GROUPS], [["Adagrad", *own]]),
        study.Table(
            "Regression: loss above that of least squares; network: training loss",
            ["", "regression: lr", "excess, %", "network: lr", "loss"],
            dense,
        ),
    ]
    return study.Study(
        title="Adagrad and rare features",
        question="Adagrad keeps a larger rate for features that are rare (Duchi, Hazan and Singer 2011): when is that "
        "worth it, in a linear regression, in a network, in a bag of words?",
        findings=findings,
        tables=tables,
        figure=draw(linear, deep, once, full, text),
    )


if __name__ == "__main__":
    study.main(run)
