"""fusedopt with DistributedDataParallel: every process steps its own copy of the weights, to the same bits.

    torchrun --standalone --nproc-per-node 2 examples/frameworks/ddp.py
    torchrun ... examples/frameworks/ddp.py --library torch  # the same with torch.optim.AdamW
    torchrun ... examples/frameworks/ddp.py --out runs       # then: --resume runs/epoch-1.pt

The first process writes the checkpoints, all of them read.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from toy import BATCH, EPOCHS, build_model, next_token_loss, parse_arguments, report, sequences

import fusedopt

args = parse_arguments(argparse.ArgumentParser(description="Train a tiny model in several processes."))
AdamW = {"torch": torch.optim.AdamW, "fusedopt": fusedopt.AdamW}[args.library]

dist.init_process_group("gloo")
torch.manual_seed(args.seed)
model = DistributedDataParallel(build_model())
optimizer = AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.01)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=args.steps)
data = sequences(BATCH * dist.get_world_size() * args.steps // EPOCHS, args.seed)
sampler = DistributedSampler(data, seed=args.seed)
loader = DataLoader(data, batch_size=BATCH, sampler=sampler)

parts: dict[str, Any] = {"model": model.module, "optimizer": optimizer, "schedule": schedule}
first_epoch = 0
if args.resume:
    checkpoint = torch.load(args.resume, map_location="cpu", weights_only=True)
    first_epoch = checkpoint["epochs"]
    for name, part in parts.items():
        part.load_state_dict(checkpoint[name])
for epoch in range(first_epoch, EPOCHS):
    sampler.set_epoch(epoch)
    for tokens in loader:
        optimizer.zero_grad()
        loss = next_token_loss(model, tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    if dist.get_rank() == 0:
        print(f"epoch {epoch + 1}: the last loss is {loss.item():.4f}")
        state = {name: part.state_dict() for name, part in parts.items()}
        torch.save({"epochs": epoch + 1, **state}, args.out / f"epoch-{epoch + 1}.pt")

if dist.get_rank() == 0:
    with torch.no_grad():
        report(model.module, next_token_loss(model.module, sequences(64, args.seed + 1)).item())
dist.barrier()  # a process that ends while one of gloo's threads still waits for the interpreter may be aborted
dist.destroy_process_group()
