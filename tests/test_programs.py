"""Threads, processes, garbage and memory: the optimizer inside of whole programs."""

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from optimizers import BY_ID, generator
from reference import assert_same_bits
from torch import Tensor
from torch.nn import Parameter

import fusedopt

LIMIT = 60  # seconds until a hanging program is killed


def run_program(source: str) -> str:
    """Run in a new interpreter with warnings as errors; its output, once it has ended well."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(source)],
        capture_output=True, text=True, timeout=LIMIT, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def make_params(count: int, numel: int, seed: int = 0) -> list[Parameter]:
    g = generator(seed)
    return [Parameter(torch.randn(numel, generator=g)) for _ in range(count)]


def train(params: list[Parameter], optimizer: torch.optim.Optimizer, steps: int, seed: int = 1) -> None:
    g = generator(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.numel(), generator=g)
        optimizer.step()


# --- threads --------------------------------------------------------------------------------------------------------


def in_threads(*work: Callable[[], Any]) -> None:
    errors: list[BaseException] = []

    def guarded(function: Callable[[], Any]) -> None:
        try:
            function()
        except BaseException as error:  # shown by the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive(), "hangs"
    if errors:
        raise errors[0]


def test_other_threads_run_during_a_step() -> None:
    """No thread is forced to let go of the GIL here, so another one advances only if the step does so by itself."""
    [p] = make_params(1, 1 << 22)
    p.grad = torch.ones(1 << 22)
    optimizer = fusedopt.AdamW([p])
    optimizer.step()
    stop, ready, counter = threading.Event(), threading.Event(), [0]

    def count() -> None:
        ready.set()
        while not stop.is_set():
            counter[0] += 1
            time.sleep(0)  # lets go of the GIL

    native = optimizer._stepper.step
    arguments = optimizer, optimizer.param_groups, optimizer.state, None, None, None, 1
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    thread = threading.Thread(target=count, daemon=True)
    thread.start()
    try:
        ready.wait(LIMIT)
        advanced = False
        for _ in range(100):  # until the system has given the other thread a processor in time
            before = counter[0]
            native(*arguments)
            advanced = counter[0] > before
            if advanced:
                break
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        thread.join(LIMIT)
    assert advanced


def test_two_optimizers_in_two_threads() -> None:
    ours = [make_params(20, 5000, seed) for seed in range(2)]
    alone = [make_params(20, 5000, seed) for seed in range(2)]
    for params in alone:
        train(params, fusedopt.AdamW(params), 20)
    in_threads(*(lambda params=params: train(params, fusedopt.AdamW(params), 20) for params in ours))
    for mine, wanted in zip(ours, alone, strict=True):
        for p, q in zip(mine, wanted, strict=True):
            assert_same_bits(p.detach(), q.detach())


def test_one_optimizer_in_two_threads() -> None:
    """A clear error or a step: never half of one."""
    params = make_params(4, 300_000)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = fusedopt.Adam(params)
    optimizer.step()
    done, refused = [1], [0]
    lock = threading.Lock()

    def steps() -> None:
        for _ in range(30):
            try:
                optimizer.step()
            except RuntimeError as error:
                assert "step() is already running" in str(error)
                with lock:
                    refused[0] += 1
            else:
                with lock:
                    done[0] += 1

    in_threads(steps, steps)
    assert done[0] + refused[0] == 61
    reference = make_params(4, 300_000)
    for p in reference:
        p.grad = torch.ones_like(p)
    other = fusedopt.Adam(reference)
    for _ in range(done[0]):
        other.step()
    for p, q in zip(params, reference, strict=True):
        assert_same_bits(p.detach(), q.detach())
        assert optimizer.state[p]["step"] == done[0]


# --- the import -----------------------------------------------------------------------------------------------------

NAMES = """
    import importlib, pkgutil, types, fusedopt
    for module in {modules}:
        importlib.import_module("fusedopt." + module)
    assert set(fusedopt.__all__) <= set(dir(fusedopt))
    for name in fusedopt.__all__:
        value = getattr(fusedopt, name)
        assert isinstance(value, types.ModuleType) == (name in ("lr_finder", "lr_scheduler")), name
        assert getattr(fusedopt, name) is value
    try:
        fusedopt.no_such_name
    except AttributeError as error:
        print(error)
