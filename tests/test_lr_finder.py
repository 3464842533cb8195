"""The learning-rate range test: what it measures and suggests, and that it leaves no trace."""

from __future__ import annotations

import importlib.util
import itertools
import math
import random
import signal
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from packages import require
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, StepLR
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler

import fusedopt
from fusedopt import lr_finder
from fusedopt.lr_finder import RangeTest, range_test

# --- no trace -----------------------------------------------------------------------------------------------------

ENTERED = (nn.Module, Optimizer, LRScheduler, torch.amp.GradScaler, DataLoader, Sampler)


def bytes_of(tensor: Tensor, everything: bool) -> bytes:
    """Of the elements; or of the whole storage, with gaps, of which some were never written."""
    if not everything:
        return tensor.detach().resolve_conj().reshape(-1).view(torch.uint8).numpy().tobytes()
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,)).numpy().tobytes()


def fingerprint(roots: Mapping[str, Any], *, ids: bool = True) -> dict[str, Any]:
    """Every byte and every identity that can be reached, by path. Without `ids`, what two equal worlds share."""
    found: dict[str, Any] = {}
    seen: set[int] = set()

    def note(path: str, *facts: Any) -> None:
        assert path not in found
        found[path] = facts

    def walk(path: str, value: Any) -> None:
        if isinstance(value, (type(None), bool, int, float, str, bytes, torch.dtype, torch.device)):
            note(path, repr(value))
            return
        note(path, type(value), id(value) if ids else None)
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, Tensor):
            where = (value.data_ptr(), value.storage_offset()) if ids and value.layout == torch.strided else None
            note(path + ".meta", value.dtype, value.shape, value.requires_grad, value.is_leaf, where)
            if value.layout == torch.sparse_coo:
                walk(path + ".indices", bytes_of(value._indices(), ids))
                walk(path + ".values", bytes_of(value._values(), ids))
            else:
                note(path + ".bytes", value.stride(), bytes_of(value, ids))
            if value.is_leaf:
                walk(path + ".grad", value.grad)
            walk(path + ".dict", vars(value))
        elif isinstance(value, Mapping):
            for i, (key, item) in enumerate(value.items()):
                name = key if isinstance(key, str) else i
                walk(f"{path}.key({name})", key)
                walk(f"{path}[{name}]", item)
        elif isinstance(value, (list, tuple, deque)):
            for i, item in enumerate(value):
                walk(f"{path}[{i}]", item)
        elif isinstance(value, torch.Generator):
            note(path + ".state", value.get_state().numpy().tobytes())
        elif isinstance(value, random.Random):
            note(path + ".state", value.getstate())
        elif isinstance(value, np.random.Generator):
            note(path + ".state", repr(value.bit_generator.state))
        elif isinstance(value, ENTERED):
            walk(path + ".dict", vars(value))
            if "_stepper" in vars(value):  # of our optimizers, since their first step
                walk(path + ".skipped_steps", value.skipped_steps.item())
                walk(path + ".grad_norm", None if value.grad_norm is None else value.grad_norm.item())

    for name, root in roots.items():
        walk(name, root)
    return found


def global_random_states() -> dict[str, Any]:
    return {
        "python": repr(random.getstate()),
        "numpy": repr([part.tobytes() if isinstance(part, np.ndarray) else part for part in np.random.get_state()]),
        "torch": torch.get_rng_state().numpy().tobytes(),
    }


def assert_same(now: dict[str, Any], before: dict[str, Any]) -> None:
    assert now.keys() == before.keys()
    different = [path for path in before if now[path] != before[path]]
    assert not different, f"{len(different)} of {len(before)} differ: {different[:5]}"


class Net(nn.Module):
    """All that may be easy to forget: tied, frozen, transposed, unused, NaNs, buffers of all kinds, modes, counters."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8, dtype=dtype)
        self.norm = nn.BatchNorm1d(8, dtype=dtype)
        self.rested = nn.BatchNorm1d(8, dtype=dtype).eval()
        self.dropout = nn.Dropout(0.2)
        self.hidden = nn.Linear(8, 8, dtype=dtype)
        self.hidden.weight = Parameter(torch.randn(8, 8, dtype=dtype).t())
        self.frozen = nn.Linear(8, 8, dtype=dtype).requires_grad_(False)
        self.head = nn.Linear(8, 12, dtype=dtype)
        self.head.weight = self.embedding.weight
        self.unused = Parameter(torch.randn(3, dtype=dtype))
        self.unused.main_grad = torch.ones(3)
        nan = torch.tensor([0x7FC00001, -0x3FEDCC, 0x7F800001], dtype=torch.int32)  # quiet, quiet, signalling
        self.frozen.register_buffer("nan", nan.view(torch.float32))
        self.register_buffer("seen", torch.zeros(3, dtype=torch.int64), persistent=False)
        self.register_buffer("expanded", torch.ones(4, 1).expand(4, 5))
        self.register_buffer("windows", torch.arange(6.0).unfold(0, 3, 1))
        self.register_buffer("conjugate", torch.full((2,), 1 + 2j).conj())
        self.register_buffer("replaced", torch.zeros(2))
        self.calls = 0
        self.recent: deque[Tensor] = deque(maxlen=2)
        self.pair = (torch.zeros(1), {"a": [torch.zeros(1)]})
        self.rng = np.random.default_rng(5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.rested(self.norm(self.embedding(tokens)))
        x = self.dropout(torch.tanh(self.hidden(x))) + self.frozen(x)
        with torch.no_grad():
            self.calls += 1
            self.seen += tokens.numel()
            self.expanded[:, 0].add_(self.rng.random())
            self.windows.as_strided((6,), (1,)).add_(1)
            self.conjugate.mul_(1j)
            self.replaced = self.replaced + np.random.random() + random.random()
            self.recent.append(x.detach())
            self.pair[0].add_(1)
            self.pair[1]["a"][0].add_(1)
            self.frozen.nan.zero_()
            self.unused.main_grad.mul_(2)
        return self.head(x)


class Tokens(Dataset):
    """Pairs of tokens; armed, it fails."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(3)
        self.tokens = torch.randint(12, (2, 40), generator=g)
        self.fails_after: float = math.inf

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.fails_after -= 1
        if self.fails_after < 0:
            raise OSError("the disk is gone")
        return self.tokens[0, index], self.tokens[1, index]


