"""fusedopt with Hugging Face Accelerate: gradient accumulation, clipping, mixed precision, and how to resume.

    python examples/frameworks/with_accelerate.py
    python examples/frameworks/with_accelerate.py --library torch  # the same with torch.optim.AdamW
    python examples/frameworks/with_accelerate.py --mixed-precision bf16
    python examples/frameworks/with_accelerate.py --out runs       # then: --resume runs/epoch-1

What `prepare` returns for an optimizer is a wrapper: `grad_norm`, `stats()` and all else that fusedopt adds to torch's
classes belong to `optimizer.optimizer`.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from toy import BATCH, EPOCHS, build_model, next_token_loss, parse_arguments, report, sequences

import fusedopt

ACCUMULATED = 2  # batches a step

parser = argparse.ArgumentParser(description="Train a tiny model with Accelerate.")
parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="no", help="of the forward pass")
args = parse_arguments(parser)
AdamW = {"torch": torch.optim.AdamW, "fusedopt": fusedopt.AdamW}[args.library]

set_seed(args.seed)
accelerator = Accelerator(cpu=True, mixed_precision=args.mixed_precision, gradient_accumulation_steps=ACCUMULATED)
model = build_model()
optimizer = AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.01)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=args.steps)
data = sequences(BATCH * ACCUMULATED * args.steps // EPOCHS, args.seed)
loader = DataLoader(data, batch_size=BATCH, shuffle=True)
model, optimizer, schedule, loader = accelerator.prepare(model, optimizer, schedule, loader)

first_epoch = 0
if args.resume:
    accelerator.load_state(str(args.resume))
    first_epoch = int(args.resume.name.removeprefix("epoch-"))
for epoch in range(first_epoch, EPOCHS):
    for tokens in loader:
        with accelerator.accumulate(model):
            loss = next_token_loss(model, tokens)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    print(f"epoch {epoch + 1}: the last loss is {loss.item():.4f}")
    accelerator.save_state(str(args.out / f"epoch-{epoch + 1}"))

with torch.no_grad():
    report(accelerator.unwrap_model(model), next_token_loss(model, sequences(64, args.seed + 1)).item())
