"""What all optimizers of this package share: the step, and what torch.optim.Optimizer leaves open around it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property
from sys import intern
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import _precision as precision
from . import _sharding as sharding
from ._config import _C
from ._dynamo import beneath, not_compiled


def _counts_on_device(group: dict[str, Any]) -> bool:
    """Whether the step counts of a group's CUDA parameters lie beside them. Not every class has the first two options.

    A step that the device decides to skip must be counted there.
    """
    return bool(group.get("capturable") or group.get("fused") or group.get("skip_nonfinite"))


STATS = ("grad_norm", "param_norm", "update_norm", "max_relative_update", "nonfinite_grads", "lost_updates")


class FusedOptimizer(Optimizer):
    """A mixin placed before a class of torch.optim: replaces its step by one native call over all groups.

    Subclasses name their update rule in `_rule`. Everything else, from the constructor to `state_dict`, is the torch
    class's own, but for these options, which all of them have. They are kept in the groups, and so in `state_dict`;
    `ema_decay` may differ between groups, the others concern all groups at once and may not.

    Args:
        max_grad_norm: clip the gradients, in the step and as :func:`torch.nn.utils.clip_grad_norm_` would, so that the
            norm of all gradients of all groups is at most this; the gradients themselves are not written (default:
            None: do not). :attr:`grad_norm` is the norm before.
        norm_type: of `max_grad_norm`: 2.0 or inf (default: 2.0).
        skip_nonfinite: a step whose gradients hold an inf or nan changes nothing: no parameter, no state, no step
            count. Decided without waiting for the device; on CUDA the step counts therefore lie there (default:
            False). :attr:`skipped_steps` counts them.
        ema_decay: keep an exponential moving average of the weights in the state, as "ema", equal to that of
            :func:`torch.optim.swa_utils.get_ema_multi_avg_fn` (default: None: do not). It has the parameter's dtype (in
            16 bits a slow one stands still), float32 with `master_weights`. See :meth:`ema_weights`.
        stats: measure each parameter's step (default: False). See :meth:`stats`.

        master_weights: of bfloat16 and float16 parameters, keep the values in float32, and write them rounded to the
            parameter: True, as "master_param" in the state; "split" (bfloat16), as the 16 bits that the parameter
            lacks of it, "param_remainder". Both give the same bits (default: False).
        rounding: how such parameters are stored without masters: to the "nearest"; "stochastic", up or down so that
            the mean is right; "kahan", to nearest, what that takes away being kept in the parameter's dtype, as
            "compensation" (default: "nearest").
        state_dtype: of the rule's state: torch.float32, torch.bfloat16, or "int8", codes of 8 bits with a scale for
            each 128 (default: None: float32 with masters, else the parameter's). The groups keep a dtype by its name,
            because torch's collectives of checkpoints do not know dtypes. Stochastically rounded where it is
            not float32, but for what is plain, as torch's.
        seed: of all stochastic rounding, 0 <= seed < 2**64 (default: 0). With the step, the parameter's position and
            the element's row-major index it determines every draw.

    Of DTensors, norm and skip are about the gradients of all ranks, in one all-reduce (`docs/distributed.md`); of other
    parameters that are shards, about those that this optimizer has.

    Raises:
        ValueError, TypeError: one of these is out of range, or no number, or, in :meth:`step`, not the same in all
            groups.
        RuntimeError: in :meth:`step`, with `max_grad_norm`, `skip_nonfinite` or `stats`, for parameters on several
            devices.

    The order of a step is: unscale (GradScaler), measure the norm, decide to skip, clip, weight decay and update,
    average, measure. `docs/phase.md` tells what each costs, `docs/precision.md` what the last four mean and cost.
    """

    _rule: str
    # Options that the torch class does not have, with the values at which ours does what it does.
    _own_options: ClassVar[dict[str, Any]] = {}
    _report_inf: Tensor | None  # of fusedopt.GradScaler, for one step: where to say whether a gradient was inf or nan
    _phase_options: ClassVar[dict[str, Any]] = {
        "max_grad_norm": None,
        "norm_type": 2.0,
        "skip_nonfinite": False,
        "ema_decay": None,
        "stats": False,
    }
    _precision_options: ClassVar[dict[str, Any]] = {
        "master_weights": False,
        "rounding": "nearest",
        "state_dtype": None,
        "seed": 0,
    }

    def __init__(
        self,
        params: Any,
        *args: Any,
        max_grad_norm: float | None = None,
        norm_type: float | str = 2.0,
        skip_nonfinite: bool = False,
        ema_decay: float | None = None,
        stats: bool = False,
        master_weights: bool | str = False,
        rounding: str = "nearest",
        state_dtype: torch.dtype | str | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        phase = {
            "max_grad_norm": max_grad_norm,
            "norm_type": float("inf") if norm_type == "inf" else norm_type,
            "skip_nonfinite": skip_nonfinite,
            "ema_decay": ema_decay,
            "stats": stats,
        }
        of_storage = {"master_weights": master_weights, "rounding": rounding, "state_dtype": state_dtype, "seed": seed}
        _C.check_options({**phase, **of_storage}, type(self).__name__)
        super().__init__(params, *args, **kwargs)
        self._add_options(**phase, **precision.portable_options(of_storage))

    def _add_options(self, **options: Any) -> None:
        """Give the groups, those to come too, options that the torch class's constructor does not take."""
        self.defaults.update(options)
        for group in self.param_groups:
            for name, value in options.items():
                group.setdefault(name, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does."""
        if isinstance(param_group, dict):
            param_group.update(precision.portable_options(param_group))
        beneath(super().add_param_group)(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch does: let the gradients go, or set them to zero."""
        beneath(super().zero_grad)(set_to_none)

    # GradScaler hands its scale and its verdict to the step (`grad_scale`, `found_inf`) instead of unscaling first.
    # Torch's own path, taken when differentiable, cannot honour them; nor can a step that counts on the CPU know a
    # verdict that lies on a GPU without waiting for it. Then GradScaler unscales and waits itself, as for torch's loop.
    # So it does with fused=False: under mixed precision Lightning refuses to clip gradients where this is True.
    @property
    def _step_supports_amp_scaling(self) -> bool:
        return not self._any_differentiable() and all(
            group.get("fused") is not False
            and (_counts_on_device(group) or not any(param.is_cuda for param in group["params"]))
            for group in self.param_groups
        )

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        pass  # torch's constructor sets it for fused=True

    @cached_property
    def _stepper(self) -> Any:
        # Lightning's wrappers take on our class, and with it this property: theirs is the wrapped optimizer's.
        wrapped = self.__dict__.get("_optimizer")
        if isinstance(wrapped, FusedOptimizer):
            return wrapped._stepper
        return _C.Stepper(self._rule, type(self).__name__)

    @property
    def _all_own_options(self) -> dict[str, Any]:
        return {**self._phase_options, **self._precision_options, **self._own_options}

    def _any_differentiable(self) -> bool:
        return any(group["differentiable"] for group in self.param_groups)

    @not_compiled  # torch.compile leaves its graph here; it would look at all parameters before every step
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
        if self.__dict__.get("_shows_ema"):
            raise RuntimeError(f"{type(self).__name__}: the weights are those of ema_weights(): step after it")
        if self._any_differentiable():
            return self._torch_step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._stepper.step(
            self,
            self.param_groups,
            self.state,
            getattr(self, "grad_scale", None),
            getattr(self, "found_inf", None),
            self.__dict__.pop("_report_inf", None),  # of fusedopt.GradScaler
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

    def _new_buffer(self, size: int, device: str) -> Tensor:
        """A tensor of doubles for the native step to leave what it finds."""
        with torch.inference_mode(False), torch.no_grad():
            return torch.zeros(size, dtype=torch.float64, device=device)

    def _has_averages(self) -> bool:
        return any("ema" in param_state for param_state in self.state.values())

    @staticmethod
    def _set_averaged(answer: Tensor, steps: int) -> None:
        """Tell the answer's tensor how many steps the averages have made: at 0 they begin with the next."""
        with torch.no_grad():
            answer[6] = steps

    def _only_device(self) -> torch.device | None:
        """The device of all parameters with gradients; None if there are several, or none.

        A DTensor's, if there are none: other ranks may have some, and then wait for what is measured here.
        """
        params = (p for group in self.param_groups for p in group["params"] if p.grad is not None)
        first = next(params, None)
        if first is None:
            parted = (p for group in self.param_groups for p in group["params"] if sharding.is_distributed(p))
            first = next(parted, None)
            return None if first is None else first.device
        # After a step the native core knows at once; it raises an error should it be wrong now.
        one = self._stepper.num_devices == 1 or all(p.device == first.device for p in params)
        return first.device if one else None

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of all gradients, unscaled and before clipping: a 0-d tensor on their device.

        Of the last step that measured it: with `max_grad_norm`; with `skip_nonfinite`, unless a GradScaler of torch's
        has just looked for inf and nan; under :class:`fusedopt.GradScaler`. None before the first. float32, or float64
        if a gradient was; accumulated in double. Reading it does not wait for the device.
        """
        answer: Tensor | None = self._stepper.answer
        if answer is None or not self._stepper.has_norm:
            return None
        return answer[0].to(torch.float64 if self._stepper.norm_is_double else torch.float32, copy=True)

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps were skipped for an inf or nan: a 0-d int64 tensor on the gradients' device.

        Those that a GradScaler decided are counted too, if it handed its verdict to the step. Not saved in
        `state_dict`.
        """
        answer: Tensor | None = self._stepper.answer
        return torch.zeros((), dtype=torch.int64, device="cpu") if answer is None else answer[3].to(torch.int64)

    def stats(self) -> dict[str, dict[str, float]]:
        """Return what the last step did to each parameter that took part, by name. Waits for the device.

        Names are those given with the parameters (of groups that share one, "group.name"), else "group.index". It is
        the last step that was made with `stats` set. With g the gradient (unscaled, before clipping
        and weight decay) and p the parameter:

        - `grad_norm`, `param_norm`: the 2-norms of g, and of p after the step;
        - `update_norm`: of what the step changed, as stored;
        - `max_relative_update`: the largest |change| / |p before| of an element that was finite and not zero;
        - `nonfinite_grads`: how many elements of g were inf or nan;
        - `lost_updates`: how many elements had an update (the rule's own, decoupled decay aside) that was not zero and
          yet left them as they were, because it was rounded away.

        Norms are given in the precision of the parameter's arithmetic, and accumulated in double, from short sums of
        squares in that arithmetic (so in float32 the `update_norm` knows no changes below 1e-19, and is inf from about
        4e18; g and p are not affected). Of a parameter with a sparse gradient all are those of the touched elements;
        complex elements are two. After a skipped step, if the gradients decided it, they are of that step, and nothing
        changed.

        Raises:
            RuntimeError: no step was made with `stats` set, or parameters were added or removed since.
        """
        found: Tensor | None = self._stepper.stats
        took_part = self._stepper.took_part()
        names: list[str] = []
        for number, group in enumerate(self.param_groups):
            given = group.get("param_names", ())
            if len(given) != len(group["params"]):
                given = [f"{number}.{index}" for index in range(len(group["params"]))]
            names += [name if name not in names else f"{number}.{name}" for name in given]
        if found is None or len(took_part) != len(names):
            raise RuntimeError(
                f"{type(self).__name__}: stats() needs stats=True, and a step since parameters were added or removed"
            )
        rows = found.view(-1, len(STATS)).tolist()
        counts = STATS.index("nonfinite_grads")
        return {
            name: dict(zip(STATS, [*row[:counts], *map(int, row[counts:])], strict=True))
            for name, row, was_updated in zip(names, rows, took_part, strict=True)
            if was_updated
        }

    @contextlib.contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Give the parameters, within a `with` block, the moving averages that `ema_decay` keeps.

        Behind the block, however it is left, the parameters are again what they were, bit for bit, whatever was done to
        them. The averages are copied in, so all that refers to the parameters' memory sees them; a copy of the weights
        is held meanwhile. To keep them, clone within the block what `model.state_dict()` gives, or save it there.
        Autograd sees the copying: run no backward through a graph made before. Buffers (of BatchNorm, say) are the
        model's own, and not touched. Parameters that were never updated have no average and stay as they are.

        Raises:
            RuntimeError: no group has an `ema_decay`; the blocks are nested; or, in a step within the block.
        """
        if all(group["ema_decay"] is None for group in self.param_groups):
            raise RuntimeError(f"{type(self).__name__}: ema_weights() needs ema_decay")
        if self.__dict__.get("_shows_ema"):
            raise RuntimeError(f"{type(self).__name__}: ema_weights() is already in use")
        params = [
            param
            for group in self.param_groups
            for param in group["params"]
            if group["ema_decay"] is not None and "ema" in self.state.get(param, {})
        ]
        saved = [param.detach().clone(memory_format=torch.preserve_format) for param in params]

        def show(values: list[Tensor]) -> None:
            with torch.no_grad():
                for param, value in zip(params, values, strict=True):
                    param.copy_(value)

        self._shows_ema = True
        try:
            show([self.state[param]["ema"] for param in params])
            yield
        finally:
            show(saved)
            self._shows_ema = False

    def _torch_step(self, closure: Callable[[], Any] | None) -> Any:
        for index, group in enumerate(self.param_groups):
            for name, value in self._all_own_options.items():
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

    def _initial_state(self, param: Tensor, name: str, dtype: torch.dtype) -> Tensor:
        return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)

    def _new_states(self, missing: list[tuple[Tensor, list[Any], dict[str, Any]]]) -> list[dict[str, Tensor]]:
        """State that parameters have not yet; each comes with the names and its group.

        Names of a parameter that is not stored plainly come with their dtypes. The step counts of a device are views of
        one buffer. As in torch, they live beside CUDA parameters if the group is capturable or fused, else on the CPU.
        """
        with torch.no_grad():
            dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
            where = [
                (param.device, torch.float32 if group.get("fused") else dtype)
                if _counts_on_device(group)
                else (torch.device("cpu"), dtype)
                for param, names, group in missing
                if "step" in names
            ]
            at_next = iter(where)
            steps = {at: iter(torch.zeros(where.count(at), device=at[0], dtype=at[1]).unbind()) for at in set(where)}

            def new_state(param: Tensor, names: list[Any]) -> dict[str, Tensor]:
                made: dict[str, Tensor] = {}
                here, known = precision.part_here(param, self.state.get(param, {}))
                for entry in names:
                    name, dtype = entry if isinstance(entry, tuple) else (entry, None)
                    made[name] = (
                        next(steps[next(at_next)])
                        if name == "step"
                        else self._new_state(here, known, name, dtype, made)
                    )
                return precision.whole(param, made)

            return [new_state(param, names) for param, names, _ in missing]

    def _new_state(
        self, param: Tensor, known: dict[str, Any], name: str, dtype: str | None, others: dict[str, Tensor]
    ) -> Tensor:
        kind: torch.dtype = getattr(torch, dtype) if dtype else param.dtype
        if name in ("ema", "master_param"):  # they begin with what the parameter is
            full = precision.full_value(param, known) if kind != param.dtype else None
            begin = param.detach() if full is None else full
            return begin.to(kind, copy=True, memory_format=torch.preserve_format)
        if name == "param_remainder":
            nothing = torch.zeros_like(param, dtype=torch.int16, memory_format=torch.preserve_format)
            return precision.as_bytes(nothing)
        if name == "compensation":
            return torch.zeros_like(param, dtype=kind, memory_format=torch.preserve_format)
        if name == "scales":
            codes = {key: value for key, value in others.items() if key != "step"}
            first = {key: self._initial_state(param, key, torch.float32) for key in codes}
            encoded, scales = precision.encode(first)
            others.update(encoded)
            return scales
        if kind == torch.uint8:
            return torch.zeros_like(param, dtype=kind, memory_format=torch.contiguous_format)  # see "scales"
        return self._initial_state(param, name, kind)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # load_state_dict replaces whole groups; an option that the checkpoint lacks keeps its present value.
        for loaded, live in zip(state["param_groups"], self.__dict__.get("param_groups", ()), strict=False):
            for key, value in live.items():
                loaded.setdefault(key, value)
            loaded.update(precision.portable_options(loaded))
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
        precision.unwrap(self)
        if "_stepper" in self.__dict__:
            self._stepper.forget()
        for group in self.param_groups:
            for name, value in self._all_own_options.items():
                group.setdefault(name, value)

    def state_dict(self, *, portable: bool = False) -> dict[str, Any]:
        """Return the state and the groups, as torch does: exactly what :meth:`load_state_dict` needs to go on.

        Args:
            portable: give what torch's class of the same name reads, too: the rule's state in float32, decoded, the
                full values of parameters with masters or compensation as "master_param" (float32; torch ignores it),
                and groups without `master_weights`, `rounding`, `state_dtype` and `seed`. What is stored in fewer bits
                comes back by ``load_state_dict(..., convert=True)``, rounded to nearest (default: False).
        """
        state_dict: dict[str, Any] = super().state_dict()
        return precision.portable(self, state_dict) if portable else state_dict

    def load_state_dict(self, state_dict: dict[str, Any], *, convert: bool = False) -> None:
        """Load a state_dict of this class or of the torch class of the same name.

        The options become those of the checkpoint's groups, as in torch; those that they lack (some of ours, in torch's
        checkpoints) keep their present values. State is taken as it is; it is not cast but for that of plain
        parameters (see `state_dtype`), which, as in torch, takes the dtype of its parameter; unlike in torch, a
        UserWarning says so.

        Args:
            convert: keep the present `master_weights`, `rounding`, `state_dtype` and `seed`, and convert the state to
                what they need, rounding to nearest (default: False).

        Raises:
            ValueError: the state is not what the options of the checkpoint need, and convert is False. Nothing was
                changed.
        """
        cast: list[str] = []
        warn: list[str] = []
        # The last of the pre-hooks sees what is really loaded.
        handle = self.register_load_state_dict_pre_hook(
            lambda _, checkpoint: precision.prepare(self, checkpoint, convert, cast, warn)
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        if cast:
            warn.append(
                f"{type(self).__name__}.load_state_dict: {len(cast)} state tensors were cast to the dtype of their "
                f"parameters, the first: {cast[0]}"
            )
        for message in warn:
            warnings.warn(message, stacklevel=2)