class World:
    """All that a training consists of."""

    def __init__(self, make: Callable[[Any], Optimizer], dtype: torch.dtype, scaler: torch.amp.GradScaler | None):
        torch.manual_seed(1)
        random.seed(2)
        np.random.seed(3)
        self.model = Net(dtype)
        self.outside = Parameter(torch.randn(5, dtype=dtype))  # only the optimizer has it
        trained = [*self.model.hidden.parameters(), *self.model.head.parameters()]
        groups = [
            {"params": [*trained, *self.model.frozen.parameters()]},
            {"params": [*self.model.norm.parameters(), self.outside]},  # `unused` and `rested` are in none
        ]
        self.optimizer = make(groups)
        self.scheduler = StepLR(self.optimizer, 2, gamma=0.5)
        self.scaler = scaler
        self.dataset = Tokens()
        generator = torch.Generator().manual_seed(4)
        sampler = RandomSampler(self.dataset, generator=torch.Generator().manual_seed(5))
        self.loader = DataLoader(self.dataset, batch_size=8, sampler=sampler, generator=generator)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        logits = model(batch[0]).float()
        return nn.functional.cross_entropy(logits, batch[1]) + self.outside.float().square().sum() / 10

    def train(self, steps: int) -> list[float]:
        batches = iter(self.loader)
        losses = []
        for _ in range(steps):
            batch = next(batches)

            def closure(batch: Any = batch) -> Tensor:
                self.optimizer.zero_grad()
                loss = self.loss(self.model, batch)
                losses.append(loss.item())
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
                return loss

            if isinstance(self.optimizer, torch.optim.LBFGS):
                self.optimizer.step(closure)
                continue
            closure()
            if self.scaler is None:
                self.optimizer.step()
            else:
                self.scaler.step(self.optimizer)
                self.scaler.update()
            self.scheduler.step()
        return losses

    def state(self) -> dict[str, Any]:
        return {**vars(self), **global_random_states()}


F32, BF16 = torch.float32, torch.bfloat16
MAKERS: dict[str, tuple[Callable[[Any], Optimizer], torch.dtype]] = {
    "adamw": (lambda g: fusedopt.AdamW(g, lr=1e-2), F32),
    "adamw-lr-tensor": (lambda g: fusedopt.AdamW(g, lr=torch.tensor(1e-2)), F32),
    "adamw-split": (lambda g: fusedopt.AdamW(g, lr=1e-2, master_weights="split"), BF16),
    "adamw-split-int8": (lambda g: fusedopt.AdamW(g, lr=1e-2, master_weights="split", state_dtype="int8"), BF16),
    "adamw-stochastic": (lambda g: fusedopt.AdamW(g, lr=1e-2, rounding="stochastic"), BF16),
    "adam-int8": (lambda g: fusedopt.Adam(g, lr=1e-2, amsgrad=True, state_dtype="int8"), F32),
    "adam-phase": (
        lambda g: fusedopt.Adam(g, lr=1e-2, ema_decay=0.9, max_grad_norm=0.5, skip_nonfinite=True, stats=True),
        F32,
    ),
    "radam": (lambda g: fusedopt.RAdam(g, lr=1e-2), F32),
    "adagrad": (lambda g: fusedopt.Adagrad(g, lr=1e-2, initial_accumulator_value=0.1), F32),
    "offload": (lambda g: fusedopt.CPUOffload(g, fusedopt.AdamW, lr=1e-2), F32),
    "offload-overlap": (lambda g: fusedopt.CPUOffload(g, fusedopt.AdamW, lr=1e-2, overlap_backward=True), F32),
    "torch-adamw": (lambda g: torch.optim.AdamW(g, lr=1e-2), F32),
    "torch-adamw-fused": (lambda g: torch.optim.AdamW(g, lr=torch.tensor(1e-2), fused=True), F32),
    "torch-adagrad": (lambda g: torch.optim.Adagrad(g, lr=1e-2), F32),
    "torch-sgd-momentum": (lambda g: torch.optim.SGD(g, lr=1e-2, momentum=0.9), F32),
}


class LBFGS(torch.optim.LBFGS):
    """Which takes only one group."""

    def __init__(self, groups: Any) -> None:
        super().__init__(
            [p for group in groups for p in group["params"] if p.is_contiguous()], lr=0.1, max_iter=3, history_size=2
        )


MAKERS["torch-lbfgs"] = (LBFGS, F32)
SCALERS: dict[str, type[torch.amp.GradScaler]] = {"scaler": torch.amp.GradScaler, "our_scaler": fusedopt.GradScaler}


class BackwardError(Exception):
    pass


def fail(_: Tensor) -> None:
    raise BackwardError


def end_normally(world: World, **options: Any) -> None:
    result = range_test(world.model, world.optimizer, **options, end=0.1)
    assert result.stopped is None and len(result.lrs) == 9


def diverge(world: World, **options: Any) -> None:
    result = range_test(world.model, world.optimizer, **{**options, "steps": 40}, end=1e30)
    assert result.stopped is not None and len(result.lrs) < 40


def fail_in_loss(world: World, **options: Any) -> None:
    calls = iter(range(100))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if next(calls) == 5:
            raise ZeroDivisionError
        return world.loss(model, batch)

    with pytest.raises(ZeroDivisionError):
        range_test(world.model, world.optimizer, **{**options, "loss": loss})


def fail_in_backward(world: World, **options: Any) -> None:
    calls = iter(range(100))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        value = world.loss(model, batch)
        if next(calls) == 5:
            value.register_hook(fail)
        return value

    with pytest.raises(BackwardError):
        range_test(world.model, world.optimizer, **{**options, "loss": loss})


