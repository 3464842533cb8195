"""Adagrad on an embedding with sparse gradients."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter

from . import harness
from .harness import (
    LOOP,
    MI,
    OURS,
    Contender,
    Quick,
    Row,
    at_least,
    at_most,
    interleave,
    make_optimizer,
    make_optimizers,
    ratio_row,
)

sys.path.append(str(harness.ROOT / "tests"))
from reference import assert_same_bits, torch_loop_step

LOOKUPS, WIDTH = 4096, 64  # rows of an embedding that one step looks up, and the elements of a row
Draw = Callable[[int, torch.Generator], Tensor]


def distinct(rows: int, g: torch.Generator) -> Tensor:
    """A row from each of equal parts of the table, a quarter of them twice; in no order."""
    part = rows // LOOKUPS
    once = torch.arange(LOOKUPS) * part + torch.randint(part, (LOOKUPS,), generator=g)
    twice = once[torch.randperm(LOOKUPS, generator=g)[: LOOKUPS // 4]]
    found = torch.cat([once, twice])
    return found[torch.randperm(found.numel(), generator=g)]


def uniform(rows: int, g: torch.Generator) -> Tensor:
    return torch.randint(rows, (LOOKUPS,), generator=g)


def zipf(rows: int, g: torch.Generator) -> Tensor:
    """As words come up in a text: many rows three times and more."""
    frequency = torch.arange(1, rows + 1, dtype=torch.float64) ** -1.1
    return torch.multinomial(frequency, LOOKUPS, replacement=True, generator=g)


class Table:
    """An embedding, and sparse gradients for so many steps that their rows do not stay in the caches."""

    def __init__(self, rows: int, draw: Draw, batches: int = 50) -> None:
        g = torch.Generator().manual_seed(0)
        self.param = Parameter(torch.ones(rows, WIDTH))
        indices = [draw(rows, g)[None] for _ in range(batches)]
        self._indices = itertools.cycle(indices)
        self._values = torch.randn(indices[0].numel(), WIDTH, generator=g)
        self.renew()

    def renew(self) -> None:
        self.param.grad = torch.sparse_coo_tensor(next(self._indices), self._values, self.param.shape)

    def copy_rows(self, streams: Sequence[Tensor]) -> None:
        """Read the rows of the gradient and write them back."""
        assert self.param.grad is not None
        indices = self.param.grad._indices()[0]
        for stream in streams:
            stream.index_copy_(0, indices, stream.index_select(0, indices))


def check_sparse(draw: Draw) -> None:
    """Raise AssertionError unless steps on a small table give torch's bits."""
    ours = Table(5 * LOOKUPS, draw)
    twin = Parameter(ours.param.detach().clone())
    optimizer, theirs = make_optimizer(OURS, [ours.param], "Adagrad"), make_optimizer(LOOP, [twin], "Adagrad")
    for _ in range(3):
        ours.renew()
        assert ours.param.grad is not None
        twin.grad = ours.param.grad.clone()
        optimizer.step()
        torch_loop_step(theirs)
    assert_same_bits(ours.param, twin, "the parameter")
    for name, value in theirs.state[twin].items():
        assert_same_bits(optimizer.state[ours.param][name], value, name)


def sparse(quick: Quick) -> Iterator[Row]:
    """Adagrad on an embedding, 4,096 of whose rows of 64 are looked up: sparse gradients, not coalesced."""
    torch.sparse.check_sparse_tensor_invariants.disable()  # explicitly: else torch's step warns
    rounds = 13
    for draw, target in ((distinct, at_least(4)), (uniform, None), (zipf, None)):
        check_sparse(draw)
        table = Table(MI, draw)
        contenders = {
            name: Contender(optimizer.step, table.renew, calls=10 if name == OURS else 3)
            for name, optimizer in make_optimizers([table.param], [LOOP], "Adagrad").items()
        }
        samples = interleave(contenders, rounds)
        yield ratio_row(f"1M rows, {draw.__name__}: faster than torch loop", samples, LOOP, OURS, target)

    # Rows that lie further apart take the processor longer to reach, whoever asks: a plain copy of them is beside it.
    large_rows = 4 if harness.available_memory() > 6 * 2**30 else 2
    contenders = {}
    for rows in (1, large_rows):
        table = Table(rows * MI, distinct)
        (optimizer,) = make_optimizers([table.param], [], "Adagrad").values()
        contenders[f"{rows}M rows"] = Contender(optimizer.step, table.renew, calls=10)
        streams = [table.param.detach(), optimizer.state[table.param]["sum"]]
        contenders[f"{rows}M rows copied"] = Contender(partial(table.copy_rows, streams), table.renew, calls=10)
    samples = interleave(contenders, rounds)
    few, few_copied, many, many_copied = contenders
    yield ratio_row(f"{many}: of {few}", samples, many, few)
    yield ratio_row(f"{many_copied}: of {few_copied}", samples, many_copied, few_copied)
    slower = {key: value - samples[few_copied][key] for key, value in samples[many_copied].items()}
    samples["as many, as far apart"] = {key: value + slower[key] for key, value in samples[few].items()}
    yield ratio_row(f"{many}: of {few}, as far apart", samples, many, "as many, as far apart", at_most(1.15))


BENCHMARKS = {"sparse": sparse}
