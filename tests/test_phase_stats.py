"""The statistics of a step, stats(): of which parameters, by what names, and of values of all magnitudes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizers import CUDA_ON_HOST, FLOATS, ON_DEVICE, TARGETS, generator, name_of
from phase_cases import assert_close_stats, expected_stats, make_grads, make_params, set_grads
from reference import assert_same_bits, varied_values
from torch.nn import Parameter

import fusedopt


def test_stats_have_the_parameters_names() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    optimizer = fusedopt.Adam(model.named_parameters(), stats=True)
    with pytest.raises(RuntimeError, match=r"^Adam: stats\(\) needs stats=True, and a step"):
        optimizer.stats()
    model(torch.ones(2, 3)).sum().backward()
    model[0].bias.grad = None
    optimizer.step()
    assert list(optimizer.stats()) == ["0.weight", "1.weight", "1.bias"]
    assert list(optimizer.stats()["1.bias"]) == [
        "grad_norm",
        "param_norm",
        "update_norm",
        "max_relative_update",
        "nonfinite_grads",
        "lost_updates",
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_updates_that_are_rounded_away(dtype: torch.dtype, place: str) -> None:
    """Why training in 16 bits stalls: at lr 1e-3 a weight of 1 never moves, one of 0.01 does."""
    more: dict[str, Any] = {"capturable": True} if place == ON_DEVICE else {}
    param = Parameter(torch.cat([torch.ones(4500), torch.full((500,), 0.01), torch.ones(10)]).to(dtype))
    param.grad = torch.ones_like(param)
    param.grad[-10:] = 0  # no update, so none is lost
    optimizer = fusedopt.Adam([param], lr=1e-4, stats=True, **more)
    optimizer.step()
    moved = int((param != torch.cat([torch.ones(4500), torch.full((500,), 0.01), torch.ones(10)]).to(dtype)).sum())
    assert moved == 500
    assert optimizer.stats()["0.0"]["lost_updates"] == 4500


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_stats_of_wild_values(dtype: torch.dtype, set_place: Callable[[str], None]) -> None:
    """Squares that opmath cannot hold, inf and nan; the same on all instruction sets."""
    found = []
    for place in TARGETS:
        set_place(place)
        g = generator(11)
        # Magnitudes that a float cannot square, some pieces small throughout, some with an inf.
        params = [
            Parameter(varied_values(9000, dtype, g, wild=False)),
            Parameter(varied_values(300, dtype, g, wild=False) * 1e-25),
            Parameter(varied_values(300, dtype, g, wild=False) * 1e25),
            Parameter(torch.zeros(40, dtype=dtype)),
            Parameter(varied_values(5000, dtype, g)),
        ]
        before = [p.detach().clone() for p in params]
        grads = [varied_values(p.numel(), dtype, g, finite=i == 0) for i, p in enumerate(params)]
        grads[1] = varied_values(300, dtype, g, wild=False) * 1e-30
        set_grads(params, grads)
        optimizer = fusedopt.Adagrad(params, lr=1e-2, stats=True)
        optimizer.step()
        stats = optimizer.stats()
        for i, p in enumerate(params):
            expected = expected_stats(before[i], p.detach(), grads[i], None)
            if dtype == torch.float32 and i in (1, 2):
                expected.pop("update_norm")  # of squares that a float cannot hold, as the docstring says
            assert_close_stats(stats[f"0.{i}"], expected, dtype, f"of parameter {i} on {place}")
        if place != CUDA_ON_HOST:
            found.append(repr(stats))
    assert len(set(found)) == 1


def test_stats_of_names_that_groups_share_and_of_a_step_that_raised() -> None:
    layers = [torch.nn.Linear(2, 2) for _ in range(2)]
    optimizer = fusedopt.Adam([{"params": list(layer.named_parameters())} for layer in layers], stats=True)
    for layer in layers:
        for p in layer.parameters():
            p.grad = torch.ones_like(p)
    optimizer.step()
    found = optimizer.stats()
    assert list(found) == ["weight", "bias", "1.weight", "1.bias"]
    layers[0].weight.grad = None
    optimizer.state[layers[1].bias]["exp_avg"] = torch.zeros(3)
    with pytest.raises(RuntimeError, match="exp_avg"):
        optimizer.step()
    assert optimizer.stats() == found
    del optimizer.param_groups[0]["params"][0]
    with pytest.raises(RuntimeError, match="added or removed"):
        optimizer.stats()


def test_statistics_of_parameters_that_come_and_go() -> None:
    """Where they are written moves, also for rows that sat the last step out."""
    part = 4096
    params = make_params(sizes=(4, 30 * part, 40 * part))
    _, b, c = params
    grads = make_grads(0, params)
    optimizer = fusedopt.Adagrad(params, stats=True)
    set_grads(params, grads)
    c.grad = None
    optimizer.step()
    set_grads(params, grads)
    b.grad = None
    optimizer.step()
    optimizer.param_groups[0]["stats"] = False
    optimizer.step()
    kept = optimizer._stepper.stats.clone()
    set_grads(params, grads)
    optimizer.step()
    assert_same_bits(optimizer._stepper.stats, kept)


def test_nothing_behind_a_tail_is_counted() -> None:
    """Without eps the padding of the last lane is 0 / 0."""
    param = Parameter(torch.ones(5))
    param.grad = torch.ones(5)
    optimizer = fusedopt.Adagrad([param], lr=1e-12, eps=0.0, stats=True)
    optimizer.step()
    found = optimizer.stats()["0.0"]
    assert found["lost_updates"] == 5 and found["nonfinite_grads"] == 0 and found["update_norm"] == 0
