"""Packages that the library itself does not need."""

import os
from importlib.util import find_spec

import pytest


def require(*packages: str) -> None:
    """Skip what needs a package that is not installed; with FUSEDOPT_NO_SKIPS set, as `make examples` does, fail."""
    missing = [package for package in packages if not find_spec(package)]
    if missing:
        react = pytest.fail if os.environ.get("FUSEDOPT_NO_SKIPS") else pytest.skip
        react(f"needs {', '.join(missing)}: pip install '.[examples]'")
