"""The bits do not depend on the target, threads, chunks, splits, alignment or the caller's processor modes."""

import contextlib
import ctypes
import functools
import itertools
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from optimizers import (
    AWKWARD,
    BY_ID,
    CUDA_ON_HOST,
    DTYPES,
    ROWS,
    TARGETS,
    VARIANTS,
    Row,
    generator,
    gradients,
    joined,
    name_of,
    parameters,
    set_grads,
    split,
)
from reference import assert_same_bits, varied_values
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from fusedopt._config import _C

USABLE = _C.build_info()["cpu_usable"]
NUMEL = 10_007
HALVES = [torch.bfloat16, torch.float16]

Choose = Callable[[str], None]
SetInt = Callable[[int], None]
Context = Callable[[], contextlib.AbstractContextManager[None]]


@functools.cache
def inputs(dtype: torch.dtype, numel: int, steps: int, finite: bool) -> tuple[Tensor, list[Tensor]]:
    """Initial parameter and gradients; the same for all, never written to."""
    return varied_values(numel, dtype, generator(5), finite=finite), list(gradients(numel, dtype, steps, finite=finite))


def run(
    row: Row, dtype: torch.dtype, sizes: Sequence[int] = AWKWARD, numel: int = NUMEL, steps: int = 3
) -> dict[str, Tensor]:
    """The parameters and state after some steps on the inputs split into the given sizes."""
    initial, grads = inputs(dtype, numel, steps, row.finite)
    params = parameters(initial, sizes)
    optimizer = row.make(params)
    grad = torch.empty_like(initial)
    set_grads(params, grad, sizes)
    for values in grads:
        grad.copy_(values)
        optimizer.step()
    result = joined(params, optimizer)
    assert set(result.pop("step").tolist()) == {steps}  # one a tensor, so of a length of its own
    return result


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], when: str) -> None:
    assert list(actual) == list(expected)
    for name, value in actual.items():
        assert_same_bits(value, expected[name], f"{name} {when}")


# --- the target ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", USABLE)
def test_forced_target_runs(capability: str, set_capability: Choose) -> None:
    set_capability(capability)
    before = _C.units_run()
    run(VARIANTS[0], torch.float32, steps=1)
    ran = {name for name, units in _C.units_run().items() if units > before[name]}
    assert ran == {capability}
    assert _C.build_info()["cpu_capability"] == capability


def test_unknown_target_changes_nothing() -> None:
    before = _C.build_info()["cpu_capability"]
    assert not _C.set_cpu_capability("sse9")
    assert _C.build_info()["cpu_capability"] == before


def child(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(entry for entry in sys.path if entry)  # the same fusedopt as here
    env = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)


STEP = """
import torch, fusedopt
from fusedopt._config import _C
p = torch.nn.Parameter(torch.ones(100))
p.grad = torch.ones(100)
fusedopt.Adam([p]).step()
print(*(name for name, units in _C.units_run().items() if units))
"""


@pytest.mark.parametrize("name", USABLE)
def test_environment_variable(name: str) -> None:
    done = child(STEP, FUSEDOPT_CPU_CAPABILITY=name)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, [name], "")


def test_wrong_environment_variable() -> None:
    done = child(STEP, FUSEDOPT_CPU_CAPABILITY="sse9")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: FUSEDOPT_CPU_CAPABILITY='sse9'")
    assert ", ".join(USABLE) in last


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_targets_agree(row: Row, dtype: torch.dtype, set_capability: Choose) -> None:
    results = {}
    for name in TARGETS:
        set_capability(name)
        results[name] = run(row, dtype, steps=50)
    for name in TARGETS[1:]:
        assert_same(results[name], results[TARGETS[0]], f"of {name}, against {TARGETS[0]}")


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_targets_agree_after_1000_steps(row: Row, set_capability: Choose) -> None:
    results = {}
    for name in USABLE:
        set_capability(name)
        results[name] = run(row, torch.float32, sizes=(1, 7, 33), numel=200, steps=1000)
    for name in USABLE[1:]:
        assert_same(results[name], results[USABLE[0]], f"of {name}, against {USABLE[0]}")


# --- threads and chunks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("row", VARIANTS, ids=name_of)
def test_threads_and_chunks(row: Row, dtype: torch.dtype, capability: str, threads: SetInt, chunk_size: SetInt) -> None:
    numel = 50_001  # twelve chunks of 4,096: enough to occupy three threads
    sizes = (*AWKWARD, 30_000)
    threads(1)
    chunk_size(1 << 40)
    expected = run(row, dtype, sizes, numel)
    for count, chunk in itertools.product((1, 2, 3), (128, 1000, 4096)):
        threads(count)
        chunk_size(chunk)
        assert_same(run(row, dtype, sizes, numel), expected, f"with {count} threads, chunks of {chunk}")


