"""CPU offload: a step of AdamW, its transfers and its work on the host, one after the other and at the same time.

    python -m benchmarks.offload [--quick] [--json offload.json]   # not yet run on a GPU

bfloat16 parameters of 128M elements, split masters, float32 state. Measured are the times from before the step until
the device is done, the device being idle when it begins:

- transfers: all gradients to the host and all weights to the device, both at once, from and to pinned memory;
- host: the step of the same optimizer over tensors that are all on the host;
- one bucket: all gradients, then the whole step, then all weights;
- N MiB buckets: each a bucket at a time, as one uses it.

No step with offload can be faster than the longer of transfers and host: that is the floor. What buckets can save of
the time with one is the shorter of them. Without a GPU copies within the host's memory take the place of transfers,
made when they are begun: then there is nothing to gain, and the run shows only that the benchmark works.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt

from . import harness
from .harness import MI, Contender, Quick, Row, Spread, interleave, print_header, print_rows, ratio_row, seconds

sys.path.append(str(harness.ROOT / "tests"))
from reference import assert_same_bits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS: dict[str, Any] = {"lr": 1e-3, "master_weights": "split"}
SHAPES, QUICK_SHAPES = [(1024, 4096)] * 32, [(1024, 1024)] * 16  # of 8 and 2 MiB
SMALL = [(41, 1003), (7,), (300, 129), (1,), (64, 64)] * 3
BUCKETS = [8, 32, 128]  # MiB
TRANSFERS, HOST, FLOOR, ONE = "transfers", "host", "floor", "one bucket"
Shapes = Sequence[tuple[int, ...]]


def make_parameters(shapes: Shapes, device: str, seed: int = 0) -> list[Parameter]:
    """bfloat16, each with a gradient; the same values on every device."""
    g = torch.Generator().manual_seed(seed)

    def values(shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape).normal_(generator=g).bfloat16().to(device)

    params = [Parameter(values(shape)) for shape in shapes]
    for param in params:
        param.grad = values(tuple(param.shape))
    return params


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def check() -> None:
    """Raise AssertionError unless some steps have the bits of the same optimizer on the host, whatever the buckets."""
    theirs = make_parameters(SMALL, "cpu")
    ordinary = fusedopt.AdamW(theirs, **OPTIONS)
    for _ in range(3):
        ordinary.step()
    for bucket_bytes in (1, 20_000, 2**30):
        ours = make_parameters(SMALL, DEVICE)
        offloaded = fusedopt.CPUOffload(ours, fusedopt.AdamW, bucket_bytes=bucket_bytes, **OPTIONS)
        for _ in range(3):
            offloaded.step()
        for p, q in zip(ours, theirs, strict=True):
            assert_same_bits(p.detach().cpu(), q.detach(), f"buckets of {bucket_bytes} bytes")
            for name, value in ordinary.state[q].items():
                assert_same_bits(offloaded.state[p][name], value, f"buckets of {bucket_bytes} bytes: {name}")


def transfer(optimizer: fusedopt.CPUOffload) -> None:
    """All that a step transfers, nothing waiting for anything."""
    with torch.no_grad():
        for bucket in optimizer._buckets:
            for entry in bucket.entries:
                assert entry.param.grad is not None
                bucket.transfers.fetch(entry.grad, entry.param.grad)
            bucket.send(bucket.entries)
    synchronize()


def offload(quick: Quick) -> Iterator[Row]:
    """The rows; their times are medians."""
    check()
    shapes = QUICK_SHAPES if quick else SHAPES
    params = make_parameters(shapes, DEVICE)

    def make(bucket_bytes: int) -> tuple[fusedopt.CPUOffload, Callable[[], None]]:
        """The weights are the same for all, so each gives the others work that it does not measure: see prepare."""
        optimizer = fusedopt.CPUOffload(params, fusedopt.AdamW, bucket_bytes=bucket_bytes, **OPTIONS)

        def step() -> None:
            optimizer.step()
            synchronize()

        step()
        return optimizer, step

    def prepare(optimizer: fusedopt.CPUOffload) -> Callable[[], None]:
        def read() -> None:
            optimizer.read_params()  # what others have changed
            synchronize()

        return read

    made = {ONE: make(2**60), **{f"{size} MiB buckets": make(size * MI) for size in BUCKETS}}
    contenders = {name: Contender(step, prepare(optimizer)) for name, (optimizer, step) in made.items()}
    whole = made[ONE][0]
    contenders[TRANSFERS] = Contender(lambda: transfer(whole), prepare(whole))
    on_host = fusedopt.AdamW(make_parameters(shapes, "cpu"), **OPTIONS)
    contenders[HOST] = Contender(on_host.step)
    samples = interleave(contenders, 5 if quick else 15)

    numel = sum(param.numel() for param in params)
    rates = [2 * numel / value / 1e9 for value in samples[TRANSFERS].values()]
    yield Row("transfers, each way", Spread.of(rates), "GB/s", times={TRANSFERS: seconds(samples, TRANSFERS)})
    samples[FLOOR] = {round_: max(value, samples[HOST][round_]) for round_, value in samples[TRANSFERS].items()}
    yield ratio_row("transfers, of the host's step", samples, TRANSFERS, HOST)
    for name in made:
        yield ratio_row(f"{name}: of the floor", samples, name, FLOOR)
    for name in list(made)[1:]:
        yield ratio_row(f"{name}: of one bucket's time", samples, name, ONE)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offload", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="an eighth of the elements, and fewer repeats")
    parser.add_argument("--json", type=Path, help="where to write the results")
    args = parser.parse_args()
    facts = {**harness.machine(), "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "none"}
    print(f"{facts['processor']}, {facts['threads']} threads; GPU: {facts['device']}")
    if DEVICE != "cuda":
        print("no GPU: copies within the host's memory take the place of transfers; nothing below says how fast it is")
    print_header()
    company = harness.Company()
    rows = list(offload(args.quick))
    print_rows("offload", rows)
    print(f"other processes took {company.share():.0%} of the machine")
    if args.json:
        harness.write_json(args.json, facts, {"offload": rows})


if __name__ == "__main__":
    main()
