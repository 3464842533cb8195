"""Fused multi-tensor optimizers for PyTorch: torch.optim's classes, one native call a step, the same bits everywhere.

import fusedopt
optimizer = fusedopt.AdamW(model.parameters(), lr=3e-4)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._config import __version__, show_config
from .adagrad import Adagrad
from .adam import Adam
from .adamw import AdamW
from .clip import clip_grad_norm_
from .grad_scaler import GradScaler
from .radam import RAdam
from .step_in_backward import BackwardSteps, step_in_backward

if TYPE_CHECKING:
    from . import lr_finder, lr_scheduler
    from .offload import CPUOffload
    from .snapshot_ensemble import SnapshotEnsemble

__all__ = [
    "Adagrad",
    "Adam",
    "AdamW",
    "BackwardSteps",
    "CPUOffload",
    "GradScaler",
    "RAdam",
    "SnapshotEnsemble",
    "__version__",
    "clip_grad_norm_",
    "lr_finder",
    "lr_scheduler",
    "show_config",
    "step_in_backward",
]

# Imported when first asked for: most trainings need none of them, and `import fusedopt` takes half the time without.
# (None has its module's name, unless it is the module: importing that from elsewhere would put it in the name's place.)
_LATER = {
    "CPUOffload": "offload",
    "SnapshotEnsemble": "snapshot_ensemble",
    "lr_finder": "lr_finder",
    "lr_scheduler": "lr_scheduler",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'fusedopt' has no attribute {name!r}")
    module = import_module(f"fusedopt.{_LATER[name]}")
    value = globals()[name] = getattr(module, name, module)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
