"""The scripts under examples/studies, as modules."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from packages import require

FOLDER = Path(__file__).parent.parent / "examples" / "studies"


@contextmanager
def studied(name: str, *packages: str) -> Iterator[ModuleType]:
    """A script, with one thread and a seed as it runs by itself; the test is skipped if a package is missing."""
    require("matplotlib", *packages)
    threads = torch.get_num_threads()
    sys.path.insert(0, str(FOLDER))
    try:
        with torch.random.fork_rng():
            importlib.import_module("study").begin()
            yield importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))
        torch.set_num_threads(threads)
