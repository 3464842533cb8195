"""The parameter is as close to a float64 oracle as that of torch's for-loop, as torch comes.

For options that torch does not have the yardstick is its loop without them, and that one's oracle.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from optimizers import OWN_VARIANTS, VARIANTS, Row, generator, name_of, parameters, set_grads
from reference import mean_ulp, transcription
from torch import Tensor
from torch.nn import Parameter

NUMEL, STEPS = 20_000, 1000


def gradients(dtype: torch.dtype) -> Iterator[Tensor]:
    g = generator(8)
    return (torch.randn(NUMEL, generator=g).to(dtype) for _ in range(STEPS))


# torch's float16 loop rounds the usual eps to zero and ends in inf and nan.
EPS = {torch.float32: 1e-8, torch.bfloat16: 1e-8, torch.float16: 1e-4}


@pytest.mark.parametrize("dtype", EPS, ids=name_of)  # float64 has no better oracle here
@pytest.mark.parametrize("row", [*VARIANTS, *OWN_VARIANTS], ids=name_of)
def test_distance_to_float64(row: Row, dtype: torch.dtype, record_property: Callable[[str, str], None]) -> None:
    # Away from zero, where an ulp is next to nothing: the mean would be that of the few elements which end closest to
    # it, and of chance (measured in float32 over five seeds: plain randn has ratios of 0.986 to 1.045, this of 0.9994
    # to 1.0003). Yet close enough that a step moves a bfloat16.
    normal = torch.randn(NUMEL, generator=generator(7))
    initial = (normal / 4 + normal.sign() / 8).to(dtype)
    ours, theirs = parameters(initial), Parameter(initial.clone())
    optimizer = row.make(ours, eps=EPS[dtype])
    torch_loop = replace(row, own={}).make_torch([theirs], eps=EPS[dtype])
    for grad in gradients(dtype):
        set_grads(ours, grad)
        theirs.grad = grad
        optimizer.step()
        torch_loop.step()
    exact = transcription(torch_loop).oracle(initial, gradients(dtype))
    ours_exact = transcription(optimizer).oracle(initial, gradients(dtype)) if row.own else exact
    distance, yardstick = mean_ulp(torch.cat([p.detach() for p in ours]), ours_exact), mean_ulp(theirs, exact)
    numbers = f"fusedopt {distance:9.3f}  torch {yardstick:9.3f}  ratio {distance / yardstick:6.4f}"
    line = f"{row.id:46}{name_of(dtype):10}{numbers}"
    record_property(f"table: mean ulp from float64 after {STEPS} steps of {NUMEL} elements", line)
    print(line)
    assert distance <= 1.01 * yardstick  # the bound
