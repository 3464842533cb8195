"""A training that may be killed at any moment, and goes on bit for bit when it is started again.

    python examples/crash_safe.py --folder run  # kill it and start it again, as often as you like
    python examples/crash_safe.py --folder run --dtype bfloat16 --master-weights split --state-dtype bfloat16
    python examples/crash_safe.py --help

A checkpoint is written under another name, forced to the disk and then renamed, so that what has a
checkpoint's name is always a whole one. It holds all that the rest of the training depends on: model,
optimizer, scheduler, random states, and the step, which is the position in the data. The digest at
the end is the same however often the training was killed. Copy the functions of the first part.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

import fusedopt

Checkpoint = dict[str, Any]
COMPLETE, UNFINISHED = "step-*.pt", ".unfinished"


# --- to copy ----------------------------------------------------------------------------------------------------------


def save_atomically(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint so that `path` is at any moment all of it, or what it was before."""
    unfinished = path.with_name(path.name + UNFINISHED)  # in the same folder: a rename is atomic within a file system
    with open(unfinished, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())  # before the rename, or a power failure could leave the name without the bytes
    os.replace(unfinished, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to the disk, as `os.fsync` does the bytes of a file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(checkpoint: Checkpoint, folder: Path, keep: int) -> None:
    """Add a checkpoint to a folder; remove all but the last `keep`, and what a killed process left unfinished."""
    save_atomically(checkpoint, folder / f"step-{checkpoint['step']:09}.pt")
    for path in [*sorted(folder.glob(COMPLETE))[:-keep], *folder.glob("*" + UNFINISHED)]:
        path.unlink()


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint of a folder, or None."""
    complete = sorted(folder.glob(COMPLETE))  # names sort by step
    return torch.load(complete[-1], map_location="cpu", weights_only=True) if complete else None


def take_checkpoint(step: int, model: Module, optimizer: Optimizer, scheduler: LRScheduler) -> Checkpoint:
    """All that the training behind this step depends on. It refers to the live tensors: save it before the next."""
    return {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "random": random_states(),
    }


def restore(checkpoint: Checkpoint, model: Module, optimizer: Optimizer, scheduler: LRScheduler) -> int:
    """Put everything back as it was; return how many steps were made."""
    model.load_state_dict(checkpoint["model"])  # first: the optimizer's masters belong to these weights
    optimizer.load_state_dict(checkpoint["optimizer"])
    scheduler.load_state_dict(checkpoint["scheduler"])
    set_random_states(checkpoint["random"])
    return int(checkpoint["step"])


def random_states() -> dict[str, Any]:
    """Those of Python, NumPy and torch, as what `torch.load(..., weights_only=True)` reads."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),  # of no device where there is none
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Set what `random_states` returned."""
    name, keys, *rest = states["numpy"]
    random.setstate(states["python"])
    np.random.set_state((name, keys.numpy(), *rest))
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state_all(states["cuda"])


# --- a training -------------------------------------------------------------------------------------------------------

OPTIMIZERS = {"adam": fusedopt.Adam, "adamw": fusedopt.AdamW, "radam": fusedopt.RAdam, "adagrad": fusedopt.Adagrad}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MASTERS = {None: False, "full": True, "split": "split"}
FEATURES, WIDTH, EXAMPLES, BATCH = 16, 160, 240, 8
BATCHES = EXAMPLES // BATCH


def make_data(seed: int) -> tuple[Tensor, Tensor]:
    """A regression: the same examples each time."""
    g = torch.Generator().manual_seed(seed)
    inputs = torch.randn(EXAMPLES, FEATURES, generator=g)
    return inputs, (inputs @ torch.randn(FEATURES, 1, generator=g)).tanh()


def batch_indices(step: int, seed: int) -> Tensor:
    """The examples of a step. Each epoch has an order of its own, which follows from the seed and its number."""
    epoch, batch = divmod(step, BATCHES)
    order = torch.randperm(EXAMPLES, generator=torch.Generator().manual_seed(seed + 1000 * (epoch + 1)))
    return order[batch * BATCH : (batch + 1) * BATCH]


def augment(inputs: Tensor) -> Tensor:
    """What a loader of images might do, with Python's and NumPy's random numbers; the model draws torch's."""
    noise = torch.from_numpy(np.random.normal(scale=0.01, size=tuple(inputs.shape))).float()
    return inputs.roll(1, dims=0) + noise if random.random() < 0.5 else inputs + noise


def digest(model: Module, optimizer: Optimizer) -> str:
    """A sha256 of all parameters and of the optimizer's state."""
    sha = hashlib.sha256()

    def add(name: str, tensor: Tensor) -> None:
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes())

    for name, param in model.named_parameters():
        add(name, param)
        for key, value in sorted(optimizer.state[param].items()):
            add(f"{name}.{key}", value)
    return sha.hexdigest()