def fail_in_loader(world: World, **options: Any) -> None:
    world.dataset.fails_after = 30
    with pytest.raises(OSError, match="the disk is gone"):
        range_test(world.model, world.optimizer, **options)
    world.dataset.fails_after = math.inf  # the data is not looked after


def interrupt(world: World, **options: Any) -> None:
    calls = iter(range(100))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return world.loss(model, batch)

    with pytest.raises(KeyboardInterrupt):
        range_test(world.model, world.optimizer, **{**options, "loss": loss})


ENDS = [end_normally, diverge, fail_in_loss, fail_in_backward, fail_in_loader, interrupt]


def make_world(name: str, warm_up: int) -> World:
    """The same each time, global random states included."""
    maker, _, scaler = name.partition("+")
    make, dtype = MAKERS[maker]
    world = World(make, dtype, SCALERS[scaler]("cpu", init_scale=2.0**20, growth_interval=3) if scaler else None)
    world.train(warm_up)
    world.model.hidden.weight.grad = None  # after a warm-up others have one
    with torch.no_grad():
        world.model.hidden.bias.add_(0.5)  # as by a checkpoint: CPUOffload has to notice, even behind a test
    return world


def run_a_test(world: World, end: Callable[..., None]) -> None:
    before = world.model.hidden.bias.detach().clone()
    moved = []
    look = world.model.register_forward_pre_hook(
        lambda *_: moved.append(not torch.equal(before, world.model.hidden.bias))
    )
    options = {"loss": world.loss, "batches": world.loader, "steps": 9, "start": 1e-2, "progress": False}
    end(world, **options, grad_scaler=world.scaler)
    look.remove()
    assert moved[-1]


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
@pytest.mark.parametrize("warm_up", [0, 3])
@pytest.mark.parametrize("name", [*MAKERS, "adamw+scaler", "adam-phase+our_scaler", "torch-sgd-momentum+scaler"])
def test_no_trace_is_left_and_the_training_goes_on(name: str, warm_up: int, end: Callable[..., None]) -> None:
    """All is as it was, to the byte and the object; and the next steps are those of a training without the test."""
    twin, world = make_world(name, warm_up), make_world(name, warm_up)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    before = fingerprint(world.state())
    run_a_test(world, end)
    assert_same(fingerprint(world.state()), before)

    losses = world.train(3)
    after = fingerprint(world.state(), ids=False)
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    assert losses == twin.train(3)
    assert_same(after, fingerprint(twin.state(), ids=False))


class Parabola(nn.Module):
    """A model of one number, whose loss is curvature / 2 * x^2."""

    def __init__(self, curvature: float = 1.0, x: float = 1.0) -> None:
        super().__init__()
        self.curvature = curvature
        self.x = Parameter(torch.tensor(x, dtype=torch.float64))

    def forward(self, batch: Any = None) -> Tensor:
        return self.curvature / 2 * self.x.square()


def quadratic(model: nn.Module, batch: Any) -> Tensor:
    return model(batch)


def forever() -> list[None]:
    return [None]  # it is begun again


def test_sparse_gradients() -> None:
    """Those that are there are put aside, and are the same objects afterwards."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Flatten(0), nn.Linear(12, 1))
    optimizer = fusedopt.Adagrad(model.parameters(), lr=0.1)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().sum()

    batches = [torch.tensor([1, 2, 1]), torch.tensor([3, 9, 0])]
    for batch in batches:
        loss(model, batch).backward()
    assert model[0].weight.grad.is_sparse
    before = fingerprint({"model": model, "optimizer": optimizer})
    result = range_test(model, optimizer, loss, batches, steps=5, start=0.01, end=1.0, progress=False)
    assert result.losses[2] < result.losses[0]
    assert_same(fingerprint({"model": model, "optimizer": optimizer}), before)


def test_memory_that_was_freed() -> None:
    """As FSDP does with what it has gathered."""

    class Freed(Parabola):
        def forward(self, batch: Any = None) -> Tensor:
            self.gathered.untyped_storage().resize_(0)
            return super().forward(batch)

    model = Freed()
    model.gathered = gathered = torch.arange(1000)
    range_test(model, torch.optim.SGD(model.parameters()), quadratic, forever(), end=0.1, progress=False)
    assert model.gathered is gathered and gathered.tolist() == list(range(1000))


def test_gradients_of_parameters_that_are_not_trained() -> None:
    """A frozen part of the model, and a criterion, have gradients from before: sparse, and written in place."""

    class Criterion(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = Parameter(torch.ones(1))

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            bucket.add_(1)  # as DDP does
            return self.scale.square() * (output - target).square().sum()

    torch.manual_seed(0)
    model, criterion = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 1)), Criterion()
    optimizer = fusedopt.AdamW(model[1].parameters(), lr=0.1)
    batches = [(torch.tensor([1, 2, 1]), torch.ones(3, 1))]
    bucket = torch.zeros(1)
    model[1].bias.grad = bucket.view(1)
    criterion(model(batches[0][0]), batches[0][1]).backward()
    assert model[0].weight.grad.is_sparse
    before = fingerprint({"model": model, "criterion": criterion, "optimizer": optimizer})
    range_test(model, optimizer, criterion, batches, steps=5, start=0.01, end=1.0, progress=False)
    assert_same(fingerprint({"model": model, "criterion": criterion, "optimizer": optimizer}), before)


def test_memory_and_objects_that_are_replaced() -> None:
    """By an optimizer that gives parameters new memory, and by a model that gives itself new parameters."""

    class Naive(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            for p in self.param_groups[0]["params"][:1]:
                p.data = p.data - self.param_groups[0]["lr"] * p.grad
            self.param_groups[0]["params"].append(Parameter(torch.ones(())))

    class Restless(Parabola):
        def forward(self, batch: Any = None) -> Tensor:
            value = super().forward(batch)
            self.register_parameter("y", Parameter(torch.ones(2)))
            self.child = nn.Linear(1, 1)
            return value

    model = Restless()
    optimizer = Naive(model.parameters(), lr=1.0)
    before = fingerprint({"model": model, "optimizer": optimizer})
    result = range_test(model, optimizer, quadratic, forever(), steps=5, start=0.1, end=0.5, progress=False)
    assert result.losses[-1] < 0.9 * result.losses[0]
    assert_same(fingerprint({"model": model, "optimizer": optimizer}), before)


@pytest.mark.parametrize("snapshot_device", [None, "cpu"])
def test_what_else_the_loss_changes(snapshot_device: str | None) -> None:
    class Teacher:
        """Of a class that nobody knows."""

        def __init__(self) -> None:
            self.average = torch.zeros(2)
            self.rng = random.Random(1)
            self.numpy = np.random.RandomState(1)
            self.torch = torch.Generator()

    model, teacher, history = Parabola(), Teacher(), [1, 2]
    other = fusedopt.Adam([Parameter(torch.ones(3))])
    scheduler = LambdaLR(other, lambda step: 1 / (1 + step))
    world = {"model": model, "teacher": vars(teacher), "history": history, "other": other, "scheduler": scheduler}
    before = fingerprint(world)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        teacher.average += teacher.rng.random() + teacher.numpy.random_sample()
        torch.rand(1, generator=teacher.torch)
        history.append(3)
        other.param_groups[0]["params"][0].grad = torch.ones(3)
        other.step()
        scheduler.step()
        return model(batch)

    also = [teacher, history, scheduler]  # which has the optimizer
    options: dict[str, Any] = {"also_restore": also, "snapshot_device": snapshot_device, "progress": False}
    range_test(model, torch.optim.SGD(model.parameters()), loss, forever(), end=0.1, steps=3, **options)
    assert_same(fingerprint(world), before)


class Shuffled(Sampler[int]):
    """Shuffles in place, with Python's generator."""

    def __init__(self) -> None:
        self.order = list(range(12))

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        random.shuffle(self.order)
        return iter(list(self.order))