"""


@pytest.mark.parametrize("modules", ["[]", "[module.name for module in pkgutil.iter_modules(fusedopt.__path__)]"])
def test_public_names(modules: str) -> None:
    """Those that are imported when first asked for too, and whatever was imported before."""
    said = run_program(NAMES.format(modules=modules))
    assert said == "module 'fusedopt' has no attribute 'no_such_name'\n"


# --- processes ------------------------------------------------------------------------------------------------------

FORK = """
    import os, signal, torch, fusedopt
    from fusedopt._config import _C
    torch.set_num_threads(2)
    p = torch.nn.Parameter(torch.ones(1 << 21))
    q = torch.nn.Parameter(torch.ones(1 << 21))
    p.grad, q.grad = torch.full_like(p, 0.5), torch.full_like(q, 0.5)
    ours, other = fusedopt.AdamW([p]), fusedopt.AdamW([q])
    ours.step(), other.step()
    assert "pool" in fusedopt.show_config()
    child = os.fork()
    if child == 0:
        signal.alarm(40)
        ours.step()  # as many threads allowed as before
        torch.set_num_threads(1)  # torch's own regions would hang
        fresh = torch.nn.Parameter(torch.ones(1 << 21))
        fresh.grad = torch.full((1 << 21,), 0.5)
        made_here = fusedopt.AdamW([fresh])
        made_here.step(), made_here.step()
        os._exit(0 if torch.equal(fresh, p) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    ours.step(), other.step()
    assert torch.equal(p, q) and ours.state[p]["step"] == 2
    print("pool in the parent" if _C.build_info()["threads"] else "no pool")
"""


def test_fork_after_the_pool_was_used() -> None:
    """The child steps, on one thread, to the same bits; the parent keeps its pool."""
    assert run_program(FORK) == "pool in the parent\n"


HOGWILD = """
    import torch, torch.multiprocessing as mp, fusedopt

    def work(module, seed):
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        optimizer = fusedopt.Adam(module.parameters(), lr=1e-2)
        for _ in range(100):
            x = torch.randn(16, 4)
            optimizer.zero_grad()
            (module(x) - x.sum(1, keepdim=True)).square().mean().backward()
            optimizer.step()

    if __name__ == "__main__":
        torch.manual_seed(0)
        module = torch.nn.Linear(4, 1)
        big = torch.nn.Parameter(torch.ones(1 << 20))
        big.grad = torch.ones_like(big)
        fusedopt.Adam([big]).step()  # the pool is in use
        module.share_memory()
        x = torch.randn(100, 4)
        before = (module(x) - x.sum(1, keepdim=True)).square().mean().item()
        context = mp.get_context("fork")
        workers = [context.Process(target=work, args=(module, seed)) for seed in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(40)
            assert worker.exitcode == 0, worker.exitcode
        after = (module(x) - x.sum(1, keepdim=True)).square().mean().item()
        assert after < before / 2, (before, after)
"""


def test_hogwild_in_forked_processes() -> None:
    run_program(HOGWILD)


def test_spawned_process(tmp_path: Any) -> None:
    """An optimizer travels by pickle into a new interpreter, and its shared parameters are written there."""
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent("""
        import torch, torch.multiprocessing as mp, fusedopt

        def work(optimizer):
            p = optimizer.param_groups[0]["params"][0]
            p.grad = torch.ones(3)
            optimizer.step()
            assert optimizer.state[p]["step"] == 2

        if __name__ == "__main__":
            p = torch.nn.Parameter(torch.ones(3).share_memory_())
            p.grad = torch.ones(3)
            optimizer = fusedopt.AdamW([p], lr=0.5, weight_decay=0.0)
            optimizer.step()
            before = p.detach().clone()
            worker = mp.get_context("spawn").Process(target=work, args=(optimizer,))
            worker.start()
            worker.join(50)
            assert worker.exitcode == 0, worker.exitcode
            assert (p < before).all()
        """)
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", str(program)],
        capture_output=True, text=True, timeout=LIMIT, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not find_spec("tensorboard"), reason="examples/telemetry.py writes for tensorboard")
def test_telemetry_example(tmp_path: Path) -> None:
    """It writes a curve for each statistic of each parameter, and sees bfloat16 lose the updates that float32 keeps."""
    program = Path(__file__).parent.parent / "examples" / "telemetry.py"
    done = subprocess.run(
        [sys.executable, str(program), "--steps", "20", "--every", "5", "--out", str(tmp_path)],
        capture_output=True, text=True, timeout=LIMIT, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"tensorboard --logdir {tmp_path}" in done.stdout
    [gains] = [line.split() for line in done.stdout.splitlines() if "of gains" in line]
    float32, bfloat16 = (float(share.rstrip("%")) for share in gains[-2:])
    assert float32 < 5 and bfloat16 > 95  # they begin at 1, where bfloat16 numbers are 0.004 apart
    for dtype in ("float32", "bfloat16"):
        [events] = (tmp_path / dtype).iterdir()
        written = events.read_bytes()
        for tag in ("all/grad_norm", "all/skipped_steps", "lost_updates/norm.weight", "update_norm/norm.bias"):
            assert tag.encode() in written, f"{tag} of {dtype}"


IMPORT = """
    import sys, threading
    import torch
    before = set(sys.modules)
    threads = len(__import__("os").listdir("/proc/self/task"))
    import fusedopt
    new = {name for name in set(sys.modules) - before}
    roots = {name.partition(".")[0] for name in new if not name.startswith("__editable__")}
    foreign = (roots - {"fusedopt"} - sys.stdlib_module_names) | {name for name in new if name.startswith("torch.")}
    print(sorted(foreign))
    assert len(__import__("os").listdir("/proc/self/task")) == threads, "threads at import"
"""


def test_import_needs_only_torch() -> None:
    """Nothing outside of the standard library that `import torch` had not loaded: no numpy, no torch._dynamo."""
    assert run_program(IMPORT) == "[]\n"


def test_import_without_numpy() -> None:
    """Where numpy cannot be imported at all, as in a minimal installation."""
    run_program("""
        import sys, warnings
        sys.modules["numpy"] = None
        warnings.simplefilter("ignore")  # torch says that it has no numpy
        import torch, fusedopt
        warnings.simplefilter("error")
        p = torch.nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        fusedopt.Adam([p]).step()
        assert p[0].item() < 1
        print(fusedopt.show_config())
    """)


POOL = """
    import os, re, torch
    def threads():
        return len(os.listdir("/proc/self/task"))
    def runtimes():
        with open("/proc/self/maps") as maps:
            return {line.split()[-1] for line in maps if re.search(r"/lib(g|i|)omp", line)}
    import fusedopt
    torch.set_num_threads(1)
    p = torch.nn.Parameter(torch.ones(1 << 20))
    p.grad = torch.ones(1 << 20)
    optimizer = fusedopt.Adam([p])
    alone = threads()
    optimizer.step()
    assert threads() == alone, "a step on one thread starts none"

    torch.set_num_threads(3)
    before = threads()
    optimizer.step()
    ours = threads()
    torch.add(p.grad, p.grad)
    assert threads() == ours == alone + 2, (alone, before, ours, threads())
    for _ in range(3):
        torch.add(p.grad, p.grad)
        optimizer.step()
    assert threads() == ours, (ours, threads())
    assert len(runtimes()) == 1, runtimes()
"""


def test_one_openmp_pool() -> None:
    """torch.set_num_threads is honoured; torch's parallel regions and ours share their threads and their runtime."""
    run_program(POOL)


# --- garbage and memory ---------------------------------------------------------------------------------------------


def test_finalizers_that_run_user_code() -> None:
    """Gradients die while new ones are made: their finalizers collect garbage, and touch the optimizer."""
    params = make_params(30, 40)
    ours, plain = fusedopt.Adam(params), make_params(30, 40)
    other = fusedopt.Adam(plain)
    ran = [0]

    def finalize() -> None:
        ran[0] += 1
        gc.collect(0)
        _ = [p.grad is None for p in params], len(ours.state)

    for step in range(20):
        g = generator(step)
        for p, q in zip(params, plain, strict=True):
            grad = torch.randn(40, generator=g)
            p.grad, q.grad = grad.clone(), grad
            weakref.finalize(p.grad, finalize)
        ours.step(), other.step()
    for p, q in zip(params, plain, strict=True):
        assert_same_bits(p.detach(), q.detach())
    assert ran[0] > 0


class Cycle:
    """Garbage that only the collector frees, and that does something when it dies."""

    calls = 0

    def __init__(self, work: Callable[[], Any]) -> None:
        self.me, self.work = self, work

    def __del__(self) -> None:
        Cycle.calls += 1
        self.work()


def test_collections_all_the_time() -> None:
    """The collector runs at every opportunity, and its finalizers replace gradients and data that the step reads."""
    params, plain = make_params(40, 30), make_params(40, 30)
    ours, other = fusedopt.AdamW(params), fusedopt.AdamW(plain)

    def meddle() -> None:
        for p in params[::7]:
            p.data = p.data.clone()
            if p.grad is not None:
                p.grad = p.grad.clone()

    threshold = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(1, 1, 1)
    try:
        for step in range(15):
            g = generator(step)
            for p, q in zip(params, plain, strict=True):
                q.grad = torch.randn(30, generator=g)
                p.grad = q.grad.clone()
            for _ in range(5):
                Cycle(meddle)
            ours.step()
            other.step()
    finally:
        gc.set_threshold(*threshold)
        gc.unfreeze()
    assert Cycle.calls > 0 and gc.isenabled()
    for p, q in zip(params, plain, strict=True):
        assert_same_bits(p.detach(), q.detach())


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_left_as_it_was(enabled: bool) -> None:
    p = Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = fusedopt.Adam([p])
    was = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        optimizer.step()
        assert gc.isenabled() == enabled
        optimizer.state[p]["exp_avg"] = torch.ones(3)
        with pytest.raises(RuntimeError):
            optimizer.step()
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was else gc.disable)()


def test_no_leak() -> None:
    """2,000 steps with fresh gradients, with errors in between: nothing is kept, nothing counted once too often."""
    params = make_params(8, 1000)
    optimizer = BY_ID["adam-amsgrad"].make(params)
    watched: list[Any] = []

    def steps(count: int) -> None:
        for i in range(count):
            for p in params:
                p.grad = torch.ones(1000) if i % 3 else torch.ones(2000)[::2]
            if i % 50 == 0:
                params[0].grad.data = torch.ones(3)
                with pytest.raises(RuntimeError):
                    optimizer.step()
                params[0].grad = None
            if i % 20 == 0:
                params[3].data = params[3].data.clone()
            optimizer.step()
            if i % 100 == 0 and params[1].grad is not None:
                watched.append(weakref.ref(params[1].grad))
        for p in params:
            p.grad = None

    def census() -> tuple[list[int], int, int]:
        objects: list[Any] = [*params, *(t for p in params for t in optimizer.state[p].values())]
        objects += [optimizer.state, optimizer.param_groups, optimizer.param_groups[0]["params"]]
        gc.collect()
        tensors = sum(1 for o in gc.get_objects() if type(o) in (Tensor, Parameter))
        with open("/proc/self/statm") as statm:
            resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return [sys.getrefcount(o) for o in objects], tensors, resident

    steps(200)
    before = census()
    steps(2000)
    after = census()
    assert after[0] == before[0]
    assert after[1] == before[1]
    assert after[2] - before[2] < 8 << 20  # 2,000 kept steps would be 64 MB of gradients
    assert len(watched) == 22 and all(ref() is None for ref in watched)


def test_an_optimizer_frees_what_it_held() -> None:
    """With no cycle of its own: dropping the last reference is enough."""
    p = Parameter(torch.ones(5))
    p.grad = torch.ones(5)
    optimizer = fusedopt.Adam([p])
    optimizer.step()
    refs = [weakref.ref(optimizer), weakref.ref(optimizer.state[p]["exp_avg"]), weakref.ref(p)]
    gc.disable()
    try:
        del p
        torch_keeps = weakref.ref(torch.optim.Adam([torch.ones(1)]))
        del optimizer
        assert [ref() is None for ref in refs] == [torch_keeps() is None] * 3
    finally:
        gc.enable()


def test_user_code_in_the_making_of_state() -> None:
    """A dispatch mode sees the new state being made, and moves other parameters meanwhile."""
    from torch.utils._python_dispatch import TorchDispatchMode

    params, plain = make_params(6, 5000), make_params(6, 5000)
    ours, other = fusedopt.Adam(params), fusedopt.Adam(plain)
    for p, q in zip(params[:3], plain[:3], strict=True):
        p.grad, q.grad = torch.ones(5000), torch.ones(5000)
    ours.step(), other.step()
    for p, q in zip(params[3:], plain[3:], strict=True):
        p.grad, q.grad = torch.ones(5000), torch.ones(5000)

    class Meddling(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Meddling.seen += 1
            for p in params[:3]:
                moved = torch.empty(5000)
                moved.numpy()[:] = p.detach().numpy()
                p.data = moved
            return func(*args, **(kwargs or {}))

    with Meddling():
        ours.step()
    other.step()
    assert Meddling.seen > 0
    for p, q in zip(params, plain, strict=True):
        assert_same_bits(p.detach(), q.detach())


def test_ctrl_c_during_training_leaves_a_whole_step() -> None:
    params = make_params(3, 200_000)
    optimizer = fusedopt.Adam(params)
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    steps = 1
    try:
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with pytest.raises(KeyboardInterrupt):
            while True:
                optimizer.step()
                steps += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    counts = {optimizer.state[p]["step"].item() for p in params}
    assert len(counts) == 1 and counts <= {steps, steps + 1}
    optimizer.step()


@pytest.mark.parametrize("mode", ["torch.no_grad()", "torch.inference_mode()", "torch.device('meta')"])
def test_import_in_any_mode(mode: str) -> None:
    run_program(f"""
        import torch
        with {mode}:
            import fusedopt
        assert "signatures" in fusedopt.show_config()
    """)


def test_groups_added_while_state_is_made() -> None:
    from torch.overrides import TorchFunctionMode

    params, late = make_params(1, 3), make_params(300, 3)
    for p in params + late:
        p.grad = torch.ones(3)
    optimizer = fusedopt.Adam(params)

    class Adding(TorchFunctionMode):
        done = False

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.zeros and not self.done:
                self.done = True
                for p in late:
                    optimizer.add_param_group({"params": [p]})
            return func(*args, **(kwargs or {}))

    with Adding():
        optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in params + late] == [1] * 301


def test_an_option_whose_reading_drops_a_gradient() -> None:
    params = make_params(2, 100_000)
    optimizer = fusedopt.Adam([{"params": [p]} for p in params])

    class Meddling:
        armed = False

        def __float__(self) -> float:
            if self.armed:
                params[0].grad = None
            return 1e-3

    lr = optimizer.param_groups[1]["lr"] = Meddling()
    for p in params:
        p.grad = torch.ones(100_000 * 10)[::10]
    optimizer.step()
    optimizer.step()
    lr.armed = True
    optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in params] == [2, 3]


def test_collection_stays_as_another_thread_set_it() -> None:
    [p] = make_params(1, 8_000_000)
    p.grad = torch.ones_like(p)
    optimizer = fusedopt.Adam([p])
    optimizer.step()
    started = threading.Event()

    def switch_off() -> None:
        started.set()
        gc.disable()

    thread = threading.Thread(target=switch_off)
    try:
        thread.start()
        started.wait()
        optimizer.step()
        thread.join()
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_large_step_after_a_small_one_releases_the_gil() -> None:
    small, large = make_params(1, 3)[0], make_params(1, 20_000_000)[0]
    optimizer = fusedopt.Adam([small, large])
    small.grad, large.grad = torch.ones(3), torch.ones(20_000_000)
    optimizer.step()
    large.grad = None
    optimizer.step()
    large.grad = torch.ones(20_000_000)
    ticks, inside, done = 0, False, False

    def tick() -> None:
        nonlocal ticks
        while not done:
            ticks += inside

    thread = threading.Thread(target=tick)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        thread.start()
        inside = True
        optimizer.step()
        inside = False
        done = True
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert ticks > 1000
