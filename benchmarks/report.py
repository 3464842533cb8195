"""Turn what was measured into the README's tables, docs/benchmarks.md's tables and their charts.

    python -m benchmarks.report          # of the results that the README is of now; --help: of others
    python -m benchmarks.report --check  # only whether the documents say what the results do
    python -m benchmarks.report --compare A.json B.json  # do two runs agree within their spread?

Nothing is chosen by outcome: the README's rows are those of STORY whoever wins, docs/benchmarks.md has all. Where
another is faster than fusedopt, by the medians, the row says so.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from . import precision
from .harness import FOREACH, FUSED, LOOP, OURS, ROOT, show_time

RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
CPU = [RESULTS / "cpu-intel-xeon.json", RESULTS / "cpu-intel-xeon-build.json"]
Row = dict[str, Any]
OF_THE_DAY = ("s", "ms", "us", "ns", "/s", "GB/s")  # units of what the machine may do otherwise tomorrow

# What the README shows: benchmark, row, and the words for it.
STORY = (
    ("step64m", "adam: of torch fused", "Adam, 64M elements in 4 tensors"),
    ("step64m", "amsgrad: of torch fused", "AMSGrad, the same"),
    ("radam", "64M: faster than torch foreach", "RAdam, the same (torch has no fused one: foreach)"),
    ("adagrad", "64M: of torch fused", "Adagrad, the same"),
    ("dtypes", "16M bfloat16: of torch fused", "Adam, 16M in bfloat16"),
    ("dtypes", "16M float64: of torch fused", "Adam, 16M in float64"),
    ("elements", "1,000 elements: faster than torch fused", "Adam, one tensor of 1,000"),
    ("elements", "100,000 elements: faster than torch fused", "Adam, one tensor of 100,000"),
    ("small1000", "gradients kept: faster than torch fused", "Adam, 1,000 tensors of 1,000"),
    ("small10", "gradients kept: faster than torch fused", "Adam, 10,000 tensors of 10"),
    ("small10", "gradients backward: faster than torch fused", "the same, new gradients from backward"),
    ("radam", "10,000 x 10: faster than torch foreach", "RAdam, 10,000 tensors of 10"),
    ("host", "1,000 tensors, gradients kept: faster than torch fused", "host cost of `step()`, 1,000 tensors"),
    ("host", "1,000 tensors, gradients backward: faster than torch fused", "the same, new gradients from backward"),
    (
        "start",
        "import, making it, first step: faster than torch fused",
        "in a fresh process: import, make, first step",
    ),
    ("dtensors", "1,000 DTensors: faster than torch fused", "host cost of `step()`, 1,000 DTensors"),
    ("sparse", "1M rows, distinct: faster than torch loop", "Adagrad, sparse: 4,096 rows of 1M x 64"),
    ("sparse", "1M rows, zipf: faster than torch loop", "the same, by Zipf's law"),
    ("phase", "clip: faster than torch", "AdamW and clipping, 64M"),
    ("phase-amp", "torch's scaler: faster than torch", "the same under torch's GradScaler"),
    ("phase-amp", "fusedopt's scaler: faster than torch", "the same under fusedopt's GradScaler"),
    ("phase", "clip, skip, ema, stats: faster than torch", "clip, skip, average and statistics, 64M"),
    ("phase-many", "10,000 x 10, clip: faster than torch", "AdamW and clipping, 10,000 tensors of 10"),
    ("gpt", "a training step: faster than torch fused", "a training step of the GPT of `make train`"),
)


# --- reading -------------------------------------------------------------------------------------------------------


def is_ours(name: str) -> bool:
    return name.startswith(OURS)


def sides(row: Row) -> tuple[str, str] | None:
    """Ours and the other of a row that compares two; None if it does not."""
    mine = [name for name in row["times"] if is_ours(name)]
    others = [name for name in row["times"] if not is_ours(name) and not name.startswith(("floor", "CPU"))]
    if row["unit"] == "us" and len(others) == 1:  # ours is the row's own value
        return OURS, others[0]
    return (mine[0], others[0]) if mine and others else None


def spread_of(row: Row, name: str) -> dict[str, float]:
    """A contender's seconds."""
    if name not in row["times"]:
        return {key: value * 1e-6 for key, value in row["value"].items()}
    found: dict[str, float] = row["times"][name]
    return found


