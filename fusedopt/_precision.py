"""State in other forms than a plain one: made, decoded, converted, and loaded without a cast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _sharding as sharding
from ._config import _C

if TYPE_CHECKING:
    from ._optimizer import FusedOptimizer

OPTIONS = ("master_weights", "rounding", "state_dtype", "seed")
COMPANIONS = ("master_param", "param_remainder", "compensation")
_SIGNED = {"exp_avg"}  # the others are never negative, and have other codes
_CONVERT = "load_state_dict(..., convert=True) converts it"
_DISTRIBUTE = "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict distributes state as parameters are"


def portable_options(group: dict[str, Any]) -> dict[str, Any]:
    """Options of a group as checkpoints can have them: a dtype by its name."""
    dtype = group.get("state_dtype")
    return {**group, "state_dtype": str(dtype).removeprefix("torch.")} if isinstance(dtype, torch.dtype) else group


def _blocks(param: Tensor) -> tuple[int, int]:
    """Of codes: rows of dimension 0, and the blocks of each."""
    return param.shape[0] if param.dim() else 1, -(-max(param.shape[1:].numel(), 1) // _C.code_block)


def _is_codes(name: str, value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.uint8 and name not in COMPANIONS


def as_bytes(words: Tensor) -> Tensor:
    """An int16 tensor as what a state has: two bytes for each element, in a last dimension. The same memory.

    Torch's collectives move no int16, and neither bfloat16 nor float16 would do: some bits are those of a NaN.
    """
    return words.unsqueeze(-1).view(torch.uint8)


def words(remainder: Tensor) -> Tensor:
    """The reverse."""
    aligned = remainder.contiguous() if remainder.storage_offset() % 2 == 0 else remainder.clone()
    return aligned.contiguous().view(torch.int16).squeeze(-1)


def part_here(param: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """A parameter and its state; of DTensors, the parts that this process has."""
    if not sharding.is_distributed(param):
        return param, state
    return sharding.local(param), {name: sharding.local(value) for name, value in state.items()}


def whole(param: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """The reverse: the state of a DTensor, of which the parts are given, as DTensors placed like it."""
    if not sharding.is_distributed(param):
        return state

    def wrapped(name: str, value: Any) -> Any:
        if name == "step" or not isinstance(value, Tensor) or sharding.is_distributed(value):
            return value
        if name == "scales":
            shape = (*_blocks(param), value.shape[-1])
            return sharding.wrap(value, param, shape, torch.empty(shape, device="meta").stride())
        if name == "param_remainder":
            return sharding.wrap(value, param, (*param.shape, 2), (*(2 * stride for stride in param.stride()), 1))
        return sharding.wrap(value, param, param.shape, param.stride())

    return {name: wrapped(name, value) for name, value in state.items()}


def encode(values: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The 8-bit codes of a parameter's state tensors, rounded to nearest, and the scales of their blocks."""
    first = next(iter(values.values()))
    scales = torch.zeros(*_blocks(first), len(values), dtype=torch.float32, device="cpu")
    codes = {}
    for k, (name, value) in enumerate(values.items()):
        code = torch.zeros(value.shape, dtype=torch.uint8, device="cpu")
        _C.encode_state(value.detach().float().cpu().contiguous(), name in _SIGNED, k, code, scales)
        codes[name] = code.to(value.device)
    return codes, scales.to(first.device)


def decode(state: dict[str, Any], name: str) -> Tensor:
    """A state tensor in float32."""
    value: Tensor = state[name]
    if value.dtype != torch.uint8:
        return value.float()
    if "scales" not in state:
        raise ValueError(f"fusedopt: a state_dict has {name!r} in codes, and lacks their 'scales'")
    scales = state["scales"].cpu().contiguous()
    k = [key for key, tensor in state.items() if _is_codes(key, tensor)].index(name)
    out = torch.empty(value.shape, dtype=torch.float32, device="cpu")
    _C.decode_state(value.cpu().contiguous(), name in _SIGNED, k, scales, out)
    return out.to(value.device)


def full_value(param: Tensor, state: dict[str, Any]) -> Tensor | None:
    """The float32 value that a parameter stands for; None if that is the parameter.

    As a step finds it: a master is what counts as long as the parameter is its rounding.
    """
    param = param.detach()
    if isinstance(state.get("master_param"), Tensor):
        master: Tensor = state["master_param"].float()
        if param.dtype not in (torch.bfloat16, torch.float16):
            return None
        return torch.where(_rounded(master, param.dtype) == param, master, param.float())
    if "param_remainder" in state and param.dtype == torch.bfloat16:
        high = param.contiguous().view(torch.int16).to(torch.int32) << 16
        joined: Tensor = (high + words(state["param_remainder"]).to(torch.int32)).view(torch.float32)
        return torch.where(joined.isnan(), param.float(), joined)
    if "compensation" in state and state["compensation"].dtype == param.dtype:
        lost: Tensor = state["compensation"]
        return param.float() + lost.float()
    return None


