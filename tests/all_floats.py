"""Every float32 that is no NaN survives master_weights="split": read from its two halves, updated by nothing, stored.

Not a test of `make test`, which takes a sample: all 2**32 patterns take some minutes. Usage: python tests/all_floats.py
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from test_precision_masters import assert_both_masters_hold

STEP = 2**24


def main() -> None:
    held = 0
    for first in range(0, 2**32, STEP):
        x = np.arange(first, first + STEP, dtype=np.uint64).astype(np.uint32).view(np.float32)
        x = x[~np.isnan(x)]
        if not len(x):
            continue
        assert_both_masters_hold(x)
        held += len(x)
        print(f"\r{held:,} held", end="", flush=True)
    assert held == 2**32 - 2 * (2**23 - 1)  # all but the NaNs
    print()


if __name__ == "__main__":
    main()
