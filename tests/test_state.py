"""What changes between steps is noticed, and state_dict is torch's in both directions."""

import copy
import gc
import io
import pickle
import random
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizers import BY_ID, VARIANTS, Row, generator, name_of
from reference import assert_same_bits, correctly_rounded_sqrt, torch_loop_step, varied_values
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import fusedopt

SHAPES = ((4, 4), (7,), (3, 3), (), (2, 2, 5))


pytestmark = pytest.mark.usefixtures("way")


def values(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return varied_values(torch.Size(shape).numel(), dtype, generator(seed), wild=False).view(shape)


def make_params(seed: int = 0) -> list[Parameter]:
    return [Parameter(values(shape, seed + i)) for i, shape in enumerate(SHAPES)]


def all_params(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def set_grads(optimizer: Optimizer, step: int, lacking: tuple[int, ...] = ()) -> None:
    for i, p in enumerate(all_params(optimizer)):
        p.grad = None if i in lacking else values(tuple(p.shape), 100 * step + i, p.dtype)


def assert_same_training(ours: Optimizer, theirs: Optimizer) -> None:
    for i, (p, q) in enumerate(zip(all_params(ours), all_params(theirs), strict=True)):
        assert_same_bits(p.detach(), q.detach(), f"parameter {i}")
        mine, wanted = ours.state.get(p, {}), theirs.state.get(q, {})
        assert list(mine) == list(wanted)
        for key, value in wanted.items():
            if isinstance(value, Tensor):
                assert_same_bits(mine[key], value, f"{key} of parameter {i}")


class Pair:
    """The same training twice, ours and torch's for-loop."""

    def __init__(self, row: Row, **more: Any) -> None:
        self.optimizers = row.make(make_params(), **more), row.make_torch(make_params(), **more)

    def both(self, change: Callable[[Optimizer], Any]) -> None:
        for optimizer in self.optimizers:
            change(optimizer)

    def step(self, step: int, lacking: tuple[int, ...] = ()) -> None:
        ours, theirs = self.optimizers
        self.both(lambda optimizer: set_grads(optimizer, step, lacking))
        ours.step()
        torch_loop_step(theirs)
        assert_same_training(ours, theirs)


# --- changes between steps ------------------------------------------------------------------------------------------


def first(optimizer: Optimizer) -> Tensor:
    return optimizer.param_groups[0]["params"][0]


def first_state(optimizer: Optimizer) -> dict[str, Any]:
    return optimizer.state[first(optimizer)]


def set_data(change: Callable[[Tensor], Tensor]) -> Callable[[Optimizer], None]:
    def apply(optimizer: Optimizer) -> None:
        for p in all_params(optimizer):
            p.data = change(p.data)

    return apply


def set_state(key: str, change: Callable[[Tensor], Any]) -> Callable[[Optimizer], None]:
    def apply(optimizer: Optimizer) -> None:
        for p in all_params(optimizer):
            if optimizer.state.get(p):
                optimizer.state[p][key] = change(optimizer.state[p][key])

    return apply


def to_double(optimizer: Optimizer) -> None:
    """As module.double(), with the state taken along."""
    for p in all_params(optimizer):
        p.grad = None
        p.data = p.data.double()
        for key, value in optimizer.state.get(p, {}).items():
            if key != "step":
                optimizer.state[p][key] = value.double()


def swap_tensors(optimizer: Optimizer) -> None:
    for p in all_params(optimizer):
        p.grad = None
        torch.utils.swap_tensors(p, Parameter(p.detach() * 2))


def group_option(**options: Any) -> Callable[[Optimizer], None]:
    return lambda optimizer: optimizer.param_groups[0].update(options)


def split_group(optimizer: Optimizer) -> None:
    group = optimizer.param_groups[0]
    other = {**group, "params": group["params"][2:], "lr": 0.01}
    del group["params"][2:]
    optimizer.param_groups.append(other)


def drop(optimizer: Optimizer) -> None:
    p = optimizer.param_groups[0]["params"].pop(1)
    optimizer.state.pop(p, None)


def replace_param(optimizer: Optimizer) -> None:
    """Another Parameter, with the old one's state."""
    params = optimizer.param_groups[0]["params"]
    old, params[0] = params[0], Parameter(params[0].detach().clone())
    optimizer.state[params[0]] = optimizer.state.pop(old, {})


def through_file(optimizer: Optimizer) -> None:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))


