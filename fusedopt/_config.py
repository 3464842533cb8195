"""Loading the native core, and telling what it holds."""

import os
from importlib import import_module
from types import ModuleType

import torch


def _load() -> ModuleType:
    # After torch: the core borrows torch's OpenMP runtime and reads tensors by torch's own exchange table.
    core = import_module("fusedopt._C")
    # Its experiments on tensors must not depend on the modes of whoever imports this first.
    with torch.inference_mode(False), torch.enable_grad():
        core.bind_torch(torch)
    wanted = os.environ.get("FUSEDOPT_CPU_CAPABILITY")
    if wanted and not core.set_cpu_capability(wanted):
        info = core.build_info()
        raise ImportError(
            f"FUSEDOPT_CPU_CAPABILITY={wanted!r}: this build on this processor has "
            f"{', '.join(info['cpu_usable'])} (built: {', '.join(info['cpu_built'])})"
        )
    return core


_C = _load()
__version__: str = _C.build_info()["version"]


def show_config() -> str:
    """Return, one fact a line, what this build holds and what it chose on this machine.

    Version and compiler; the CPU instruction sets chosen, usable and built (FUSEDOPT_CPU_CAPABILITY=default|avx2|avx512
    forces one); CUDA: what was built, and whether there is a device (asking wakes the driver); torch's version; threads
    (set by torch.set_num_threads); how a step makes sure that tensors are what they were.
    """
    info = _C.build_info()
    usable, built = ", ".join(info["cpu_usable"]), ", ".join(info["cpu_built"])
    facts = {
        "fusedopt": info["version"],
        "compiler": info["compiler"],
        "cpu": f"{info['cpu_capability']} (usable: {usable}; built: {built})",
        "cuda": info["cuda"] if info["cuda"].startswith("no:") else f"{info['cuda']}; {_C.why_no_cuda() or 'usable'}",
        "torch": torch.__version__,
        "threads": f"{torch.get_num_threads()} of torch's pool" if info["threads"] else "1: no OpenMP pool to share",
        "tensor checks": "signatures" if info["signatures"] else "DLPack: slower, this torch keeps other records",
    }
    return "\n".join(f"{name + ':':<15}{value}" for name, value in facts.items())
