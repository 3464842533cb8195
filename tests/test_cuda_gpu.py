"""On a GPU: the CPU's bits, one launch, graphs, streams, AMP, large tensors. Skipped where there is none."""

import copy
import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from optimizers import AWKWARD, DTYPES, ROWS, VARIANTS, Row, generator, gradients, name_of, parameters, split
from precision import FORMS, Case
from reference import assert_same_bits, varied_values
from test_layouts import COMPLEX, GRADS, LAYOUTS
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import fusedopt
from fusedopt._config import _C

if not torch.cuda.is_available():
    pytest.skip("no GPU: not yet run on a GPU", allow_module_level=True)
if (reason := _C.why_no_cuda()) is not None:
    pytest.fail(f"there is a GPU, but fusedopt cannot use it: {reason}", pytrace=False)

CHUNK = _C.cuda_chunk
LARGE = (*AWKWARD, CHUNK, CHUNK - 1, 3 * CHUNK + 5, 0)


def to_cuda(tensor: Tensor) -> Tensor:
    """A copy on the GPU with the same strides and offset."""
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return whole.cuda().as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def all_params(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def assert_same_state(on_gpu: Optimizer, on_cpu: Optimizer) -> None:
    for i, (p, q) in enumerate(zip(all_params(on_gpu), all_params(on_cpu), strict=True)):
        assert_same_bits(p.detach().cpu(), q.detach(), f"parameter {i}")
        mine, wanted = on_gpu.state[p], on_cpu.state[q]
        assert list(mine) == list(wanted)
        for name, value in wanted.items():
            assert_same_bits(mine[name].cpu(), value, f"{name} of parameter {i}")


class Pair:
    """The same training on the GPU and on the CPU."""

    def __init__(self, make: Callable[..., Optimizer], initial: Sequence[Tensor], **more: Any) -> None:
        self.ours = [to_cuda(value).requires_grad_() for value in initial]
        self.theirs = [value.detach().clone(memory_format=torch.preserve_format).requires_grad_() for value in initial]
        self.on_gpu, self.on_cpu = make(self.ours, **more), make(self.theirs, **more)

    def step(self, grads: Sequence[Tensor | None]) -> None:
        for p, q, grad in zip(self.ours, self.theirs, grads, strict=True):
            p.grad = None if grad is None else to_cuda(grad)
            q.grad = grad
        self.on_gpu.step()
        self.on_cpu.step()

    def check(self) -> None:
        assert_same_state(self.on_gpu, self.on_cpu)


def ordinary(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return varied_values(torch.Size(shape).numel(), dtype, generator(seed), wild=False).view(torch.Size(shape))


def kernels(step: Callable[[], Any]) -> tuple[list[str], list[str]]:
    """The names of the kernels and of the copies and fills of a step."""
    step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    copies = [name for name in names if name.startswith(("Memcpy", "Memset"))]
    return [name for name in names if name not in copies and "#" not in name], copies


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_device", [False, True], ids=["host_counts", "device_counts"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_same_bits(row: Row, dtype: torch.dtype, on_device: bool) -> None:
    numel, steps = 40_009, 12
    initial = varied_values(numel, dtype, generator(5), finite=row.finite)
    more = row.on_device() if on_device else {}
    pair = Pair(row.make, [p.detach() for p in parameters(initial, LARGE)], **more)
    if on_device:
        for group in pair.on_gpu.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"] = group["lr"].cuda()
    for grad in gradients(numel, dtype, steps, finite=row.finite):
        pair.step(split(grad, LARGE))
    pair.check()


@pytest.mark.parametrize("dtype", [*DTYPES, *COMPLEX], ids=name_of)
@pytest.mark.parametrize("row", VARIANTS, ids=name_of)
def test_layouts(row: Row, dtype: torch.dtype) -> None:
    params = [make(dtype, seed) for seed, make in enumerate(LAYOUTS.values())]
    ours = [to_cuda(p).requires_grad_() for p in params]
    theirs = [p.detach().clone().requires_grad_() for p in params]
    on_gpu, on_cpu = row.make(ours), row.make(theirs)
    for step, make in enumerate(GRADS.values()):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            grad = make(q.detach(), 100 * step + i)
            p.grad, q.grad = to_cuda(grad), grad
        on_gpu.step()
        on_cpu.step()
        for p, q in zip(ours, theirs, strict=True):
            assert_same_bits(p.detach().cpu(), q.detach())


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("fused", [False, True], ids=["host_counts", "device_counts"])
def test_sparse_gradients(dtype: torch.dtype, fused: bool) -> None:
    """Coalesced ones have the CPU's bits, beside a dense parameter; repeats are torch's coalesce's business."""
    shapes = [(500, 64), (500, 7), (500,), (3000,)]
    pair = Pair(
        lambda p, **k: fusedopt.Adagrad(p, **k), [ordinary(s, i, dtype) for i, s in enumerate(shapes)], fused=fused
    )
    for step in range(4):
        for i, shape in enumerate(shapes[:3]):
            touched = torch.randperm(500, generator=generator(10 * step + i))[:200].sort().values
            values = ordinary((200, *shape[1:]), step + i, dtype)
            grad = torch.sparse_coo_tensor(touched[None], values, shape, is_coalesced=True, check_invariants=True)
            pair.ours[i].grad, pair.theirs[i].grad = grad.cuda(), grad
        dense = ordinary(shapes[3], step, dtype)
        pair.ours[3].grad, pair.theirs[3].grad = dense.cuda(), dense
        pair.on_gpu.step(), pair.on_cpu.step()
        pair.check()


def test_sparse_gradients_with_repeats() -> None:
    """As after torch's coalesce."""
    params = [Parameter(ordinary((50, 24), 1).cuda()) for _ in range(2)]
    optimizers = [fusedopt.Adagrad([p]) for p in params]
    for step in range(3):
        indices = torch.randint(0, 50, (1, 200), generator=generator(step)).cuda()
        grad = torch.sparse_coo_tensor(indices, ordinary((200, 24), step).cuda(), (50, 24), check_invariants=True)
        params[0].grad, params[1].grad = grad, grad.coalesce()
        for optimizer in optimizers:
            optimizer.step()
    assert_same_bits(params[0].detach(), params[1].detach())


def test_a_coalesced_sparse_step_is_one_launch() -> None:
    table, dense = Parameter(ordinary((500, 64), 1).cuda()), Parameter(ordinary((3000,), 2).cuda())
    grad = torch.sparse_coo_tensor(
        torch.arange(0, 500, 5)[None].cuda(),
        ordinary((100, 64), 3).cuda(),
        (500, 64),
        is_coalesced=True,
        check_invariants=True,
    )
    table.grad, dense.grad = grad, ordinary((3000,), 4).cuda()
    launched, copies = kernels(fusedopt.Adagrad([table, dense], fused=True).step)
    assert len(launched) == 1 and "Adagrad" in launched[0]
    assert all("HtoD" in copy for copy in copies)


def test_long_run() -> None:
    pair = Pair(lambda p, **k: fusedopt.AdamW(p, lr=1e-2, **k), [ordinary((100_003,), 1), ordinary((300, 70), 2)])
    for step in range(1000):
        pair.step([ordinary((100_003,), step), ordinary((300, 70), step + 1)])
    pair.check()


def test_near_torchs_fused() -> None:
    """A sanity check against torch's own kernel, which contracts otherwise; both after 100 steps from one start."""
    ours = [Parameter(ordinary((1000, 33), 1).cuda())]
    theirs = [Parameter(ours[0].detach().clone())]
    a, b = fusedopt.AdamW(ours, fused=True), torch.optim.AdamW(theirs, fused=True)
    for step in range(100):
        ours[0].grad = ordinary((1000, 33), step).cuda()
        theirs[0].grad = ours[0].grad.clone()
        a.step()
        b.step()
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-6)  # lr 1e-3 a step: 100 of them make up to 0.1
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    a.load_state_dict(copy.deepcopy(b.state_dict()))
    a.step()
    b.step()
    assert a.state[ours[0]]["step"].is_cuda and float(a.state[ours[0]]["step"]) == 101


# --- one launch, no waiting -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("count", [1, 148, 10_000])
def test_one_launch(count: int, fused: bool) -> None:
    flags: list[dict[str, Any]] = [{}, {"amsgrad": True}, {"maximize": True}, {"weight_decay": 0.1}, {"lr": 0.5}]
    params = [Parameter(torch.randn(50, device="cuda")) for _ in range(count * len(flags))]
    for param in params:
        param.grad = torch.randn_like(param)
    groups = [{"params": params[i :: len(flags)], **flag} for i, flag in enumerate(flags)]
    optimizer = fusedopt.Adam(groups, fused=fused)
    optimizer.step()
    launched, copied = kernels(optimizer.step)
    assert len(launched) == 1 and "step_kernel" in launched[0], launched
    assert copied == []

    def with_new_gradients() -> None:
        for param in params:
            param.grad = param.grad.clone()
        torch.cuda.synchronize()
        before = _C.units_run()["cuda"]
        optimizer.step()
        assert _C.units_run()["cuda"] == before + 1

    launched, copied = kernels(with_new_gradients)
    assert sum("step_kernel" in name for name in launched) == 1
    assert sum("HtoD" in name for name in copied) == 1


def test_one_launch_a_dtype() -> None:
    params = [Parameter(torch.ones(5, dtype=dtype, device="cuda")) for dtype in [*DTYPES, *COMPLEX, *DTYPES]]
    for param in params:
        param.grad = torch.ones_like(param)
    launched, _ = kernels(fusedopt.Adam(params).step)
    assert len(launched) == len(DTYPES)


@pytest.mark.parametrize("fused", [False, True])
def test_no_synchronisation(fused: bool) -> None:
    params = [Parameter(torch.randn(1000, device="cuda")) for _ in range(5)]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = fusedopt.Adam(params, fused=fused)
    optimizer.step()
    torch.cuda.synchronize()
    scale, found_inf = torch.tensor(2.0, device="cuda"), torch.tensor(0.0, device="cuda")
    slept = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)  # about a second
    slept.record()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            if fused:
                optimizer.grad_scale, optimizer.found_inf = scale, found_inf
            for param in params:
                param.grad = param.grad.clone()
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not slept.query()  # nothing above waited for the device
    torch.cuda.synchronize()


