"""Adam and AMSGrad."""

from typing import Any

import torch
from torch import Tensor

from ._optimizer import FusedOptimizer


class Adam(FusedOptimizer, torch.optim.Adam):
    r"""Adam, with L2 or decoupled weight decay, and AMSGrad: a drop-in for :class:`torch.optim.Adam`.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \theta_t &= \theta_{t-1} - \frac{lr}{1 - \beta_1^t} \;
            m_t \Big/ \left( \sqrt{v_t} \big/ \sqrt{1 - \beta_2^t} + \epsilon \right)

    from `Adam: A Method for Stochastic Optimization <https://arxiv.org/abs/1412.6980>`_ (Kingma and Ba 2014,
    algorithm 1); with ``amsgrad``, :math:`v_t` under the root is its running maximum, from
    `On the Convergence of Adam and Beyond <https://openreview.net/forum?id=ryQu7f-RZ>`_ (Reddi et al. 2018).

    Args:
        params: parameters, (name, parameter) pairs, or dicts of groups with their own options. Strided tensors on the
            CPU or on CUDA devices, of any shape and layout, of dtype float32, float64, bfloat16, float16 (arithmetic in
            float32, each stored value rounded once), complex64 or complex128 (as their real views).
        lr: learning rate, a float or a one-element tensor, whose value is read in every step (default: 1e-3). A CUDA
            tensor is read by the kernel; it needs `capturable` or `fused`.
        betas: decay rates of the moments, two floats or two one-element tensors, 0 <= beta < 1 (default: (0.9, 0.999)).
            Tensors stand for the numbers they hold (torch's loop rounds in their dtype, so the last digits differ);
            CUDA tensors as for lr, with the device's powers, whose last bit may differ.
        eps: added to the denominator (default: 1e-8). Moments below the smallest normal number of the arithmetic
            (1.2e-38, or 2.2e-308 for float64) are stored as zero if eps >= 1e-10.
        weight_decay: coefficient (default: 0).
        amsgrad: use the running maximum of the second moment (default: False).
        foreach: accepted as torch accepts it; the native path is taken whatever it says.
        maximize: ascend (default: False).
        capturable: the step counts of CUDA parameters lie on their device, and the step can be captured in a CUDA
            graph: make a step before, and see :meth:`update_captured` (default: False). On the CPU it changes nothing.
        differentiable: True takes torch's own for-loop, through which autograd can run (default: False).
        fused: every step is fused; True puts the step counts of CUDA parameters on their device, where a
            :class:`torch.amp.GradScaler` need not wait for them; False leaves unscaling to it (default: None).
        decoupled_weight_decay: decay the parameter itself, as AdamW does, instead of adding to the gradient
            (default: False).

        max_grad_norm: clip the gradients, in the step, so that the norm of all of them is at most this (default: None).
        norm_type: of `max_grad_norm`, 2.0 or inf (default: 2.0).
        skip_nonfinite: a step whose gradients hold an inf or nan changes nothing (default: False).
        ema_decay: keep a moving average of the weights, see :meth:`ema_weights` (default: None).
        stats: measure each parameter's step, see :meth:`stats` (default: False). :class:`FusedOptimizer` and
            docs/phase.md tell more about these five.

        master_weights: of 16-bit parameters, keep the float32 values: True, or "split" as the bits that bfloat16 lacks
            (default: False).
        rounding: how 16-bit parameters without masters are stored: "nearest", "stochastic" or "kahan" (default:
            "nearest").
        state_dtype: of the moments: torch.float32, torch.bfloat16 or "int8" (default: None, float32 if there are
            masters, else the parameter's).
        seed: of the stochastic roundings (default: 0). :class:`FusedOptimizer` and docs/precision.md tell more about
            these four.

    Raises:
        ValueError: an option out of range, as torch raises it.
        RuntimeError: in :meth:`step`, about a parameter, gradient or state that cannot be updated rightly.

    The state of a parameter, made at its first step: ``step`` (0-d, on the CPU unless `capturable` or `fused`),
    ``exp_avg``, ``exp_avg_sq`` and, with amsgrad, ``max_exp_avg_sq`` (the parameter's shape and dtype): torch's own, so
    checkpoints go both ways. With the last four options, what docs/precision.md lists.
    """

    _rule = "adam"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
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
            decoupled_weight_decay=decoupled_weight_decay,
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