CHANGES: dict[str, Callable[[Optimizer], Any]] = {
    "data_cloned": set_data(torch.clone),
    "data_other_values": set_data(lambda t: t * -1.5),
    "data_transposed_in_place": set_data(lambda t: t.t() if t.dim() == 2 else t),  # same address, shape and numel
    "data_strided": set_data(lambda t: torch.stack([t, t], -1)[..., 1]),
    "data_in_one_buffer": set_data(lambda t: torch.cat([t.new_ones(1), t.flatten()])[1:].view(t.shape)),
    "data_shared": set_data(lambda t: t.clone().share_memory_()),
    "data_of_numpy": set_data(lambda t: torch.from_numpy(t.numpy().copy())),
    "swap_tensors": swap_tensors,
    "param_in_place": lambda o: [p.data.mul_(0.5) for p in all_params(o)],
    "param_set_": lambda o: [p.data.set_(p.data.clone()) for p in all_params(o)],
    "param_replaced": replace_param,
    "params_reversed": lambda o: o.param_groups[0]["params"].reverse(),
    "param_dropped": drop,
    "group_split": split_group,
    "group_added": lambda o: o.add_param_group(
        {"params": [Parameter(values((5,), 9))], "lr": 0.5, "weight_decay": 0.2}
    ),
    "groups_rebuilt": lambda o: setattr(o, "param_groups", [dict(group) for group in o.param_groups]),
    "requires_grad_off": lambda o: [p.requires_grad_(False) for p in all_params(o)],
    "to_double": to_double,
    "state_cloned": set_state("exp_avg", torch.clone),
    "state_other_values": set_state("exp_avg_sq", lambda t: t * 3),
    "state_in_place": lambda o: [s["exp_avg"].neg_() for s in o.state.values() if s],
    "state_transposed": set_state("exp_avg", lambda t: t.mT.contiguous().mT if t.dim() > 1 else t),
    "state_strided": set_state("exp_avg_sq", lambda t: torch.stack([t, t], -1)[..., 1]),
    "state_data": lambda o: [setattr(s["exp_avg"], "data", s["exp_avg"] * 2) for s in o.state.values() if s],
    "state_of_one_cleared": lambda o: first_state(o).clear(),
    "state_of_one_deleted": lambda o: o.state.pop(first(o), None),
    "state_all_deleted": lambda o: o.state.clear(),
    "state_dicts_replaced": lambda o: o.state.update({p: dict(s) for p, s in o.state.items()}),
    "state_replaced": lambda o: setattr(o, "state", defaultdict(dict, {p: dict(s) for p, s in o.state.items()})),
    "state_keys_reordered": lambda o: o.state.update({p: dict(reversed(s.items())) for p, s in o.state.items()}),
    "state_with_more_in_it": lambda o: [s.update(mine=1) for s in o.state.values() if s],
    "step_replaced": set_state("step", lambda t: torch.tensor(40.0)),
    "step_in_double": set_state("step", lambda t: t.double()),
    "step_one_element": set_state("step", lambda t: t.clone()),
    "step_in_place": lambda o: [s["step"].add_(i) for i, s in enumerate(o.state.values()) if s],
    "step_of_one": lambda o: [s["step"].fill_(1000) for s in list(o.state.values())[:1] if s],
    "lr": group_option(lr=0.05),
    "lr_int": group_option(lr=1),
    "lr_tensor": group_option(lr=torch.tensor(0.02)),
    "lr_zero": group_option(lr=0.0),
    "betas": group_option(betas=(0.2, 0.5)),
    "betas_list": group_option(betas=[0.2, 0.5]),
    "eps": group_option(eps=1e-3),
    "decay": group_option(weight_decay=0.3),
    "maximize": group_option(maximize=True),
    "decoupled": group_option(decoupled_weight_decay=True, weight_decay=0.5),
    "loaded": lambda o: o.load_state_dict(copy.deepcopy(o.state_dict())),
    "loaded_from_file": through_file,
    "collected": lambda o: gc.collect(1),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("row", [BY_ID["adam"], BY_ID["adamw-decay-amsgrad-lr32"]], ids=name_of)
def test_changes_between_steps(row: Row, change: str) -> None:
    pair = Pair(row)
    pair.both(CHANGES[change])  # of an optimizer that has made no step yet
    for step in range(2):
        pair.step(step)
    pair.both(CHANGES[change])
    for step in range(2, 4):
        pair.step(step)
    pair.both(CHANGES[change])
    pair.step(5, lacking=(0, 2))
    pair.step(6)


def test_amsgrad_switched_off_keeps_its_maximum() -> None:
    pair = Pair(BY_ID["adam-amsgrad"])
    pair.step(0)
    pair.both(group_option(amsgrad=False))
    pair.step(1)
    pair.both(group_option(amsgrad=True))
    pair.step(2)


@pytest.mark.parametrize("row", VARIANTS, ids=name_of)
def test_gradients_that_come_and_go(row: Row) -> None:
    """A parameter without a gradient is skipped: nothing of it moves, its step count included."""
    pair = Pair(row)
    ours = pair.optimizers[0]
    lacking = [(0, 1), (), (4,), (0, 1, 2, 3, 4), (2, 3), (1,), (0, 2, 4), (), (0, 1, 2, 3)]
    counts = [0] * len(SHAPES)
    for step, without in enumerate(lacking):
        before = [(p.detach().clone(), p._version) for p in all_params(ours)]
        pair.step(step, without)
        for i, p in enumerate(all_params(ours)):
            moved = i not in without
            counts[i] += moved
            assert p._version == before[i][1] + moved
            assert moved or torch.equal(p, before[i][0])
            assert (ours.state[p]["step"].item() if ours.state[p] else 0) == counts[i]
    assert len(set(counts)) > 1


def test_gradients_kept_or_fresh() -> None:
    """Written in place, zeroed in place, given new memory at an old address or at a new one."""
    row = BY_ID["adam"]
    ours, theirs = row.make(make_params()), row.make_torch(make_params())
    kept: list[Tensor] = []
    for step in range(12):
        for optimizer in (ours, theirs):
            optimizer.zero_grad(set_to_none=step % 3 == 0)
            loss = sum((p * values(tuple(p.shape), step)).sin().sum() for p in all_params(optimizer))
            assert isinstance(loss, Tensor)
            loss.backward()
        if step % 4 == 1:
            kept += [p.grad for p in all_params(ours) if p.grad is not None]  # so that new ones lie elsewhere
            for p in all_params(ours):
                p.grad = p.grad.clone() if p.grad is not None else None
        ours.step()
        torch_loop_step(theirs)
        assert_same_training(ours, theirs)


def test_copy_on_write_memory_is_not_written_through() -> None:
    source = values((40,), 0)
    expected = source.clone()
    p = Parameter(torch.empty(40))
    p.data = torch._lazy_clone(source)
    optimizer = BY_ID["adam"].make([p])
    copies = []
    for step in range(4):
        p.grad = torch._lazy_clone(values((40,), step))
        copies.append((torch._lazy_clone(p.detach()), p.detach().clone()))
        state = optimizer.state.get(p, {})
        copies += [(torch._lazy_clone(value), value.clone()) for value in state.values()]
        optimizer.step()
    for lazy, eager in copies:
        assert_same_bits(lazy, eager)
    assert_same_bits(source, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float16], ids=name_of)
