"""Run all studies and write them on one page: what `make studies` does.

python examples/studies/page.py               # studies/index.html and its pictures
python examples/studies/page.py --out docs/studies
python examples/studies/page.py --quick       # a minute: to see that all of them run
"""

from __future__ import annotations

import argparse
import html
import importlib
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import study
import torch

import fusedopt

STUDIES = (
    "long_training",
    "rectification",
    "adagrad_paths",
    "adagrad_sparse",
    "learning_rates",
    "counterexample",
)

STYLE = """
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; }
h1, h2 { line-height: 1.2; }
h2 { margin-top: 3.5rem; border-top: 1px solid #d0d7de; padding-top: 1.5rem; }
img { width: 100%; height: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #e4e8ec; }
th:first-child, td:first-child { text-align: left; }
.scroll { overflow-x: auto; }
.findings { background: #f2f6fa; padding: .8rem 1rem; border-left: 4px solid #1c3f6e; }
code { background: #f2f4f6; padding: .1rem .3rem; }
footer { margin-top: 4rem; color: #57606a; font-size: .9rem; }
"""


def run(name: str, quick: bool, folder: Path) -> tuple[str, float]:
    """One study in a process of its own: its part of the page, and the seconds that it took."""
    study.begin()
    start = time.perf_counter()
    found = importlib.import_module(name).run(quick)
    study.save(found, folder / f"{name}.png")
    return part(name, found), time.perf_counter() - start


def part(name: str, found: study.Study) -> str:
    """A study as HTML."""
    tables = "\n".join(map(table, found.tables))
    return f"""
<section id="{name}">
<h2>{html.escape(found.title)}</h2>
<p>{html.escape(found.question)}</p>
<a href="{name}.png"><img src="{name}.png" alt="{html.escape(found.title)}"></a>
<p class="findings">{html.escape(found.findings)}</p>
{tables}
<p>Run it: <code>python examples/studies/{name}.py</code></p>
</section>"""


def table(found: study.Table) -> str:
    """A table as HTML."""

    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(row(cells, "td") for cells in found.rows)
    head = row(found.columns, "th")
    caption = f"<caption>{html.escape(found.title)}</caption>"
    return f'<div class="scroll"><table>{caption}\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody></table></div>'


def page(parts: Sequence[str], quick: bool) -> str:
    """The whole page."""
    short = "<p><strong>These runs were shortened (--quick): nothing can be concluded from them.</strong></p>"
    return f"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>fusedopt: studies</title>
<style>{STYLE}</style>
<h1>What optimizers do: studies with fusedopt</h1>
<p>Each of these is one short script under <code>examples/studies</code>, with fixed seeds; <code>make studies</code>
runs them all and writes this page. The sentences are made with the numbers of the run.</p>
{short if quick else ""}
{"".join(parts)}
<footer>fusedopt {fusedopt.__version__}, torch {torch.__version__}, NumPy {np.__version__},
Python {sys.version.split()[0]}. Another processor or torch rounds sums in another order, which long or
chaotic runs enlarge: figures may then differ, not what they show.</footer>
</html>
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Two at a time, each on one thread."""
    parser = argparse.ArgumentParser(description="Run all studies and write them on one page.")
    parser.add_argument("--out", type=Path, default=Path("studies"), help="the folder (default: studies)")
    parser.add_argument("--quick", action="store_true", help="a minute: too short to conclude anything from")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    parts = []
    workers = min(len(STUDIES), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        running = {name: pool.submit(run, name, args.quick, args.out) for name in STUDIES}
        for name, future in running.items():
            text, seconds = future.result()
            parts.append(text)
            print(f"{name}: {seconds:.0f} s", flush=True)
    index = args.out / "index.html"
    index.write_text(page(parts, args.quick), encoding="utf-8")
    print(f"{index} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
