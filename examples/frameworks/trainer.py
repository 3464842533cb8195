"""fusedopt in the Trainer of Hugging Face transformers: a tiny Llama with random weights.

    python examples/frameworks/trainer.py
    python examples/frameworks/trainer.py --library torch        # the same with torch.optim.AdamW
    python examples/frameworks/trainer.py --hand-over optimizer  # build the optimizer and its schedule yourself
    python examples/frameworks/trainer.py --out runs             # then: --resume runs/checkpoint-40

By default the Trainer is given the class and its options. It makes the parameter groups (biases and norms without
weight decay) and the schedule that `TrainingArguments` names. Of its numbers for the optimizer only `weight_decay` is
read then: lr and betas are among the options.
"""

from __future__ import annotations

import argparse

import torch
from toy import BATCH, EPOCHS, LENGTH, VOCABULARY, parse_arguments, report, sequences
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, get_cosine_schedule_with_warmup

import fusedopt

parser = argparse.ArgumentParser(description="Train a tiny Llama with transformers' Trainer.")
parser.add_argument("--hand-over", choices=("class", "optimizer"), default="class", help="what the Trainer is given")
args = parse_arguments(parser)
AdamW = {"torch": torch.optim.AdamW, "fusedopt": fusedopt.AdamW}[args.library]

torch.manual_seed(args.seed)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
    )
)
training = TrainingArguments(
    output_dir=str(args.out),
    max_steps=args.steps,
    per_device_train_batch_size=BATCH,
    max_grad_norm=1.0,
    weight_decay=0.01,
    lr_scheduler_type="cosine",
    warmup_steps=args.steps // 10,
    save_steps=args.steps // EPOCHS,
    logging_steps=args.steps // EPOCHS,
    seed=args.seed,
    use_cpu=True,
    disable_tqdm=True,
    report_to="none",
)
options = {"lr": 1e-2, "betas": (0.9, 0.95)}
data = [{"input_ids": tokens, "labels": tokens} for tokens in sequences(BATCH * args.steps // EPOCHS, args.seed)]

if args.hand_over == "class":
    trainer = Trainer(model, training, train_dataset=data, optimizer_cls_and_kwargs=(AdamW, options))
else:
    optimizer = AdamW(model.parameters(), weight_decay=0.01, **options)
    schedule = get_cosine_schedule_with_warmup(optimizer, args.steps // 10, args.steps)
    trainer = Trainer(model, training, train_dataset=data, optimizers=(optimizer, schedule))
trainer.train(resume_from_checkpoint=str(args.resume) if args.resume else None)

held_out = sequences(64, args.seed + 1)
with torch.no_grad():
    report(model, model.eval()(input_ids=held_out, labels=held_out).loss.item())
