"""What objects, containers and tensors hold, and how it comes back: in place, to the last bit. For the range test."""

from __future__ import annotations

import contextlib
import random
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.data import DataLoader, Sampler

from ._optimizer import FusedOptimizer


class Snapshot:
    """What objects, containers and tensors hold, to be put back in place behind a `with` block.

    load_state_dict would not do: it casts, makes new tensors, and leaves state that was not there before.
    """

    def __init__(self, device: torch.device | str | None) -> None:
        self._device = device
        self._seen: dict[int, Any] = {}  # by id; held, lest an id be given anew
        self._undo: list[Callable[[], object]] = []
        self._begin: list[Callable[[], object]] = []

    def add(self, *values: Any) -> None:
        """Take values, and what they hold, with all that torch's classes among them have as attributes."""
        pending = list(values)
        while pending:
            value = pending.pop()
            if id(value) in self._seen:
                continue
            if isinstance(value, Tensor):
                pending += self._add_tensor(value)
            elif isinstance(value, dict):
                items = list(value.items())
                self._undo.append(partial(_put_back_dict, value, items))
                pending += [part for item in items for part in item]
            elif isinstance(value, (list, set, deque)):
                items = list(value)
                self._undo.append(partial(_put_back, value, items))
                pending += items
            elif isinstance(value, tuple):
                pending += value
            elif isinstance(value, (nn.Module, Optimizer, LRScheduler, torch.amp.GradScaler)):
                pending.append(vars(value))
                if isinstance(value, FusedOptimizer):
                    # It counts skipped steps and the like; the test has one of its own, made when first needed.
                    self._begin.append(partial(vars(value).pop, "_stepper", None))
            else:
                undo = _put_back_generator(value)
                if undo is None:
                    continue
                self._undo.append(undo)
            self._seen[id(value)] = value

    def add_named(self, *values: Any) -> None:
        """Take values that are to be put back by the user's wish, with the attributes of objects of any class."""
        for value in values:
            if isinstance(value, (DataLoader, Sampler)):
                self.add_source(value)
            elif _is_array(value):
                self._undo.append(partial(value.__setitem__, ..., value.copy()))
            elif isinstance(value, (list, tuple, set, deque, dict)):
                self.add(value)
                self.add_named(*(part for part in _parts(value) if not _is_plain(part)))
            else:
                self.add(value)
                if id(value) not in self._seen:
                    if not hasattr(value, "__dict__"):
                        raise TypeError(f"range_test: cannot put back a {type(value).__name__}, of also_restore")
                    self.add(vars(value))

    def add_source(self, source: Any) -> None:
        """Take the attributes of a DataLoader, its samplers and what wraps them; generators and lists among them.

        Not the data: there may be more than fits into memory twice.
        """
        if id(source) in self._seen or not hasattr(source, "__dict__") or isinstance(source, Iterator):
            return  # what an iterator has given is gone
        self._seen[id(source)] = source
        attributes = vars(source)
        self._undo.append(partial(_put_back_dict, attributes, list(attributes.items())))
        for value in attributes.values():
            if isinstance(value, (DataLoader, Sampler)):
                self.add_source(value)
            elif isinstance(value, list):  # an order that is shuffled in place
                self._undo.append(partial(_put_back, value, list(value)))
            elif _put_back_generator(value) is not None:
                self.add(value)
        if isinstance(source, DataLoader) and attributes.get("_iterator") is not None:
            # Persistent workers, of an epoch that may not be over: the test has others.
            self._begin.append(partial(attributes.__setitem__, "_iterator", None))

    def add_random_states(self) -> None:
        """Take the global generators of Python, NumPy and torch."""
        self.add(torch.default_generator)
        if torch.cuda.is_initialized():
            self.add(*torch.cuda.default_generators)
        self._undo.append(partial(random.setstate, random.getstate()))
        numpy_random = sys.modules.get("numpy.random")
        if numpy_random is not None:
            self._undo.append(partial(numpy_random.set_state, numpy_random.get_state(legacy=False)))

    def __enter__(self) -> None:
        try:
            for begin in self._begin:
                begin()
        except BaseException:
            self.__exit__()
            raise

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        failures = []
        with _without_interrupts():
            for undo in self._undo:
                try:
                    undo()
                except Exception as failure:  # the rest is put back all the same
                    failures.append(failure)
        if failures:
            raise failures[0]

    def _add_tensor(self, tensor: Tensor) -> list[Any]:
        """Take a tensor's bytes and gradient; return what else it holds."""
        held: list[Any] = [vars(tensor)] if vars(tensor) else []
        if is_traceable_wrapper_subclass(tensor):
            held += [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        elif tensor.layout == torch.strided:  # others are replaced, not written
            memory = _memory(tensor)
            num_bytes = memory.untyped_storage().nbytes()
            saved = memory.to(self._device or memory.device, copy=True)
            self._undo.append(partial(_put_back_tensor, tensor, tensor.detach(), memory, num_bytes, saved))
        if tensor.is_leaf:
            self._undo.append(partial(_put_back_leaf, tensor, tensor.requires_grad, tensor.grad))
            if tensor.grad is not None:
                # It is put aside, and its bytes are copied all the same: DDP writes to the memory of its buckets.
                held.append(tensor.grad)
                self._begin.append(partial(setattr, tensor, "grad", None))
        return held


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Let Ctrl-C wait until the end of the block."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or handler is None:
        yield
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def _is_plain(value: Any) -> bool:
    """Whether there is nothing in a value that could change."""
    return value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device))


