"""The CUDA driver and the kernel's own source, on the host: no GPU needed (tests/cuda_on_host).

That all rows and dtypes give the CPU's bits is in test_targets.py, where "cuda_on_host" is one target among others; the
tests of layouts, state and errors run on it too. Here is what only a device has: tables and uploads, step counts and
options that live on it, captured graphs.
"""

import contextlib
import ctypes
import gc
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from optimizers import DTYPES, ROWS, VARIANTS, Row, generator, gradients, name_of, parameters, set_grads
from reference import assert_same_bits, varied_values
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import fusedopt
from fusedopt._config import _C

CHUNK = _C.cuda_chunk


class Device:
    """Counters and switches of the pretended device."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def __getattr__(self, name: str) -> int:
        return ctypes.c_int64.in_dll(self.library, f"fusedopt_{name}").value

    def set(self, name: str, value: int) -> None:
        ctypes.c_int64.in_dll(self.library, f"fusedopt_{name}").value = value

    def use(self, *, numbers: bool) -> None:
        """Take tensors of the host for the device's: all but numbers (step counts, lr, ...), or these too."""
        _C.set_cuda_on_host(self.library._name, numbers)

    def leave(self) -> None:
        _C.set_cuda_on_host("", False)

    @contextlib.contextmanager
    def capture(self) -> Iterator[Callable[[], None]]:
        """Record the launches of a block instead of running them; gives what replays them."""
        self.library.fusedopt_forget_graph()
        self.set("capturing", 1)
        try:
            yield self.library.fusedopt_replay
        finally:
            self.set("capturing", 0)

    @contextlib.contextmanager
    def counting(self) -> Iterator[dict[str, int]]:
        """What a block launched and copied."""
        names = ("launches", "copies", "bytes_copied", "copies_now", "pinned", "unpinned")
        before = {name: getattr(self, name) for name in names}
        counts: dict[str, int] = {}
        yield counts
        counts.update({name: getattr(self, name) - before[name] for name in names})


@pytest.fixture
def device(cuda_library: ctypes.CDLL) -> Iterator[Device]:
    device = Device(cuda_library)
    yield device
    for name, value in (
        ("blocks", 3),
        ("capturing", 0),
        ("copies_pending", 0),
        ("fail_allocations", 0),
        ("first_block", 0),
    ):
        device.set(name, value)
    device.leave()


def state_of(optimizer: Optimizer) -> list[dict[str, Tensor]]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [{"param": param.detach().clone(), **optimizer.state[param]} for param in params]


def assert_same_state(actual: Optimizer, expected: Optimizer) -> None:
    for i, (a, e) in enumerate(zip(state_of(actual), state_of(expected), strict=True)):
        assert list(a) == list(e)
        for name, value in a.items():
            assert_same_bits(value, e[name], f"{name} of parameter {i}")


def twins(
    make: Callable[[list[Parameter]], Optimizer],
    sizes: list[int],
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Optimizer, Optimizer]:
    """The same optimizer twice, on parameters of their own."""
    g = generator(seed)
    values = [varied_values(size, dtype, g, wild=False) for size in sizes]
    first, second = (make([Parameter(value.clone()) for value in values]) for _ in range(2))
    return first, second


def step_both(device: Device, on_device: Optimizer, on_cpu: Optimizer, seed: int, *, numbers: bool = False) -> None:
    """New gradients and a step for each."""
    for optimizer in (on_device, on_cpu):
        g = generator(seed)
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = varied_values(param.numel(), param.dtype, g, wild=False).view(param.shape)
    device.use(numbers=numbers)
    on_device.step()
    device.leave()
    on_cpu.step()


# --- planning -------------------------------------------------------------------------------------------------------


def check_plan(sizes: list[int]) -> None:
    first, raw = _C.plan_chunks(sizes)
    chunks = [-(-size // CHUNK) for size in sizes]
    expected = [0]
    for count in chunks:
        expected.append(expected[-1] + count)
    assert first == expected[:-1]
    rows = torch.frombuffer(bytearray(raw), dtype=torch.int32) if raw else torch.empty(0, dtype=torch.int32)
    assert_same_bits(rows, torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), torch.tensor(chunks)))


@pytest.mark.parametrize("count", [1, 2, 3, 100, 1000, 100_000])
def test_every_element_is_in_one_chunk(count: int) -> None:
    pick = random.Random(count)
    border = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK - 1]
    check_plan([pick.choice(border) for _ in range(count)])
    check_plan([0] * count)
    check_plan([0] * (count - 1) + [1])
    check_plan([1] + [0] * (count - 1))


