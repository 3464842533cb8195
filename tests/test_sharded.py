"""DTensors: N-way sharded training gives the bits of the unsharded one (tests/sharded.py is what the ranks do)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest
import sharded
import torch
from optimizers import OWN_VARIANTS, ROWS
from ranks import Ranks
from torch.distributed.tensor import Replicate, Shard

pytestmark = pytest.mark.xdist_group("ranks")

Pools = Callable[[int], Ranks]
BF16, F16 = torch.bfloat16, torch.float16
FORMS = {
    "stochastic": (BF16, {"rounding": "stochastic", "seed": 7}),
    "split-bf16": (BF16, {"master_weights": "split", "state_dtype": BF16}),
    "kahan-int8": (BF16, {"rounding": "kahan", "state_dtype": "int8"}),
    "masters-int8-ema": (F16, {"master_weights": True, "state_dtype": "int8", "ema_decay": 0.9}),
    "float32-int8": (torch.float32, {"state_dtype": "int8"}),
}
# On a mesh of two dimensions, 2 x 2: tensors in turn.
PLACED = {
    "rows": [(Shard(0), Shard(0))],
    "hybrid": [(Replicate(), Shard(0))],
    "columns": [(Shard(0), Shard(1)), (Shard(1), Replicate()), (Replicate(), Shard(1))],
}


@pytest.mark.parametrize("size", [2, 4])
def test_every_row_has_the_bits_of_the_unsharded_step(ranks: Pools, size: int) -> None:
    ranks(size).run(sharded.same_bits, [row.id for row in ROWS], (size,), [sharded.SHARD], torch.float32, {})


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("form", FORMS)
def test_forms_have_the_bits_of_the_unsharded_step(ranks: Pools, size: int, form: str) -> None:
    """Draws are those of an element's place in the whole tensor, and blocks of codes begin anew in every row."""
    dtype, options = FORMS[form]
    names = ["adamw-decay", "adam-amsgrad", OWN_VARIANTS[0].id, "adagrad-decay-lr_decay"]
    ranks(size).run(sharded.same_bits, names, (size,), [sharded.SHARD], dtype, options)


@pytest.mark.parametrize("placed", PLACED)
@pytest.mark.parametrize("form", ["stochastic", "split-bf16", "float32-int8"])
def test_on_a_mesh_of_two_dimensions(ranks: Pools, placed: str, form: str) -> None:
    dtype, options = FORMS[form]
    shapes = ((8, 512), (6, 1024, 3), (12, 256)) if placed == "columns" else sharded.SHAPES
    ranks(4).run(sharded.same_bits, ["adamw-decay"], (2, 2), PLACED[placed], dtype, options, shapes)


def test_lists_mix_tensors_and_dtensors_of_several_meshes(ranks: Pools) -> None:
    ranks(4).run(sharded.mixed_lists)


@pytest.mark.parametrize("size", [2, 4])
def test_fsdp2_trains_as_the_whole_model(ranks: Pools, size: int) -> None:
    names = [row.id for row in (ROWS if size == 2 else ROWS[::9])]
    ranks(size).run(sharded.fsdp_trains, names, torch.float32, {})


@pytest.mark.parametrize("form", FORMS)
def test_fsdp2_trains_as_the_whole_model_in_every_form(ranks: Pools, form: str) -> None:
    dtype, options = FORMS[form]
    if dtype == F16:
        dtype = BF16  # of which the model has no kernels on the CPU
    ranks(4).run(sharded.fsdp_trains, ["adamw-decay"], dtype, options)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("norm_type", [2.0, torch.inf])
def test_clipping_within_the_step(ranks: Pools, size: int, norm_type: float) -> None:
    options = {"max_grad_norm": 0.5, "norm_type": norm_type}
    ranks(size).run(sharded.fsdp_trains, ["adamw-decay", "radam"], torch.float32, options)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("norm_type", [2.0, torch.inf])
def test_clip_grad_norm(ranks: Pools, size: int, norm_type: float) -> None:
    ranks(size).run(sharded.clips_in_place, norm_type)


@pytest.mark.parametrize(
    "check",
    [
        sharded.skips_together,
        sharded.norm_without_gradients_here,
        sharded.verdicts_without_gradients_here,
        sharded.dtypes_of_gradients,
        sharded.partial_gradients,
        sharded.loaded_elsewhere,
        sharded.cut_codes,
    ],
    ids=lambda check: check.__name__,
)
def test_across_ranks(ranks: Pools, check: Callable[[], None]) -> None:
    ranks(4).run(check)