def test_module_moved_after_the_optimizer_was_made(dtype: torch.dtype) -> None:
    """Module.to(dtype) before the first step: as if always so. Later: an error, until the state follows."""
    row = BY_ID["adamw-decay"]

    def training() -> tuple[torch.nn.Linear, Optimizer]:
        torch.manual_seed(0)
        module = torch.nn.Linear(5, 3)
        return module, row.make(module.parameters())

    module, optimizer = training()
    module.to(dtype)
    always = [Parameter(p.detach().clone()) for p in module.parameters()]
    other = row.make(always)
    for _ in range(2):
        for p, q in zip(module.parameters(), always, strict=True):
            p.grad = values(tuple(p.shape), 3).to(dtype)
            q.grad = p.grad.clone()
        optimizer.step(), other.step()
    for p, q in zip(module.parameters(), always, strict=True):
        assert_same_bits(p.detach(), q.detach())

    module, optimizer = training()
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    module.to(dtype)
    with pytest.raises(RuntimeError, match=rf"has dtype torch\.float32 but the parameter has {dtype}"):
        for p in module.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    with pytest.warns(UserWarning, match="cast"):
        optimizer.load_state_dict(to_float32(optimizer.state_dict()))
    optimizer.step()


def to_float32(state_dict: dict[str, Any]) -> dict[str, Any]:
    state = {i: {key: value.float() for key, value in state.items()} for i, state in state_dict["state"].items()}
    return {**state_dict, "state": state}


