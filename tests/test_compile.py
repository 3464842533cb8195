"""torch.compile: it leaves its graph at an optimizer's step, and comes back behind it."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from optimizers import BY_ID, Row, name_of
from torch import Tensor, nn
from torch._dynamo.utils import counters

import fusedopt
from fusedopt import step_in_backward

STEPS = 5

# Dynamo looks at the gradient of every tensor it meets, losses too, and hides the warning, but not from pytest.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture(autouse=True)
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def frames() -> int:
    """How many functions Dynamo has compiled, each as often as it did."""
    return counters["frames"]["total"]


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))


def batches() -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(4, 8, generator=g) for _ in range(STEPS)]


def assert_same(ours: nn.Module, theirs: nn.Module, optimizer: Any, plain: Any) -> None:
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert optimizer.state[p].keys() == plain.state[q].keys()
        assert all(torch.equal(optimizer.state[p][key], plain.state[q][key]) for key in plain.state[q])


ROWS = [BY_ID[name] for name in ("adamw-decay", "adam-amsgrad", "radam-decoupled-lr32", "adagrad")]


def check_training_step(row: Row, backend: str, **own: Any) -> None:
    """Whole steps, compiled; what each does with the gradients it found is what an ordinary one does with them."""
    model = make_model()
    twin = copy.deepcopy(model)
    optimizer, plain = row.make(model.parameters(), **own), row.make(twin.parameters(), **own)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (optimizer, plain)]

    def training_step(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    compiled = torch.compile(training_step, backend=backend)
    for number, x in enumerate(batches()):
        before = frames()
        compiled(x)
        assert frames() == before or number == 0, "compiled anew for another step"
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        plain.step()
        assert_same(model, twin, optimizer, plain)
        for scheduler in schedulers:
            scheduler.step()
    assert frames() > 0 and int(optimizer.state[next(model.parameters())]["step"]) == STEPS


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_training_step(row: Row) -> None:
    check_training_step(row, "eager")


def test_training_step_with_all_around_it() -> None:
    check_training_step(
        BY_ID["adamw-decay"],
        "aot_eager",
        max_grad_norm=0.1,
        skip_nonfinite=True,
        ema_decay=0.9,
        stats=True,
        state_dtype="int8",
    )


# torch 2.13 itself uses these when inductor is first imported.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_training_step_by_inductor() -> None:
    check_training_step(BY_ID["adamw-decay"], "inductor")


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_model(backend: str) -> None:
    """Beside an ordinary step: one graph, which nothing breaks."""
    ours, theirs = make_model(), make_model()
    compiled = torch.compile(ours, backend=backend, fullgraph=True)
    optimizer, plain = (fusedopt.AdamW(model.parameters(), lr=0.1) for model in (ours, theirs))
    for x in batches():
        for model, o in ((compiled, optimizer), (theirs, plain)):
            o.zero_grad()
            model(x).square().mean().backward()
            o.step()
        assert_same(ours, theirs, optimizer, plain)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize("is_known", [False, True], ids=["first", "known"])
def test_nothing_of_the_step_is_traced(is_known: bool) -> None:
    """Neither the making of state nor the look at parameters, which would cost milliseconds before every step."""
    params = [nn.Parameter(torch.ones(3)) for _ in range(4)]
    optimizer = fusedopt.Adam(params)
    seen: list[int] = []
    optimizer.register_step_post_hook(lambda *_: seen.append(int(optimizer.state[params[0]]["step"])))
    for param in params:
        param.grad = torch.ones(3)
    if is_known:  # Dynamo warned of the native call, if its object was there already; warnings are errors
        optimizer.step()
    compiled = torch.compile(lambda: optimizer.step(), backend="eager")
    for _ in range(3):
        compiled()
    assert not counters["stats"], "operations were captured"
    assert seen == list(range(1, 4 + is_known))


def test_new_gradients_and_groups_are_no_reason_to_compile_anew() -> None:
    params = [nn.Parameter(torch.ones(3)) for _ in range(4)]
    optimizer = fusedopt.Adam(params[:3])
    compiled = torch.compile(lambda: optimizer.step(), backend="eager")

    def step() -> None:
        for param in params:
            param.grad = torch.ones(3)
        compiled()

    step()
    before = frames()
    step()
    params[0].data = torch.ones(3)
    optimizer.param_groups[0]["betas"] = (0.5, 0.5)
    step()
    optimizer.load_state_dict(optimizer.state_dict())
    step()
    optimizer.add_param_group({"params": params[3:], "lr": 0.5})
    step()
    assert frames() == before
    assert [int(optimizer.state[param]["step"]) for param in params] == [5, 5, 5, 1]


@pytest.mark.parametrize("make", [fusedopt.Adam, torch.optim.Adam], ids=["ours", "torch"])
def test_a_full_graph_cannot_hold_a_step(make: Callable[..., Any]) -> None:
    """Nor can it with torch's classes, which break the graph themselves."""
    param = nn.Parameter(torch.ones(3))
    optimizer = make([param])
    param.grad = torch.ones(3)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"optimizer\.step"):
        torch.compile(lambda: optimizer.step(), backend="eager", fullgraph=True)()
    assert torch.equal(param, torch.ones(3))


