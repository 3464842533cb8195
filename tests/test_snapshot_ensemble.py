"""Snapshot ensembles against deep copies of the model, made at the ends of cycles counted by hand."""

import copy
import io
import itertools
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from optimizers import generator, name_of
from reference import assert_same_bits
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations
from torch.optim import Optimizer, lr_scheduler

import fusedopt
from fusedopt.lr_scheduler import DecayingWarmRestarts
from fusedopt.snapshot_ensemble import SnapshotEnsemble

FEATURES, CLASSES = 6, 3
BATCHES = 4  # per epoch, where fractions of epochs are counted


class Net(nn.Module):
    """With what differs between training and evaluation, and buffers of two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(8, CLASSES)

    def forward(self, inputs: Tensor, *, scale: float = 1.0) -> Tensor:
        hidden = self.drop(torch.relu(self.norm(self.first(inputs))))
        logits: Tensor = self.last(hidden)
        return scale * logits


class Tied(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.encoder = nn.Linear(FEATURES, FEATURES)
        self.decoder = nn.Linear(FEATURES, FEATURES)
        if tied:
            self.decoder.weight = self.encoder.weight

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.decoder(torch.tanh(self.encoder(inputs)))
        return out


class Recurrent(nn.Module):
    """An LSTM keeps a second list of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(FEATURES, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.lstm(inputs)[0]
        return out


class Counting(nn.Module):
    """Writes to a buffer in every forward, and has one that no state_dict has."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, CLASSES)
        self.register_buffer("calls", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("signs", torch.tensor([1.0, -1.0, 1.0]), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.linear(inputs) * self.signs * self.calls[0]
        return out


def shared() -> nn.Module:
    linear = nn.Linear(FEATURES, FEATURES)
    return nn.Sequential(linear, nn.Tanh(), linear)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "net": Net,
    "tied": Tied,
    "shared_module": shared,
    "lstm": Recurrent,
    "counting": Counting,
    "weight_norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(FEATURES, CLASSES)), nn.Tanh()),
    "frozen": lambda: nn.Sequential(nn.Linear(FEATURES, 4).requires_grad_(False), nn.Linear(4, CLASSES)),
    "checkpointing": lambda: checkpoint_wrapper(nn.Linear(FEATURES, CLASSES)),
    "checkpointing_within": lambda: nn.Sequential(checkpoint_wrapper(nn.Linear(FEATURES, 4)), nn.Linear(4, CLASSES)),
    "compiled_in_place": lambda: compiled_in_place(nn.Linear(FEATURES, CLASSES)),
}


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def make(name: str = "net") -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return MODELS[name]()


def batch(seed: int, rows: int = 5) -> Tensor:
    return torch.randn(rows, FEATURES, generator=generator(seed))


def train_step(model: nn.Module, optimizer: Optimizer, seed: int) -> None:
    model.train()
    optimizer.zero_grad()
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # for Dropout
        model(batch(seed)).square().mean().backward()
    optimizer.step()


def collected(name: str = "net", count: int = 3, **options: Any) -> tuple[nn.Module, SnapshotEnsemble, list[nn.Module]]:
    """A model in training, its ensemble, and copies of the model at the times of the members."""
    model = make(name)
    ensemble, copies = SnapshotEnsemble(model, **{"average": "outputs", **options}), []
    optimizer = fusedopt.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(count):
        train_step(model, optimizer, step)
        ensemble.add()
        copies.append(copy.deepcopy(model))
    train_step(model, optimizer, count)
    return model, ensemble, copies


def output_of(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = copy.deepcopy(model).eval()(*args, **kwargs)
        return out


def assert_members(ensemble: SnapshotEnsemble, copies: Sequence[nn.Module]) -> None:
    assert len(ensemble) == len(copies) > 0
    for i, (member, model) in enumerate(zip(ensemble.members, copies, strict=True)):
        assert list(member) == list(model.state_dict())
        for key, value in model.state_dict().items():
            assert_same_bits(member[key], value, f"{key} of member {i}")


# --- predictions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_members_predict_as_copies_of_the_model_do(name: str) -> None:
    model, ensemble, copies = collected(name)
    inputs = batch(9)
    expected = [output_of(each, inputs) for each in copies]
    assert not torch.equal(expected[0], expected[1])
    for _ in range(2):  # running them changes nothing
        for prediction, wanted in zip(ensemble.predictions(inputs), expected, strict=True):
            assert_same_bits(prediction, wanted)
        assert_members(ensemble, copies)
    model.load_state_dict(ensemble.members[1])
    assert_same_bits(output_of(model, inputs), expected[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("average", ["probabilities", "outputs", "function"])
def test_average(average: str, dtype: torch.dtype) -> None:
    """In NumPy's float64; 16-bit predictions are widened before they are added up."""
    options = {"average": (lambda logits: logits.exp()) if average == "function" else average}
    model, ensemble, copies = collected(**options)
    model.to(dtype)
    members = [{key: value.to(model.state_dict()[key].dtype) for key, value in m.items()} for m in ensemble.members]
    ensemble.load_state_dict({"members": members, "cycles": None})
    inputs = batch(9).to(dtype)
    total = 0
    for each in copies:
        logits = output_of(each.to(dtype), inputs, scale=2.0)
        if average == "function":
            logits = logits.exp()
        y = logits.double().numpy()
        if average == "probabilities":
            y = np.exp(y) / np.exp(y).sum(1, keepdims=True)
        total = total + y
    result = ensemble(inputs, scale=2.0)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Measured: 1.2 eps at most, in torch's exp of float64.
    error = np.abs(result.double().numpy() - total / 3).max() / np.abs(total / 3).max()
    assert error <= 2 * torch.finfo(result.dtype).eps


def test_the_live_model_is_not_touched() -> None:
    """Between a forward and its backward: gradients, tensors, modes, random numbers."""
    model, ensemble, _ = collected()
    other = copy.deepcopy(model)
    for each in (model, other):
        each.train()
        each.norm.eval()  # as frozen statistics are
        each.zero_grad()
    before = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
    values = {name: tensor.detach().clone() for name, tensor in before.items()}

    torch.manual_seed(1)
    loss = model(batch(7)).square().mean()
    ensemble(batch(9))
    list(ensemble.predictions(batch(9)))
    loss.backward()
    after_ours = torch.rand(1)
    torch.manual_seed(1)
    other(batch(7)).square().mean().backward()

    assert torch.equal(after_ours, torch.rand(1))
    after = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
    for name, tensor in before.items():
        assert after[name] is tensor
        assert_same_bits(tensor, values[name], name)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert p.requires_grad and p.grad is not None and q.grad is not None
        assert_same_bits(p.grad, q.grad)
    assert [m.training for m in model.modules()] == [m.training for m in other.modules()] == [1, 1, 0, 1, 1]


def test_a_forward_that_fails_leaves_the_model_as_it_was() -> None:
    model, ensemble, _ = collected()
    weight = model.first.weight
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ensemble(torch.ones(2, FEATURES + 1))
    assert model.first.weight is weight
    assert all(module.training for module in model.modules())


def test_modes_are_set_without_eval() -> None:
    """A model whose eval() does more, such as merging weights, must not do that."""
    model, ensemble, _ = collected()
    model.train = lambda mode=True: pytest.fail("train() was called")
    ensemble(batch(9))


def test_gradients_only_if_asked_for() -> None:
    _, ensemble, copies = collected()
    _, open_ensemble, _ = collected(enable_grad=True)
    inputs = batch(9).requires_grad_()
    assert not ensemble(inputs).requires_grad
    (grad,) = torch.autograd.grad(open_ensemble(inputs).sum(), inputs)
    expected = sum(torch.autograd.grad(each.eval()(inputs).sum(), inputs)[0].double() for each in copies) / 3
    # Measured: 0.6 eps of the largest.
    assert (grad - expected).abs().max() <= 2 * torch.finfo(grad.dtype).eps * expected.abs().max()
    with torch.no_grad():
        assert not open_ensemble(inputs).requires_grad
    assert not any(value.requires_grad for member in open_ensemble.members for value in member.values())


class Wrapped(nn.Module):
    """Returns what a model of transformers would."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, CLASSES)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        return {"logits": self.linear(inputs)}


@pytest.mark.parametrize("average", ["probabilities", "outputs"])
def test_outputs_that_are_no_tensors(average: Any) -> None:
    model = Wrapped()
    ensemble = SnapshotEnsemble(model, average=average)
    ensemble.add()
    with pytest.raises(TypeError, match=r"returned a dict: as average= give a function"):
        ensemble(batch(0))
    ensemble = SnapshotEnsemble(model, average=lambda output: output["logits"].softmax(-1))
    ensemble.add()
    assert_same_bits(ensemble(batch(0)), output_of(model, batch(0))["logits"].softmax(-1))


@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 3, 4)], ids=str)
def test_probabilities_of_what_are_no_logits(shape: tuple[int, ...]) -> None:
    ensemble = SnapshotEnsemble(nn.Flatten(0))
    ensemble.model.forward = lambda inputs: torch.ones(shape)
    ensemble.add()
    with pytest.raises(ValueError, match=rf"returned shape {re.escape(str(shape))}; .* takes logits of"):
        ensemble(batch(0))


def test_an_empty_ensemble() -> None:
    ensemble = SnapshotEnsemble(make())
    assert len(ensemble) == 0 and ensemble.members == []
    for call in (ensemble, ensemble.predictions):
        with pytest.raises(RuntimeError, match=r"no members yet: call update\(scheduler\) after"):
            call(batch(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"average": "mean"}, r"average is 'mean', not one of \['probabilities', 'outputs'\] or a function"),
        ({"max_members": 0}, "max_members is 0: give at least 1"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SnapshotEnsemble(make(), **options)


# --- collecting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_members_are_exact_copies(name: str) -> None:
    """NaN, -0 and subnormals included; what is one tensor in the model is one in the member."""
    model, ensemble, copies = collected(name, 2)
    with torch.no_grad():
        for p in model.parameters():
            p.flatten()[:3] = torch.tensor([-0.0, 1e-42, float("nan")])
    ensemble.add()
    copies.append(copy.deepcopy(model))
    assert_members(ensemble, copies)
    own = {p.data_ptr() for p in itertools.chain(model.parameters(), model.buffers())}
    for member in ensemble.members:
        assert own.isdisjoint(value.data_ptr() for value in member.values())
        ties = len(model.state_dict()) - len({id(value) for value in model.state_dict(keep_vars=True).values()})
        assert ties == {"tied": 1, "shared_module": 2}.get(name, 0)
        assert len({id(value) for value in member.values()}) == len(member) - ties


def test_max_members_are_the_last() -> None:
    _, ensemble, copies = collected(count=5, max_members=2)
    assert_members(ensemble, copies[-2:])


def two_devices() -> nn.Module:
    """A second device that every machine has; it computes shapes only."""
    return nn.Sequential(nn.Linear(FEATURES, 4), nn.Linear(4, 2, device="meta"))


def test_members_stay_where_the_parameters_are() -> None:
    model = two_devices()
    ensemble = SnapshotEnsemble(model)
    ensemble.add()
    for key, value in model.state_dict().items():
        assert ensemble.members[0][key].device == value.device


def test_members_kept_elsewhere_run_where_the_parameters_are() -> None:
    model = nn.Linear(FEATURES, CLASSES, device="meta")
    ensemble = SnapshotEnsemble(model, device="cpu", average="outputs")
    member = {"weight": torch.ones(CLASSES, FEATURES), "bias": torch.ones(CLASSES)}
    ensemble.load_state_dict({"members": [member], "cycles": None})
    assert ensemble(torch.ones(2, FEATURES, device="meta")).device.type == "meta"
    assert {value.device.type for value in ensemble.members[0].values()} == {"cpu"}
    elsewhere = SnapshotEnsemble(nn.Linear(FEATURES, CLASSES), device="meta")
    elsewhere.add()
    assert {value.device.type for value in elsewhere.members[0].values()} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: not yet run on a GPU")
def test_members_on_the_host_of_a_model_on_the_gpu() -> None:
    model = make().cuda()
    ensemble = SnapshotEnsemble(model, device="cpu")
    ensemble.add()
    assert_members(ensemble, [model.cpu()])
    model.cuda()
    assert_same_bits(ensemble(batch(0).cuda()), output_of(model, batch(0).cuda()).softmax(1))
    assert {value.device.type for value in ensemble.members[0].values()} == {"cpu"}


# --- update ---------------------------------------------------------------------------------------------------------


def restarts(T_0: int, T_mult: int = 1) -> Callable[[Optimizer], Any]:
    return lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0, T_mult)


def warmed_up(o: Optimizer, last: Any) -> tuple[Any, Any]:
    """A scheduler behind three steps of another one: what update() gets, and what is stepped."""
    first = lr_scheduler.LinearLR(o, 0.5, total_iters=3)
    return last, lr_scheduler.SequentialLR(o, [first, last], [3])


Schedule = tuple[Callable[[Optimizer], Any], Callable[[int], float] | None, int, set[int]]
# A scheduler; what its step() is given after step i = 0, 1, ... of the optimizer; how many of these; and after how many
# of them a cycle has ended.
SCHEDULES: dict[str, Schedule] = {
    "restarts": (restarts(3), None, 9, {3, 6, 9}),
    "restarts, longer": (restarts(2, 2), None, 14, {2, 6, 14}),
    "restarts, three times as long": (restarts(1, 3), None, 13, {1, 4, 13}),
    "restarts, short": (restarts(1), None, 3, {1, 2, 3}),
    # Fractions as in torch's documentation: the step after which the scheduler hears of epoch 2 is the ninth.
    "epochs": (restarts(2), lambda i: i / BATCHES, 16, {9}),
    "epochs, longer": (restarts(1, 2), lambda i: i / BATCHES, 16, {5, 13}),
    "epochs, to their ends": (restarts(2), lambda i: (i + 1) / BATCHES, 16, {8, 16}),
    "epochs, longer, to their ends": (restarts(1, 2), lambda i: (i + 1) / 3, 21, {3, 9, 21}),
    "epochs, never whole": (restarts(2), lambda i: (i + 1) * 0.7, 12, {3, 6, 9, 12}),
    "epochs, two cycles at once": (restarts(1), lambda i: 2.5 * i, 3, {2, 3}),
    "decaying": (lambda o: DecayingWarmRestarts(o, 2, 2, decay=0.5), None, 14, {2, 6, 14}),
    "decaying, epochs": (lambda o: DecayingWarmRestarts(o, 1, decay=0.5), lambda i: (i + 1) / 3, 9, {3, 6, 9}),
    "triangular": (lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2, 3), None, 10, {5, 10}),
    "triangular2": (lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2, mode="triangular2"), None, 12, {4, 8, 12}),
    "exp_range": (lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3, 1, "exp_range", 0.9), None, 9, {4, 8}),
    "cycles of 2.5 steps": (lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 1.25), None, 10, {3, 5, 8, 10}),
    "restarts, warmed up": (lambda o: warmed_up(o, restarts(4)(o)), None, 11, {7, 11}),
    "restarts, longer, warmed up": (lambda o: warmed_up(o, restarts(2, 2)(o)), None, 11, {5, 9}),
    "triangular, warmed up": (lambda o: warmed_up(o, lr_scheduler.CyclicLR(o, 0.01, 0.1, 2)), None, 11, {7, 11}),
}


class Training:
    """Of a small model, by one of the schedules."""

    def __init__(self, schedule: str) -> None:
        build, self.argument, self.steps, self.ends = SCHEDULES[schedule]
        self.model = make()
        self.optimizer = fusedopt.Adam(self.model.parameters(), lr=0.1)
        built = build(self.optimizer)
        self.scheduler, self.stepped = built if isinstance(built, tuple) else (built, built)
        self.ensemble = SnapshotEnsemble(self.model)
        self.done, self.lrs = 0, []

    def step(self) -> bool:
        self.lrs.append(self.optimizer.param_groups[0]["lr"])
        train_step(self.model, self.optimizer, self.done)
        self.stepped.step(*(() if self.argument is None else (self.argument(self.done),)))
        self.done += 1
        return self.ensemble.update(self.scheduler)


def around(training: Training) -> list[int]:
    """The numbers of steps at which something may go wrong: a cycle's end, and one step before and after."""
    return sorted({end + more for end in training.ends for more in (-1, 0, 1)} & set(range(1, training.steps)))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_update_collects_at_the_end_of_each_cycle(schedule: str) -> None:
    """And then only; with no step at the next cycle's rate, and once however often it is called."""
    training = Training(schedule)
    assert not training.ensemble.update(training.scheduler)
    copies, ends = [], [0]
    for step in range(1, training.steps + 1):
        ended = training.step()
        assert ended is (step in training.ends), step
        assert not training.ensemble.update(training.scheduler)
        if ended:
            copies.append(copy.deepcopy(training.model))
            if not isinstance(training.scheduler, lr_scheduler.CyclicLR):  # its lowest rate begins a cycle
                assert training.lrs[-1] == min(training.lrs[ends[-1] :])
            ends.append(step)
    assert_members(training.ensemble, copies)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_update_need_not_see_the_beginning(schedule: str) -> None:
    """An ensemble that begins in the middle of a training collects from the next end of a cycle on."""
    reference = Training(schedule)
    expected = [reference.step() for _ in range(reference.steps)]
    for start in around(reference):
        training = Training(schedule)
        for _ in range(start):
            training.step()
        training.ensemble = SnapshotEnsemble(training.model)
        found = [training.step() for _ in range(start, training.steps)]
        if schedule in ("epochs, never whole", "epochs, two cycles at once", "cycles of 2.5 steps"):
            # The first look cannot tell a cycle that has just ended from one that is under way: it does not collect.
            assert found[1:] == expected[start + 1 :] and found[0] <= expected[start]
        else:
            assert found == expected[start:]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_update_goes_on_from_a_checkpoint(schedule: str) -> None:
    """Whenever it was written: the members are those of an uninterrupted training."""
    reference = Training(schedule)
    for _ in range(reference.steps):
        reference.step()
    for stop in around(reference):
        training = Training(schedule)
        for _ in range(stop):
            training.step()
        parts = ("model", "optimizer", "stepped", "ensemble")
        file = io.BytesIO()
        torch.save({part: getattr(training, part).state_dict() for part in parts}, file)
        file.seek(0)
        states = torch.load(file, weights_only=True)
        resumed = Training(schedule)
        resumed.done = stop
        for part in parts:
            getattr(resumed, part).load_state_dict(states[part])
        for _ in range(stop, resumed.steps):
            resumed.step()
        assert len(resumed.ensemble) == len(reference.ensemble)
        for member, wanted in zip(resumed.ensemble.members, reference.ensemble.members, strict=True):
            for key, value in wanted.items():
                assert_same_bits(member[key], value, key)


def test_update_with_a_scheduler_that_begins_anew() -> None:
    """As in a second training of the model: its cycles count again."""
    training = Training("restarts")
    for _ in range(2):
        assert [training.step() for _ in range(9)] == [False, False, True] * 3
        training.scheduler = training.stepped = restarts(3)(training.optimizer)
    assert len(training.ensemble) == 6


def test_schedulers_whose_cycles_are_unknown() -> None:
    training = Training("restarts, warmed up")
    for scheduler in (lr_scheduler.StepLR(training.optimizer, 3), training.stepped):
        with pytest.raises(TypeError, match=f"where a {type(scheduler).__name__} ends a cycle"):
            training.ensemble.update(scheduler)


# --- saving and loading ---------------------------------------------------------------------------------------------


def reloaded(ensemble: SnapshotEnsemble) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(ensemble.state_dict(), file)
    file.seek(0)
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


@pytest.mark.parametrize("name", MODELS)
def test_save_and_load(name: str) -> None:
    _, ensemble, copies = collected(name)
    state = reloaded(ensemble)
    again = SnapshotEnsemble(make(name), average="outputs")
    again.load_state_dict(state)
    for value in state["members"][0].values():
        value.zero_()  # the ensemble has copies
    assert_members(again, copies)
    assert_same_bits(again(batch(9)), ensemble(batch(9)))
    tensors = [{id(value) for value in member.values()} for member in (again.members[0], ensemble.members[0])]
    assert len(tensors[0]) == len(tensors[1])  # tied ones are one again


def test_loading_keeps_the_last_members() -> None:
    _, ensemble, copies = collected(count=4)
    again = SnapshotEnsemble(make(), max_members=3)
    again.load_state_dict(reloaded(ensemble))
    assert_members(again, copies[-3:])


def changed(key: str, value: Tensor | None) -> Callable[[dict[str, Tensor]], None]:
    return lambda member: member.pop(key) if value is None else member.update({key: value})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("net", changed("last.bias", None), r"'last.bias' is missing$"),
        ("net", changed("head.bias", torch.ones(3)), r"'head.bias' is not in the model$"),
        ("net", changed("last.bias", torch.ones(4)), r"'last.bias' is float32 \(4,\), in the model float32 \(3,\)$"),
        ("net", changed("last.bias", torch.ones(3).half()), r"'last.bias' is float16 \(3,\), in the model float32"),
        ("net", lambda member: member.clear(), "'first.weight' is missing; .*; and 4 more$"),
        (
            "tied",
            changed("decoder.weight", torch.ones(6, 6)),
            "'decoder.weight' differs from 'encoder.weight'",
        ),
    ],
    ids=["missing", "unexpected", "shape", "dtype", "all", "tied"],
)
def test_members_that_do_not_fit(name: str, change: Callable[[dict[str, Tensor]], None], message: str) -> None:
    """An error that says what differs, and nothing is changed."""
    _, ensemble, copies = collected(name)
    state = reloaded(ensemble)
    change(state["members"][2])
    with pytest.raises(ValueError, match=f"SnapshotEnsemble: member 2 does not fit the model: {message}"):
        ensemble.load_state_dict(state)
    assert_members(ensemble, copies)


