"""DTensors: which part of a whole tensor this process has, and what is added up over all parts."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement


def is_distributed(tensor: Any) -> bool:
    """Is it a DTensor? Does not import their module: nobody has one before that."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(value: Any) -> Any:
    """The part of a DTensor that is here, when it has arrived; anything else as it is."""
    return value.detach().to_local() if is_distributed(value) else value


def wrap(part: Tensor, like: Tensor, shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """The DTensor of some shape, placed as another one, of which this process has a part."""
    from torch.distributed.tensor import DTensor

    whole = cast("DTensor", like)
    size = torch.Size(shape)
    return DTensor.from_local(part, whole.device_mesh, whole.placements, run_check=False, shape=size, stride=stride)


def same_place(a: DTensor, b: DTensor) -> bool:
    """Have two DTensors their parts in the same places?"""
    return a.placements == b.placements and a.device_mesh == b.device_mesh


def placed_as(grad: DTensor, param: DTensor) -> DTensor | None:
    """A gradient, its parts where the parameter has them: communicates. None if it is on another mesh."""
    if grad.device_mesh != param.device_mesh:
        return None
    with torch.no_grad():
        return grad.redistribute(param.device_mesh, param.placements)


def _sharded_dim(placement: Placement) -> int | None:
    """The dimension that it shards, also of torch's private _StridedShard; None if it does not."""
    return getattr(placement, "dim", None)


def _coordinate(mesh: DeviceMesh, dim: int) -> int:
    """Where this process is along a dimension. (Not `get_local_rank`, which orders processes by their ranks.)"""
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(f"is a DTensor on {mesh}, which this process is no part of")
    return coordinate[dim]


def _indices(param: DTensor, dim: int) -> Tensor:
    """Which indices of a dimension of the whole tensor this process has."""
    mesh, placements = param.device_mesh, param.placements
    index = torch.arange(param.shape[dim], device="cpu")
    order = [i for i, placement in enumerate(placements) if _sharded_dim(placement) == dim]
    for of_dim in getattr(param._spec, "shard_order", None) or ():
        if of_dim.tensor_dim == dim:
            order = list(of_dim.mesh_dims)
    for i in order:
        # A shard is one of torch.chunk's; a strided one has one of each of so many.
        pieces = index.chunk(getattr(placements[i], "split_factor", 1))
        here, size = _coordinate(mesh, i), mesh.size(i)
        chunks = [piece.chunk(size) for piece in pieces]
        index = torch.cat([of_piece[here] if here < len(of_piece) else index[:0] for of_piece in chunks])
    return index


def _inner_dims(whole: DTensor) -> list[int]:
    """The dimensions behind the first that are sharded: by what all ranks know, so that all raise or none."""
    mesh = whole.device_mesh
    dims = {_sharded_dim(placement) for i, placement in enumerate(whole.placements) if mesh.size(i) > 1}
    return sorted(dim for dim in dims if dim)


def place(param: Tensor) -> tuple[int, int, int, int]:
    """Where this process's elements of a DTensor lie in the whole tensor, in row-major order.

    Returns:
        `first`, `run` and `stride` of Form (form.h), and the elements of a whole row of dimension 0.

    Raises:
        ValueError: they do not lie so; with a text that names no parameter.
    """
    whole = cast("DTensor", param)
    shape, part = whole.shape, local(whole).shape
    row_numel = shape[1:].numel()
    inner = _inner_dims(whole)
    if len(inner) > 1:
        raise ValueError(f"is a DTensor that is sharded along several dimensions behind the first, {inner}")
    if not shape or shape == part or shape.numel() == 0:
        return 0, 0, 0, row_numel
    cut = [dim for dim in range(len(shape)) if part[dim] != shape[dim]]
    indices = {dim: _indices(whole, dim) for dim in cut}
    for dim, index in indices.items():
        expected = torch.arange(index[0].item(), index[0].item() + len(index)) if len(index) else index
        if len(index) != part[dim] or not torch.equal(index, expected):
            raise ValueError(
                f"is a DTensor of shape {tuple(shape)}, of whose dimension {dim} the placements "
                f"{tuple(whole.placements)} give this process no single piece of {part[dim]}"
            )
    strides = torch.empty(shape, device="meta").stride()
    first = sum(int(index[0]) * strides[dim] for dim, index in indices.items() if len(index))
    if not inner:
        return first, 0, 0, row_numel
    dim = inner[0]
    run, stride = part[dim] * strides[dim], shape[dim] * strides[dim]
    return first, run, stride, row_numel


def check_blocks(param: Tensor, block: int) -> None:
    """Are the blocks of codes of a DTensor's parts those of the whole tensor? The same answer on all ranks.

    Raises:
        ValueError: they are not.
    """
    whole = cast("DTensor", param)
    dims = _inner_dims(whole)
    size = whole.shape[1] if whole.dim() > 1 else 1
    for i, placement in enumerate(whole.placements):
        if _sharded_dim(placement) == 1:
            size = -(-size // whole.device_mesh.size(i))
    piece = size * whole.shape[2:].numel()
    if dims and (dims != [1] or piece % block != 0):
        raise ValueError(
            f"is a DTensor whose rows are cut along {dims}, as {tuple(whole.placements)} says, into pieces of {piece} "
            f"elements, and 8-bit state needs multiples of {block}, along dimension 1 alone: use torch.bfloat16 or "
            "torch.float32 as state_dtype"
        )


def reduction_of(params: list[Tensor]) -> Reduction | None:
    """How the norm of some parameters' gradients is added up; None if no gradient is a DTensor.

    Gradients that are placed otherwise than their parameters (a Partial one must be added up before it is measured) are
    replaced by such as are not.
    """
    module = sys.modules.get("torch.distributed.tensor")
    if module is None or not any(isinstance(param, module.DTensor) for param in params):
        return None
    for index, param in enumerate(params):
        if not is_distributed(param) or not is_distributed(param.grad):
            continue
        whole, grad = cast("DTensor", param), cast("DTensor", param.grad)
        if same_place(grad, whole):
            continue
        placed = placed_as(grad, whole)
        if placed is None:
            raise RuntimeError(
                f"clip_grad_norm_: the gradient of parameter {index} is on {grad.device_mesh}, and the parameter on "
                f"{whole.device_mesh}: redistribute it"
            )
        param.grad = placed
    return Reduction(params)


class Reduction:
    """Over which processes the norm of some tensors is added up, and which of them this process counts.

    A part that several processes have is counted by the one that comes first along the mesh dimensions on which it is
    replicated; a plain tensor, which all have, by the first of all.

    Raises:
        RuntimeError: the DTensors are on meshes of different processes.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        tensors = list(tensors)
        parted = [cast("DTensor", tensor) for tensor in tensors if is_distributed(tensor)]
        meshes: list[DeviceMesh] = []
        dims: set[int] = set()  # those of the meshes along which something is sharded
        kinds = {id(tensor._spec): tensor for tensor in parted}.values()
        for tensor in kinds:
            if tensor.device_mesh not in meshes:
                meshes.append(tensor.device_mesh)
            dims |= {i for i, placement in enumerate(tensor.placements) if not placement.is_replicate()}
        # Along the one dimension of the one mesh that matters; None: over all of the meshes' processes.
        self._along = None if len(meshes) > 1 or len(dims) > 1 else next(iter(dims), 0)
        self._known: dict[tuple[Any, Any], bool] = {}
        self.group = self._find_group(meshes)
        self.device = local(parted[0]).device
        # What all ranks agree on, whichever gradients they have.
        self.is_double = any(tensor.dtype in (torch.float64, torch.complex128) for tensor in tensors)
        self.counts = [self._counts(tensor, meshes[0]) for tensor in tensors]

    def _find_group(self, meshes: list[DeviceMesh]) -> ProcessGroup:
        import torch.distributed as dist

        mesh = meshes[0]
        if self._along is not None:
            return mesh.get_group(self._along)
        ranks = [sorted(each.mesh.flatten().tolist()) for each in meshes]
        if any(others != ranks[0] for others in ranks):
            raise RuntimeError(
                f"the DTensors are on meshes of different processes ({', '.join(map(str, meshes))}), over which no "
                "norm can be added up: make an optimizer for each, or measure and clip without max_grad_norm"
            )
        world: ProcessGroup | None = dist.group.WORLD
        if world is not None and len(ranks[0]) == dist.get_world_size():
            return world
        for each in meshes:
            if each.ndim == 1:
                return each.get_group()
        return mesh._flatten().get_group()

    def _counts(self, tensor: Tensor, mesh: DeviceMesh) -> bool:
        if not is_distributed(tensor):
            dims = range(mesh.ndim) if self._along is None else [self._along]
            return all(_coordinate(mesh, i) == 0 for i in dims)
        whole = cast("DTensor", tensor)
        key = (whole.device_mesh, whole.placements)
        if key not in self._known:
            self._known[key] = all(
                not placement.is_replicate() or self._along not in (None, i) or _coordinate(whole.device_mesh, i) == 0
                for i, placement in enumerate(whole.placements)
            )
        return self._known[key]

    def add_up_numbers(self, sum_of_squares: float = 0, largest: float = 0) -> list[float]:
        """`add_up` of numbers. Zero, where nothing is to be measured: the others wait for all to take part."""
        totals = torch.tensor([sum_of_squares, largest], dtype=torch.float64, device=self.device)
        self.add_up(totals)
        found: list[float] = totals.tolist()
        return found

    def tell(self, totals: Tensor, report: Tensor | None) -> None:
        """`add_up` with nothing of this process's, where that is on a GPU; `report` is told of an inf or nan."""
        totals.zero_()
        self.add_up(totals)
        if report is not None:
            report.fill_(0).add_((~totals.isfinite()).any())

    def add_up(self, totals: Tensor) -> None:
        """Replace the sum of squares and the largest magnitude of this process by those of all: one all-reduce.

        totals: (2,), double. Each process has a row of its own in what is added up, and zeros in the others': so the
        result is the same on all, and a sum and a maximum travel together.
        """
        import torch.distributed as dist

        with torch.no_grad():
            of_all = totals.new_zeros(dist.get_world_size(self.group), 2)
            of_all[dist.get_rank(self.group)] = totals
            dist.all_reduce(of_all, group=self.group)
            totals[0] = of_all[:, 0].sum()
            totals[1] = of_all[:, 1].amax()
