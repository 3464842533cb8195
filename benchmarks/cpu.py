"""`make bench`: fusedopt on the CPU against its rivals and its targets.

Every benchmark first checks, on a small case of the same pattern, that the steps it is about to time are right: bit
for bit those of the tests' reference. If they are not, its rows are refused. Contenders take turns, and where they can
they share one set of parameters, gradients and moments (harness.interleave).

Nearly all are measured in more than one process, minutes apart: what the machine's neighbours do for some seconds, or
where the heap happens to lie, moves all of a process's rounds alike, and would not be seen in their spread.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

from . import harness
from .harness import Quick, Row, Skipped

# Which module has which benchmarks. Those of one line share a process; the smallest tensors come last there, because
# what they leave of the heap would slow others by a tenth.
LINES = (
    ("step", ("step64m", "avx2", "zeros", "dtypes")),
    ("step", ("radam", "adagrad")),
    ("step", ("host", "small1000", "small10")),
    ("scaling", ("elements", "threads", "tensors")),
    ("sparse", ("sparse",)),
    ("phase", ("phase", "phase-amp", "clip-norm", "phase-many")),
    ("precision", ("precision",)),
    ("sharded", ("dtensors",)),
    ("training", ("gpt",)),
    ("training", ("memory",)),
    ("install", ("start",)),
    ("install", ("build",)),
)
NAMES = [name for _, names in LINES for name in names]
LONG = ("build",)  # minutes: with --only
QUICK = ("step64m", "small10", "host", "elements", "tensors", "phase", "gpt")
TIMES = 2  # that all is measured, but for
ONCE = ("start", "memory", "build")  # which start processes of their own
REFUSED = "REFUSED, wrong result"


def run(module: str, names: Sequence[str], quick: Quick) -> dict[str, tuple[float, list[Row]]]:
    """How long each benchmark took, and its rows; where a result is wrong, that is its only row."""
    benchmarks: dict[str, Callable[[Quick], Iterator[Row]]] = import_module(f"benchmarks.{module}").BENCHMARKS
    found: dict[str, tuple[float, list[Row]]] = {}
    for name in names:
        rows: list[Row] = []
        start = time.monotonic()
        try:
            rows += benchmarks[name](quick)
        except Skipped as reason:
            rows.append(Row("", note=f"skipped: {reason}"))
        except AssertionError as reason:
            rows = [Row("", note=f"{REFUSED}: {reason}")]
        found[name] = time.monotonic() - start, rows
    return found


def is_refused(rows: Sequence[Row]) -> bool:
    return any(row.note.startswith(REFUSED) for row in rows)


def merge(found: Sequence[Sequence[Row]]) -> list[Row]:
    """A benchmark's rows in some processes as one list; refused once, it is refused."""
    for rows in found:
        if is_refused(rows):
            return list(rows)
    named: dict[str, list[Row]] = {}
    for rows in found:
        for row in rows:
            named.setdefault(row.name, []).append(row)
    for name, rows in named.items():
        if len(rows) < len(found) and all(row.value is not None for row in rows):
            rows.append(Row(name, note=f"skipped: measured in {len(rows)} of {len(found)} processes only"))
    return [Row.over(rows) for rows in named.values()]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a minute and a half: fewer benchmarks, measured once")
    parser.add_argument("--only", action="append", choices=NAMES, help="this benchmark (may be repeated)")
    parser.add_argument("--json", type=Path, help="where to write the results (default: results/, a full run only)")
    args = parser.parse_args()

    facts = harness.machine()
    print(f"{facts['processor']}, {facts['cores']} cores, {facts['threads']} threads; ", end="")
    print(f"torch {facts['torch']}, fusedopt {facts['fusedopt']} ({facts['compiler']})\n")
    harness.print_header()
    company, begin = harness.Company(), time.monotonic()
    wanted = args.only or (QUICK if args.quick else [name for name in NAMES if name not in LONG])
    found: dict[str, list[list[Row]]] = {name: [] for name in wanted}
    took = dict.fromkeys(wanted, 0.0)
    results: dict[str, list[Row]] = {}
    last = 1 if args.quick or set(wanted) <= set(ONCE) else TIMES
    for time_ in range(1, last + 1):
        for module, line in LINES:
            names = [name for name in line if name in wanted and (time_ == last or name not in ONCE)]
            if not names:
                continue
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                for name, (seconds, rows) in process.submit(run, module, names, args.quick).result().items():
                    found[name].append(rows)
                    took[name] += seconds
            if time_ < last:
                print(f"{'':10} {', '.join(names)}: once, after {time.monotonic() - begin:.0f} s", flush=True)
                continue
            for name in names:
                results[name] = merge(found[name])
                harness.print_rows(name, results[name])

    facts |= {
        "times": last,
        "seconds": round(time.monotonic() - begin),
        "seconds_by_benchmark": {name: round(value, 1) for name, value in took.items()},
        "used_by_others": round(company.share(), 3),
    }
    verdicts = [row.verdict for rows in results.values() for row in rows]
    print(f"\n{verdicts.count('meets')} targets met, {verdicts.count('MISSES')} missed; {facts['seconds']} s, ", end="")
    print(f"{facts['used_by_others']:.0%} of the machine used by others meanwhile")
    print("seconds: " + ", ".join(f"{name} {value:g}" for name, value in facts["seconds_by_benchmark"].items()))
    refused = [name for name, rows in results.items() if is_refused(rows)]
    if refused:
        print(f"{', '.join(refused)}: REFUSED, and nothing is written")
        return 1
    path = args.json or (None if args.quick or args.only else harness.default_path())
    if path:
        harness.write_json(path, facts, results)
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
