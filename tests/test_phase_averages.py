"""The moving average of the weights (ema_decay) is torch's, also of parameters that come and go; ema_weights()."""

import copy
import io
import math
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from optimizers import ON_DEVICE
from phase_cases import bytes_of, make_grads, make_params, params_of, set_grads
from reference import assert_same_bits
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fusedopt


class Averaged:
    """An optimizer with ema_decay beside torch's average of the same weights."""

    def __init__(self, decay: float = 0.9, cls: type[Optimizer] = fusedopt.AdamW, **more: Any) -> None:
        self.params = make_params()
        self.optimizer = cls(self.params, ema_decay=decay, **more)
        self.module = torch.nn.ParameterList(self.params)
        self.average = AveragedModel(self.module, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def step(self, number: int, lacking: Sequence[int] = (), average: bool = True) -> None:
        set_grads(self.params, make_grads(number, self.params, lacking))
        self.optimizer.step()
        if average:
            self.average.update_parameters(self.module)
        self.check(f"after step {number}")

    def check(self, when: str) -> None:
        for i, (param, average) in enumerate(zip(self.params, self.average.module.parameters(), strict=True)):
            state = self.optimizer.state.get(param, {})
            assert_same_bits(state.get("ema", param), average.detach(), f"ema of parameter {i} {when}")


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.5, 0.9, 0.999, 1.0])
def test_average_of_parameters_that_come_and_go(decay: float, place: str) -> None:
    run = Averaged(decay, **({"capturable": True} if place == ON_DEVICE else {}))
    # The third has no gradient at first, the first pauses, the last never has one.
    for step, lacking in enumerate([(2, 5), (2, 5), (0, 2, 5), (0, 5), (5,), (0, 1, 2, 3, 4, 5), (2, 5), (5,)]):
        run.step(step, lacking)


@pytest.mark.parametrize("place", ["cpu", ON_DEVICE], indirect=True)
def test_average_of_steps_that_are_skipped(place: str) -> None:
    """Also skipped first steps: the average begins with the first that is not."""
    run = Averaged(skip_nonfinite=True)
    for step in range(6):
        skipped = step in (0, 1, 3)
        grads = make_grads(step, run.params)
        if skipped:
            assert grads[4] is not None
            grads[4][0] = math.inf
        set_grads(run.params, grads)
        run.optimizer.step()
        if not skipped:
            run.average.update_parameters(run.module)
        run.check(f"after step {step}")
    assert run.optimizer.skipped_steps == 3


def test_average_switched_on_late_and_off() -> None:
    run = Averaged()
    run.optimizer.param_groups[0]["ema_decay"] = None
    for step in range(2):
        set_grads(run.params, make_grads(step, run.params))
        run.optimizer.step()
    assert not any("ema" in state for state in run.optimizer.state.values())
    run.optimizer.param_groups[0]["ema_decay"] = 0.9
    for step in range(2, 5):
        run.step(step, lacking=(1,) if step == 3 else ())
    run.optimizer.param_groups[0]["ema_decay"] = None
    run.step(5, average=False)
    run.optimizer.param_groups[0]["ema_decay"] = 0.9
    run.step(6)


def test_groups_have_averages_of_their_own() -> None:
    params, twins = make_params(), make_params()
    optimizer = fusedopt.Adam([{"params": params[:2], "ema_decay": 0.5}, {"params": params[2:]}], ema_decay=None)
    expected = [torch.nn.ParameterList(group) for group in (twins[:2],)]
    average = AveragedModel(expected[0], multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for step in range(4):
        set_grads(params, make_grads(step, params))
        optimizer.step()
        with torch.no_grad():
            for p, q in zip(params, twins, strict=True):
                q.copy_(p)
        average.update_parameters(expected[0])
    for p, q in zip(params[:2], average.module.parameters(), strict=True):
        assert_same_bits(optimizer.state[p]["ema"], q.detach())
    assert all("ema" not in optimizer.state[p] for p in params[2:])


@pytest.mark.parametrize("way", ["state_dict", "file", "deepcopy", "pickle"])
def test_averages_are_saved(way: str) -> None:
    run = Averaged()
    for step in range(3):
        run.step(step, lacking=(2,) if step < 2 else ())
    if way in ("state_dict", "file"):
        saved = run.optimizer.state_dict()
        if way == "file":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file)
        run.optimizer = fusedopt.AdamW(run.params)
        run.optimizer.load_state_dict(copy.deepcopy(saved))
        assert run.optimizer.param_groups[0]["ema_decay"] == 0.9
    else:
        copied = copy.deepcopy(run) if way == "deepcopy" else pickle.loads(pickle.dumps(run.optimizer))
        if way == "deepcopy":
            run = copied
        else:
            run.optimizer = copied
            run.params = params_of(copied)
            run.module = torch.nn.ParameterList(run.params)
    run.check("as loaded")
    for step in range(3, 6):
        run.step(step)


