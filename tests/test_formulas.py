"""What the sources say: RAdam's rectification, Adagrad's textbook figures; and the choices that torch lacks."""

import mpmath
import pytest
import torch
from optimizers import generator
from reference import assert_same_bits
from torch import Tensor
from torch.nn import Parameter

import fusedopt

# --- RAdam -----------------------------------------------------------------------------------------------------------


def rect_by_step(beta2: float, counts: list[int]) -> Tensor:
    """What RAdam multiplies a step by, in float64, at several step counts in one call.

    With beta1 = 0, lr = 1, a gradient of 1, eps = 0 and a maximum of 1 under the root the change is that number and
    the bias correction's root.
    """
    params = [Parameter(torch.zeros(1, dtype=torch.float64)) for _ in counts]
    optimizer = fusedopt.RAdam(params, lr=1.0, betas=(0.0, beta2), eps=0.0, amsgrad=True, degenerate_to_sgd=False)
    for param, count in zip(params, counts, strict=True):
        param.grad = torch.ones(1, dtype=torch.float64)
        zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        optimizer.state[param] = {
            "step": torch.tensor(count - 1.0),
            "exp_avg": zero.clone(),
            "exp_avg_sq": zero.clone(),
            "max_exp_avg_sq": one,
        }
    optimizer.step()
    return -torch.cat([param.detach() for param in params])


@pytest.mark.parametrize("beta2", [0.9999, 0.999, 0.99, 0.9, 0.8, 0.6, 0.5])
def test_rectification(beta2: float, capability: str) -> None:
    """r_t over 5,000 steps against the formula in 60 digits.

    rho_t loses up to four digits to cancellation, in torch's order of operations too: measured, at most 2.4e-12 of
    r_t <= 1 (beta2 = 0.9999, the first rectified steps).
    """
    counts = list(range(1, 5001))
    changes = rect_by_step(beta2, counts).tolist()
    tractable = 0
    with mpmath.workdps(60):
        beta = mpmath.mpf(beta2)
        rho_inf = 2 / (1 - beta) - 1
        for count, change in zip(counts, changes, strict=True):
            power = beta**count
            rho = rho_inf - 2 * count * power / (1 - power)
            if rho <= 5:
                assert change == 0, count
                continue
            tractable += 1
            rect = mpmath.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
            assert abs(change / mpmath.sqrt(1 - power) - rect) < 1e-11, count
    assert tractable == {0.6: 0, 0.5: 0, 0.8: 4994}.get(beta2, 4995)


def test_the_first_rectified_step_is_the_sixth() -> None:
    changes = rect_by_step(0.999, [1, 2, 3, 4, 5, 6, 7])
    assert (changes > 0).tolist() == [False] * 5 + [True] * 2


@pytest.mark.parametrize("beta2", [0.6, 2 / 3, 0.5, 0.0])
def test_never_rectified(beta2: float) -> None:
    """rho_inf <= 5, of 0.6 exactly 4, where r_t would divide by zero: SGD with momentum for ever, or no step."""
    assert 2 / (1 - 0.6) - 1 == 4
    for degenerate in (True, False):
        param = Parameter(torch.ones(9))
        optimizer = fusedopt.RAdam([param], lr=0.5, betas=(0.0, beta2), degenerate_to_sgd=degenerate)
        for step in range(1, 60):
            param.grad = torch.full((9,), 1 / 64)
            optimizer.step()
            assert_same_bits(param.detach(), torch.full((9,), 1 - step / 128 if degenerate else 1.0))


def test_steps_are_each_parameters_own() -> None:
    """One whose sixth step it is, is rectified beside others that are not."""
    params = [Parameter(torch.zeros(3)) for _ in range(3)]
    optimizer = fusedopt.RAdam(params, degenerate_to_sgd=False)
    for step in range(1, 9):
        for i, param in enumerate(params):
            param.grad = torch.ones(3) if step > i else None
        optimizer.step()
        assert [bool(param.any()) for param in params] == [step - i >= 6 for i in range(3)]


def test_without_a_step_the_moments_and_the_decay_go_on() -> None:
    still = Parameter(torch.ones(4))
    moving = Parameter(torch.ones(4))
    options = {"lr": 0.5, "weight_decay": 0.5, "decoupled_weight_decay": True}
    a = fusedopt.RAdam([still], degenerate_to_sgd=False, **options)
    b = fusedopt.RAdam([moving], **options)
    for _ in range(3):
        still.grad = moving.grad = torch.full((4,), 0.25)
        a.step(), b.step()
    assert_same_bits(still.detach(), torch.full((4,), 0.75**3))
    assert (moving < still).all()
    for name in ("exp_avg", "exp_avg_sq"):
        assert_same_bits(a.state[still][name], b.state[moving][name])


def test_torchs_own_step_does_not_know_our_options() -> None:
    """differentiable=True takes it: an error, not a silent other result."""
    for make, name in (
        (lambda p: fusedopt.RAdam(p, differentiable=True, amsgrad=True), "amsgrad"),
        (lambda p: fusedopt.RAdam(p, differentiable=True, degenerate_to_sgd=False), "degenerate_to_sgd"),
        (lambda p: fusedopt.RAdam(p, differentiable=True, optimized_update=False), "optimized_update"),
        (lambda p: fusedopt.Adagrad(p, differentiable=True, eps_inside_sqrt=True), "eps_inside_sqrt"),
    ):
        param = Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        with pytest.raises(
            RuntimeError, match=rf"param_groups\[0\]\['{name}'\] is (True|False), which torch's own step"
        ):
            make([param]).step()
        assert (param == 1).all()


