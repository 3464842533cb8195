"""The learning-rate range test: what it measures, suggests and draws."""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from packages import require
from range_tests import Parabola, assert_same, fingerprint, forever, quadratic
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import fusedopt
from fusedopt import lr_finder
from fusedopt.lr_finder import RangeTest, range_test

# --- the series of learning rates ---------------------------------------------------------------------------------


def sweep(*, lr: float = 1.0, curvature: float = 1.0, loss: Any = quadratic, **options: Any) -> RangeTest:
    """Of SGD on a parabola."""
    model = Parabola(curvature)
    return range_test(model, torch.optim.SGD(model.parameters(), lr=lr), loss, forever(), progress=False, **options)


def test_exponential_series() -> None:
    result = sweep(start=1e-5, end=3e-2, steps=50)
    assert result.lrs[0] == 1e-5 and result.lrs[-1] == 3e-2 and len(result.lrs) == 50
    assert result.lrs == pytest.approx(np.geomspace(1e-5, 3e-2, 50), rel=1e-14)  # of powers, a few ulps
    assert result.stopped is None


def test_linear_series() -> None:
    result = sweep(start=1e-3, end=3e-2, steps=30, mode="linear")
    assert result.lrs[0] == 1e-3 and result.lrs[-1] == 3e-2
    assert result.lrs == pytest.approx(np.linspace(1e-3, 3e-2, 30), rel=1e-14)


@pytest.mark.parametrize("tensors", [False, True])
def test_groups_keep_their_ratios(tensors: bool) -> None:
    def number(lr: float) -> Any:
        return torch.tensor(lr, dtype=torch.float64) if tensors else lr

    params = [Parameter(torch.ones(2)) for _ in range(3)]
    lrs = [number(lr) for lr in (0.5, 0.125, 0.0)]
    optimizer = fusedopt.AdamW([{"params": [p], "lr": lr} for p, lr in zip(params, lrs, strict=True)])
    seen = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        assert not tensors or all(group["lr"] is lr for group, lr in zip(optimizer.param_groups, lrs, strict=True))
        seen.append([float(group["lr"]) for group in optimizer.param_groups])
        return sum(p.square().sum() for p in params)

    result = range_test(nn.Linear(1, 1), optimizer, loss, forever(), start=0.01, end=1.0, steps=9, progress=False)
    assert seen == [[lr, lr / 4, 0.0] for lr in result.lrs]
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.5, 0.125, 0.0]


def test_ratios_are_those_that_a_scheduler_begins_with() -> None:
    """A warm-up begins at 0, of which nothing can be a multiple."""
    params = [Parameter(torch.ones(2)) for _ in range(2)]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(params, (0.5, 0.125), strict=True)]
    optimizer = torch.optim.AdamW(groups)
    LambdaLR(optimizer, lambda step: step / 10)
    seen = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        seen.append([group["lr"] for group in optimizer.param_groups])
        return params[0].sum() + params[1].sum()

    result = range_test(nn.Linear(1, 1), optimizer, loss, forever(), start=0.01, end=0.1, steps=4, progress=False)
    assert seen == [[lr, lr / 4] for lr in result.lrs]


# --- losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.5, 0.9])
def test_smoothing_is_that_of_adam(smoothing: float) -> None:
    result = sweep(start=1e-2, end=1.9, steps=40, smoothing=smoothing)
    for k in range(40):
        weights = smoothing ** np.arange(k, -1, -1)
        assert result.smoothed[k] == pytest.approx(np.average(result.losses[: k + 1], weights=weights), rel=1e-12)
    if smoothing == 0:
        assert result.smoothed == result.losses


