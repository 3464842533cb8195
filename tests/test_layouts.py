"""Every memory layout gives the bits of contiguous memory, and nothing outside a view is written."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from optimizers import BY_ID, CUDA_ON_HOST, DTYPES, FLOATS, VARIANTS, Row, generator, name_of
from reference import assert_same_bits, torch_loop_step, transcription, varied_values
from torch import Tensor
from torch.nn import Parameter

from fusedopt._config import _C

COMPLEX = [torch.complex64, torch.complex128]


pytestmark = pytest.mark.usefixtures("way")


def real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def dense(tensor: Tensor) -> Tensor:
    """A contiguous real copy."""
    return real(tensor.detach()).resolve_neg().clone(memory_format=torch.contiguous_format)


def storage_of(tensor: Tensor) -> Tensor:
    """The whole storage as bytes."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def units() -> int:
    return sum(_C.units_run().values())


class Pair:
    """The same parameters twice: ours as they come, torch's as contiguous real copies, compared after every step."""

    def __init__(self, row: Row, params: Sequence[Tensor], **more: Any) -> None:
        self.ours = [p.detach().requires_grad_() for p in params]
        self.theirs = [Parameter(dense(p)) for p in params]
        self.optimizer = row.make(self.ours, **more)
        self.expected = row.make_torch(self.theirs, **more)

    def step(self, grads: Sequence[Tensor | None]) -> None:
        for p, q, g in zip(self.ours, self.theirs, grads, strict=True):
            p.grad = g
            q.grad = None if g is None else dense(g)
        ran = units()
        self.optimizer.step()
        assert units() > ran or all(g is None or g.numel() == 0 for g in grads)
        torch_loop_step(self.expected)
        self.check()

    def check(self) -> None:
        for i, (p, q) in enumerate(zip(self.ours, self.theirs, strict=True)):
            assert_same_bits(real(p.detach()), q.detach(), f"parameter {i}")
            mine, wanted = self.optimizer.state[p], self.expected.state[q]
            assert list(mine) == list(wanted)
            for key, value in wanted.items():
                assert_same_bits(real(mine[key]) if key != "step" else mine[key], value, f"{key} of parameter {i}")


def values(dtype: torch.dtype, numel: int, seed: int) -> Tensor:
    return varied_values(numel, dtype, generator(seed), wild=False)


def misaligned(dtype: torch.dtype, seed: int) -> Tensor:
    """Off by a byte. Not for complex dtypes: torch itself crashes on those."""
    memory = bytearray(1) + bytearray(storage_of(values(dtype, 37, seed)).numpy())
    return torch.frombuffer(memory, dtype=dtype, offset=1)