def test_own_options_by_group_and_in_checkpoints() -> None:
    """They are options like the others: of a group, of one that comes later, saved, loaded, kept where they lack."""
    params = [Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = fusedopt.RAdam(
        [{"params": params[:1], "amsgrad": True}, {"params": params[1:2]}], optimized_update=False
    )
    optimizer.add_param_group({"params": params[2:]})
    for param in params:
        param.grad = torch.ones(2)
    optimizer.step()
    assert [group["amsgrad"] for group in optimizer.param_groups] == [True, False, False]
    assert not any(group["optimized_update"] for group in optimizer.param_groups)
    assert ["max_exp_avg_sq" in optimizer.state[param] for param in params] == [True, False, False]
    saved = optimizer.state_dict()
    other = fusedopt.RAdam([{"params": [param]} for param in params])
    other.load_state_dict(saved)
    assert [group["amsgrad"] for group in other.param_groups] == [True, False, False]
    theirs = torch.optim.RAdam([{"params": [param]} for param in params])
    other.load_state_dict(theirs.state_dict())
    assert [group["amsgrad"] for group in other.param_groups] == [True, False, False]


# --- Adagrad ---------------------------------------------------------------------------------------------------------


def descend(lr: float, inside: bool, eps: float = 1e-6, steps: int = 20) -> Tensor:
    """f(x) = 0.1 x1^2 + 2 x2^2 from (-5, -2) (Dive into Deep Learning, section 12.7)."""
    x = Parameter(torch.tensor([-5.0, -2.0], dtype=torch.float64))
    optimizer = fusedopt.Adagrad([x], lr=lr, eps=eps, eps_inside_sqrt=inside)
    for _ in range(steps):
        optimizer.zero_grad()
        (0.1 * x[0] ** 2 + 2 * x[1] ** 2).backward()
        optimizer.step()
    return x.detach()


@pytest.mark.parametrize(("lr", "expected"), [(0.4, (-2.382563, -0.158591)), (2.0, (-0.002295, -0.000000))], ids=str)
def test_textbook_figures(lr: float, expected: tuple[float, float]) -> None:
    """The chapter's own, to the six digits that it prints; it adds eps inside the root."""
    assert [round(value, 6) for value in descend(lr, inside=True).tolist()] == list(expected)


def test_eps_inside_is_not_outside() -> None:
    """With a large eps the two differ; one step tells what each is: 1 / sqrt(1 + 3) and 1 / (sqrt(1) + 3)."""
    for inside, divisor in ((True, 2.0), (False, 4.0)):
        param = Parameter(torch.zeros(5))
        param.grad = torch.ones(5)
        fusedopt.Adagrad([param], lr=1.0, eps=3.0, eps_inside_sqrt=inside).step()
        assert_same_bits(param.detach(), torch.full((5,), -1 / divisor))
    assert (descend(0.4, True, eps=0.5) - descend(0.4, False, eps=0.5)).abs().min() > 0.01


def test_lr_decay_begins_with_the_second_step() -> None:
    param = Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = fusedopt.Adagrad([param], lr=1.0, lr_decay=1.0, eps=0.0)
    changes = []
    for _ in range(3):
        before = param.detach().clone()
        optimizer.state[param]["sum"].zero_()
        param.grad = torch.ones(2, dtype=torch.float64)
        optimizer.step()
        changes.append((before - param.detach())[0].item())
    assert changes == pytest.approx([1, 1 / 2, 1 / 3], abs=1e-15)  # the parameter's own rounding


@pytest.mark.parametrize("make", [fusedopt.Adagrad, torch.optim.Adagrad], ids=["ours", "torchs"])
def test_state_is_made_with_the_optimizer(make: type[torch.optim.Adagrad]) -> None:
    """As torch's: before the first step, with the initial value, for groups that come later at their first step."""
    params = [Parameter(torch.ones(2)), Parameter(torch.ones(2, dtype=torch.complex64)), Parameter(torch.ones(3))]
    optimizer = make(params[:2], initial_accumulator_value=0.5)
    assert optimizer.state[params[0]]["sum"].tolist() == [0.5, 0.5]
    assert optimizer.state[params[1]]["sum"].tolist() == [0.5 + 0.5j] * 2
    optimizer.add_param_group({"params": params[2:]})
    params[2].grad = torch.zeros(3)
    optimizer.step()
    assert optimizer.state[params[2]]["sum"].tolist() == [0.5] * 3


def test_adagrads_sum_is_not_flushed(capability: str) -> None:
    """A sum below the smallest normal number is kept: it never decays, and what follows depends on it."""
    param = Parameter(torch.zeros(33))
    optimizer = fusedopt.Adagrad([param])
    param.grad = torch.full((33,), 1e-20)
    optimizer.step()
    total = optimizer.state[param]["sum"]
    assert ((total > 0) & (total < torch.finfo(torch.float32).tiny)).all()


def test_training_goes_down() -> None:
    """Each class finds the solution of a small least-squares problem."""
    g = generator(2)
    features, target = torch.randn(64, 10, generator=g), torch.randn(10, generator=g)
    for make in (lambda p: fusedopt.RAdam(p, lr=0.05), lambda p: fusedopt.Adagrad(p, lr=0.5)):
        weight = Parameter(torch.zeros(10))
        optimizer = make([weight])
        losses = []
        for _ in range(300):
            optimizer.zero_grad()
            loss = ((features @ (weight - target)) ** 2).mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 1e-3 * losses[0]