def test_tiny_chunks(capability: str, threads: SetInt, chunk_size: SetInt) -> None:
    """Smaller than a lane, and than the alignment of a piece: nothing is left out or updated twice."""
    row = BY_ID["adamw-decay-amsgrad-lr32"]
    expected = run(row, torch.float32, numel=3000)
    for count, chunk in itertools.product((1, 3), (1, 7, 63, 64, 65)):
        threads(count)
        chunk_size(chunk)
        assert_same(run(row, torch.float32, numel=3000), expected, f"with {count} threads, chunks of {chunk}")


def test_several_threads_work() -> None:
    """Without this the tests above would pass with the work all done by one thread."""
    done = child(
        """
import os, torch, fusedopt
from fusedopt._config import _C
torch.set_num_threads(3)
_C.set_chunk_size(128)
p = torch.nn.Parameter(torch.ones(20_000))
p.grad = torch.ones(20_000)
optimizer = fusedopt.Adam([p])
optimizer.state[p] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros(20_000), "exp_avg_sq": torch.zeros(20_000)}
before = len(os.listdir("/proc/self/task"))
optimizer.step()
print(len(os.listdir("/proc/self/task")) - before)
"""
    )
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["2"], "")


# --- splits and alignment ------------------------------------------------------------------------------------------

