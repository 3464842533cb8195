"""The learning-rate range test leaves no trace: every byte and object is as before, however it ends."""

from __future__ import annotations

import math
import random
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from range_tests import Parabola, assert_same, fingerprint, forever, global_random_states, quadratic
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, StepLR
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler

import fusedopt
from fusedopt import _put_back
from fusedopt.lr_finder import range_test


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

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background may ignore it
    snapshot = _put_back.Snapshot(None)
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


@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_again(seed: int) -> None:
    world = World(*MAKERS["adamw"], None)
    torch.manual_seed(seed)
    first, second = (
        range_test(world.model, world.optimizer, world.loss, world.loader, progress=False) for _ in range(2)
    )
    assert first == second and len(first.lrs) > 50
