"""The learning-rate range test: train briefly while the learning rate rises, look at the loss, put everything back."""

from __future__ import annotations

import contextlib
import inspect
import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from ._put_back import Snapshot
from .step_in_backward import BackwardSteps

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MODES = ("exponential", "linear")
_METHODS = ("steepest", "valley")
_MAX_SKIPS = 20  # in a row, of one learning rate: a GradScaler's scale of 65536 is then below 0.1


# --- what comes out -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RangeTest:
    """What :func:`range_test` has measured. All lists have one entry for each learning rate, and only finite ones.

    Attributes:
        lrs: the learning rates of the first parameter group, rising.
        losses: the losses as measured.
        smoothed: their exponential moving average, bias-corrected as Adam's.
        mode: "exponential" or "linear".
        stopped: why the test ended before its last learning rate; None if it did not.
    """

    lrs: list[float] = field(repr=False)
    losses: list[float] = field(repr=False)
    smoothed: list[float] = field(repr=False)
    mode: str
    stopped: str | None

    def suggestion(self, method: str = "steepest") -> float:
        """Return a learning rate for the first parameter group.

        The first tenth of the points does not count: there the average is of too few losses.

        Args:
            method: how it is chosen (default: "steepest").

                - "steepest": where the smoothed loss falls fastest over log(lr), by central differences, in the phase
                  of learning (see :meth:`plot`). What falls behind the lowest point has only risen before.
                - "valley": two thirds of the way, in points, through the longest valley: the longest subsequence of
                  points of which each is below the one before. More cautious. After fastai's method of this name
                  (docs.fast.ai, callback.schedule): its documentation says two thirds, its code takes the middle.

        Raises:
            ValueError: there is no such method, or the smoothed loss does not fall over three points or more.
        """
        index = self._suggested(method)
        if index is None:
            raise ValueError(
                f"suggestion: the smoothed loss does not fall over three points or more of the {len(self.lrs)} from lr "
                f"{self.lrs[0]:.3g} to {self.lrs[-1]:.3g}: look at plot(); start lower, end higher or take more steps"
            )
        return self.lrs[index]

    def _suggested(self, method: str) -> int | None:
        if method not in _METHODS:
            raise ValueError(f"suggestion: method must be one of {_METHODS}, got {method!r}")
        return self._steepest() if method == "steepest" else self._in_valley()

    @property
    def _first(self) -> int:
        """The first point that counts."""
        return len(self.lrs) // 10

    def _learning(self) -> tuple[int, int] | None:
        """Where the phase of learning begins and ends."""
        lowest = min(range(self._first, len(self.lrs)), key=self.smoothed.__getitem__)
        highest = max(self.smoothed[self._first : lowest + 1])
        fall = highest - self.smoothed[lowest]
        if fall == 0:
            return None
        return max(i for i in range(self._first, lowest) if self.smoothed[i] >= highest - 0.1 * fall), lowest

    def _steepest(self) -> int | None:
        def slope(i: int) -> float:
            rise = self.smoothed[i + 1] - self.smoothed[i - 1]
            return rise / (math.log(self.lrs[i + 1]) - math.log(self.lrs[i - 1]))

        begin, end = self._learning() or (0, 0)
        return min(range(begin + 1, end), key=slope, default=None)

    def _in_valley(self) -> int | None:
        points = range(self._first, len(self.lrs))
        begins, lengths = list(range(len(self.lrs))), [1] * len(self.lrs)  # of the longest valley that ends at a point
        for i in points:
            for j in range(self._first, i):
                if self.smoothed[i] < self.smoothed[j] and lengths[i] <= lengths[j]:
                    begins[i], lengths[i] = begins[j], lengths[j] + 1
        end = max(points, key=lengths.__getitem__)
        return None if lengths[end] < 3 else begins[end] + 2 * (end - begins[end]) // 3

    def plot(self, ax: Axes | None = None, *, method: str = "steepest") -> Axes:
        """Draw the losses over the learning rate, with the three phases, and the suggestion if there is one.

        The phase of learning begins at the last point with less than a tenth of all the fall of the smoothed loss
        behind it, and ends at the lowest point. Of what diverges the vertical axis shows only the beginning.

        Args:
            ax: matplotlib Axes to draw on (default: those of a new figure of pyplot).
            method: of :meth:`suggestion`.

        Returns:
            The Axes.

        Raises:
            ImportError: matplotlib is missing.
        """
        suggested = self._suggested(method)
        try:
            from matplotlib import pyplot
        except ModuleNotFoundError as error:
            raise ImportError("RangeTest.plot() needs matplotlib: pip install matplotlib") from error
        if ax is None:
            ax = pyplot.subplots(figsize=(8, 4.5), layout="constrained")[1]
        if self.mode == "exponential":
            ax.set_xscale("log")
        ax.margins(x=0)
        ax.set_xlabel("learning rate")
        ax.set_ylabel("loss")
        ax.plot(self.lrs, self.losses, color="#9db4d0", linewidth=1, label="loss")
        ax.plot(self.lrs, self.smoothed, color="#1c3f6e", linewidth=2, label="smoothed loss")
        learning = self._learning()
        if learning is not None:
            begin, lowest = (self.lrs[i] for i in learning)
            for name, color, left, right in (
                ("too small", "#8c8c8c", self.lrs[0], begin),
                ("learning", "#3f9b55", begin, lowest),
                ("diverging", "#c0392b", lowest, self.lrs[-1]),
            ):
                if left < right:
                    ax.axvspan(left, right, color=color, alpha=0.15, linewidth=0, label=name)
            top, bottom = self.smoothed[learning[0]], min(self.losses[: learning[1] + 1])
            ax.set_ylim(bottom - 0.1 * (top - bottom), top + 0.5 * (top - bottom))  # divergence knows no bounds
        if suggested is not None:
            lr = self.lrs[suggested]
            label = f"{method}: {lr:.2g}"
            ax.plot(lr, self.smoothed[suggested], "o", color="#d35400", markersize=8, label=label)
        ax.legend(loc="lower left")
        return ax


