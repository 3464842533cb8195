"""What cannot be updated rightly is a clear error that names the parameter, and nothing is changed by that step."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from optimizers import BY_ID, VARIANTS, Row, name_of
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

pytestmark = pytest.mark.usefixtures("way")


class Model:
    """Two groups of three named parameters; the one that goes bad is the middle one of the second group."""

    def __init__(self, row: Row) -> None:
        self.params = [torch.arange(6.0).view(2, 3).add(i).requires_grad_() for i in range(6)]
        for p in self.params:
            p.grad = torch.ones(2, 3)
        groups = [
            {"params": [(f"first.{i}", p) for i, p in enumerate(self.params[:3])]},
            {"params": [(f"second.{i}", p) for i, p in enumerate(self.params[3:])], "lr": 0.1},
        ]
        self.optimizer: Optimizer = row.make(groups)

    @property
    def group(self) -> dict[str, Any]:
        return self.optimizer.param_groups[1]

    @property
    def bad(self) -> Tensor:
        return self.group["params"][1]

    @property
    def other(self) -> Tensor:
        return self.params[2]

    def set_grad(self, grad: Tensor) -> None:
        self.bad.grad = None
        self.bad.grad = grad

    def replace(self, param: Any) -> None:
        """Put another object into the group, as code that rebuilds its parameters does."""
        self.group["params"][1] = param
        if isinstance(param, Tensor) and param.grad is None:
            param.grad = torch.ones_like(param.detach())

    def state(self, owner: Tensor | None = None) -> dict[str, Any]:
        return self.optimizer.state[self.bad if owner is None else owner]


def readable(tensor: Any) -> bool:
    return (
        type(tensor) in (Tensor, Parameter)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size() // max(1, tensor.numel())
        and tensor.data_ptr() != 0
    )


def snapshot(optimizer: Optimizer) -> list[Any]:
    """Everything that a step may change."""
    seen: list[Any] = [len(optimizer.state)]

    def note(*what: Any, tensor: Any = None) -> None:
        seen.append((*what, id(tensor)))
        if readable(tensor):
            seen.append(tensor.detach().clone())
            seen.append(None if tensor.is_inference() else tensor._version)

    for g, group in enumerate(optimizer.param_groups):
        seen.append({k: v for k, v in group.items() if k != "params"})
        for i, p in enumerate(group["params"]):
            note("param", g, i, tensor=p)
            note("grad", g, i, tensor=getattr(p, "grad", None) if isinstance(p, Tensor) else None)
    for p, state in optimizer.state.items():
        seen.append((id(p), type(state), len(state)))
        for key, value in state.items() if isinstance(state, dict) else ():
            note("state", key, tensor=value)
    return seen


def same(before: list[Any], after: list[Any]) -> bool:
    def equal(a: Any, b: Any) -> bool:
        if not isinstance(a, Tensor):
            return a is b or bool(a == b)
        raw = [torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()) for t in (a, b)]
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*raw)

    return len(before) == len(after) and all(map(equal, before, after))


@dataclass(frozen=True)
class Bad:
    """A way to break a model, and what is said about it."""

    id: str
    breaks: Callable[[Model], Any]
    message: str
    error: type[Exception] = RuntimeError
    fresh: bool = True  # can be broken before the first step
    named: bool = True  # the message begins with the place


# Of two that overlap either may be the one complained of.
ONE, OTHER = r"param_groups\[1\]\['params'\]\[1\]", r"param_groups\[0\]\['params'\]\[2\]"
EITHER = rf"^Adam.*({ONE}.* shares memory with {OTHER}|{OTHER}.* shares memory with {ONE}).*list a tied parameter once"
PLACE = r"^(Adam|AdamW): param_groups\[1\]\['params'\]\[1\] \('second\.1'\): "


def replace_with_own_grad(m: Model, param: Tensor) -> None:
    param.grad = param.detach()
    m.replace(param)


def half_complex(m: Model) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental, says torch
        replace_with_own_grad(m, torch.ones(2, 3, dtype=torch.complex32))


def freed(tensor: Tensor) -> None:
    tensor.untyped_storage().resize_(0)


def wrap(m: Model) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    m.replace(TwoTensor(torch.ones(2, 3), torch.ones(2, 3)))


def fake(m: Model) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        m.replace(torch.ones(2, 3))


def inference(m: Model) -> None:
    with torch.inference_mode():
        m.replace(torch.ones(2, 3))


def with_data(m: Model, data: Tensor) -> None:
    m.bad.data = data


def overlap(m: Model) -> None:
    buffer = torch.zeros(11)
    m.other.data, m.bad.data = buffer[:6].view(2, 3), buffer[5:].view(2, 3)


def set_state(m: Model, key: str, value: Any) -> None:
    m.state()[key] = value


BAD = [
    # the parameter
    Bad("param_meta", lambda m: m.replace(torch.ones(2, 3, device="meta")), r"the parameter .*meta"),
    Bad(
        "param_int",
        lambda m: m.replace(torch.ones(2, 3, dtype=torch.int32)),
        r"the parameter has dtype torch\.int32; supported are",
    ),
    Bad("param_half_complex", half_complex, r"the parameter has dtype torch\.complex32"),
    Bad(
        "param_float8",
        lambda m: replace_with_own_grad(m, torch.ones(2, 3).to(torch.float8_e5m2)),
        r"the parameter has dtype torch\.float8_e5m2; supported are",
    ),
    Bad(
        "param_conj",
        lambda m: m.replace(torch.ones(2, 3, dtype=torch.complex64).conj()),
        r"the parameter is a conjugate or negative view; call",
    ),
    Bad(
        "param_neg",
        lambda m: m.replace(torch._neg_view(torch.ones(2, 3))),
        r"the parameter is a conjugate or negative view; call",
    ),
    Bad("param_mkldnn", lambda m: replace_with_own_grad(m, torch.ones(2, 3).to_mkldnn()), r"the parameter"),
    Bad("param_sparse", lambda m: replace_with_own_grad(m, torch.ones(2, 3).to_sparse()), r"the parameter"),
    Bad("param_freed", lambda m: freed(m.bad), r"the parameter has no memory"),
    Bad("param_wrapper_subclass", wrap, r"the parameter is a .*TwoTensor.*plain strided tensors"),
    Bad("param_fake", fake, r"the parameter"),
    Bad("param_inference", inference, r"the parameter is an inference tensor"),
    Bad(
        "param_expanded",
        lambda m: with_data(m, torch.ones(2, 1).expand(2, 3)),
        r"the parameter has elements that share memory .*clone",
    ),
    Bad(
        "param_sliding_window",
        lambda m: with_data(m, torch.ones(9).as_strided((2, 3), (2, 1))),
        r"the parameter has elements that share memory",
    ),
    Bad("params_overlap", overlap, EITHER, named=False),
    Bad("params_same_memory", lambda m: with_data(m, m.other.data), EITHER, named=False),
    Bad("params_overlap_transposed", lambda m: with_data(m, m.other.data.view(3, 2).t()), EITHER, named=False),
    Bad("param_twice", lambda m: m.group["params"].__setitem__(1, m.other), EITHER, named=False),
    Bad(
        "param_shrunk",
        lambda m: with_data(m, torch.ones(2, 2)),
        r"the gradient has shape \(2, 3\) but the parameter has \(2, 2\)",
    ),
    Bad(
        "param_cast",
        lambda m: with_data(m, m.bad.data.double()),
        r"the gradient has dtype torch\.float32 but the parameter has torch\.float64",
    ),
    Bad(
        "param_float64",
        lambda m: with_data(m, m.bad.data.double()),
        r"the gradient has dtype torch\.float32 but the parameter has torch\.float64",
    ),
    Bad("param_no_tensor", lambda m: m.replace(3.0), r"the parameter is not a tensor"),
    Bad("param_none", lambda m: m.replace(None), r"the parameter is not a tensor"),
    # the gradient
    Bad(
        "grad_shares_a_parameter",
        lambda m: m.set_grad(m.other.detach()),
        r"the gradient shares memory with param_groups\[0\]\['params'\]\[2\]; use a \.clone\(\)",
    ),
    Bad(
        "grad_is_its_parameter_shifted",
        lambda m: shifted(m),
        r"the gradient shares memory with param_groups\[1\]\['params'\]\[1\]",
    ),
    Bad(
        "grad_is_its_parameter_transposed",
        lambda m: transposed_self(m),
        r"the gradient shares memory with param_groups\[1\]\['params'\]\[1\]",
    ),
    Bad("grad_freed", lambda m: freed(m.bad.grad), r"the gradient has no memory"),
    Bad(
        "grad_dtype",
        lambda m: any_grad(m, torch.ones(2, 3).double()),
        r"the gradient has dtype torch\.float64 but the parameter has torch\.float32",
    ),
    Bad(
        "grad_inner_dtype",
        lambda m: setattr(m.bad.grad, "data", torch.ones(2, 3).double()),
        r"the gradient has dtype torch\.float64 but",
    ),
    Bad(
        "grad_inner_shape",
        lambda m: setattr(m.bad.grad, "data", torch.ones(3, 2)),
        r"the gradient has shape \(3, 2\) but the parameter has \(2, 3\)",
    ),
    Bad(
        "grad_sparse",
        lambda m: m.set_grad(torch.ones(2, 3).to_sparse()),
        r"^Adam does not support sparse gradients, please consider SparseAdam instead "
        r".*param_groups\[1\]\['params'\]\[1\] \('second\.1'\)",
        named=False,
    ),
    # the state
    Bad("state_missing", lambda m: m.state().pop("exp_avg_sq"), r"state 'exp_avg_sq' is missing", fresh=False),
    Bad(
        "state_dtype",
        lambda m: set_state(m, "exp_avg", torch.ones(2, 3).double()),
        r"state 'exp_avg' has dtype torch\.float64 but the parameter has torch\.float32",
        fresh=False,
    ),
    Bad(
        "state_inner_dtype",
        lambda m: setattr(m.state()["exp_avg"], "data", torch.ones(2, 3).half()),
        r"state 'exp_avg' has dtype torch\.float16 but",
        fresh=False,
    ),
    Bad(
        "state_shape",
        lambda m: set_state(m, "exp_avg_sq", torch.ones(3, 2)),
        r"state 'exp_avg_sq' has shape \(3, 2\) but the parameter has \(2, 3\)",
        fresh=False,
    ),
    Bad(
        "state_resized", lambda m: m.state()["exp_avg"].resize_(6), r"state 'exp_avg' has shape \(6,\) but", fresh=False
    ),
    Bad(
        "state_meta",
        lambda m: set_state(m, "exp_avg", torch.ones(2, 3, device="meta")),
        r"state 'exp_avg' .*meta",
        fresh=False,
    ),
    Bad(
        "state_no_tensor",
        lambda m: set_state(m, "exp_avg", [0.0] * 6),
        r"state 'exp_avg' is not a tensor but a list",
        fresh=False,
    ),
    Bad(
        "state_sparse", lambda m: set_state(m, "exp_avg", torch.ones(2, 3).to_sparse()), r"state 'exp_avg'", fresh=False
    ),
    Bad(
        "state_neg",
        lambda m: set_state(m, "exp_avg", torch._neg_view(torch.ones(2, 3))),
        r"state 'exp_avg' is a conjugate or negative view",
        fresh=False,
    ),
    Bad(
        "state_expanded",
        lambda m: set_state(m, "exp_avg", torch.ones(1).expand(2, 3)),
        r"state 'exp_avg' has elements that share memory",
        fresh=False,
    ),
    Bad(
        "state_shared",
        lambda m: set_state(m, "exp_avg", m.state(m.other)["exp_avg"]),
        r"state 'exp_avg' shares memory with param_groups\[0\]\['params'\]\[2\] \(its state 'exp_avg'\)",
        fresh=False,
    ),
    Bad(
        "state_is_the_parameter", lambda m: set_state(m, "exp_avg", m.bad.detach()), r"shares memory with", fresh=False
    ),
    Bad(
        "state_is_another_gradient",
        lambda m: setattr(m.state()["exp_avg"], "data", m.other.grad),
        r"shares memory with",
        fresh=False,
        named=False,
    ),
    Bad("state_not_a_dict", lambda m: m.optimizer.state.__setitem__(m.bad, [1]), r"the state must be a dict"),
    Bad("step_missing", lambda m: m.state().pop("step"), r"state 'step' is missing", fresh=False),
    Bad(
        "step_int",
        lambda m: set_state(m, "step", torch.tensor(1)),
        r"state 'step' .*(int64|float32 or torch\.float64)",
        fresh=False,
    ),
    Bad(
        "step_negative_view",
        lambda m: set_state(m, "step", torch._neg_view(torch.tensor(-5.0))),
        r"state 'step' must be a one-element real tensor and no lazy view",
        fresh=False,
    ),
    Bad(
        "step_two",
        lambda m: set_state(m, "step", torch.ones(2)),
        r"state 'step' must be a one-element real tensor and no lazy view, got torch\.float32 of shape \(2,\)",
        fresh=False,
    ),
    Bad("step_number", lambda m: set_state(m, "step", 3.0), r"state 'step' is not a tensor but a float", fresh=False),
    Bad(
        "step_meta", lambda m: set_state(m, "step", torch.ones((), device="meta")), r"state 'step' .*meta", fresh=False
    ),
    Bad(
        "step_shared",
        lambda m: set_state(m, "step", m.state(m.other)["step"]),
        r"state 'step'.* shares memory",
        fresh=False,
    ),
    Bad(
        "step_is_an_element_of_the_parameter",
        lambda m: set_state(m, "step", m.bad.detach()[0, 0]),
        r"state 'step'.* shares memory",
        fresh=False,
    ),
    # the group
    Bad(
        "group_lacks_lr",
        lambda m: m.group.pop("lr"),
        r"param_groups\[1\]\['lr'\] is missing",
        error=KeyError,
        named=False,
    ),
    Bad(
        "group_lacks_betas",
        lambda m: m.group.pop("betas"),
        r"param_groups\[1\]\['betas'\] is missing",
        error=KeyError,
        named=False,
    ),
    Bad(
        "lr_text",
        lambda m: m.group.__setitem__("lr", "fast"),
        r"param_groups\[1\]\['lr'\] must be a number or a one-element tensor, got 'fast'",
        error=TypeError,
        named=False,
    ),
    Bad(
        "lr_none",
        lambda m: m.group.__setitem__("lr", None),
        r"param_groups\[1\]\['lr'\] must be",
        error=TypeError,
        named=False,
    ),
    Bad(
        "lr_int_tensor",
        lambda m: m.group.__setitem__("lr", torch.tensor(1)),
        r"param_groups\[1\]\['lr'\] (must be|has dtype torch\.int64)",
        error=TypeError,
        named=False,
    ),
    Bad(
        "lr_two",
        lambda m: m.group.__setitem__("lr", torch.ones(2)),
        r"param_groups\[1\]\['lr'\] must be",
        error=TypeError,
        named=False,
    ),
    Bad(
        "betas_one",
        lambda m: m.group.__setitem__("betas", (0.9,)),
        r"param_groups\[1\]\['betas'\]",
        error=IndexError,
        named=False,
    ),
    Bad(
        "betas_number",
        lambda m: m.group.__setitem__("betas", 0.9),
        r"param_groups\[1\]\['betas'\]",
        error=TypeError,
        named=False,
    ),
    Bad(
        "params_tuple",
        lambda m: m.group.__setitem__("params", tuple(m.group["params"])),
        r"param_groups\[1\]\['params'\] must be a list",
        error=TypeError,
        named=False,
    ),
]


def shifted(m: Model) -> None:
    buffer = torch.arange(8.0)
    m.bad.data = buffer[1:7].view(2, 3)
    m.set_grad(buffer[:6].view(2, 3))


def transposed_self(m: Model) -> None:
    m.set_grad(m.bad.detach().view(3, 2).t())


def any_grad(m: Model, grad: Tensor) -> None:
    """A gradient of another dtype is allowed where grad_dtype says so."""
    m.bad.grad = None
    m.bad.grad_dtype = None
    m.bad.grad = grad


def check(m: Model, bad: Bad) -> None:
    before = snapshot(m.optimizer)
    for _ in range(3):  # not only the first time
        with pytest.raises(bad.error, match=f"{PLACE}.*{bad.message}" if bad.named else bad.message):
            m.optimizer.step()
        assert same(before, snapshot(m.optimizer)), "the step that failed changed something"


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.id)
def test_bad_input_in_training(bad: Bad) -> None:
    m = Model(BY_ID["adam"])
    for _ in range(2):
        m.optimizer.step()
    bad.breaks(m)
    check(m, bad)


@pytest.mark.parametrize("bad", [bad for bad in BAD if bad.fresh], ids=lambda bad: bad.id)
def test_bad_input_at_the_first_step(bad: Bad) -> None:
    m = Model(BY_ID["adamw-decay"])
    bad.breaks(m)
    check(m, bad)


@pytest.mark.parametrize("row", VARIANTS, ids=name_of)
def test_training_goes_on_after_an_error(row: Row) -> None:
    """The error is repeated until its cause is gone; then the bits are those of a run in which it never was."""
    m, spotless = Model(row), Model(row)
    fixes: list[Callable[[Model], Any]] = [
        lambda m: m.set_grad(torch.full((2, 3), 2.0)),
        lambda m: m.set_grad(torch.full((2, 3), 3.0)),
        lambda m: m.set_grad(torch.full((2, 3), -1.0)),
    ]
    breaks: list[Callable[[Model], Any]] = [
        lambda m: m.set_grad(m.other.detach()),
        lambda m: setattr(m.bad.grad, "data", torch.ones(3, 2)),
        lambda m: setattr(m.bad.grad, "data", torch.ones(2, 3).double()),
    ]
    for broken, fix in zip(breaks, fixes, strict=True):
        broken(m)
        for _ in range(2):
            with pytest.raises(RuntimeError):
                m.optimizer.step()
        fix(m), fix(spotless)
        m.optimizer.step(), spotless.optimizer.step()
        for p, q in zip(m.params, spotless.params, strict=True):
            assert torch.equal(p, q)
            assert p._version == q._version
            for key, value in spotless.optimizer.state[q].items():
                assert torch.equal(m.optimizer.state[p][key], value)


def test_memory_moved_in_a_step_that_failed() -> None:
    """What such a step has already noted of the parameters before the bad one must not be trusted afterwards."""
    m = Model(BY_ID["adam"])
    m.optimizer.step()
    m.other.data = m.other.data.clone()
    m.set_grad(torch.ones(2, 3).to_sparse())
    with pytest.raises(RuntimeError, match="sparse"):
        m.optimizer.step()
    m.set_grad(m.other.detach())  # in memory that only the failed step has seen
    with pytest.raises(RuntimeError, match="gradient shares memory"):
        m.optimizer.step()
    m.set_grad(torch.ones(2, 3))
    m.optimizer.step()


def test_overlap_made_in_a_step_that_failed() -> None:
    m = Model(BY_ID["adam"])
    m.optimizer.step()
    m.params[0].data = m.params[1].data
    m.set_grad(torch.ones(2, 3).to_sparse())
    with pytest.raises(RuntimeError, match="sparse"):
        m.optimizer.step()
    m.set_grad(torch.ones(2, 3))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="parameter shares memory"):
            m.optimizer.step()


def test_strided_memory_replaced_in_a_step_that_failed() -> None:
    """The layout that the check of memory has kept must not be a dead one."""
    m = Model(BY_ID["adam"])
    m.other.data = torch.ones(3, 4)[:2, :3]
    m.optimizer.step()
    for _ in range(50):
        m.other.data = torch.ones(20, 40)[:2, :3]
        m.set_grad(torch.ones(2, 3).to_sparse())
        with pytest.raises(RuntimeError, match="sparse"):
            m.optimizer.step()
        m.set_grad(m.other.detach())
        with pytest.raises(RuntimeError, match="gradient shares memory"):
            m.optimizer.step()
        m.set_grad(torch.ones(2, 3))
        m.optimizer.step()


def test_a_gradient_in_the_memory_of_a_parameter_that_sits_out() -> None:
    """Only what the step writes counts: a parameter without a gradient is not written."""
    m = Model(BY_ID["adam"])
    m.optimizer.step()
    m.other.grad = None
    m.set_grad(m.other.detach())
    m.optimizer.step()
    m.other.grad = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="gradient shares memory"):
        m.optimizer.step()


def test_parameters_that_overlap_but_never_step_together() -> None:
    m = Model(BY_ID["adam"])
    m.bad.data = m.other.data
    m.other.grad = None
    m.optimizer.step()
    m.other.grad, m.bad.grad = m.bad.grad, None
    m.optimizer.step()
    m.bad.grad = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="parameter shares memory"):
        m.optimizer.step()


def test_amsgrad_switched_on_says_what_to_do() -> None:
    m = Model(BY_ID["adam"])
    m.optimizer.step()
    m.group["amsgrad"] = True
    before = snapshot(m.optimizer)
    with pytest.raises(RuntimeError, match=r"state 'max_exp_avg_sq' is missing.*Delete this parameter's state"):
        m.optimizer.step()
    assert same(before, snapshot(m.optimizer))
    for p in m.group["params"]:
        del m.optimizer.state[p]
    m.optimizer.step()


def test_without_names_the_place_is_enough() -> None:
    p = torch.ones(3, requires_grad=True)
    p.grad = torch.ones(3)
    q = torch.ones(1).expand(3).requires_grad_()
    q.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"^AdamW: param_groups\[0\]\['params'\]\[1\]: the parameter"):
        BY_ID["adamw"].make([p, q]).step()


def test_messages_are_short() -> None:
    """No stack of C++ frames in them."""
    for bad in BAD:
        m = Model(BY_ID["adam"])
        m.optimizer.step()
        bad.breaks(m)
        with pytest.raises(bad.error) as caught:
            m.optimizer.step()
        assert len(str(caught.value)) < 400, str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_gradient_moved_into_written_memory_while_others_changed(way: str) -> None:
    """Another parameter's change makes the scan begin anew; what it saw of the first must not be forgotten."""
    params = [Parameter(torch.ones(50)) for _ in range(3)]
    for p in params:
        p.grad = torch.ones(50)
    optimizer = BY_ID["adam"].make(params)
    for _ in range(3):
        optimizer.step()
    before = [p.detach().clone() for p in params]
    params[0].grad = params[1].data
    params[2].grad = torch.from_numpy(np.ones(50, dtype=np.float32))  # not torch's memory: read anew
    with pytest.raises(RuntimeError, match="the gradient shares memory"):
        optimizer.step()
    assert all(torch.equal(p.detach(), b) for p, b in zip(params, before, strict=True))
