"""A scratch copy of the project, to build and test something other than what is checked out."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent.resolve()


class Scratch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def run(self, command: list[str], *, capture: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the copy, which Python imports fusedopt from."""
        everything = {**os.environ, "PYTHONPATH": str(self.path), "PYTHONDONTWRITEBYTECODE": "1", **environment}
        return subprocess.run(command, cwd=self.path, env=everything, text=True, capture_output=capture, check=False)

    def build(self, **environment: str) -> None:
        done = self.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], capture=True, **environment)
        if done.returncode:
            sys.exit(f"the build failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")


@contextmanager
def scratch_copy() -> Iterator[Scratch]:
    """Yield a copy of the tracked files as they are in the working tree."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "fusedopt"
        tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in filter(None, tracked.split("\0")):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
        yield Scratch(copy)
