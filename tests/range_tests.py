"""What the tests of the range test share: fingerprints of all that there is, and a model of one number."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Sampler

ENTERED = (nn.Module, Optimizer, LRScheduler, torch.amp.GradScaler, DataLoader, Sampler)


def bytes_of(tensor: Tensor, everything: bool) -> bytes:
    """Of the elements; or of the whole storage, with gaps, of which some were never written."""
    if not everything:
        return tensor.detach().resolve_conj().reshape(-1).view(torch.uint8).numpy().tobytes()
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,)).numpy().tobytes()


def fingerprint(roots: Mapping[str, Any], *, ids: bool = True) -> dict[str, Any]:
    """Every byte and every identity that can be reached, by path. Without `ids`, what two equal worlds share."""
    found: dict[str, Any] = {}
    seen: set[int] = set()

    def note(path: str, *facts: Any) -> None:
        assert path not in found
        found[path] = facts

    def walk(path: str, value: Any) -> None:
        if isinstance(value, (type(None), bool, int, float, str, bytes, torch.dtype, torch.device)):
            note(path, repr(value))
            return
        note(path, type(value), id(value) if ids else None)
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, Tensor):
            where = (value.data_ptr(), value.storage_offset()) if ids and value.layout == torch.strided else None
            note(path + ".meta", value.dtype, value.shape, value.requires_grad, value.is_leaf, where)
            if value.layout == torch.sparse_coo:
                walk(path + ".indices", bytes_of(value._indices(), ids))
                walk(path + ".values", bytes_of(value._values(), ids))
            else:
                note(path + ".bytes", value.stride(), bytes_of(value, ids))
            if value.is_leaf:
                walk(path + ".grad", value.grad)
            walk(path + ".dict", vars(value))
        elif isinstance(value, Mapping):
            for i, (key, item) in enumerate(value.items()):
                name = key if isinstance(key, str) else i
                walk(f"{path}.key({name})", key)
                walk(f"{path}[{name}]", item)
        elif isinstance(value, (list, tuple, deque)):
            for i, item in enumerate(value):
                walk(f"{path}[{i}]", item)
        elif isinstance(value, torch.Generator):
            note(path + ".state", value.get_state().numpy().tobytes())
        elif isinstance(value, random.Random):
            note(path + ".state", value.getstate())
        elif isinstance(value, np.random.Generator):
            note(path + ".state", repr(value.bit_generator.state))
        elif isinstance(value, ENTERED):
            walk(path + ".dict", vars(value))
            if "_stepper" in vars(value):  # of our optimizers, since their first step
                walk(path + ".skipped_steps", value.skipped_steps.item())
                walk(path + ".grad_norm", None if value.grad_norm is None else value.grad_norm.item())

    for name, root in roots.items():
        walk(name, root)
    return found


def global_random_states() -> dict[str, Any]:
    return {
        "python": repr(random.getstate()),
        "numpy": repr([part.tobytes() if isinstance(part, np.ndarray) else part for part in np.random.get_state()]),
        "torch": torch.get_rng_state().numpy().tobytes(),
    }


def assert_same(now: dict[str, Any], before: dict[str, Any]) -> None:
    assert now.keys() == before.keys()
    different = [path for path in before if now[path] != before[path]]
    assert not different, f"{len(different)} of {len(before)} differ: {different[:5]}"


class Parabola(nn.Module):
    """A model of one number, whose loss is curvature / 2 * x^2."""

    def __init__(self, curvature: float = 1.0, x: float = 1.0) -> None:
        super().__init__()
        self.curvature = curvature
        self.x = Parameter(torch.tensor(x, dtype=torch.float64))

    def forward(self, batch: Any = None) -> Tensor:
        return self.curvature / 2 * self.x.square()


def quadratic(model: nn.Module, batch: Any) -> Tensor:
    return model(batch)


def forever() -> list[None]:
    return [None]  # it is begun again
