"""AdamW: Adam with decoupled weight decay."""

from typing import Any

import torch
from torch import Tensor

from ._optimizer import FusedOptimizer


class AdamW(FusedOptimizer, torch.optim.AdamW):
    r"""Adam with decoupled weight decay: a drop-in for :class:`torch.optim.AdamW`.

    :math:`\theta_{t-1}` is first multiplied by :math:`1 - lr \cdot weight\_decay`, and the gradient is left alone: from
    `Decoupled Weight Decay Regularization <https://arxiv.org/abs/1711.05101>`_ (Loshchilov and Hutter 2017,
    algorithm 2). Everything else is :class:`fusedopt.Adam`; ``weight_decay`` is 1e-2 by default.
    """

    _rule = "adam"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        norm_type: float | str = 2.0,
        skip_nonfinite: bool = False,
        ema_decay: float | None = None,
        stats: bool = False,
        master_weights: bool | str = False,
        rounding: str = "nearest",
        state_dtype: torch.dtype | str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            max_grad_norm=max_grad_norm,
            norm_type=norm_type,
            skip_nonfinite=skip_nonfinite,
            ema_decay=ema_decay,
            stats=stats,
            master_weights=master_weights,
            rounding=rounding,
            state_dtype=state_dtype,
            seed=seed,
        )
