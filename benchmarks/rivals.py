"""Other libraries' optimizers on the CPU, each in an environment of its own, in the same run as fusedopt and torch.

    python -m benchmarks.rivals install            # all of them, or those that are named: .rivals/NAME
    python -m benchmarks.rivals                    # those that are installed; results/rivals-<processor>.json
    python -m benchmarks.rivals --quick deepspeed  # one of them, with fewer repeats, and nothing is written
    python -m benchmarks.rivals --program list     # the small programs that tell right from wrong; or one of them

One build of fusedopt serves every torch from 2.11 on, so ours runs inside of each environment, taking turns with the
rival and with torch's fused class. Before anything is timed, small programs ask each contender for the result of a few
steps, and compare it with torch's own for-loop in float64. A contender that fails the plain one is not timed; what else
comes out wrong, or raises, is listed, with the whole program (`--program`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from . import harness
from .harness import OURS, ratio_row

FOLDER = harness.ROOT / ".rivals"
TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Contender:
    """An optimizer, as a user would write it.

    Attributes:
        imports: the line that imports it.
        make: the expression that makes it of `params`, with `lr`.
        ours, torch: the same of fusedopt and of torch ("": it has none).
        dtype: of the parameters.
        exact: whether state and parameters are float32, so that small programs can tell right from wrong.
        amsgrad, maximize: the option, if it has one.
    """

    imports: str
    make: str
    ours: str
    torch: str
    dtype: str = "float32"
    exact: bool = True
    amsgrad: str = "amsgrad=True"
    maximize: str = "maximize=True"


@dataclass(frozen=True)
class Rival:
    """A library: what pip installs, the packages whose versions count, and its optimizers."""

    install: Sequence[str]
    distribution: str
    contenders: Mapping[str, Contender]


ADAM, ADAM_FUSED = "fusedopt.Adam(params, lr=lr)", "torch.optim.Adam(params, lr=lr, fused=True)"
ADAGRAD, ADAGRAD_FUSED = "fusedopt.Adagrad(params, lr=lr)", "torch.optim.Adagrad(params, lr=lr, fused=True)"
RADAM, RADAM_FOREACH = "fusedopt.RAdam(params, lr=lr)", "torch.optim.RAdam(params, lr=lr, foreach=True)"
CODES = "fusedopt.AdamW(params, lr=lr, weight_decay=0, state_dtype='int8')"
OPTIMI = "betas=(0.9, 0.999), eps=1e-8"

RIVALS: dict[str, Rival] = {
    "torch": Rival(
        [],
        "torch",
        {
            "torch.optim.Adam(fused=True)": Contender("", ADAM_FUSED, ADAM, ""),
            "torch.optim.Adam(foreach=True)": Contender("", "torch.optim.Adam(params, lr=lr, foreach=True)", ADAM, ""),
            "torch.optim.Adam()": Contender("", "torch.optim.Adam(params, lr=lr)", ADAM, ADAM_FUSED),
            "torch.optim.RAdam(foreach=True)": Contender("", RADAM_FOREACH, RADAM, "", amsgrad=""),
            "torch.optim.Adagrad(fused=True)": Contender("", ADAGRAD_FUSED, ADAGRAD, "", amsgrad=""),
        },
    ),
    "deepspeed": Rival(
        ["deepspeed"],
        "deepspeed",
        {
            "DeepSpeedCPUAdam": Contender(
                "from deepspeed.ops.adam import DeepSpeedCPUAdam",
                "DeepSpeedCPUAdam(params, lr=lr)",
                ADAM,
                ADAM_FUSED,
                maximize="",
            ),
            "DeepSpeedCPUAdagrad": Contender(
                "from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad",
                "DeepSpeedCPUAdagrad(params, lr=lr)",
                ADAGRAD,
                ADAGRAD_FUSED,
                amsgrad="",
                maximize="",
            ),
        },
    ),
    "bitsandbytes": Rival(
        ["bitsandbytes"],
        "bitsandbytes",
        {
            "bitsandbytes Adam": Contender(
                "import bitsandbytes", "bitsandbytes.optim.Adam(params, lr=lr)", ADAM, ADAM_FUSED, maximize=""
            ),
            "bitsandbytes AdamW8bit": Contender(
                "import bitsandbytes",
                "bitsandbytes.optim.AdamW8bit(params, lr=lr, weight_decay=0)",
                CODES,
                "",
                exact=False,
            ),
        },
    ),
    "optimi": Rival(
        ["torch-optimi"],
        "torch-optimi",
        {
            "optimi Adam": Contender(
                "import optimi", f"optimi.Adam(params, lr=lr, {OPTIMI})", ADAM, ADAM_FUSED, amsgrad="", maximize=""
            ),
            "optimi RAdam": Contender(
                "import optimi", f"optimi.RAdam(params, lr=lr, {OPTIMI})", RADAM, RADAM_FOREACH, amsgrad="", maximize=""
            ),
            "optimi Adam, bfloat16, Kahan": Contender(
                "import optimi",
                f"optimi.Adam(params, lr=lr, {OPTIMI}, kahan_sum=True)",
                "fusedopt.Adam(params, lr=lr, rounding='kahan')",
                "",
                dtype="bfloat16",
                exact=False,
            ),
        },
    ),
    "pytorch_optimizer": Rival(
        ["pytorch_optimizer"],
        "pytorch_optimizer",
        {
            "pytorch_optimizer RAdam": Contender(
                "import pytorch_optimizer",
                "pytorch_optimizer.RAdam(params, lr=lr, degenerated_to_sgd=True)",
                RADAM,
                RADAM_FOREACH,
                amsgrad="",
            ),
        },
    ),
    "torchao": Rival(
        ["torchao"],
        "torchao",
        {
            "torchao AdamW8bit": Contender(
                "import torchao.optim",
                "torchao.optim.AdamW8bit(params, lr=lr, weight_decay=0)",
                CODES,
                "",
                exact=False,
            ),
            "torchao _AdamW, bfloat16, stochastic": Contender(
                "import torchao.optim",
                "torchao.optim._AdamW(params, lr=lr, weight_decay=0, bf16_stochastic_round=True)",
                "fusedopt.AdamW(params, lr=lr, weight_decay=0, rounding='stochastic')",
                "torch.optim.AdamW(params, lr=lr, weight_decay=0, fused=True)",
                dtype="bfloat16",
                exact=False,
            ),
        },
    ),
}


# --- right or wrong ------------------------------------------------------------------------------------------------

# What makes `params` and their gradients; and the options that both get.
PLAIN = "plain"
LARGE = "large-gradient"  # its square overflows float32, but not what Adam keeps of it
PROBES: dict[str, tuple[str, str]] = {
    PLAIN: (
        """
        params = [torch.nn.Parameter(torch.randn(n)) for n in (10_000, 7, 1)]
        """,
        "",
    ),
    "transposed-parameter": (
        """
        params = [torch.nn.Parameter(torch.randn(40, 30).t())]
        """,
        "",
    ),
    "transposed-gradient": (
        """
        params = [torch.nn.Parameter(torch.randn(30, 40))]
        params[0].grad = torch.randn(40, 30).t()
        """,
        "",
    ),
    "expanded-gradient": (
        """
        params = [torch.nn.Parameter(torch.randn(30, 40))]
        params[0].grad = torch.randn(30, 1).expand(30, 40)
        """,
        "",
    ),
    "channels-last": (
        """
        params = [torch.nn.Parameter(torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last))]
        params[0].grad = torch.randn(8, 4, 3, 3)
        """,
        "",
    ),
    "empty-tensor": (
        """
        params = [torch.nn.Parameter(torch.randn(n)) for n in (5, 0, 9, 0)]
        """,
        "",
    ),
    "0-d": (
        """
        params = [torch.nn.Parameter(torch.tensor(0.5)), torch.nn.Parameter(torch.randn(3))]
        """,
        "",
    ),
    LARGE: (
        """
        params = [torch.nn.Parameter(torch.randn(100))]
        params[0].grad = torch.full((100,), 1e20)
        """,
        "",
    ),
    "float64": (
        """
        params = [torch.nn.Parameter(torch.randn(100, dtype=torch.float64))]
        """,
        "",
    ),
    "amsgrad": (
        """
        params = [torch.nn.Parameter(torch.randn(100))]
        """,
        "amsgrad",
    ),
    "maximize": (
        """
        params = [torch.nn.Parameter(torch.randn(100))]
        """,
        "maximize",
    ),
}
PROGRAM = """\
import torch
{imports}
lr = 0.01
torch.manual_seed(0)
{case}
for p in params:
    p.grad = torch.randn(p.shape, dtype=p.dtype) if p.grad is None else p.grad
