"""Which 8-bit code, and which block size, Adam's state should have: a simulation in plain PyTorch.

    python -m benchmarks.codes            # the tables, and benchmarks/results/codes.json
    python -m benchmarks.codes --quick

A step computes in float32 from the decoded state, updates from what it computed, and only then encodes: an error is
seen one step later. Four questions:

- updates: fed with the gradients of a small GPT that float32 Adam trains, how far are the updates from Adam's?
- decay: of an element without gradients among neighbours that have some, does exp_avg_sq follow beta2**t, and does
  exp_avg vanish?
- faint: what becomes of an element whose gradients are far smaller than its neighbours'?
- training: what does the same GPT, but smaller, learn when its own optimizer has such a state?
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
import corpus
from gpt import GPT, Shape

RESULTS = Path(__file__).resolve().parent / "results" / "codes.json"

BLOCKS = (32, 64, 128, 256, 2048)
LARGEST_BLOCK = max(BLOCKS)  # across rows, as bitsandbytes has it; the others stay within one
PAIRED = (64, 128)  # what both moments together are measured with
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
LR = 3e-3  # the peak; where losses are compared a third of it, for they part less by chance then
NEAREST, STOCHASTIC = "nearest", "stochastic"
ROUNDINGS = (NEAREST, STOCHASTIC)
TINY = torch.finfo(torch.float32).tiny


# --- the codes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Code:
    """What one byte can say, times the block's scale; without a sign bit if not signed."""

    name: str
    signed: bool

    @property
    def largest(self) -> float:
        raise NotImplementedError

    @property
    def smallest(self) -> float:
        """The least positive value."""
        raise NotImplementedError

    def round(self, y: Tensor, draw: Tensor | float) -> Tensor:
        """y >= 0 to a value of the code: down, but up where its fraction and the draw in (0, 1) add up to 1."""
        raise NotImplementedError


@dataclass(frozen=True)
class Linear(Code):
    """Integers; `root`: of the square root."""

    root: bool = False

    @property
    def largest(self) -> float:
        return 127.0 if self.signed else 255.0

    @property
    def smallest(self) -> float:
        return 1.0

    def round(self, y: Tensor, draw: Tensor | float) -> Tensor:
        return (y + draw).floor_()


@dataclass(frozen=True)
class Small(Code):
    """A small float with subnormals and neither infinity nor NaN, whose largest value lies in [1, 2)."""

    exponent: int
    mantissa: int

    @property
    def bias(self) -> int:
        return 2**self.exponent - 1

    @property
    def largest(self) -> float:
        return 2.0 - 2.0**-self.mantissa

    @property
    def smallest(self) -> float:
        return 2.0 ** (1 - self.bias - self.mantissa)

    def round(self, y: Tensor, draw: Tensor | float) -> Tensor:
        powers = (y.view(torch.int32) & 0x7F800000).clamp_(min=(128 - self.bias) << 23)  # 2**(1 - bias) at least
        ulp = powers.view(torch.float32) * 2.0**-self.mantissa
        return (y / ulp).add_(draw).floor_().mul_(ulp)


@dataclass(frozen=True)
class Tree(Code):
    """The dynamic tree of Dettmers et al. 2021 (8-bit Optimizers via Block-wise Quantization), in powers of ten.

    That one has no -1. This one has, and so a value more than a byte can say: a yardstick may.
    """

    @cached_property
    def values(self) -> Tensor:
        values = [torch.tensor([0.0, 1.0])]
        for exponent in range(-6, 1):
            edges = torch.linspace(0.1, 1, 2 ** (exponent + (6 if self.signed else 7)) + 1)
            values.append((edges[1:] + edges[:-1]) / 2 * 10.0**exponent)
        return torch.cat(values).sort().values

    @property
    def largest(self) -> float:
        return 1.0

    @property
    def smallest(self) -> float:
        return float(self.values[1])

    def round(self, y: Tensor, draw: Tensor | float) -> Tensor:
        below = torch.bucketize(y, self.values[1:-1], right=True)
        low, high = self.values[below], self.values[1:][below]
        return torch.where((y - low) / (high - low) + draw >= 1, high, low)


