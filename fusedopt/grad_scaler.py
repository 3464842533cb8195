"""Automatic mixed precision without a pass of its own over the gradients."""

from typing import Any

import torch

from ._optimizer import FusedOptimizer


class GradScaler(torch.amp.GradScaler):
    """A drop-in for :class:`torch.amp.GradScaler` that leaves the check for inf and nan to the optimizer's step.

    Torch's reads and writes all gradients before an optimizer's step, to see whether one is inf or nan. With an
    optimizer of this package the pass that measures the norm, which only reads them, does it instead, whether
    `max_grad_norm` wants the norm or not. Unscaling multiplies by the reciprocal of the scale, as
    :meth:`~torch.amp.GradScaler.unscale_` does (torch's fused optimizers divide). After an explicit `unscale_`, and for
    optimizers that are not of this package, it does what torch's does.

    What is checked are the unscaled gradients: with a scale below 1 one that torch takes for finite may overflow, and
    the step is skipped.

    Args:
        device, init_scale, growth_factor, backoff_factor, growth_interval, enabled: as torch's.
    """

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """As torch's; the verdict is found in the optimizer's step, without waiting for the device."""
        try:
            return super().step(optimizer, *args, **kwargs)
        except BaseException:
            # What it told the step must not be heard by the next one.
            for name in ("_report_inf", "grad_scale", "found_inf") if isinstance(optimizer, FusedOptimizer) else ():
                vars(optimizer).pop(name, None)
            raise

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """torch's step() calls this where nobody has unscaled; what it finds, update() looks at."""
        if isinstance(optimizer, FusedOptimizer):
            device = optimizer._only_device()
            if device is not None:
                verdict = torch.zeros((), dtype=torch.float32, device=device)
                optimizer._report_inf = verdict
                found: dict[Any, Any] = {verdict.device: verdict}
                self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = found
                return found
        return super()._check_inf_per_device(optimizer)
