"""What these examples share: a task that a tiny model learns in a second, the command line, and the last words."""

from __future__ import annotations

import argparse
import tempfile
import zlib
from pathlib import Path

import torch
from torch import Tensor, nn

VOCABULARY, LENGTH, BATCH = 32, 16, 16
EPOCHS = 2  # each ends with a checkpoint


def sequences(count: int, seed: int) -> Tensor:
    """Tokens (count, LENGTH): each sequence begins anywhere, and x is followed by 5 x + 3 modulo 32."""
    tokens = [torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))]
    while len(tokens) < LENGTH:
        tokens.append((5 * tokens[-1] + 3) % VOCABULARY)
    return torch.stack(tokens, dim=1)


def build_model() -> nn.Module:
    """Scores for the next token, from the last one."""
    return nn.Sequential(nn.Embedding(VOCABULARY, 24), nn.Linear(24, 48), nn.GELU(), nn.Linear(48, VOCABULARY))


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """The mean cross-entropy of every token but the first."""
    return nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def checksum(model: nn.Module) -> str:
    """Tell weights apart that differ in a bit."""
    return f"{zlib.crc32(b''.join(weight.detach().numpy().tobytes() for weight in model.parameters())):08x}"


def report(model: nn.Module, loss: float) -> None:
    """Print what two runs can be compared by."""
    print(f"checksum of the weights: {checksum(model)}")
    print(f"final loss: {loss!r}")


def parse_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Add to a parser what every example takes, and read the command line."""
    parser.add_argument("--library", choices=("torch", "fusedopt"), default="fusedopt", help="whose AdamW")
    parser.add_argument("--steps", type=int, default=80, help="of the optimizer: an even number (default: 80)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (default: 0)")
    parser.add_argument("--out", type=Path, help="a folder for the checkpoints (default: a new temporary one)")
    parser.add_argument("--resume", type=Path, help="a checkpoint of an earlier run, to go on from")
    args = parser.parse_args()
    if args.steps < 2 or args.steps % EPOCHS:
        parser.error(f"--steps {args.steps}: there are {EPOCHS} epochs, so use a positive even number")
    args.out = args.out or Path(tempfile.mkdtemp(prefix="fusedopt-"))
    args.out.mkdir(parents=True, exist_ok=True)
    return args