twins = [torch.nn.Parameter(p.detach().double().contiguous().clone()) for p in params]
memory = [p.grad.as_strided((p.grad.untyped_storage().nbytes() // p.grad.element_size(),), (1,)) for p in params]
first = [(m.clone(), p.grad.double().contiguous().clone()) for m, p in zip(memory, params)]

optimizer = {make}
reference = {reference}
for scale in (3.0, 0.5, 0.1, 0.01, 1.0, 0.1, 0.01, 0.1):
    for twin, m, (values, grad) in zip(twins, memory, first):
        m.copy_(values * scale)  # the gradient keeps its layout
        twin.grad = grad * scale
    optimizer.step()
    reference.step()
error = max(float((p - twin).detach().abs().{measure}()) / lr for p, twin in zip(params, twins) if p.numel())
print(f"off by {{error:.2g}} learning rates after 8 steps")
"""
# Of a float32 parameter of about 1: an ulp is 1e-7, so 1e-5 learning rates; 8 steps of rounding are far below this.
RIGHT = 3e-4
# With 8-bit state or bfloat16 parameters, of about 0.05, whose ulp is 0.02 learning rates: in the mean of all elements,
# because single ones may be far off in 8 bits. 8 steps move by about 3.
NEAR = 0.5


def program(contender: Contender, probe: str) -> str | None:
    """The program that tells whether the contender is right; None if this is nothing to ask it."""
    case, option = PROBES[probe]
    options = {"": "", "amsgrad": contender.amsgrad, "maximize": contender.maximize}[option]
    name = contender.ours.removeprefix("fusedopt.").split("(")[0]
    if (option and not options) or (probe == LARGE and not name.startswith("Adam")):
        return None
    case = textwrap.dedent(case).strip()
    if not contender.exact:  # two dimensions, or some leave the state as it is
        case = f"params = [torch.nn.Parameter((0.05 * torch.randn(80, 128)).to(torch.{contender.dtype}))]"
    decay = ", weight_decay=0" if name == "AdamW" else ""
    same = f", {option}=True" if option else ""
    return PROGRAM.format(
        imports=contender.imports,
        case=case,
        measure="max" if contender.exact else "mean",
        make=f"{contender.make[:-1]}, {options})" if options else contender.make,
        reference=f"torch.optim.{name}(twins, lr=lr, foreach=False{decay}{same})",
    )


def answer(source: str, tolerance: float) -> tuple[str, str]:
    """Run a program in this process: "right", "wrong" or "raises", and by how much or what."""
    found: dict[str, Any] = {"print": lambda _: None}
    try:
        exec(compile(source, "program", "exec"), found)
    except Exception as error:
        return "raises", f"{type(error).__name__}: {error}".split("\n")[0][:200]
    off = found["error"]
    return ("right" if off <= tolerance else "wrong"), f"off by {off:.2g} learning rates after 8 steps"


def verdicts(contender: Contender) -> dict[str, tuple[str, str]]:
    """What each program says."""
    probes = PROBES if contender.exact else (PLAIN,)
    sources = {probe: program(contender, probe) for probe in probes}
    tolerance = RIGHT if contender.exact else NEAR
    return {probe: answer(source, tolerance) for probe, source in sources.items() if source is not None}


# --- inside of an environment --------------------------------------------------------------------------------------


def inside(name: str, quick: bool) -> dict[str, Any]:
    """Check and time one library's contenders; this process has its packages."""
    sizes = {"16M in 4 tensors": [(4096, 1024)] * 4, "1,000 tensors of 1,000": [(10, 100)] * 1000}
    found: dict[str, Any] = {"distribution": RIVALS[name].distribution, "version": version(RIVALS[name].distribution)}
    found |= {"torch": torch.__version__, "contenders": {}, "rows": []}
    for title, contender in RIVALS[name].contenders.items():
        answers = verdicts(contender)
        found["contenders"][title] = answers
        for probe, (verdict, words) in answers.items():
            if verdict != "right":
                print(f"{title:36} {probe:24} {verdict}: {words}", flush=True)
        if answers[PLAIN][0] != "right":
            continue
        for case, numels in sizes.items():
            made = {title: contender.make, OURS: contender.ours, "torch": contender.torch}
            steps = {}
            for who, expression in made.items():
                if expression:
                    params = harness.make_parameters(numels, getattr(torch, contender.dtype))
                    names = {"torch": torch, "lr": 1e-3, "params": params}
                    exec(f"import fusedopt\n{contender.imports}", names)
                    steps[who] = eval(expression, names).step
            longest = max(map(once, steps.values()))  # the second step: the first one makes state, or compiles
            rounds = max(3, min(5 if quick else 21, int((2 if quick else 12) / longest / len(steps))))
            samples = harness.interleave({who: harness.Contender(step) for who, step in steps.items()}, rounds)
            row = ratio_row(f"{title}, {case}", samples, title, OURS)
            row.times = {who: harness.seconds(samples, who) for who in samples}
            harness.print_rows("faster", [row])
            found["rows"].append(harness.as_json("rivals", row))
    return found


def once(step: Callable[[], object]) -> float:
    """The seconds that the second call takes."""
    step()
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


# --- the command line ----------------------------------------------------------------------------------------------


def python_of(name: str) -> Path:
    """Torch is in the environment that this runs in."""
    return Path(sys.executable) if name == "torch" else FOLDER / name / "bin" / "python"


def install(name: str) -> None:
    """Make the environment of a library, with a torch of its own."""
    if not RIVALS[name].install:
        return
    subprocess.run([sys.executable, "-m", "venv", str(FOLDER / name)], check=True)
    pip = [str(python_of(name)), "-m", "pip", "install", "-q"]
    subprocess.run([*pip, TORCH, "numpy", "setuptools", "wheel", "ninja"], check=True)
    # Without isolation: some need torch to build. Torch stays what it is, so that all are compared with the same.
    subprocess.run([*pip, "--no-build-isolation", TORCH, *RIVALS[name].install], check=True)
    print(f"{name}: installed in {FOLDER / name}")


def compare(name: str, quick: bool) -> dict[str, Any] | None:
    """Run a library's part in its environment."""
    python = python_of(name)
    if not python.exists():
        print(f"{name}: skipped, not installed: python -m benchmarks.rivals install {name}")
        return None
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"  # for what compiles when it is first used
    command = [str(python), "-m", "benchmarks.rivals", "--inside", *(["--quick"] if quick else []), name]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        environment = {**os.environ, "PATH": path}
        done = subprocess.run([*command, "--json", str(out)], cwd=harness.ROOT, env=environment, check=False)
        if done.returncode:
            print(f"{name}: ended with status {done.returncode}")
            return None
        found: dict[str, Any] = json.loads(out.read_text())
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rivals", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", help=f"install, and libraries: {', '.join(RIVALS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--program", metavar="WHAT", help="print a program; list: what there is")
    parser.add_argument("--json", type=Path, help="where to write the results (default: results/, a full run only)")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.program:
        return show_program(args.program)
    installing = args.names[:1] == ["install"]
    names = args.names[installing:] or list(RIVALS)
    unknown = set(names) - RIVALS.keys()
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(RIVALS)}")
    if installing:
        for name in names:
            install(name)
        return 0
    if args.inside:
        [name] = names
        args.json.write_text(json.dumps(inside(name, args.quick)))
        return 0
    found = {name: compare(name, args.quick) for name in names}
    path = args.json or (None if args.quick or args.names else harness.default_path("rivals"))
    if path:
        facts = harness.machine()
        path.write_text(json.dumps({**facts, "rivals": {k: v for k, v in found.items() if v}}, indent=1) + "\n")
        print(f"written: {path}")
    return 0


def show_program(what: str) -> int:
    """Print one of the programs."""
    programs = {
        f"{title} / {probe}": source
        for rival in RIVALS.values()
        for title, contender in rival.contenders.items()
        for probe in (PROBES if contender.exact else (PLAIN,))
        if (source := program(contender, probe)) is not None
    }
    print(programs.get(what) or "\n".join(programs))
    return 0 if what in programs else 1


if __name__ == "__main__":
    sys.exit(main())
