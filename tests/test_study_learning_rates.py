"""The learning-rate study in a short form: half of the epochs, seed 0."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from studies import studied

EPOCHS = 30


@pytest.fixture(scope="module")
def study() -> Iterator[ModuleType]:
    with studied("learning_rates", "sklearn") as module:
        yield module


@pytest.fixture(scope="module")
def data(study: ModuleType) -> Any:
    return study.load()


@pytest.fixture(scope="module")
def runs(study: ModuleType, data: Any) -> dict[str, Any]:
    """Of the schedules with cycles."""
    lr = study.find_rate(data).suggestion()
    schedules = study.schedules(lr, EPOCHS * len(data.batches()))
    return {name: study.train(data, lr, schedules[name], 0, EPOCHS) for name in ("triangular", "SGDR", "decaying SGDR")}


def test_data(data: Any) -> None:
    """Each class has its share on both sides, and no picture is on both."""
    assert (len(data.targets), len(data.answers)) == (600, 1197)
    shares = [torch.bincount(part, minlength=10) / len(part) for part in (data.targets, data.answers)]
    assert (shares[0] - shares[1]).abs().max() < 1 / 600  # a picture; measured: 0.84 of it
    torch.testing.assert_close(data.inputs.mean(0), torch.zeros(64), rtol=0, atol=1e-6)  # measured: 4e-8
    known = {row.numpy().tobytes() for row in data.inputs}
    assert not any(row.numpy().tobytes() in known for row in data.held_out)


def test_range_test(study: ModuleType, data: Any) -> None:
    """It sees all phases: a rate that does nothing, a loss that falls, and one that rises far above the first."""
    found = study.find_rate(data)
    lowest = int(np.argmin(found.smoothed))
    assert found.lrs[0] < found.suggestion() < found.lrs[lowest] < found.lrs[-1]
    assert found.smoothed[lowest] < 0.75 * found.smoothed[0]  # measured: 0.63
    assert found.smoothed[-1] > 1.25 * found.smoothed[0]  # measured: 1.54


@pytest.mark.parametrize("name", ["SGDR", "decaying SGDR"])
def test_restarts_are_where_they_should_be(study: ModuleType, runs: dict[str, Any], name: str) -> None:
    """The rate falls but at restarts, which begin cycles of equal length; and there, and at the end, are snapshots."""
    run = runs[name]
    cycle = EPOCHS // study.CYCLES * 19
    rises = [step for step, (before, after) in enumerate(itertools.pairwise(run.lrs), 1) if after > before]
    assert rises == [cycle, 2 * cycle, 3 * cycle, 4 * cycle]
    assert run.ends == [*rises, 5 * cycle] == [*rises, len(run.lrs)]
    decay = 0.7 if name == "decaying SGDR" else 1.0
    for i, step in enumerate([0, *rises]):
        assert run.lrs[step] == pytest.approx(run.lrs[0] * decay**i, rel=1e-15)


def test_triangular_cycles(study: ModuleType, runs: dict[str, Any]) -> None:
    """Up to the suggested rate and down to a tenth of it."""
    run, cycle = runs["triangular"], EPOCHS // study.CYCLES * 19
    assert run.ends == [cycle, 2 * cycle, 3 * cycle, 4 * cycle, 5 * cycle]
    assert run.lrs[:cycle] == pytest.approx(run.lrs[cycle : 2 * cycle], rel=1e-12)
    assert run.lrs[0] == min(run.lrs) == pytest.approx(max(run.lrs) / 10)
    assert run.lrs.index(max(run.lrs)) == cycle // 2


def test_ensemble_is_no_worse_than_its_best_member(runs: dict[str, Any]) -> None:
    run = runs["SGDR"]
    assert run.ensemble >= max(run.members)  # measured: 96.07 and 94.99
    assert run.members[-1] == run.accuracies[-1]


def test_members_differ(data: Any, runs: dict[str, Any]) -> None:
    """In what they predict, not just in weights."""
    answers = [p.argmax(1) for p in runs["SGDR"].snapshots.predictions(data.held_out)]
    for a, b in itertools.combinations(answers, 2):
        assert (a != b).double().mean() > 0.01  # measured: at least 0.039


def test_run(study: ModuleType) -> None:
    """Two sentences, tables that are whole, and four axes."""
    found = study.run(quick=True)
    assert found.findings.count(". ") == 1 and found.findings.endswith("seeds.")
    for table in found.tables:
        assert {len(row) for row in table.rows} == {len(table.columns)}
    assert len(found.figure.axes) == 4


def test_findings_tell_when_the_ensemble_is_worse(study: ModuleType, runs: dict[str, Any]) -> None:
    good = runs["SGDR"]
    bad = replace(good, ensemble=good.members[0] - 1)
    every = {name: [bad, good] for name in study.COLORS}
    assert "no less than" not in study.findings(0.1, every) and "for 1 of the 2 seeds" in study.findings(0.1, every)
