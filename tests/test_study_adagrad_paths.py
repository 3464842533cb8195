"""Adagrad in a valley along the axes and in one that lies askew: the figures of examples/studies/adagrad_paths.py."""

from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
from studies import studied


@pytest.fixture(scope="module")
def study() -> Iterator[ModuleType]:
    with studied("adagrad_paths") as module:
        yield module


# From Dive into Deep Learning, 12.7.
@pytest.mark.parametrize(("lr", "end"), [(0.4, (-2.382563, -0.158591)), (2.0, (-0.002295, -0.000000))])
def test_ends(study: ModuleType, lr: float, end: tuple[float, float]) -> None:
    points = study.path("Adagrad", lr)
    assert points.shape == (21, 2)
    assert points[0].tolist() == [-5, -2]
    assert points[-1].tolist() == pytest.approx(end, rel=0, abs=5e-7)  # six digits were given


def test_turned(study: ModuleType) -> None:
    """SGD's path is turned with the valley (but for rounding: measured 4e-15); Adagrad's becomes a slow one."""
    straight, turned = (study.in_valley("SGD", 0.4, degrees) for degrees in (0.0, 45.0))
    torch.testing.assert_close(turned, straight, rtol=0, atol=1e-13)
    straight, turned = (study.in_valley("Adagrad", 2.0, degrees) for degrees in (0.0, 45.0))
    torch.testing.assert_close(turned[0], straight[0], rtol=0, atol=1e-13)
    assert study.height(turned[-1]) > 1e5 * study.height(straight[-1])  # measured: 4e5


def test_best_rates(study: ModuleType) -> None:
    """Each with its best lr, Adagrad is far ahead along the axes and behind SGD when turned."""
    lrs = np.geomspace(0.05, 10, 14)
    adagrad, sgd = ([study.sweep(name, degrees, lrs).min() for degrees in (0, 45)] for name in ("Adagrad", "SGD"))
    assert adagrad[0] < 1e-12 * sgd[0]  # measured: 5e-20
    assert adagrad[1] > 1.5 * sgd[1]  # measured: 1.8


def test_run(study: ModuleType) -> None:
    """The sentences hold the figures, and each table as many cells as columns."""
    found = study.run(quick=True)
    assert "(-2.382563, -0.158591) with lr 0.4 and at (-0.002295, -0.000000) with lr 2" in found.findings
    for table in found.tables:
        assert {len(row) for row in table.rows} == {len(table.columns)}