# --- many parameters, looked at by several threads -------------------------------------------------------------------


def one_parameter(optimizer: Optimizer, n: int, what: str) -> None:
    """Change one parameter of many."""
    param = all_params(optimizer)[n]
    state = optimizer.state[param]
    if what == "gradient":
        param.grad = None
    elif what == "data":
        param.data = param.data.clone()
    elif what == "layout":
        param.data = torch.stack([param.data, param.data], -1)[..., 1]
    elif what == "state" and state:
        state["exp_avg"] = state["exp_avg"] * 2
    elif what == "step" and state:
        state["step"] = state["step"] + 7
    elif what == "new":
        state.clear()
    elif what == "group":
        groups = optimizer.param_groups
        giver = next(group for group in groups if any(p is param for p in group["params"]))
        giver["params"] = [p for p in giver["params"] if p is not param]
        groups[n % len(groups)]["params"].append(param)


def test_many_parameters_looked_at_by_threads(
    threads: Callable[[int], None], chunk_size: Callable[[int], None]
) -> None:
    threads(3)
    chunk_size(16)  # so that a step of small tensors is worth threads
    pick = random.Random(0)
    changes = ["gradient", "data", "layout", "state", "step", "new", "group", "nothing"]
    pair = []
    for make in (BY_ID["adam"].make, BY_ID["adam"].make_torch):
        params = [Parameter(values((3, n % 5), n)) for n in range(300)]
        lists = [params[:100], params[100:101], params[101:164], params[164:]]
        pair.append(make([{"params": list_, "lr": 0.1 * (g + 1)} for g, list_ in enumerate(lists)]))
    ours, theirs = pair
    for step in range(30):
        changed = pick.sample(range(300), 2)
        for optimizer in pair:
            set_grads(optimizer, step)
            for n in changed:
                one_parameter(optimizer, n, changes[step % len(changes)])
        ours.step()
        torch_loop_step(theirs)
        assert_same_training(ours, theirs)


# --- the step counts ------------------------------------------------------------------------------------------------