SPLITS = [
    (1,) * 200,
    (3,) * 200,
    (7,) * 200,
    (4, 5) * 50,
    (7, 8, 9) * 50,
    (15, 16, 17) * 50,
    (129,) * 77,
    (0, 5000, 0, 5000, 0),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("row", VARIANTS, ids=name_of)
def test_any_split(row: Row, dtype: torch.dtype, capability: str) -> None:
    expected = run(row, dtype, sizes=())
    for sizes in SPLITS:
        assert_same(run(row, dtype, sizes), expected, f"split into {sizes[:3]}...")


def place(values: Tensor, offset: int) -> Tensor:
    """The same values at `offset` bytes from a multiple of 64, if need be at an address no element belongs at."""
    size = values.numel() * values.element_size()
    buffer = bytearray(size + 128)
    base = torch.frombuffer(buffer, dtype=torch.uint8)
    start = -base.data_ptr() % 64 + offset
    base[start : start + size] = values.detach().view(torch.uint8)
    placed = torch.frombuffer(buffer, dtype=values.dtype, count=values.numel(), offset=start)
    assert placed.data_ptr() % 64 == offset
    return placed


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("row", VARIANTS, ids=name_of)
def test_any_alignment(row: Row, dtype: torch.dtype, capability: str) -> None:
    numel, steps, itemsize = 1003, 3, dtype.itemsize
    expected = run(row, dtype, sizes=(), numel=numel, steps=steps)
    initial, grads = inputs(dtype, numel, steps, row.finite)
    offsets = [
        (itemsize, itemsize, itemsize),  # param, grad, state
        (2 * itemsize, 0, 3 * itemsize),
        (0, 3 * itemsize, 0),
    ]
    if capability != CUDA_ON_HOST:  # a GPU cannot read these: an error, tested elsewhere
        offsets += [(1, 0, 0), (0, 3, 0), (1, 3, 5)]  # not even the element's own alignment
    for at_param, at_grad, at_state in offsets:
        param = Parameter(place(initial, at_param))
        optimizer = row.make([param])
        for step, grad in enumerate(grads):
            param.grad = place(grad, at_grad)
            optimizer.step()
            if step == 0:
                state = optimizer.state[param]
                state.update({name: place(value, at_state) for name, value in state.items() if name != "step"})
        assert param.data_ptr() % 64 == at_param
        result = joined([param], optimizer)
        del result["step"]
        assert_same(result, expected, f"at offsets {at_param}, {at_grad}, {at_state}")


# --- storage in 16 bits --------------------------------------------------------------------------------------------


def all_patterns(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
def test_every_16_bit_value_survives(dtype: torch.dtype, capability: str) -> None:
    """Loaded and stored by a step that changes nothing, in whole lanes and in tails."""
    values = all_patterns(dtype)
    for sizes in ((), (1,) * 300, (7,) * 9000):
        params = parameters(values, sizes)
        set_grads(params, torch.zeros_like(values), sizes)
        optimizer = fusedopt.Adam(params, lr=0.0)
        optimizer.step()
        result = joined(params, optimizer)
        assert_same_bits(result["param"], values)
        assert not result["exp_avg"].any() and not result["exp_avg_sq"].any()


@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
def test_rounding_to_16_bits(dtype: torch.dtype, capability: str) -> None:
    """Around the middle between any two neighbours, and on it: to nearest, ties to even; past the largest, inf.

    With betas and eps of zero a gradient of 1 or -1 moves a parameter by exactly lr.
    """
    values = all_patterns(dtype)
    values = values[values.isfinite()]
    info = torch.finfo(dtype)
    exponents = values.double().abs().clamp(min=info.smallest_normal).frexp().exponent
    groups, expected = [], []
    for exponent, nudge, sign in itertools.product(exponents.unique().tolist(), (-1, 0, 1), (-1.0, 1.0)):
        lr = math.ldexp(info.eps * (1 + nudge * 2.0**-12), exponent - 2)  # half the distance of two neighbours
        start = values[exponents == exponent]
        param = Parameter(start.clone())
        param.grad = torch.full_like(start, sign)
        groups.append({"params": [param], "lr": lr})
        expected.append((start.float() - sign * torch.tensor(lr, dtype=torch.float32)).to(dtype))
    fusedopt.Adam(groups, betas=(0.0, 0.0), eps=0.0).step()
    actual = torch.cat([group["params"][0].detach() for group in groups])
    assert_same_bits(actual, torch.cat(expected))
    assert actual.isinf().any()


# --- the caller's processor modes ----------------------------------------------------------------------------------

_libm = ctypes.CDLL(None)
_ROUNDING = {
    "x86_64": {"down": 0x400, "up": 0x800, "to_zero": 0xC00},
    "aarch64": {"up": 0x400000, "down": 0x800000, "to_zero": 0xC00000},
}[platform.machine()]


def flushes() -> bool:
    return not (torch.full((64,), 1e-40) * 1).any()


@contextlib.contextmanager
def flush_denormal() -> Iterator[None]:
    assert torch.set_flush_denormal(True)
    try:
        yield
        assert flushes(), "the step has changed its caller's flush mode"
    finally:
        torch.set_flush_denormal(False)


@contextlib.contextmanager
def rounding(mode: int) -> Iterator[None]:
    assert _libm.fesetround(mode) == 0
    try:
        yield
        now = _libm.fegetround()
    finally:
        assert _libm.fesetround(0) == 0
    assert now == mode, "the step has changed its caller's rounding mode"


MODES = {"flush": flush_denormal} | {name: functools.partial(rounding, mode) for name, mode in _ROUNDING.items()}
# Scalars that are subnormal in float32, besides the usual ones.
TINY = Row("tiny_scalars", fusedopt.Adam, torch.optim.Adam, {"lr": 1e-39, "eps": 1e-40, "weight_decay": 1e-41})


def run_in(
    context: Callable[[], contextlib.AbstractContextManager[None]], row: Row, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Like `run`, with only the steps themselves inside the context."""
    initial, grads = inputs(dtype, NUMEL, 3, row.finite)
    params = parameters(initial)
    optimizer = row.make(params)
    for grad in grads:
        set_grads(params, grad)
        with context():
            optimizer.step()
    return joined(params, optimizer)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("row", [*VARIANTS, TINY], ids=name_of)
def test_processor_modes(row: Row, dtype: torch.dtype, capability: str, threads: SetInt, chunk_size: SetInt) -> None:
    chunk_size(128)
    expected = run_in(contextlib.nullcontext, row, dtype)
    for (name, context), count in itertools.product(MODES.items(), (1, 2)):
        threads(count)
        assert_same(run_in(context, row, dtype), expected, f"in mode {name}, with {count} threads")


def test_workers_modes() -> None:
    """Threads of the pool keep the modes of the thread that created them, here flushing."""
    done = child(
        """
import torch, fusedopt
from fusedopt._config import _C
values = torch.full((1_000_000,), 1e-40)
torch.set_num_threads(3)
torch.set_flush_denormal(True)
values * 1
torch.set_flush_denormal(False)
assert 0 < int((values * 1 == 0).sum()) < values.numel(), "the workers do not flush: nothing is tested"
p = torch.nn.Parameter(values.clone())
p.grad = torch.zeros_like(values)
fusedopt.Adam([p], lr=0.0).step()
print(torch.equal(p.detach().view(torch.int32), values.view(torch.int32)))
"""
    )
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["True"], "")


def test_subnormal_parameters_are_kept(capability: str) -> None:
    """Under set_flush_denormal(True) too: what torch itself would flush, a step that changes nothing leaves alone."""
    values = torch.linspace(-1e-38, 1e-38, 1001)
    for sizes in ((), (1, 3, 7)):
        params = parameters(values, sizes)
        set_grads(params, torch.zeros_like(values), sizes)
        with flush_denormal():
            fusedopt.Adam(params, lr=0.0).step()
        assert_same_bits(torch.cat([p.detach() for p in params]), values)
        assert len(split(values, sizes)) == len(params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_targets_store_the_same_nan(dtype: torch.dtype, set_capability: Choose) -> None:
    """AMSGrad's maximum of a NaN and a number, either way round: the very bits."""
    stored = []
    for name in _C.build_info()["cpu_usable"]:
        set_capability(name)
        p = torch.nn.Parameter(torch.ones(40, dtype=dtype))
        optimizer = fusedopt.Adam([p], amsgrad=True)
        for i in range(3):
            p.grad = torch.ones(40, dtype=dtype)
            p.grad[5 * i :: 7] = torch.nan
            optimizer.step()
        view = torch.int32 if dtype == torch.float32 else torch.int64
        stored.append(optimizer.state[p]["max_exp_avg_sq"].view(view))
    assert all(torch.equal(bits, stored[0]) for bits in stored)