def _parts(container: Any) -> Iterator[Any]:
    return chain(*container.items()) if isinstance(container, dict) else iter(container)


def _memory(tensor: Tensor) -> Tensor:
    """A tensor's own memory as integers: NaNs and the flags of conjugates do not matter to these.

    Elements of expanded dimensions, which nothing can be copied to, come once.
    """
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(tensor.element_size(), torch.int64)
    per_element = max(1, tensor.element_size() // 8)  # complex128 has two
    size = [min(n, 1) if stride == 0 else n for n, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    stride = [stride * per_element for stride in tensor.stride()]
    return torch.empty(0, dtype=words, device=tensor.device).set_(
        tensor.untyped_storage(), tensor.storage_offset() * per_element, [*size, per_element], [*stride, 1]
    )


def _put_back_tensor(tensor: Tensor, as_it_was: Tensor, memory: Tensor, num_bytes: int, saved: Tensor) -> None:
    storage = memory.untyped_storage()
    if storage.nbytes() < num_bytes:
        storage.resize_(num_bytes)  # FSDP frees what it has gathered
    memory.copy_(saved)
    if any(get(tensor) != get(as_it_was) for get in (Tensor.data_ptr, Tensor.size, Tensor.stride)):
        tensor.data = as_it_was
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)  # fusedopt.CPUOffload looks at it


def _put_back_leaf(tensor: Tensor, requires_grad: bool, grad: Tensor | None) -> None:
    if tensor.requires_grad != requires_grad:
        tensor.requires_grad_(requires_grad)
    tensor.grad = grad


def _put_back_dict(container: dict[Any, Any], items: list[tuple[Any, Any]]) -> None:
    if not _are_same([*chain(*container.items())], [*chain(*items)]):
        container.clear()
        for key, value in items:  # a Counter's update() would count them
            container[key] = value


def _put_back(container: Any, items: list[Any]) -> None:
    if not _are_same([*container], items):
        container.clear()
        (container.update if isinstance(container, set) else container.extend)(items)


def _are_same(now: list[Any], before: list[Any]) -> bool:
    return len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True))


def _put_back_generator(value: Any) -> Callable[[], object] | None:
    """What puts a random generator back to the state it has now; None of what is none."""
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None and isinstance(value, numpy_random.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    if numpy_random is not None and isinstance(value, numpy_random.RandomState):
        return partial(value.set_state, value.get_state(legacy=False))
    return None
