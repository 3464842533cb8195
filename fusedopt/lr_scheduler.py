"""What torch.optim.lr_scheduler, whose schedulers all drive the optimizers of this package, does not have."""

from __future__ import annotations

import math

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts


class DecayingWarmRestarts(CosineAnnealingWarmRestarts):
    r"""SGDR with bounds that fall at every restart.

    In cycle i, counted from 0, both bounds are multiplied by :math:`decay^i`:

    .. math::
        \eta = decay^i \left(\eta_{min} + \frac{1}{2} (\eta_{max} - \eta_{min})
            \left(1 + \cos \frac{\pi T_{cur}}{T_i}\right)\right)

    Loshchilov and Hutter (SGDR, arXiv 1608.03983) suggest lower bounds after restarts, and leave open by how much. All
    else is torch's, `step(epoch)` with fractions of epochs included, and with decay=1 so are the bits.

    Args:
        optimizer: whose groups are driven; the initial lr of each is its :math:`\eta_{max}`.
        T_0: the length of cycle 0, in calls of step(), or in epochs if step() is given them.
        T_mult: each cycle is as many times as long as the one before (default: 1).
        eta_min: the lower bound in cycle 0, for all groups (default: 0.0).
        last_epoch: as torch's (default: -1).
        decay: the factor, above 0 and at most 1.

    Raises:
        ValueError: `decay` is out of range; and where torch's class raises.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        T_0: int,
        T_mult: int = 1,
        eta_min: float = 0.0,
        last_epoch: int = -1,
        *,
        decay: float,
    ) -> None:
        if not 0 < decay <= 1:
            raise ValueError(f"Expected decay above 0 and at most 1 (which is torch's scheduler), but got {decay}")
        self.decay = decay
        super().__init__(optimizer, T_0, T_mult, eta_min, last_epoch)

    @property
    def cycle(self) -> int:
        """The number of restarts so far."""
        return restarts(self)

    def get_lr(self) -> list[float | Tensor]:
        """The rates of all groups; to be called by step() only, as torch's."""
        factor = self.decay**self.cycle
        return [lr * factor for lr in super().get_lr()]


def restarts(scheduler: CosineAnnealingWarmRestarts) -> int:
    """How often a scheduler has restarted; it does not count, but its position tells."""
    if scheduler.T_mult == 1:
        return max(0, scheduler.last_epoch // scheduler.T_0)  # it is -1 while SequentialLR runs another one first
    return round(math.log(scheduler.T_i / scheduler.T_0, scheduler.T_mult))  # T_i is T_0 * T_mult**i