class Endless:
    """Wraps a loader, as prefetchers do."""

    def __init__(self, loader: DataLoader[int]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


@pytest.mark.parametrize("wrap", [lambda loader: loader, Endless])
def test_samplers_and_what_is_wrapped(wrap: Callable[[DataLoader[int]], Any]) -> None:
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(list(range(12)), sampler=Shuffled(), generator=generator)
    order, state = list(loader.sampler.order), generator.get_state()
    model = Parabola()
    range_test(model, torch.optim.SGD(model.parameters()), quadratic, wrap(loader), end=0.1, steps=20, progress=False)
    assert loader.sampler.order == order
    assert torch.equal(generator.get_state(), state)


def test_what_is_named_in_containers() -> None:
    """Arrays, loaders, counters, and objects of unknown classes; what cannot be put back is an error."""

    class Metric:
        def __init__(self) -> None:
            self.sum = 0.0

    array, metric, counter = np.zeros(3), Metric(), Counter(calls=2)
    generator = torch.Generator().manual_seed(5)
    other = Endless(DataLoader(list(range(4)), shuffle=True, generator=generator))
    state = generator.get_state()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        array[1] += 1
        metric.sum += 1
        counter["calls"] += 1
        list(other)
        return model(batch)

    model = Parabola()
    model.calls = counter
    optimizer = torch.optim.SGD(model.parameters())

    def test(*also: Any) -> None:
        range_test(model, optimizer, loss, forever(), end=0.1, steps=3, progress=False, also_restore=also)

    test(array, {"metric": [metric]}, other.loader)
    assert array.tolist() == [0, 0, 0]
    assert metric.sum == 0
    assert torch.equal(generator.get_state(), state)
    assert counter == Counter(calls=2)
    with pytest.raises(TypeError, match="cannot put back a int, of also_restore"):
        test(3)


def test_all_is_put_back_whatever_comes() -> None:
    """A second Ctrl-C waits; where one thing cannot be put back, all others are."""
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(4)])
    before = [param.detach().clone() for param in model.parameters()]

    class Impatient:
        """Like the state of a generator of NumPy's, but one that interrupts, and then fails."""

        def __init__(self) -> None:
            self.__dict__["armed"] = []

        def __setattr__(self, name: str, value: Any) -> None:
            signal.raise_signal(signal.SIGINT)
            raise OSError("no longer there")

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(batch).square().mean()

    snapshot = lr_finder._Snapshot(None)
    impatient = Impatient()
    snapshot._undo.append(lambda: setattr(impatient, "state", 1))  # the first of all
    snapshot.add(*model.parameters())
    with pytest.raises(KeyboardInterrupt), snapshot:
        for param in model.parameters():
            param.data.zero_()
    assert all(map(torch.equal, model.parameters(), before))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of Python 3.12, about threads that torch has
def test_an_epoch_of_persistent_workers_goes_on() -> None:
    generator = torch.Generator().manual_seed(0)
    data = list(range(12))

    def make() -> DataLoader[int]:
        generator.manual_seed(0)
        return DataLoader(data, shuffle=True, generator=generator, num_workers=1, persistent_workers=True)

    expected = [batch.item() for batch in make()]
    loader = make()
    batches = iter(loader)
    first = [next(batches).item() for _ in range(3)]
    before = generator.get_state()
    model = Parabola()
    result = range_test(
        model, torch.optim.SGD(model.parameters()), quadratic, loader, end=0.1, steps=15, progress=False
    )
    assert len(result.lrs) == 15
    assert torch.equal(generator.get_state(), before)
    assert loader._iterator is batches
    assert first + [batch.item() for batch in batches] == expected


def test_the_batches_are_let_go_by_an_exception() -> None:
    """Else its traceback would keep the workers of a DataLoader, which end with its iterator."""
    ended = []

    class Batches:
        def __iter__(self) -> Iterator[None]:
            try:
                yield None
            finally:
                ended.append(True)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        raise ZeroDivisionError

    model = Parabola()
    with pytest.raises(ZeroDivisionError) as info:
        range_test(model, torch.optim.SGD(model.parameters()), loss, Batches(), progress=False)
    assert ended
    del info


