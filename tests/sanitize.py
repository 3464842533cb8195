"""Runs the test suite with the native core built under AddressSanitizer and UndefinedBehaviorSanitizer.

Python itself is not instrumented, so the sanitizer's runtime is loaded before it.
Usage: python tests/sanitize.py [pytest arguments]
"""

from __future__ import annotations

import os
import subprocess
import sys

from scratch import scratch_copy

SANITIZERS = "address,undefined"
COMPILER = os.environ.get("CXX", "g++")


def library(name: str) -> str:
    """Return the path of one of the compiler's shared libraries."""
    found = subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def main() -> int:
    with scratch_copy() as copy:
        copy.build(FUSEDOPT_SANITIZE=SANITIZERS, FUSEDOPT_CUDA="off")
        command = [sys.executable, "-m", "pytest", "-q", *(sys.argv[1:] or ["-n", "2"])]
        return copy.run(
            command,
            FUSEDOPT_SANITIZE=SANITIZERS,  # for the CUDA kernel's host build, which tests/conftest.py makes
            LD_PRELOAD=f"{library('libasan.so')} {library('libstdc++.so')}",
            # Python's own objects live until the process ends; freed memory is kept back, but not so much of it that
            # the test for leaks takes it for one.
            ASAN_OPTIONS="detect_leaks=0:abort_on_error=1:quarantine_size_mb=4:thread_local_quarantine_size_kb=64",
            UBSAN_OPTIONS="print_stacktrace=1:halt_on_error=1",
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
