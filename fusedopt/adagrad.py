"""Adagrad, also of sparse gradients."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from ._optimizer import FusedOptimizer


class Adagrad(FusedOptimizer, torch.optim.Adagrad):
    r"""Adagrad: a drop-in for :class:`torch.optim.Adagrad`, with fused updates from sparse gradients.

    .. math::
        s_t = s_{t-1} + g_t^2 \qquad
        \theta_t = \theta_{t-1} - \frac{lr}{1 + (t - 1) \, lr\_decay} \; g_t \Big/ \left( \sqrt{s_t} + \epsilon \right)

    from `Adaptive Subgradient Methods for Online Learning and Stochastic Optimization
    <https://jmlr.org/papers/v12/duchi11a.html>`_ (Duchi et al. 2011; its diagonal form, with
    :math:`\delta = \epsilon`).

    A sparse (COO) gradient, coalesced or not, with any number of dense dimensions, updates the rows that it has values
    for; no others are read or written. Values for the same row are added up first. Parameters with sparse and with
    dense gradients may share an optimizer: they are updated by the same native call. On a CUDA device a gradient that
    is not coalesced is first given to :meth:`torch.Tensor.coalesce`, which may wait for the device. One that says it is
    coalesced is believed there, since the host does not see the indices: those out of range are left out, and if some
    repeat, the result is undefined. On the CPU they are looked at.

    Args:
        params: as for :class:`fusedopt.Adam`. Complex parameters are updated as their real views, from sparse gradients
            too (torch then squares and takes roots of complex numbers).
        lr: learning rate, a float or a one-element tensor, as for Adam (default: 1e-2).
        lr_decay: how fast it falls with the step count (default: 0).
        weight_decay: coefficient, L2; not with sparse gradients (default: 0).
        initial_accumulator_value: :math:`s_0` (default: 0).
        eps: added to the denominator (default: 1e-10).
        foreach: accepted as torch accepts it; the native path is taken whatever it says.
        maximize: ascend (default: False).
        differentiable: True takes torch's own for-loop (default: False); it does not know `eps_inside_sqrt`.
        fused: every step is fused; True puts the step counts of CUDA parameters on their device (default: None).
        eps_inside_sqrt: True: divide by :math:`\sqrt{s_t + \epsilon}` (default: False).

        max_grad_norm, norm_type, skip_nonfinite, ema_decay, stats: what is done around the update, as for Adam.
        master_weights, rounding, state_dtype, seed: how parameters and state are stored, as for Adam.

    Raises:
        ValueError: an option out of range, as torch raises it.
        RuntimeError: in :meth:`step`, about a parameter, gradient or state that cannot be updated rightly: a sparse
            gradient with weight_decay, one with an index out of range (on the CPU), ...

    The state of a parameter, made by the constructor: ``step`` (0-d) and ``sum`` (the parameter's shape and dtype):
    torch's own, so checkpoints go both ways. :meth:`share_memory` moves the sums into shared memory.
    """

    _rule = "adagrad"
    _own_options: ClassVar[dict[str, Any]] = {"eps_inside_sqrt": False}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        eps_inside_sqrt: bool = False,
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
            lr_decay,
            weight_decay,
            initial_accumulator_value,
            eps,
            foreach,
            maximize=maximize,
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
        self._add_options(eps_inside_sqrt=eps_inside_sqrt)
        # torch's constructor has made sums in the parameters' dtypes.
        for group in self.param_groups:
            for param in group["params"]:
                names = [name for name in self._stepper.state_names(param, group) if name[0] != "ema"]
                if any(isinstance(name, tuple) for name in names):
                    (self.state[param],) = self._new_states([(param, names, group)])

    def share_memory(self) -> None:
        """Move all state into shared memory, as torch's moves the sums."""
        super().share_memory()
        for state in self.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.share_memory_()

    def _initial_state(self, param: Tensor, name: str, dtype: torch.dtype) -> Tensor:
        value = self.defaults["initial_accumulator_value"]
        fill = complex(value, value) if param.is_complex() else value
        return torch.full_like(param, fill, dtype=dtype, memory_format=torch.preserve_format)