@pytest.mark.parametrize("size", [2**31 - 1, 2**31, 2**31 + 1, 2**32 + 5, 2**33])
def test_large_tensors_are_planned(size: int) -> None:
    check_plan([size])
    check_plan([3, 0, size, 7, size // 2 + 1, 0])


# --- step counts and options on the device ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_counting_on_the_device(row: Row, dtype: torch.dtype, device: Device) -> None:
    numel, steps = 6007, 12
    initial = varied_values(numel, dtype, generator(5), finite=row.finite)
    grads = list(gradients(numel, dtype, steps, finite=row.finite))
    results = []
    for on_device in (True, False):
        params = parameters(initial)
        optimizer = row.make(params, **(row.on_device() if on_device else {}))
        grad = torch.empty_like(initial)
        set_grads(params, grad)
        if on_device:
            device.use(numbers=True)
        for values in grads:
            grad.copy_(values)
            optimizer.step()
        device.leave()
        results.append(optimizer)
    assert_same_state(*results)
    assert all(float(state["step"]) == steps for state in results[0].state.values())


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.9999])
@pytest.mark.parametrize(
    "count",
    [0.0, 1.0, 5.0, 349.0, 37_408.0, 37_410.0, 37_411.0, 40_000.0, 62_350.0, 62_353.0, 374_000.0, 1e6, 2.0**24, 3.5],
)
@pytest.mark.parametrize("cls", [fusedopt.Adam, fusedopt.RAdam])
def test_any_step_count_on_the_device(cls: type[Optimizer], beta: float, count: float, device: Device) -> None:
    """The table of corrections, its end, and what lies behind it."""
    on_device, on_cpu = twins(lambda p: cls(p, betas=(min(beta, 0.99), beta), capturable=True), [1000])
    step_both(device, on_device, on_cpu, 0, numbers=True)
    for optimizer in (on_device, on_cpu):
        for state in optimizer.state.values():
            state["step"].fill_(count)
    for seed in range(1, 4):
        step_both(device, on_device, on_cpu, seed, numbers=True)
    assert_same_state(on_device, on_cpu)


def test_betas_that_are_neighbours(device: Device) -> None:
    """The tables of corrections are shared by all; these two betas have the same first three."""
    for beta2 in (0.6863928732979054, 0.6863928732979055):
        on_device, on_cpu = twins(
            lambda p, b=beta2: fusedopt.RAdam(p, lr=10.0, betas=(0.9, b), capturable=True), [100], dtype=torch.float64
        )
        for seed in range(15):
            step_both(device, on_device, on_cpu, seed, numbers=True)
        assert_same_state(on_device, on_cpu)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_betas_on_the_device(dtype: torch.dtype, device: Device) -> None:
    def make(params: list[Parameter]) -> Optimizer:
        betas = torch.tensor(0.8, dtype=dtype), torch.tensor(0.99, dtype=dtype)
        return fusedopt.Adam(params, betas=betas, weight_decay=0.1, capturable=True)

    on_device, on_cpu = twins(make, [1000, 5])
    for seed in range(5):
        step_both(device, on_device, on_cpu, seed, numbers=True)
    # The device's pow is this host's here; on a GPU the bits may differ: the documented exception.
    assert_same_state(on_device, on_cpu)
    for optimizer in (on_device, on_cpu):
        for beta in optimizer.param_groups[0]["betas"]:
            beta.fill_(0.6)
    step_both(device, on_device, on_cpu, 9, numbers=True)
    assert_same_state(on_device, on_cpu)


def counting_on_the_host(device: Device, **options: Any) -> tuple[Parameter, Optimizer]:
    """A step with the count on the host; then host numbers count as the device's, but that one is not read anew."""
    param = Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    device.use(numbers=False)
    optimizer = fusedopt.AdamW([param], **options)
    optimizer.step()
    device.use(numbers=True)
    return param, optimizer


def test_options_on_the_device_need_counts_there(device: Device) -> None:
    param, optimizer = counting_on_the_host(device, lr=torch.tensor(0.1))
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match=r"step count is on the CPU, but its group has an lr .* capturable=True"):
        optimizer.step()
    assert torch.equal(param.detach(), before) and float(optimizer.state[param]["step"]) == 1


