"""Checks the CUDA kernels' machine code: no GPU is needed, only nvcc and nvdisasm.

Compiles csrc/cuda/launch.cu as the build does, for every architecture, and reads ptxas's report and the disassembly:
nothing spills, the registers leave room for enough blocks, whole vectors are loaded and
stored at a time, and every address is known to be of global memory.
Usage: python tests/check_sass.py [--archs 80 90]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).parent.parent.resolve() / "csrc" / "cuda" / "launch.cu"
ARCHS = [75, 80, 86, 89, 90, 100, 120]
# As CMakeLists.txt has it, but one architecture a process, or the reports of several would mix; -lineinfo changes no
# instruction and names the source line of an unwanted one.
FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-lineinfo"]

THREADS = 256  # kThreads of csrc/cuda/table.h
REGISTERS = 65536  # of a multiprocessor, on every architecture above; a thread gets them by eights
# Blocks that a multiprocessor must have room for, by storage type and kFull: 512 threads with 4 or 5 vectors in
# flight each are enough for memory to be busy, 768 are what most kernels have at no cost.
MIN_BLOCKS = {
    ("float", False): 3,
    ("float", True): 2,  # statistics
    ("double", False): 3,
    ("double", True): 1,  # the same, and two registers a value
    ("BFloat16", False): 3,
    ("BFloat16", True): 2,
    ("Half", False): 3,
    ("Half", True): 2,
    ("Mixed", True): 2,  # forms of their own
}
# RAdam has more scalars to keep.
FEWER_BLOCKS = {("RAdam", "BFloat16", False): 2, ("RAdam", "Half", False): 2}
# 128-bit loads and stores by rule: those of all its variants, since one kernel holds them all.
VECTORS = {
    "Adam": (4 + 5, 3 + 4),  # param, grad, two moments; AMSGrad: three
    "RAdam": (4 + 5, 3 + 4),
    "Adagrad": (3, 2),  # param, grad, sum; of sparse gradients an element at a time
    "Average": (2, 1),  # param, ema
    "Scale": (1, 1),  # grad
}
FULL_ONLY = ("Average", "Scale")
# Kernels of mixed forms call a function for each way to walk a chunk, and save registers around the call: bytes
# spilled, once a chunk of 4,096 elements, but for some in a block of codes. Their vectors are in the functions.
MIXED = "Mixed"
MOST_SPILLED = {"Adam": 1200, "RAdam": 1400}

GENERIC = ("LD", "ST", "ATOM")
LOCAL = ("LDL", "STL")
INSTRUCTION = re.compile(
    rf"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?({'|'.join(('LDG', 'STG', *GENERIC, *LOCAL))})\b([.\w]*)"
)
BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}


class Access(NamedTuple):
    """One instruction that reads or writes memory."""

    function: str  # the function called, mangled; "" for the kernel's own body
    opcode: str
    bits: int
    line: str


@dataclass
class Kernel:
    """What ptxas and the disassembler say of one kernel on one architecture."""

    arch: int
    mangled: str
    registers: int = 0
    stack: int = 0
    spilled: int = 0  # bytes stored and loaded, its functions' included
    accesses: list[Access] = field(default_factory=list)

    def count(self, opcodes: str | tuple[str, ...], *, called: bool, bits: int | None = None) -> int:
        """Count the accesses in the kernel's own body, or else in the functions that it calls."""
        wanted = (opcodes,) if isinstance(opcodes, str) else opcodes
        return sum(a.opcode in wanted and bool(a.function) == called and bits in (None, a.bits) for a in self.accesses)

    def others(self, opcode: str) -> str:
        """Return how many accesses of each width but 128 bits the body has."""
        counts = Counter(a.bits for a in self.accesses if a.opcode == opcode and not a.function and a.bits != 128)
        return " ".join(f"{bits}:{counts[bits]}" for bits in sorted(counts, reverse=True)) or "-"