def _rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A master as its parameter has it: bfloat16 with ties away from zero."""
    if dtype != torch.bfloat16:
        return value.to(dtype)
    bits = value.contiguous().view(torch.int32)
    away = (((bits + 0x8000) >> 16) & 0xFFFF).to(torch.uint16).view(torch.bfloat16)
    return torch.where(value.isnan(), value.to(dtype), away)


def _companion(name: str, dtype: torch.dtype, param: Tensor, value: Tensor) -> Tensor:
    """What belongs beside the parameter for it to stand for a value, as far as it is that value rounded."""
    if name == "master_param":
        return value
    if name == "compensation":
        rest = value - param.detach().float()
        is_nearest = rest.abs() <= (value - value.to(dtype).float()).abs()  # one of two, if it lies between
        return torch.where(is_nearest, rest, torch.zeros_like(rest)).to(dtype)
    bits = value.contiguous().view(torch.int32)
    low = (bits - (((bits + 0x8000) >> 16) << 16)).to(torch.int16)
    same = _rounded(value, torch.bfloat16) == param.detach()
    return as_bytes(torch.where(same & ~value.isnan(), low, torch.zeros_like(low)))


def _form(optimizer: FusedOptimizer, param: Tensor, group: dict[str, Any]) -> dict[str, torch.dtype]:
    """What state a parameter is to have, and its dtypes; nothing of a plain one."""
    if all(group[name] == value for name, value in optimizer._precision_options.items() if name != "seed"):
        return {}
    names = optimizer._stepper.state_names(param, group)
    return {name[0]: getattr(torch, name[1]) for name in names if isinstance(name, tuple)}


def _convert(param: Tensor, form: dict[str, torch.dtype], state: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state in another form."""
    if param.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return state  # there is but one
    state = {
        name: value.to(param.device) if isinstance(value, Tensor) and name != "step" else value
        for name, value in state.items()
    }
    moments = [name for name in state if name not in ("step", "scales", *COMPANIONS)]
    wanted = form or {name: param.dtype for name in moments if isinstance(state[name], Tensor)}
    value = full_value(param, state)
    if value is None:
        value = param.detach().float()
    coded = [name for name in moments if wanted.get(name) == torch.uint8]
    out: dict[str, Any] = {"step": state["step"]} if "step" in state else {}
    for name in moments:
        tensor = state[name]
        if name in coded or (name not in wanted and isinstance(tensor, Tensor) and tensor.dtype == torch.uint8):
            continue  # see below; or of an option that was switched off
        convert = name in wanted and tensor.dtype != wanted[name]
        out[name] = decode(state, name).to(wanted[name]) if convert else tensor
    if coded:
        are_codes = all(state[name].dtype == torch.uint8 for name in coded) and "scales" in state
        if are_codes and state["scales"].shape[-1] == len(coded):
            out.update({name: state[name] for name in (*coded, "scales")})
        else:
            encoded, out["scales"] = encode({name: decode(state, name) for name in coded})
            out.update(encoded)
    for name in COMPANIONS:
        if name in wanted:
            kept = state.get(name)
            fits = isinstance(kept, Tensor) and kept.dtype == wanted[name]
            out[name] = kept if fits else _companion(name, wanted[name], param, value)
    if "ema" in out:  # the last, as in a step
        out["ema"] = out.pop("ema")
    return out


def _params_by_id(optimizer: FusedOptimizer, checkpoint: dict[str, Any]) -> dict[Any, tuple[Tensor, dict[str, Any]]]:
    """The parameter and the live group of each id that a checkpoint's groups have."""
    found = {}
    for saved, live in zip(checkpoint["param_groups"], optimizer.param_groups, strict=True):
        for key, param in zip(saved["params"], live["params"], strict=True):
            found[key] = (param, live)
    return found


