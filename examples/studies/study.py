"""What a study leaves behind, and the command line that all of them share."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Table:
    """Numbers as they are to be read: the first column says what a row is about."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        lines = [list(self.columns), *map(list, self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        first, *others = widths
        text = [
            "  ".join([f"{line[0]:<{first}}", *(f"{cell:>{w}}" for cell, w in zip(line[1:], others, strict=True))])
            for line in lines
        ]
        return "\n".join([self.title, "", text[0].rstrip(), "-" * len(text[0]), *(line.rstrip() for line in text[1:])])


@dataclass(frozen=True)
class Study:
    """A question about an optimizer, and the answer that a run has given.

    Attributes:
        title: a few words.
        question: what is asked, and where it comes from; a sentence or two.
        findings: what came out, in two sentences, made with the numbers of this run.
        tables: the numbers.
        figure: the picture.
    """

    title: str
    question: str
    findings: str
    tables: Sequence[Table]
    figure: Figure


def show(study: Study, picture: Path) -> None:
    """Print the study, and write its picture."""
    print(f"{study.title}\n\n{study.question}\n")
    for table in study.tables:
        print(f"{table}\n")
    print(study.findings)
    save(study, picture)
    print(f"\n{picture} written", end="")


def save(study: Study, picture: Path) -> None:
    """Write the picture."""
    study.figure.savefig(picture, dpi=110)


def main(run: Callable[[bool], Study], argv: Sequence[str] | None = None) -> None:
    """Run one study from the command line: its answer on the terminal, and its picture as <name of the script>.png."""
    name = Path(sys.argv[0]).stem
    parser = argparse.ArgumentParser(description=run.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="some seconds, in a form too short to conclude from")
    parser.add_argument("--out", type=Path, default=Path(f"{name}.png"), help="the picture")
    args = parser.parse_args(argv)
    begin()
    start = time.perf_counter()
    show(run(args.quick), args.out)
    print(f"; {time.perf_counter() - start:.0f} s in all")


def begin() -> None:
    """The models are small, so that a second thread would cost more than it brings; and one gives the same sums."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
