"""The classes behave as the classes of torch.optim of the same names."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from optimizers import BY_ID, VARIANTS, Row, generator, name_of
from reference import assert_same_bits, torch_loop_step, varied_values
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import fusedopt
from fusedopt._config import _C

CLASSES = [(fusedopt.Adam, torch.optim.Adam), (fusedopt.AdamW, torch.optim.AdamW)]


def units() -> int:
    return sum(_C.units_run().values())


def values(numel: int, seed: int) -> Tensor:
    return varied_values(numel, torch.float32, generator(seed), wild=False)


def make_params(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    return [Parameter(values(n, n).to(dtype)) for n in (5, 1, 33)]


def all_params(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def set_grads(optimizer: Optimizer, step: int) -> None:
    for i, p in enumerate(all_params(optimizer)):
        p.grad = values(p.numel(), 100 * step + i).to(p.dtype)


def assert_same_training(ours: Optimizer, theirs: Optimizer) -> None:
    for p, q in zip(all_params(ours), all_params(theirs), strict=True):
        assert_same_bits(p.detach(), q.detach())
        for key, value in theirs.state[q].items():
            assert_same_bits(ours.state[p][key], value, key)


def train(ours: Optimizer, theirs: Optimizer, steps: range, after: Callable[[Optimizer], Any] | None = None) -> None:
    for step in steps:
        for optimizer in (ours, theirs):
            set_grads(optimizer, step)
        ours.step()
        torch_loop_step(theirs)
        assert_same_training(ours, theirs)
        if after:
            for optimizer in (ours, theirs):
                after(optimizer)


# --- construction ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ours", "theirs"), CLASSES)
def test_subclass_with_the_same_signature(ours: type[Optimizer], theirs: type[Optimizer]) -> None:
    assert issubclass(ours, theirs)
    assert ours.__name__ == theirs.__name__
    assert ours.__doc__
    mine, wanted = (dict(inspect.signature(cls).parameters) for cls in (ours, theirs))
    more = {**ours._phase_options, **ours._precision_options}
    assert list(mine)[len(wanted) :] == list(more)
    for name, parameter in wanted.items():
        assert (mine[name].kind, mine[name].default) == (parameter.kind, parameter.default), name
    assert list(wanted) == list(mine)[: len(wanted)]
    signatures = [inspect.signature(cls.zero_grad, eval_str=True) for cls in (ours, theirs)]
    assert signatures[0] == signatures[1]
    own = {"state_dict": ["portable"], "load_state_dict": ["convert"]}
    for method in ("add_param_group", "step", "state_dict", "load_state_dict"):
        wanted_names = [*inspect.signature(getattr(theirs, method)).parameters, *own.get(method, ())]
        assert list(inspect.signature(getattr(ours, method)).parameters) == wanted_names
    p = Parameter(torch.ones(1))
    assert ours([p]).defaults == {**theirs([p]).defaults, **more}
    assert repr(ours([p])).splitlines()[0] == repr(theirs([p])).splitlines()[0]
    assert set(repr(ours([p])).splitlines()) > set(repr(theirs([p])).splitlines())
    public = {name for name in dir(ours) if not name.startswith("_")}
    assert public - {name for name in dir(theirs) if not name.startswith("_")} == {
        "ema_weights",
        "grad_norm",
        "skipped_steps",
        "stats",
        "update_captured",
    }


def test_what_the_package_exports() -> None:
    assert set(fusedopt.__all__) >= {"Adam", "AdamW", "show_config", "__version__"}
    for name in fusedopt.__all__:
        assert hasattr(fusedopt, name)
    assert "cpu" in fusedopt.show_config()


FLAGS: list[dict[str, Any]] = [
    {},
    {"foreach": True},
    {"foreach": False},
    {"fused": True},
    {"fused": False},
    {"capturable": True},
    {"foreach": None, "fused": None, "capturable": False, "differentiable": False},
]


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("row", VARIANTS, ids=name_of)
def test_flags_that_choose_an_implementation(row: Row, flags: dict[str, Any]) -> None:
    """Accepted, kept in the group, and the step is ours with the same bits whatever they say."""
    if row.lr_dtype is not None and flags.get("foreach"):
        flags = {**flags, "capturable": True}  # torch refuses the one without the other
    flags = row.known(flags)
    ours, theirs = row.make(make_params(), **flags), row.make_torch(make_params())
    for key, value in flags.items():
        assert ours.param_groups[0][key] == value
    before = units()
    train(ours, theirs, range(3))
    assert units() > before


def test_tensor_betas() -> None:
    """Torch turns them into numbers, or keeps them; the steps are the same."""
    betas = (torch.tensor(0.8), torch.tensor([0.95]))
    ours = fusedopt.Adam(make_params(), betas=betas)
    # torch's loop in the numbers that the tensors hold
    theirs = torch.optim.Adam(make_params(), betas=(betas[0].item(), betas[1].item()), foreach=False, fused=False)
    before = units()
    train(ours, theirs, range(3))
    assert units() > before


# --- differentiable -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_differentiable_is_torchs_own(first: str) -> None:
    calls: list[str] = []
    classes = [fusedopt.Adam, torch.optim.Adam]
    results = []
    for cls in classes if first == "ours" else classes[::-1]:
        root = torch.full((3,), 0.5, requires_grad=True)
        p = root.clone()
        p.grad = (root * 2).clone()
        lr = torch.tensor(0.1, requires_grad=True)
        optimizer = cls([p], lr=lr, differentiable=True)
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
        optimizer.register_step_post_hook(lambda *_: calls.append("post"))
        before = units()
        optimizer.step()
        assert units() == before
        assert calls == ["pre", "post"]
        calls.clear()
        p.sum().backward()
        assert root.grad is not None and lr.grad is not None
        results.append((p.detach(), root.grad, lr.grad))
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


def test_differentiable_closure() -> None:
    p = torch.ones(2, requires_grad=True).clone()
    p.grad = torch.ones(2)
    optimizer = fusedopt.AdamW([p], differentiable=True)
    with torch.no_grad():
        assert optimizer.step(lambda: torch.is_grad_enabled()) is True


# --- options that change --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", VARIANTS, ids=name_of)
def test_groups_with_options_of_their_own(row: Row) -> None:
    def groups() -> list[dict[str, Any]]:
        a, b, c = make_params()
        return [
            {"params": [a], "lr": 0.1, "betas": (0.5, 0.9)},
            {"params": [b], "weight_decay": 0.5, "maximize": True, "eps": 1e-4},
            {"params": [c], **row.known({"amsgrad": True})},
        ]

    ours, theirs = row.make(groups()), row.make_torch(groups())
    train(ours, theirs, range(3))
    for optimizer in (ours, theirs):
        optimizer.add_param_group({"params": [Parameter(values(7, 1))], "lr": 0.3})
        optimizer.param_groups[0]["lr"] = torch.tensor(0.25)
        optimizer.param_groups[1]["betas"] = (0.1, 0.2)
        optimizer.param_groups[2]["maximize"] = True
    train(ours, theirs, range(3, 6))
    assert {s["step"].item() for s in ours.state.values()} == {3, 6}


def test_lr_tensor_edited_in_place() -> None:
    ours = fusedopt.Adam(make_params(), lr=torch.tensor(0.1))
    theirs = torch.optim.Adam(make_params(), lr=torch.tensor(0.1), foreach=False, fused=False)
    train(ours, theirs, range(4), lambda optimizer: optimizer.param_groups[0]["lr"].mul_(0.3))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_lr_tensor_of_any_one_element_shape(shape: tuple[int, ...]) -> None:
    ours = fusedopt.Adam(make_params(), lr=torch.full(shape, 0.1))
    theirs = torch.optim.Adam(make_params(), lr=torch.tensor(0.1), foreach=False, fused=False)
    train(ours, theirs, range(2))


def test_lr_tensor_that_requires_grad() -> None:
    """Allowed by torch; without differentiable it is a number to us."""
    ours = fusedopt.Adam(make_params(), lr=torch.tensor(0.1, requires_grad=True))
    theirs = torch.optim.Adam(make_params(), lr=torch.tensor(0.1), foreach=False, fused=False)
    train(ours, theirs, range(2))


# --- the step -------------------------------------------------------------------------------------------------------


def test_closure() -> None:
    """Runs once, before the update, with gradients enabled, and its loss is returned."""
    p = Parameter(torch.ones(3))
    optimizer = fusedopt.Adam([p])
    seen: list[tuple[bool, float]] = []

    def closure() -> Tensor:
        seen.append((torch.is_grad_enabled(), p[0].item()))
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
        assert not torch.is_grad_enabled()
    assert seen == [(True, 1.0)]
    assert isinstance(loss, Tensor) and loss.item() == 3.0
    assert p[0].item() == pytest.approx(0.999)
    assert optimizer.step() is None
    assert optimizer.step(closure=lambda: 4) == 4
    assert optimizer.state[p]["step"] == 3


def test_a_closure_that_raises_changes_nothing() -> None:
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = fusedopt.Adam([p])

    def closure() -> float:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        optimizer.step(closure)
    assert torch.equal(p, torch.ones(3)) and not optimizer.state
    optimizer.step()
    assert optimizer.state[p]["step"] == 1


def test_a_step_within_a_step_is_an_error_or_right() -> None:
    """A hook of a parameter, say, or a closure, that steps the same optimizer."""
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = fusedopt.Adam([p])
    optimizer.step(lambda: optimizer.step())
    assert optimizer.state[p]["step"] == 2


def test_zero_grad() -> None:
    optimizer = fusedopt.Adam(make_params())
    set_grads(optimizer, 0)
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in all_params(optimizer))
    optimizer.zero_grad()
    assert all(p.grad is None for p in all_params(optimizer))
    before = units()
    optimizer.step()
    assert not any(optimizer.state.values()) and units() - before <= 1


@pytest.fixture
def global_calls() -> Iterator[list[str]]:
    calls: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("global post")),
    ]
    yield calls
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("order", [1, -1], ids=["ours_first", "torch_first"])
@pytest.mark.parametrize("flags", [{}, {"differentiable": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize(("ours", "theirs"), CLASSES)
def test_hooks_fire_exactly_once(
    ours: type[Optimizer], theirs: type[Optimizer], flags: dict[str, Any], order: int, global_calls: list[str]
) -> None:
    class Mine(ours):
        """As users do; its step is patched by torch when the first one is made."""

    for cls in [ours, theirs, Mine, torch.optim.Adam, torch.optim.AdamW][::order]:
        p = torch.ones(3)
        p.grad = torch.ones(3)
        optimizer = cls([p], **flags)
        optimizer.register_step_pre_hook(lambda o, args, kwargs: global_calls.append("pre"))
        handle = optimizer.register_step_post_hook(lambda o, args, kwargs: global_calls.append("post"))
        optimizer.step()
        assert global_calls == ["global pre", "pre", "post", "global post"], cls
        assert optimizer.state[p]["step"] == 1
        global_calls.clear()
        handle.remove()
        optimizer.step()
        assert global_calls == ["global pre", "pre", "global post"]
        global_calls.clear()


@pytest.mark.parametrize("flags", [{}, {"differentiable": True}], ids=str)
def test_a_pre_hook_may_replace_the_arguments(flags: dict[str, Any]) -> None:
    p = torch.ones(3)
    p.grad = torch.ones(3)
    optimizer = fusedopt.Adam([p], **flags)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: "replaced"), {}))
    assert optimizer.step(lambda: "original") == "replaced"
    assert optimizer.step() == "replaced"


def test_a_hook_may_change_the_gradients() -> None:
    def negate(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        torch._foreach_neg_([p.grad for p in all_params(optimizer)])

    ours, theirs = BY_ID["adam"].make(make_params()), BY_ID["adam"].make_torch(make_params())
    for optimizer in (ours, theirs):
        optimizer.register_step_pre_hook(negate)
        optimizer.register_step_post_hook(lambda o, *_: o.zero_grad())
    set_grads(ours, 0), set_grads(theirs, 0)
    ours.step()
    theirs.step()
    assert all(p.grad is None for p in all_params(ours))
    for p, q in zip(all_params(ours), all_params(theirs), strict=True):
        assert torch.allclose(p, q, rtol=1e-6)


@pytest.mark.parametrize("cls", [fusedopt.Adam, fusedopt.AdamW])
def test_profiler_range(cls: type[Optimizer]) -> None:
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = cls([p])
    with torch.autograd.profiler.profile() as profile:
        optimizer.step()
        optimizer.zero_grad()
    names = [event.name for event in profile.function_events]
    assert names.count(f"Optimizer.step#{cls.__name__}.step") == 1
    assert names.count(f"Optimizer.zero_grad#{cls.__name__}.zero_grad") == 1


def test_post_accumulate_grad_hooks_may_step() -> None:
    """The optimizer of each parameter steps in the backward, in autograd's own thread."""
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
    optimizers = {p: fusedopt.AdamW([p]) for p in module.parameters()}

    def hook(p: Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in module.parameters():
        p.register_post_accumulate_grad_hook(hook)
    for _ in range(3):
        module(torch.ones(2, 4)).sum().backward()
    assert [o.state[p]["step"].item() for p, o in optimizers.items()] == [3] * 4


def test_parameter_subclasses() -> None:
    """A Parameter subclass is a plain tensor with another name; torch functions on it may be overridden."""

    class Mine(Parameter):
        pass

    class Overridden(Tensor):
        calls: list[str] = []  # noqa: RUF012

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return super().__torch_function__(func, types, args, kwargs or {})

    plain = [values(9, 1).requires_grad_() for _ in range(2)]
    special = [Mine(values(9, 1)), values(9, 1).as_subclass(Overridden).requires_grad_()]
    ours, other = fusedopt.Adam(special), fusedopt.Adam(plain)
    for step in range(3):
        set_grads(ours, step), set_grads(other, step)
        ours.step(), other.step()
    for p, q in zip(special, plain, strict=True):
        assert_same_bits(p.detach().as_subclass(Tensor), q.detach())


def test_default_device_and_grad_modes_do_not_matter() -> None:
    ours, theirs = BY_ID["adam"].make(make_params()), BY_ID["adam"].make_torch(make_params())
    set_grads(ours, 0), set_grads(theirs, 0)
    with torch.device("meta"), torch.enable_grad():
        ours.step()
    torch_loop_step(theirs)
    assert_same_training(ours, theirs)
    assert all(p.grad_fn is None for p in all_params(ours))
    assert not any(t.requires_grad for s in ours.state.values() for t in s.values())
