"""fusedopt in Lightning: a schedule, clipping, and how to resume.

    python examples/frameworks/with_lightning.py
    python examples/frameworks/with_lightning.py --library torch  # the same with torch.optim.AdamW
    python examples/frameworks/with_lightning.py --out runs       # then: --resume runs/epoch-0.ckpt

`self.optimizers()` gives a wrapper: ask `self.trainer.optimizers[0]` for `grad_norm`, `stats()` and all else that
fusedopt adds to torch's classes.
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader
from toy import BATCH, EPOCHS, build_model, next_token_loss, parse_arguments, report, sequences

import fusedopt

args = parse_arguments(argparse.ArgumentParser(description="Train a tiny model with Lightning."))
AdamW = {"torch": torch.optim.AdamW, "fusedopt": fusedopt.AdamW}[args.library]


class NextToken(lightning.LightningModule):
    """Learns to say which token comes next."""

    def __init__(self) -> None:
        super().__init__()
        self.model = build_model()

    def training_step(self, tokens: Tensor, _: int) -> Tensor:
        return next_token_loss(self.model, tokens)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = AdamW(self.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=args.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


lightning.seed_everything(args.seed)
module = NextToken()
loader = DataLoader(sequences(BATCH * args.steps // EPOCHS, args.seed), batch_size=BATCH)
checkpoints = ModelCheckpoint(args.out, filename="epoch-{epoch}", auto_insert_metric_name=False, save_top_k=-1)
trainer = lightning.Trainer(
    accelerator="cpu",
    max_epochs=EPOCHS,
    gradient_clip_val=1.0,
    callbacks=checkpoints,
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(module, loader, ckpt_path=args.resume)

with torch.no_grad():
    report(module.model, next_token_loss(module.model, sequences(64, args.seed + 1)).item())