def faster(row: Row) -> dict[str, float] | None:
    """How many times as long as ours the other takes: median and spread."""
    pair = sides(row)
    if pair is None or row["value"] is None:
        return None
    value = row["value"]
    if row["unit"] in ("us", "ms"):
        ours, other = spread_of(row, pair[0]), spread_of(row, pair[1])["median"]
        return {"median": other / ours["median"], "low": other / ours["high"], "high": other / ours["low"]}
    if ": of " in row["name"]:  # ours over the other's
        return {"median": 1 / value["median"], "low": 1 / value["high"], "high": 1 / value["low"]}
    return dict(value)


def find(rows: Sequence[Row], benchmark: str, name: str) -> Row | None:
    return next((row for row in rows if (row["benchmark"], row["name"]) == (benchmark, name)), None)


def show_ratio(value: dict[str, float]) -> str:
    """Bold where the other is faster."""
    text = f"{value['median']:.2f} x" if value["median"] < 10 else f"{value['median']:.0f} x"
    return f"**{text}: slower**" if value["median"] < 1 else text


# --- tables --------------------------------------------------------------------------------------------------------


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    columns = list(zip(*lines, strict=True))[1:]  # numbers to the right
    rule = ["---", *("--:" if any(re.match(r"\**\d", cell) for cell in column) else "---" for column in columns)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))


def readme_table(rows: Sequence[Row]) -> str:
    lines = []
    for benchmark, name, words in STORY:
        row = find(rows, benchmark, name)
        if row is None or (value := faster(row)) is None:
            lines.append([words, "", "", "not measured", ""])
            continue
        ours, other = sides(row) or ("", "")
        floor = floor_of(rows, row)
        times = [show_time(spread_of(row, who)["median"]) for who in (ours, other)]
        lines.append([words, times[0], floor, f"{other}: {times[1]}", show_ratio(value)])
    return table(["float32 unless said", OURS, "of the traffic floor", "torch", "faster by"], lines)


def medians_of(rows: Sequence[Row]) -> dict[str, float]:
    """Those of low precision, by their rows' names."""
    return {row["name"]: row["value"]["median"] for row in rows if row["benchmark"] == "precision" and row["value"]}


def floor_of(rows: Sequence[Row], row: Row) -> str:
    """The ratio to the traffic floor, where the same benchmark has it of the same case."""
    case = row["name"].split(":")[0]
    for other in rows:
        if other["benchmark"] == row["benchmark"] and other["name"].startswith(f"{case}: of the floor"):
            return f"{other['value']['median']:.2f} x"
    return ""


def full_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        if row["value"] is None:
            if row["note"]:
                lines.append([row["benchmark"], row["name"], row["note"], "", "", ""])
            continue
        value = row["value"]
        number = f"{value['median']:.3g} {row['unit']}".strip()
        spread = "" if value["low"] == value["high"] else f"{value['low']:.3g} .. {value['high']:.3g}"
        verdict = {True: "met", False: "**missed**", None: ""}[row["meets"]]
        ratio = faster(row) if row["unit"] in ("x", "us", "ms") else None
        if ratio is not None and ratio["median"] < 1:
            verdict += " **slower**"
        medians = {name: time["median"] for name, time in row["times"].items()}
        of = ", ".join(f"{name} {show_time(median)}" for name, median in medians.items())
        name = precision.named(row["name"], medians)
        lines.append([row["benchmark"], name, number, spread, f"{row['target'] or ''} {verdict}".strip(), of])
    return table(["benchmark", "row", "median", "spread", "aim", "times"], lines)


def rivals_table(found: dict[str, Any]) -> str:
    lines = []
    for rival in found.values():
        for row in rival["rows"]:
            value = row["value"]
            title, case = row["name"].rsplit(", ", 1)
            times = {name: show_time(time["median"]) for name, time in row["times"].items()}
            torch_time = times.get("torch", times[title] if title.startswith("torch.") else "")
            version = f"{rival['distribution']} {rival['version']}"
            lines.append([title, version, case, times[OURS], times[title], torch_time, show_ratio(value)])
    return table(["optimizer", "version", "case", OURS, "it", "torch fused or foreach", "fusedopt is faster by"], lines)


def wrong_table(found: dict[str, Any]) -> str:
    """What the small programs found: a line for each that does not come out right."""
    lines = []
    for rival in found.values():
        for title, answers in rival["contenders"].items():
            bad = {probe: answer for probe, answer in answers.items() if answer[0] != "right"}
            lines += [[title, probe.replace("-", " "), verdict, words] for probe, (verdict, words) in bad.items()]
            if not bad:
                lines.append([title, "all", "right", ""])
    return table(["optimizer", "asked about", "answer", "by how much, or what it says"], lines)


