"""What the tests of the optimizer phase share: inputs, and the same phase by torch's separate operations."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from optimizers import FLOATS, Row, generator
from reference import assert_same_bits, torch_loop_step, transcription, varied_values
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

SIZES = (5, 1, 33, 0, 5000, 130)


def make_params(dtype: torch.dtype = torch.float32, sizes: Sequence[int] = SIZES) -> list[Parameter]:
    g = generator(1)
    return [Parameter(varied_values(size, dtype, g, wild=False)) for size in sizes]


def make_grads(step: int, params: Sequence[Tensor], lacking: Sequence[int] = ()) -> list[Tensor | None]:
    g = generator(100 + step)
    grads = [varied_values(p.numel(), p.dtype, g, wild=False).view(p.shape) for p in params]
    return [None if i in lacking else grad for i, grad in enumerate(grads)]


def set_grads(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = None if grad is None else grad.clone()


def params_of(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def bytes_of(optimizer: Optimizer) -> list[bytes]:
    tensors = [p.detach() for p in params_of(optimizer)]
    for state in optimizer.state.values():
        tensors += [value for _, value in sorted(state.items())]
    return [tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"" for tensor in tensors]


def opmath(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def unscaled(grads: Sequence[Tensor | None], inv_scale: float | None) -> list[Tensor]:
    """The gradients that there are, in opmath."""
    found = [grad.to(opmath(grad.dtype)) for grad in grads if grad is not None]
    return found if inv_scale is None else [grad * inv_scale for grad in found]


def exact_norm(grads: Sequence[Tensor], order: float = 2.0) -> float:
    values = torch.cat([grad.double().abs().flatten() for grad in grads])
    if order == math.inf:
        return values.max().item()
    return math.sqrt(math.fsum((values**2).tolist())) if values.isfinite().all() else math.nan


def within_an_ulp(actual: Tensor, exact: float) -> bool:
    """Within one unit in the last place of its dtype of what an exact norm rounds to."""
    wanted = torch.tensor(exact, dtype=actual.dtype)
    up, down = (torch.nextafter(wanted, torch.tensor(x, dtype=actual.dtype)) for x in (math.inf, -math.inf))
    return bool(down <= actual <= up) or (math.isnan(exact) and not actual.isfinite())


class Separate:
    """An optimizer and what is around it by torch's operations, one after the other, on parameters of their own."""

    def __init__(self, row: Row, ours: Optimizer, dtype: torch.dtype) -> None:
        self.options = ours.param_groups[0]
        self.params = [Parameter(p.detach().clone()) for p in params_of(ours)]
        self.formula = None
        if row.own or dtype not in FLOATS:
            self.formula = transcription(ours)
            self.state = [self.formula.first_state(p) for p in self.params]
            self.counts = [0] * len(self.params)
        else:
            self.optimizer = row.make_torch(self.params)
        module = torch.nn.ParameterList(self.params)
        decay = self.options["ema_decay"]
        self.averaged = None if decay is None else AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.module = module

    def step(self, grads: Sequence[Tensor | None], norm: Tensor | None, inv_scale: float | None = None) -> bool:
        """Whether it was not skipped. `norm`: what ours measured, whose last bit may not be torch's."""
        if self.options["skip_nonfinite"] and not all(g.isfinite().all() for g in unscaled(grads, inv_scale)):
            return False
        coefficient = None
        if self.options["max_grad_norm"] is not None:
            assert norm is not None
            coefficient = torch.clamp(self.options["max_grad_norm"] / (norm + 1e-6), max=1.0)
        if self.formula is not None:
            self._transcribed(grads, inv_scale, coefficient)
        else:
            set_grads(self.params, grads)
            for param in self.params:
                if param.grad is not None and inv_scale is not None:
                    param.grad.mul_(inv_scale)
                if param.grad is not None and coefficient is not None:
                    param.grad.mul_(coefficient)
            torch_loop_step(self.optimizer)
        if self.averaged is not None:
            self.averaged.update_parameters(self.module)
        return True

    def _transcribed(self, grads: Sequence[Tensor | None], inv_scale: float | None, coefficient: Tensor | None) -> None:
        assert self.formula is not None
        clip = None if coefficient is None else coefficient.item()
        for i, grad in enumerate(grads):
            if grad is None:
                continue
            self.counts[i] += 1
            param = self.params[i].detach()
            new, self.state[i] = self.formula.step(param, grad, self.state[i], self.counts[i], inv_scale, clip)
            param.copy_(new)

    def state_of(self, i: int) -> dict[str, Tensor]:
        if self.formula is not None:
            return self.state[i] if self.counts[i] else {}
        return {k: v for k, v in self.optimizer.state.get(self.params[i], {}).items() if k != "step"}

    def assert_same(self, ours: Optimizer, when: str) -> None:
        averages = list(self.averaged.module.parameters()) if self.averaged is not None else []
        for i, param in enumerate(params_of(ours)):
            assert_same_bits(param, self.params[i], f"parameter {i} {when}")
            state = ours.state.get(param, {})
            for name, value in self.state_of(i).items():
                assert_same_bits(state[name], value, f"{name} of parameter {i} {when}")
            if averages:
                # Of a parameter that never moved there is none: it is the average.
                assert_same_bits(state.get("ema", param), averages[i].detach(), f"ema of parameter {i} {when}")


def expected_stats(before: Tensor, after: Tensor, grad: Tensor, lost: int | None) -> dict[str, float]:
    op = opmath(before.dtype)
    old, new, g = before.to(op), after.to(op), grad.to(op)
    ratios = ((new - old).abs() / old.abs())[old.isfinite() & (old != 0)]
    norms = {
        "grad_norm": g.double().norm(),
        "param_norm": new.double().norm(),
        "update_norm": (new.double() - old.double()).norm(),
    }
    found: dict[str, float] = {name: norm.to(op).item() for name, norm in norms.items()}
    found["max_relative_update"] = ratios.max().item() if ratios.numel() else 0.0
    found["nonfinite_grads"] = int((~g.isfinite()).sum())
    if lost is not None:
        found["lost_updates"] = lost
    return found


def assert_close_stats(actual: dict[str, float], expected: dict[str, float], dtype: torch.dtype, when: str) -> None:
    for name, value in expected.items():
        # Norms are sums of 16 squares in opmath, then in double: 2.2e-8 was the largest relative error seen (float32),
        # so they round to a neighbour at most.
        tolerance = 1.2e-7 if name.endswith("_norm") else 0
        assert actual[name] == pytest.approx(value, rel=tolerance, abs=0, nan_ok=True), f"{name} {when}"
        if dtype != torch.float64 and not math.isnan(actual[name]):
            assert float(np.float32(actual[name])) == actual[name], f"{name} is no float {when}"