LAYOUTS: dict[str, Callable[[torch.dtype, int], Tensor]] = {
    "contiguous": lambda dtype, seed: values(dtype, 60, seed).view(3, 4, 5),
    "zero_d": lambda dtype, seed: values(dtype, 1, seed).view(()),
    "one_element_of_a_buffer": lambda dtype, seed: values(dtype, 9, seed)[4],
    "empty": lambda dtype, seed: values(dtype, 0, seed),
    "empty_of_a_buffer": lambda dtype, seed: values(dtype, 30, seed).view(5, 6)[2:2, ::2],
    "transposed": lambda dtype, seed: values(dtype, 35, seed).view(5, 7).t(),
    "channels_last": lambda dtype, seed: (
        values(dtype, 120, seed).view(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    ),
    "permuted": lambda dtype, seed: values(dtype, 720, seed).view(2, 3, 4, 5, 6).permute(3, 0, 4, 2, 1),
    "six_d": lambda dtype, seed: values(dtype, 729, seed).view(3, 3, 3, 3, 3, 3).permute(5, 0, 3, 1, 4, 2)[:, 1:],
    "ten_d": lambda dtype, seed: values(dtype, 2**10, seed).view((2,) * 10).permute(7, 1, 9, 3, 5, 0, 2, 8, 4, 6),
    "rows": lambda dtype, seed: values(dtype, 60, seed).view(10, 6)[2:7],
    "columns": lambda dtype, seed: values(dtype, 60, seed).view(10, 6)[:, 1:4],
    "every_other": lambda dtype, seed: values(dtype, 77, seed)[1::2],
    "every_third_of_the_transposed": lambda dtype, seed: values(dtype, 300, seed).view(20, 15).t()[1::3, ::2],
    "diagonal": lambda dtype, seed: values(dtype, 400, seed).view(20, 20).diagonal(),
    "off_by_one": lambda dtype, seed: values(dtype, 66, seed)[1:],
    "size_one_dims": lambda dtype, seed: values(dtype, 60, seed).as_strided((1, 3, 1, 4, 1), (1000, 4, 77, 1, 0)),
    "rows_that_interlock": lambda dtype, seed: values(dtype, 60, seed).as_strided((3, 4), (2, 7), 3),
    "long_rows": lambda dtype, seed: values(dtype, 4000, seed).view(4, 1000)[:, 3:-4],
}


def strides(p: Tensor) -> tuple[int, ...]:
    """Those of a contiguous tensor of this shape."""
    return torch.empty(p.shape, device="meta").stride()


# A gradient of the same shape and other strides.
GRADS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "contiguous": lambda p, seed: values(p.dtype, p.numel(), seed).view(p.shape),
    "reversed": lambda p, seed: (
        values(p.dtype, p.numel(), seed).view(p.shape[::-1]).permute(tuple(range(p.ndim))[::-1])
    ),
    "strided": lambda p, seed: values(p.dtype, 3 * p.numel(), seed).as_strided(p.shape, [3 * s for s in strides(p)]),
    "expanded": lambda p, seed: values(p.dtype, 1, seed).view(()).expand(p.shape),
    "expanded_rows": lambda p, seed: (
        values(p.dtype, max(p.shape[-1:], default=1), seed).view(p.shape[-1:]).expand(p.shape)
    ),
    "as_the_parameter": lambda p, seed: values(p.dtype, p.numel(), seed).view(p.shape).clone().copy_(p).add_(seed),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("row", VARIANTS, ids=name_of)
def test_misaligned(row: Row, dtype: torch.dtype, way: str) -> None:
    params = [misaligned(dtype, seed) for seed in range(3)]
    if way == CUDA_ON_HOST:  # which cannot read it
        param = Parameter(params[0])
        param.grad = values(dtype, 37, 5)
        with pytest.raises(RuntimeError, match="does not begin at a multiple of its element's size"):
            row.make([param]).step()
        return
    pair = Pair(row, params)
    for step in range(3):
        pair.step([values(dtype, 37, 10 * step + seed) for seed in range(3)])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("row", VARIANTS, ids=name_of)
def test_parameter_and_gradient_layouts(row: Row, layout: str) -> None:
    params = [LAYOUTS[layout](torch.float32, seed) for seed in range(len(GRADS))]
    pair = Pair(row, params)
    before = [storage_of(p).clone() for p in params]
    for step in range(3):
        pair.step([make(p, 10 * step + i) for i, (p, make) in enumerate(zip(params, GRADS.values(), strict=True))])
    pair.step([make(p, 77) for p, make in zip(params, reversed(GRADS.values()), strict=True)])  # another for each
    for p, old in zip(params, before, strict=True):
        inside = torch.zeros(old.numel() // p.element_size() + 1, dtype=torch.bool)
        inside.as_strided(p.shape, p.stride(), p.storage_offset()).fill_(True)
        inside = inside.repeat_interleave(p.element_size())
        changed = storage_of(p) != old
        assert not changed[~inside[: len(changed)]].any(), "written outside of the view"
        assert changed.any() or p.numel() == 0


@pytest.mark.parametrize("dtype", [torch.float64, *COMPLEX], ids=name_of)
@pytest.mark.parametrize("row", VARIANTS, ids=name_of)
def test_layouts_of_other_dtypes(row: Row, dtype: torch.dtype) -> None:
    """All layouts in one call, complex parameters as pairs of real ones."""
    params = [make(dtype, seed) for seed, make in enumerate(LAYOUTS.values())]
    pair = Pair(row, params)
    for step, make in enumerate(GRADS.values()):
        pair.step([make(p, 100 * step + i) for i, p in enumerate(params)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("row", VARIANTS, ids=name_of)
def test_layouts_in_low_precision(row: Row, dtype: torch.dtype) -> None:
    params = [make(dtype, seed) for seed, make in enumerate(LAYOUTS.values())]
    ours = [p.detach().requires_grad_() for p in params]
    optimizer = row.make(ours, eps=1e-4)
    formula = transcription(optimizer)
    expected = [(dense(p), formula.first_state(dense(p))) for p in params]
    for step, make in enumerate(GRADS.values(), start=1):
        for i, p in enumerate(ours):
            p.grad = make(p.detach(), 100 * step + i)
        optimizer.step()
        for i, p in enumerate(ours):
            value, state = expected[i]
            expected[i] = value, state = formula.step(value, dense(p.grad), state, step)
            assert_same_bits(p.detach(), value, f"parameter {i} after step {step}")
            for name in state:
                assert_same_bits(optimizer.state[p][name], state[name], f"{name} of parameter {i} after step {step}")


def test_state_of_every_layout() -> None:
    """State tensors may be laid out unlike their parameter."""
    row = BY_ID["adam-amsgrad"]
    params = [make(torch.float32, seed) for seed, make in enumerate(LAYOUTS.values())]
    pair = Pair(row, params)
    pair.step([GRADS["contiguous"](p, i) for i, p in enumerate(params)])
    for p in pair.ours:
        state = pair.optimizer.state[p]
        state["exp_avg"] = GRADS["reversed"](p.detach(), 1).clone().copy_(state["exp_avg"])
        state["exp_avg_sq"] = GRADS["strided"](p.detach(), 1).copy_(state["exp_avg_sq"])
        state["max_exp_avg_sq"] = GRADS["contiguous"](p.detach(), 1).copy_(state["max_exp_avg_sq"])
    for seed in range(2):
        pair.step([GRADS["contiguous"](p, i + seed) for i, p in enumerate(params)])


def conj_of_one_element(p: Tensor, seed: int) -> Tensor:
    """The gradient that autograd leaves on a one-element real parameter: it has the neg bit."""
    q = torch.tensor([2.0 + seed], requires_grad=True)
    torch.complex(torch.ones(1), q).conj().imag.sum().backward()
    assert q.grad is not None
    return q.grad


LAZY: dict[str, tuple[Callable[[], Tensor], Callable[[Tensor, int], Tensor]]] = {
    "imag_of_a_conj": (
        lambda: values(torch.float32, 21, 0),
        lambda p, seed: values(torch.complex64, 21, seed).conj().imag,
    ),
    "neg_view": (
        lambda: values(torch.float64, 21, 0).view(3, 7),
        lambda p, seed: torch._neg_view(values(torch.float64, 21, seed).view(7, 3).t()),
    ),
    "conj": (
        lambda: values(torch.complex64, 21, 0).view(3, 7),
        lambda p, seed: values(torch.complex64, 21, seed).view(7, 3).t().conj(),
    ),
    "conj_and_neg": (
        lambda: values(torch.complex128, 21, 0),
        lambda p, seed: torch._neg_view(values(torch.complex128, 21, seed).conj()),
    ),
}


@pytest.mark.parametrize("lazy", LAZY)
@pytest.mark.parametrize("row", VARIANTS, ids=name_of)
def test_conj_and_neg_gradients(row: Row, lazy: str) -> None:
    make_param, make_grad = LAZY[lazy]
    param = make_param()
    pair = Pair(row, [param, param.clone()])
    for step in range(4):
        grad = make_grad(param, step)
        assert grad.is_conj() or grad.is_neg()
        # The other parameter's alternates between lazy and not, at one address and strides.
        other = make_grad(param, 9)
        pair.step([grad, other if step % 2 else other.resolve_conj().resolve_neg()])


def test_the_same_gradient_turns_into_its_conj() -> None:
    """Only a bit differs: address, shape and strides stay."""
    pair = Pair(BY_ID["adam"], [values(torch.complex64, 8, 0)])
    grad = values(torch.complex64, 8, 1)
    for g in (grad, grad.conj(), grad, torch._neg_view(grad)):
        assert g.data_ptr() == grad.data_ptr()
        pair.step([g])


def test_gradients_as_a_complex_backward_leaves_them() -> None:
    q, p = torch.tensor([0.5], requires_grad=True), torch.tensor([2.0], requires_grad=True)
    w = values(torch.complex64, 4, 0).requires_grad_()
    optimizer = BY_ID["adam"].make([q, p, w])
    theirs = [Parameter(dense(t)) for t in (q, p, w)]
    expected = BY_ID["adam"].make_torch(theirs)
    seen = set()
    for _ in range(3):
        optimizer.zero_grad()
        z = torch.complex(q, p).conj()
        (
            torch.view_as_real(z.resolve_conj()).sum()
            + z.imag.sum() * 3
            + (w.conj() * values(torch.complex64, 4, 3)).abs().sum()
        ).backward()
        for t, u in zip((q, p, w), theirs, strict=True):
            assert t.grad is not None
            seen.add((t.grad.is_conj(), t.grad.is_neg()))
            u.grad = dense(t.grad)
        torch_loop_step(expected)
        optimizer.step()
        for t, u in zip((q, p, w), theirs, strict=True):
            assert_same_bits(real(t.detach()), u.detach())


@pytest.mark.parametrize("row", VARIANTS, ids=name_of)
def test_interleaved_columns_of_one_buffer(row: Row) -> None:
    """Two parameters whose extents overlap but whose elements do not; gradients interleaved too, in other memory."""
    buffer, grads = values(torch.float32, 200, 0).view(20, 10), values(torch.float32, 200, 1).view(20, 10)
    parts = [slice(0, None, 2), slice(1, None, 4), slice(3, 8, 4)]
    pair = Pair(row, [buffer[:, part] for part in parts])
    for step in range(3):
        pair.step([grads[:, part] * 1.0 if step == 1 else grads[:, part] for part in parts])
    assert_same_bits(torch.cat([p.detach() for p in pair.ours], 1), torch.cat([q.detach() for q in pair.theirs], 1))


def test_parameters_beside_each_other_in_one_buffer() -> None:
    """Flattened parameters, and gradients that are views of one bucket."""
    buffer, bucket = values(torch.float32, 1001, 0), values(torch.float32, 1001, 1)
    sizes = (1, 0, 7, 16, 400, 577)
    pair = Pair(BY_ID["adamw-decay"], list(buffer.split(sizes)))
    for _ in range(3):
        bucket.mul_(-0.9)
        pair.step(list(bucket.split(sizes)))
    assert_same_bits(buffer, torch.cat([q.detach() for q in pair.theirs]))


def test_a_gradient_that_is_the_parameter() -> None:
    for layout in ("contiguous", "every_other", "transposed"):
        p = LAYOUTS[layout](torch.float32, 0)
        pair = Pair(BY_ID["adam-decay"], [p])
        for _ in range(3):
            pair.step([pair.ours[0].detach()])


def test_gradients_that_share_memory() -> None:
    """Two parameters may have the same gradient, or overlapping ones: they are only read."""
    grad = values(torch.float32, 20, 1)
    pair = Pair(BY_ID["adam"], [values(torch.float32, 12, seed) for seed in range(3)])
    for _ in range(2):
        pair.step([grad[:12], grad[:12], grad[5:17]])


@pytest.mark.parametrize("order", [1, -1])
def test_mixed_dtypes_and_groups_in_one_call(order: int) -> None:
    """Every dtype in every one of five groups with options of their own: the bits of each group on its own."""
    options: list[dict[str, Any]] = [
        {"lr": 1e-2},
        {"lr": 1e-3, "weight_decay": 0.1, "maximize": True},
        {"amsgrad": True, "betas": (0.5, 0.9)},
        {"lr": torch.tensor(3e-3), "decoupled_weight_decay": True, "weight_decay": 0.3, "eps": 1e-5},
        {"betas": (0.3, 0.99), "amsgrad": True, "maximize": True, "eps": 1e-12},
    ]
    row = BY_ID["adam"]
    dtypes = [torch.float32, torch.bfloat16, torch.complex64, torch.float64, torch.float16, torch.complex128][::order]

    def params() -> list[list[Tensor]]:
        return [[values(dtype, 5 + 13 * i, i).requires_grad_() for i, dtype in enumerate(dtypes)] for _ in options]

    ours, alone = params(), params()
    optimizer = row.make([{"params": group, **option} for group, option in zip(ours, options, strict=True)])
    singles = [[row.make([p], **option) for p in group] for group, option in zip(alone, options, strict=True)]
    exact = {
        (g, i): row.make_torch([Parameter(dense(p))], **options[g])
        for g, group in enumerate(ours)
        for i, p in enumerate(group)
        if p.dtype not in DTYPES[2:]
    }
    for step in range(3):
        for g, group in enumerate(ours):
            for i, p in enumerate(group):
                if (g + i + step) % 5 == 0:
                    p.grad = alone[g][i].grad = None
                    if (g, i) in exact:
                        exact[g, i].param_groups[0]["params"][0].grad = None
                    continue
                p.grad = values(p.dtype, p.numel(), 100 * step + 10 * g + i)
                alone[g][i].grad = p.grad.clone()
                if (g, i) in exact:
                    exact[g, i].param_groups[0]["params"][0].grad = dense(p.grad)
        optimizer.step()
        for g, group in enumerate(ours):
            for i, p in enumerate(group):
                singles[g][i].step()
                assert_same_bits(p.detach(), alone[g][i].detach(), f"group {g}, parameter {i}, step {step}")
                if (g, i) in exact:
                    torch_loop_step(exact[g, i])
                    q = exact[g, i].param_groups[0]["params"][0]
                    assert_same_bits(real(p.detach()), q.detach(), f"group {g}, parameter {i}, step {step}")


def test_an_empty_parameter_in_any_place() -> None:
    for place in range(3):
        sizes = [7, 9]
        sizes.insert(place, 0)
        pair = Pair(BY_ID["adam-amsgrad"], [values(torch.float32, n, n) for n in sizes])
        for step in range(2):
            pair.step([values(torch.float32, n, step) for n in sizes])


def test_only_empty_parameters_and_none_at_all() -> None:
    pair = Pair(BY_ID["adam"], [torch.zeros(0), torch.zeros(3, 0, 2)])
    pair.step([None, None])
    assert len(pair.optimizer.state[pair.ours[0]]) == 0
    pair.step([torch.zeros(0), torch.zeros(3, 0, 2)])
    assert pair.optimizer.state[pair.ours[1]]["step"].item() == 1
    pair.optimizer.param_groups[0]["params"].clear()
    pair.optimizer.step()


def test_as_many_dimensions_as_torch_has() -> None:
    shape = (1,) * 30 + (2,) + (1,) * 20 + (3,) + (1,) * 12
    assert len(shape) == 64
    pair = Pair(BY_ID["adam"], [values(torch.float32, 24, 0)[::4].view(shape)])
    pair.step([values(torch.float32, 6, 1).view(shape)])
    flat, deep = (
        values(torch.complex64, 6, 0).requires_grad_(),
        values(torch.complex64, 6, 0).view(shape).requires_grad_(),
    )
    for p in (flat, deep):  # torch has no real view of this one
        p.grad = values(torch.complex64, 6, 1).view(p.shape)
        BY_ID["adam"].make([p]).step()
    assert_same_bits(deep.detach().view(6), flat.detach())


def test_the_quick_check_is_in_use(way: str) -> None:
    """Known to hold for the torch that the tests run with; another torch may fall back to DLPack."""
    assert _C.build_info()["signatures"] == (way != "by_dlpack")