def test_ema_weights() -> None:
    run = Averaged()
    for step in range(3):
        run.step(step, lacking=(5,))
    before = [p.detach().clone() for p in run.params]
    averages = [p.detach().clone() for p in run.average.module.parameters()]
    addresses = [p.data_ptr() for p in run.params]
    saved = bytes_of(run.optimizer)
    with pytest.raises(KeyError, match="anything"), run.optimizer.ema_weights():
        for p, average in zip(run.params, averages, strict=True):
            assert_same_bits(p.detach(), average)
        assert torch.is_grad_enabled()
        with pytest.raises(RuntimeError, match=r"^AdamW: the weights are those of ema_weights\(\)"):
            run.optimizer.step()
        with pytest.raises(RuntimeError, match="already in use"), run.optimizer.ema_weights():
            pass
        with torch.no_grad():
            run.params[0].zero_()  # whatever is done to them is undone
        raise KeyError("anything")
    for p, value in zip(run.params, before, strict=True):
        assert_same_bits(p.detach(), value)
    assert bytes_of(run.optimizer) == saved
    assert [p.data_ptr() for p in run.params] == addresses
    run.step(3)
    with pytest.raises(RuntimeError, match="needs ema_decay"), fusedopt.Adam(make_params()).ema_weights():
        pass


def test_parameters_that_are_removed_are_forgotten() -> None:
    """Nothing is written to the memory of one that was only averaged."""
    a, b = make_params(sizes=(10, 10))
    optimizer = fusedopt.AdamW([{"params": [a]}, {"params": [b]}], ema_decay=0.5)
    set_grads([a, b], make_grads(0, [a, b]))
    optimizer.step()
    b.grad = None
    with torch.no_grad():
        b.add_(1.0)
    optimizer.step()
    optimizer.param_groups.pop()
    average = optimizer.state.pop(b)["ema"]
    before = average.clone()
    optimizer.step()
    assert_same_bits(average, before)


def test_averages_that_are_switched_off_are_not_shown() -> None:
    params = make_params()
    optimizer = fusedopt.AdamW([{"params": params[:2]}, {"params": params[2:]}], ema_decay=0.5)
    for step in range(2):
        set_grads(params, make_grads(step, params))
        optimizer.step()
    optimizer.param_groups[1]["ema_decay"] = None
    optimizer.step()
    now = [p.detach().clone() for p in params]
    with optimizer.ema_weights():
        for i, (p, value) in enumerate(zip(params, now, strict=True)):
            assert torch.equal(p, value) == (i >= 2)


def test_an_average_put_into_the_state_by_hand_is_moved() -> None:
    params = make_params(sizes=(4, 4))
    optimizer = fusedopt.AdamW(params, ema_decay=0.5)
    params[0].grad = torch.ones(4)
    for _ in range(2):
        optimizer.step()
    value = params[1].detach().clone()
    optimizer.state[params[1]] = {"step": torch.tensor(1.0), "ema": torch.full((4,), 9.0)}
    optimizer.step()
    assert_same_bits(optimizer.state[params[1]]["ema"], torch.lerp(torch.full((4,), 9.0), value, 0.5))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("place", ["cpu", ON_DEVICE], indirect=True)
@pytest.mark.parametrize("late", [False, True], ids=["at_once", "switched_on_late"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_averages_begin_with_the_first_step_that_is_not_skipped(place: str, late: bool, sparse: bool) -> None:
    """Of all parameters, also of those whose gradient comes only then."""
    more = {"fused": True} if place == ON_DEVICE else {}
    params = [Parameter(torch.ones(4, 2)), Parameter(torch.ones(3))]
    optimizer = fusedopt.Adagrad(params, lr=0.1, skip_nonfinite=True, ema_decay=None if late else 0.9, **more)

    def grad(value: float) -> Tensor:
        dense = torch.full((4, 2), value)
        return dense.to_sparse(1) if sparse else dense

    if late:
        params[0].grad = grad(1.0)
        optimizer.step()
        optimizer.param_groups[0]["ema_decay"] = 0.9
    params[0].grad = grad(math.nan)
    optimizer.step()
    params[0].grad, params[1].grad = grad(1.0), torch.ones(3)
    optimizer.step()
    for param in params:
        assert_same_bits(optimizer.state[param]["ema"], param.detach())
    before = [param.detach().clone() for param in params]
    optimizer.step()
    for param, old in zip(params, before, strict=True):
        assert_same_bits(optimizer.state[param]["ema"], torch.lerp(old, param.detach(), 1 - 0.9))