def test_amp_on_the_device_needs_counts_there(device: Device) -> None:
    param, optimizer = counting_on_the_host(device)
    before = param.detach().clone()
    optimizer.found_inf = torch.tensor(0.0)
    with pytest.raises(RuntimeError, match=r"step count is on the CPU, but GradScaler's tensors .* fused=True"):
        optimizer.step()
    assert torch.equal(param.detach(), before) and float(optimizer.state[param]["step"]) == 1


def test_a_schedule_of_betas_keeps_no_tables(device: Device) -> None:
    """OneCycleLR cycles beta1 in every step: a table of corrections for each would fill the memory."""
    on_device, on_cpu = twins(lambda p: fusedopt.Adam(p, capturable=True), [100])
    with device.counting() as counts:
        for step in range(60):
            for optimizer in (on_device, on_cpu):
                optimizer.param_groups[0]["betas"] = (0.85 + 0.001 * step, 0.99)
            step_both(device, on_device, on_cpu, step, numbers=True)
    assert counts["copies_now"] <= 16
    assert_same_state(on_device, on_cpu)  # the device's pow is the host's here


def test_a_schedule_of_betas_costs_other_optimizers_nothing(device: Device) -> None:
    """What one optimizer did must not change the bits of another: it gets its table."""
    _, scheduled = make_all(device, 1, capturable=True)
    for step in range(30):
        scheduled.param_groups[0]["betas"] = (0.7 + 0.001 * step, 0.98)
        scheduled.step()
    with device.counting() as counts:
        make_all(device, 1, capturable=True, betas=(0.654, 0.987))
    assert counts["copies_now"] == 1


def test_counts_on_the_host_need_no_table_of_corrections(device: Device) -> None:
    with device.counting() as counts:
        make_all(device, 3, betas=(0.77, 0.99999))
    assert counts["copies_now"] == 0


@pytest.mark.parametrize("scaled", [True, False])
def test_amp_on_the_device(scaled: bool, device: Device) -> None:
    on_device, on_cpu = twins(lambda p: fusedopt.AdamW(p, fused=True), [5000, 0, 3])
    scale = torch.tensor(1024.0 * 3) if scaled else None
    for seed, inf in enumerate([0.0, 1.0, 0.0, 2.0, 0.0]):
        for optimizer in (on_device, on_cpu):
            optimizer.grad_scale = scale
            optimizer.found_inf = torch.tensor(inf)
        step_both(device, on_device, on_cpu, seed, numbers=True)
        assert_same_state(on_device, on_cpu)
    assert {float(state["step"]) for state in on_device.state.values()} == {3.0}


# --- tables and uploads -----------------------------------------------------------------------------------------------


def make_all(device: Device, count: int, **options: Any) -> tuple[list[Parameter], Optimizer]:
    params = [Parameter(torch.randn(7, generator=generator(i))) for i in range(count)]
    for param in params:
        param.grad = torch.ones_like(param)
    device.use(numbers=options.get("capturable", False))
    optimizer = fusedopt.Adam(params, **options)
    optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("capturable", [False, True])
def test_one_launch_and_no_copy_where_nothing_changed(capturable: bool, device: Device) -> None:
    params, optimizer = make_all(device, 1000, capturable=capturable)
    with device.counting() as counts:
        for _ in range(5):
            optimizer.step()
    assert counts == {"launches": 5, "copies": 0, "bytes_copied": 0, "copies_now": 0, "pinned": 0, "unpinned": 0}

    with device.counting() as counts:
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    assert (counts["launches"], counts["copies"]) == (1, 1)
    assert counts["bytes_copied"] < 1000 * 8 + 1000  # the gradients' addresses and little else

    with device.counting() as counts:
        params[3].grad = None
        optimizer.step()
    assert (counts["launches"], counts["copies"]) == (1, 1)

    with device.counting() as counts:
        optimizer.param_groups[0]["lr"] = 0.5
        optimizer.step()
    assert (counts["launches"], counts["copies"]) == (1, 1 if capturable else 0)  # else it travels with the launch


def test_one_launch_for_groups_with_different_flags(device: Device) -> None:
    flags: list[dict[str, Any]] = [{}, {"amsgrad": True}, {"maximize": True}, {"weight_decay": 0.1}, {"eps": 0.0}]
    flags += [{"lr": torch.tensor(0.1)}, {"betas": (0.3, 0.5)}]

    def make(params: list[Parameter]) -> Optimizer:
        return fusedopt.Adam([{"params": [p], **flag} for p, flag in zip(params, flags, strict=True)])

    on_device, on_cpu = twins(make, [CHUNK * 2 + 1] * len(flags))
    for seed in range(5):
        with device.counting() as counts:
            step_both(device, on_device, on_cpu, seed)
        assert counts["launches"] == 1
    assert_same_state(on_device, on_cpu)