# --- the series of learning rates ---------------------------------------------------------------------------------


def sweep(*, lr: float = 1.0, curvature: float = 1.0, loss: Any = quadratic, **options: Any) -> RangeTest:
    """Of SGD on a parabola."""
    model = Parabola(curvature)
    return range_test(model, torch.optim.SGD(model.parameters(), lr=lr), loss, forever(), progress=False, **options)


def test_exponential_series() -> None:
    result = sweep(start=1e-5, end=3e-2, steps=50)
    assert result.lrs[0] == 1e-5 and result.lrs[-1] == 3e-2 and len(result.lrs) == 50
    assert result.lrs == pytest.approx(np.geomspace(1e-5, 3e-2, 50), rel=1e-14)  # of powers, a few ulps
    assert result.stopped is None


def test_linear_series() -> None:
    result = sweep(start=1e-3, end=3e-2, steps=30, mode="linear")
    assert result.lrs[0] == 1e-3 and result.lrs[-1] == 3e-2
    assert result.lrs == pytest.approx(np.linspace(1e-3, 3e-2, 30), rel=1e-14)


@pytest.mark.parametrize("tensors", [False, True])
def test_groups_keep_their_ratios(tensors: bool) -> None:
    def number(lr: float) -> Any:
        return torch.tensor(lr, dtype=torch.float64) if tensors else lr

    params = [Parameter(torch.ones(2)) for _ in range(3)]
    lrs = [number(lr) for lr in (0.5, 0.125, 0.0)]
    optimizer = fusedopt.AdamW([{"params": [p], "lr": lr} for p, lr in zip(params, lrs, strict=True)])
    seen = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        assert not tensors or all(group["lr"] is lr for group, lr in zip(optimizer.param_groups, lrs, strict=True))
        seen.append([float(group["lr"]) for group in optimizer.param_groups])
        return sum(p.square().sum() for p in params)

    result = range_test(nn.Linear(1, 1), optimizer, loss, forever(), start=0.01, end=1.0, steps=9, progress=False)
    assert seen == [[lr, lr / 4, 0.0] for lr in result.lrs]
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.5, 0.125, 0.0]


def test_ratios_are_those_that_a_scheduler_begins_with() -> None:
    """A warm-up begins at 0, of which nothing can be a multiple."""
    params = [Parameter(torch.ones(2)) for _ in range(2)]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(params, (0.5, 0.125), strict=True)]
    optimizer = torch.optim.AdamW(groups)
    LambdaLR(optimizer, lambda step: step / 10)
    seen = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        seen.append([group["lr"] for group in optimizer.param_groups])
        return params[0].sum() + params[1].sum()

    result = range_test(nn.Linear(1, 1), optimizer, loss, forever(), start=0.01, end=0.1, steps=4, progress=False)
    assert seen == [[lr, lr / 4] for lr in result.lrs]


# --- losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.5, 0.9])
def test_smoothing_is_that_of_adam(smoothing: float) -> None:
    result = sweep(start=1e-2, end=1.9, steps=40, smoothing=smoothing)
    for k in range(40):
        weights = smoothing ** np.arange(k, -1, -1)
        assert result.smoothed[k] == pytest.approx(np.average(result.losses[: k + 1], weights=weights), rel=1e-12)
    if smoothing == 0:
        assert result.smoothed == result.losses


@pytest.mark.parametrize("curvature", [0.1, 3.0, 500.0])
def test_a_parabola_diverges_where_it_has_to(curvature: float) -> None:
    """A step multiplies x by 1 - lr * curvature, which is below -1 from 2 / curvature on."""
    critical = 2 / curvature
    result = sweep(curvature=curvature, start=1e-4 / curvature, end=1e4 / curvature, smoothing=0)
    ratio = result.lrs[1] / result.lrs[0]
    lowest = result.lrs[result.losses.index(min(result.losses))]
    assert critical <= lowest < critical * ratio  # the first step with more is the first that climbs
    assert result.stopped is not None
    assert critical < result.lrs[-1] < critical * ratio**4  # then by (1.2 * 2 - 1)^2 = 1.96, 3.5 and 6.0
    for method in ("steepest", "valley"):
        assert critical / 100 < result.suggestion(method) < critical
        smoothed = sweep(curvature=curvature, start=1e-4 / curvature, end=1e4 / curvature)
        assert critical / 100 < smoothed.suggestion(method) < critical


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_stops_the_test(bad: float) -> None:
    calls = itertools.count()
    result = sweep(loss=lambda model, _: model() * (bad if next(calls) == 7 else 1), end=1e-3)
    assert len(result.lrs) == len(result.losses) == len(result.smoothed) == 7
    assert f"the loss was {bad}" in str(result.stopped)


def test_without_stop_at_only_what_is_not_finite_stops() -> None:
    at = [len(sweep(start=1.5, end=10.0, stop_at=stop_at).lrs) for stop_at in (4.0, 1e30, None)]
    assert at[0] < at[1] < at[2] == 100


def test_a_lucky_first_batch_does_not_stop_the_test() -> None:
    """The average begins with the first losses; later ones are more than `stop_at` times as much."""
    losses = iter([0.1, *[1.0] * 100])
    result = sweep(loss=lambda model, _: model() * 0 + next(losses), start=1e-3, end=1.0, steps=50)
    assert result.stopped is None
    assert len(result.lrs) == 50


@pytest.mark.parametrize("offset", [-1.0, -100.0])
def test_a_loss_below_zero_can_stop(offset: float) -> None:
    result = sweep(loss=lambda model, _: model() + offset, start=0.1, end=1e3, smoothing=0)
    assert result.stopped is not None
    assert result.losses[-2] <= min(result.losses) + 3 * abs(min(result.losses)) < result.losses[-1]


