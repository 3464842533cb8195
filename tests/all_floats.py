"""Every float32 that is no NaN survives master_weights="split": read from its two halves, updated by nothing, stored.

Not a test of `make test`, which takes a sample: all 2**32 patterns take some minutes. Usage: python tests/all_floats.py
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

from precision import reconstruct, split
from reference import assert_same_bits
from test_precision import stepped_in_place

STEP = 2**24


def main() -> None:
    held = 0
    for first in range(0, 2**32, STEP):
        x = np.arange(first, first + STEP, dtype=np.uint64).astype(np.uint32).view(np.float32)
        x = x[~np.isnan(x)]
        if not len(x):
            continue
        expected_p, expected_remainder = split(x)
        p, remainder = stepped_in_place(x, "split")
        assert_same_bits(p, expected_p)
        assert_same_bits(remainder, expected_remainder)
        assert_same_bits(torch.from_numpy(reconstruct(p, remainder)), torch.from_numpy(x))
        p, master = stepped_in_place(x, True)
        assert_same_bits(p, expected_p)
        assert_same_bits(master, torch.from_numpy(x))
        held += len(x)
        print(f"\r{held:,} held", end="", flush=True)
    assert held == 2**32 - 2 * (2**23 - 1)  # all but the NaNs
    print()


if __name__ == "__main__":
    main()