def small(name: str) -> Small:
    exponent, mantissa = int(name[1]), int(name[3])
    return Small(name, exponent + mantissa == 7, exponent, mantissa)


AVG_CODES: tuple[Code, ...] = (
    Linear("linear", True),
    small("E2M5"),
    small("E3M4"),
    small("E4M3"),
    small("E5M2"),
    Tree("tree", True),
)
SQ_CODES: tuple[Code, ...] = (
    Linear("linear", False),
    Linear("linear root", False, root=True),
    small("E3M5"),
    small("E4M4"),
    small("E5M3"),
    Tree("tree", False),
)


@dataclass(frozen=True)
class Form:
    """How one moment is stored; with `floor`, never a positive value as zero."""

    code: Code
    block: int
    rounding: str
    floor: bool = False

    def store(self, x: Tensor, draws: Tensor) -> Tensor:
        """What is read back; x has a multiple of `block` elements."""
        root = isinstance(self.code, Linear) and self.code.root
        blocks = (x.sqrt() if root else x).view(-1, self.block)
        magnitudes = blocks.abs()
        scales = magnitudes.amax(1, keepdim=True) * (1 / self.code.largest)
        usable = scales >= TINY
        inverses = torch.where(usable, 1 / scales, 0.0)
        draw = 0.5 if self.rounding == NEAREST else draws.view(-1, self.block)
        values = self.code.round(magnitudes * inverses, draw).clamp_(max=self.code.largest)
        if self.floor:
            values = torch.where(magnitudes > 0, values.clamp(min=self.code.smallest), values)
        values = (values * torch.where(usable, scales, 0.0)).copysign_(blocks)
        return (values.square_() if root else values).view_as(x)


