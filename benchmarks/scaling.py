"""How a step's time grows: with the elements, with the tensors they are in, and with the threads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from .checks import check
from .harness import (
    FOREACH,
    FUSED,
    LOOP,
    OURS,
    SMALL_QUARTERS,
    Contender,
    Quick,
    Row,
    Samples,
    Skipped,
    Spread,
    at_most,
    available_memory,
    interleave,
    make_optimizers,
    make_parameters,
    point_row,
    ratio_row,
)

ELEMENTS = [10**3, 10**4, 10**5, 10**6, 10**7, 10**8, 25 * 10**7]
STREAMED = 10**7  # from here on the memory is what is measured, not the caches
SPLIT, TENSORS = 10**7, [1, 10, 100, 1000, 10_000, 100_000]
BYTES = 16 + 12  # an element of parameters, gradients and two moments, and what foreach makes on the way


def compare(sizes: Sequence[int], rivals: Sequence[str], rounds: int) -> Samples:
    """Steps of Adam. A turn lasts a millisecond at least; torch's slower two take part in fewer rounds."""
    numel, count = sum(sizes), len(sizes)
    params = make_parameters(sizes)
    contenders = {}
    for name, optimizer in make_optimizers(params, rivals).items():
        # Guessed from about 2 ns an element and 1 us a tensor, in both not too little for anyone.
        calls = max(1, round(1e-3 / (numel * 1e-9 + count * 3e-6)))
        every = (2 if numel <= STREAMED else 3) if name in (FOREACH, LOOP) and calls == 1 else 1
        contenders[name] = Contender(optimizer.step, calls=calls, every=every)
    return interleave(contenders, rounds)


def elements(quick: Quick) -> Iterator[Row]:
    """Adam on one float32 tensor, from 1,000 elements to 250 million."""
    for sizes in ([1000], SMALL_QUARTERS):  # on one thread, and on two
        check(sizes)
    streamed: dict[int, dict[int, float]] = {}
    for numel in ELEMENTS[:-2] if quick else ELEMENTS:
        if numel * BYTES > 0.8 * available_memory():
            yield Row(f"{numel:,} elements", note=f"skipped: needs {numel * BYTES / 2**30:.0f} GiB of memory")
            continue
        rounds = 3 if numel > STREAMED else 7
        samples = compare([numel], [FUSED] if quick else [FUSED, FOREACH, LOOP], rounds)
        yield point_row(f"{numel:,} elements: faster than torch fused", samples, numel)
        if numel >= STREAMED:
            streamed[numel] = samples[OURS]
    if len(streamed) > 1:
        rounds = set.intersection(*(set(found) for found in streamed.values()))
        slopes = [slope({numel: found[round_] for numel, found in streamed.items()}) for round_ in rounds]
        yield Row("growth beyond the caches: time ~ elements **", Spread.of(slopes), "", at_most(1.05))


def slope(curve: Mapping[int, float]) -> float:
    """Of a curve on log axes, by least squares."""
    x, y = (torch.tensor(list(values), dtype=torch.float64).log() for values in (curve.keys(), curve.values()))
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / (x @ x))


def tensors(quick: Quick) -> Iterator[Row]:
    """Adam on 10 million float32 elements, in 1 to 100,000 tensors."""
    check([100] * 100)
    for count in TENSORS[:-1:2] if quick else TENSORS:
        rivals = [FUSED] if quick or count > 10_000 else [FUSED, FOREACH, LOOP]
        samples = compare([SPLIT // count] * count, rivals, rounds=3 if count > 1000 else 5)
        yield point_row(f"{count:,} tensors: faster than torch fused", samples, count)


def threads(quick: Quick) -> Iterator[Row]:
    """64M elements on 1, 2, 4, ... threads."""
    before = torch.get_num_threads()
    counts = [2**n for n in range(before.bit_length()) if 2**n <= before]
    if len(counts) < 2:
        raise Skipped("one thread only")
    check(SMALL_QUARTERS)
    optimizers = make_optimizers(make_parameters([2**22 if quick else 2**24] * 4), [FUSED])
    try:
        samples_of: dict[int, Samples] = {}
        for count in counts:
            torch.set_num_threads(count)
            timed = {name: Contender(optimizer.step) for name, optimizer in optimizers.items()}
            samples_of[count] = interleave(timed, rounds=5)
    finally:
        torch.set_num_threads(before)
    for count, samples in samples_of.items():
        yield point_row(f"{count} threads: faster than torch fused", samples, count)
    single, most = samples_of[1], samples_of[counts[-1]]
    together = {"one thread": single[OURS], f"{counts[-1]} threads": most[OURS]}
    yield ratio_row(f"{counts[-1]} threads: faster than one", together, *together)


BENCHMARKS = {"elements": elements, "tensors": tensors, "threads": threads}