def test_step_counts_are_independent_numbers() -> None:
    optimizer = BY_ID["adam"].make(make_params())
    set_grads(optimizer, 0)
    optimizer.step()
    snapshot = copy.deepcopy(optimizer.state_dict())
    pickled = pickle.loads(pickle.dumps(optimizer.state_dict()))
    one = first_state(optimizer)["step"]
    assert (one.shape, one.dtype, one.device.type, one.requires_grad) == (torch.Size(()), torch.float32, "cpu", False)
    one.fill_(10)
    set_grads(optimizer, 1)
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in all_params(optimizer)] == [11, 2, 2, 2, 2]
    for kept in (snapshot, pickled):
        assert [state["step"].item() for state in kept["state"].values()] == [1] * 5
    # A kept count may be edited too, and does not drag others along.
    pickled["state"][0]["step"] += 5
    assert pickled["state"][1]["step"] == 1
    snapshot["state"][0]["step"] += 5
    assert snapshot["state"][1]["step"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_step_counts_have_torchs_dtype(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    try:
        pair = Pair(BY_ID["adam"])
        for step in range(2):
            pair.step(step)  # compares the dtype too
    finally:
        torch.set_default_dtype(torch.float32)


# --- state_dict -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["deepcopy", "file", "pickle"])
@pytest.mark.parametrize("row", VARIANTS, ids=name_of)
def test_state_dict_is_torchs_both_ways(row: Row, way: str) -> None:
    """torch's -> ours -> torch's, each continuing with the bits of a training that was never interrupted."""

    def copied(state_dict: dict[str, Any]) -> dict[str, Any]:
        if way == "deepcopy":
            return copy.deepcopy(state_dict)
        if way == "pickle":
            return pickle.loads(pickle.dumps(state_dict))
        file = io.BytesIO()
        torch.save(state_dict, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def groups(params: list[Parameter]) -> list[dict[str, Any]]:
        return [{"params": params[:2]}, {"params": params[2:], "eps": 1e-5}]

    steady = row.make_torch(groups(make_params()))
    current: Optimizer = row.make_torch(groups(make_params()))
    lacking = [(1,), (), (0, 3), (4,), (), (2,), (), (0, 1, 2), ()]
    for step, without in enumerate(lacking):
        if step % 3 == 0 and step:
            params = [Parameter(p.detach().clone()) for p in all_params(current)]
            make = row.make if step == 3 else row.make_torch
            after = make(groups(params))
            saved = copied(current.state_dict())
            keys = [list(row.known(group)) for group in after.state_dict()["param_groups"]]
            after.load_state_dict(saved)
            assert keys == [list(row.known(group)) for group in after.state_dict()["param_groups"]]
            for group in after.param_groups:
                group.update(row.known({"foreach": False, "fused": False}))
            current = after
        for optimizer in (steady, current):
            set_grads(optimizer, step, without)
        torch_loop_step(steady)
        if 3 <= step < 6:
            assert isinstance(current, row.ours)
            current.step()
        else:
            assert not isinstance(current, row.ours)
            torch_loop_step(current)
        assert_same_training(current, steady)
    counts = {state["step"].item() for state in current.state.values()}
    assert len(counts) > 1


def test_state_dict_looks_like_torchs() -> None:
    for row in VARIANTS:
        ours, theirs = row.make(make_params()), row.theirs(make_params(), **row.kwargs())
        for optimizer in (ours, theirs):
            set_grads(optimizer, 0, lacking=(1,))
            optimizer.step()
        mine, wanted = ours.state_dict(), theirs.state_dict()
        own = row.make([torch.ones(1)])._all_own_options.keys()
        known = [{"params": group["params"], **row.known(group)} for group in mine["param_groups"]]
        assert known == wanted["param_groups"]
        assert all(group.keys() - known[0].keys() == own for group in mine["param_groups"])
        assert list(mine) == list(wanted)
        assert list(mine["state"]) == list(wanted["state"])
        for i, state in wanted["state"].items():
            assert list(mine["state"][i]) == list(state)
            for key, value in state.items():
                other = mine["state"][i][key]
                assert (other.dtype, other.shape, other.stride()) == (value.dtype, value.shape, value.stride())


def test_options_that_a_checkpoint_lacks_keep_the_live_values() -> None:
    options = {"maximize": True, "weight_decay": 0.25, "eps": 1e-3, "amsgrad": False}
    source = BY_ID["adam"].make(make_params(), lr=0.5)
    set_grads(source, 0)
    source.step()
    saved = copy.deepcopy(source.state_dict())
    for group in saved["param_groups"]:
        for key in (*options, "foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay"):
            group.pop(key)
    optimizer = BY_ID["adam"].make(make_params(), **options)
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert {key: group[key] for key in options} == options
    assert group["lr"] == 0.5
    set_grads(optimizer, 1)
    optimizer.step()
    assert first_state(optimizer)["step"] == 2


def test_number_steps_of_old_checkpoints() -> None:
    ours, theirs = BY_ID["adam"].make(make_params()), BY_ID["adam"].make_torch(make_params())
    for optimizer in (ours, theirs):
        set_grads(optimizer, 0)
    ours.step(), torch_loop_step(theirs)
    for optimizer in (ours, theirs):
        saved = copy.deepcopy(optimizer.state_dict())
        for state in saved["state"].values():
            state["step"] = int(state["step"])
        optimizer.load_state_dict(saved)
        set_grads(optimizer, 1)
    ours.step(), torch_loop_step(theirs)
    assert_same_training(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=name_of)
def test_a_cast_on_load_is_said_and_exact(dtype: torch.dtype) -> None:
    source = BY_ID["adam-amsgrad"].make(make_params())
    for step in range(3):
        set_grads(source, step)
        source.step()
    saved = copy.deepcopy(source.state_dict())
    params = [Parameter(p.detach().to(dtype)) for p in all_params(source)]
    optimizer = BY_ID["adam-amsgrad"].make(params)
    with pytest.warns(
        UserWarning, match=r"^Adam\.load_state_dict: 15 state tensors were cast .* from torch.float32 to"
    ) as caught:
        optimizer.load_state_dict(saved)
    assert [warning.filename for warning in caught] == [__file__]
    for i, p in enumerate(params):
        for key, value in saved["state"][i].items():
            target = value if key == "step" else value.to(dtype)
            assert_same_bits(optimizer.state[p][key], target)
    set_grads(optimizer, 4)
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def test_load_hooks_and_errors_are_torchs() -> None:
    optimizer = BY_ID["adam"].make(make_params())
    calls: list[str] = []
    optimizer.register_load_state_dict_pre_hook(lambda o, d: calls.append("pre"))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("post"))
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("save pre"))
    optimizer.register_state_dict_post_hook(lambda o, d: calls.append("save post"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["save pre", "save post", "pre", "post"]
    saved = optimizer.state_dict()
    saved["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict(saved)


def test_named_parameters_survive_a_checkpoint() -> None:
    module = torch.nn.Sequential(OrderedDict(a=torch.nn.Linear(2, 2), b=torch.nn.Linear(2, 1)))
    optimizer = BY_ID["adamw"].make(module.named_parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["param_names"] == ["a.weight", "a.bias", "b.weight", "b.bias"]
    optimizer.load_state_dict(copy.deepcopy(saved))
    optimizer.step()
    assert optimizer.param_groups[0]["param_names"][2] == "b.weight"


# --- autograd's versions --------------------------------------------------------------------------------------------


def test_a_stale_graph_raises() -> None:
    for make in (BY_ID["adam"].make, BY_ID["adam"].make_torch):
        p = Parameter(torch.ones(3))
        optimizer = make([p])
        loss = (p * p).sum()
        loss.backward(retain_graph=True)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("row", VARIANTS, ids=name_of)
def test_versions_are_bumped_once_a_step(row: Row) -> None:
    optimizer = row.make(make_params())
    for step in range(4):
        lacking = (1, 3) if step % 2 else ()
        set_grads(optimizer, step, lacking)
        before = [p._version for p in all_params(optimizer)]
        grads = [p.grad._version if p.grad is not None else None for p in all_params(optimizer)]
        optimizer.step()
        after = [p._version for p in all_params(optimizer)]
        assert after == [v + (i not in lacking) for i, v in enumerate(before)]
        assert grads == [p.grad._version if p.grad is not None else None for p in all_params(optimizer)]


def test_a_view_of_a_parameter_sees_the_version() -> None:
    base = torch.ones(6)
    p = base[:3].detach().requires_grad_()
    optimizer = BY_ID["adam"].make([p])
    p.grad = torch.ones(3)
    view = p.detach()
    optimizer.step()
    assert view._version == p._version == base._version == 1


def test_inference_mode() -> None:
    """A step inside of it is a step; parameters made there can be updated there."""
    p, made_inside = Parameter(torch.ones(3)), []
    p.grad = torch.ones(3)
    optimizer = BY_ID["adam"].make([p])
    with torch.inference_mode():
        optimizer.step()
        q = torch.ones(3)
        q.grad = torch.ones(3)
        made_inside.append(q)
        BY_ID["adam"].make(made_inside).step()
    optimizer.step()
    assert p._version == 2
    theirs = Parameter(torch.ones(3))
    theirs.grad = torch.ones(3)
    reference = BY_ID["adam"].make_torch([theirs])
    torch_loop_step(reference)
    assert_same_bits(q.clone(), theirs.detach())
    torch_loop_step(reference)
    assert_same_bits(p.detach(), theirs.detach())


def test_deepcopy_and_pickle_of_the_optimizer() -> None:
    """The copy trains on with the same bits, on parameters of its own."""
    row = BY_ID["adamw-decay-amsgrad-lr32"]
    optimizer = row.make(make_params())
    for step in range(2):
        set_grads(optimizer, step)
        optimizer.step()
    copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    copies.append(torch.load(file, weights_only=False))
    frozen = [p.detach().clone() for p in all_params(copies[0])]
    for step in range(2, 4):
        set_grads(optimizer, step)
        optimizer.step()
    for other in copies:
        assert type(other) is row.ours
        for p, value in zip(all_params(other), frozen, strict=True):
            assert_same_bits(p.detach(), value)
        for step in range(2, 4):
            set_grads(other, step)
            other.step()
        assert_same_training(other, optimizer)


def test_the_reference_is_not_what_is_tested() -> None:
    """Our classes use none of the functions that the reference replaces."""
    optimizer = BY_ID["adam"].make(make_params())
    set_grads(optimizer, 0)
    with correctly_rounded_sqrt():
        torch.Tensor.sqrt = None
        optimizer.step()


def test_a_load_hook_may_rewrite_the_checkpoint() -> None:
    source = fusedopt.Adam([Parameter(torch.ones(3)), Parameter(torch.ones(2))])
    for p in source.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    source.step()
    target = fusedopt.Adam([Parameter(torch.ones(3))])

    def keep_the_first(optimizer: Any, checkpoint: dict[str, Any]) -> dict[str, Any]:
        [group] = checkpoint["param_groups"]
        return {"state": {0: checkpoint["state"][0]}, "param_groups": [{**group, "params": [0]}]}

    target.register_load_state_dict_pre_hook(keep_the_first)
    target.load_state_dict(source.state_dict())
    [p] = target.param_groups[0]["params"]
    assert_same_bits(target.state[p]["exp_avg"], source.state_dict()["state"][0]["exp_avg"])


def test_a_failed_first_step_leaves_an_empty_state_dict_alone() -> None:
    p, q = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    p.grad, q.grad = torch.ones(3), torch.ones(3)
    optimizer = fusedopt.Adam([p, q])
    touched = optimizer.state[p]
    q.data = p.data
    with pytest.raises(RuntimeError, match="shares memory"):
        optimizer.step()
    assert list(optimizer.state) == [p] and optimizer.state[p] is touched and touched == {}


@pytest.mark.parametrize("cls", [fusedopt.Adam, fusedopt.RAdam])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.0), (1 - 2**-20, 1 - 2**-53)])
@pytest.mark.parametrize("count", [-1.0, -3.5, -10.0])
def test_step_counts_below_zero(cls: type[Optimizer], betas: tuple[float, float], count: float) -> None:
    """Of a damaged checkpoint: powers that cannot correct anything, and steps in the wrong direction."""
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = cls([p], betas=betas)
    optimizer.step()
    optimizer.state[p]["step"].fill_(count)
    before = p.detach().clone()
    with pytest.raises(ValueError, match="not below 1"):
        optimizer.step()
    assert_same_bits(p.detach(), before)
    assert optimizer.state[p]["step"] == count


def test_options_that_older_pickles_lack() -> None:
    optimizer = fusedopt.RAdam([Parameter(torch.ones(3))])
    state = optimizer.__getstate__()
    for name in ("amsgrad", "degenerate_to_sgd", "optimized_update"):
        del state["param_groups"][0][name]
    other = fusedopt.RAdam.__new__(fusedopt.RAdam)
    other.__setstate__(state)
    (p,) = other.param_groups[0]["params"]
    p.grad = torch.ones(3)
    other.step()
    assert other.param_groups[0]["degenerate_to_sgd"] is True


def test_beta1_of_one_changes_nothing() -> None:
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = fusedopt.Adam([p])
    optimizer.step()
    before = p.detach().clone()
    optimizer.param_groups[0]["betas"] = (1.0, 0.999)
    with pytest.raises(ValueError, match="beta1"):
        optimizer.step()
    assert_same_bits(p.detach(), before)
    assert optimizer.state[p]["step"] == 1


@pytest.mark.parametrize("option", ["fused", "capturable"])
def test_step_counts_lie_where_the_options_kept_want_them(option: str) -> None:
    """A checkpoint that lacks the option keeps the live one's, and with it the place of the counts."""
    optimizer = fusedopt.Adam([p := Parameter(torch.ones(3))], **{option: True})
    p.grad = torch.ones(3)
    optimizer.step()
    checkpoint = optimizer.state_dict()
    for group in checkpoint["param_groups"]:
        del group["fused"], group["capturable"]
    with torch.device("meta"):  # stands for a GPU
        other = fusedopt.Adam([q := Parameter(torch.ones(3))], **{option: True})
    other.load_state_dict(copy.deepcopy(checkpoint))
    assert other.param_groups[0][option]
    assert other.state[q]["step"].device == q.device
