"""`make bench`: fusedopt on the CPU against its rivals and its targets.

Every benchmark first checks, on a small case of the same pattern, that the steps it is about to time are right: bit
for bit those of the tests' reference. If they are not, its rows are refused. All contenders of a benchmark share one
set of parameters, gradients and moments, and take turns (harness.interleave).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from . import harness, install, phase, precision, scaling, sharded, sparse, step, training
from .harness import Quick, Row, Skipped

MODULES = (step, scaling, sparse, phase, precision, sharded, training, install)
LONG = ("build",)  # minutes: with --only
QUICK = ("step64m", "small10", "host", "radam", "elements", "tensors", "phase", "gpt")
BENCHMARKS: dict[str, Callable[[Quick], Iterator[Row]]] = {}
for module in MODULES:
    BENCHMARKS |= module.BENCHMARKS


def run(name: str, quick: Quick) -> list[Row]:
    """Run one benchmark, printing its rows as they come."""
    rows: list[Row] = []
    try:
        for row in BENCHMARKS[name](quick):
            rows.append(row)
            harness.print_rows(name, [row])
    except (Skipped, AssertionError) as reason:
        kind = "skipped" if isinstance(reason, Skipped) else "REFUSED, wrong result"
        rows.append(Row("", note=f"{kind}: {reason}"))
        harness.print_rows(name, rows[-1:])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a minute and a half: fewer benchmarks and repeats")
    parser.add_argument("--only", action="append", choices=BENCHMARKS, help="this benchmark (may be repeated)")
    parser.add_argument("--json", type=Path, help="where to write the results (default: results/, a full run only)")
    args = parser.parse_args()

    facts = harness.machine()
    print(f"{facts['processor']}, {facts['cores']} cores, {facts['threads']} threads; ", end="")
    print(f"torch {facts['torch']}, fusedopt {facts['fusedopt']} ({facts['compiler']})\n")
    harness.print_header()
    company, begin = harness.Company(), time.monotonic()
    results: dict[str, list[Row]] = {}
    took: dict[str, float] = {}
    for name in args.only or (QUICK if args.quick else [name for name in BENCHMARKS if name not in LONG]):
        start = time.monotonic()
        # In a process of its own: the heap that earlier benchmarks scattered would slow later ones by a tenth.
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            results[name] = process.submit(run, name, args.quick).result()
        took[name] = round(time.monotonic() - start, 1)

    facts |= {
        "seconds": round(time.monotonic() - begin),
        "seconds_by_benchmark": took,
        "used_by_others": round(company.share(), 3),
    }
    verdicts = [row.verdict for rows in results.values() for row in rows]
    print(f"\n{verdicts.count('meets')} targets met, {verdicts.count('MISSES')} missed; {facts['seconds']} s, ", end="")
    print(f"{facts['used_by_others']:.0%} of the machine used by others meanwhile")
    print("seconds: " + ", ".join(f"{name} {value:g}" for name, value in took.items()))
    path = args.json or (None if args.quick or args.only else harness.default_path())
    if path:
        harness.write_json(path, facts, results)
        print(f"written: {path}")


if __name__ == "__main__":
    main()
