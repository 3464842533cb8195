"""AdamW: Adam with decoupled weight decay."""

import torch

from ._optimizer import FusedOptimizer


class AdamW(FusedOptimizer, torch.optim.AdamW):
    _rule = "adam"
