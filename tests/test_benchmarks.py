"""What the benchmarks claim: the small programs for rivals, asked of ours; and documents that say what was measured."""

import dataclasses
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from packages import require

ROOT = Path(__file__).parent.parent
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(ROOT)
    from benchmarks import cpu, harness, rivals

# Each of ours that a rival is compared with, as if it were the rival.
OURS = {
    contender.ours: dataclasses.replace(contender, imports="import fusedopt", make=contender.ours)
    for rival in rivals.RIVALS.values()
    for contender in rival.contenders.values()
}


def ask(contender: Any, probe: str) -> tuple[str, str]:
    tolerance = rivals.RIGHT if contender.exact else rivals.NEAR
    source = rivals.program(contender, probe)
    assert source is not None
    with torch.random.fork_rng():
        return rivals.answer(source, tolerance)


@pytest.mark.parametrize("title", OURS)
def test_ours_answers_rightly(title: str) -> None:
    contender = OURS[title]
    if contender.exact:
        contender = dataclasses.replace(contender, maximize="maximize=True")
        contender = dataclasses.replace(contender, amsgrad="amsgrad=True" if "fusedopt.Adam(" in title else "")
    probes = rivals.PROBES if contender.exact else [rivals.PLAIN]
    answers = {probe: ask(contender, probe) for probe in probes if rivals.program(contender, probe)}
    assert {probe: words for probe, (verdict, words) in answers.items() if verdict != "right"} == {}
    assert len(answers) >= (9 if contender.exact else 1)


@pytest.mark.parametrize("probe", rivals.PROBES)
def test_a_wrong_one_is_seen(probe: str) -> None:
    """An optimizer that does nothing, and one that ignores the option that is asked about."""
    plain = rivals.Contender("import fusedopt", "fusedopt.Adam(params, lr=lr)", rivals.ADAM, "")
    assert ask(dataclasses.replace(plain, make="fusedopt.Adam(params, lr=0.0)"), probe)[0] == "wrong"
    option = rivals.PROBES[probe][1]
    if option:
        ignoring = dataclasses.replace(plain, **{option: "eps=1e-8"})
        assert ask(ignoring, probe)[0] == "wrong"
    assert ask(dataclasses.replace(plain, make="fusedopt.Adam(params, lr='x')"), probe)[0] == "raises"


def test_documents_say_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    require("matplotlib")
    from benchmarks import report  # beside rivals, which is imported

    assert report.main(["--check"]) == 0, capsys.readouterr().out


def test_runs_that_disagree_are_named() -> None:
    require("matplotlib")
    from benchmarks import report

    def row(name: str, low: float, high: float, unit: str = "x") -> report.Row:
        value = {"median": (low + high) / 2, "low": low, "high": high}
        return {"benchmark": "host", "name": name, "unit": unit, "value": value}

    first = [row("same", 1, 2), row("apart", 1, 2), row("seconds", 1, 2, "us"), row("once", 1, 1), row("alone", 1, 2)]
    second = [row("same", 2, 3), row("apart", 2.1, 3), row("seconds", 5, 6, "us"), row("once", 4, 4)]
    *named, count = report.compare(first, second)
    assert len(named) == 1 and "apart" in named[0]
    assert count == "1 of 2 rows lie apart; 1 more are of one run only"
    assert len(list(report.compare(second, first))) == 2


def test_no_benchmark_is_left_out() -> None:
    require("matplotlib")
    run: dict[str, set[str]] = {}
    for module, names in cpu.LINES:
        run.setdefault(module, set()).update(names)
    assert {module: import_module(f"benchmarks.{module}").BENCHMARKS.keys() for module in run} == run
    defining = [path.stem for path in (ROOT / "benchmarks").glob("*.py") if "\nBENCHMARKS" in path.read_text()]
    assert sorted(defining) == sorted([*run, "gpu"])  # which has a command of its own


def test_rows_of_all_processes_are_one() -> None:
    def row(name: str, *value: float, note: str = "") -> harness.Row:
        spread = harness.Spread(*value) if value else None
        return harness.Row(name, spread, times={"fusedopt": spread} if spread else {}, note=note)

    found = [
        [row("a", 2, 1, 3), row("b", 5, 4, 6)],
        [row("a", 9, 8, 10), row("b", note="skipped: no floor")],
        [row("a", 4, 0.5, 5), row("b", 5, 4, 6)],
    ]
    first, second = cpu.merge(found)
    assert first == row("a", 4, 0.5, 10)
    assert second == found[1][1]
    half = [[row("a", 2, 1, 3)], [row("a: floor", note="skipped: no floor")]]
    assert [each.value for each in cpu.merge(half)] == [None, None]
    refused = row("", note="REFUSED, wrong result: bits")
    assert cpu.merge([*found, [refused]]) == [refused]
    assert cpu.merge(found[:1]) == found[0]