def test_closure() -> None:
    """It is called outside of the graph; a model that is compiled itself is compiled there, too."""
    ours, theirs = make_model(), make_model()
    compiled_model = torch.compile(ours, backend="eager")
    optimizer, plain = (fusedopt.Adam(model.parameters(), lr=0.1) for model in (ours, theirs))

    def closure_of(model: Any, o: Any, x: Tensor) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            o.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        return closure

    compiled = torch.compile(lambda x: optimizer.step(closure_of(compiled_model, optimizer, x)), backend="eager")
    for x in batches():
        assert torch.equal(compiled(x), plain.step(closure_of(theirs, plain, x)))
        assert_same(ours, theirs, optimizer, plain)
    assert counters["stats"]["unique_graphs"] == 1


def test_clip_grad_norm() -> None:
    ours, theirs = make_model(), make_model()

    def run(model: nn.Module, x: Tensor) -> Tensor:
        model.zero_grad()
        model(x).square().mean().backward()
        return fusedopt.clip_grad_norm_(model.parameters(), 0.01)

    compiled = torch.compile(lambda x: run(ours, x), backend="eager")
    for x in batches():
        assert torch.equal(compiled(x), run(theirs, x))
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None and torch.equal(p.grad, q.grad)


@pytest.fixture
def compiled_autograd() -> Iterator[None]:
    with torch._dynamo.config.patch(compiled_autograd=True):
        yield


def test_compiled_autograd(compiled_autograd: None) -> None:
    check_training_step(BY_ID["adamw-decay"], "eager")
    assert counters["compiled_autograd"]["captures"] == 1


# Steps in backward.


@pytest.mark.parametrize("what", ["model", "step"])
def test_step_in_backward(what: str) -> None:
    ours, theirs = make_model(), make_model()
    steps = step_in_backward(ours, fusedopt.Adam, lr=0.1)
    plain = fusedopt.Adam(theirs.parameters(), lr=0.1)
    model = torch.compile(ours, backend="aot_eager") if what == "model" else ours

    def training_step(x: Tensor) -> None:
        model(x).square().mean().backward()

    run = torch.compile(training_step, backend="aot_eager") if what == "step" else training_step
    for number, x in enumerate(batches()):
        before = frames()
        run(x)
        assert frames() == before or number == 0
        theirs(x).square().mean().backward()
        plain.step()
        plain.zero_grad()
        assert_same(ours, theirs, steps, plain)


def test_hooks_are_not_traced() -> None:
    """Dynamo would, where it has compiled what calls backward, and has taken what they remember for constants."""
    compiled_frames = []
    for is_released in (False, True):
        torch._dynamo.reset()
        before = frames()
        model = make_model()
        if is_released:
            step_in_backward(model, fusedopt.Adam, ema_decay=0.5)
        compiled = torch.compile(lambda x, model=model: model(x).sum().backward(), backend="eager")
        for x in batches():
            compiled(x)
        compiled_frames.append(frames() - before)
    assert compiled_frames[0] == compiled_frames[1] > 0


def test_step_in_compiled_autograd_is_refused(compiled_autograd: None) -> None:
    model = make_model()
    step_in_backward(model, fusedopt.Adam)
    compiled = torch.compile(lambda x: model(x).sum().backward(), backend="eager")
    with pytest.raises(RuntimeError, match="compiled autograd's, which does not tell when it ends"):
        compiled(torch.ones(4, 8))


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RAdam", "Adagrad"])
def test_training_does_not_import_dynamo(name: str) -> None:
    """That takes a second, as making any of torch's own optimizers does."""
    program = f"""
import sys, torch, fusedopt
model = torch.nn.Linear(3, 3)
optimizer = fusedopt.{name}(model.parameters(), max_grad_norm=1.0)
for _ in range(2):
    optimizer.zero_grad()
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
optimizer.add_param_group({{"params": [torch.nn.Parameter(torch.ones(3))]}})
print('torch._dynamo' in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"