def draw_pair(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """For each moment the 16 random bits of every element, as fractions."""
    bits = torch.randint(2**16, (count,), generator=generator)
    first, second = ((bits * 40503**k % 2**16).float().add_(0.5).mul_(2.0**-16) for k in (1, 2))
    return first, second


def check() -> None:
    """Raise AssertionError unless the codes have their values, and the stochastic rounding no bias."""
    generator = torch.Generator().manual_seed(0)
    for code in AVG_CODES + SQ_CODES:
        if isinstance(code, Small):
            m, bias = code.mantissa, code.bias
            normal = [(1 + (f % 2**m) / 2**m) * 2.0 ** ((f >> m) - bias) for f in range(2**m, 2 ** (code.exponent + m))]
            values = torch.tensor([f * 2.0 ** (1 - bias - m) for f in range(2**m)] + normal)
        elif isinstance(code, Tree):
            values = code.values
            assert len(values) == (129 if code.signed else 256)
        else:
            values = torch.arange(code.largest + 1)
        assert values[0] == 0 and float(values[1]) == code.smallest and float(values[-1]) == code.largest, code
        draws = draw_pair(len(values), generator)[0]
        for draw in (0.5, draws):
            assert torch.equal(code.round(values, draw), values), f"{code}: not all values are there"
        y = torch.rand(64, generator=generator).pow(3) * code.largest
        wide = y.repeat(2**14, 1)
        rounded = code.round(wide.flatten(), draw_pair(wide.numel(), generator)[0]).view_as(wide)
        assert torch.isin(rounded, values).all(), f"{code}: other values"
        gaps = values[1:].sub(values[:-1])[torch.bucketize(y, values[1:-1], right=True)]
        assert ((rounded.double().mean(0) - y).abs() < gaps * 0.025).all(), f"{code}: biased"  # 6 sigma


# --- the GPT -------------------------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, peak: float = LR) -> float:
    """As in examples/train_gpt.py: warms up over the first twentieth, then falls along a cosine to a tenth."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))))


class Training:
    """A GPT whose parameters lie in one row, the matrices first; it goes through clipped gradients."""

    def __init__(self, text: corpus.Corpus, width: int, layers: int, seed: int, *, batch: int = 8) -> None:
        torch.manual_seed(seed)
        self.model = GPT(Shape(corpus.VOCABULARY, 64, layers, 4, width))
        self.text, self.batch = text.train, batch
        self.generator = torch.Generator().manual_seed(seed)
        params = sorted(self.model.parameters(), key=lambda param: param.ndim < 2)
        self.weights = torch.cat([param.detach().flatten() for param in params])
        self.grad = torch.zeros_like(self.weights)
        self.matrices = sum(param.numel() for param in params if param.ndim >= 2)  # vectors keep their float32 state
        start = 0
        for param in params:
            end = start + param.numel()
            param.data = self.weights[start:end].view_as(param)
            param.grad = self.grad[start:end].view_as(param)
            start = end

    def backward(self) -> float:
        """Make the gradient of the next batch; the loss."""
        batch = corpus.random_batch(self.text, self.batch, self.model.shape.context, self.generator)
        self.grad.zero_()
        loss = self.model.loss(batch.tokens, batch.targets)
        loss.backward()  # type: ignore[no-untyped-call]
        self.grad.mul_((1 / (self.grad.norm() + 1e-6)).clamp(max=1.0))
        return loss.item()


def adam_update(avg: Tensor, sq: Tensor, step: int) -> Tensor:
    return avg / (1 - BETA1**step) / (sq / (1 - BETA2**step)).sqrt_().add_(EPS)


# --- updates -------------------------------------------------------------------------------------------------------


@dataclass
class Deviation:
    """How far updates are from the exact ones, over all measured steps."""

    different: float = 0.0
    exact: float = 0.0
    count: int = 0
    off: int = 0
    excessive: int = 0
    worst: float = 0.0

    def add(self, update: Tensor, exact: Tensor, rms: Tensor) -> None:
        """An update near zero is no outlier where it is twice as large, hence the rms."""
        difference, magnitude = (update - exact).abs_(), exact.abs()
        self.different += float(difference.square().sum(dtype=torch.float64))
        self.exact += float(magnitude.square().sum(dtype=torch.float64))
        self.count += update.numel()
        self.off += int((difference > 0.1 * magnitude).sum())
        excess = update.abs().div_(magnitude.clamp_(min=rms))
        self.excessive += int((excess > 2).sum())
        self.worst = max(self.worst, float(excess.max()))

    def row(self) -> dict[str, float]:
        return {
            "error": math.sqrt(self.different / self.exact),
            "off_by_10_percent": self.off / self.count,
            "exceed_2x": self.excessive / self.count,
            "worst_excess": self.worst,
        }


@dataclass
class Moment:
    """One moment, stored in one form."""

    form: Form
    value: Tensor
    alone: Deviation = field(default_factory=Deviation)  # with the other moment exact


def describe(form: Form) -> dict[str, Any]:
    return {"code": form.code.name, "block": form.block, "rounding": form.rounding, "floor": form.floor}


def updates(text: corpus.Corpus, quick: bool) -> tuple[list[dict[str, Any]], ...]:
    """Each form of each moment with the other exact; both moments in all pairs of forms; and how wide the blocks are.

    Blocks lie within a row, so a sample of rows has what all have: of every `stride` runs of 2048 elements one.
    """
    steps, stride, first, every = (60, 32, 20, 10) if quick else (400, 16, 50, 10)
    training = Training(text, width=256, layers=1, seed=0)
    generator = torch.Generator().manual_seed(1)
    runs = training.matrices // LARGEST_BLOCK
    sample = torch.randperm(runs, generator=generator)[: runs // stride]
    zeros = torch.zeros(len(sample) * LARGEST_BLOCK)
    exact = torch.zeros_like(training.weights), torch.zeros_like(training.weights)
    avgs = [Moment(Form(*form), zeros.clone()) for form in product(AVG_CODES, BLOCKS, ROUNDINGS)]
    sqs = [Moment(Form(*form), zeros.clone()) for form in product(SQ_CODES, BLOCKS, ROUNDINGS, (False, True))]
    pairs = {
        (i, j): Deviation()
        for (i, avg), (j, sq) in product(enumerate(avgs), enumerate(sqs))
        if sq.form.floor and sq.form.block in PAIRED
        if (avg.form.block, avg.form.rounding) == (sq.form.block, sq.form.rounding)
    }

    def sampled(row: Tensor) -> Tensor:
        return row[: training.matrices].view(runs, LARGEST_BLOCK)[sample].flatten()

    for step in range(1, steps + 1):
        training.backward()
        grad = training.grad
        exact[0].lerp_(grad, 1 - BETA1)
        exact[1].mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
        training.weights.sub_(adam_update(*exact, step), alpha=learning_rate(step - 1, steps))
        grad = sampled(grad)
        square = grad.square().mul_(1 - BETA2)
        for moment in avgs:
            moment.value.lerp_(grad, 1 - BETA1)
        for moment in sqs:
            moment.value.mul_(BETA2).add_(square)
        if step >= first and step % every == 0:
            avg, sq = (sampled(row) for row in exact)
            right = adam_update(avg, sq, step)
            rms = right.square().mean().sqrt()
            for moment in avgs:
                moment.alone.add(adam_update(moment.value, sq, step), right, rms)
            for moment in sqs:
                moment.alone.add(adam_update(avg, moment.value, step), right, rms)
            for (i, j), deviation in pairs.items():
                deviation.add(adam_update(avgs[i].value, sqs[j].value, step), right, rms)
        draws = draw_pair(len(zeros), generator)
        for draw, moments in zip(draws, (avgs, sqs), strict=True):
            for moment in moments:
                moment.value = moment.form.store(moment.value, draw)

    alone = [
        {"moment": name, **describe(moment.form), **moment.alone.row()}
        for name, moments in (("exp_avg", avgs), ("exp_avg_sq", sqs))
        for moment in moments
    ]
    both = [
        {**describe(avgs[i].form), "code": avgs[i].form.code.name, "sq_code": sqs[j].form.code.name, **found.row()}
        for (i, j), found in pairs.items()
    ]
    wide = []
    for block in BLOCKS:
        blocks = sampled(exact[1]).view(-1, block)
        ratios = (blocks / blocks.amax(1, keepdim=True)).sqrt_().flatten()
        shares = torch.tensor([0.0, 0.001, 0.01, 0.5])
        wide.append(
            {
                "block": block,
                "quantiles": dict(zip(("0", "0.001", "0.01", "0.5"), ratios.quantile(shares).tolist(), strict=True)),
            }
        )
    return alone, both, wide


# --- decay ---------------------------------------------------------------------------------------------------------


def decay(quick: bool) -> list[dict[str, Any]]:
    """One element of each block has no more gradients: its exp_avg_sq after so many steps, of the exact one."""
    steps, blocks, block = 3000, 64 if quick else 256, 64
    generator = torch.Generator().manual_seed(2)
    moments = [
        Moment(Form(code, block, rounding, True), torch.ones(blocks * block))
        for code, rounding in product(SQ_CODES, ROUNDINGS)
    ]
    found: list[dict[str, Any]] = [describe(moment.form) for moment in moments]
    for step in range(1, steps + 1):
        square = torch.randn(blocks, block, generator=generator).square_().mul_(1 - BETA2)
        square[:, 0] = 0
        draw = draw_pair(blocks * block, generator)[1]
        for moment, row in zip(moments, found, strict=True):
            moment.value = moment.form.store(moment.value.mul_(BETA2).add_(square.flatten()), draw)
            if step in (300, 1000, steps):
                ratios = moment.value.view(blocks, block)[:, 0].double() / BETA2**step
                low, median, high = ratios.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
                row[str(step)] = {"mean": float(ratios.mean()), "low": low, "median": median, "high": high}
    return found


def leftover(quick: bool) -> list[dict[str, Any]]:
    """One element of each block has no more gradients: its exp_avg after 100 steps, of its neighbours' rms."""
    steps, blocks, block = 100, 256 if quick else 1024, 64
    generator = torch.Generator().manual_seed(3)
    rms = math.sqrt((1 - BETA1) / (1 + BETA1))
    moments = [
        Moment(Form(code, block, rounding), torch.full((blocks * block,), rms))
        for code, rounding in product(AVG_CODES, ROUNDINGS)
    ]
    for _ in range(steps):
        grad = torch.randn(blocks, block, generator=generator)
        grad[:, 0] = 0
        draw = draw_pair(blocks * block, generator)[0]
        for moment in moments:
            moment.value = moment.form.store(moment.value.lerp_(grad.flatten(), 1 - BETA1), draw)
    rows = []
    for moment in moments:
        left = moment.value.view(blocks, block)[:, 0].double() / rms
        rows.append(describe(moment.form) | {"mean": float(left.mean()), "rms": float(left.square().mean().sqrt())})
    return rows


# --- faint elements ------------------------------------------------------------------------------------------------

AVG, SQ = ({code.name: code for code in codes} for codes in (AVG_CODES, SQ_CODES))
FAINT = (
    ("E2M5", "E3M5"),
    ("E2M5", "E4M4"),
    ("E3M4", "E3M5"),
    ("E3M4", "E4M4"),
    ("E4M3", "E4M4"),
    ("E4M3", "E5M3"),
    ("linear", "linear root"),
    ("tree", "tree"),
)


def faint(quick: bool) -> list[dict[str, Any]]:
    """Some elements of each block have gradients of 2**-k of the others': their updates' rms error and largest."""
    steps, blocks, block = 300 if quick else 2000, 64, 64
    powers = range(0, 13, 2)
    generator = torch.Generator().manual_seed(4)
    scales = torch.ones(block)
    scales[: len(powers)] = torch.tensor([2.0**-power for power in powers])
    zeros = torch.zeros(blocks * block)
    exact = zeros.clone(), zeros.clone()
    avgs = {name: (Form(code, block, STOCHASTIC), zeros.clone()) for name, code in AVG.items()}
    sqs = {name: (Form(code, block, STOCHASTIC, True), zeros.clone()) for name, code in SQ.items()}
    found: dict[tuple[str, str], list[Tensor]] = {pair: [] for pair in FAINT}
    right = []
    for step in range(1, steps + 1):
        grad = torch.randn(blocks, block, generator=generator).mul_(scales).flatten()
        for _, value in (*avgs.values(), (None, exact[0])):
            value.lerp_(grad, 1 - BETA1)
        for _, value in (*sqs.values(), (None, exact[1])):
            value.mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
        if step > steps // 2 and step % 10 == 0:
            right.append(adam_update(*exact, step).view(blocks, block)[:, : len(powers)])
            for (avg, sq), measured in found.items():
                update = adam_update(avgs[avg][1], sqs[sq][1], step)
                measured.append(update.view(blocks, block)[:, : len(powers)])
        draws = draw_pair(blocks * block, generator)
        for draw, moments in zip(draws, (avgs, sqs), strict=True):
            for form, value in moments.values():
                value.copy_(form.store(value, draw))
    exacts = torch.cat(right)
    rms = exacts.square().mean(0).sqrt()
    rows = []
    for (avg, sq), measured in found.items():
        made = torch.cat(measured)
        error = ((made - exacts).square().mean(0).sqrt() / rms).tolist()
        size = (made.square().mean(0).sqrt() / rms).tolist()
        largest = (made.abs().amax(0) / exacts.abs().amax(0)).tolist()
        at = {
            str(power): dict(zip(("error", "size", "largest"), values, strict=True))
            for power, *values in zip(powers, error, size, largest, strict=True)
        }
        rows.append({"code": avg, "sq_code": sq, "block": block, "at": at})
    return rows


# --- training ------------------------------------------------------------------------------------------------------

TRAINED = (  # exp_avg's code, exp_avg_sq's, block, rounding
    ("E3M4", "E4M4", 64, STOCHASTIC),
    ("E3M4", "E4M4", 128, STOCHASTIC),
    ("E3M4", "E4M4", 128, NEAREST),
    ("E2M5", "E3M5", 64, STOCHASTIC),
    ("E2M5", "E3M5", 128, STOCHASTIC),
    ("E4M3", "E5M3", 128, STOCHASTIC),
    ("linear", "linear root", 64, STOCHASTIC),
    ("tree", "tree", 2048, NEAREST),  # bitsandbytes' own
)


OUTLIERS = (  # the same, where one column in 32 has gradients 64 times as large
    ("E2M5", "E3M5", 64, STOCHASTIC),
    ("E3M4", "E4M4", 64, STOCHASTIC),
    ("linear", "linear root", 64, STOCHASTIC),
    ("tree", "tree", 2048, NEAREST),
)


def train(text: corpus.Corpus, seed: int, steps: int, forms: tuple[Form, Form] | None, outliers: float) -> float:
    """The training loss at the end: a mean over many steps, all of whose batches the other forms have too.

    Adam does not mind gradients that are larger by a factor: `outliers` only makes the blocks' state hard to store.
    """
    training = Training(text, width=128, layers=1, seed=seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    avg, sq = torch.zeros_like(training.weights), torch.zeros_like(training.weights)
    losses = []
    for step in range(1, steps + 1):
        losses.append(training.backward())
        training.grad[: training.matrices : 32].mul_(outliers)
        avg.lerp_(training.grad, 1 - BETA1)
        sq.mul_(BETA2).addcmul_(training.grad, training.grad, value=1 - BETA2)
        training.weights.sub_(adam_update(avg, sq, step), alpha=learning_rate(step - 1, steps, LR / 3))
        if forms is not None:
            for form, row, draw in zip(forms, (avg, sq), draw_pair(training.matrices, generator), strict=True):
                row[: training.matrices] = form.store(row[: training.matrices], draw)
    return statistics.fmean(losses[-steps // 8 :])


def trainings(text: corpus.Corpus, quick: bool) -> list[dict[str, Any]]:
    """The losses, and how far each is from that with float32 state and the same seed."""
    steps, seeds = (40, range(2)) if quick else (200, range(3))
    rows = []
    for outliers, trained in ((1, TRAINED), (64, OUTLIERS)):
        exact = [train(text, seed, steps, None, outliers) for seed in seeds]
        for avg, sq, block, rounding in (("float32", "float32", 1, NEAREST), *trained):
            losses = exact
            if avg != "float32":
                forms = Form(AVG[avg], block, rounding), Form(SQ[sq], block, rounding, True)
                losses = [train(text, seed, steps, forms, outliers) for seed in seeds]
            differences = [loss - right for loss, right in zip(losses, exact, strict=True)]
            row = {"code": avg, "sq_code": sq, "block": block, "rounding": rounding, "outliers": outliers}
            row |= {"losses": losses, "loss": statistics.fmean(losses), "spread": statistics.stdev(losses)}
            row |= {"difference": statistics.fmean(differences), "difference_spread": statistics.stdev(differences)}
            rows.append(row)
    return rows


# --- what comes out ------------------------------------------------------------------------------------------------


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def percent(value: float) -> str:
    return f"{value:.2%}" if value < 10 else f"{value:.1e}"


def cells(found: dict[str, Any]) -> str:
    """The error, the elements off by 10 %, and outliers if there are any."""
    text = f"{percent(found['error'])}, {found['off_by_10_percent']:.1%}"
    return text + (f" (**{found['exceed_2x']:.0e}**)" if found["exceed_2x"] else "")


def print_tables(results: dict[str, list[dict[str, Any]]]) -> None:
    def pick(rows: list[dict[str, Any]], **wanted: Any) -> Iterator[dict[str, Any]]:
        return (row for row in rows if all(row[key] == value for key, value in wanted.items()))

    sides: tuple[tuple[str, tuple[Code, ...], tuple[bool, ...]], ...] = (
        ("exp_avg", AVG_CODES, (False,)),
        ("exp_avg_sq", SQ_CODES, (True, False)),
    )
    for name, codes, floors in sides:
        rows = []
        for code, rounding, floor in product(codes, ROUNDINGS, floors):
            found = pick(results["alone"], moment=name, code=code.name, rounding=rounding, floor=floor)
            by_block = {row["block"]: row for row in found}
            zero = "" if floor or len(floors) == 1 else ", may be zero"
            rows.append([code.name, rounding + zero, *(cells(by_block[block]) for block in BLOCKS)])
        title = f"Error of the update (2-norm), share of updates off by 10 % (share over 2x), only {name} stored"
        table(title, ["code", "rounding", *(f"B = {block}" for block in BLOCKS)], rows)

    rows = []
    for avg, sq in product(AVG_CODES, SQ_CODES):
        row = [f"{avg.name} + {sq.name}"]
        for rounding, block in product(ROUNDINGS, PAIRED):
            (found_row,) = pick(results["both"], code=avg.name, sq_code=sq.name, rounding=rounding, block=block)
            row.append(cells(found_row))
        rows.append(row)
    columns = [f"{rounding}, B = {block}" for rounding, block in product(ROUNDINGS, PAIRED)]
    table("The same, both stored, never zero", ["codes", *columns], rows)

    columns = ["", *(f"{float(share):.1%}" for share in results["wide"][0]["quantiles"])]
    rows = [
        [f"B = {row['block']}", *(f"{value:.4f}" for value in row["quantiles"].values())] for row in results["wide"]
    ]
    table("sqrt(exp_avg_sq) of its block's largest: quantiles", columns, rows)

    rows = []
    for found_row in results["decay"]:
        times = [found_row[step] for step in ("300", "1000", "3000")]
        ratios = [f"{at['mean']:.2f} [{at['low']:.2f}, {at['high']:.2f}]" for at in times]
        rows.append([found_row["code"], found_row["rounding"], *ratios])
    columns = ["code", "rounding", *(f"after {step}" for step in (300, 1000, 3000))]
    table("exp_avg_sq without gradients, of the exact one: mean [5 %, 95 %]; B = 64", columns, rows)

    rows = [[row["code"], row["rounding"], f"{row['mean']:+.4f}", f"{row['rms']:.4f}"] for row in results["leftover"]]
    title = f"exp_avg after 100 steps without gradients, of its neighbours' rms (exact: {BETA1**100:.0e}); B = 64"
    table(title, ["code", "rounding", "mean", "rms"], rows)

    rows = []
    for found_row in results["faint"]:
        at = found_row["at"].values()
        shown = [f"{one['error']:.0%}, {one['size']:.2f}, {one['largest']:.2f}" for one in at]
        rows.append([f"{found_row['code']} + {found_row['sq_code']}", *shown])
    title = "Updates where gradients are 2**-k of the neighbours': error, rms and largest of the exact ones; B = 64"
    table(title, ["codes, stochastic", *(f"k = {power}" for power in results["faint"][0]["at"])], rows)

    rows = []
    for found_row in results["training"]:
        name = "float32"
        if found_row["code"] != name:
            name = f"{found_row['code']} + {found_row['sq_code']}, B = {found_row['block']}, {found_row['rounding']}"
        if found_row["outliers"] > 1:
            name += "; outliers"
        loss = f"{found_row['loss']:.4f} ± {found_row['spread']:.4f}"
        rows.append([name, loss, f"{found_row['difference']:+.4f} ± {found_row['difference_spread']:.4f}"])
    table("Training loss at the end, mean ± deviation over seeds", ["state", "loss", "less float32's, by seed"], rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare 8-bit codes and block sizes for Adam's state.")
    parser.add_argument("--quick", action="store_true", help="fewer steps and elements: seconds instead of minutes")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument(
        "--json", type=Path, help="where the numbers go (default: results/codes.json; --quick: nowhere)"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    check()
    text = corpus.load()
    results: dict[str, list[dict[str, Any]]] = {}
    seconds: dict[str, float] = {}
    parts: dict[str, Callable[[], tuple[list[dict[str, Any]], ...]]] = {
        "alone both wide": lambda: updates(text, args.quick),
        "decay leftover": lambda: (decay(args.quick), leftover(args.quick)),
        "faint": lambda: (faint(args.quick),),
        "training": lambda: (trainings(text, args.quick),),
    }
    for names, part in parts.items():
        began = time.perf_counter()
        results |= dict(zip(names.split(), part(), strict=True))
        seconds[names] = round(time.perf_counter() - began, 1)
        print(f"{names}: {seconds[names]} s", file=sys.stderr)
    print_tables(results)
    path = args.json or (None if args.quick else RESULTS)
    if path:
        facts = {
            "machine": platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": args.threads,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - start),
            "seconds_by_part": seconds,
            "betas": (BETA1, BETA2),
            "quick": args.quick,
            "codes": [
                asdict(code) | {"largest": code.largest, "smallest": code.smallest} for code in AVG_CODES + SQ_CODES
            ],
        }
        path.parent.mkdir(exist_ok=True)
        lines = [f" {json.dumps(name)}: {json.dumps(fact)}" for name, fact in facts.items()]
        for name, rows in results.items():
            listed = ",\n".join(f"  {json.dumps(row)}" for row in rows)
            lines.append(f" {json.dumps(name)}: [\n{listed}\n ]")
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
