"""torch's data parallelism on the CPU, by gloo: all ranks have the bits of a training in one process."""

import io
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from data_parallel import MIDDLE, ROWS, STEPS, Options, backward, make_net, overlapped, replicas, sharded
from optimizers import VARIANTS
from ranks import Ranks
from reference import assert_same_bits
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR

pytestmark = pytest.mark.xdist_group("ranks")

Pools = Callable[[int], Ranks]
Result = dict[str, Any]
LOW_PRECISION: dict[str, Options] = {
    "master": {"master_weights": True},
    "split": {"master_weights": "split", "state_dtype": torch.bfloat16},
    "stochastic": {"rounding": "stochastic", "state_dtype": "int8"},  # with one seed, the draws of all ranks
    "kahan": {"rounding": "kahan", "state_dtype": torch.float32},
}
DRAWN = ("split", "stochastic")  # of the state's rounding, or the parameters', too


def train_alone(
    row: str, dtype: torch.dtype, options: Options, grads: Sequence[Sequence[Tensor | None]], **more: Any
) -> tuple[list[Any], Optimizer]:
    """The same training in this process, given the gradients of each step."""
    params = list(make_net(dtype, **more).parameters())
    if len(grads[0]) != len(params):  # those that require them
        params = [param for param in params if param.requires_grad]
    optimizer = ROWS[row].make(params, **options)
    scheduler = ExponentialLR(optimizer, 0.9)
    step_with(optimizer, scheduler, params, grads)
    return params, optimizer


def step_with(
    optimizer: Optimizer, scheduler: ExponentialLR, params: list[Any], grads: Sequence[Sequence[Tensor | None]]
) -> None:
    for given in grads:
        for param, grad in zip(params, given, strict=True):
            param.grad = grad
        optimizer.step()
        scheduler.step()


def assert_same(result: Result, params: list[Any], optimizer: Optimizer, which: Sequence[int] | None = None) -> None:
    """What a rank has against parameters, and the state of those whose indices are given (all)."""
    for index, (mine, wanted) in enumerate(zip(result["params"], params, strict=True)):
        assert_same_bits(mine, wanted.detach(), f"parameter {index}")
        if which is not None and index not in which:
            assert not result["states"][index]
            continue
        state = optimizer.state.get(wanted, {})
        assert list(result["states"][index]) == list(state)
        for name, value in state.items():
            assert_same_bits(result["states"][index][name], value, f"{name} of parameter {index}")


# --- DistributedDataParallel -----------------------------------------------------------------------------------------


def test_averaged_gradients(ranks: Pools) -> None:
    """That `backward` on all ranks gives the mean of the gradients of each, which two ranks compute exactly."""
    net, alone = make_net(unused=False), []
    for rank in range(2):
        net.zero_grad()
        backward(net, 0, rank, torch.float32)
        alone.append([None if p.grad is None else p.grad for p in net.parameters()])
    result = ranks(2).run(replicas, "adam", torch.float32, {}, {})[0]
    for mean, first, second in zip(result["grads"][0], *alone, strict=True):
        assert (mean is None) == (first is None)
        assert mean is None or torch.equal(mean, (first + second) / 2)


@pytest.mark.parametrize("row", ROWS)
def test_replicas(row: str, ranks: Pools) -> None:
    results = ranks(2).run(replicas, row, torch.float32, {}, {})
    for result in results:
        assert_same(result, *train_alone(row, torch.float32, {}, results[0]["grads"], unused=False))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("set_to_none", [True, False], ids=["new_grads", "kept_grads"])
