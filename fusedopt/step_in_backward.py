"""Gradient release: each parameter is updated in backward, as soon as its gradient is ready, and the gradient freed."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from ._config import _C
from ._optimizer import STATS, FusedOptimizer

# Options of groups that cannot be honoured where no two gradients need exist at the same time.
_NOT_HERE = {
    "max_grad_norm": "the norm is that of all gradients, and the first is gone before the last is there",
    "skip_nonfinite": "whether to skip is decided by all gradients, and the first is gone before the last is there",
    "differentiable": "torch's own step is taken then, which updates all parameters at once",
}
_queue_callback = torch.autograd.Variable._execution_engine.queue_callback  # type: ignore[attr-defined]  # untyped


def _is_nested() -> bool:
    """Whether the backward that runs was itself begun in one, by reentrant checkpointing say. The engine does not tell.

    By torch's functions on the stack: one that runs the engine, called by another or by a node of a graph, whose
    `apply` is a method (that of a Function's forward is not).
    """
    frame, runs = sys._getframe(), False
    while frame.f_back is not None:
        frame = frame.f_back
        code = frame.f_code
        runs_engine = code.co_name == "_engine_run_backward"
        is_node = code.co_name == "apply" and code.co_filename == torch.autograd.function.__file__
        if runs and (runs_engine or (is_node and code.co_varnames[0] == "self")):
            return True
        runs |= runs_engine
    return False


class _Running:
    """Lives as long as a backward: the engine holds it, and drops it should the backward fail."""


_FAILED = weakref.ref(_Running())  # dead at once


class BackwardSteps(Optimizer):
    """What :func:`step_in_backward` returns: an optimizer whose steps happen in backward.

    It has the `param_groups`, `state` and `defaults` of its `optimizer`, so LR schedulers take it, and its `state_dict`
    is that optimizer's: a checkpoint can be continued with or without gradient release. Step hooks
    (`register_step_post_hook`) run once a step, at the end of its last backward. What is not found here is looked for
    in `optimizer` (:meth:`~fusedopt.Adam.ema_weights`, for one). In a `with` statement, the hooks are removed behind
    the block.

    Attributes:
        optimizer: the optimizer, which shares groups and state. Its own `step()` is for after :meth:`remove`.
    """

    optimizer: FusedOptimizer

    def __init__(self, optimizer: FusedOptimizer, accumulate: int = 1) -> None:
        self.optimizer = optimizer
        # Both have the same hooks. torch's method then adds what else its classes have.
        self.__dict__.update({name: hooks for name, hooks in vars(optimizer).items() if name.startswith("_optimizer_")})
        super().__setstate__({})
        self._params: list[Tensor] = []
        self._places: list[tuple[int, int]] = []  # group and index
        self._steppers: list[Any] = []  # for each parameter its own, made when first needed
        self._handles: list[Any] = []
        self._running: weakref.ref[_Running] | None = None  # the backward that runs; dead: one that failed
        self._backwards = 0  # that are behind, of this step
        self._done: set[int] = set()  # parameters that this step has updated
        self._ends = self._had_averages = self._is_removed = False
        self._measured: dict[int, Tensor] = {}
        self.accumulate = accumulate
        self._check_options()
        if self._optimizer_step_pre_hooks:
            self.register_step_pre_hook(None)
        self._hook_new()
        self._handles.append(optimizer.register_load_state_dict_post_hook(lambda _: self._forget()))

    # What torch.optim.Optimizer keeps as attributes; load_state_dict replaces them in the optimizer.
    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]  # an attribute there
        """The groups of the optimizer."""
        if sys._getframe(1).f_code.co_name == "_unscale_grads_":  # of GradScaler.unscale_, which asks nothing else
            self._explain_scaler()
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]  # an attribute there
        """The state of the optimizer, by parameter."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]  # an attribute there
        """The options of groups to come."""
        return self.optimizer.defaults

    def __getattr__(self, name: str) -> Any:
        """What the optimizer has beside: `ema_weights`, say."""
        return getattr(self.__dict__["optimizer"], name)

    def __getstate__(self) -> dict[str, Any]:
        """It can be neither pickled nor copied: raises a TypeError."""
        raise TypeError(
            "step_in_backward: hooks of parameters can be neither pickled nor copied: take the state_dict()"
        )

    @property
    def accumulate(self) -> int:
        """How many backwards make a step; it may be set between steps, for a shorter last one, say."""
        return self._accumulate

    @accumulate.setter
    def accumulate(self, value: int) -> None:
        if type(value) is not int or value < 1:
            raise ValueError(f"step_in_backward: accumulate must be an integer of at least 1, got {value!r}")
        self._check_between("accumulate can be set")
        self._accumulate = value

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """There is nothing left to do: raises a RuntimeError that says so."""
        if self._ends:
            return None  # ours, at the end of a backward: for schedulers and hooks to see
        what = "" if closure is None else ", and a closure is not for it to call"
        raise RuntimeError(
            f"step_in_backward: backward() updates the parameters{what}; remove the call of step() (after remove(), "
            "call that of the attribute `optimizer`)"
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing is left to be done between steps. In the middle of one it raises a RuntimeError: :meth:`discard`."""
        self._check_between("zero_grad() is right")
        self.optimizer.zero_grad(set_to_none)

    def discard(self) -> None:
        """Drop the gradients of a step that is not complete, and begin it anew with the next backward.

        So after one or more of several backwards, or after a backward that failed. What that has already updated stays.
        """
        self.optimizer.zero_grad()
        self._running, self._backwards = None, 0

    def state_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Return that of the optimizer, which goes on from it with gradient release or without."""
        return self.optimizer.state_dict(**kwargs)

    def load_state_dict(self, state_dict: dict[str, Any], **kwargs: Any) -> None:
        """Load what an optimizer of this class, or of torch's of the same name, has saved."""
        self.optimizer.load_state_dict(state_dict, **kwargs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does; its parameters too are updated in backward."""
        self.optimizer.add_param_group(param_group)
        self._hook_new()

    def register_step_pre_hook(self, hook: Any) -> Any:
        """No step begins with all gradients at hand: raises a RuntimeError."""
        raise RuntimeError("step_in_backward: a step pre-hook would run when all is updated; register a post-hook")

    def stats(self) -> dict[str, dict[str, float]]:
        """Return what the last step did to each parameter, by name: see :meth:`fusedopt.Adam.stats`."""
        if not self._measured:
            raise RuntimeError("step_in_backward: stats() needs stats=True, and a step")
        took_part = [index in self._measured for index in range(len(self._params))]
        nothing = torch.zeros(len(STATS), dtype=torch.float64)
        rows = torch.stack([self._measured.get(index, nothing).cpu() for index in range(len(self._params))])
        found = SimpleNamespace(stats=rows, took_part=lambda: took_part)
        view: Any = SimpleNamespace(_stepper=found, param_groups=self.optimizer.param_groups)
        return FusedOptimizer.stats(view)

    def remove(self) -> None:
        """Remove the hooks: backward leaves its gradients, and the optimizer is an ordinary one, where this left it."""
        for handle in self._handles:
            handle.remove()
        self._is_removed, self._running, self._backwards = True, None, 0

    def __enter__(self) -> BackwardSteps:
        """Nothing is left to be done."""
        return self

    def __exit__(self, *args: object) -> None:
        """Remove the hooks."""
        self.remove()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """GradScaler.step asks this."""
        self._explain_scaler()
        return False

    def _explain_scaler(self) -> None:
        raise RuntimeError(
            "step_in_backward: a GradScaler unscales gradients after backward, but backward has already taken a step "
            "with each, scaled: train in bfloat16, which needs no scaler, or without gradient release"
        )

    def _has_averages(self) -> bool:
        return self._had_averages  # before this step, as a step of all parameters would find

    def _check_between(self, what: str) -> None:
        if self._running is None and not self._backwards:
            return
        how_far = (
            f"{self._backwards} of {self._accumulate} backwards are made"
            if self._running is None
            else f"a backward has updated {len(self._done)} of {len(self._params)} parameters"
        )
        raise RuntimeError(f"step_in_backward: {what} between steps, but {how_far}; discard() abandons this step")

    def _check_options(self) -> None:
        for number, group in enumerate(self.optimizer.param_groups):
            for name, why in _NOT_HERE.items():
                if group[name]:
                    raise ValueError(
                        f"step_in_backward: param_groups[{number}]['{name}'] is {group[name]!r}, which cannot be: "
                        f"{why}. Leave it at its default, or train without gradient release"
                    )

    def _hook_new(self) -> None:
        places = [(g, i) for g, group in enumerate(self.optimizer.param_groups) for i in range(len(group["params"]))]
        for index in range(len(self._params), len(places)):
            group, seat = places[index]
            param = self.optimizer.param_groups[group]["params"][seat]
            dtensor: Any = sys.modules.get("torch.distributed.tensor")
            if dtensor is not None and isinstance(param, dtensor.DTensor):
                raise TypeError(f"step_in_backward: {self._name(group, seat)} is a DTensor, which is not supported")
            self._params.append(param)
            if param.requires_grad and not self._is_removed:
                hook = partial(self._take_gradient, index)
                self._handles.append(param.register_post_accumulate_grad_hook(hook))
        self._places = places
        self._forget()

    def _forget(self) -> None:
        # A native step for each parameter alone: one for all would look at all n in each of n hooks.
        self._steppers = [None] * len(self._params)

    def _name(self, group: int, seat: int) -> str:
        names = self.optimizer.param_groups[group].get("param_names", ())
        return f"param_groups[{group}]['params'][{seat}]" + (f" ({names[seat]!r})" if seat < len(names) else "")

    @_disable_dynamo  # it would trace what the engine calls in a compiled function, and take the sets for constants
    def _take_gradient(self, index: int, param: Tensor) -> None:
        """What each parameter calls when a backward has added all it has to the gradient."""
        if self._running is None or self._running() is None:
            self._begin()
        if self._backwards + 1 < self._accumulate:
            return
        if index in self._done:
            raise RuntimeError(
                f"step_in_backward: {self._name(*self._places[index])} got a second gradient in one backward, after "
                "it was updated with the first. If it is used in several checkpointed segments, checkpoint them with "
                "use_reentrant=False"
            )
        self._update(index, param)

    def _begin(self) -> None:
        """A backward has brought its first gradient."""
        if self._running is not None:
            raise RuntimeError(
                f"step_in_backward: the last backward failed after it had updated {len(self._done)} of "
                f"{len(self._params)} parameters. Load a checkpoint, or go on from there; first call discard()"
            )
        self._done = set()
        running = _Running()
        _queue_callback(partial(self._end, running))
        self._running = weakref.ref(running)
        del running  # or an exception's traceback would hold it
        if _is_nested():
            raise RuntimeError(
                "step_in_backward: this backward runs within another, of whose end nothing is known here; checkpoint "
                "with use_reentrant=False"
            )
        compiled = sys.modules.get("torch._dynamo.compiled_autograd")
        if getattr(compiled, "in_compiled_autograd_region", False):
            raise RuntimeError(
                "step_in_backward: this backward is compiled autograd's, which does not tell when it ends; set "
                "torch._dynamo.config.compiled_autograd = False"
            )
        if self._backwards + 1 == self._accumulate:
            self._check_options()
            if self.optimizer.__dict__.get("_shows_ema"):
                raise RuntimeError("step_in_backward: the weights are those of ema_weights(): step after it")
            if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
                raise RuntimeError("step_in_backward: a CUDA graph is being captured, which is not supported")
            groups = self.optimizer.param_groups
            self._had_averages = any(g["ema_decay"] is not None for g in groups) and self.optimizer._has_averages()
            if groups[0]["stats"]:
                self._measured = {}
            if len(self._params) != sum(len(group["params"]) for group in groups):
                self._hook_new()  # those of a group that was given to the optimizer

    @_disable_dynamo
    def _end(self, _: _Running) -> None:
        """A backward is done."""
        if self._backwards + 1 < self._accumulate:
            self._running, self._backwards = None, self._backwards + 1
            return
        self._running = _FAILED  # until all is well
        if len(self._done) < len(self._params):
            # Those that only an earlier backward reached, and averages, which move without gradients too.
            for index, param in enumerate(self._params):
                if index not in self._done and (param.grad is not None or self._is_averaged(index, param)):
                    self._update(index, param)
        self._running, self._backwards = None, 0
        self._ends = True
        try:
            self.step()
        finally:
            self._ends = False

    def _is_averaged(self, index: int, param: Tensor) -> bool:
        group = self.optimizer.param_groups[self._places[index][0]]
        return group["ema_decay"] is not None and "ema" in self.optimizer.state.get(param, ())

    def _update(self, index: int, param: Tensor) -> None:
        """Step one parameter, with the options that its group has now, and free its gradient."""
        number, seat = self._places[index]
        group = self.optimizer.param_groups[number]
        stepper = self._steppers[index]
        if stepper is None:
            stepper = _C.Stepper(self.optimizer._rule, type(self.optimizer).__name__, number, seat, index)
            self._steppers[index] = stepper
        stepper.step(
            self,
            [{**group, "params": [param]}],
            self.optimizer.state,
            None,
            None,
            None,
            torch.get_num_threads(),
        )
        if group["stats"] and param.grad is not None:
            self._measured[index] = stepper.stats.view(-1, len(STATS))[0].clone()
        param.grad = None
        self._done.add(index)


def step_in_backward(
    model_or_params: nn.Module | Iterable[Any],
    optimizer_factory: Callable[..., FusedOptimizer],
    *,
    accumulate: int = 1,
    **options: Any,
) -> BackwardSteps:
    """Update each parameter in backward, as soon as its gradient is ready, and free the gradient.

    So gradients never exist all at once: of a model in float32 with Adam that is a quarter of 16 bytes a parameter. The
    results are, bit for bit, those of ``loss.backward(); optimizer.step(); optimizer.zero_grad()``.

        steps = fusedopt.step_in_backward(model, fusedopt.AdamW, lr=3e-4)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(steps, T_max=1000)
        for batch in batches:
            model(batch).backward()  # the step
            scheduler.step()

    Two backwards are two steps, unless `accumulate` says otherwise; one that reaches none of the parameters is not
    counted. `docs/step_in_backward.md` tells when not to use it.

    Args:
        model_or_params: a module, for its `parameters()`; or parameters, or groups of them, as an optimizer takes them.
        optimizer_factory: a class of this package, or what makes an optimizer of one from the parameters.
        accumulate: how many backwards make a step: gradients are kept until the last of them (default: 1).
        options: given to `optimizer_factory`.

    Raises:
        TypeError: the optimizer is not one of this package; the model is wrapped by DistributedDataParallel or
            FullyShardedDataParallel, or a parameter is a DTensor: the hooks may come before the ranks' gradients meet.
        ValueError: an option that needs all gradients at once: `max_grad_norm`, `skip_nonfinite`, `differentiable`; or
            `accumulate` is not a positive integer.
        RuntimeError: in backward, what the optimizer's `step()` raises about a parameter, which then keeps its gradient
            and its value. Those before it are updated: the next backward raises, too, until
            :meth:`BackwardSteps.discard` was called.
    """
    params: Any = model_or_params
    if isinstance(model_or_params, nn.Module):
        fsdp: Any = sys.modules.get("torch.distributed.fsdp")
        sharded = () if fsdp is None else (fsdp.FullyShardedDataParallel,)
        for module in model_or_params.modules():
            if isinstance(module, (nn.parallel.DistributedDataParallel, *sharded)):
                raise TypeError(
                    f"step_in_backward: the model has a {type(module).__name__}, whose ranks' gradients meet after the "
                    "parameters' hooks: each rank would step with its own; train without gradient release"
                )
        params = model_or_params.parameters()
    optimizer = optimizer_factory(params, **options)
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(
            f"step_in_backward: optimizer_factory must make an optimizer of this package, got {type(optimizer)}"
        )
    return BackwardSteps(optimizer, accumulate)