@pytest.mark.parametrize("curvature", [0.1, 3.0, 500.0])
def test_a_parabola_diverges_where_it_has_to(curvature: float) -> None:
    """A step multiplies x by 1 - lr * curvature, which is below -1 from 2 / curvature on."""
    critical = 2 / curvature
    result = sweep(curvature=curvature, start=1e-4 / curvature, end=1e4 / curvature, smoothing=0)
    ratio = result.lrs[1] / result.lrs[0]
    lowest = result.lrs[result.losses.index(min(result.losses))]
    assert critical <= lowest < critical * ratio  # the first step with more is the first that climbs
    assert result.stopped is not None
    assert critical < result.lrs[-1] < critical * ratio**4  # then by (1.2 * 2 - 1)^2 = 1.96, 3.5 and 6.0
    for method in ("steepest", "valley"):
        assert critical / 100 < result.suggestion(method) < critical
        smoothed = sweep(curvature=curvature, start=1e-4 / curvature, end=1e4 / curvature)
        assert critical / 100 < smoothed.suggestion(method) < critical


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_stops_the_test(bad: float) -> None:
    calls = itertools.count()
    result = sweep(loss=lambda model, _: model() * (bad if next(calls) == 7 else 1), end=1e-3)
    assert len(result.lrs) == len(result.losses) == len(result.smoothed) == 7
    assert f"the loss was {bad}" in str(result.stopped)


def test_without_stop_at_only_what_is_not_finite_stops() -> None:
    at = [len(sweep(start=1.5, end=10.0, stop_at=stop_at).lrs) for stop_at in (4.0, 1e30, None)]
    assert at[0] < at[1] < at[2] == 100


def test_a_lucky_first_batch_does_not_stop_the_test() -> None:
    """The average begins with the first losses; later ones are more than `stop_at` times as much."""
    losses = iter([0.1, *[1.0] * 100])
    result = sweep(loss=lambda model, _: model() * 0 + next(losses), start=1e-3, end=1.0, steps=50)
    assert result.stopped is None
    assert len(result.lrs) == 50


@pytest.mark.parametrize("offset", [-1.0, -100.0])
def test_a_loss_below_zero_can_stop(offset: float) -> None:
    result = sweep(loss=lambda model, _: model() + offset, start=0.1, end=1e3, smoothing=0)
    assert result.stopped is not None
    assert result.losses[-2] <= min(result.losses) + 3 * abs(min(result.losses)) < result.losses[-1]


def test_validation() -> None:
    """The mean loss behind the step, in evaluation mode, without gradients."""
    model = nn.Sequential(Parabola(), nn.Dropout(0.5), nn.BatchNorm1d(1)).double()
    model[2].eval()
    seen = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        seen.append((batch, model.training, model[1].training, model[2].training, torch.is_grad_enabled()))
        return batch * model[0]()

    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    result = range_test(
        model, optimizer, loss, [1.0], validation=[1.0, 4.0], start=0.1, end=0.2, steps=2, progress=False
    )
    assert seen == 2 * [(1.0, True, True, False, True), (1.0, False, False, False, False), (4.0,) + 4 * (False,)]
    xs = [0.9, 0.9 * 0.8]
    assert result.losses == pytest.approx([5 / 2 * x**2 / 2 for x in xs], rel=1e-15)
    assert [module.training for module in model.modules()] == [True, True, True, False]


@pytest.mark.parametrize("as_a_whole", [True, False])
def test_a_model_in_evaluation_mode_is_trained_in_training_mode(as_a_whole: bool) -> None:
    model = nn.Sequential(Parabola(), nn.Dropout())
    (model if as_a_whole else model[1]).eval()
    seen = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        seen.append([module.training for module in model.modules()])
        return model[0]()

    before = [module.training for module in model.modules()]
    range_test(model, torch.optim.SGD(model.parameters()), loss, forever(), steps=2, end=1e-3, progress=False)
    assert seen == 2 * [[True, True, True] if as_a_whole else [True, True, False]]
    assert [module.training for module in model.modules()] == before