@pytest.mark.parametrize(
    "ddp_options",
    [
        {"gradient_as_bucket_view": True},
        {"gradient_as_bucket_view": True, "static_graph": True},
        {"gradient_as_bucket_view": True, "find_unused_parameters": True},
        {"find_unused_parameters": True},
    ],
    ids="-".join,
)
def test_gradients_in_buckets(ddp_options: dict[str, bool], set_to_none: bool, size: int, ranks: Pools) -> None:
    """They share a buffer, and move to others once DDP knows their order."""
    options = {"max_grad_norm": 0.3}
    results = ranks(size).run(replicas, "adamw-decay", torch.float32, options, ddp_options, set_to_none)
    for result in results:
        if "gradient_as_bucket_view" in ddp_options:
            assert result["buffers"][-1] == 2  # of six gradients
        unused = ddp_options.get("find_unused_parameters", False)
        params, optimizer = train_alone("adamw-decay", torch.float32, options, results[0]["grads"], unused=unused)
        assert_same(result, params, optimizer)
        assert result["norms"][-1] == optimizer.grad_norm
    assert results[0]["norms"][0] > 0.3


@pytest.mark.parametrize("options", LOW_PRECISION.values(), ids=LOW_PRECISION)
def test_replicas_of_16_bits(options: Options, ranks: Pools) -> None:
    results = ranks(2).run(replicas, "adamw-decay", torch.bfloat16, options, {"gradient_as_bucket_view": True})
    for result in results:
        assert_same(result, *train_alone("adamw-decay", torch.bfloat16, options, results[0]["grads"], unused=False))


@pytest.mark.parametrize(
    "ddp_options",
    [{}, {"gradient_as_bucket_view": True}, {"gradient_as_bucket_view": True, "static_graph": True}],
    ids=lambda options: "-".join(options) or "copies",
)
def test_offloaded_replicas(ddp_options: dict[str, bool], ranks: Pools) -> None:
    """What is fetched in backward is each rank's own gradient yet: the mean is fetched in the step."""
    results = ranks(2).run(replicas, "adamw-decay", torch.float32, {}, ddp_options, True, True)
    for result in results:
        assert_same(result, *train_alone("adamw-decay", torch.float32, {}, results[0]["grads"], unused=False))


# --- ZeroRedundancyOptimizer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_options", [{}, {"parameters_as_bucket_view": True}], ids=["separate", "in_buckets"])
@pytest.mark.parametrize("row", [row.id for row in VARIANTS])
def test_sharded(row: str, zero_options: Options, ranks: Pools) -> None:
    results = ranks(2).run(sharded, row, torch.float32, {}, zero_options)
    params, optimizer = train_alone(row, torch.float32, {}, results[0]["grads"], unused=False)
    assert sorted(results[0]["shard"] + results[1]["shard"]) == list(range(len(params)))
    for result in results:
        assert_same(result, params, optimizer, result["shard"])


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("way", [way for way in LOW_PRECISION if way not in DRAWN])
def test_sharded_16_bits(way: str, size: int, ranks: Pools) -> None:
    options = LOW_PRECISION[way]
    results = ranks(size).run(sharded, "adamw-decay", torch.bfloat16, options, {"parameters_as_bucket_view": True})
    params, optimizer = train_alone("adamw-decay", torch.bfloat16, options, results[0]["grads"], unused=False)
    for result in results:
        assert_same(result, params, optimizer, result["shard"])


def test_draws_are_those_of_the_shard(ranks: Pools) -> None:
    """Of stochastic rounding: a parameter's position is that in its rank's own optimizer, not in the whole."""
    dtype, options = torch.bfloat16, LOW_PRECISION["stochastic"]
    results = ranks(2).run(sharded, "adamw-decay", dtype, options, {"parameters_as_bucket_view": True})
    grads = results[0]["grads"]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0]["params"], other["params"], strict=True))
    for result in results:
        params = [p for p in make_net(dtype, unused=False).parameters() if p.requires_grad]
        shard = [params[index] for index in result["shard"]]
        optimizer = ROWS["adamw-decay"].make(shard, **options)
        step_with(optimizer, ExponentialLR(optimizer, 0.9), shard, [[g[i] for i in result["shard"]] for g in grads])
        for index in result["shard"]:
            assert_same_bits(result["params"][index], params[index].detach(), f"parameter {index}")
    whole, _ = train_alone("adamw-decay", dtype, options, grads, unused=False)
    assert any(not torch.equal(a, b) for a, b in zip(results[0]["params"], whole, strict=True))


