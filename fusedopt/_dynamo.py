"""What torch.compile is to leave alone, without importing torch._dynamo, which takes a second, where it is not used."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from torch._compile import _disable_dynamo

P = ParamSpec("P")
T = TypeVar("T")


def not_compiled(function: Callable[P, T]) -> Callable[P, T]:
    """As torch.compiler.disable, of what compiled code calls by name; of its hooks Dynamo would trace the wrapper."""
    disabled = _disable_dynamo(function)

    @functools.wraps(function)
    def inner(*args: P.args, **kwargs: P.kwargs) -> T:
        return (disabled if "torch._dynamo" in sys.modules else function)(*args, **kwargs)

    return inner


_TORCHS_WRAPPER = _disable_dynamo(len).__code__  # type: ignore[attr-defined]  # it is a function, of one code for all


def beneath(method: Any) -> Any:
    """A method of torch's, without the wrapper that would import torch._dynamo at the first call."""
    function: Any = getattr(method, "__func__", None)
    if "torch._dynamo" in sys.modules or getattr(function, "__code__", None) is not _TORCHS_WRAPPER:
        return method
    return functools.partial(function.__wrapped__, method.__self__)
