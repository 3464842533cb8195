"""Adam and AMSGrad."""

import torch

from ._optimizer import FusedOptimizer


class Adam(FusedOptimizer, torch.optim.Adam):
    _rule = "adam"
