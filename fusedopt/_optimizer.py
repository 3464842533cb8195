"""What all optimizers of this package share: the step, and what torch.optim.Optimizer leaves open around it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cached_property
from sys import intern
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._config import _C


def _counts_on_device(group: dict[str, Any]) -> bool:
    """Whether the step counts of a group lie beside its parameters. Not every class has both options."""
    return bool(group.get("capturable") or group.get("fused"))


class FusedOptimizer(Optimizer):
    """A mixin placed before a class of torch.optim: replaces its step by one native call over all groups.

    Subclasses name their update rule in `_rule`. Everything else, from the constructor to `state_dict`, is the torch
    class's own.
    """

    _rule: str
    # Options that the torch class does not have, with the values at which ours does what it does.
    _own_options: ClassVar[dict[str, Any]] = {}

    def _add_options(self, **options: Any) -> None:
        """Give the groups, those to come too, options that the torch class's constructor does not take."""
        self.defaults.update(options)
        for group in self.param_groups:
            for name, value in options.items():
                group.setdefault(name, value)

    # GradScaler hands its scale and its verdict to the step (`grad_scale`, `found_inf`) instead of unscaling first.
    # Torch's own path, taken when differentiable, cannot honour them; nor can a step that counts on the CPU know a
    # verdict that lies on a GPU without waiting for it. Then GradScaler unscales and waits itself, as for torch's loop.
    @property
    def _step_supports_amp_scaling(self) -> bool:
        return not self._any_differentiable() and all(
            _counts_on_device(group) or not any(param.is_cuda for param in group["params"])
            for group in self.param_groups
        )

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        pass  # torch's constructor sets it for fused=True

    @cached_property
    def _stepper(self) -> Any:
        return _C.Stepper(self._rule, type(self).__name__)

    def _any_differentiable(self) -> bool:
        return any(group["differentiable"] for group in self.param_groups)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient, in one native call.

        Args:
            closure: re-evaluates the model and returns the loss; it runs with gradients enabled.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: about a parameter, gradient or state that cannot be updated rightly, naming its group, index
                and name. Nothing was changed by that step.
            ValueError: a step count for which the step size is not finite. Nothing was changed.
        """
        if self._any_differentiable():
            return self._torch_step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._stepper.step(
            self.param_groups,
            self.state,
            self._new_states,
            getattr(self, "grad_scale", None),
            getattr(self, "found_inf", None),
            torch.get_num_threads(),
        )
        return loss

    def update_captured(self) -> None:
        """Make CUDA graphs that captured this optimizer's step use the options that the groups have now.

        A graph reads an lr (or betas) that is a CUDA tensor from its memory at every replay. All other options, a float
        lr that a scheduler changes among them, stay what they were when the step was captured until this is called, on
        the stream that replays and before the replay. It does not wait for the device. `amsgrad` changes what the step
        works on: capture anew. Where nothing was captured, it does nothing.

        Each capture keeps a table of its own for the life of the process, about 100 bytes a parameter and 1 a thousand
        elements.

            with torch.cuda.graph(graph):
                ...
                optimizer.step()
            for ... in ...:
                scheduler.step()
                optimizer.update_captured()
                graph.replay()

        Raises:
            RuntimeError: a stream is being captured, or the number of groups has changed since the capture.
        """
        self._stepper.update_captured(self.param_groups)

    def _torch_step(self, closure: Callable[[], Any] | None) -> Any:
        for index, group in enumerate(self.param_groups):
            for name, value in self._own_options.items():
                if group[name] != value:
                    raise RuntimeError(
                        f"{type(self).__name__}: param_groups[{index}]['{name}'] is {group[name]!r}, which torch's own "
                        f"step does not know, and a group with differentiable=True takes that; use {value!r} there"
                    )
        step: Any = super().step
        # Beneath the wrapper that fires the hooks: ours has fired them.
        if getattr(step, "hooked", False):
            return step.__wrapped__(self, closure)
        return step(closure)

    def _initial_state(self, param: Tensor, name: str) -> Tensor:
        return torch.zeros_like(param, memory_format=torch.preserve_format)

    def _new_states(self, missing: list[tuple[Tensor, tuple[str, ...], dict[str, Any]]]) -> list[dict[str, Tensor]]:
        """State for parameters that have none yet; the step counts of a device are views of one buffer.

        Each is given as the parameter, the names of its state, its group. As in torch, a step count lives beside a CUDA
        parameter if the group is capturable or fused, else on the CPU.
        """
        with torch.no_grad():
            dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
            where = [
                (param.device, torch.float32 if group.get("fused") else dtype)
                if _counts_on_device(group)
                else (torch.device("cpu"), dtype)
                for param, _, group in missing
            ]
            steps = {at: iter(torch.zeros(where.count(at), device=at[0], dtype=at[1]).unbind()) for at in set(where)}
            return [
                {
                    "step": next(steps[at]),
                    **{name: self._initial_state(param, name) for name in names},
                }
                for at, (param, names, _) in zip(where, missing, strict=True)
            ]

    def __setstate__(self, state: dict[str, Any]) -> None:
        # load_state_dict replaces whole groups; an option that the checkpoint lacks keeps its present value.
        for loaded, live in zip(state["param_groups"], self.__dict__.get("param_groups", ()), strict=False):
            for key, value in live.items():
                loaded.setdefault(key, value)
            # torch has placed the step counts by what the checkpoint says.
            if _counts_on_device(loaded):
                for param in loaded["params"]:
                    step = state["state"].get(param, {}).get("step")
                    if isinstance(step, Tensor):
                        state["state"][param]["step"] = step.to(param.device)
        # The native scan knows a state by its very key; strings read from a file are others.
        for param_state in state["state"].values():
            if isinstance(param_state, dict):
                items = [(intern(key) if type(key) is str else key, value) for key, value in param_state.items()]
                param_state.clear()
                param_state.update(items)
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self._own_options.items():
                group.setdefault(name, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class or of the torch class of the same name.

        As in torch, state takes the dtype of its parameter; unlike in torch, a UserWarning says so where that casts.
        Options that the checkpoint's groups lack keep their present values.
        """
        loaded: list[dict[str, Any]] = [state_dict]
        # The last of the pre-hooks sees what is really loaded.
        handle = self.register_load_state_dict_pre_hook(lambda _, checkpoint: loaded.append(checkpoint))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        checkpoint = loaded[-1]
        saved = [index for group in checkpoint["param_groups"] for index in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        cast = [
            f"{key!r} of parameter {index} from {value.dtype} to {live[key].dtype}"
            for index, param in zip(saved, params, strict=True)
            if (live := self.state.get(param))
            for key, value in checkpoint["state"].get(index, {}).items()
            if isinstance(value, Tensor) and key in live and live[key].dtype != value.dtype
        ]
        if cast:
            warnings.warn(
                f"{type(self).__name__}.load_state_dict: {len(cast)} state tensors were cast to the dtype of their "
                f"parameters, the first: {cast[0]}",
                stacklevel=2,
            )