def test_what_is_no_state_of_an_ensemble() -> None:
    model, ensemble, _ = collected()
    with pytest.raises(ValueError, match=r"expected an ensemble's state_dict, .* got one with \['first.bias', 'first"):
        ensemble.load_state_dict(model.state_dict())


def test_a_parameter_that_no_state_dict_has() -> None:
    model = make()
    model.register_state_dict_post_hook(lambda _, state, *__: state.__delitem__("last.bias"))
    with pytest.raises(TypeError, match=r"parameter 'last.bias' is not in the model's state_dict\(\)"):
        SnapshotEnsemble(model).add()


def run(program: str, *arguments: object) -> str:
    """In a new process."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        capture_output=True, text=True, timeout=200, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_a_file_is_all_that_a_new_process_needs(tmp_path: Path) -> None:
    """Beside the model's class."""
    model = nn.Sequential(nn.Linear(FEATURES, 4), nn.BatchNorm1d(4), nn.Linear(4, CLASSES))
    ensemble = SnapshotEnsemble(model)
    for seed in range(3):
        model(batch(seed))
        ensemble.add()
    torch.save(ensemble.state_dict(), tmp_path / "ensemble.pt")
    torch.save(batch(9), tmp_path / "inputs.pt")
    run(
        """
        import sys, torch
        from torch import nn
        from fusedopt.snapshot_ensemble import SnapshotEnsemble
        folder = sys.argv[1]
        ensemble = SnapshotEnsemble(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)))
        ensemble.load_state_dict(torch.load(f"{folder}/ensemble.pt", weights_only=True))
        torch.save(ensemble(torch.load(f"{folder}/inputs.pt", weights_only=True)), f"{folder}/outputs.pt")
        """,
        tmp_path,
    )
    assert_same_bits(torch.load(tmp_path / "outputs.pt", weights_only=True), ensemble(batch(9)))