def linear_world() -> tuple[nn.Module, Optimizer, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    inputs, targets = torch.randn(6, 8, 3, dtype=torch.float64), torch.randn(6, 8, 2, dtype=torch.float64)
    return model, fusedopt.AdamW(model.parameters(), lr=1e-3), list(zip(inputs, targets, strict=True))


def test_a_criterion_is_a_function_of_outputs_and_targets() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    model, optimizer, batches = linear_world()
    a = range_test(model, optimizer, nn.MSELoss(), batches, progress=False)
    assert a == range_test(model, optimizer, loss, batches, progress=False)


def test_batches_are_moved() -> None:
    """Tensors in containers, and whatever has `to`, as the encodings of tokenizers."""

    class Encoding:
        device = "here"

        def to(self, device: torch.device) -> Encoding:
            self.device = str(device)
            return self

    def loss(model: nn.Module, batch: Any) -> Tensor:
        assert batch["a"][0].device.type == "meta" and batch["b"].device == "meta" and batch["c"] == "text"
        return model()

    model = Parabola()
    batches = [{"a": [torch.ones(2)], "b": Encoding(), "c": "text"}]
    range_test(
        model, torch.optim.SGD(model.parameters()), loss, batches, device="meta", steps=2, end=0.1, progress=False
    )


def test_accumulation_equals_large_batches() -> None:
    model, optimizer, batches = linear_world()
    halves = [half for batch in batches for half in zip(*(part.split(4) for part in batch), strict=True)]
    options: dict[str, Any] = {"start": 1e-3, "end": 1.0, "steps": 20, "progress": False}
    whole = range_test(model, optimizer, nn.MSELoss(), batches, **options)
    parts = range_test(model, optimizer, nn.MSELoss(), halves, accumulate=2, **options)
    assert parts.lrs == whole.lrs
    assert parts.losses == pytest.approx(whole.losses, rel=1e-12)  # 2e-15 measured: sums in another order
    assert parts.losses != range_test(model, optimizer, nn.MSELoss(), halves, **options).losses


def test_autocast() -> None:
    seen = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        output = model(batch)
        seen.append(output.dtype)
        return output.float().square().mean()

    model = nn.Linear(3, 2)
    optimizer = fusedopt.AdamW(model.parameters())
    options: dict[str, Any] = {"steps": 2, "end": 0.1, "progress": False}
    range_test(model, optimizer, loss, [torch.ones(1, 3)], autocast=torch.bfloat16, **options)
    range_test(model, optimizer, loss, [torch.ones(1, 3)], **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the caller's is left alone
        range_test(model, optimizer, loss, [torch.ones(1, 3)], **options)
    assert seen == 2 * [torch.bfloat16] + 2 * [torch.float32] + 2 * [torch.bfloat16]


def test_gradients_are_computed_where_they_are_off() -> None:
    with torch.no_grad():
        assert sweep(start=0.1, end=0.2, steps=3).losses[-1] < 0.5


# --- batches that end -----------------------------------------------------------------------------------------------


def test_batches_are_begun_again() -> None:
    seen = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        seen.append(batch)
        return model()

    model = Parabola()
    range_test(
        model, torch.optim.SGD(model.parameters()), loss, range(3), accumulate=2, steps=4, end=0.1, progress=False
    )
    assert seen == [0, 1, 2, 0, 1, 2, 0, 1]


def test_an_iterator_that_ends_ends_the_test() -> None:
    model = Parabola()
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.warns(UserWarning, match="batches ended after 3 of 10 steps .* give a DataLoader or a list") as record:
        result = range_test(model, optimizer, quadratic, iter(range(7)), accumulate=2, steps=10, progress=False)
    assert record[0].filename == __file__
    assert len(result.lrs) == 3 and result.stopped == "the batches ended"


def test_an_iterator_that_suffices_keeps_the_rest() -> None:
    class Batches:
        def __init__(self) -> None:
            self.at = 0

        def __iter__(self) -> Batches:
            return self

        def __next__(self) -> int:
            self.at += 1
            return self.at

    model, batches = Parabola(), Batches()
    range_test(model, torch.optim.SGD(model.parameters()), quadratic, batches, steps=5, end=0.1, progress=False)
    assert next(batches) == 6


# --- gradient scaling -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaler_class", [torch.amp.GradScaler, fusedopt.GradScaler])
@pytest.mark.parametrize("make", [fusedopt.AdamW, torch.optim.SGD])
def test_skipped_steps_do_not_count(make: type[Optimizer], scaler_class: type[torch.amp.GradScaler]) -> None:
    calls: list[float] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        calls.append(optimizer.param_groups[0]["lr"])
        return model() * (math.inf if len(calls) in (1, 2, 6) else 1)

    model = Parabola().float()
    optimizer = make(model.parameters(), lr=1e-3)
    scaler = scaler_class("cpu", init_scale=1024.0)
    options: dict[str, Any] = {"steps": 6, "start": 0.01, "end": 0.1, "progress": False}
    result = range_test(model, optimizer, loss, forever(), grad_scaler=scaler, **options)
    assert calls == [result.lrs[i] for i in (0, 0, 0, 1, 2, 3, 3, 4, 5)]
    assert result == range_test(model, optimizer, quadratic, forever(), **options)
    assert scaler.state_dict() == scaler_class("cpu", init_scale=1024.0).state_dict() and scaler._scale is None


def test_steps_that_are_always_skipped_stop_the_test() -> None:
    calls = itertools.count()
    scaler = torch.amp.GradScaler("cpu")
    result = sweep(loss=lambda model, _: model() * (math.inf if next(calls) > 2 else 1), grad_scaler=scaler, end=0.1)
    assert len(result.lrs) == 3 and next(calls) == 3 + 21
    assert "skipped 21 steps in a row" in str(result.stopped)


def test_a_scaler_that_is_not_enabled() -> None:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    assert sweep(grad_scaler=scaler, end=0.1) == sweep(end=0.1)


# --- suggestions ----------------------------------------------------------------------------------------------------


def result_of(losses: list[float], mode: str = "exponential") -> RangeTest:
    space = np.geomspace if mode == "exponential" else np.linspace
    return RangeTest(space(1e-5, 1, len(losses)).tolist(), losses, losses, mode, None)


def test_steepest_is_the_steepest_of_the_fall() -> None:
    noise = [3.0, 9.0, 2.0]  # in the first tenth
    rise_and_fall = [9.0, 1.5]  # behind the lowest
    result = result_of([*noise, *[3.0] * 15, 2.9, 2.7, 2.2, 1.8, 1.6, 1.5, 1.4, *[2.0] * 8, *rise_and_fall])
    assert len(result.lrs) == 35
    assert result.suggestion() == result.lrs[20]  # from 2.7 to 1.8


def test_steepest_is_over_the_logarithm() -> None:
    """Of a straight line over lr the slope over log(lr) is lr times as large: the last point is the steepest."""
    result = result_of([*np.linspace(2, 1, 40), 5.0], "linear")
    assert result.suggestion() == result.lrs[38]


def test_the_longest_valley() -> None:
    """It has six points, of which some are no neighbours; two thirds of the way from point 10 to point 19 is 16."""
    result = result_of([1.0] * 10 + [9.0, 8.0, 8.5, 7.0, 9.0, 6.0, 9.0, 9.0, 5.0, 4.0] + [4.5] * 5)
    assert result.suggestion("valley") == result.lrs[16]


@pytest.mark.parametrize("method", ["steepest", "valley"])
@pytest.mark.parametrize("losses", [[1.0], [2.0, 1.0], [1.0] * 50, [1.0 + i for i in range(50)]], ids=len)
def test_no_suggestion_without_a_fall(losses: list[float], method: str) -> None:
    with pytest.raises(ValueError, match=f"does not fall over three points or more of the {len(losses)} from lr 1e-05"):
        result_of(losses).suggestion(method)


def test_a_result_shows_what_is_short() -> None:
    assert repr(result_of([1.0] * 50)) == "RangeTest(mode='exponential', stopped=None)"


# --- arguments ------------------------------------------------------------------------------------------------------

RAISES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"start": 0.0}, ValueError, "start must be a positive number, got 0.0"),
    ({"start": math.nan}, ValueError, "start must be a positive number, got nan"),
    ({"start": "1e-7"}, ValueError, "start must be a positive number, got '1e-7'"),
    ({"end": 1e-7}, ValueError, "end must be a number above start, 1e-07, got 1e-07"),
    ({"end": math.inf}, ValueError, "end must be a number above start"),
    ({"steps": 1}, ValueError, "steps must be an integer of at least 2, got 1"),
    ({"steps": 10.0}, ValueError, "steps must be an integer of at least 2, got 10.0"),
    ({"mode": "log"}, ValueError, r"mode must be one of \('exponential', 'linear'\), got 'log'"),
    ({"smoothing": 1.0}, ValueError, r"smoothing must be a number in \[0, 1\), got 1.0"),
    ({"smoothing": -0.1}, ValueError, r"smoothing must be a number in \[0, 1\), got -0.1"),
    ({"stop_at": 1.0}, ValueError, "stop_at must be a number above 1, or None, got 1.0"),
    ({"accumulate": 0}, ValueError, "accumulate must be an integer of at least 1, got 0"),
    ({"accumulate": True}, ValueError, "accumulate must be an integer of at least 1, got True"),
    ({"optimizer": "sgd"}, TypeError, "optimizer must be a torch.optim.Optimizer, got str"),
    ({"validation": iter([1])}, ValueError, "validation is an iterator"),
    ({"validation": []}, ValueError, "validation is empty"),
    ({"batches": []}, ValueError, "batches ended before the first step, which takes 1"),
    ({"batches": iter([1, 2]), "accumulate": 3}, ValueError, "batches ended before the first step, which takes 3"),
    (
        {"loss": nn.MSELoss()},
        ValueError,
        "batches must be pairs of inputs and targets, got a NoneType: give a function",
    ),
    ({"loss": lambda model, _: model().repeat(2)}, ValueError, r"a tensor with one number, got one of shape \(2,\)"),
    ({"loss": lambda model, _: 1.0}, ValueError, "a tensor with one number, got a float"),
    ({"loss": lambda model, _: model() * math.nan}, RuntimeError, "the loss was nan at lr 1e-07, which is the first"),
]