def test_validation() -> None:
    """The mean loss behind the step, in evaluation mode, without gradients."""
    model = nn.Sequential(Parabola(), nn.Dropout(0.5), nn.BatchNorm1d(1)).double()
    model[2].eval()
    seen = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        seen.append((batch, model.training, model[1].training, model[2].training, torch.is_grad_enabled()))
        return batch * model[0]()

    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    result = range_test(
        model, optimizer, loss, [1.0], validation=[1.0, 4.0], start=0.1, end=0.2, steps=2, progress=False
    )
    assert seen == 2 * [(1.0, True, True, False, True), (1.0, False, False, False, False), (4.0,) + 4 * (False,)]
    xs = [0.9, 0.9 * 0.8]
    assert result.losses == pytest.approx([5 / 2 * x**2 / 2 for x in xs], rel=1e-15)
    assert [module.training for module in model.modules()] == [True, True, True, False]


@pytest.mark.parametrize("as_a_whole", [True, False])
def test_a_model_in_evaluation_mode_is_trained_in_training_mode(as_a_whole: bool) -> None:
    model = nn.Sequential(Parabola(), nn.Dropout())
    (model if as_a_whole else model[1]).eval()
    seen = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        seen.append([module.training for module in model.modules()])
        return model[0]()

    before = [module.training for module in model.modules()]
    range_test(model, torch.optim.SGD(model.parameters()), loss, forever(), steps=2, end=1e-3, progress=False)
    assert seen == 2 * [[True, True, True] if as_a_whole else [True, True, False]]
    assert [module.training for module in model.modules()] == before


