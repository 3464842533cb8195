"""Fused multi-tensor optimizers for PyTorch: the classes of torch.optim, one native call a step, the same bits everywhere.

import fusedopt
optimizer = fusedopt.AdamW(model.parameters(), lr=3e-4)
"""

import torch  # first: the native core finds torch's OpenMP runtime and tensor records in the process

from ._config import show_config, __version__
from .adam import Adam
from .adamw import AdamW

__all__ = ["Adam", "AdamW", "show_config", "__version__"]
