"""Sparse gradients of Adagrad: torch's bits, and no row that is not touched."""

import copy
import gc
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizers import CUDA_ON_HOST, FLOATS, generator, name_of
from reference import Transcription, assert_same_bits, correctly_rounded_sqrt, transcription
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from fusedopt._config import _C

# Of the whole tensor, and how many of its dimensions are sparse.
SHAPES = [((40,), 1), ((9, 7), 2), ((50, 64), 1), ((50, 16), 1), ((50, 7), 1), ((30, 300), 1), ((8, 9, 5), 2)]
SHAPES += [((50, 4, 6), 1), ((50, 1), 1), ((1, 33), 1), ((6, 5, 4), 3)]
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch.optim.Adagrad makes unchecked ones

OPTIONS: list[dict[str, Any]] = [
    {},
    {"maximize": True, "lr_decay": 0.1},
    {"initial_accumulator_value": 0.5, "eps": 1e-3},
]


def sparse(indices: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.sparse_coo_tensor(indices, values, shape, check_invariants=True)


def make_grad(shape: tuple[int, ...], dims: int, count: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of very different magnitude, so that the order of a sum shows; most places come up more than once."""
    g = generator(seed)
    indices = torch.stack([torch.randint(0, max(size * 2 // 3, 1), (count,), generator=g) for size in shape[:dims]])
    magnitude = 10 ** torch.randn(count, *shape[dims:], generator=g, dtype=torch.float64)
    values = torch.randn(count, *shape[dims:], generator=g, dtype=torch.float64) * magnitude
    return sparse(indices, values.to(dtype), shape)


def make_param(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Parameter:
    return Parameter(torch.randn(shape, generator=generator(seed), dtype=dtype))


class Pair:
    """Ours beside torch's loop with a correctly rounded square root, fed with the same gradients."""

    def __init__(self, params: list[Parameter], **options: Any) -> None:
        self.ours, self.theirs = params, [Parameter(p.detach().clone()) for p in params]
        self.optimizer = fusedopt.Adagrad(self.ours, **options)
        self.expected = torch.optim.Adagrad(self.theirs, foreach=False, **options)

    def step(self, *grads: Tensor) -> None:
        for p, q, grad in zip(self.ours, self.theirs, grads, strict=True):
            p.grad = q.grad = grad  # a clone would have other strides
        self.optimizer.step()
        with correctly_rounded_sqrt():
            self.expected.step()
        for i, (p, q) in enumerate(zip(self.ours, self.theirs, strict=True)):
            assert_same_bits(p, q, f"parameter {i}")
            for name, value in self.expected.state[q].items():
                assert_same_bits(self.optimizer.state[p][name], value, f"{name} of parameter {i}")


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("shape", "dims"), SHAPES, ids=str)
def test_torchs_bits(shape: tuple[int, ...], dims: int, options: dict[str, Any], dtype: torch.dtype, way: str) -> None:
    pair = Pair([make_param(shape, dtype)], **options)
    for step, count in enumerate((1, 5, 200, 0, 64, 200)):
        grad = make_grad(shape, dims, count, step, dtype)
        if step == 4 or (step == 5 and way == CUDA_ON_HOST):
            grad = grad.coalesce()
        pair.step(grad)


LAYOUTS: dict[str, tuple[tuple[int, ...], int, Callable[[Tensor], Tensor]]] = {
    "vector": ((40,), 1, lambda t: t),
    "strided": ((40,), 1, lambda t: torch.stack([t, t], 1)[:, 0]),
    "transposed": ((9, 7), 2, lambda t: t.mT.contiguous().mT),
    "a_column": ((40, 1), 1, lambda t: t),
    "number": ((), 0, lambda t: t),
}


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_single_element(layout: str, count: int) -> None:
    """Where one is touched in all torch takes another way, and rounds a product more, of contiguous parameters."""
    shape, dims, arrange = LAYOUTS[layout]
    for seed in range(100):
        param = arrange(torch.randn(shape, dtype=torch.float64, generator=generator(seed)))
        twin = torch.empty_strided(param.shape, param.stride(), dtype=param.dtype).copy_(param)
        pair = Pair([Parameter(param)])
        pair.theirs[0].data = twin
        for step in range(2):
            g = generator(10 * seed + step)
            indices = torch.randint(0, 4, (dims, count), generator=g) if layout != "a_column" else None
            if indices is None or seed % 2:
                indices = torch.zeros(dims, count, dtype=torch.int64)
            values = torch.randn(count, *shape[dims:], dtype=torch.float64, generator=g)
            pair.step(sparse(indices, values, shape))


@pytest.mark.parametrize("maximize", [False, True])
def test_expanded_indices(maximize: bool) -> None:
    """torch's order of the values depends on the strides of the indices; negating a gradient makes them contiguous."""
    for seed in range(20):
        pair = Pair([make_param((5,))], maximize=maximize)
        indices = torch.tensor([[seed % 5]]).expand(1, 64)
        values = torch.randn(64, generator=generator(seed)) * 10 ** torch.randn(64, generator=generator(seed + 100))
        pair.step(torch.sparse_coo_tensor(indices, values, (5,), check_invariants=True))


def test_dense_and_sparse_in_one_call(capability: str) -> None:
    """One optimizer, one native call; parameters change from one to the other between steps."""
    pair = Pair([make_param(shape, seed=i) for i, (shape, _) in enumerate(SHAPES)], lr=0.1)
    calls = []
    native = pair.optimizer._stepper

    class Counting:
        def step(self, *args: Any) -> Any:
            calls.append(1)
            return native.step(*args)

    pair.optimizer._stepper = Counting()
    for step in range(6):
        dense = [i for i in range(len(SHAPES)) if (i + step) % 3 == 0]
        grads = [make_grad(shape, dims, 60, 10 * step + i) for i, (shape, dims) in enumerate(SHAPES)]
        pair.step(*[grad.to_dense() if i in dense else grad for i, grad in enumerate(grads)])
    assert len(calls) == 6


def test_many_rows_on_threads(
    capability: str, threads: Callable[[int], None], chunk_size: Callable[[int], None]
) -> None:
    shape = (3000, 48)
    params = [make_param(shape), make_param((5000,), seed=1)]
    grads = [make_grad(shape, 1, 4000, 2), make_grad((5000,), 1, 9000, 3)]
    pair = Pair(params)
    threads(3)
    chunk_size(1000)
    for _ in range(3):
        pair.step(*[grad.clone() for grad in grads])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_low_precision(dtype: torch.dtype, capability: str) -> None:
    """Values in one place are added up in float32, and the sum is not rounded.

    On a GPU torch's coalesce adds up, and rounds.
    """
    for (shape, dims), options in [(SHAPES[0], {}), (SHAPES[2], {"maximize": True}), (SHAPES[4], {"eps": 1e-4})]:
        param = make_param(shape, dtype)
        optimizer = fusedopt.Adagrad([param], eps_inside_sqrt=True, **{"eps": 1e-6, **options})
        formula = transcription(optimizer)
        expected, state = param.detach().clone(), formula.first_state(param)
        for step in range(1, 4):
            param.grad = make_grad(shape, dims, 100, step, dtype)
            if capability == CUDA_ON_HOST:
                param.grad = param.grad.coalesce()
            expected, state = transcribed(formula, expected, param.grad, state, step)
            optimizer.step()
            assert_same_bits(param.detach(), expected)
            assert_same_bits(optimizer.state[param]["sum"], state["sum"])


def transcribed(
    formula: Transcription, param: Tensor, grad: Tensor, state: dict[str, Tensor], count: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """A sparse step in float32 by torch's own operations on the touched elements, each rounded, but for the fma."""
    group = formula.group
    sign = -1.0 if group["maximize"] else 1.0
    whole = torch.sparse_coo_tensor(grad._indices(), sign * grad._values().float(), grad.shape, check_invariants=True)
    whole = whole._coalesced_(grad.is_coalesced()).coalesce()
    at = tuple(whole.indices())
    g = whole.values()
    total = state["sum"].float()[at] + g * g
    with correctly_rounded_sqrt():
        quotient = g / (total + group["eps"]).sqrt()
    rate = torch.tensor(-group["lr"] / (1 + (count - 1) * group["lr_decay"])).double()
    # Exact but for a sum that is rounded twice: never wrong for values of 16 bits that differ so little.
    new = (param.float()[at].double() + rate.float().double() * quotient.double()).float()
    param, sums = param.clone(), state["sum"].clone()
    param[at], sums[at] = new.to(param.dtype), total.to(param.dtype)
    return param, {"sum": sums}


@pytest.mark.parametrize("shape", [(30, 4), (30,)], ids=str)
def test_complex_parameters_are_pairs_of_real_ones(shape: tuple[int, ...], capability: str) -> None:
    param = Parameter(torch.randn(shape, dtype=torch.complex64, generator=generator(1)))
    real = Parameter(torch.view_as_real(param.detach()).clone())
    ours, twin = fusedopt.Adagrad([param]), fusedopt.Adagrad([real])
    for step in range(3):
        grad = make_grad((*shape, 2), 1, 20, step)
        real.grad = grad
        param.grad = sparse(grad._indices(), torch.view_as_complex(grad._values()), shape)
        if step == 2:
            param.grad = param.grad.conj()
            real.grad = sparse(grad._indices(), grad._values() * torch.tensor([1.0, -1.0]), (*shape, 2))
        ours.step(), twin.step()
        assert_same_bits(torch.view_as_real(param.detach()), real.detach())


# --- layouts -------------------------------------------------------------------------------------------------------


def test_layouts_of_everything(way: str) -> None:
    """Strided parameters, state and values: as if all were contiguous."""
    shape = (20, 6, 5)
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.mT.contiguous().mT,
        lambda t: t.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        lambda t: torch.stack([t, t], -1)[..., 1],
        lambda t: torch.cat([t, t], 1)[:, 3:9].copy_(t),
    ]
    for dims in (1, 2):
        for i, layout in enumerate(layouts):
            plain = make_param(shape)
            param = layout(plain.detach().clone()).requires_grad_()
            ours, expected = fusedopt.Adagrad([param]), fusedopt.Adagrad([plain])
            ours.state[param]["sum"] = layouts[i - 1](ours.state[param]["sum"])
            for step in range(3):
                grad = plain.grad = make_grad(shape, dims, 25, step)
                values = grad._values()
                strided = torch.stack([values, values], 1)[:, 1] if step else values.flip(0).contiguous().flip(0)
                indices = grad._indices().t().contiguous().t()
                param.grad = sparse(indices, strided, shape)
                ours.step(), expected.step()
                assert_same_bits(param.detach().contiguous(), plain.detach())
                assert_same_bits(ours.state[param]["sum"].contiguous(), expected.state[plain]["sum"])


def test_expanded_values(capability: str) -> None:
    """One value for all, as the backward of a sum gives: stride 0."""
    pair = Pair([make_param((10, 8)), make_param((10,), seed=1)])
    indices = torch.tensor([[1, 7, 1, 3]])
    pair.step(sparse(indices, torch.ones(1).expand(4, 8), (10, 8)), sparse(indices, torch.ones(1).expand(4), (10,)))


def test_an_embeddings_own_gradients(capability: str) -> None:
    """nn.Embedding(sparse=True) and EmbeddingBag beside a dense layer, as they are used."""

    def model() -> torch.nn.ModuleList:
        torch.manual_seed(0)
        parts = [torch.nn.Embedding(50, 8, sparse=True), torch.nn.EmbeddingBag(40, 8, sparse=True, mode="sum")]
        return torch.nn.ModuleList([*parts, torch.nn.Linear(8, 1)])

    mine, theirs = model(), model()
    ours = fusedopt.Adagrad(mine.parameters(), lr=0.1)
    expected = torch.optim.Adagrad(theirs.parameters(), lr=0.1, foreach=False)
    for step in range(5):
        words = torch.randint(0, 40, (6, 7), generator=generator(step))
        for (embedding, bag, linear), optimizer in ((mine, ours), (theirs, expected)):
            optimizer.zero_grad()
            (linear(embedding(words).sum(1) + bag(words)) ** 2).sum().backward()
        # The backward of the second is not repeatable to the bit from model to model once they differ, so it is shared.
        for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
            q.grad = p.grad.clone() if p.grad is not None else None
        ours.step()
        with correctly_rounded_sqrt():
            expected.step()
        for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert_same_bits(p.detach(), q.detach())


# --- what is not touched -------------------------------------------------------------------------------------------


def test_other_rows_are_not_written(capability: str) -> None:
    """They hold NaN of all kinds: reading one and writing it back would show, too."""
    shape, touched = (200, 24), torch.tensor([[3, 77, 3, 199]])
    patterns = torch.randint(0x7F800001, 0x7FFFFFFF, shape, dtype=torch.int32, generator=generator(4))
    param, total = Parameter(patterns.view(torch.float32).clone()), patterns.flip(0).view(torch.float32).clone()
    for t in (param.data, total):
        t[touched[0]] = 1.0
    optimizer = fusedopt.Adagrad([param])
    optimizer.state[param]["sum"] = total
    before = [t.detach().clone().view(torch.int32) for t in (param, total)]
    param.grad = sparse(touched, torch.ones(4, 24), shape)
    optimizer.step()
    rest = torch.ones(200, dtype=torch.bool)
    rest[touched[0]] = False
    for t, old in zip((param.detach(), total), before, strict=True):
        assert torch.equal(t.view(torch.int32)[rest], old[rest])
        assert not torch.equal(t.view(torch.int32)[~rest], old[~rest])


def test_rows_far_apart_take_no_more_work() -> None:
    """The units of work are those of the touched rows, whatever the size of the table."""
    units = []
    for rows in (1000, 100_000):
        param = make_param((rows, 64))
        optimizer = fusedopt.Adagrad([param])
        param.grad = sparse(torch.arange(0, rows, rows // 1000)[None], torch.ones(1000, 64), (rows, 64))
        before = sum(_C.units_run().values())
        optimizer.step()
        units.append(sum(_C.units_run().values()) - before)
    assert units[0] == units[1] > 0


def test_no_values_at_all(capability: str) -> None:
    """The step counts, and changes nothing."""
    empty = sparse(torch.empty(1, 0, dtype=torch.int64), torch.empty(0, 4), (10, 4))
    param = make_param((10, 4))
    other = make_param((0, 4))
    before = param.detach().clone()
    optimizer = fusedopt.Adagrad([param, other])
    for _ in range(2):
        param.grad = empty
        other.grad = sparse(torch.empty(1, 0, dtype=torch.int64), torch.empty(0, 4), (0, 4))
        optimizer.step()
    assert_same_bits(param.detach(), before)
    assert optimizer.state[param]["step"] == optimizer.state[other]["step"] == 2


# --- around the step -----------------------------------------------------------------------------------------------


def test_gradients_stay_as_they_are(capability: str) -> None:
    param = make_param((20, 5))
    grad = make_grad((20, 5), 1, 30, 0)
    before = copy.deepcopy(grad)
    param.grad = grad
    version = param._version
    fusedopt.Adagrad([param]).step()
    assert param.grad is grad and not grad.is_coalesced()
    assert_same_bits(grad._values(), before._values())
    assert torch.equal(grad._indices(), before._indices())
    assert param._version == version + 1


@pytest.mark.parametrize("scale", [1024.0, 3000.0])
def test_grad_scaler(scale: float, capability: str) -> None:
    """Each value is unscaled, and then added up, as by GradScaler.unscale_ before torch's step."""
    pair = Pair([make_param((30, 6)), make_param((30,), seed=1)])
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    for step in range(3):
        grads = [make_grad((30, 6), 1, 50, step), make_grad((30,), 1, 50, step)]
        if capability == CUDA_ON_HOST and scale != 1024:
            grads = [grad.coalesce() for grad in grads]  # else coalesced before it is unscaled
        for params, optimizer in ((pair.ours, pair.optimizer), (pair.theirs, pair.expected)):
            scaler.scale(torch.ones(()))
            for p, grad in zip(params, grads, strict=True):
                p.grad = sparse(grad._indices().clone(), grad._values().clone(), grad.shape)
                p.grad._coalesced_(grad.is_coalesced())
            with correctly_rounded_sqrt():
                scaler.step(optimizer)
        scaler.update()
        for p, q in zip(pair.ours, pair.theirs, strict=True):
            assert_same_bits(p.detach(), q.detach())
    # An inf in one of them: nothing moves.
    before = pair.ours[0].detach().clone()
    pair.ours[0].grad._values()[3, 2] = math.inf
    scaler.scale(torch.ones(()))
    scaler.step(pair.optimizer)
    assert_same_bits(pair.ours[0].detach(), before)


def test_share_memory() -> None:
    """The sums in shared memory are updated there."""
    params = [make_param((20, 5)), make_param((7,))]
    pair = Pair(params)
    pair.step(make_grad((20, 5), 1, 30, 0), torch.ones(7))
    pair.optimizer.share_memory()
    sums = [pair.optimizer.state[p]["sum"] for p in params]
    assert all(total.is_shared() for total in sums)
    pair.step(make_grad((20, 5), 1, 30, 1), torch.ones(7))
    assert all(pair.optimizer.state[p]["sum"] is total for p, total in zip(params, sums, strict=True))


# --- errors --------------------------------------------------------------------------------------------------------


def unchecked(indices: Any, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.sparse_coo_tensor(torch.tensor(indices), values, shape, check_invariants=False)


ERRORS = {
    "beyond": (lambda: unchecked([[0, 10]], torch.ones(2, 4), (10, 4)), r"index 10 in dimension 0 of size 10"),
    "negative": (lambda: unchecked([[0, -1]], torch.ones(2, 4), (10, 4)), r"index -1 in dimension 0 of size 10"),
    "second_dimension": (
        lambda: unchecked([[0, 1], [3, 4]], torch.ones(2), (10, 4)),
        r"index 4 in dimension 1 of size 4",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_indices_out_of_range(name: str) -> None:
    make, message = ERRORS[name]
    params = [make_param((3,)), make_param((10, 4))]
    optimizer = fusedopt.Adagrad([("bias", params[0]), ("table", params[1])])
    params[0].grad, params[1].grad = torch.ones(3), make()
    before = [p.detach().clone() for p in params]
    with pytest.raises(
        RuntimeError, match=rf"param_groups\[0\]\['params'\]\[1\] \('table'\): the gradient .*{message}"
    ):
        optimizer.step()
    for p, old in zip(params, before, strict=True):
        assert_same_bits(p.detach(), old)
    assert all(state["step"] == 0 for state in optimizer.state.values())


def test_indices_out_of_range_on_a_device(set_capability: Callable[[str], None]) -> None:
    """The host does not see them there: they are left out."""
    set_capability(CUDA_ON_HOST)
    param = make_param((10, 4))
    before = param.detach().clone()
    param.grad = unchecked([[-1, 2, 10]], torch.ones(3, 4), (10, 4))._coalesced_(True)
    fusedopt.Adagrad([param]).step()
    changed = (param.detach() != before).any(1)
    assert changed.nonzero().flatten().tolist() == [2]


def test_repeats_in_a_gradient_that_claims_to_be_coalesced() -> None:
    """On the CPU the indices are looked at, not the flag: they are added up."""
    results = []
    for claims in (False, True):
        param = make_param((10, 4))
        param.grad = sparse(torch.tensor([[7, 2, 7]]), torch.arange(12.0).view(3, 4), (10, 4))._coalesced_(claims)
        fusedopt.Adagrad([param]).step()
        results.append(param.detach())
    assert_same_bits(*results)


def test_weight_decay_is_refused_before_anything_changes() -> None:
    params = [make_param((3,)), make_param((10, 4))]
    optimizer = fusedopt.Adagrad(params, weight_decay=0.1)
    params[0].grad, params[1].grad = torch.ones(3), make_grad((10, 4), 1, 5, 0)
    before = params[0].detach().clone()
    with pytest.raises(RuntimeError, match=r"^weight_decay option is not compatible with sparse gradients \(Adagrad: "):
        optimizer.step()
    assert_same_bits(params[0].detach(), before)


def test_values_in_what_is_written() -> None:
    param = make_param((10, 4))
    param.grad = sparse(torch.tensor([[1, 5]]), param.detach()[3:5], (10, 4))
    with pytest.raises(RuntimeError, match=r"the gradient shares memory with param_groups\[0\]\['params'\]\[0\]"):
        fusedopt.Adagrad([param]).step()


def test_indices_in_what_is_written() -> None:
    """The kernel reads them when they have been checked."""
    param = make_param((64,), torch.float64)
    optimizer = fusedopt.Adagrad([param])
    indices = optimizer.state[param]["sum"].view(torch.int64)
    indices.copy_((torch.arange(64) + 32) % 64)
    param.grad = torch.sparse_coo_tensor(indices[None], torch.ones(64).double(), (64,), check_invariants=True)
    with pytest.raises(RuntimeError, match=r"the gradient's indices share memory with .* \(its state 'sum'\)"):
        optimizer.step()


def test_freed_indices_and_values() -> None:
    for part in ("_indices", "_values"):
        param = make_param((10, 4))
        param.grad = make_grad((10, 4), 1, 5, 0)
        getattr(param.grad, part)().untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match=r"\['params'\]\[0\]: the gradient .*no memory"):
            fusedopt.Adagrad([param]).step()


def test_weight_decay_on_a_device_is_refused(set_capability: Callable[[str], None], cuda_library: Any) -> None:
    """Its value is not known, so it may not be zero."""
    _C.set_cuda_on_host(cuda_library._name, True)
    param = make_param((10, 4))
    optimizer = fusedopt.Adagrad([param], fused=True)
    optimizer.param_groups[0]["weight_decay"] = torch.tensor(0.5)
    param.grad = make_grad((10, 4), 1, 5, 0)
    try:
        with pytest.raises(RuntimeError, match="weight_decay option is not compatible with sparse gradients"):
            optimizer.step()
    finally:
        _C.set_cuda_on_host("", False)


def test_state_cleared_by_a_mode_in_the_step() -> None:
    """Python code that torch calls while a gradient is taken apart."""
    param = make_param((10, 4))
    optimizer = fusedopt.Adagrad([param])
    param.grad = make_grad((10, 4), 1, 5, 0)
    optimizer.step()

    class Clearing(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "_values" in str(func):
                optimizer.state.clear()
                gc.collect()
            return func(*args, **(kwargs or {}))

    with Clearing():
        optimizer.step()  # with what it had
    assert not optimizer.state


def test_state_missing_or_of_another_dtype() -> None:
    param = make_param((10, 4))
    optimizer = fusedopt.Adagrad([param])
    param.grad = make_grad((10, 4), 1, 5, 0)
    optimizer.state[param]["sum"] = torch.zeros(10, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"state 'sum' has dtype torch.float64 but the parameter has torch.float32"):
        optimizer.step()
    del optimizer.state[param]["sum"]
    with pytest.raises(RuntimeError, match=r"state 'sum' is missing"):
        optimizer.step()
    optimizer.state[param].clear()  # made anew, with the initial value
    optimizer.step()
    assert optimizer.state[param]["step"] == 1
