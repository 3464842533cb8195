"""Clipping gradients in place."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from . import _sharding as sharding
from ._config import _C
from ._dynamo import not_compiled

_clipper = _C.Clipper()


def _buffer(size: int, device: str) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return torch.zeros(size, dtype=torch.float64, device=device)


@not_compiled  # as of step()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    r"""Scale gradients in place so that the norm of all of them is at most `max_norm`; return the norm before.

    A drop-in for :func:`torch.nn.utils.clip_grad_norm_`: every gradient is multiplied by
    :math:`\min(1, max\_norm / (norm + 10^{-6}))`. One pass (on CUDA one launch a dtype) reads all gradients for the
    norm, one scales them; an optimizer's `max_grad_norm` saves the second. The norm is accumulated in double, in an
    order that depends on neither threads nor device. As in torch, the device is not waited for.

    Args:
        parameters: a tensor, or tensors, whose `.grad` is scaled; those without one are passed over.
        max_norm: the largest norm left.
        norm_type: 2.0 or inf; torch's function is called for others (default: 2.0).
        error_if_nonfinite: raise if the norm is inf or nan, and scale nothing; on CUDA this waits for the device, and
            torch's function is called (default: False).
        foreach: accepted as torch accepts it; the native path is taken whatever it says.

    Returns:
        The norm, a 0-d tensor on the gradients' device: float32 (in torch of the gradients' dtype if they have 16
        bits), float64 if a gradient is. Torch's function is also called for gradients that are sparse, of tensor
        subclasses, on several devices, or that share memory.

    Raises:
        RuntimeError: the norm is not finite, and `error_if_nonfinite` is set.
    """
    params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    order = float(norm_type)
    if order in (2.0, math.inf):
        reduction = sharding.reduction_of(params)
        if reduction is not None and error_if_nonfinite and reduction.device.type != "cpu":
            raise RuntimeError(
                "clip_grad_norm_: error_if_nonfinite is not supported for DTensors on a GPU: look at the norm returned"
            )
        found = _clipper.clip(
            params,
            float(max_norm),
            order != 2,
            error_if_nonfinite,
            _buffer,
            reduction,
            torch.get_num_threads(),
        )
        if found is None and reduction is not None:  # torch's way communicates otherwise than other ranks may
            raise RuntimeError(
                "clip_grad_norm_: beside DTensors all gradients must be dense, on one device, without memory in "
                "common, and not complex with norm_type=inf"
            )
        if found is not None:
            norm, is_double = found
            dtype = torch.float64 if is_double else torch.float32
            if isinstance(norm, Tensor):
                return norm[0].to(dtype, copy=True)
            if error_if_nonfinite and not math.isfinite(norm):
                raise RuntimeError(
                    f"clip_grad_norm_: the norm of order {order} of the gradients is {norm}, so they were not clipped; "
                    "error_if_nonfinite=False clips all the same"
                )
            return torch.tensor(norm, dtype=dtype, device="cpu")
    again = parameters if isinstance(parameters, Tensor) else params
    return torch.nn.utils.clip_grad_norm_(again, max_norm, norm_type, error_if_nonfinite, foreach)