@pytest.mark.parametrize("given, error, message", RAISES, ids=[f"{list(row[0])[-1]}-{row[2][:30]}" for row in RAISES])
def test_errors(given: dict[str, Any], error: type[Exception], message: str) -> None:
    model = Parabola()
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    world = {"model": model, "optimizer": optimizer}
    before = fingerprint(world)
    arguments = {"optimizer": optimizer, "loss": quadratic, "batches": forever(), "progress": False, **given}
    with pytest.raises(error, match=message):
        range_test(model, **arguments)
    assert_same(fingerprint(world), before)


def test_errors_about_optimizers() -> None:
    model = nn.Linear(2, 2)
    steps = fusedopt.step_in_backward(model, fusedopt.AdamW, lr=0.1)
    with pytest.raises(TypeError, match="steps in backward"):
        range_test(model, steps, quadratic, forever())
    with pytest.raises(ValueError, match=r"lr of param_groups\[0\] is 0.0"):
        range_test(model, torch.optim.SGD(model.parameters(), lr=0.0), quadratic, forever())
    without = torch.optim.SGD(model.parameters())
    del without.param_groups[0]["lr"]
    with pytest.raises(ValueError, match=r"param_groups\[0\] has no 'lr'"):
        range_test(model, without, quadratic, forever())
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match="LBFGS needs a closure, which a GradScaler does not take"):
        range_test(model, torch.optim.LBFGS(model.parameters()), quadratic, forever(), grad_scaler=scaler)


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_error_about_lazy_modules() -> None:
    for lazy, name in ((nn.LazyLinear(2), "0.weight"), (nn.LazyBatchNorm1d(affine=False), "0.running_mean")):
        with pytest.raises(ValueError, match=rf"{name} has no shape yet: run the model on a batch"):
            range_test(nn.Sequential(lazy), torch.optim.SGD([Parameter(torch.ones(1))]), quadratic, forever())


