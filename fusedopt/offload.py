"""CPU offload: parameters and gradients on the GPU; masters, optimizer state and the step on the host."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import _precision as precision
from ._dynamo import not_compiled
from ._optimizer import FusedOptimizer

_ALIGNMENT = 64  # bytes: a tensor begins on a cache line of its own


class _Transfers:
    """What goes between a device and the host. Here the device is the host itself: copies are made at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def fetch(self, host: Tensor, grad: Tensor) -> None:
        """Begin to copy a gradient, as what the current stream has been given so far leaves it."""
        host.copy_(grad)

    def fetched(self) -> Any:
        """An event behind all that was begun to be fetched."""

    def wait(self, event: Any) -> None:
        """Let the host wait for such an event."""

    def begin_sending(self) -> None:
        """What the current stream has been given so far may use the weights."""

    def send(self, param: Tensor, host: Tensor) -> None:
        """Begin to copy a weight to the device."""
        param.copy_(host)

    def end_sending(self) -> None:
        """What the current stream is given from now on uses the new weights."""

    def wait_sent(self) -> None:
        """Let the host wait until it may write what was sent."""

    def is_capturing(self) -> bool:
        return False


class _CudaTransfers(_Transfers):
    """With a GPU: a stream for each direction. Both run beside each other, and beside the current stream."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._in, self._out = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def _current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)

    def fetch(self, host: Tensor, grad: Tensor) -> None:
        self._in.wait_stream(self._current())
        with torch.cuda.stream(self._in):
            host.copy_(grad, non_blocking=True)
        grad.record_stream(self._in)  # it may be freed before it was read, and its memory must not go to others

    def fetched(self) -> Any:
        return self._in.record_event()

    def wait(self, event: Any) -> None:
        event.synchronize()

    def begin_sending(self) -> None:
        self._out.wait_stream(self._current())

    def send(self, param: Tensor, host: Tensor) -> None:
        with torch.cuda.stream(self._out):
            param.copy_(host, non_blocking=True)

    def end_sending(self) -> None:
        self._current().wait_stream(self._out)

    def wait_sent(self) -> None:
        self._out.synchronize()

    def is_capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _host_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Uninitialized host tensors of these shapes and dtypes, row-major and in one buffer; pinned, if others are CUDA's.

    One buffer, because torch rounds each pinned allocation up to a power of two.
    """
    sizes = [-(-_num_bytes(tensor) // _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
    buffer = torch.empty(sum(sizes), dtype=torch.uint8, device="cpu", pin_memory=any(t.is_cuda for t in tensors))
    pieces = [piece[: _num_bytes(tensor)] for piece, tensor in zip(buffer.split(sizes), tensors, strict=True)]
    return [piece.view(tensor.dtype).view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]


@dataclass(eq=False)
class _Entry:
    """A parameter, and what the host has of it."""

    param: Tensor
    host: Parameter  # that of the host's optimizer
    grad: Tensor  # where its gradient arrives
    fetched: tuple[Tensor, int] | None = None  # the gradient that was fetched since the last step, and its version
    version: int = -1  # of the parameter, when it was last as the host has it, and its address
    address: int = -1

    def note(self) -> None:
        self.version, self.address = _version(self.param), self.param.data_ptr()


@dataclass(eq=False)
class _Bucket:
    """Parameters of one device that are fetched, stepped and sent together."""

    transfers: _Transfers
    entries: list[_Entry]
    arrived: Any = None  # the event of the last gradient that was fetched

    def fetch(self, entry: _Entry, grad: Tensor) -> None:
        if entry.grad.dtype != grad.dtype:
            entry.grad = _host_like([grad])[0]
        self.transfers.fetch(entry.grad, grad)
        entry.fetched = grad, _version(grad)
        self.arrived = self.transfers.fetched()

    def fetch_rest(self) -> None:
        """Fetch the gradients that have not been fetched as they are now."""
        for entry in self.entries:
            grad = entry.param.grad
            if grad is None:
                entry.fetched = None
            elif entry.fetched is None or entry.fetched[0] is not grad or entry.fetched[1] != _version(grad):
                self.fetch(entry, grad)

    def send(self, entries: Sequence[_Entry]) -> None:
        for entry in entries:
            self.transfers.send(entry.param, entry.host)
            entry.note()


@not_compiled
def _fetch(bucket_of: weakref.ref[_Bucket], entry_of: weakref.ref[_Entry], param: Tensor) -> None:
    """What backward calls; the parameter, which has it, keeps no optimizer alive."""
    bucket, entry, grad = bucket_of(), entry_of(), param.grad
    if bucket is not None and entry is not None and grad is not None and grad.layout == torch.strided:
        with torch.no_grad():
            bucket.fetch(entry, grad)


class CPUOffload(Optimizer):
    """An optimizer whose state and step are the host's, for parameters on a GPU (**not yet run on a GPU**).

    It holds a copy of each parameter, and of its gradient, in pinned host memory, and an optimizer of this package over
    these: `optimizer`. A step goes bucket by bucket, each way on a stream of its own: while one bucket is stepped on
    the CPU, the gradients of the next come and the weights of the one before go. The bits are those of the same
    optimizer over the parameters themselves, and so is the `state_dict`, in either direction. The method is that of
    `ZeRO-Offload <https://arxiv.org/abs/2101.06840>`_ (Ren et al. 2021), without its delayed update. `docs/offload.md`
    tells what to choose, and what it costs.

    Args:
        params: parameters or groups, as for any optimizer. Those on the CPU are taken too, for tests.
        optimizer_class: :class:`fusedopt.AdamW` or another of this package; or what makes one, called with the groups
            of host parameters and `options`.
        bucket_bytes: parameters are put together up to this many bytes; a larger one is a bucket (default: 32 MiB).
        overlap_backward: begin to fetch each gradient when backward has accumulated it, instead of in the step; can be
            switched at any time (default: False). One that is changed later is fetched again, if autograd's version
            counters tell: not what `torch.distributed` reduces in place, and not what is done to `.data`.
        options: of the optimizer. With `max_grad_norm`, `skip_nonfinite`, `ema_decay` or `stats`, which concern all
            gradients at once, all buckets are one.

    A parameter that was changed from outside is noticed as such gradients are; for others, see :meth:`read_params`.

    Attributes:
        optimizer: the optimizer over the host's parameters; it takes its options from the groups here.

    Raises:
        TypeError, ValueError: a parameter is on no such device, shares memory with another, or is a tensor subclass;
            what `optimizer_class` made is not of this package, or torch's own loop (`differentiable=True`);
            `bucket_bytes` is no positive integer.
    """

    optimizer: FusedOptimizer
    # A GradScaler leaves unscaling to the step, and hands it the scale and its verdict.
    _step_supports_amp_scaling = True
    grad_scale: Tensor | None
    found_inf: Tensor | None

    def __init__(
        self,
        params: Any,
        optimizer_class: Callable[..., Optimizer],
        *,
        bucket_bytes: int = 2**25,
        overlap_backward: bool = False,
        **options: Any,
    ) -> None:
        if not isinstance(bucket_bytes, int) or bucket_bytes < 1:
            raise ValueError(f"CPUOffload: bucket_bytes must be an integer of at least 1, got {bucket_bytes!r}")
        self.bucket_bytes = bucket_bytes
        self._transfers: dict[torch.device, _Transfers] = {}
        self._buckets: list[_Bucket] = []
        self._entries: dict[Tensor, _Entry] = {}  # by parameter, as the groups have them
        self._handles: list[Any] = []
        self._overlap_backward = False
        super().__init__(params, {})
        optimizer = optimizer_class(self._host_groups(0), **options)
        if not isinstance(optimizer, FusedOptimizer):
            raise TypeError(
                f"CPUOffload: optimizer_class must make an optimizer of fusedopt, got {type(optimizer).__name__}"
            )
        self.optimizer = optimizer
        self.defaults = dict(optimizer.defaults)
        self._take_options()
        self._give_options()
        self.overlap_backward = overlap_backward

    # --- groups and options

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as :meth:`torch.optim.Optimizer.add_param_group` does."""
        super().add_param_group(param_group)
        if "optimizer" not in self.__dict__:
            return  # the constructor's
        try:
            self.optimizer.add_param_group(self._host_groups(len(self.param_groups) - 1)[0])
        except BaseException:
            self.param_groups.pop()
            raise
        self._take_options()
        self.overlap_backward = self._overlap_backward

    def _host_groups(self, first: int) -> list[dict[str, Any]]:
        """Groups of host parameters for the groups from `first` on, whose buckets are made."""
        for number, group in enumerate(self.param_groups[first:], start=first):
            for index, param in enumerate(group["params"]):
                if is_traceable_wrapper_subclass(param):
                    kind = type(param).__name__
                    raise TypeError(f"CPUOffload: {self._name(number, index)} is a {kind}; give it the local tensors")
                if param.device.type not in ("cuda", "cpu") or param.layout != torch.strided:
                    what = f"on '{param.device}', with layout {param.layout}"
                    raise ValueError(f"CPUOffload: {self._name(number, index)} is {what}; it has to be dense, on a GPU")
        self._check_memory()
        # The last of a model are the first to have their gradients.
        filling: dict[torch.device, list[Tensor]] = {}
        params = [param for group in self.param_groups[first:] for param in group["params"]]
        for param in reversed(list(dict.fromkeys(params))):  # the optimizer says what it thinks of one that comes twice
            bucket = filling.setdefault(param.device, [])
            if bucket and sum(map(_num_bytes, bucket)) + _num_bytes(param) > self.bucket_bytes:
                self._add_bucket(filling.pop(param.device))
                bucket = filling.setdefault(param.device, [])
            bucket.append(param)
        for bucket in filling.values():
            self._add_bucket(bucket)
        hosts = [[self._entries[param].host for param in group["params"]] for group in self.param_groups[first:]]
        return [{**group, "params": host} for group, host in zip(self.param_groups[first:], hosts, strict=True)]

    def _check_memory(self) -> None:
        """Raise if parameters overlap: their copies would not. Not for those that leave gaps, which may interlock."""
        spans = []
        for number, group in enumerate(self.param_groups):
            for index, param in enumerate(group["params"]):
                if not param.numel():
                    continue
                extent = 1 + sum((size - 1) * stride for size, stride in zip(param.shape, param.stride(), strict=True))
                if param.numel() > extent:
                    where = self._name(number, index)
                    raise ValueError(f"CPUOffload: {where} has elements that share memory; clone it")
                if param.numel() == extent:
                    end = param.data_ptr() + _num_bytes(param)
                    spans.append((str(param.device), param.data_ptr(), end, number, index, param))
        spans.sort(key=lambda span: span[:5])
        for (device, _, end, *place, first), (other_device, begin, _, *other, second) in itertools.pairwise(spans):
            if device == other_device and begin < end and first is not second:
                raise ValueError(
                    f"CPUOffload: {self._name(*other)} shares memory with {self._name(*place)}; list a tied parameter "
                    "once"
                )

    def _add_bucket(self, params: list[Tensor]) -> None:
        device = params[0].device
        if device not in self._transfers:
            self._transfers[device] = (_CudaTransfers if device.type == "cuda" else _Transfers)(device)
        entries = []
        for param, host, grad in zip(params, _host_like(params), _host_like(params), strict=True):
            host.copy_(param.detach())
            entry = _Entry(param, Parameter(host, requires_grad=False), grad)
            entry.host.grad_dtype = None  # any that the step takes
            entry.note()
            entries.append(entry)
        self._entries.update((entry.param, entry) for entry in entries)
        self._buckets.append(_Bucket(self._transfers[device], entries))

    def _name(self, group: int, index: int) -> str:
        names = self.param_groups[group].get("param_names", ())
        return f"param_groups[{group}]['params'][{index}]" + (f" ({names[index]!r})" if index < len(names) else "")

    def _name_of(self, entry: _Entry) -> str:
        for number, group in enumerate(self.param_groups):
            for index, param in enumerate(group["params"]):
                if param is entry.param:
                    return self._name(number, index)
        return "a parameter"

    def _take_options(self) -> None:
        for group, host in zip(self.param_groups, self.optimizer.param_groups, strict=True):
            group.update((name, value) for name, value in host.items() if name != "params")

    def _give_options(self) -> None:
        groups = self.optimizer.param_groups
        hosts = [[self._entries.get(param) for param in group["params"]] for group in self.param_groups]
        if [[entry and id(entry.host) for entry in entries] for entries in hosts] != [
            [id(host) for host in group["params"]] for group in groups
        ]:
            raise RuntimeError(
                "CPUOffload: param_groups has other parameters than the optimizer was made of; add_param_group() adds"
            )
        for group, host in zip(self.param_groups, groups, strict=True):
            if group["differentiable"]:
                raise ValueError("CPUOffload: differentiable=True takes torch's own loop, which cannot be offloaded")
            host.update((name, value) for name, value in group.items() if name != "params")

    # --- gradients during backward

    @property
    def overlap_backward(self) -> bool:
        """Whether gradients are fetched during backward. Of several micro-batches, do so in the last only."""
        return self._overlap_backward

    @overlap_backward.setter
    def overlap_backward(self, value: bool) -> None:
        for handle in self._handles:
            handle.remove()
        self._overlap_backward, self._handles = value, []
        for bucket in self._buckets if value else ():
            for entry in bucket.entries:
                if entry.param.requires_grad:
                    hook = partial(_fetch, weakref.ref(bucket), weakref.ref(entry))
                    self._handles.append(entry.param.register_post_accumulate_grad_hook(hook))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As :meth:`torch.optim.Optimizer.zero_grad`; gradients fetched and not stepped are let go, too."""
        super().zero_grad(set_to_none)
        for entry in self._entries.values():
            entry.fetched = None

    # --- the step

    @not_compiled
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient. The host waits for these; the current stream for the weights.

        Args:
            closure: re-evaluates the model and returns the loss; it runs with gradients enabled.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: a parameter was replaced, a gradient is sparse, or a CUDA graph is being captured: nothing was
                changed. What the optimizer's own step raises: the buckets before were updated.
        """
        if any(transfers.is_capturing() for transfers in self._transfers.values()):
            raise RuntimeError("CPUOffload: the step is the host's, and no part of a CUDA graph: end the capture first")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._give_options()
        self._read_changed()
        for entry in self._entries.values():
            if entry.param.grad is not None and entry.param.grad.layout != torch.strided:
                raise RuntimeError(f"CPUOffload: {self._name_of(entry)} has a sparse gradient; it has to be dense")

        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found_inf is not None and scale is None:
            # GradScaler.unscale_() has been there, whose writing no version counter tells.
            for entry in self._entries.values():
                entry.fetched = None
        for bucket in self._buckets:
            bucket.fetch_rest()
        for transfers in self._transfers.values():
            transfers.begin_sending()
        at_once = any(
            group["max_grad_norm"] is not None
            or group["skip_nonfinite"]
            or group["ema_decay"] is not None
            or group["stats"]
            for group in self.param_groups
        )
        if found_inf is not None:  # to read it waits for the device, as the step will
            verdict = torch.as_tensor(found_inf, device="cpu")
            at_once |= bool(verdict)  # the step is skipped, once
            self.optimizer.found_inf = verdict  # type: ignore[attr-defined]  # GradScaler's
            self.optimizer.grad_scale = scale if scale is None else scale.cpu()  # type: ignore[attr-defined]  # the same
        try:
            for part in [self._buckets] if at_once else [[bucket] for bucket in self._buckets]:
                entries = [[entry for entry in bucket.entries if entry.fetched] for bucket in part]
                if at_once or any(entries):
                    self._step_buckets(part, entries)
        finally:
            for name in ("found_inf", "grad_scale"):
                vars(self.optimizer).pop(name, None)
            for transfers in self._transfers.values():
                transfers.end_sending()
        return loss

    def _step_buckets(self, buckets: list[_Bucket], entries: list[list[_Entry]]) -> None:
        """Step those parameters of some buckets whose gradients were fetched, and begin to send them."""
        # A gradient was fetched behind what the current stream had been given, and that waits for all sent before: so
        # the host may write the weights, too.
        for bucket, of_bucket in zip(buckets, entries, strict=True):
            if of_bucket:
                bucket.transfers.wait(bucket.arrived)
        everything = [entry for of_bucket in entries for entry in of_bucket]
        step: Any = type(self.optimizer).step
        try:
            for entry in everything:
                entry.host.grad = entry.grad
            # Beneath torch's wrapper, which calls hooks: this is a part of a step.
            (step.__wrapped__ if getattr(step, "hooked", False) else step)(self.optimizer)
        finally:
            for entry in everything:
                entry.host.grad = entry.fetched = None
        for bucket, of_bucket in zip(buckets, entries, strict=True):
            bucket.send(of_bucket)

    # --- weights that change otherwise

    def _read_changed(self, every: bool = False) -> None:
        for bucket in self._buckets:
            for entry in bucket.entries:
                param = entry.param
                if not every and entry.version == _version(param) and entry.address == param.data_ptr():
                    continue
                was = (entry.host.dtype, tuple(entry.host.shape), bucket.transfers.device)
                found = (param.dtype, tuple(param.shape), param.device)
                if found != was:
                    raise RuntimeError(
                        f"CPUOffload: {self._name_of(entry)} was {was} (dtype, shape, device) and is {found} now; make "
                        "the optimizer when the model is as it is to be trained"
                    )
                entry.host.copy_(param)
                entry.note()

    @torch.no_grad()
    def read_params(self) -> None:
        """Take the parameters as they are on the device. Waits for it.

        Needed only behind changes that autograd's version counters do not tell, those of `torch.distributed` or through
        `.data`; others (`model.load_state_dict`) are noticed by the next step.
        """
        self._read_changed(every=True)

    def _wait_sent(self) -> None:
        for transfers in self._transfers.values():
            transfers.wait_sent()

    @torch.no_grad()
    def _send_all(self) -> None:
        for transfers in self._transfers.values():
            transfers.begin_sending()
        for bucket in self._buckets:
            bucket.send(bucket.entries)
        for transfers in self._transfers.values():
            transfers.end_sending()

    @contextlib.contextmanager
    def ema_weights(self) -> Iterator[None]:
        """As :meth:`fusedopt.AdamW.ema_weights`: the averages are sent to the device, and behind the block the weights.

        Raises:
            RuntimeError: no group has an `ema_decay`; the blocks are nested; or, in a step within the block.
        """
        self._give_options()
        with torch.no_grad():
            self._read_changed()
        shown = False
        self._wait_sent()
        try:
            with self.optimizer.ema_weights():
                shown = True
                self._send_all()
                try:
                    yield
                finally:
                    self._wait_sent()
        finally:
            if shown:
                self._send_all()

    # --- what the optimizer tells

    @property
    def grad_norm(self) -> Tensor | None:
        """As :attr:`fusedopt.AdamW.grad_norm`, on the CPU."""
        return self.optimizer.grad_norm

    @property
    def skipped_steps(self) -> Tensor:
        """As :attr:`fusedopt.AdamW.skipped_steps`, on the CPU."""
        return self.optimizer.skipped_steps

    def stats(self) -> dict[str, dict[str, float]]:
        """As :meth:`fusedopt.AdamW.stats`."""
        return self.optimizer.stats()

    # --- state

    @property
    def state(self) -> Any:  # type: ignore[override]  # torch's is an attribute
        """The optimizer's state by parameter, on the host: a dict to read, whose values are the live ones."""
        if "optimizer" not in self.__dict__:
            return {}
        live = self.optimizer.state
        return {p: live[entry.host] for p, entry in self._in_order() if entry.host in live}

    @state.setter
    def state(self, value: Any) -> None:
        pass  # torch's constructor sets it

    def _in_order(self) -> Iterator[tuple[Tensor, _Entry]]:
        return ((param, self._entries[param]) for group in self.param_groups for param in group["params"])

    def state_dict(self, *, portable: bool = False) -> dict[str, Any]:
        """Return the state (on the host) and the groups, as the same optimizer without offload does.

        Args:
            portable: as for :meth:`fusedopt.AdamW.state_dict` (default: False).
        """
        self._give_options()
        state_dict: dict[str, Any] = super().state_dict()
        if not portable:
            return state_dict
        with torch.no_grad():
            self._read_changed()
        return precision.portable(self.optimizer, state_dict)

    def load_state_dict(self, state_dict: dict[str, Any], *, convert: bool = False) -> None:
        """Load a state_dict of this class, of its optimizer's class, or of the torch class of the same name.

        Args:
            convert: as for :meth:`fusedopt.AdamW.load_state_dict` (default: False).

        Raises:
            ValueError: the state is not what the options of the checkpoint need. Nothing was changed.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        self._give_options()
        with torch.no_grad():
            self._read_changed()  # converting state begins with the weights
        self.optimizer.load_state_dict(state_dict, convert=convert)
        self._take_options()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        """It can be neither pickled nor copied: raises a TypeError."""
        raise TypeError("CPUOffload: it has streams and pinned memory; save its state_dict() instead of pickling it")