# --- graphs -----------------------------------------------------------------------------------------------------------


def warm_up(step: Callable[[], Any]) -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.parametrize("row", VARIANTS, ids=name_of)
def test_replays_equal_steps(row: Row) -> None:
    initial = [ordinary((5000,), 1), ordinary((0,), 1), ordinary((7, 3), 2)]
    pairs = []
    for _ in range(2):
        params = [Parameter(value.cuda()) for value in initial]
        for i, param in enumerate(params):
            param.grad = ordinary(param.shape, 10 + i).cuda()
        lr = torch.tensor(1e-2, device="cuda")
        pairs.append((params, row.make(params, lr=lr, **row.on_device()), lr))
    (captured, optimizer, lr), (eager, twin, twin_lr) = pairs
    warm_up(optimizer.step)
    warm_up(twin.step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for step in range(100):
        for p, q in zip(captured, eager, strict=True):
            p.grad.copy_(ordinary(p.shape, step).cuda())
            q.grad.copy_(p.grad)
        lr.fill_(1e-2 / (step + 1))
        twin_lr.fill_(1e-2 / (step + 1))
        graph.replay()
        twin.step()
    torch.cuda.synchronize()
    for p, q in zip(captured, eager, strict=True):
        assert_same_bits(p.detach(), q.detach())
        for name, value in twin.state[q].items():
            assert_same_bits(optimizer.state[p][name], value, name)
    # Other options, by the documented call.
    for o in (optimizer, twin):
        o.param_groups[0].update(eps=1e-3, betas=(0.5, 0.9))
    optimizer.update_captured()
    graph.replay()
    twin.step()
    for p, q in zip(captured, eager, strict=True):
        assert_same_bits(p.detach(), q.detach())


def test_a_whole_training_step_in_a_graph() -> None:
    """torch's own recipe: the captured backward makes the gradients."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 40), torch.nn.Tanh(), torch.nn.Linear(40, 5)).cuda()
    twin = torch.nn.Sequential(torch.nn.Linear(20, 40), torch.nn.Tanh(), torch.nn.Linear(40, 5)).cuda()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(16, 20, device="cuda")
    a = fusedopt.AdamW(model.parameters(), capturable=True)
    b = fusedopt.AdamW(twin.parameters(), capturable=True)

    def train(net: torch.nn.Module, optimizer: Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)
        net(x).square().mean().backward()
        optimizer.step()

    warm_up(lambda: train(model, a))
    warm_up(lambda: train(twin, b))
    graph = torch.cuda.CUDAGraph()
    a.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        model(x).square().mean().backward()
        a.step()
    for step in range(20):
        x.copy_(torch.randn(16, 20, generator=generator(step)))
        graph.replay()
        train(twin, b)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)  # cuBLAS may choose other kernels under capture
    assert float(a.state[next(model.parameters())]["step"]) == 22


def test_a_graph_outlives_its_optimizer() -> None:
    param = Parameter(torch.ones(1000, device="cuda"))
    param.grad = torch.ones(1000, device="cuda")
    optimizer = fusedopt.Adam([param], capturable=True)
    warm_up(optimizer.step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    state = dict(optimizer.state[param])  # the graph's tensors must live, as in torch
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    rubbish = [torch.full((1 << 16,), 7.0, device="cuda") for _ in range(50)]
    before = param.detach().clone()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.isfinite(param).all() and not torch.equal(param, before)
    assert float(state["step"]) == 3 and len(rubbish) == 50


def test_what_cannot_be_captured_says_so() -> None:
    param = Parameter(torch.ones(10, device="cuda"))
    param.grad = torch.ones(10, device="cuda")
    optimizer = fusedopt.Adam([param])
    optimizer.step()
    torch.cuda.synchronize()
    before = param.detach().clone()
    other = torch.zeros(1, device="cuda")
    with pytest.raises(RuntimeError, match="capturable=True"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        other.add_(1)  # torch warns of an empty graph
        optimizer.step()
    assert torch.equal(param, before) and float(optimizer.state[param]["step"]) == 1


# --- streams, devices, AMP --------------------------------------------------------------------------------------------


def test_side_stream() -> None:
    pair = Pair(fusedopt.Adam, [ordinary((CHUNK * 50,), 1)])
    stream = torch.cuda.Stream()
    for step in range(20):
        grad = ordinary((CHUNK * 50,), step)
        pair.theirs[0].grad = grad
        pair.on_cpu.step()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000)
            pair.ours[0].grad = grad.pin_memory().cuda(non_blocking=True)
            pair.on_gpu.step()
        torch.cuda.current_stream().wait_stream(stream)
    pair.check()


def test_cpu_and_cuda_parameters_in_one_optimizer() -> None:
    params = [Parameter(ordinary((1000,), 1)), Parameter(ordinary((1000,), 1).cuda())]
    optimizer = fusedopt.Adam(params)
    for step in range(5):
        for param in params:
            param.grad = ordinary((1000,), step).to(param.device)
        optimizer.step()
    assert_same_bits(params[1].detach().cpu(), params[0].detach())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_several_devices() -> None:
    params = [Parameter(ordinary((1000,), 1).to(f"cuda:{i}")) for i in range(2)]
    optimizer = fusedopt.Adam(params, fused=True)
    for step in range(5):
        for param in params:
            param.grad = ordinary((1000,), step).to(param.device)
        optimizer.step()
    assert torch.cuda.current_device() == 0
    assert_same_bits(params[1].detach().cpu(), params[0].detach().cpu())


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler(fused: bool) -> None:
    initial = ordinary((3000,), 1)
    results = []
    for device in ("cuda", "cpu"):
        param = Parameter(initial.to(device).clone())
        optimizer = fusedopt.AdamW([param], lr=1e-2, fused=fused)
        scaler = torch.amp.GradScaler(device, init_scale=3000.0, growth_interval=3)
        for step in range(12):
            optimizer.zero_grad()
            loss = (param * ordinary((3000,), step).to(device)).sum() * (torch.inf if step == 5 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append((param.detach().cpu(), optimizer.state[param]["exp_avg_sq"].cpu()))
        assert float(optimizer.state[param]["step"]) == 11
        assert optimizer.state[param]["step"].is_cuda == (fused and device == "cuda")
    for actual, expected in zip(*results, strict=True):
        assert_same_bits(actual, expected)


def test_errors_name_the_device() -> None:
    param = Parameter(torch.ones(3, device="cuda"))
    optimizer = fusedopt.Adam([param])
    param.grad = torch.ones(3, device="cuda")
    optimizer.step()
    optimizer.state[param]["exp_avg"] = torch.zeros(3)
    with pytest.raises(RuntimeError, match=r"state 'exp_avg' is on device 'cpu' but the parameter is on 'cuda:0'"):
        optimizer.step()
    other = fusedopt.Adam([param], lr=torch.tensor(0.1, device="cuda"))
    with pytest.raises(RuntimeError, match="capturable=True"):
        other.step()


# --- large ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numel", [2**31 - 1, 2**31 + CHUNK + 5])
def test_beyond_32_bits(numel: int) -> None:
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of GPU memory")
    param = Parameter(torch.ones(numel, dtype=torch.bfloat16, device="cuda"))
    param.grad = torch.ones_like(param)
    ends = [slice(0, 3 * CHUNK), slice(numel // 2, numel // 2 + CHUNK), slice(numel - 2 * CHUNK - 7, numel)]
    for i, end in enumerate(ends):
        param.grad[end] = ordinary(param.grad[end].shape, i, torch.bfloat16).cuda()
    parts = [Parameter(param.detach()[end].cpu().clone()) for end in ends]
    for part, end in zip(parts, ends, strict=True):
        part.grad = param.grad[end].cpu()
    on_gpu, on_cpu = fusedopt.AdamW([param]), fusedopt.AdamW(parts)
    for _ in range(2):
        on_gpu.step()
        on_cpu.step()
    for part, end in zip(parts, ends, strict=True):
        assert_same_bits(param.detach()[end].cpu(), part.detach())
        for name in ("exp_avg", "exp_avg_sq"):
            assert_same_bits(on_gpu.state[param][name][end].cpu(), on_cpu.state[part][name], name)
    # Elsewhere all elements are alike.
    assert bool((param.detach()[3 * CHUNK : numel // 2] == param.detach()[3 * CHUNK]).all())


# --- for compute-sanitizer: every path of the kernel, small -----------------------------------------------------------


SANITIZED = {
    "adam": fusedopt.Adam,
    "adam_device_counts": lambda groups: fusedopt.Adam(groups, capturable=True),
    "radam_device_counts": lambda groups: fusedopt.RAdam(groups, capturable=True),
    "adagrad": lambda groups: fusedopt.Adagrad([{"params": group["params"]} for group in groups]),
}


@pytest.mark.parametrize("make", SANITIZED.values(), ids=SANITIZED)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_sanitizer(dtype: torch.dtype, make: Callable[..., Optimizer]) -> None:
    flags: list[dict[str, Any]] = [{}, {"amsgrad": True, "weight_decay": 0.1}]
    values = [make(dtype, seed) for seed, make in enumerate(LAYOUTS.values())]
    values += [ordinary((size,), size, dtype) for size in (0, 1, CHUNK - 1, CHUNK, 2 * CHUNK + 3, 0)]
    params = [to_cuda(value).requires_grad_() for value in values]
    groups = [{"params": params[i::2], **flag} for i, flag in enumerate(flags)]
    optimizer = make(groups)
    for _ in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
        if isinstance(optimizer, fusedopt.Adagrad):
            params[-2].grad = params[-2].grad.to_sparse()
        optimizer.step()
    torch.cuda.synchronize()
    assert all(torch.isfinite(param).all() for param in params)


# --- the phase around the update --------------------------------------------------------------------------------------

PHASE: dict[str, Any] = {"max_grad_norm": 0.7, "skip_nonfinite": True, "ema_decay": 0.9, "stats": True}


def assert_same_measurements(pair: Pair) -> None:
    assert pair.on_gpu.grad_norm is not None and pair.on_cpu.grad_norm is not None
    assert pair.on_gpu.grad_norm.is_cuda and pair.on_gpu.skipped_steps.is_cuda
    assert_same_bits(pair.on_gpu.grad_norm.cpu(), pair.on_cpu.grad_norm)
    assert pair.on_gpu.skipped_steps.item() == pair.on_cpu.skipped_steps.item()
    mine, wanted = pair.on_gpu.stats(), pair.on_cpu.stats()
    assert list(mine) == list(wanted)
    for name, row in wanted.items():
        # In another order, and on the CPU from short sums in opmath: a neighbour at most.
        assert mine[name] == pytest.approx(row, rel=1.2e-7, nan_ok=True), name


@pytest.mark.parametrize("order", [2.0, float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("row", VARIANTS, ids=name_of)
def test_the_phase(row: Row, dtype: torch.dtype, order: float) -> None:
    """Clipped, skipped, averaged and measured as on the CPU; also parameters without a gradient."""
    initial = [ordinary([size], size, dtype) for size in LARGE]
    pair = Pair(row.make, initial, norm_type=order, **PHASE)
    for step in range(6):
        grads: list[Tensor | None] = [ordinary([size], 100 * step + size, dtype) for size in LARGE]
        if step in (0, 3):
            large = grads[-2]
            assert large is not None
            large[-1] = float("inf")
        if step == 4:
            grads[2] = None
        pair.step(grads)
        pair.check() if step else None  # a first step that the device skips leaves state that the CPU takes back
        assert_same_measurements(pair)
    assert pair.on_cpu.skipped_steps == 2


def test_launches_of_the_phase() -> None:
    """Two where all gradients are read before the first write, else one; and nothing waits."""
    for options, wanted in [
        ({"ema_decay": 0.9, "stats": True}, 1),
        ({"max_grad_norm": 0.7}, 2),
        ({"skip_nonfinite": True}, 2),
        (PHASE, 2),
    ]:
        params = [ordinary([size], size).cuda().requires_grad_() for size in LARGE]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer = fusedopt.AdamW(params, fused=True, **options)
        optimizer.step()
        names, copies = kernels(optimizer.step)
        assert (len(names), copies) == (wanted, []), (options, names, copies)
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
            norm = optimizer.grad_norm
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert (norm is None) == (wanted == 1)


def test_the_phase_in_a_graph() -> None:
    pair = Pair(fusedopt.AdamW, [ordinary([size], size) for size in LARGE], capturable=True, **PHASE)
    for step in range(2):
        pair.step([ordinary([size], 10 * step + size) for size in LARGE])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pair.on_gpu.step()
    for step in range(2, 6):
        for p, q in zip(pair.ours, pair.theirs, strict=True):
            grad = ordinary(p.shape, 10 * step + p.numel())
            if step == 3 and p.numel() == LARGE[-2]:
                grad[-1] = float("nan")
            p.grad.copy_(grad)
            q.grad = grad
        graph.replay()
        pair.on_cpu.step()
        pair.check()
        assert_same_measurements(pair)
    assert pair.on_cpu.skipped_steps == 1


@pytest.mark.parametrize("order", [2.0, float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_clip_grad_norm(dtype: torch.dtype, order: float) -> None:
    grads = [ordinary([size], size, dtype) for size in LARGE]
    norms = []
    for device in ("cuda", "cpu"):
        params = [Parameter(torch.zeros(size, dtype=dtype, device=device)) for size in LARGE]
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.to(device, copy=True)
        norm = fusedopt.clip_grad_norm_(params, 0.5, order)
        assert norm.device.type == device
        norms.append((norm.cpu(), [p.grad.cpu() for p in params if p.grad is not None]))
    assert_same_bits(norms[0][0], norms[1][0])
    for mine, wanted in zip(norms[0][1], norms[1][1], strict=True):
        assert_same_bits(mine, wanted)


def test_our_scaler() -> None:
    pair = Pair(fusedopt.AdamW, [ordinary([size], size) for size in LARGE], fused=True, max_grad_norm=0.5)
    scalers = [fusedopt.GradScaler(device, init_scale=1024.0, growth_interval=2) for device in ("cuda", "cpu")]
    for step in range(6):
        for scaler, optimizer, device in zip(scalers, (pair.on_gpu, pair.on_cpu), ("cuda", "cpu"), strict=True):
            scaler.scale(torch.ones((), device=device))
            for p in all_params(optimizer):
                grad = ordinary(p.shape, 10 * step + p.numel()) * scaler.get_scale()
                if step == 3 and p.numel() == LARGE[-2]:
                    grad[0] = float("inf")
                p.grad = grad.to(device)
            scaler.step(optimizer)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        pair.check()


# --- forms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_device", [False, True], ids=["host_counts", "device_counts"])
@pytest.mark.parametrize("case", FORMS, ids=lambda case: case.id)
def test_forms(case: Case, on_device: bool) -> None:
    """Masters, roundings and states of every kind: the CPU's bits."""
    shapes = [(3, 300), (129,), (2, CHUNK + 4), (CHUNK + 5,), (40, 256), (7, 33, 5), (0, 128)]
    for row in VARIANTS:
        if isinstance(row.kwargs().get("lr"), Tensor):
            continue
        values = [ordinary(shape, i, case.dtype) for i, shape in enumerate(shapes)]
        pair = Pair(row.make, values, **case.form.options(), **(row.on_device() if on_device else {}))
        for param in (*pair.ours, *pair.theirs):
            param.grad_dtype = case.grad_dtype
        for step in range(6):
            pair.step([ordinary(shape, 100 * step + i, case.grad_dtype) for i, shape in enumerate(shapes)])
        pair.check()