def linear_world() -> tuple[nn.Module, Optimizer, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    inputs, targets = torch.randn(6, 8, 3, dtype=torch.float64), torch.randn(6, 8, 2, dtype=torch.float64)
    return model, fusedopt.AdamW(model.parameters(), lr=1e-3), list(zip(inputs, targets, strict=True))


def test_a_criterion_is_a_function_of_outputs_and_targets() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    model, optimizer, batches = linear_world()
    a = range_test(model, optimizer, nn.MSELoss(), batches, progress=False)
    assert a == range_test(model, optimizer, loss, batches, progress=False)


def test_batches_are_moved() -> None:
    """Tensors in containers, and whatever has `to`, as the encodings of tokenizers."""

    class Encoding:
        device = "here"

        def to(self, device: torch.device) -> Encoding:
            self.device = str(device)
            return self

    def loss(model: nn.Module, batch: Any) -> Tensor:
        assert batch["a"][0].device.type == "meta" and batch["b"].device == "meta" and batch["c"] == "text"
        return model()

    model = Parabola()
    batches = [{"a": [torch.ones(2)], "b": Encoding(), "c": "text"}]
    range_test(
        model, torch.optim.SGD(model.parameters()), loss, batches, device="meta", steps=2, end=0.1, progress=False
    )


def test_accumulation_equals_large_batches() -> None:
    model, optimizer, batches = linear_world()
    halves = [half for batch in batches for half in zip(*(part.split(4) for part in batch), strict=True)]
    options: dict[str, Any] = {"start": 1e-3, "end": 1.0, "steps": 20, "progress": False}
    whole = range_test(model, optimizer, nn.MSELoss(), batches, **options)
    parts = range_test(model, optimizer, nn.MSELoss(), halves, accumulate=2, **options)
    assert parts.lrs == whole.lrs
    assert parts.losses == pytest.approx(whole.losses, rel=1e-12)  # 2e-15 measured: sums in another order
    assert parts.losses != range_test(model, optimizer, nn.MSELoss(), halves, **options).losses


def test_autocast() -> None:
    seen = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        output = model(batch)
        seen.append(output.dtype)
        return output.float().square().mean()

    model = nn.Linear(3, 2)
    optimizer = fusedopt.AdamW(model.parameters())
    options: dict[str, Any] = {"steps": 2, "end": 0.1, "progress": False}
    range_test(model, optimizer, loss, [torch.ones(1, 3)], autocast=torch.bfloat16, **options)
    range_test(model, optimizer, loss, [torch.ones(1, 3)], **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the caller's is left alone
        range_test(model, optimizer, loss, [torch.ones(1, 3)], **options)
    assert seen == 2 * [torch.bfloat16] + 2 * [torch.float32] + 2 * [torch.bfloat16]


def test_gradients_are_computed_where_they_are_off() -> None:
    with torch.no_grad():
        assert sweep(start=0.1, end=0.2, steps=3).losses[-1] < 0.5


@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_again(seed: int) -> None:
    world = World(*MAKERS["adamw"], None)
    torch.manual_seed(seed)
    first, second = (
        range_test(world.model, world.optimizer, world.loss, world.loader, progress=False) for _ in range(2)
    )
    assert first == second and len(first.lrs) > 50


# --- batches that end -----------------------------------------------------------------------------------------------


def test_batches_are_begun_again() -> None:
    seen = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        seen.append(batch)
        return model()

    model = Parabola()
    range_test(
        model, torch.optim.SGD(model.parameters()), loss, range(3), accumulate=2, steps=4, end=0.1, progress=False
    )
    assert seen == [0, 1, 2, 0, 1, 2, 0, 1]


def test_an_iterator_that_ends_ends_the_test() -> None:
    model = Parabola()
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.warns(UserWarning, match="batches ended after 3 of 10 steps .* give a DataLoader or a list") as record:
        result = range_test(model, optimizer, quadratic, iter(range(7)), accumulate=2, steps=10, progress=False)
    assert record[0].filename == __file__
    assert len(result.lrs) == 3 and result.stopped == "the batches ended"


def test_an_iterator_that_suffices_keeps_the_rest() -> None:
    class Batches:
        def __init__(self) -> None:
            self.at = 0

        def __iter__(self) -> Batches:
            return self

        def __next__(self) -> int:
            self.at += 1
            return self.at

    model, batches = Parabola(), Batches()
    range_test(model, torch.optim.SGD(model.parameters()), quadratic, batches, steps=5, end=0.1, progress=False)
    assert next(batches) == 6


# --- gradient scaling -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaler_class", [torch.amp.GradScaler, fusedopt.GradScaler])
@pytest.mark.parametrize("make", [fusedopt.AdamW, torch.optim.SGD])
def test_skipped_steps_do_not_count(make: type[Optimizer], scaler_class: type[torch.amp.GradScaler]) -> None:
    calls: list[float] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        calls.append(optimizer.param_groups[0]["lr"])
        return model() * (math.inf if len(calls) in (1, 2, 6) else 1)

    model = Parabola().float()
    optimizer = make(model.parameters(), lr=1e-3)
    scaler = scaler_class("cpu", init_scale=1024.0)
    options: dict[str, Any] = {"steps": 6, "start": 0.01, "end": 0.1, "progress": False}
    result = range_test(model, optimizer, loss, forever(), grad_scaler=scaler, **options)
    assert calls == [result.lrs[i] for i in (0, 0, 0, 1, 2, 3, 3, 4, 5)]
    assert result == range_test(model, optimizer, quadratic, forever(), **options)
    assert scaler.state_dict() == scaler_class("cpu", init_scale=1024.0).state_dict() and scaler._scale is None


def test_steps_that_are_always_skipped_stop_the_test() -> None:
    calls = itertools.count()
    scaler = torch.amp.GradScaler("cpu")
    result = sweep(loss=lambda model, _: model() * (math.inf if next(calls) > 2 else 1), grad_scaler=scaler, end=0.1)
    assert len(result.lrs) == 3 and next(calls) == 3 + 21
    assert "skipped 21 steps in a row" in str(result.stopped)


def test_a_scaler_that_is_not_enabled() -> None:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    assert sweep(grad_scaler=scaler, end=0.1) == sweep(end=0.1)


# --- suggestions ----------------------------------------------------------------------------------------------------


def result_of(losses: list[float], mode: str = "exponential") -> RangeTest:
    space = np.geomspace if mode == "exponential" else np.linspace
    return RangeTest(space(1e-5, 1, len(losses)).tolist(), losses, losses, mode, None)


def test_steepest_is_the_steepest_of_the_fall() -> None:
    noise = [3.0, 9.0, 2.0]  # in the first tenth
    rise_and_fall = [9.0, 1.5]  # behind the lowest
    result = result_of([*noise, *[3.0] * 15, 2.9, 2.7, 2.2, 1.8, 1.6, 1.5, 1.4, *[2.0] * 8, *rise_and_fall])
    assert len(result.lrs) == 35
    assert result.suggestion() == result.lrs[20]  # from 2.7 to 1.8


def test_steepest_is_over_the_logarithm() -> None:
    """Of a straight line over lr the slope over log(lr) is lr times as large: the last point is the steepest."""
    result = result_of([*np.linspace(2, 1, 40), 5.0], "linear")
    assert result.suggestion() == result.lrs[38]


def test_the_longest_valley() -> None:
    """It has six points, of which some are no neighbours; two thirds of the way from point 10 to point 19 is 16."""
    result = result_of([1.0] * 10 + [9.0, 8.0, 8.5, 7.0, 9.0, 6.0, 9.0, 9.0, 5.0, 4.0] + [4.5] * 5)
    assert result.suggestion("valley") == result.lrs[16]


@pytest.mark.parametrize("method", ["steepest", "valley"])
@pytest.mark.parametrize("losses", [[1.0], [2.0, 1.0], [1.0] * 50, [1.0 + i for i in range(50)]], ids=len)
def test_no_suggestion_without_a_fall(losses: list[float], method: str) -> None:
    with pytest.raises(ValueError, match=f"does not fall over three points or more of the {len(losses)} from lr 1e-05"):
        result_of(losses).suggestion(method)


def test_a_result_shows_what_is_short() -> None:
    assert repr(result_of([1.0] * 50)) == "RangeTest(mode='exponential', stopped=None)"


# --- arguments ------------------------------------------------------------------------------------------------------

RAISES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"start": 0.0}, ValueError, "start must be a positive number, got 0.0"),
    ({"start": math.nan}, ValueError, "start must be a positive number, got nan"),
    ({"start": "1e-7"}, ValueError, "start must be a positive number, got '1e-7'"),
    ({"end": 1e-7}, ValueError, "end must be a number above start, 1e-07, got 1e-07"),
    ({"end": math.inf}, ValueError, "end must be a number above start"),
    ({"steps": 1}, ValueError, "steps must be an integer of at least 2, got 1"),
    ({"steps": 10.0}, ValueError, "steps must be an integer of at least 2, got 10.0"),
    ({"mode": "log"}, ValueError, r"mode must be one of \('exponential', 'linear'\), got 'log'"),
    ({"smoothing": 1.0}, ValueError, r"smoothing must be a number in \[0, 1\), got 1.0"),
    ({"smoothing": -0.1}, ValueError, r"smoothing must be a number in \[0, 1\), got -0.1"),
    ({"stop_at": 1.0}, ValueError, "stop_at must be a number above 1, or None, got 1.0"),
    ({"accumulate": 0}, ValueError, "accumulate must be an integer of at least 1, got 0"),
    ({"accumulate": True}, ValueError, "accumulate must be an integer of at least 1, got True"),
    ({"optimizer": "sgd"}, TypeError, "optimizer must be a torch.optim.Optimizer, got str"),
    ({"validation": iter([1])}, ValueError, "validation is an iterator"),
    ({"validation": []}, ValueError, "validation is empty"),
    ({"batches": []}, ValueError, "batches ended before the first step, which takes 1"),
    ({"batches": iter([1, 2]), "accumulate": 3}, ValueError, "batches ended before the first step, which takes 3"),
    (
        {"loss": nn.MSELoss()},
        ValueError,
        "batches must be pairs of inputs and targets, got a NoneType: give a function",
    ),
    ({"loss": lambda model, _: model().repeat(2)}, ValueError, r"a tensor with one number, got one of shape \(2,\)"),
    ({"loss": lambda model, _: 1.0}, ValueError, "a tensor with one number, got a float"),
    ({"loss": lambda model, _: model() * math.nan}, RuntimeError, "the loss was nan at lr 1e-07, which is the first"),
]