def train(args: argparse.Namespace) -> str:
    """Train from the beginning, or from the newest checkpoint; return the digest of what comes out."""
    args.folder.mkdir(parents=True, exist_ok=True)
    sync_folder(args.folder.parent)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    dtype = DTYPES[args.dtype]
    layers = [torch.nn.Linear(FEATURES, WIDTH), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(WIDTH, 1)]
    model = torch.nn.Sequential(*layers).to(dtype)
    optimizer = OPTIMIZERS[args.optimizer](
        model.parameters(),
        lr=args.lr,
        max_grad_norm=args.max_grad_norm,
        ema_decay=args.ema_decay,
        master_weights=MASTERS[args.master_weights],
        rounding=args.rounding,
        state_dtype=DTYPES.get(args.state_dtype, args.state_dtype),
    )
    scheduler = CosineAnnealingLR(optimizer, T_max=args.steps)
    inputs, targets = make_data(args.seed)

    done = 0
    if (checkpoint := load_latest(args.folder)) is not None:
        done = restore(checkpoint, model, optimizer, scheduler)
        print(f"goes on behind step {done}")
    for step in range(done, args.steps):
        chosen = batch_indices(step, args.seed)
        optimizer.zero_grad()
        predicted = model(augment(inputs[chosen]).to(dtype))
        torch.nn.functional.mse_loss(predicted.float(), targets[chosen]).backward()
        optimizer.step()
        scheduler.step()
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            save(take_checkpoint(step + 1, model, optimizer, scheduler), args.folder, args.keep)
    return digest(model, optimizer)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train a small model; if killed and started again, go on as if nothing had been.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def whole(text: str) -> int:
        if int(text) < 1:
            raise argparse.ArgumentTypeError("it has to be at least 1")
        return int(text)

    parser.add_argument("--folder", type=Path, required=True, help="of the checkpoints: one of its own")
    parser.add_argument("--steps", type=whole, default=2000, help="of the whole training")
    parser.add_argument("--every", type=whole, default=50, help="steps from one checkpoint to the next")
    parser.add_argument("--keep", type=whole, default=2, help="checkpoints to keep")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and all random numbers")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="which class")
    parser.add_argument("--lr", type=float, default=1e-2, help="the first learning rate")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the model")
    parser.add_argument("--max-grad-norm", type=float, help="clip the gradients")
    parser.add_argument("--ema-decay", type=float, help="average the weights")
    parser.add_argument("--master-weights", choices=("full", "split"), help="float32 values of bfloat16 weights")
    parser.add_argument("--rounding", choices=("nearest", "stochastic", "kahan"), default="nearest", help="of weights")
    parser.add_argument("--state-dtype", choices=("float32", "bfloat16", "int8"), help="of the optimizer's state")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> str:
    """Train and print the digest, which is also returned."""
    args = parse_arguments(argv)
    result = train(args)
    print(f"sha256 of parameters and optimizer state after {args.steps} steps: {result}")
    return result


if __name__ == "__main__":
    main()
