"""Fused multi-tensor optimizers for PyTorch: torch.optim's classes, one native call a step, the same bits everywhere.

import fusedopt
optimizer = fusedopt.AdamW(model.parameters(), lr=3e-4)
"""

from ._config import __version__, show_config
from .adagrad import Adagrad
from .adam import Adam
from .adamw import AdamW
from .clip import clip_grad_norm_
from .grad_scaler import GradScaler
from .offload import CPUOffload
from .radam import RAdam
from .step_in_backward import BackwardSteps, step_in_backward

__all__ = [
    "Adagrad",
    "Adam",
    "AdamW",
    "BackwardSteps",
    "CPUOffload",
    "GradScaler",
    "RAdam",
    "__version__",
    "clip_grad_norm_",
    "show_config",
    "step_in_backward",
]