def replace_between(text: str, name: str, new: str) -> str:
    """The text with what is between the two marks of this name replaced."""
    begin, end = f"<!-- {name}: made by benchmarks/report.py -->", f"<!-- end of {name} -->"
    if begin not in text or end not in text:
        raise SystemExit(f"no marks {begin} ... {end} there")
    return re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _: f"{begin}\n{new}\n{end}", text, flags=re.DOTALL)


# --- charts --------------------------------------------------------------------------------------------------------

COLORS = {OURS: "#0b6e4f", FUSED: "#d1495b", FOREACH: "#edae49", LOOP: "#8d99ae"}


def points(rows: Sequence[Row], benchmark: str, name: str) -> tuple[list[float], list[dict[str, float]]]:
    """A contender's curve."""
    found = [row for row in rows if row["benchmark"] == benchmark and row.get("at") and name in row["times"]]
    return [row["at"] for row in found], [row["times"][name] for row in found]


def draw_growth(rows: Sequence[Row], facts: dict[str, Any]) -> Figure:
    """Two log-log charts: time over elements, time over tensors."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    curves = (
        (left, "elements", "elements in one tensor", "One tensor: a step of Adam"),
        (right, "tensors", "tensors that share 10 million elements", "Many tensors: a step of Adam"),
    )
    for axes, benchmark, label, title in curves:
        for name, color in COLORS.items():
            x, times = points(rows, benchmark, name)
            y = [time["median"] * 1e3 for time in times]
            axes.loglog(x, y, "o-", color=color, label=name, linewidth=2.6 if name == OURS else 1.6, markersize=4)
            if x:
                low, high = ([time[key] * 1e3 for time in times] for key in ("low", "high"))
                axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
        axes.set_xlabel(label)
        axes.set_ylabel("milliseconds (median, band: spread)")
        axes.set_title(title)
        axes.grid(alpha=0.3, which="major")
        axes.legend()
    figure.suptitle(machine_words(facts), fontsize=10)
    return figure


def draw_ratios(rows: Sequence[Row], rivals: dict[str, Any], facts: dict[str, Any]) -> Figure:
    """How many times as long as fusedopt everyone takes: a bar each; 1 is a line."""
    bars: list[tuple[str, str, dict[str, float], str]] = []
    for benchmark, name, words in STORY:
        row = find(rows, benchmark, name)
        if row is not None and (value := faster(row)) is not None:
            bars.append((words.replace("`", ""), (sides(row) or ("", ""))[1], value, FUSED))
    for rival in rivals.values():
        if rival["distribution"] != "torch":
            for row in rival["rows"]:
                title, case = row["name"].rsplit(", ", 1)
                bars.append((case, title, row["value"], LOOP))
    figure = Figure(figsize=(12, 1.6 + 0.33 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for place, (_, _, value, color) in enumerate(bars):
        errors = [[value["median"] - value["low"]], [value["high"] - value["median"]]]
        width = value["median"] - 1  # to the left of the line where the other is faster
        axes.barh(place, width, left=1, color=COLORS[color], xerr=errors, ecolor="#333333", height=0.7)
        words = show_ratio(value).strip("*")
        axes.text(value["high"] * 1.06, place, words, va="center", fontsize=9)
    axes.axvline(1, color=COLORS[OURS], linewidth=2.5)
    axes.set_yticks(range(len(bars)), [f"{words}  |  {who}" for words, who, _, _ in bars], fontsize=9)
    axes.set_xscale("log")
    axes.set_xlim(0.8, max(value["high"] for _, _, value, _ in bars) * 3)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlabel("time of the other / time of fusedopt (log axis; right of the green line fusedopt is faster)")
    axes.grid(alpha=0.3, axis="x")
    axes.set_axisbelow(True)
    axes.set_title(f"How many times as long as fusedopt others take\n{machine_words(facts)}", fontsize=11)
    return figure


def machine_words(facts: dict[str, Any]) -> str:
    return (
        f"{facts['processor']}, {facts['cores']} cores, {facts['fusedopt_cpu_capability']}; torch {facts['torch']},"
        f" fusedopt {facts['fusedopt']}, {facts['date'][:10]}"
    )


def draw_precision(rows: Sequence[Row], facts: dict[str, Any]) -> Figure:
    """Each combination of low precision as a point: bytes against time."""
    medians = medians_of(rows)
    figure = Figure(figsize=(12, 7), layout="constrained")
    axes = figure.subplots()
    points = []
    for combination in precision.COMBINATIONS:
        name = combination.name
        if f"{name}: bytes" in medians:
            x, y = medians[f"{name}: bytes"], 1 / medians.get(f"{name}: faster than f32", 1.0)
            points.append((round(x), y, x, name, COLORS[OURS if combination.kind == OURS else FUSED]))
    column, free = None, 0.0
    for rounded, y, x, name, color in sorted(points):  # no words over others
        free = y if rounded != column else max(y, free + 0.035)
        column = rounded
        axes.plot(x, y, "o", color=color, markersize=8)
        axes.annotate(name, (x, free), xytext=(8, -3), textcoords="offset points", fontsize=9, color=color)
    axes.axhline(1, color="#8d99ae", linewidth=1)
    axes.set_ylim(bottom=0)
    axes.set_xlim(5, 18.5)
    axes.set_xlabel("bytes a parameter element: weights, gradients and state (measured)")
    axes.set_ylabel("time of a step of Adam, 64M elements, over that in float32")
    axes.grid(alpha=0.3)
    axes.set_title(
        f"Low precision: further left is smaller, further down is faster\n{machine_words(facts)}", fontsize=11
    )
    return figure


# --- the command line ----------------------------------------------------------------------------------------------


def documents(rows: Sequence[Row], rivals: dict[str, Any]) -> Iterator[tuple[Path, str]]:
    """Each document, as it should be."""
    readme = ROOT / "README.md"
    text = replace_between(readme.read_text(), "numbers", readme_table(rows))
    yield readme, replace_between(text, "low precision", precision.markdown(medians_of(rows)))
    page = DOCS / "benchmarks.md"
    text = replace_between(page.read_text(), "all rows", full_table(rows))
    text = replace_between(text, "rivals", rivals_table(rivals))
    yield page, replace_between(text, "answers", wrong_table(rivals))


def compare(first: Sequence[Row], second: Sequence[Row]) -> Iterator[str]:
    """The rows of two runs whose spreads do not overlap, and how many there are.

    Times are of that day's machine; what was measured once has no spread.
    """
    compared = apart = 0
    measured = [
        {
            (row["benchmark"], row["name"]): row["value"]
            for row in rows
            if row["unit"] not in OF_THE_DAY and row["value"] and row["value"]["low"] < row["value"]["high"]
        }
        for rows in (first, second)
    ]
    for (benchmark, name), a in measured[0].items():
        if (benchmark, name) not in measured[1]:
            continue
        b = measured[1][benchmark, name]
        compared += 1
        if a["low"] > b["high"] or b["low"] > a["high"]:
            apart += 1
            ranges = " and ".join(f"{each['low']:.3g} .. {each['high']:.3g}" for each in (a, b))
            yield f"{benchmark:<10} {name:<50} {ranges} (medians {b['median'] / a['median'] - 1:+.0%})"
    alone = len(measured[0].keys() ^ measured[1].keys())
    yield f"{apart} of {compared} rows lie apart; {alone} more are of one run only"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cpu", nargs="+", type=Path, default=CPU, help="of `make bench`, the main one first")
    parser.add_argument("--rivals", type=Path, default=RESULTS / "rivals-intel-xeon.json", help="of `make rivals`")
    parser.add_argument("--check", action="store_true", help="write nothing: fail where a document is not up to date")
    parser.add_argument("--compare", nargs=2, type=Path, metavar="RESULTS", help="print where two runs disagree")
    args = parser.parse_args(argv)
    if args.compare:
        print("\n".join(compare(*(json.loads(path.read_text())["rows"] for path in args.compare))))
        return 0
    facts, *more = (json.loads(path.read_text()) for path in args.cpu)
    rows = facts["rows"] + [row for each in more for row in each["rows"]]
    rivals = json.loads(args.rivals.read_text())["rivals"]
    stale = False
    for path, text in documents(rows, rivals):
        if path.read_text() != text:
            stale = True
            if not args.check:
                path.write_text(text)
            print(f"{path.relative_to(ROOT)}: {'is not what the results say' if args.check else 'written'}")
    if args.check:
        return int(stale)
    draw_growth(rows, facts).savefig(DOCS / "benchmarks-growth.png", dpi=110)
    draw_ratios(rows, rivals, facts).savefig(DOCS / "benchmarks-ratios.png", dpi=110)
    draw_precision(rows, facts).savefig(DOCS / "benchmarks-precision.png", dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main())
