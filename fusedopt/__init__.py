"""Fused multi-tensor Adam and AdamW for PyTorch: torch.optim's classes, one native call a step, the same bits on all.

import fusedopt
optimizer = fusedopt.AdamW(model.parameters(), lr=3e-4)
"""

from ._config import __version__, show_config
from .adam import Adam
from .adamw import AdamW

__all__ = ["Adam", "AdamW", "__version__", "show_config"]
