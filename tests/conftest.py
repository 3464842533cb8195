"""Fixtures that change a setting of the process and put it back, and the tables after a run."""

import ctypes
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Before torch loads OpenMP: waiting threads sleep. Spinning, they starve each other where cores are busy, which made
# the tests with 3 threads under `pytest -n 2` on two cores take ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from optimizers import CUDA_ON_HOST, ON_DEVICE, TARGETS
from ranks import Ranks

from fusedopt._config import _C

torch.set_num_threads(1)  # tests that want more ask for them, with `threads`


@pytest.fixture(scope="session")
def cuda_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """tests/cuda_on_host, built."""
    library = tmp_path_factory.mktemp("cuda_on_host") / "runtime.so"
    source = Path(__file__).parent / "cuda_on_host" / "runtime.cpp"
    flags = ["-std=gnu++17", "-O2", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC", "-w"]
    if sanitizers := os.environ.get("FUSEDOPT_SANITIZE"):
        flags += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-g", "-O1"]
    subprocess.run([os.environ.get("CXX", "g++"), *flags, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture
def set_capability(request: pytest.FixtureRequest) -> Iterator[Callable[[str], None]]:
    """Choose a target, for tests that compare several."""
    before = _C.build_info()["cpu_capability"]

    def choose(name: str) -> None:
        if name == CUDA_ON_HOST:
            _C.set_cuda_on_host(request.getfixturevalue("cuda_library")._name, False)
            return
        _C.set_cuda_on_host("", False)
        assert _C.set_cpu_capability(name)

    yield choose
    choose(before)


@pytest.fixture(params=TARGETS)
def capability(request: pytest.FixtureRequest, set_capability: Callable[[str], None]) -> str:
    """Run the test once on every target that this machine has."""
    set_capability(request.param)
    return request.param


@pytest.fixture
def set_place(request: pytest.FixtureRequest, set_capability: Callable[[str], None]) -> Callable[[str], None]:
    """Like set_capability, with one place more."""

    def choose(name: str) -> None:
        set_capability(CUDA_ON_HOST if name == ON_DEVICE else name)
        if name == ON_DEVICE:
            _C.set_cuda_on_host(request.getfixturevalue("cuda_library")._name, True)

    return choose


@pytest.fixture(params=["cpu", CUDA_ON_HOST, ON_DEVICE])
def place(request: pytest.FixtureRequest, set_place: Callable[[str], None]) -> str:
    """The CPU, and the other driver with the step counts on the host and on the device."""
    if request.param != "cpu":
        set_place(request.param)
    return request.param


@pytest.fixture(params=["by_signature", "by_dlpack", CUDA_ON_HOST])
def way(request: pytest.FixtureRequest, set_capability: Callable[[str], None]) -> Iterator[str]:
    """Run the test in both ways to know that tensors are what they were, and with the other driver."""
    _C.set_signatures(request.param != "by_dlpack")
    if request.param == CUDA_ON_HOST:
        set_capability(CUDA_ON_HOST)
    yield request.param
    _C.set_signatures(True)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def chunk_size() -> Iterator[Callable[[int], None]]:
    """_C.set_chunk_size, undone after the test: a small one lets small tensors use several threads."""
    before = _C.chunk_size()
    yield _C.set_chunk_size
    _C.set_chunk_size(before)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """Pools of processes with a process group, one for each size asked for; one whose rank failed is made anew.

    Tests that use it belong to the xdist group "ranks", so that there is one of each.
    """
    pools: dict[int, Ranks] = {}

    def of_size(size: int) -> Ranks:
        if size not in pools or not pools[size].alive:
            pools[size] = Ranks(size)
        return pools[size]

    yield of_size
    for pool in pools.values():
        pool.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show the table lines that tests left with record_property("table: <title>", line)."""
    tables: dict[str, list[str]] = {}
    for report in _calls(terminalreporter):
        for name, line in report.user_properties:
            if name.startswith("table: "):
                tables.setdefault(name.removeprefix("table: "), []).append(line)
    for title, lines in tables.items():
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.write_line(line)


def _calls(terminalreporter: pytest.TerminalReporter) -> Iterator[pytest.TestReport]:
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            if isinstance(report, pytest.TestReport) and report.when == "call":
                yield report