@pytest.mark.parametrize("given, error, message", RAISES, ids=[f"{list(row[0])[-1]}-{row[2][:30]}" for row in RAISES])
def test_errors(given: dict[str, Any], error: type[Exception], message: str) -> None:
    model = Parabola()
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    world = {"model": model, "optimizer": optimizer}
    before = fingerprint(world)
    arguments = {"optimizer": optimizer, "loss": quadratic, "batches": forever(), "progress": False, **given}
    with pytest.raises(error, match=message):
        range_test(model, **arguments)
    assert_same(fingerprint(world), before)


def test_errors_about_optimizers() -> None:
    model = nn.Linear(2, 2)
    steps = fusedopt.step_in_backward(model, fusedopt.AdamW, lr=0.1)
    with pytest.raises(TypeError, match="steps in backward"):
        range_test(model, steps, quadratic, forever())
    with pytest.raises(ValueError, match=r"lr of param_groups\[0\] is 0.0"):
        range_test(model, torch.optim.SGD(model.parameters(), lr=0.0), quadratic, forever())
    without = torch.optim.SGD(model.parameters())
    del without.param_groups[0]["lr"]
    with pytest.raises(ValueError, match=r"param_groups\[0\] has no 'lr'"):
        range_test(model, without, quadratic, forever())
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match="LBFGS needs a closure, which a GradScaler does not take"):
        range_test(model, torch.optim.LBFGS(model.parameters()), quadratic, forever(), grad_scaler=scaler)


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_error_about_lazy_modules() -> None:
    for lazy, name in ((nn.LazyLinear(2), "0.weight"), (nn.LazyBatchNorm1d(affine=False), "0.running_mean")):
        with pytest.raises(ValueError, match=rf"{name} has no shape yet: run the model on a batch"):
            range_test(nn.Sequential(lazy), torch.optim.SGD([Parameter(torch.ones(1))]), quadratic, forever())


def test_numbers_of_numpy() -> None:
    plain = sweep(start=0.25, end=0.5, steps=5)
    assert sweep(start=np.float32(0.25), end=np.float64(0.5), steps=np.int64(5)).lrs == plain.lrs


# --- what is drawn --------------------------------------------------------------------------------------------------


@pytest.fixture
def figure() -> Iterator[Any]:
    require("matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


def labels_of(ax: Any) -> list[str]:
    return ax.get_legend_handles_labels()[1]


def test_plot(figure: Any) -> None:
    result = sweep(start=1e-4, end=100.0)
    ax = result.plot()
    assert ax.get_xscale() == "log" and ax.get_xlabel() == "learning rate" and ax.get_ylabel() == "loss"
    lr = result.suggestion()
    phases = ["too small", "learning", "diverging"]
    assert labels_of(ax) == ["loss", "smoothed loss", *phases, f"steepest: {lr:.2g}"]
    losses, smoothed, mark = ax.lines
    assert losses.get_xydata().tolist() == [list(pair) for pair in zip(result.lrs, result.losses, strict=True)]
    assert smoothed.get_ydata().tolist() == result.smoothed
    assert mark.get_xydata().tolist() == [[lr, result.smoothed[result.lrs.index(lr)]]]
    edges = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in ax.patches]
    assert edges[0][0] == result.lrs[0] and edges[2][1] == pytest.approx(result.lrs[-1])
    assert edges[0][1] == pytest.approx(edges[1][0]) and edges[1][1] == pytest.approx(edges[2][0])
    assert edges[1][0] < lr < edges[1][1] == pytest.approx(result.lrs[result.smoothed.index(min(result.smoothed))])
    ax.figure.canvas.draw()


def test_plot_on_given_axes(figure: Any) -> None:
    ax = figure.figure().add_subplot()
    result = sweep(start=1e-4, end=1.0, mode="linear")
    assert result.plot(ax, method="valley") is ax
    assert ax.get_xscale() == "linear" and f"valley: {result.suggestion('valley'):.2g}" in labels_of(ax)
    assert "diverging" not in labels_of(ax)
    with pytest.raises(ValueError, match="method must be one of"):
        result.plot(ax, method="best")


@pytest.mark.parametrize("losses", [[1.0], [1.0, 2.0], [1.0] * 20], ids=len)
def test_plot_of_what_does_not_learn(losses: list[float], figure: Any) -> None:
    ax = result_of(losses).plot()
    assert labels_of(ax) == ["loss", "smoothed loss"]
    ax.figure.canvas.draw()


# --- packages that are not needed -----------------------------------------------------------------------------------


def test_without_matplotlib_and_tqdm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("matplotlib", "tqdm", "tqdm.auto"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    spec = importlib.util.spec_from_file_location("fusedopt.lr_finder_anew", lr_finder.__file__)
    assert spec is not None and spec.loader is not None
    anew = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, anew)
    spec.loader.exec_module(anew)
    model = Parabola()
    result = anew.range_test(model, torch.optim.SGD(model.parameters()), quadratic, forever(), end=0.1)
    assert capsys.readouterr() == ("", "")
    with pytest.raises(ImportError, match="pip install matplotlib"):
        result.plot()


@pytest.mark.parametrize("progress", [True, False])
def test_progress(progress: bool, capsys: pytest.CaptureFixture[str]) -> None:
    require("tqdm")
    model = Parabola()
    optimizer = torch.optim.SGD(model.parameters())
    range_test(model, optimizer, quadratic, forever(), start=0.01, end=0.25, steps=5, progress=progress)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("range test" in err and "5/5" in err and "lr=2.50e-01" in err and "loss=" in err) == progress
    assert bool(err) == progress