def test_numbers_of_numpy() -> None:
    plain = sweep(start=0.25, end=0.5, steps=5)
    assert sweep(start=np.float32(0.25), end=np.float64(0.5), steps=np.int64(5)).lrs == plain.lrs


# --- what is drawn --------------------------------------------------------------------------------------------------


@pytest.fixture
def figure() -> Iterator[Any]:
    require("matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


def labels_of(ax: Any) -> list[str]:
    return ax.get_legend_handles_labels()[1]


def test_plot(figure: Any) -> None:
    result = sweep(start=1e-4, end=100.0)
    ax = result.plot()
    assert ax.get_xscale() == "log" and ax.get_xlabel() == "learning rate" and ax.get_ylabel() == "loss"
    lr = result.suggestion()
    phases = ["too small", "learning", "diverging"]
    assert labels_of(ax) == ["loss", "smoothed loss", *phases, f"steepest: {lr:.2g}"]
    losses, smoothed, mark = ax.lines
    assert losses.get_xydata().tolist() == [list(pair) for pair in zip(result.lrs, result.losses, strict=True)]
    assert smoothed.get_ydata().tolist() == result.smoothed
    assert mark.get_xydata().tolist() == [[lr, result.smoothed[result.lrs.index(lr)]]]
    edges = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in ax.patches]
    assert edges[0][0] == result.lrs[0] and edges[2][1] == pytest.approx(result.lrs[-1])
    assert edges[0][1] == pytest.approx(edges[1][0]) and edges[1][1] == pytest.approx(edges[2][0])
    assert edges[1][0] < lr < edges[1][1] == pytest.approx(result.lrs[result.smoothed.index(min(result.smoothed))])
    ax.figure.canvas.draw()


