"""Steps in backward: the bits of an ordinary step, without the memory of all gradients."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from optimizers import BY_ID, OWN_VARIANTS, VARIANTS, Row, name_of
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fusedopt
from fusedopt import BackwardSteps, step_in_backward

ADAM = BY_ID["adam"]
STEPS = 4


class Net(nn.Module):
    """A tied weight, one that no backward reaches, and one that every other backward leaves out."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(19, 8)
        self.body = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.sometimes = nn.Linear(8, 8)
        self.never = nn.Linear(8, 8)
        self.scale = Parameter(torch.ones(()))
        self.to(dtype)

    def forward(self, batch: Tensor, which: int) -> Tensor:
        x = self.body(self.tokens(batch)).tanh() * self.scale
        if which % 2 == 1:
            x = x + self.sometimes(x)
        x = self.norm(x)
        logits = F.linear(x, self.tokens.weight).float()
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


def batches(count: int, seed: int = 1) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(19, (3, 5), generator=g) for _ in range(count)]


def groups(net: Net) -> list[dict[str, Any]]:
    """Two groups with different options."""
    vectors = [param for param in net.parameters() if param.ndim < 2]
    return [
        {"params": [p for p in net.parameters() if p.ndim == 2], "eps": 1e-3, "weight_decay": 0.3},
        {"params": vectors},
    ]


Factory = Callable[[Iterable[Any]], Any]
Every = Callable[[Any, int], None]  # called behind every step, with the optimizer and how many are made