def portable(optimizer: FusedOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state_dict in torch's float32 layout."""
    params = _params_by_id(optimizer, state_dict)
    states: dict[Any, Any] = {}
    for key, state in state_dict["state"].items():
        if key not in params:
            states[key] = state
            continue
        param, group = params[key]
        form = _form(optimizer, param, group)
        if not form:
            states[key] = {name: tensor for name, tensor in state.items() if name not in COMPANIONS}
            continue
        here, state = part_here(param, state)
        value = full_value(here, {name: tensor for name, tensor in state.items() if name in form})
        decoded = {
            name: decode(state, name) if name in form else tensor
            for name, tensor in state.items()
            if name not in COMPANIONS and name != "scales"
        }
        if value is not None:
            decoded["master_param"] = value
        states[key] = whole(param, decoded)
    groups = [{k: v for k, v in group.items() if k not in OPTIONS} for group in state_dict["param_groups"]]
    return {**state_dict, "state": states, "param_groups": groups}


class _Exact:
    """A tensor that torch's load_state_dict is not to cast."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _describe(group: dict[str, Any]) -> str:
    return ", ".join(f"{name}={group[name]!r}" for name in OPTIONS if name in group)


def prepare(
    optimizer: FusedOptimizer, checkpoint: dict[str, Any], convert: bool, cast: list[str], warn: list[str]
) -> dict[str, Any] | None:
    """What torch is given to load: state that is right already, and must not be cast, in a wrapping.

    `cast` takes what torch will cast, `warn` what the caller is to be told. Changes nothing; raises where the state is
    not what the options need.
    """
    groups = checkpoint["param_groups"]
    lengths = [len(group["params"]) for group in groups]
    if lengths != [len(group["params"]) for group in optimizer.param_groups]:
        return None  # torch says what is wrong
    cls = type(optimizer).__name__
    merged = []
    for index, (saved, live) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        group = {**live, **portable_options(saved)}
        if convert:
            group.update({name: live[name] for name in OPTIONS})
        elif any(group[name] != live[name] for name in OPTIONS[:3]):
            warn.append(
                f"{cls}.load_state_dict: param_groups[{index}] takes {_describe(saved)} from the checkpoint, "
                f"instead of {_describe(live)}; load_state_dict(..., convert=True) keeps these, and converts the state"
            )
        merged.append(group)

    states = dict(checkpoint["state"])
    for saved, live, group in zip(groups, optimizer.param_groups, merged, strict=True):
        for index, (key, param) in enumerate(zip(saved["params"], live["params"], strict=True)):
            state = states.get(key)
            if not isinstance(state, dict) or not state:
                continue
            _check_places(cls, live, index, param, state)
            form = _form(optimizer, param, group)
            if convert:
                here, state = part_here(param, state)
                state = whole(param, _convert(here, form, state))
            if form:
                rest = state.get("param_remainder")
                if isinstance(rest, Tensor) and rest.dtype == torch.int16:  # as before 0.1.0 was released
                    state = {**state, "param_remainder": as_bytes(rest)}
                _check(cls, live, index, param, form, state)
                states[key] = {
                    name: _Exact(value) if isinstance(value, Tensor) and name != "step" else value
                    for name, value in state.items()
                }
                continue
            if any(_is_codes(name, value) for name, value in state.items()):
                _fail(cls, live, index, "is in codes, which its options have no use for")
            # What is left of options that were switched off.
            state = states[key] = {k: v for k, v in state.items() if k not in COMPANIONS}
            cast += [
                f"{name!r} of parameter {key} from {value.dtype} to {param.dtype}"
                for name, value in state.items()
                if isinstance(value, Tensor)
                and name != "step"
                and value.dtype != param.dtype
                and param.is_floating_point()
            ]
    if convert:
        groups = [
            {**saved, **{name: live[name] for name in OPTIONS}}
            for saved, live in zip(groups, optimizer.param_groups, strict=True)
        ]
    return {**checkpoint, "state": states, "param_groups": groups}


def _fail(cls: str, group: dict[str, Any], index: int, problem: str, remedy: str = _CONVERT) -> None:
    names = group.get("param_names", ())
    name = f" ({names[index]!r})" if index < len(names) else ""
    raise ValueError(
        f"{cls}.load_state_dict: the checkpoint's state of parameter {index} of a group{name} {problem}; "
        f"{remedy}. Nothing was changed"
    )


def _check_places(cls: str, group: dict[str, Any], index: int, param: Tensor, state: dict[str, Any]) -> None:
    parted = sharding.is_distributed(param)
    for name, value in state.items():
        if name == "step" or not isinstance(value, Tensor):
            continue
        if sharding.is_distributed(value) != parted:
            what = f"has {name!r} as {'a plain tensor' if parted else 'a DTensor'}, and the parameter is "
            _fail(cls, group, index, what + ("a DTensor" if parted else "none"), _DISTRIBUTE)
        if parted and not sharding.same_place(value, param):  # type: ignore[arg-type]  # a DTensor: see above
            _fail(cls, group, index, f"has {name!r} placed otherwise than the parameter", _DISTRIBUTE)


def _check(
    cls: str, group: dict[str, Any], index: int, param: Tensor, form: dict[str, torch.dtype], state: dict[str, Any]
) -> None:
    num_coded = sum(dtype == torch.uint8 and name not in COMPANIONS for name, dtype in form.items())
    for name, dtype in form.items():
        value = state.get(name)
        if not isinstance(value, Tensor):
            if name != "ema":  # it begins with what the parameter is
                _fail(cls, group, index, f"lacks {name!r}, which its options need")
        elif value.dtype != dtype:
            _fail(cls, group, index, f"has {name!r} in {value.dtype}, and its options need {dtype}")
        else:
            wanted = tuple(param.shape)
            if name == "scales":
                wanted = (*_blocks(param), num_coded)
            elif name == "param_remainder":
                wanted = (*wanted, 2)
            if tuple(value.shape) != wanted:
                what = f"has {name!r} of shape {tuple(value.shape)}, and a parameter of shape {tuple(param.shape)}"
                _fail(cls, group, index, f"{what} needs {wanted}", "is it that of another model?")


def unwrap(optimizer: FusedOptimizer) -> None:
    for param, state in optimizer.state.items():
        for name, value in state.items() if isinstance(state, dict) else ():
            if isinstance(value, _Exact):
                state[name] = value.tensor.to(param.device)