def test_one_launch_a_dtype(device: Device) -> None:
    params = [Parameter(torch.ones(5, dtype=dtype)) for dtype in [*DTYPES, torch.complex64, *DTYPES]]
    for param in params:
        param.grad = torch.ones_like(param)
    device.use(numbers=False)
    optimizer = fusedopt.Adam(params)
    with device.counting() as counts:
        optimizer.step()
    assert counts["launches"] == len(DTYPES)  # complex64 are pairs of float32


def test_more_sets_of_scalars_than_travel_with_a_launch(device: Device) -> None:
    on_device, on_cpu = twins(lambda p: fusedopt.Adam(p), [10] * 200)
    for seed in range(3):
        step_both(device, on_device, on_cpu, seed)
    for optimizer in (on_device, on_cpu):
        for i, state in enumerate(optimizer.state.values()):
            state["step"].fill_(i % 100)
    for seed in range(3, 6):
        step_both(device, on_device, on_cpu, seed)
    assert_same_state(on_device, on_cpu)


@pytest.mark.parametrize("row", VARIANTS, ids=name_of)
@pytest.mark.parametrize("blocks", [1, 2, 7, 1000])
def test_any_number_of_blocks(row: Row, blocks: int, device: Device) -> None:
    device.set("blocks", blocks)
    sizes = [0, CHUNK, CHUNK - 1, 1, 0, 3 * CHUNK + 5, 0]
    on_device, on_cpu = twins(row.make, sizes)
    for seed in range(3):
        step_both(device, on_device, on_cpu, seed)
    assert_same_state(on_device, on_cpu)