def train_ordinarily(
    net: Net, optimizer: Any, data: Sequence[Tensor], every: int = 1, then: Every | None = None
) -> None:
    for which, batch in enumerate(data):
        net(batch, which).backward()
        if (which + 1) % every == 0:
            optimizer.step()
            optimizer.zero_grad()
            if then:
                then(optimizer, which // every)


def train(net: Net, steps: BackwardSteps, data: Sequence[Tensor], every: int = 1, then: Every | None = None) -> None:
    for which, batch in enumerate(data):
        net(batch, which).backward()
        if then and (which + 1) % every == 0:
            then(steps, which // every)


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    """Of state_dicts: everything in them, bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def assert_same_training(
    factory: Factory, dtype: torch.dtype = torch.float32, accumulate: int = 1, then: Every | None = None
) -> BackwardSteps:
    """Train twice, with gradient release and without."""
    data = batches(STEPS * accumulate)
    ours, theirs = Net(dtype), Net(dtype)
    optimizer = factory(groups(theirs))
    train_ordinarily(theirs, optimizer, data, accumulate, then)
    steps = step_in_backward(groups(ours), factory, accumulate=accumulate)
    train(ours, steps, data, accumulate, then)
    assert_equal(ours.state_dict(), theirs.state_dict())
    assert_equal(steps.state_dict(), optimizer.state_dict())
    assert not torch.equal(ours.tokens.weight, Net(dtype).tokens.weight)
    assert all(param.grad is None for param in ours.parameters())
    return steps


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("row", VARIANTS + OWN_VARIANTS, ids=name_of)
def test_same_bits(row: Row, accumulate: int) -> None:
    assert_same_training(row.make, accumulate=accumulate)


PRECISIONS: list[tuple[torch.dtype, dict[str, Any]]] = [
    (torch.float32, {"state_dtype": "int8", "seed": 5}),
    (torch.float32, {"state_dtype": torch.bfloat16}),
    (torch.bfloat16, {}),
    (torch.bfloat16, {"master_weights": True}),
    (torch.bfloat16, {"master_weights": "split", "state_dtype": "int8"}),
    (torch.bfloat16, {"rounding": "stochastic", "seed": 7}),
    (torch.bfloat16, {"rounding": "stochastic", "state_dtype": "int8"}),
    (torch.bfloat16, {"rounding": "kahan"}),
]


@pytest.mark.parametrize("ema_decay", [None, 0.75])
@pytest.mark.parametrize("options", PRECISIONS, ids=str)
@pytest.mark.parametrize("row", [BY_ID["adamw-decay"], BY_ID["adagrad"]], ids=name_of)
def test_same_bits_in_low_precision(
    row: Row, options: tuple[torch.dtype, dict[str, Any]], ema_decay: float | None
) -> None:
    """Draws depend on the position in the optimizer, and averages on whether there were any before a step."""
    dtype, own = options
    assert_same_training(partial(row.make, ema_decay=ema_decay, **own), dtype)


@pytest.mark.parametrize("row", [ADAM, BY_ID["adagrad"]], ids=name_of)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_averages(row: Row, accumulate: int) -> None:
    """One move a step for each parameter, also for those without a gradient in it; from the first, or begun later."""
    assert_same_training(partial(row.make, ema_decay=0.5), accumulate=accumulate)

    def begin_later(optimizer: Any, step: int) -> None:
        optimizer.param_groups[0]["ema_decay"] = 0.5 if step >= 1 else None

    assert_same_training(row.make, accumulate=accumulate, then=begin_later)


def test_average_moves_once_a_step() -> None:
    param, other = (Parameter(torch.full((3,), float(i))) for i in (1, 2))
    steps = step_in_backward([param, other], fusedopt.Adam, lr=0.1, ema_decay=0.5)
    (param * other).sum().backward()
    assert all(torch.equal(steps.state[p]["ema"], p) for p in (param, other))  # the first step: what the weights are
    expected = {p: p.detach().clone() for p in (param, other)}
    for _ in range(3):
        param.sum().backward()
        for p, average in expected.items():
            average.lerp_(p.detach(), 0.5)
            assert torch.equal(steps.state[p]["ema"], average)
    with steps.ema_weights():
        assert torch.equal(param, expected[param])
        with pytest.raises(RuntimeError, match=r"ema_weights.*step after it"):
            param.sum().backward()
    steps.discard()
    assert not torch.equal(param, expected[param])


def test_sparse_gradients() -> None:
    def run(make: Callable[[list[Parameter]], Any], is_released: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(19, 8, sparse=True), nn.Linear(8, 3))
        optimizer = make(list(model.parameters()))
        for batch in batches(3):
            model(batch).square().sum().backward()
            if not is_released:
                optimizer.step()
                optimizer.zero_grad()
        return model.state_dict(), optimizer.state_dict()

    make = BY_ID["adagrad"].make
    assert_equal(run(lambda params: step_in_backward(params, make), True), run(make, False))


@pytest.mark.parametrize("own", [{}, {"state_dtype": "int8"}], ids=str)
def test_same_statistics(own: dict[str, Any]) -> None:
    found: list[Any] = []
    make = partial(fusedopt.AdamW, stats=True, **own)
    assert_same_training(make, then=lambda optimizer, step: found.append(optimizer.stats()))
    assert len(found) == 2 * STEPS and len(found[0]) < len(found[1]) == len(list(Net().parameters())) - 2
    assert_equal(found[STEPS:], found[:STEPS])


def test_gradients_come_and_go() -> None:
    """When a gradient is ready, all that were ready before are gone, freed and not only hidden."""
    layers = nn.Sequential(*[nn.Linear(4, 4) for _ in range(6)])
    steps = step_in_backward(layers, fusedopt.Adam)
    alive: list[int] = []
    seen: list[weakref.ref[Tensor]] = []

    def look(param: Tensor) -> None:  # after the hook that steps
        assert param.grad is None
        alive.append(sum(ref() is not None for ref in seen))

    def note(grad: Tensor) -> None:
        seen.append(weakref.ref(grad))

    for param in layers.parameters():
        param.register_hook(note)
        param.register_post_accumulate_grad_hook(look)
    layers(torch.ones(2, 4)).sum().backward()
    assert len(alive) == len(seen) == 12 and max(alive) <= 1
    assert all(int(state["step"]) == 1 for state in steps.state.values())


def test_a_tied_weight_is_stepped_once() -> None:
    """Its gradient is ready when all its uses have given theirs, and not before."""
    weight = Parameter(torch.eye(3))
    steps = step_in_backward([weight], fusedopt.Adam, lr=0.1)
    x = torch.arange(6.0).reshape(2, 3)
    twin = weight.detach().clone().requires_grad_()
    for w in (weight, twin):
        ((x @ w) @ w.t() + (x * 2) @ w).sum().backward()
    optimizer = fusedopt.Adam([twin], lr=0.1)
    optimizer.step()
    assert torch.equal(weight, twin) and int(steps.state[weight]["step"]) == 1


def test_retained_graphs() -> None:
    def run(accumulate: int, release: bool) -> Tensor:
        param = Parameter(torch.tensor([1.0, 2.0]))
        make = partial(fusedopt.Adam, lr=0.1)
        optimizer = step_in_backward([param], make, accumulate=accumulate) if release else make([param])
        loss = param.pow(3).sum()
        loss.backward(retain_graph=True)
        loss.backward()
        if not release:
            optimizer.step()
        return param.detach()

    assert torch.equal(run(2, True), run(2, False))
    # As between any two steps: the graph has saved a weight that is no longer what it was.
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run(1, True)


def test_a_weight_that_backward_still_needs_is_seen() -> None:
    """Autograd compares versions: no gradient is computed from a weight that was stepped too early."""
    weight = Parameter(torch.ones(3))
    x = torch.ones(3, requires_grad=True)
    step_in_backward([weight], fusedopt.Adam)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ((x * 2) * weight.detach() + weight).sum().backward()


def test_two_backwards_are_two_steps() -> None:
    param = Parameter(torch.ones(2))
    steps = step_in_backward([param], fusedopt.Adam)
    for count in (1, 2):
        param.sum().backward()
        assert int(steps.state[param]["step"]) == count


def test_a_frozen_parameter_may_come_later() -> None:
    late, early = (Parameter(torch.ones(2)) for _ in range(2))
    late.requires_grad_(False)
    steps = step_in_backward([late, early], fusedopt.Adam)
    (late * early).sum().backward()
    assert late not in steps.state
    late.requires_grad_()
    (late * early).sum().backward()
    assert [int(steps.state[p]["step"]) for p in (late, early)] == [1, 2] and late.grad is None


# Accumulation.


def test_gradients_are_kept_until_the_last_backward() -> None:
    net = Net()
    before = copy.deepcopy(net.state_dict())
    steps = step_in_backward(net, fusedopt.AdamW, accumulate=3)
    data = batches(3)
    for which, batch in enumerate(data[:2]):
        net(batch, which).backward()
        assert_equal(net.state_dict(), before)
        assert not steps.state
    kept = net.body.weight.grad
    net(data[2], 2).backward()  # does not reach net.sometimes, which the second did
    assert kept is not None and net.body.weight.grad is None and net.sometimes.weight.grad is None
    updated = {name for name, param in net.named_parameters() if not torch.equal(param, before[name])}
    assert updated == {name for name in before if not name.startswith("never")}


def test_accumulate_may_change_between_steps() -> None:
    data = batches(5)
    ours, theirs = Net(), Net()
    steps = step_in_backward(ours, fusedopt.Adam, accumulate=3)
    optimizer = fusedopt.Adam(theirs.parameters())
    train(ours, steps, data[:3])
    steps.accumulate = 2
    train(ours, steps, data[3:])
    train_ordinarily(theirs, optimizer, data[:3], 3)
    train_ordinarily(theirs, optimizer, data[3:], 2)
    assert_equal(ours.state_dict(), theirs.state_dict())
    assert steps.accumulate == 2


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "2", None])
def test_accumulate_must_be_a_positive_integer(value: Any) -> None:
    with pytest.raises(ValueError, match=r"accumulate must be an integer of at least 1, got"):
        step_in_backward([Parameter(torch.ones(1))], fusedopt.Adam, accumulate=value)


def test_an_incomplete_step_can_only_be_discarded() -> None:
    param = Parameter(torch.ones(2))
    steps = step_in_backward([param], fusedopt.Adam, accumulate=2)
    param.sum().backward()
    for wrong in (steps.zero_grad, lambda: setattr(steps, "accumulate", 1)):
        with pytest.raises(RuntimeError, match=r"1 of 2 backwards are made; discard\(\)"):
            wrong()
    assert param.grad is not None and steps.accumulate == 2
    steps.discard()
    steps.zero_grad()
    param.sum().backward()
    assert not steps.state
    param.sum().backward()
    assert int(steps.state[param]["step"]) == 1


# As one optimizer.

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=3),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=9),  # betas too
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.ConstantLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.5)],
        milestones=[2],
    ),
}


@pytest.mark.parametrize("row", [ADAM, BY_ID["adamw-decay-amsgrad-lr32"]], ids=name_of)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers(scheduler: str, row: Row) -> None:
    """None warns of a missing step, as it would: warnings are errors here."""
    made: dict[int, Any] = {}
    rates: list[list[float]] = []

    def then(optimizer: Any, step: int) -> None:
        made.setdefault(id(optimizer), None)
        if made[id(optimizer)] is None:
            made[id(optimizer)] = SCHEDULERS[scheduler](optimizer)
        else:
            made[id(optimizer)].step()
        rates.append([float(group["lr"]) for group in optimizer.param_groups])

    assert_same_training(row.make, then=then)
    assert rates[:STEPS] == rates[STEPS:] and rates[0] != rates[STEPS - 1]


def test_reduce_on_plateau() -> None:
    param = Parameter(torch.ones(1))
    steps = step_in_backward([param], fusedopt.Adam, lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(steps, factor=0.5, patience=0)
    for _ in range(3):
        param.sum().backward()
        scheduler.step(1.0)
    assert steps.param_groups[0]["lr"] == 0.25


def test_scheduler_sees_whether_a_step_was_made() -> None:
    steps = step_in_backward([Parameter(torch.ones(1))], fusedopt.Adam)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(steps, 0.5)
    with pytest.warns(UserWarning, match=r"lr_scheduler.step\(\)` before `optimizer.step"):
        scheduler.step()


@pytest.mark.parametrize("first_released", [True, False])
@pytest.mark.parametrize("own", [{}, {"state_dtype": "int8", "ema_decay": 0.5}], ids=str)
def test_checkpoints_go_both_ways(first_released: bool, own: dict[str, Any]) -> None:
    """A training that is continued with gradient release, or without, is one training."""
    data = batches(2 * STEPS)
    make = partial(BY_ID["adamw-decay"].make, **own)
    whole = Net()
    optimizer = make(groups(whole))
    train_ordinarily(whole, optimizer, data)

    net, saved = Net(), None
    for half, released in ((data[:STEPS], first_released), (data[STEPS:], not first_released)):
        net = copy.deepcopy(net)
        now: Any = step_in_backward(groups(net), make) if released else make(groups(net))
        if saved is not None:
            now.load_state_dict(saved)
        (train if released else train_ordinarily)(net, now, half)
        saved = copy.deepcopy(now.state_dict())
        if released:
            now.remove()
    assert_equal(net.state_dict(), whole.state_dict())
    assert_equal(saved, optimizer.state_dict())


def test_groups_live_on_after_loading() -> None:
    param = Parameter(torch.ones(2))
    steps = step_in_backward([param], fusedopt.Adam, lr=0.5)
    param.sum().backward()
    before = param.detach().clone()
    steps.load_state_dict(steps.state_dict())
    steps.param_groups[0]["lr"] = 0.0
    param.sum().backward()
    assert torch.equal(param, before) and int(steps.state[param]["step"]) == 2


def test_averages_begin_anew_where_a_checkpoint_has_none() -> None:
    fresh = fusedopt.Adam(groups(Net()), ema_decay=0.5).state_dict()

    def then(optimizer: Any, step: int) -> None:
        if step == 1:
            optimizer.load_state_dict(fresh)

    assert_same_training(partial(fusedopt.Adam, ema_decay=0.5), then=then)


def test_step_hooks_run_once_a_step() -> None:
    net = Net()
    steps = step_in_backward(net, fusedopt.Adam, accumulate=2)
    seen: list[Any] = []
    steps.register_step_post_hook(lambda optimizer, args, kwargs: seen.append((optimizer, len(steps.state))))
    train(net, steps, batches(4))
    updated = len(list(net.parameters())) - 2
    assert seen == [(steps, updated), (steps, updated)]
    with pytest.raises(RuntimeError, match="post-hook"):
        steps.register_step_pre_hook(lambda *_: None)


def test_state_dict_hooks() -> None:
    steps = step_in_backward([Parameter(torch.ones(1))], fusedopt.Adam)
    seen: list[str] = []
    steps.register_state_dict_pre_hook(lambda _: seen.append("save"))
    steps.register_load_state_dict_post_hook(lambda _: seen.append("load"))
    steps.load_state_dict(steps.state_dict())
    assert seen == ["save", "load"]


@pytest.mark.parametrize("through", ["steps", "optimizer"])
def test_add_param_group(through: str) -> None:
    def run(released: bool) -> list[Tensor]:
        params = [Parameter(torch.full((2,), 1.0 + i)) for i in range(3)]
        make = partial(fusedopt.Adam, lr=0.1, state_dtype="int8")
        optimizer: Any = step_in_backward(params[:2], make) if released else make(params[:2])
        for step in range(3):
            if step == 1:
                (optimizer if through == "steps" or not released else optimizer.optimizer).add_param_group(
                    {"params": [params[2]], "lr": 0.3}
                )
            (params[0] * params[1] * params[2]).sum().backward()
            if step == 0:
                params[2].grad = None
            if not released:
                optimizer.step()
                optimizer.zero_grad()
        assert all(param.grad is None for param in params)
        return [param.detach() for param in params]

    assert_equal(run(True), run(False))


def test_remove() -> None:
    net = Net()
    with step_in_backward(net, fusedopt.Adam) as steps:
        train(net, steps, batches(1))
    after = copy.deepcopy(net.state_dict())
    net(batches(1)[0], 1).backward()
    assert_equal(net.state_dict(), after)
    assert net.body.weight.grad is not None
    with pytest.raises(RuntimeError, match=r"after remove\(\), call that of the attribute `optimizer`"):
        steps.step()
    steps.optimizer.step()
    assert int(steps.state[net.body.weight]["step"]) == 2


def test_as_torch_prints_it() -> None:
    steps = step_in_backward([Parameter(torch.ones(1))], fusedopt.Adam, lr=0.25)
    assert isinstance(steps, torch.optim.Optimizer)
    assert repr(steps).startswith("BackwardSteps (") and "lr: 0.25" in repr(steps)
    assert steps.grad_norm is None


# What cannot be, says so.


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"max_grad_norm": 1.0}, "the norm is that of all gradients"),
        ({"skip_nonfinite": True}, "decided by all gradients"),
        ({"differentiable": True}, "torch's own step"),
    ],
    ids=str,
)
def test_options_that_need_all_gradients(options: dict[str, Any], why: str) -> None:
    param = Parameter(torch.ones(1))
    (name,) = options
    with pytest.raises(ValueError, match=rf"param_groups\[0\]\['{name}'\] is .*{why}"):
        step_in_backward([param], fusedopt.Adam, **options)
    # Or later, from a checkpoint say.
    steps = step_in_backward([param], fusedopt.Adam)
    steps.param_groups[0].update(options)
    with pytest.raises(ValueError, match=rf"param_groups\[0\]\['{name}'\] is .*{why}"):
        param.sum().backward()
    assert torch.equal(param, torch.ones(1))


def test_step_explains_itself() -> None:
    steps = step_in_backward([Parameter(torch.ones(1))], fusedopt.Adam)
    with pytest.raises(RuntimeError, match=r"backward\(\) updates the parameters; remove the call of step\(\)"):
        steps.step()
    with pytest.raises(RuntimeError, match="a closure is not for it to call"):
        steps.step(lambda: 0.0)


@pytest.mark.parametrize("scaler", [torch.amp.GradScaler, fusedopt.GradScaler])
def test_scalers_are_refused(scaler: type[torch.amp.GradScaler]) -> None:
    param = Parameter(torch.ones(1))
    steps = step_in_backward([param], fusedopt.Adam)
    for use in ("step", "unscale_"):
        scaling = scaler("cpu")
        scaling.scale(param.sum()).backward()
        with pytest.raises(RuntimeError, match="GradScaler unscales gradients after backward"):
            getattr(scaling, use)(steps)
    with pytest.raises(RuntimeError, match="GradScaler unscales gradients after backward"):
        _ = steps._step_supports_amp_scaling  # the first that `step` asks; what it asks next may be otherwise


@pytest.mark.parametrize("name", ["DistributedDataParallel", "FullyShardedDataParallel"])
def test_wrapped_models_are_refused(name: str) -> None:
    import torch.distributed.fsdp

    wrapper: Any = getattr(torch.distributed.fsdp, name, None) or getattr(nn.parallel, name)
    wrapped = wrapper.__new__(wrapper)  # as it would be: its constructor needs other processes
    nn.Module.__init__(wrapped)
    wrapped.module = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=f"the model has a {name}"):
        step_in_backward(nn.Sequential(wrapped), fusedopt.Adam)


def test_sharded_parameters_are_refused() -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        param = Parameter(DTensor.from_local(torch.ones(2), init_device_mesh("cpu", (1,))))
        with pytest.raises(TypeError, match=r"param_groups\[0\]\['params'\]\[0\] is a DTensor"):
            step_in_backward([param], fusedopt.Adam)
    finally:
        dist.destroy_process_group()


def test_foreign_optimizers_are_refused() -> None:
    with pytest.raises(TypeError, match=r"must make an optimizer of this package, got <class .*Adam'>"):
        step_in_backward([Parameter(torch.ones(1))], torch.optim.Adam)


def test_no_copies() -> None:
    steps = step_in_backward([Parameter(torch.ones(1))], fusedopt.Adam)
    for use in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="take the state_dict"):
            use(steps)


def test_captures_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    param = Parameter(torch.ones(1))
    step_in_backward([param], fusedopt.Adam)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="a CUDA graph is being captured"):
        param.sum().backward()


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise FloatingPointError("on purpose")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_backward_that_fails(accumulate: int) -> None:
    """The next one does not go on as if nothing were."""
    first, last = (Parameter(torch.ones(2)) for _ in range(2))
    steps = step_in_backward([first, last], fusedopt.Adam, accumulate=accumulate)
    for _ in range(accumulate - 1):
        (first * last).sum().backward()
    with pytest.raises(FloatingPointError, match="on purpose"):
        (_Fails.apply(first) * last).sum().backward()
    assert last in steps.state and first not in steps.state
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"the last backward failed after it had updated 1 of 2 .*discard\(\)"):
            (first * last).sum().backward()
    with pytest.raises(RuntimeError, match=r"a backward has updated 1 of 2 parameters; discard\(\)"):
        steps.zero_grad()
    steps.discard()
    for _ in range(accumulate):
        (first * last).sum().backward()
    assert [int(steps.state[p]["step"]) for p in (first, last)] == [1, 2]


@pytest.mark.parametrize("own", [{}, {"state_dtype": "int8"}], ids=str)
def test_a_step_that_fails(own: dict[str, Any]) -> None:
    """What step() would say, of the same parameter, comes out of backward; it and its gradient stay as they were."""
    names = ["a", "b", "c"]
    params = {name: Parameter(torch.ones(2)) for name in names}
    groups: list[dict[str, Any]] = [
        {"params": [("a", params["a"])]},
        {"params": [("b", params["b"]), ("c", params["c"])]},
    ]
    steps = step_in_backward(groups, fusedopt.Adam, **own)
    sum(params[name].sum() for name in names).backward()
    before = {name: param.detach().clone() for name, param in params.items()}
    steps.state[params["c"]]["exp_avg"] = torch.zeros(3, dtype=steps.state[params["c"]]["exp_avg"].dtype)
    with pytest.raises(RuntimeError, match=r"param_groups\[1\]\['params'\]\[1\] \('c'\): state 'exp_avg' has shape"):
        sum(params[name].sum() for name in names).backward()
    assert torch.equal(params["c"], before["c"]) and params["c"].grad is not None
    with pytest.raises(RuntimeError, match="the last backward failed"):
        params["a"].sum().backward()


@pytest.mark.parametrize("has_head", [True, False])
def test_reentrant_checkpoints(has_head: bool) -> None:
    """Their backwards run within the backward. Where that one has begun the step all is well, else it is an error."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4) for _ in range(3)]
    steps = step_in_backward([param for layer in layers for param in layer.parameters()], fusedopt.Adam, ema_decay=0.5)
    twins = copy.deepcopy(layers)
    optimizer = fusedopt.Adam([param for layer in twins for param in layer.parameters()], ema_decay=0.5)

    def run(layers: Sequence[nn.Linear]) -> None:
        x = torch.ones(2, 4, requires_grad=True)
        for layer in layers[:2]:
            x = checkpoint(layer, x, use_reentrant=True)
        (layers[2](x) if has_head else x).square().sum().backward()

    for _ in range(2):
        run(twins)
        optimizer.step()
        optimizer.zero_grad()
        if has_head:
            run(layers)
    if has_head:
        assert_equal(steps.state_dict(), optimizer.state_dict())
        assert_equal([layer.state_dict() for layer in layers], [layer.state_dict() for layer in twins])
    else:
        with pytest.raises(RuntimeError, match=r"runs within another.*use_reentrant=False"):
            run(layers)


class _RunsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, param: Tensor) -> Tensor:
        with torch.enable_grad():
            param.sum().backward()
        return param.clone()


def test_a_backward_in_a_forward() -> None:
    param = Parameter(torch.ones(2))
    steps = step_in_backward([param], fusedopt.Adam)
    _RunsBackward.apply(param)
    assert int(steps.state[param]["step"]) == 1


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_weight_in_two_checkpoints(use_reentrant: bool) -> None:
    body, head = nn.Linear(4, 4), nn.Linear(4, 4)
    steps = step_in_backward([*body.parameters(), *head.parameters()], fusedopt.Adam)
    x = torch.ones(2, 4, requires_grad=True)
    for _ in range(2):
        x = checkpoint(body, x, use_reentrant=use_reentrant)
    if use_reentrant:
        with pytest.raises(RuntimeError, match=r"\['params'\]\[\d\] got a second gradient in one backward"):
            head(x).sum().backward()
    else:
        head(x).sum().backward()
        assert int(steps.state[body.weight]["step"]) == 1


# Memory.

LAYERS, WIDTH = 48, 1024  # 50M parameters, in pieces that malloc takes from the system and gives back one by one
_PROGRAM = f"""
import sys, torch, fusedopt
import torch._dynamo  # the hooks of step_in_backward do: it is no gradient's memory
torch.set_num_threads(1)
model = torch.nn.Sequential(*[torch.nn.Linear({WIDTH}, {WIDTH}, bias=False) for _ in range({LAYERS})])
released = sys.argv[1] == "released"
optimizer = (fusedopt.step_in_backward if released else lambda m, f: f(m.parameters()))(model, fusedopt.Adam)
for _ in range(2):
    model(torch.ones(1, {WIDTH})).sum().backward()
    if not released:
        optimizer.step()
        optimizer.zero_grad()
assert len(optimizer.state) == {LAYERS}
# Not getrusage's ru_maxrss, which counts what the parent held when it forked.
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak is read from /proc")
def test_gradients_take_no_memory() -> None:
    """The peak of backward and step is lower by 90 % of the gradients' bytes; one gradient of 48 must exist, 2 %."""
    # A threshold that is given stays: what is freed goes back, and the peak is of what is in use.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    programs = [
        subprocess.Popen([sys.executable, "-c", _PROGRAM, how], env=env, stdout=subprocess.PIPE, text=True)
        for how in ("ordinary", "released")
    ]
    ordinary, released = (int(program.communicate()[0]) * 1024 for program in programs)
    gradients = LAYERS * WIDTH * WIDTH * 4
    saved = ordinary - released
    assert saved >= 0.9 * gradients, f"{saved / gradients:.1%} of the gradients' bytes"
