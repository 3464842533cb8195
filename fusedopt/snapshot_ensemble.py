"""Snapshot ensembles: the weights at the end of each cycle of a schedule, and the average of what they predict."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, CyclicLR, LRScheduler

from ._sharding import is_distributed
from .lr_scheduler import restarts


class SnapshotEnsemble:
    """Several models for the price of training one: Huang et al. 2017, "Snapshot Ensembles", arXiv 1704.00109.

    ::

        ensemble = fusedopt.SnapshotEnsemble(model, max_members=5, device="cpu")
        for inputs, targets in batches:
            ...  # backward, optimizer.step(), zero_grad()
            scheduler.step()
            ensemble.update(scheduler)
        probabilities = ensemble(inputs)

    A member is a copy of the model's parameters and persistent buffers, under their names in its `state_dict()`, so
    that `model.load_state_dict(ensemble.members[-1])` goes back to it. Members run in the model itself, in eval mode:
    for the time of a call it has the member's tensors instead of its own (:func:`torch.func.functional_call`), and is
    as before when the call returns. So do not call an ensemble while another thread uses the model. What is neither
    parameter nor persistent buffer is the model's at the time of the call. A model that is wrapped in
    `DistributedDataParallel`, or comes from `torch.compile`, is unwrapped: names have no prefix.

    Args:
        model: the model that is trained.
        average: what is averaged. "probabilities": the softmax of the model's output, logits of shape (batch, classes),
            as in the paper. "outputs": the output, a tensor, for regression. Or a function from the output to a tensor,
            such as `lambda output: output["logits"].softmax(-1)` (default: "probabilities").
        max_members: keep only the last so many members (default: None, all).
        device: where members are kept; to run, they are copied to where the model's tensors are (default: None, there).
        enable_grad: leave it to the caller whether autograd records, as gradients of inputs need it (default: False, it
            does not).

    Attributes:
        members: the members, the oldest first; a list that may be edited.

    Raises:
        ValueError: `average` is another word, or `max_members` is below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        average: Literal["probabilities", "outputs"] | Callable[[Any], Tensor] = "probabilities",
        max_members: int | None = None,
        device: torch.device | str | None = None,
        enable_grad: bool = False,
    ) -> None:
        if isinstance(average, str) and average not in _AVERAGES:
            raise ValueError(f"SnapshotEnsemble: average is {average!r}, not one of {list(_AVERAGES)} or a function")
        if max_members is not None and max_members < 1:
            raise ValueError(f"SnapshotEnsemble: max_members is {max_members}: give at least 1, or None to keep all")
        self.model = _unwrapped(model)
        self.average = _AVERAGES[average] if isinstance(average, str) else average
        self.max_members = max_members
        self.device = device
        self.enable_grad = enable_grad
        self.members: list[dict[str, Tensor]] = []
        self._cycles: int | None = None  # how many had ended when update() last looked

    def __len__(self) -> int:
        """The number of members."""
        return len(self.members)

    # --- collecting -------------------------------------------------------------------------------------------------

    def add(self) -> None:
        """Make the model as it is a member, the last one.

        Raises:
            TypeError: a parameter is a DTensor, or missing in the model's state_dict.
        """
        self._keep([self._own()])

    def update(self, scheduler: LRScheduler) -> bool:
        """Make the model a member if the scheduler has just ended a cycle; to be called after each `scheduler.step()`.

        With `optimizer.step()` before `scheduler.step()`, the weights are then those that the lowest rates of the cycle
        have left, and no step has been taken at the next one's.

        A run that ends with a cycle, but calls `scheduler.step(epoch + i / batches)`, stops short of the restart: call
        :meth:`add` behind it (or count `epoch + (i + 1) / batches`).

        Args:
            scheduler: a CosineAnnealingWarmRestarts, whether it counts steps or fractions of epochs, of torch or of
                :mod:`fusedopt.lr_scheduler`; or a CyclicLR. If it is part of a SequentialLR, the part, not the whole.

        Returns:
            Whether there is a new member.

        Raises:
            TypeError: the scheduler is of another class; and where :meth:`add` raises.
        """
        position = _position(scheduler)
        before = self._cycles
        if before is None:  # perhaps in the middle of a training, whose last cycle ended long ago
            before = max(0, math.ceil(position) - 1)
        ended = math.floor(position) > before
        if ended:
            self.add()
        self._cycles = math.floor(position)
        return ended

    # --- predicting -------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The average of :meth:`predictions`, which gets the arguments; summed in float32 at least, and returned so."""
        predictions = (p.to(_wide(p)) for p in self.predictions(*args, **kwargs))
        return functools.reduce(torch.add, predictions) / len(self)

    def predictions(self, *args: Any, **kwargs: Any) -> Iterator[Tensor]:
        """What `average` makes of each member's output, in their order, one at a time.

        Args:
            args, kwargs: the model's.

        Raises:
            RuntimeError: there are no members.
            TypeError: the model's output is no tensor, and `average` no function.
            ValueError: the output is of another shape than "probabilities" needs.
        """
        if not self.members:
            raise RuntimeError(
                "SnapshotEnsemble: there are no members yet: call update(scheduler) after scheduler.step(), or add()"
            )
        return (self._predict(member, args, kwargs) for member in self.members)

    def _predict(self, member: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        own = self._own()
        keys = {id(tensor): key for key, tensor in own.items()}  # tied names have one
        tensors = {  # a forward may write to buffers
            key: member[key].to(own[key].device, copy=not isinstance(own[key], nn.Parameter)) for key in keys.values()
        }
        by_name = {name: tensors[keys[id(tensor)]] for name, tensor in _named(self.model) if id(tensor) in keys}
        modes = {module: module.training for module in self.model.modules()}
        attributes = {module: dict(vars(module)) for module in modes}
        try:
            for module in modes:
                module.training = False  # eval() may be overridden, and do more
            with contextlib.nullcontext() if self.enable_grad else torch.no_grad():
                return self.average(functional_call(self.model, by_name, args, kwargs, tie_weights=False))
        finally:
            for module, mode in modes.items():
                module.training = mode
                vars(module).clear()  # hooks of weight_norm, say, leave the member's weight there
                vars(module).update(attributes[module])

    # --- saving -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The members and how many cycles update() has seen; `torch.load` reads it with weights_only=True."""
        return {"members": list(self.members), "cycles": self._cycles}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Replace the members by copies of those of another ensemble; of too many, the last `max_members`.

        Args:
            state_dict: what :meth:`state_dict` has returned, for a model with the same parameters and buffers.

        Raises:
            ValueError: it is something else, or a member does not fit the model. The ensemble is as it was.
            TypeError: where :meth:`add` raises.
        """
        if set(state_dict) != {"members", "cycles"}:
            raise ValueError(
                "SnapshotEnsemble: expected an ensemble's state_dict, with 'members' and 'cycles'; got one with"
                f" {sorted(map(str, state_dict))[:5]}"
            )
        for i, member in enumerate(state_dict["members"]):
            self._check(member, i)
        self.members = []
        self._keep(state_dict["members"])
        self._cycles = state_dict["cycles"]

    def _keep(self, members: Sequence[Mapping[str, Tensor]]) -> None:
        """Append copies of the last of them; names that share a tensor go on sharing one."""
        own = self._own()
        for member in members[-(self.max_members or len(members)) :]:
            copies: dict[int, Tensor] = {}
            for key, tensor in member.items():
                if id(tensor) not in copies:
                    copies[id(tensor)] = tensor.detach().to(self.device or own[key].device, copy=True)
            self.members.append({key: copies[id(tensor)] for key, tensor in member.items()})
        if self.max_members is not None:
            del self.members[: -self.max_members]

    def _own(self) -> dict[str, Tensor]:
        """The model's parameters and persistent buffers, by their names in its state_dict."""
        named = {id(tensor) for _, tensor in _named(self.model)}
        own = {key: tensor for key, tensor in self.model.state_dict(keep_vars=True).items() if id(tensor) in named}
        found = set(map(id, own.values()))
        for name, parameter in self.model.named_parameters():
            if is_distributed(parameter):
                raise TypeError(
                    f"SnapshotEnsemble: parameter {name!r} is a DTensor, and a sharded model runs with its own weights"
                    " only: save checkpoints at the ends of cycles, and load them into an unsharded model"
                )
            if id(parameter) not in found:
                raise TypeError(f"SnapshotEnsemble: parameter {name!r} is not in the model's state_dict() as it is")
        return own

    def _check(self, member: Mapping[str, Tensor], index: int) -> None:
        """Raise if a member is not one of this model."""
        own = self._own()
        first = {id(tensor): key for key, tensor in reversed(own.items())}
        wrong = [f"{key!r} is missing" for key in own if key not in member]
        for key, tensor in member.items():
            if key not in own:
                wrong.append(f"{key!r} is not in the model")
            elif _form(tensor) != _form(own[key]):
                wrong.append(f"{key!r} is {_form(tensor)}, in the model {_form(own[key])}")
        for key in own if not wrong else ():
            tied = first[id(own[key])]
            if member[key] is not member[tied] and not torch.equal(member[key], member[tied]):
                wrong.append(f"{key!r} differs from {tied!r}, to which it is tied in the model")
        if wrong:
            more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise ValueError(f"SnapshotEnsemble: member {index} does not fit the model: {'; '.join(wrong[:5])}{more}")


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module that is trained, without what DistributedDataParallel and torch.compile put around it."""
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        if isinstance(model, parallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):  # importing its class takes seconds
            model = inner
        else:
            return model


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers with the names of the modules they are in, tied ones under each of their names."""
    # Not model.named_parameters(): wrappers for activation checkpointing override it, to shorten the names.
    yield from nn.Module.named_parameters(model, remove_duplicate=False)
    yield from nn.Module.named_buffers(model, remove_duplicate=False)


def _position(scheduler: LRScheduler) -> float:
    """How many cycles are behind: whole ones, and the part of the current one."""
    if isinstance(scheduler, CyclicLR):
        return max(0.0, scheduler.last_epoch / scheduler.total_size)  # it is -1 while SequentialLR runs another first
    if isinstance(scheduler, CosineAnnealingWarmRestarts):
        return restarts(scheduler) + scheduler.T_cur / scheduler.T_i
    raise TypeError(
        f"SnapshotEnsemble: cannot tell where a {type(scheduler).__name__} ends a cycle: update() takes a"
        " CosineAnnealingWarmRestarts or a CyclicLR (as part of a SequentialLR, that part); with others, call add()"
    )


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _outputs(output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise TypeError(
            f"SnapshotEnsemble: the model returned a {type(output).__name__}: as average= give a function from it to"
            " the tensor to be averaged, such as lambda output: output[0].softmax(-1)"
        )
    return output


def _probabilities(output: Any) -> Tensor:
    logits = _outputs(output)
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"SnapshotEnsemble: the model returned shape {tuple(logits.shape)}; average='probabilities' takes logits of"
            " shape (batch, classes). Give 'outputs' for regression, or a function: torch.sigmoid for a single logit,"
            " lambda output: output.softmax(1) for shape (batch, classes, ...)"
        )
    return logits.softmax(1, dtype=_wide(logits))


_AVERAGES: dict[str, Callable[[Any], Tensor]] = {"probabilities": _probabilities, "outputs": _outputs}