def test_elements_behind_the_2_32nd(device: Device) -> None:
    """The last chunks of a tensor of 8 GB, of which no other byte is touched: it takes no memory."""
    numel = 2**32 + CHUNK + 5
    tail = CHUNK + 5
    g = generator(3)
    whole = [torch.empty(numel, dtype=torch.bfloat16) for _ in range(4)]
    parts = [varied_values(tail, torch.bfloat16, g, wild=False).abs() for _ in whole]
    for tensor, part in zip(whole, parts, strict=True):
        tensor[-tail:] = part
    results = []
    for param, grad, exp_avg, exp_avg_sq in (whole, parts):
        optimizer = fusedopt.Adam([param := Parameter(param)])
        param.grad = grad
        optimizer.state[param].update(step=torch.tensor(3.0), exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
        if param.numel() == numel:
            device.use(numbers=False)
            device.set("blocks", -(-numel // CHUNK))
            device.set("first_block", 2**32 // CHUNK)
        optimizer.step()
        device.leave()
        results.append([param.detach()[-tail:], exp_avg[-tail:], exp_avg_sq[-tail:]])
    for actual, expected in zip(*results, strict=True):
        assert_same_bits(actual, expected)


def test_nothing_but_empty_tensors(device: Device) -> None:
    for capturable in (False, True):
        on_device, on_cpu = twins(lambda p, c=capturable: fusedopt.Adam(p, capturable=c), [0, 0])
        step_both(device, on_device, on_cpu, 0, numbers=capturable)
        assert_same_state(on_device, on_cpu)


def test_copies_that_are_not_done_keep_their_memory(device: Device) -> None:
    on_device, on_cpu = twins(lambda p: fusedopt.Adam(p), [10] * 5)
    device.set("copies_pending", 1)
    with device.counting() as counts:
        for seed in range(4):
            step_both(device, on_device, on_cpu, seed)
    assert counts["pinned"] >= counts["copies"]  # each from memory of its own
    device.set("copies_pending", 0)
    with device.counting() as counts:
        for seed in range(4, 8):
            step_both(device, on_device, on_cpu, seed)
    assert counts["pinned"] == 0 < counts["copies"]
    assert_same_state(on_device, on_cpu)


@pytest.mark.parametrize("what", ["allocations", "launches"])
def test_a_device_that_fails_changes_nothing(what: str, device: Device) -> None:
    params = [Parameter(torch.ones(3))]
    params[0].grad = torch.ones(3)
    optimizer = fusedopt.Adam(params)
    device.use(numbers=False)
    device.set(f"fail_{what}", 1)
    with pytest.raises(RuntimeError, match=r"out of memory|no kernel image"):
        optimizer.step()
    assert torch.equal(params[0].detach(), torch.ones(3)) and not optimizer.state
    device.set(f"fail_{what}", 0)
    optimizer.step()
    assert float(optimizer.state[params[0]]["step"]) == 1
    assert not torch.equal(params[0].detach(), torch.ones(3))


def test_a_layout_that_changed_in_failed_steps(device: Device) -> None:
    """The steps that fail read the new layouts; the next one must still upload the last, wherever it lies."""
    results = []
    for on_device in (True, False):
        if on_device:
            device.use(numbers=False)
        buffer = torch.randn(2000, generator=generator(1))
        param = Parameter(buffer.as_strided((4, 6), (12, 2)))
        param.grad = torch.randn((4, 6), generator=generator(2))
        optimizer = fusedopt.Adam([param])
        optimizer.step()
        for strides in ((24, 2), (60, 3)):
            param.data = buffer.as_strided((4, 6), strides)
            optimizer.param_groups[0]["betas"] = (1.0, 0.999)  # no step can be made with these
            with pytest.raises(ValueError, match="beta1"):
                optimizer.step()
        optimizer.param_groups[0]["betas"] = (0.9, 0.999)
        optimizer.step()
        device.leave()
        results.append(buffer)
    assert_same_bits(*results)


def test_what_an_optimizer_held_is_freed(device: Device) -> None:
    with device.counting() as counts:
        for _ in range(5):
            params, optimizer = make_all(device, 3)
            for _ in range(3):
                params[0].grad = torch.ones(7)
                optimizer.step()
            del optimizer
            gc.collect()
    assert counts["pinned"] == counts["unpinned"] > 0


def test_a_tensor_the_device_cannot_read_is_named(device: Device) -> None:
    storage = torch.zeros(41, dtype=torch.uint8)
    param = Parameter(torch.frombuffer(bytearray(41), dtype=torch.float32, offset=1, count=10))
    param.grad = torch.ones(10)
    device.use(numbers=False)
    with pytest.raises(RuntimeError, match=r"param_groups\[0\]\['params'\]\[0\]: the parameter does not begin at"):
        fusedopt.Adam([param]).step()
    assert storage.sum() == 0


# --- captured graphs --------------------------------------------------------------------------------------------------


def captured_pair(device: Device, sizes: list[int]) -> tuple[Optimizer, Optimizer, Callable[[], None]]:
    """An optimizer whose step is captured, its twin on the CPU, and the replay; both have made two steps."""

    def make(params: list[Parameter]) -> Optimizer:
        return fusedopt.AdamW(params, lr=torch.tensor(1e-2), capturable=True)

    on_device, on_cpu = twins(make, sizes)
    for seed in range(2):
        step_both(device, on_device, on_cpu, seed, numbers=True)
    device.use(numbers=True)
    with device.capture() as replay:
        on_device.step()
    assert_same_state(on_device, on_cpu)  # capturing runs nothing
    return on_device, on_cpu, replay


def renew_in_place(on_device: Optimizer, on_cpu: Optimizer, seed: int) -> None:
    g = generator(seed)
    for a, b in zip(on_device.param_groups[0]["params"], on_cpu.param_groups[0]["params"], strict=True):
        values = varied_values(a.numel(), torch.float32, g, wild=False)
        a.grad.copy_(values)
        b.grad.copy_(values)


def test_replays_equal_steps(device: Device) -> None:
    on_device, on_cpu, replay = captured_pair(device, [5000, 0, 7])
    for step in range(100):
        renew_in_place(on_device, on_cpu, step)
        for optimizer in (on_device, on_cpu):
            optimizer.param_groups[0]["lr"].fill_(1e-2 / (step + 1))
        replay()
        device.leave()
        on_cpu.step()
    assert_same_state(on_device, on_cpu)
    assert float(next(iter(on_device.state.values()))["step"]) == 102


def test_options_changed_between_replays(device: Device) -> None:
    on_device, on_cpu, replay = captured_pair(device, [5000, 7])
    for optimizer in (on_device, on_cpu):
        optimizer.param_groups[0].update(weight_decay=0.5, eps=1e-3, betas=(0.5, 0.9), maximize=True)
    device.use(numbers=True)
    on_device.update_captured()
    replay()
    device.leave()
    on_cpu.step()
    assert_same_state(on_device, on_cpu)


def test_eager_steps_leave_a_captured_table_alone(device: Device) -> None:
    on_device, on_cpu, replay = captured_pair(device, [5000, 7])
    captured = [param.grad for param in on_device.param_groups[0]["params"]]
    # An eager step with other gradients, and one with a parameter less.
    step_both(device, on_device, on_cpu, 5, numbers=True)
    assert_same_state(on_device, on_cpu)
    for param, grad in zip(on_device.param_groups[0]["params"], captured, strict=True):
        param.grad = grad
    renew_in_place(on_device, on_cpu, 6)
    device.use(numbers=True)
    replay()
    device.leave()
    on_cpu.step()
    assert_same_state(on_device, on_cpu)


def test_a_captured_step_with_sparse_gradients(device: Device) -> None:
    """A coalesced one is captured; one that is not would have to be coalesced in every replay, and says so."""
    param = Parameter(torch.randn(20, 4, generator=generator(1)))
    optimizer = fusedopt.Adagrad([param], fused=True)
    values = torch.randn(5, 4, generator=generator(2))
    indices = torch.tensor([[1, 3, 5, 7, 19]])
    param.grad = torch.sparse_coo_tensor(indices, values, (20, 4), is_coalesced=True, check_invariants=True)
    twin = Parameter(param.detach().clone())
    twin.grad = torch.sparse_coo_tensor(indices, values, (20, 4), is_coalesced=True, check_invariants=True)
    expected = fusedopt.Adagrad([twin])
    device.use(numbers=True)
    optimizer.step()
    with device.capture() as replay:
        optimizer.step()
    replay(), replay()
    with device.capture(), pytest.raises(RuntimeError, match=r"the gradient is sparse and not coalesced"):
        param.grad = torch.sparse_coo_tensor(indices, values, (20, 4), check_invariants=True)
        optimizer.step()
    device.leave()
    for _ in range(3):
        expected.step()
    assert_same_bits(param.detach(), twin.detach())


def test_gradients_made_during_capture(device: Device) -> None:
    """As torch's recipe has it: the gradients of the captured step are those that the graph itself makes."""

    def make(params: list[Parameter]) -> Optimizer:
        return fusedopt.Adam(params, capturable=True)

    on_device, on_cpu = twins(make, [100])
    step_both(device, on_device, on_cpu, 0, numbers=True)
    param, other = on_device.param_groups[0]["params"][0], on_cpu.param_groups[0]["params"][0]
    device.use(numbers=True)
    with device.capture() as replay:
        param.grad = torch.full((100,), 3.0)
        on_device.step()
    other.grad = param.grad.clone()
    replay()
    replay()
    device.leave()
    on_cpu.step()
    on_cpu.step()
    assert_same_state(on_device, on_cpu)


def test_what_cannot_be_captured_says_so(device: Device) -> None:
    params, optimizer = make_all(device, 2)
    before = [param.detach().clone() for param in params]
    with device.capture(), pytest.raises(RuntimeError, match="capturable=True"):
        optimizer.step()
    assert all(torch.equal(param.detach(), value) for param, value in zip(params, before, strict=True))
    assert {float(state["step"]) for state in optimizer.state.values()} == {1.0}

    device.use(numbers=True)
    fresh = fusedopt.Adam([param := Parameter(torch.ones(3))], capturable=True)
    param.grad = torch.ones(3)
    with device.capture(), pytest.raises(RuntimeError, match="step before capturing"):
        fresh.step()
    assert not fresh.state


def test_update_captured_between_other_steps(device: Device) -> None:
    on_device, on_cpu, _ = captured_pair(device, [500, 7])
    device.use(numbers=True)
    with device.capture(), pytest.raises(RuntimeError, match="no part of a graph"):
        on_device.update_captured()
    for optimizer in (on_device, on_cpu):
        optimizer.add_param_group({"params": [Parameter(torch.ones(20))], "weight_decay": 0.5})
    with pytest.raises(RuntimeError, match="number of parameter groups has changed"):
        on_device.update_captured()
    step_both(device, on_device, on_cpu, 20, numbers=True)  # the tables are in order
    assert_same_state(on_device, on_cpu)
    # Captured anew, with the new group: the old graph's table is passed over.
    device.use(numbers=True)
    with device.capture() as replay:
        on_device.step()
    for optimizer in (on_device, on_cpu):
        for group in optimizer.param_groups:
            group["eps"] = 1e-3
    on_device.update_captured()
    replay()
    device.leave()
    on_cpu.step()
    assert_same_state(on_device, on_cpu)