def run(*command: str | Path) -> str:
    """Run a command and return all it prints; end here if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}")
    return done.stdout


def tool(names: list[str], where: str, package: str | None = None) -> str:
    """Return the path of the first of some tools that is on PATH or in a package of this Python."""
    for name in names:
        if path := shutil.which(name):
            return path
    if package:
        try:
            for file in importlib.metadata.files(package) or []:
                if file.name in names:
                    return str(file.locate())
        except importlib.metadata.PackageNotFoundError:
            pass
    sys.exit(f"check_sass: no {' or '.join(names)} on PATH: {where}")


def read_ptxas(report: str, arch: int) -> dict[str, Kernel]:
    """Return the kernels that `ptxas -v` reports."""
    kernels: dict[str, Kernel] = {}
    for line in report.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)'", line):
            kernel = kernels[match[1]] = Kernel(arch, match[1])
        elif match := re.search(r"Function properties for (\S+)", line):
            function = match[1]
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            kernel.spilled += int(match[2]) + int(match[3])
            if function == kernel.mangled:
                kernel.stack = int(match[1])
        elif match := re.search(r"Used (\d+) registers", line):
            kernel.registers = int(match[1])
    return kernels


def read_sass(text: str) -> Iterator[tuple[str, Access]]:
    """Yield every access to memory, and the kernel whose code has it."""
    kernel = function = line = ""
    for text_line in text.splitlines():
        if match := re.match(r"\s*\.section\s+\.text\.([^\s,]+)", text_line):
            kernel, function = match[1], ""
        elif match := re.match(r"([^\s.]\S*):$", text_line):  # a function's label; those within one begin with a dot
            function = "" if match[1] == kernel else match[1]
        elif match := re.match(r'\s*//## File "([^"]*)", line (\d+)', text_line):
            line = f"{Path(match[1]).name}:{match[2]}"
        elif match := INSTRUCTION.match(text_line):
            bits = next((BITS[part] for part in match[2].split(".") if part in BITS), 32)
            yield kernel, Access(function, match[1], bits, line)


def read_ptx(text: str) -> dict[str, list[str]]:
    """Return the generic accesses of every kernel and function of a PTX file."""
    functions: dict[str, list[str]] = {}
    for line in text.splitlines():
        if match := re.match(r"\s*(?:\.(?:visible|weak|extern)\s+)*\.(?:entry|func)\s+(?:\(.*?\)\s*)?(\w+)", line):
            function = functions.setdefault(match[1], [])
        elif (match := re.match(r"\s*(?:@!?%p\d+\s+)?((?:ld|st|atom|red)\.[\w.:]+)", line)) and not re.search(
            r"\.(global|shared|local|param|const)\b", match[1]
        ):
            function.append(match[1])
    return functions


def gencode(arch: int) -> list[str]:
    """As CMakeLists.txt: the code of newer architectures is made from the PTX of compute_80."""
    return ["-gencode", f"arch=compute_{min(arch, 80)},code=sm_{arch}"]


def compile_arch(arch: int, nvcc: str, nvdisasm: str, directory: Path) -> list[Kernel]:
    """Return the kernels of one architecture."""
    cubin = directory / f"sm_{arch}.cubin"
    kernels = read_ptxas(run(nvcc, *FLAGS, "-Xptxas", "-v", *gencode(arch), "-cubin", SOURCE, "-o", cubin), arch)
    for name, access in read_sass(run(nvdisasm, "-c", "-g", cubin)):
        if name in kernels:
            kernels[name].accesses.append(access)
        else:
            sys.exit(f"check_sass: sm_{arch}: code that belongs to no kernel: {name}")
    return list(kernels.values())


def compile_ptx(arch: int, nvcc: str, directory: Path) -> dict[str, list[str]]:
    """Return the generic accesses in the PTX of one architecture."""
    ptx = directory / f"compute_{arch}.ptx"
    run(nvcc, *FLAGS, f"-arch=compute_{arch}", "-ptx", SOURCE, "-o", ptx)
    return read_ptx(ptx.read_text())


def demangle(names: Iterable[str], filt: str) -> dict[str, str]:
    """Return short names without namespaces and parameters: of a kernel's function, the function's."""
    mangled = sorted(set(names))
    done = subprocess.run(
        [filt, "-p"], input="\n".join(n.rsplit("$")[-1] for n in mangled), capture_output=True, text=True, check=True
    )
    short = [re.sub(r"fusedopt::|cuda::|\(anonymous namespace\)::", "", line) for line in done.stdout.splitlines()]
    return dict(zip(mangled, short, strict=True))


def traits(name: str) -> tuple[str, str, bool] | None:
    """Return a step kernel's rule, storage type and kFull."""
    match = re.fullmatch(r"step_kernel<(\w+), (\w+), \w+, (true|false)>", name)
    return (match[1], match[2], match[3] == "true") if match else None


def min_blocks(key: tuple[str, str, bool]) -> int:
    return FEWER_BLOCKS.get(key, MIN_BLOCKS[key[1:]])


def most_registers(blocks: int) -> int:
    """Return how many registers a thread may have where a multiprocessor must hold that many blocks."""
    return REGISTERS // (THREADS * blocks) // 8 * 8


