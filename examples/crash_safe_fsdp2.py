"""FSDP2 on several ranks, killed at any moment, goes on bit for bit: `crash_safe.py` with sharded checkpoints.

    torchrun --nproc-per-node 2 --standalone examples/crash_safe_fsdp2.py --folder run  # kill it, start it again

A checkpoint is a folder that all ranks write. It gets its name when all have written their part: then
it is whole. (Started again on another number of ranks it goes on, too, though with the gradients of as many.)
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from crash_safe import BATCHES, EXAMPLES, FEATURES, OPTIMIZERS, UNFINISHED, WIDTH, make_data, sync_folder
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn import Module
from torch.optim import Optimizer

COMPLETE = "step-?????????"


def save(folder: Path, step: int, model: Module, optimizer: Optimizer, keep: int) -> None:
    """Write a checkpoint, of which each rank writes its part; rank 0 names it when all is there."""
    path = folder / f"step-{step:09}"
    unfinished = path.with_name(path.name + UNFINISHED)
    if dist.get_rank() == 0:
        for left in folder.glob("*" + UNFINISHED):  # by ranks that were killed
            shutil.rmtree(left)
    dist.barrier()
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state, "step": step}, checkpoint_id=unfinished)
    dist.barrier()  # all parts are on the disk: torch's writer has synced them
    if dist.get_rank() == 0:
        sync_folder(unfinished)
        os.replace(unfinished, path)
        sync_folder(folder)
        for old in sorted(folder.glob(COMPLETE))[:-keep]:
            # It must not keep its name while it is taken apart.
            shutil.rmtree(old.rename(old.with_name(old.name + UNFINISHED)))
    dist.barrier()


def load_latest(folder: Path, model: Module, optimizer: Optimizer) -> int:
    """Load the newest complete checkpoint, if there is one; return how many steps were made."""
    complete = sorted(folder.glob(COMPLETE))
    if not complete:
        return 0
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "step": 0}
    dcp.load(state, checkpoint_id=complete[-1])
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return int(state["step"])


def digest(model: Module, optimizer: Optimizer) -> str:
    """A sha256 of this rank's parts of all parameters and state."""
    sha = hashlib.sha256()
    for param in model.parameters():
        for value in (param, *optimizer.state[param].values()):
            part = value.to_local() if hasattr(value, "to_local") else value
            sha.update(part.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def train(args: argparse.Namespace) -> str:
    """Train from the beginning, or from the newest checkpoint; return the digest of what comes out."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    layers = [torch.nn.Linear(FEATURES, WIDTH), torch.nn.ReLU(), torch.nn.Linear(WIDTH, 1)]
    model = torch.nn.Sequential(*layers).to(torch.bfloat16 if args.rounding == "stochastic" else torch.float32)
    fully_shard(model)
    options = {"rounding": args.rounding, "max_grad_norm": 0.5, "ema_decay": 0.9}
    optimizer = OPTIMIZERS[args.optimizer](model.parameters(), lr=1e-2, **options)
    inputs, targets = make_data(args.seed)
    first = load_latest(args.folder, model, optimizer)
    for step in range(first, args.steps):
        epoch, batch = divmod(step, BATCHES)
        order = torch.randperm(EXAMPLES, generator=torch.Generator().manual_seed(args.seed + 1000 * (epoch + 1)))
        mine = order[batch * 8 : (batch + 1) * 8][rank::ranks]
        optimizer.zero_grad()
        predicted = model(inputs[mine].to(next(model.parameters()).dtype))
        torch.nn.functional.mse_loss(predicted.float(), targets[mine]).backward()
        optimizer.step()
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            save(args.folder, step + 1, model, optimizer, args.keep)
    return digest(model, optimizer)


def main(argv: Sequence[str] | None = None) -> str:
    """Run; the process group must be there."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoints are")
    parser.add_argument("--steps", type=int, default=200, help="of the optimizer")
    parser.add_argument("--every", type=int, default=10, help="so many steps are between checkpoints")
    parser.add_argument("--keep", type=int, default=2, help="how many checkpoints are kept")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="of fusedopt")
    parser.add_argument("--rounding", choices=("nearest", "stochastic"), default="nearest", help="of bfloat16 weights")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data")
    return train(parser.parse_args(argv))


if __name__ == "__main__":
    dist.init_process_group("gloo")
    print(f"rank {dist.get_rank()}: {main()}")
    dist.barrier()
    dist.destroy_process_group()