# --- the test -------------------------------------------------------------------------------------------------------


def range_test(
    model: nn.Module,
    optimizer: Optimizer,
    loss: nn.Module | Callable[[nn.Module, Any], Tensor],
    batches: Iterable[Any],
    *,
    start: float = 1e-7,
    end: float = 10.0,
    steps: int = 100,
    mode: str = "exponential",
    smoothing: float = 0.9,
    stop_at: float | None = 4.0,
    accumulate: int = 1,
    grad_scaler: torch.amp.GradScaler | None = None,
    autocast: torch.dtype | None = None,
    validation: Iterable[Any] | None = None,
    device: torch.device | str | None = None,
    also_restore: Sequence[Any] = (),
    snapshot_device: torch.device | str | None = None,
    progress: bool = True,
) -> RangeTest:
    """Train with a rising learning rate, record the loss at each, and put everything back as it was, bit for bit.

        result = range_test(model, optimizer, nn.CrossEntropyLoss(), loader)
        result.plot()
        lr = result.suggestion()

    The test is Smith's (`Cyclical Learning Rates for Training Neural Networks <https://arxiv.org/abs/1506.01186>`_,
    section 3.3, and `Super-Convergence <https://arxiv.org/abs/1708.07120>`_, section 2). A loss is that of a batch
    before the step with the learning rate it is recorded for. `docs/lr_finder.md` tells how to read the result, and
    what is put back.

    Args:
        model: trained in the mode it is in; put in training mode first if it is in evaluation mode as a whole.
        optimizer: any of torch's or this package's; with several groups, all learning rates rise by the same factor:
            they keep the ratios of their "initial_lr", which a scheduler leaves there, or else of their "lr".
        loss: a criterion, called with ``(model(inputs), targets)`` for batches that are pairs; or a function of the
            model and a batch. Returns one number.
        batches: a DataLoader or other iterable; begun again when it ends. An iterator cannot be: then a UserWarning
            says that the test ended early. What an iterator has given is gone.
        start, end: the first and the last learning rate, of the first group (default: 1e-7 and 10).
        steps: how many learning rates (default: 100).
        mode: "exponential": each is the same multiple of the one before; "linear": the same amount more (default:
            "exponential").
        smoothing: the decay of the moving average of losses; 0: none (default: 0.9).
        stop_at: stop where the smoothed loss is more than this times its lowest, the first tenth of the steps not
            counted (for a lowest b below zero, more than b + (stop_at - 1) |b|); None: only where a loss is inf or nan
            (default: 4).
        accumulate: how many batches make a step; their losses are averaged (default: 1).
        grad_scaler: of torch or this package. A step that it skips, which its falling scale tells, does not count: the
            same learning rate is tried with the next batches, up to 20 more times in a row, then the test stops.
        autocast: run the model and the loss under :class:`torch.autocast` with this dtype (default: None: do not).
        validation: batches whose mean loss, in evaluation mode and after the step, is recorded instead.
        device: where tensors in batches are moved (default: where the model's first parameter is).
        also_restore: what else is to be put back, if `loss` or hooks change it: modules, schedulers, tensors, arrays,
            random generators, other optimizers, DataLoaders, objects with attributes; lists and dicts of these.
        snapshot_device: where copies are kept meanwhile; "cpu" saves a GPU's memory (default: None: beside what is
            copied). They take what the parameters, gradients, buffers and the optimizer's state take.
        progress: show a bar, if tqdm is installed (default: True).

    Returns:
        The learning rates and losses.

    Raises:
        TypeError, ValueError: an argument is out of range or of the wrong kind. Nothing was touched, unless it is
            about batches or what `loss` returned.
        RuntimeError: the first loss is inf or nan.
        BaseException: what the loss, the optimizer or the batches raise, KeyboardInterrupt too. In these cases as in
            all others, everything is put back first.
    """
    _check(start=start, end=end, steps=steps, mode=mode, smoothing=smoothing, stop_at=stop_at, accumulate=accumulate)
    ratios = _ratios(optimizer)
    _check_objects(model, optimizer, grad_scaler, validation)
    if device is None:
        params = (*model.parameters(), *optimizer.param_groups[0]["params"])
        device = params[0].device
    sweep = _Sweep(
        model, optimizer, loss, _repeated(batches), ratios, accumulate, grad_scaler, autocast, torch.device(device)
    )
    snapshot = Snapshot(snapshot_device)
    snapshot.add(model, optimizer, loss, grad_scaler, *model.parameters(), *model.buffers())
    snapshot.add_named(*also_restore)
    snapshot.add_source(batches)
    snapshot.add_source(validation)
    snapshot.add_random_states()
    lrs, losses, smoothed = [], [], []
    average, stopped = 0.0, None
    with snapshot, torch.enable_grad(), _progress_bar(steps if progress else 0) as bar:
        if not model.training:
            model.train()
        try:
            for lr in _learning_rates(float(start), float(end), steps, mode):
                value = sweep.step(lr)
                if validation is not None:
                    value = sweep.evaluate(validation)
                if not math.isfinite(value):
                    raise _Stopped(f"the loss was {value} at lr {lr:.3g}")
                average = smoothing * average + (1 - smoothing) * value
                lrs.append(lr)
                losses.append(value)
                smoothed.append(average / (1 - smoothing ** len(lrs)))
                if bar is not None:
                    bar.set_postfix(lr=f"{lr:.2e}", loss=f"{smoothed[-1]:.4g}", refresh=False)
                    bar.update()
                lowest = min(smoothed[steps // 10 :], default=math.inf)  # before, the average is of too few losses
                if stop_at is not None and smoothed[-1] > lowest + (stop_at - 1) * abs(lowest):
                    raise _Stopped(f"the smoothed loss was {smoothed[-1]:.4g} at lr {lr:.3g}, after {lowest:.4g}")
        except _Stopped as reason:
            stopped = str(reason)
        finally:
            sweep.batches.close()  # or a traceback keeps the workers of a DataLoader
    if sweep.ended:
        if not lrs:
            raise ValueError(f"range_test: batches ended before the first step, which takes {accumulate}")
        warnings.warn(
            f"range_test: batches ended after {len(lrs)} of {steps} steps and cannot begin again; give a DataLoader or "
            "a list instead of an iterator, or take fewer steps",
            stacklevel=2,
        )
    elif not lrs:
        raise RuntimeError(f"range_test: {stopped}, which is the first: look at the batches, or start lower")
    return RangeTest(lrs, losses, smoothed, mode, stopped)


def _check(**given: Any) -> None:
    """Raise if a number is out of range."""

    def require(name: str, is_right: Callable[[Any], bool], what: str) -> None:
        value = given[name]
        if isinstance(value, bool) or not is_right(value):
            raise ValueError(f"range_test: {name} must be {what}, got {value!r}")

    def is_number(value: Any) -> bool:
        return isinstance(value, Real) and math.isfinite(value)

    require("start", lambda v: is_number(v) and v > 0, "a positive number")
    require("end", lambda v: is_number(v) and v > given["start"], f"a number above start, {given['start']!r}")
    require("steps", lambda v: isinstance(v, Integral) and int(v) >= 2, "an integer of at least 2")
    require("mode", lambda v: v in _MODES, f"one of {_MODES}")
    require("smoothing", lambda v: is_number(v) and 0 <= v < 1, "a number in [0, 1)")
    require("stop_at", lambda v: v is None or (is_number(v) and v > 1), "a number above 1, or None")
    require("accumulate", lambda v: isinstance(v, Integral) and int(v) >= 1, "an integer of at least 1")


def _ratios(optimizer: Optimizer) -> list[float]:
    """The learning rates of the groups, in units of the first's."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"range_test: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if isinstance(optimizer, BackwardSteps):
        raise TypeError(
            "range_test: an optimizer that steps in backward cannot be tested: do so with an ordinary one of its class"
        )
    for number, group in enumerate(optimizer.param_groups):
        if "lr" not in group:
            raise ValueError(f"range_test: param_groups[{number}] has no 'lr'")
    base = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    if base[0] <= 0:
        raise ValueError(
            f"range_test: the lr of param_groups[0] is {base[0]}, but those of other groups are taken relative to it: "
            "make it positive"
        )
    return [lr / base[0] for lr in base]


def _check_objects(
    model: nn.Module, optimizer: Optimizer, grad_scaler: torch.amp.GradScaler | None, validation: Iterable[Any] | None
) -> None:
    """Raise if the test cannot be made with these."""
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise ValueError(f"range_test: {name} has no shape yet: run the model on a batch, then make the optimizer")
    if _needs_closure(optimizer) and grad_scaler is not None and grad_scaler.is_enabled():
        raise ValueError(f"range_test: {type(optimizer).__name__} needs a closure, which a GradScaler does not take")
    if isinstance(validation, Iterator):
        raise ValueError(
            "range_test: validation is an iterator, but is gone through at each learning rate: make a list"
        )


def _needs_closure(optimizer: Optimizer) -> bool:
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def _learning_rates(start: float, end: float, steps: int, mode: str) -> Iterator[float]:
    for i in range(steps - 1):
        part = i / (steps - 1)
        yield start * (end / start) ** part if mode == "exponential" else start + (end - start) * part
    yield end


def _repeated(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, from the beginning when they end; the end of this is where there are none at the beginning."""
    is_empty = False
    while not is_empty:
        is_empty = True
        for batch in batches:
            is_empty = False
            yield batch


@contextlib.contextmanager
def _progress_bar(steps: int) -> Iterator[Any]:
    """A bar of tqdm's; None if there are no steps, or no tqdm."""
    if steps:
        try:
            from tqdm.auto import tqdm
        except ModuleNotFoundError:
            pass
        else:
            with tqdm(total=steps, desc="range test", unit="step") as bar:
                yield bar
            return
    yield None


class _Stopped(Exception):
    """The test ends before its last learning rate."""


@dataclass
class _Sweep:
    """The training of a range test."""

    model: nn.Module
    optimizer: Optimizer
    loss: nn.Module | Callable[[nn.Module, Any], Tensor]
    batches: Any  # a generator
    ratios: list[float]
    accumulate: int
    grad_scaler: torch.amp.GradScaler | None
    autocast: torch.dtype | None
    device: torch.device
    ended: bool = False  # the batches

    def step(self, lr: float) -> float:
        """Take a step that counts; return the loss before it."""
        with torch.no_grad():
            for group, ratio in zip(self.optimizer.param_groups, self.ratios, strict=True):
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(lr * ratio)  # a captured graph or a compiled step reads this very tensor
                else:
                    group["lr"] = lr * ratio
        for _ in range(_MAX_SKIPS + 1):
            batches = list(islice(self.batches, self.accumulate))
            if len(batches) < self.accumulate:
                self.ended = True
                raise _Stopped("the batches ended")
            value, has_stepped = self._try(partial(self._backward, batches))
            if has_stepped:
                return value
        raise _Stopped(f"the GradScaler skipped {_MAX_SKIPS + 1} steps in a row at lr {lr:.3g}")

    def _try(self, closure: Callable[[], float]) -> tuple[float, bool]:
        """The loss, and whether there was a step."""
        if _needs_closure(self.optimizer):
            return float(self.optimizer.step(closure)), True
        value = closure()
        if self.grad_scaler is None:
            self.optimizer.step()
            return value, True
        scale = self.grad_scaler.get_scale()
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        return value, self.grad_scaler.get_scale() >= scale

    def _backward(self, batches: list[Any]) -> float:
        """New gradients of the mean loss, which is returned."""
        self.optimizer.zero_grad()
        values = []
        for batch in batches:
            loss = self._loss(batch)
            values.append(loss.item())
            loss = loss / self.accumulate
            (loss if self.grad_scaler is None else self.grad_scaler.scale(loss)).backward()
        return statistics.fmean(values)

    def _loss(self, batch: Any) -> Tensor:
        batch = tree_map(self._moved, batch, is_leaf=lambda leaf: hasattr(leaf, "to"))
        autocast = torch.autocast(self.device.type, dtype=self.autocast) if self.autocast else contextlib.nullcontext()
        with autocast:
            if isinstance(self.loss, nn.Module):
                if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                    raise ValueError(
                        "range_test: with a criterion batches must be pairs of inputs and targets, got a "
                        f"{type(batch).__name__}: give a function of the model and a batch as loss"
                    )
                loss = self.loss(self.model(batch[0]), batch[1])
            else:
                loss = self.loss(self.model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"one of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise ValueError(f"range_test: loss must return a tensor with one number, got {got}")
        return loss

    def _moved(self, leaf: Any) -> Any:
        return leaf.to(self.device) if hasattr(leaf, "to") else leaf

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Any]) -> float:
        """The mean loss in evaluation mode."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            values = [self._loss(batch).item() for batch in batches]
        finally:
            for module, training in modes:
                module.training = training
        if not values:
            raise ValueError("range_test: validation is empty")
        return statistics.fmean(values)