def problems(kernel: Kernel, short: dict[str, str]) -> Iterator[str]:
    """Yield what is wrong with a kernel's code on one architecture."""
    key = traits(short[kernel.mangled])
    mixed = key is not None and key[1] == MIXED
    if kernel.spilled > (MOST_SPILLED.get(key[0], 0) if key and mixed else 0):
        yield f"{kernel.spilled} bytes spilled"
    unwanted = [a for a in kernel.accesses if a.opcode in GENERIC]
    if mixed:
        pass
    elif kernel.stack == 0:
        unwanted += [a for a in kernel.accesses if a.opcode in LOCAL]
    else:
        unwanted += [a for a in kernel.accesses if a.opcode in LOCAL and not a.function]
    where = Counter((a.opcode, short[a.function] if a.function else "its body", a.line) for a in unwanted)
    for (opcode, function, line), count in sorted(where.items()):
        kind = "generic" if opcode in GENERIC else "local"
        yield f"{kind} access: {count} {opcode} in {function}, {line}"

    if not key:
        return
    rule, storage, full = key
    if rule not in VECTORS or (storage, full) not in MIN_BLOCKS:
        yield "MIN_BLOCKS or VECTORS of this script has no entry for it"
        return
    blocks = min_blocks(key)
    if kernel.registers > most_registers(blocks):
        yield f"{kernel.registers} registers: more than {most_registers(blocks)} leave no room for {blocks} blocks"
    for opcode, least in zip(("LDG", "STG"), VECTORS[rule], strict=True):
        if (found := kernel.count(opcode, called=mixed, bits=128)) < least:
            yield f"{found} {opcode} of 128 bits, not {least}"


def ptx_problems(functions: dict[str, list[str]], short: dict[str, str]) -> Iterator[str]:
    """Yield what is wrong with the PTX, and what kernels are missing."""
    for mangled, generic in functions.items():
        name = short[mangled]
        for instruction, count in sorted(Counter(generic).items()):
            yield f"{name}: generic access: {count} {instruction}"
    found = {traits(name) for name in short.values()}
    for rule in VECTORS:
        for storage, full in MIN_BLOCKS:
            wanted = (full or rule not in FULL_ONLY) and (rule, storage) != ("Scale", "Mixed")
            if wanted and (rule, storage, full) not in found:
                yield f"no kernel for {rule}, {storage}, kFull {full}"


def row(kernel: Kernel, name: str) -> list[str]:
    """Return a kernel's line of the table."""
    key = traits(name)
    blocks = min_blocks(key) if key else None
    return [
        f"sm_{kernel.arch}",
        name,
        f"{kernel.registers}/{most_registers(blocks) if blocks else '-'}",
        str(kernel.stack),
        str(kernel.spilled),
        *(str(kernel.count(opcode, called=False, bits=128)) for opcode in ("LDG", "STG")),
        *(kernel.others(opcode) for opcode in ("LDG", "STG")),
        *(str(kernel.count(opcodes, called=False)) for opcodes in (GENERIC, LOCAL)),
        "/".join(str(kernel.count(opcodes, called=True)) for opcodes in ("LDG", "STG", GENERIC, LOCAL)),
    ]


def print_table(lines: list[list[str]]) -> None:
    """Print lines in columns: the first two to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [f"{c:<{w}}" if i < 2 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        print("  ".join(cells).rstrip())


def main() -> int:
    parser = argparse.ArgumentParser(description="Checks the CUDA kernels' machine code.")
    parser.add_argument("--archs", type=int, nargs="+", default=ARCHS, help="compute capabilities, e.g. 80 90")
    archs: list[int] = parser.parse_args().archs

    nvcc = tool(["nvcc"], "install the CUDA toolkit")
    nvdisasm = tool(["nvdisasm"], "python -m pip install nvidia-cuda-nvdisasm", package="nvidia-cuda-nvdisasm")
    filt = tool(["c++filt", "cu++filt"], "install binutils")

    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(os.cpu_count()) as pool:
        ptx = pool.submit(compile_ptx, min(archs[-1], 80), nvcc, Path(directory))
        compiled = [pool.submit(compile_arch, arch, nvcc, nvdisasm, Path(directory)) for arch in archs]
        kernels = [kernel for future in compiled for kernel in future.result()]
        functions = ptx.result()

    names = [k.mangled for k in kernels] + [a.function for k in kernels for a in k.accesses if a.function]
    short = demangle([*names, *functions], filt)
    kernels.sort(key=lambda k: (archs.index(k.arch), short[k.mangled]))

    header = "arch,kernel,registers,stack,spilled,LDG.128,STG.128,other LDG,other STG,generic,local"
    print_table([[*header.split(","), "called: LDG/STG/generic/local"], *(row(k, short[k.mangled]) for k in kernels)])
    violations = [f"sm_{k.arch} {short[k.mangled]}: {problem}" for k in kernels for problem in problems(k, short)]
    violations += [f"PTX: {problem}" for problem in ptx_problems(functions, short)]
    what = f"{len({k.mangled for k in kernels})} kernels x {len(archs)} architectures"
    if not violations:
        print(f"{what}: all as expected")
        return 0
    print(f"{what}: {len(violations)} violations", *violations, sep="\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
