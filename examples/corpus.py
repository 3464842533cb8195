"""The text to learn: the source of Python's standard library, byte by byte."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

VOCABULARY = 256  # a token is a byte
HELD_OUT_EVERY = 10  # every tenth file is held out


class Batch(NamedTuple):
    """Windows of text, and the same windows one byte later: both (batch, context)."""

    tokens: Tensor
    targets: Tensor


class Corpus(NamedTuple):
    """The text to train on and the text held out, each a row of bytes."""

    train: Tensor
    held_out: Tensor
    files: int


def load() -> Corpus:
    """Read the top-level modules in the order of their names."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    # _sysconfigdata* and sitecustomize belong to one machine rather than to Python.
    machine = ("_sysconfigdata", "sitecustomize")
    files = sorted(p for p in folder.glob("*.py") if not p.name.startswith(machine))
    if len(files) < HELD_OUT_EVERY:
        raise SystemExit(f"no source of the standard library in {folder}")
    texts = [path.read_bytes() for path in files]
    held_out = b"".join(texts[::HELD_OUT_EVERY])
    train = b"".join(text for i, text in enumerate(texts) if i % HELD_OUT_EVERY)
    return Corpus(_tokens(train), _tokens(held_out), len(files))


def random_batch(text: Tensor, batch: int, context: int, generator: torch.Generator) -> Batch:
    """Windows at random places of the text."""
    starts = torch.randint(len(text) - context, (batch,), generator=generator)
    return _windows(text, starts, context)


def spread_batches(text: Tensor, batches: int, batch: int, context: int) -> list[Batch]:
    """Windows at fixed places, spread evenly over the text: a yardstick that stays the same."""
    starts = torch.linspace(0, len(text) - context - 1, batches * batch).long()
    return [_windows(text, part, context) for part in starts.view(batches, batch)]


def _tokens(text: bytes) -> Tensor:
    # bytearray, because a tensor wants memory it may write to.
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def _windows(text: Tensor, starts: Tensor, context: int) -> Batch:
    windows = text[starts[:, None] + torch.arange(context + 1)]
    return Batch(windows[:, :-1], windows[:, 1:])