# --- wrapped models -------------------------------------------------------------------------------------------------


def test_a_model_from_torch_compile() -> None:
    model = make()
    ensemble = SnapshotEnsemble(torch.compile(model, backend="eager"))
    ensemble.add()
    assert ensemble.model is model
    assert_members(ensemble, [model])


def test_data_parallel_and_sharded_models(tmp_path: Path) -> None:
    """What a wrapped model has collected, the model itself can load; a sharded one is an error."""
    run(
        """
        import sys, torch, torch.distributed as dist
        from torch.distributed.fsdp import fully_shard
        from torch.nn.parallel import DistributedDataParallel
        from fusedopt.snapshot_ensemble import SnapshotEnsemble
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        model = DistributedDataParallel(torch.nn.Linear(6, 3))
        ensemble = SnapshotEnsemble(model, average="outputs")
        ensemble.add()
        assert torch.equal(ensemble(torch.ones(2, 6)), model(torch.ones(2, 6)))
        torch.save(ensemble.state_dict(), sys.argv[1])

        sharded = SnapshotEnsemble(fully_shard(torch.nn.Linear(6, 3), mesh=dist.init_device_mesh("cpu", (1,))))
        try:
            sharded.add()
        except TypeError as error:
            assert "parameter 'weight' is a DTensor" in str(error)
        else:
            raise AssertionError("no error")
        dist.destroy_process_group()
        """,
        tmp_path / "ensemble.pt",
    )
    ensemble = SnapshotEnsemble(nn.Linear(6, 3))
    ensemble.load_state_dict(torch.load(tmp_path / "ensemble.pt", weights_only=True))
    assert list(ensemble.members[0]) == ["weight", "bias"]


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_what_hooks_leave_in_a_module_is_the_models() -> None:
    """The old weight_norm computes an attribute `weight` before each forward: that of a member must not stay."""
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 2)))
    x = torch.ones(1, 4)
    ensemble = SnapshotEnsemble(model, average="outputs")
    ensemble.add()
    with torch.no_grad():
        model[0].weight_g.mul_(10)
    expected = model(x)
    weight = model[0].weight
    assert not torch.equal(ensemble(x), expected)
    assert model[0].weight is weight
    assert weight.requires_grad