@pytest.mark.parametrize(
    "check",
    [sharded.new_parts, sharded.another_place, sharded.wrong_state, sharded.no_dtensor_any_more],
    ids=lambda check: check.__name__,
)
def test_parts(ranks: Pools, check: Callable[[], None]) -> None:
    ranks(2).run(check)


@pytest.mark.parametrize("size", [2, 4])
def test_with_the_cuda_source(ranks: Pools, cuda_library: ctypes.CDLL, size: int) -> None:
    ranks(size).run(sharded.with_the_cuda_source, cuda_library._name)


# --- torch.distributed.checkpoint ------------------------------------------------------------------------------------

PLAIN: tuple[torch.dtype, dict[str, object]] = (torch.float32, {})
EVERYTHING = {"plain": PLAIN, **{name: form for name, form in FORMS.items() if form[0] != F16}}


def assert_same(got: list[dict[str, torch.Tensor]], expected: dict[str, torch.Tensor]) -> None:
    """On every rank."""
    for of_rank in got:
        assert set(of_rank) == set(expected)
        for name, value in expected.items():
            sharded.assert_equal(of_rank[name], value, name)


def check_goes_on(
    ranks: Pools, path: Path, sizes: tuple[int, int], libraries: tuple[str, str], name: str, form: str, how: str
) -> None:
    """What is saved on so many ranks is loaded on others, and the next step gives what it would have given."""
    dtype, options = EVERYTHING[form]
    wrote = ranks(sizes[0]).run(sharded.saved, str(path), libraries[0], name, dtype, options, how)
    before, after = wrote[0]
    for fresh in (True, False) if how == "sharded" else (True,):
        read = ranks(sizes[1]).run(sharded.loaded, str(path), libraries[1], name, dtype, options, how, fresh)
        assert_same([of_rank[0] for of_rank in read], before)
        if libraries == ("fusedopt", "fusedopt"):
            assert_same([of_rank[1] for of_rank in read], after)
        else:  # torch's own bits differ by those of its square root
            for key, value in after.items():
                torch.testing.assert_close(read[0][1][key], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("sizes", [(2, 1), (2, 3), (2, 4), (4, 2)], ids=str)
@pytest.mark.parametrize("form", EVERYTHING)
def test_a_checkpoint_loads_on_other_numbers_of_ranks(
    ranks: Pools, tmp_path: Path, sizes: tuple[int, int], form: str
) -> None:
    check_goes_on(ranks, tmp_path, sizes, ("fusedopt", "fusedopt"), "adamw-decay", form, "sharded")


@pytest.mark.parametrize("name", ["adam-amsgrad", "radam", "adagrad-decay-lr_decay"])
def test_every_class_has_checkpoints(ranks: Pools, tmp_path: Path, name: str) -> None:
    check_goes_on(ranks, tmp_path, (2, 4), ("fusedopt", "fusedopt"), name, "plain", "sharded")


@pytest.mark.parametrize("how", ["flat", "full", "async"])
@pytest.mark.parametrize("form", ["plain", "split-bf16", "kahan-int8"])
def test_other_kinds_of_checkpoints(ranks: Pools, tmp_path: Path, how: str, form: str) -> None:
    check_goes_on(ranks, tmp_path, (4, 2), ("fusedopt", "fusedopt"), "adamw-decay", form, how)


@pytest.mark.parametrize("libraries", [("torch", "fusedopt"), ("fusedopt", "torch")], ids="-".join)
@pytest.mark.parametrize("name", ["adamw-decay", "radam", "adagrad"])
@pytest.mark.parametrize("how", ["sharded", "full"])
def test_checkpoints_to_and_from_torch(
    ranks: Pools, tmp_path: Path, libraries: tuple[str, str], name: str, how: str
) -> None:
    check_goes_on(ranks, tmp_path, (2, 4), libraries, name, "plain", how)


@pytest.mark.parametrize("form", EVERYTHING)
def test_the_hidden_step_changes_no_parameter(ranks: Pools, form: str) -> None:
    dtype, options = EVERYTHING[form]
    for name in ("adamw-decay", "adam-decay", "adamw-decay-no_eps", "radam-no_eps", "adagrad-no_eps"):
        ranks(2).run(sharded.hidden_step, name, dtype, options)
    more = {"max_grad_norm": 1.0, "skip_nonfinite": True, "ema_decay": 0.9, "stats": True}
    ranks(2).run(sharded.hidden_step, "adamw-decay", dtype, options | more)
