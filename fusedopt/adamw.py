"""AdamW: Adam with decoupled weight decay."""

import torch

from ._optimizer import FusedOptimizer


class AdamW(FusedOptimizer, torch.optim.AdamW):
    r"""Adam with decoupled weight decay: a drop-in for :class:`torch.optim.AdamW`.

    :math:`\theta_{t-1}` is first multiplied by :math:`1 - lr \cdot weight\_decay`, and the gradient is left alone: from
    `Decoupled Weight Decay Regularization <https://arxiv.org/abs/1711.05101>`_ (Loshchilov and Hutter 2017,
    algorithm 2). Everything else is :class:`fusedopt.Adam`; ``weight_decay`` is 1e-2 by default.
    """

    _rule = "adam"
