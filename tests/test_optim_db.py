"""Torch's own database of optimizer inputs and errors, run with our classes."""

import importlib.util
import sys
import types
import unittest
import warnings
from copy import deepcopy
from typing import Any

import pytest
import torch
from reference import assert_same_bits, torch_loop_step
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import fusedopt
from fusedopt._config import _C


def load_database() -> Any:
    """Torch's module imports its test tools; of those that a plain installation lacks it needs one base class."""
    if "expecttest" not in sys.modules and importlib.util.find_spec("expecttest") is None:
        stub = types.ModuleType("expecttest")
        stub.TestCase = unittest.TestCase
        stub.ACCEPT = False
        sys.modules["expecttest"] = stub
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that hypothesis is not installed
        from torch.testing._internal import common_optimizers
    return common_optimizers


DB = load_database()
PUBLIC = {name: getattr(fusedopt, name) for name in fusedopt.__all__}
OURS = {name: cls for name, cls in PUBLIC.items() if isinstance(getattr(torch.optim, name, None), type)}
INFOS = {info.name: info for info in DB.optim_db if info.name in OURS}
assert set(INFOS) == set(OURS)

INPUTS = [
    pytest.param(info, each.kwargs, id=f"{name}-{each.desc}".replace(" ", "_"))
    for name, info in INFOS.items()
    for each in DB._get_optim_inputs_including_global_cliquey_kwargs("cpu", torch.float32, info)
]
# What the database keeps for accelerators runs on every device with us.
ACCELERATOR_INPUTS = [
    pytest.param(info, each.kwargs, id=f"{name}-{each.desc}".replace(" ", "_"))
    for name, info in INFOS.items()
    for each in info.optim_inputs_func("cuda")
    if each.kwargs.get("capturable")
]
ERRORS = [
    pytest.param(info, each, id=f"{name}-{each.optimizer_error_input.desc}".replace(" ", "_"))
    for name, info in INFOS.items()
    for each in info.optim_error_inputs_func("cpu", torch.float32)
]
DTYPES = [torch.float32, torch.float64]


def units() -> int:
    return sum(_C.units_run().values())


def make_params(dtype: torch.dtype) -> list[Parameter]:
    """As test_optim.py: a small Linear's, and others beside them."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (3,), (), (10, 4, 2)]
    return [Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def set_grads(params: list[Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def in_numbers(kwargs: dict[str, Any]) -> dict[str, Any]:
    """For torch's for-loop: its plain path, where betas are numbers and an lr Tensor stays one."""
    plain = {k: v for k, v in kwargs.items() if k not in ("foreach", "fused", "capturable", "differentiable")}
    if "betas" in plain:
        plain["betas"] = tuple(float(beta) for beta in plain["betas"])
    return {**plain, "foreach": False}


def compare(ours: Optimizer, mine: list[Parameter], theirs: Optimizer, wanted: list[Parameter], steps: int) -> None:
    for step in range(steps):
        set_grads(mine, step), set_grads(wanted, step)
        ours.step()
        torch_loop_step(theirs)
        for p, q in zip(mine, wanted, strict=True):
            assert_same_bits(p.detach(), q.detach())
            for key, value in theirs.state[q].items():
                assert_same_bits(ours.state[p][key], value, key)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("info", "kwargs"), [*INPUTS, *ACCELERATOR_INPUTS])
def test_inputs(info: Any, kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    """Every input, with every implementation flag: one trajectory."""
    mine, wanted = make_params(dtype), make_params(dtype)
    if kwargs.get("differentiable"):  # torch's own path, whatever its bits: no sqrt of ours in it
        ours, theirs = OURS[info.name](mine, **deepcopy(kwargs)), info.optim_cls(wanted, **deepcopy(kwargs))
        before = units()
        for step in range(3):
            for optimizer, params in ((ours, mine), (theirs, wanted)):
                set_grads(params, step)
                with torch.no_grad():
                    for p in params:
                        p.requires_grad_(False)
                    optimizer.step()
        assert units() == before
        for p, q in zip(mine, wanted, strict=True):
            assert_same_bits(p, q)
        return
    ours = OURS[info.name](mine, **deepcopy(kwargs))
    theirs = info.optim_cls(wanted, **in_numbers(deepcopy(kwargs)))
    before = units()
    compare(ours, mine, theirs, wanted, 5)
    assert units() > before


@pytest.mark.parametrize(("info", "error"), ERRORS)
def test_errors(info: Any, error: Any) -> None:
    """The same type and the same message, at construction or in the step."""
    bad = error.optimizer_error_input
    messages = []
    for cls in (info.optim_cls, OURS[info.name]):
        expect = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises

        def fail(cls: type[Optimizer] = cls) -> None:
            params = [Parameter(torch.ones(3))] if bad.params is None else bad.params
            optimizer = cls(params, **deepcopy(bad.kwargs))
            if error.error_on == DB.OptimizerErrorEnum.STEP_ERROR:
                optimizer.step()

        with expect(error.error_type, match=error.error_regex) as caught:
            fail()
        messages.append(str(caught.value if hasattr(caught, "value") else caught[0].message))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("name", INFOS)
def test_param_groups_and_schedulers_of_the_database(name: str) -> None:
    for scheduler_constructors in INFOS[name].scheduler_inputs:
        optimizers = []
        for make in (OURS[name], lambda p, **k: INFOS[name].optim_cls(p, foreach=False, **k)):
            params = make_params(torch.float32)
            optimizer = make([{"params": params[:2], "lr": 0.02}, {"params": params[2:]}], lr=0.01, weight_decay=0.1)
            schedulers = [constructor(optimizer) for constructor in scheduler_constructors]
            optimizers.append((optimizer, params, schedulers))
        (ours, mine, _), (theirs, wanted, _) = optimizers
        for step in range(4):
            compare(ours, mine, theirs, wanted, 1)
            for _, _, schedulers in optimizers:
                for scheduler in schedulers:
                    args = (1.0 / (step + 1),) if type(scheduler).__name__ == "ReduceLROnPlateau" else ()
                    scheduler.step(*args)


@pytest.mark.parametrize("name", INFOS)
def test_sparse_gradients_are_refused_as_by_torch(name: str) -> None:
    messages = []
    for cls in (INFOS[name].optim_cls, OURS[name]):
        p = Parameter(torch.ones(3))
        p.grad = torch.ones(3).to_sparse()
        with pytest.raises(RuntimeError, match=r"sparse gradients") as caught:
            cls([p], weight_decay=0.1).step()  # Adagrad refuses them only then
        messages.append(str(caught.value))
    assert messages[1].startswith(messages[0])
    assert "param_groups[0]['params'][0]" in messages[1]


@pytest.mark.parametrize("name", INFOS)
def test_complex_parameters(name: str) -> None:
    def complex_params() -> list[Tensor]:
        return [
            torch.view_as_complex(p.detach().reshape(-1, 2)).requires_grad_() for p in make_params(torch.float64)[3:]
        ]

    (p,), (q,) = complex_params(), complex_params()
    real = Parameter(torch.view_as_real(q.detach()).clone())
    ours, theirs = OURS[name]([p], lr=0.1), INFOS[name].optim_cls([real], lr=0.1, foreach=False)
    for _ in range(3):
        p.grad = torch.view_as_complex(torch.randn(p.numel(), 2, dtype=torch.float64)).clone()
        real.grad = torch.view_as_real(p.grad).clone()
        ours.step()
        torch_loop_step(theirs)
        assert_same_bits(torch.view_as_real(p.detach()), real.detach())