def test_clipping_of_sharded(ranks: Pools) -> None:
    """`max_grad_norm` would be of each shard; `fusedopt.clip_grad_norm_` before the step sees all gradients."""
    results = ranks(2).run(sharded, "adamw-decay", torch.float32, {}, {}, None, 0.3)
    options = {"max_grad_norm": 0.3}
    params, optimizer = train_alone("adamw-decay", torch.float32, options, results[0]["grads"], unused=False)
    for result in results:
        assert_same(result, params, optimizer, result["shard"])
    apart = ranks(2).run(sharded, "adamw-decay", torch.float32, options, {})
    norms = torch.stack([result["norm"] for result in apart]).double()
    every = torch.cat([g.flatten() for g in apart[0]["grads"][-1]]).double().norm()
    # The norms are rounded to float32: two relative errors of up to 6e-8.
    torch.testing.assert_close(norms.norm(), every, rtol=2e-7, atol=0)
    assert (norms < every).all()


@pytest.mark.parametrize("way", ["float32", *LOW_PRECISION])
def test_consolidated_checkpoint(way: str, ranks: Pools) -> None:
    """A sharded training goes on bit for bit; its checkpoint is that of a whole optimizer, too."""
    dtype, options = (torch.bfloat16, LOW_PRECISION[way]) if way in LOW_PRECISION else (torch.float32, {})
    results = ranks(2).run(sharded, "adamw-decay", dtype, options, {})
    saved = results[0]["saved"]
    for result, again in zip(results, ranks(2).run(sharded, "adamw-decay", dtype, options, {}, saved), strict=True):
        assert len(again["grads"]) == STEPS - MIDDLE
        for before, after in zip(result["params"], again["params"], strict=True):
            assert_same_bits(after, before)
        for before, after in zip(result["states"], again["states"], strict=True):
            assert list(before) == list(after)
            assert all(torch.equal(after[name], before[name]) for name in before)

    four = ranks(4).run(sharded, "adamw-decay", dtype, options, {}, saved)
    for result in four:
        assert all(torch.equal(a, b) for a, b in zip(result["params"], four[0]["params"], strict=True))
    whole = train_from(saved, dtype, options, results[0]["grads"][MIDDLE:])
    whole_as_four = train_from(saved, dtype, options, four[0]["grads"])
    if way in DRAWN:
        return  # the draws of other shards are others
    for result, other in [*((result, whole) for result in results), *((result, whole_as_four) for result in four)]:
        assert_same(result, *other, result["shard"])


def train_from(
    saved: bytes, dtype: torch.dtype, options: Options, grads: Sequence[Sequence[Tensor]]
) -> tuple[list[Any], Optimizer]:
    """A training in this process, from a sharded one's checkpoint."""
    checkpoint = torch.load(io.BytesIO(saved), weights_only=True)
    net = make_net(dtype, unused=False)
    net.load_state_dict(checkpoint["model"])
    params: list[Any] = [param for param in net.parameters() if param.requires_grad]
    optimizer = ROWS["adamw-decay"].make(params, **options)
    scheduler = ExponentialLR(optimizer, 0.9)
    optimizer.load_state_dict(checkpoint["optimizer"])
    scheduler.load_state_dict(checkpoint["scheduler"])
    step_with(optimizer, scheduler, params, grads)
    return params, optimizer


def test_no_overlap_with_ddp(ranks: Pools) -> None:
    """That takes torch's own functional optimizers in place of the class, so it knows no others."""
    assert all("no supported functional optimizer equivalent" in error for error in ranks(2).run(overlapped, "adam"))
