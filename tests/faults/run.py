"""Proves that the tests can fail: every fault beside this file must turn its test red.

A fault is a patch whose first line names its test as pytest does: `Test: tests/test_x.py::test_y`, with options like
`-k words` after it if need be. In a scratch copy each test must pass first, then fail with its patch applied and built.
Usage: python tests/faults/run.py [name ...]
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent.resolve()
sys.path.insert(0, str(HERE.parent))

from scratch import Scratch, scratch_copy  # noqa: E402  found by the line above


def pytest(copy: Scratch, nodes: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *shlex.split(nodes)]
    return copy.run(command, capture=True)


def main() -> int:
    wanted = sys.argv[1:]
    patches = [patch for patch in sorted(HERE.glob("*.patch")) if not wanted or patch.stem in wanted]
    nodes = {patch: patch.read_text().splitlines()[0].removeprefix("Test: ") for patch in patches}
    missed = 0
    with scratch_copy() as copy:
        copy.build(FUSEDOPT_CUDA="off")
        for node in sorted(set(nodes.values())):
            healthy = pytest(copy, node)
            if healthy.returncode:
                sys.exit(f"{node} fails without any fault:\n{healthy.stdout[-3000:]}")
        for patch, node in nodes.items():
            applied = copy.run(["git", "apply", str(patch)], capture=True)
            if applied.returncode:
                sys.exit(f"{patch.name} does not apply: {applied.stderr}")
            copy.build(FUSEDOPT_CUDA="off")
            red = pytest(copy, node)
            # 1: tests ran and some failed. Any other status, pytest's own failure for one, proves nothing.
            caught = red.returncode == 1
            missed += not caught
            print(f"{'caught' if caught else 'MISSED'}  {patch.stem:<28} {node}", flush=True)
            if not caught:
                print(red.stdout[-2000:], red.stderr[-2000:])
            copy.run(["git", "apply", "-R", str(patch)])
    print(f"{len(patches) - missed} passed, {missed} failed")
    return 1 if missed or not patches else 0


if __name__ == "__main__":
    sys.exit(main())
