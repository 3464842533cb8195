"""One row per optimizer variant, and the inputs and splits that every test over the rows shares."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from reference import varied_values
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import fusedopt
from fusedopt._config import _C


@dataclass(frozen=True, eq=False)
class Row:
    """One variant: our class, torch's class of the same name, and the options both get."""

    id: str
    ours: type[Optimizer]
    theirs: type[Optimizer]
    options: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Any] = field(default_factory=dict)  # options that torch's class does not have
    lr_dtype: torch.dtype | None = None  # None: lr is a float
    finite: bool = False  # equality with torch's loop holds for finite inputs only

    def kwargs(self) -> dict[str, Any]:
        """The constructor's arguments, with an lr Tensor of its own each time."""
        kwargs = {"lr": 1e-3, **self.options}
        if self.lr_dtype is not None:
            kwargs["lr"] = torch.tensor(kwargs["lr"], dtype=self.lr_dtype)
        return kwargs

    def make(self, params: Iterable[Any], **more: Any) -> Optimizer:
        return self.ours(params, **{**self.kwargs(), **self.own, **more})

    def make_torch(self, params: Iterable[Any], **more: Any) -> Optimizer:
        """Torch's for-loop, for `reference.torch_loop_step`."""
        assert not self.own, "torch does not have this variant"
        return self.theirs(params, **{"foreach": False, **self.kwargs(), **more})

    def known(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Those of some options that torch's class has too: not all classes have all."""
        return {name: value for name, value in options.items() if name in self.theirs([torch.ones(1)]).defaults}

    def on_device(self) -> dict[str, bool]:
        """The option that puts the step counts of CUDA parameters on their device."""
        return {"fused": True} if issubclass(self.ours, torch.optim.Adagrad) else {"capturable": True}


def _combine(*axes: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """One row for every way to take one entry of each axis: names joined, fields and options merged."""
    rows = []
    for entries in itertools.product(*(axis.items() for axis in axes)):
        merged: dict[str, Any] = {"own": {}}
        for _, entry in entries:
            merged.update(entry, own={**merged["own"], **entry.get("own", {})})
        fields = {name: merged.pop(name) for name in ("ours", "theirs", "own", "lr_dtype", "finite") if name in merged}
        rows.append(Row("-".join(name for name, _ in entries if name), options=merged, **fields))
    return rows


_ADAM = {"adam": {"ours": fusedopt.Adam, "theirs": torch.optim.Adam, "weight_decay": 0.0}}
_ADAMW = {"adamw": {"ours": fusedopt.AdamW, "theirs": torch.optim.AdamW, "weight_decay": 0.0}}
_DECAY = {"": {}, "decay": {"weight_decay": 0.1}}
_AMSGRAD = {"": {}, "amsgrad": {"amsgrad": True}}
_MAXIMIZE = {"": {}, "maximize": {"maximize": True}}
_TENSOR_LR = {"lr32": {"lr_dtype": torch.float32}, "lr64": {"lr_dtype": torch.float64}}
_LR = {"": {}} | _TENSOR_LR
_CORNERS = {
    "low_beta1": {"betas": (0.3, 0.9)},  # torch's other lerp
    "half_beta1": {"betas": (0.5, 0.99)},  # the border of the two
    "tiny_eps": {"eps": 1e-12},  # no flush
    "no_eps": {"eps": 0.0},
    "lr16": {"lr_dtype": torch.bfloat16},
}

_RADAM = {"radam": {"ours": fusedopt.RAdam, "theirs": torch.optim.RAdam, "betas": (0.9, 0.99)}}
_DECOUPLED = {"decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True}}
_OWN_AMSGRAD = {"": {}, "amsgrad": {"own": {"amsgrad": True}}}
_DEGENERATE = {"": {}, "still": {"own": {"degenerate_to_sgd": False}}}
_OPTIMIZED = {"": {}, "eps_after": {"own": {"optimized_update": False}}}
_RADAM_CORNERS = {
    "low_beta1": {"betas": (0.3, 0.9)},
    "never_rectified": {"betas": (0.9, 0.6)},
    "tiny_eps": {"eps": 1e-12},
    "no_eps": {"eps": 0.0},
    "lr16": {"lr_dtype": torch.bfloat16},
}

_ADAGRAD = {"adagrad": {"ours": fusedopt.Adagrad, "theirs": torch.optim.Adagrad}}
_LR_DECAY = {"": {}, "lr_decay": {"lr_decay": 0.01}}
_INSIDE = {"": {}, "eps_inside": {"own": {"eps_inside_sqrt": True}}}
_ADAGRAD_CORNERS = {
    "initial": {"initial_accumulator_value": 0.1},
    "large_eps": {"eps": 0.1},
    "no_eps": {"eps": 0.0},
    "lr16": {"lr_dtype": torch.bfloat16},
}

ROWS = [
    *_combine(_ADAM | _ADAMW, _DECAY, _AMSGRAD, _MAXIMIZE, _LR),
    *_combine(_ADAM | _ADAMW, {"decay": _DECAY["decay"]}, _AMSGRAD, _CORNERS),
    *_combine(_ADAM, _DECOUPLED),
    *_combine(_RADAM, _DECAY | _DECOUPLED, _OWN_AMSGRAD, _MAXIMIZE, _DEGENERATE, _OPTIMIZED),
    *_combine(_RADAM, _DECAY | _DECOUPLED, _TENSOR_LR),
    *_combine(_RADAM, _RADAM_CORNERS),
    *_combine(_ADAGRAD, _DECAY, _MAXIMIZE, _LR_DECAY, _INSIDE),
    *_combine(_ADAGRAD, {"decay": _DECAY["decay"]}, {"lr_decay": _LR_DECAY["lr_decay"]}, _TENSOR_LR),
    *_combine(_ADAGRAD, _ADAGRAD_CORNERS, _INSIDE),
]
BY_ID = {row.id: row for row in ROWS}
assert len(BY_ID) == len(ROWS)
KNOWN_ROWS = [row for row in ROWS if not row.own]  # those that torch has too

# A few that between them touch every option, for slow tests and for tests that are not about the formula.
VARIANTS = [
    BY_ID[name]
    for name in (
        "adam",
        "adam-decay",
        "adamw-decay",
        "adam-amsgrad",
        "adam-maximize",
        "adamw-decay-amsgrad-lr32",
        "radam",
        "radam-decoupled-lr32",
        "adagrad",
        "adagrad-decay-lr_decay",
    )
]
# The same for tests that do not need torch's.
OWN_VARIANTS = [
    BY_ID["radam-decoupled-amsgrad-maximize-still-eps_after"],
    BY_ID["adagrad-maximize-lr_decay-eps_inside"],
]

# The CUDA kernel's source, compiled for the host and given host tensors as a device's, is one more target.
CUDA_ON_HOST = "cuda_on_host"
TARGETS = [*_C.build_info()["cpu_usable"], CUDA_ON_HOST]
ON_DEVICE = "counts_on_device"  # cuda_on_host, with the step counts and all other numbers on the pretended device
PLACES = [*TARGETS, ON_DEVICE]

FLOATS = [torch.float32, torch.float64]
DTYPES = [*FLOATS, torch.bfloat16, torch.float16]

# Sizes around every lane's width (4 to 16), and larger ones that end in the middle of a lane.
AWKWARD = (1, 3, 7, 8, 9, 15, 16, 17, 0, 31, 33, 129, 1000, 2047)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def name_of(value: Any) -> str:
    """The id of a row, dtype, ... in pytest.mark.parametrize(..., ids=name_of)."""
    return value.id if isinstance(value, Row) else str(value).removeprefix("torch.")


def gradients(numel: int, dtype: torch.dtype, steps: int, seed: int = 1, *, finite: bool = False) -> Iterator[Tensor]:
    """Wild gradients, one Tensor a step: each element keeps its magnitude, one in fifty a step is drawn anew.

    Drawing all of them anew would lead every element to inf or nan in a few steps and test nothing after that.
    """
    g = generator(seed)
    usual = varied_values(numel, dtype, g, finite=finite)
    for _ in range(steps):
        other = varied_values(numel, dtype, g, finite=True)
        noise = 2 * torch.rand(numel, generator=g, dtype=torch.float64) - 1
        replaced = torch.rand(numel, generator=g) < 0.02
        yield torch.where(replaced, other, (usual * noise).to(dtype))


def split(whole: Tensor, sizes: Sequence[int] = AWKWARD) -> list[Tensor]:
    """Views of the elements of `whole`: of the given sizes in turn, then one with the rest."""
    kept = list(itertools.takewhile(lambda end: end <= whole.numel(), itertools.accumulate(sizes)))
    return list(torch.tensor_split(whole, kept))


def parameters(whole: Tensor, sizes: Sequence[int] = AWKWARD) -> list[Parameter]:
    """Separate parameters with the values of `split`."""
    return [Parameter(piece.clone()) for piece in split(whole, sizes)]


def set_grads(params: Sequence[Parameter], whole: Tensor, sizes: Sequence[int] = AWKWARD) -> None:
    for param, grad in zip(params, split(whole, sizes), strict=True):
        param.grad = grad


def joined(params: Sequence[Parameter], optimizer: Optimizer) -> dict[str, Tensor]:
    """The parameters and each state tensor as one flat Tensor each; `step` as the list of all of them."""
    names = optimizer.state[params[0]]
    whole = {"param": torch.cat([param.detach().flatten() for param in params])}
    return whole | {name: torch.cat([optimizer.state[p][name].flatten() for p in params]) for name in names}