def test_plot_on_given_axes(figure: Any) -> None:
    ax = figure.figure().add_subplot()
    result = sweep(start=1e-4, end=1.0, mode="linear")
    assert result.plot(ax, method="valley") is ax
    assert ax.get_xscale() == "linear" and f"valley: {result.suggestion('valley'):.2g}" in labels_of(ax)
    assert "diverging" not in labels_of(ax)
    with pytest.raises(ValueError, match="method must be one of"):
        result.plot(ax, method="best")


@pytest.mark.parametrize("losses", [[1.0], [1.0, 2.0], [1.0] * 20], ids=len)
def test_plot_of_what_does_not_learn(losses: list[float], figure: Any) -> None:
    ax = result_of(losses).plot()
    assert labels_of(ax) == ["loss", "smoothed loss"]
    ax.figure.canvas.draw()


# --- packages that are not needed -----------------------------------------------------------------------------------


def test_without_matplotlib_and_tqdm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("matplotlib", "tqdm", "tqdm.auto"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    spec = importlib.util.spec_from_file_location("fusedopt.lr_finder_anew", lr_finder.__file__)
    assert spec is not None and spec.loader is not None
    anew = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, anew)
    spec.loader.exec_module(anew)
    model = Parabola()
    result = anew.range_test(model, torch.optim.SGD(model.parameters()), quadratic, forever(), end=0.1)
    assert capsys.readouterr() == ("", "")
    with pytest.raises(ImportError, match="pip install matplotlib"):
        result.plot()


@pytest.mark.parametrize("progress", [True, False])
def test_progress(progress: bool, capsys: pytest.CaptureFixture[str]) -> None:
    require("tqdm")
    model = Parabola()
    optimizer = torch.optim.SGD(model.parameters())
    range_test(model, optimizer, quadratic, forever(), start=0.01, end=0.25, steps=5, progress=progress)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("range test" in err and "5/5" in err and "lr=2.50e-01" in err and "loss=" in err) == progress
    assert bool(err) == progress
