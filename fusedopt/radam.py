"""RAdam."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from ._optimizer import FusedOptimizer


class RAdam(FusedOptimizer, torch.optim.RAdam):
    r"""Rectified Adam: a drop-in for :class:`torch.optim.RAdam`, with AMSGrad and three choices more.

    .. math::
        \rho_\infty &= \frac{2}{1 - \beta_2} - 1 \qquad
            \rho_t = \rho_\infty - \frac{2 t \beta_2^t}{1 - \beta_2^t} \qquad
            r_t = \sqrt{\frac{(\rho_t - 4)(\rho_t - 2) \rho_\infty}{(\rho_\infty - 4)(\rho_\infty - 2) \rho_t}} \\
        \theta_t &= \theta_{t-1} - \frac{lr}{1 - \beta_1^t} \; m_t \cdot
            \begin{cases}
                r_t \sqrt{1 - \beta_2^t} \big/ \left( \sqrt{v_t} + \epsilon \right) & \rho_t > 5 \\
                1 & \text{otherwise}
            \end{cases}

    with the moments :math:`m_t` and :math:`v_t` of :class:`fusedopt.Adam`, from
    `On the Variance of the Adaptive Learning Rate and Beyond <https://arxiv.org/abs/1908.03265>`_ (Liu et al. 2019,
    algorithm 2; there :math:`\rho_t > 4`, here 5 as in torch). With beta2 = 0.999 the first rectified step is the
    sixth; with beta2 <= 2/3 :math:`\rho_\infty \le 5` and no step ever is. With ``amsgrad``, :math:`v_t` under the root
    is its running maximum (`Reddi et al. 2018 <https://openreview.net/forum?id=ryQu7f-RZ>`_); decoupled weight decay is
    that of `Loshchilov and Hutter 2017 <https://arxiv.org/abs/1711.05101>`_.

    Args:
        params: as for :class:`fusedopt.Adam`.
        lr: learning rate, a float or a one-element tensor, as for Adam (default: 1e-3).
        betas: decay rates of the moments, as for Adam (default: (0.9, 0.999)).
        eps: added to the denominator, as for Adam (default: 1e-8).
        weight_decay: coefficient (default: 0).
        decoupled_weight_decay: decay the parameter itself instead of adding to the gradient (default: False).
        foreach: accepted as torch accepts it; the native path is taken whatever it says.
        maximize: ascend (default: False).
        capturable: the step counts of CUDA parameters lie on their device, as for Adam (default: False).
        differentiable: True takes torch's own for-loop (default: False); it knows none of the options below.
        amsgrad: use the running maximum of the second moment (default: False).
        degenerate_to_sgd: while the variance is not tractable (:math:`\rho_t \le 5`), True: take a step of SGD with
            momentum, the second case above, as torch does; False: move the moments, and decoupled weight decay, but
            take no step (default: True).
        optimized_update: True: add eps to :math:`\sqrt{v_t}`, as torch does and as above; False: to the bias-corrected
            root, :math:`r_t / ( \sqrt{v_t} / \sqrt{1 - \beta_2^t} + \epsilon )` (default: True).

        max_grad_norm, norm_type, skip_nonfinite, ema_decay, stats: what is done around the update, as for Adam.
        master_weights, rounding, state_dtype, seed: how parameters and state are stored, as for Adam.

    Raises:
        ValueError: an option out of range, as torch raises it.
        RuntimeError: in :meth:`step`, about a parameter, gradient or state that cannot be updated rightly, sparse
            gradients among them.

    The state of a parameter is that of :class:`fusedopt.Adam`, and torch's own: checkpoints go both ways.
    """

    _rule = "radam"
    _own_options: ClassVar[dict[str, Any]] = {"amsgrad": False, "degenerate_to_sgd": True, "optimized_update": True}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        amsgrad: bool = False,
        degenerate_to_sgd: bool = True,
        optimized_update: bool = True,
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
            decoupled_weight_decay,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
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
        self._add_options(amsgrad=amsgrad, degenerate_to_sgd=degenerate_to_sgd, optimized_update=optimized_update)
