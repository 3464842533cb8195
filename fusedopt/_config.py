"""Loading the native core, and telling what it holds."""

import os
from importlib import import_module
from types import ModuleType

import torch


def _load() -> ModuleType:
    core = import_module("fusedopt._C")
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

    Version and compiler; the CPU instruction sets built, usable and chosen (FUSEDOPT_CPU_CAPABILITY=default|avx2|avx512
    forces one); CUDA, and why not; torch's version; threads (torch.set_num_threads); how tensors are re-checked in a
    step.
    """
    info = _C.build_info()
    threads = f"{torch.get_num_threads()} (torch's OpenMP pool)" if info["threads"] else "1 (no OpenMP pool to share)"
    facts = {
        "fusedopt": info["version"],
        "compiler": info["compiler"],
        "cpu": f"{info['cpu_capability']} (usable: {', '.join(info['cpu_usable'])}; built: {', '.join(info['cpu_built'])})",
        "cuda": info["cuda"],
        "torch": torch.__version__,
        "threads": threads,
        "tensor checks": "by signature" if info["signatures"] else "through DLPack (slower; this torch is unknown)",
    }
    return "\n".join(f"{name + ':':15}{value}" for name, value in facts.items())
