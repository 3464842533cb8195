"""When Adagrad's rates are worth it: examples/studies/adagrad_sparse.py in a short form.

The text is this Python's standard library, which differs between versions. The bounds leave room for that: measured
are the least and the most of Python 3.10 to 3.13, of 10 to 18 modules, and of three orders of the examples.
"""

import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from reference import assert_same_bits
from studies import studied
from torch.nn.functional import cross_entropy

import fusedopt


@pytest.fixture(scope="module")
def study() -> Iterator[ModuleType]:
    with studied("adagrad_sparse", "sklearn") as module:
        yield module


@pytest.fixture(scope="module")
def text(study: ModuleType) -> Any:
    return study.load_text(12)


@pytest.fixture(scope="module")
def runs(study: ModuleType, text: Any) -> dict[str, Any]:
    """One pass; the best lr of Adagrad is 0.3 here, SGD's 3 or 10."""
    return study.learn_text(text, 1, (0.1, 0.3, 1.0, 3.0, 10.0, 30.0))[0]


def test_text(text: Any) -> None:
    """Frequencies and telling words, counted with sets."""
    vocabulary = len(text.frequency)
    words = [set(row[row < vocabulary].tolist()) for row in text.words]
    modules, parts = text.module.tolist(), text.part.tolist()
    learned = [i for i, part in enumerate(parts) if part in (2, 3, 4)]
    having = {word: [i for i in learned if word in words[i]] for word in range(0, vocabulary, 500)}
    assert [text.frequency[word] for word in having] == [len(chunks) for chunks in having.values()]
    for i in range(0, len(words), 500):
        found = {}
        for word in words[i]:
            where = [modules[j] for j in learned if word in words[j]]
            found[word] = where.count(modules[i]) / (len(where) + 1)
        most = max(found.values())
        telling = [text.frequency[word] for word, share in found.items() if math.isclose(share, most, rel_tol=1e-6)]
        assert text.telling[i] in telling


def test_rare_words_keep_a_larger_rate(study: ModuleType, text: Any, runs: dict[str, Any]) -> None:
    medians = [rates.median() for rates in study.by_group(text.frequency, runs["Adagrad"].looks[-1].rates)]
    assert medians == sorted(medians, reverse=True)
    assert medians[0] > 5 * medians[-1]  # measured: 14 to 26


def test_sparse_text(study: ModuleType, text: Any, runs: dict[str, Any]) -> None:
    """Adagrad is ahead of SGD, and owes that to rare words."""
    adagrad, sgd = (study.accuracies(text, runs[name]) for name in ("Adagrad", "SGD"))
    lead = [a - b for a, b in zip(adagrad, sgd, strict=True)]
    assert lead[0] > 0.01  # of all held-out chunks; measured: 0.021 to 0.061
    assert lead[2] > lead[-1] + 0.01  # 4 to 10 learned chunks have the telling word; measured: 0.034 to 0.092


def test_only_touched_rows_change(study: ModuleType, text: Any) -> None:
    """A sum of -1 makes NaN of an element that the formula is applied to: so it is to no row but those of the batch."""
    model = study.text_model(text)
    optimizer = fusedopt.Adagrad(model.parameters(), lr=0.3)
    words, modules = text.words[:32], text.module[:32]
    touched = words.unique()[:-1]  # the last one only fills up
    others = torch.ones(len(model.weight), dtype=torch.bool)
    others[touched] = False
    sums = optimizer.state[model.weight]["sum"]
    sums[others] = -1
    before = model.weight.detach().clone(), sums.clone()
    cross_entropy(model(words), modules).backward()
    assert model.weight.grad.is_sparse
    optimizer.step()
    for now, then in zip((model.weight.detach(), sums), before, strict=True):
        assert_same_bits(now[others], then[others])
        assert (now[touched] != then[touched]).all()


def test_regression(study: ModuleType) -> None:
    """Each with its lr comes near least squares, and none below; with the textbook's 0.1 Adagrad alone does."""
    best = study.regression(15, (0.01, 0.1))
    assert best["Adagrad"].lr == 0.1
    assert all(0 < run.score < 0.03 for run in best.values())  # measured: 0.008, Adam 0.011, SGD 0.008
    textbook = study.regression(15, (0.1,))
    assert all(textbook[name].score > 0.05 for name in ("Adam", "SGD"))  # measured: 0.19, 0.13


def test_network(study: ModuleType) -> None:
    """Adagrad's own rate can only fall, and the loss falls on."""
    looks = study.network(10, (0.03,))["Adagrad"].looks
    rates = [look.rates for look in looks]
    assert rates == sorted(rates, reverse=True)
    assert looks[-1].score < 0.6 * looks[4].score


def test_run(study: ModuleType) -> None:
    found = study.run(quick=True)
    for table in found.tables:
        assert {len(row) for row in table.rows} == {len(table.columns)}
