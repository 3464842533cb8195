"""The examples under examples/frameworks: torch.optim's bits under each framework, and the same bits after a resume.

Packages that are missing skip a test; with FUSEDOPT_NO_SKIPS set, as `make examples` does, they fail it.
"""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest
from packages import require

EXAMPLES = Path(__file__).parent.parent / "examples" / "frameworks"
LIMIT = 200  # seconds until a hanging program is killed; it takes 15 at most, unless the cores are busy

# Runs an example once for each command line. With --library torch it is torch's for-loop as reference.py has it, square
# root and flush made right, so all bits must agree; and fusedopt's kernels must have run exactly when they should.
PROGRAM = """
    import contextlib, json, os, runpy, sys
    import torch.distributed as dist
    from reference import correctly_rounded_sqrt, flush_moments
    from torch.optim.optimizer import register_optimizer_step_post_hook
    from fusedopt._config import _C

    example, *command_lines = json.loads(sys.argv[1])
    sys.path.insert(0, os.path.dirname(example))
    from toy import checksum

    destroy = dist.destroy_process_group
    if "RANK" in os.environ:  # one group for all runs: a process's second one hangs now and then, in torch's gloo
        dist.init_process_group("gloo")
        dist.init_process_group = dist.destroy_process_group = lambda *_: None
    for words in command_lines:
        sys.argv = [example, *words]
        before = sum(_C.units_run().values())
        with contextlib.ExitStack() as stack:
            if "torch" in words:
                stack.enter_context(correctly_rounded_sqrt())
                hook = register_optimizer_step_post_hook(lambda optimizer, *_: flush_moments(optimizer))
                stack.callback(hook.remove)
            left = runpy.run_path(example, run_name="__main__")
        assert (sum(_C.units_run().values()) > before) == ("fusedopt" in words), words
        if "RANK" in os.environ:
            os.write(1, f"a rank has {checksum(left['model'])}\\n".encode())  # in one piece
    if "RANK" in os.environ:
        destroy()
"""


class Example(NamedTuple):
    """A script, what it needs beside the package's own requirements, and the checkpoints that it writes."""

    script: str
    packages: tuple[str, ...]
    checkpoints: tuple[str, str]  # after half of the steps, and after all
    options: tuple[str, ...] = ()
    processes: int = 1


TRAINER = Example("trainer", ("transformers", "accelerate"), ("checkpoint-40", "checkpoint-80"))
ACCELERATE = Example("with_accelerate", ("accelerate",), ("epoch-1", "epoch-2"))
LIGHTNING = Example("with_lightning", ("lightning",), ("epoch-0.ckpt", "epoch-1.ckpt"))
DDP = Example("ddp", (), ("epoch-1.pt", "epoch-2.pt"), processes=2)
ALL = {
    "trainer": TRAINER,
    "trainer_optimizer": TRAINER._replace(options=("--hand-over", "optimizer")),
    "accelerate": ACCELERATE,
    "accelerate_bf16": ACCELERATE._replace(options=("--mixed-precision", "bf16")),
    "lightning": LIGHTNING,
    "ddp": DDP,
}


def run(example: Example, directory: Path, *command_lines: list[str]) -> list[tuple[str, float]]:
    """The checksum of the weights and the loss that each of the command lines ends with."""
    program = directory / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={example.processes}"]
    lines = [[*words, *example.options] for words in command_lines]
    process = subprocess.Popen(
        [
            sys.executable,
            *(launcher if example.processes > 1 else ()),
            str(program),
            json.dumps([str(EXAMPLES / f"{example.script}.py"), *lines]),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    try:
        output, errors = process.communicate(timeout=LIMIT)
    finally:
        if process.returncode is None:
            process.terminate()  # the launcher passes this on to the ranks
            process.communicate()
    assert process.returncode == 0, f"{output[-2000:]}\n{errors[-4000:]}"
    assert "lr_scheduler.step()` before" not in errors  # torch's warning where a schedule does not see the steps
    found = re.findall(r"^checksum of the weights: (\w+)\nfinal loss: (\S+)$", output, re.MULTILINE)
    assert len(found) == len(command_lines), output
    if example.processes > 1:
        ranks = re.findall(r"^a rank has (\w+)$", output, re.MULTILINE)
        assert sorted(ranks) == sorted(example.processes * [checksum for checksum, _ in found])
    return [(checksum, float(loss)) for checksum, loss in found]


@pytest.mark.parametrize("example", ALL.values(), ids=ALL)
def test_example(example: Example, tmp_path: Path) -> None:
    """fusedopt's run has the bits of torch's; so has one that goes on, in a new process, from either's checkpoint."""
    require(*example.packages)

    def arguments(library: str, out: str, *more: str) -> list[str]:
        return ["--library", library, "--out", str(tmp_path / out), *more]

    theirs, ours, other = run(
        example,
        tmp_path,
        arguments("torch", "torch"),
        arguments("fusedopt", "fusedopt"),
        arguments("fusedopt", "other", "--seed", "1"),
    )
    assert ours == theirs
    assert ours[0] != other[0]
    assert ours[1] < 0.1  # log(32) = 3.5 before training

    halfway, end = example.checkpoints
    resumed = run(
        example,
        tmp_path,
        arguments("fusedopt", "from_torch", "--resume", str(tmp_path / "torch" / halfway)),
        arguments("fusedopt", "from_fusedopt", "--resume", str(tmp_path / "fusedopt" / halfway)),
    )
    for out in (tmp_path / "from_torch", tmp_path / "from_fusedopt"):
        assert (out / end).exists() and not (out / halfway).exists(), "it did not go on, but started again"
    assert resumed == [ours, ours]


# Lightning wraps an optimizer in an object that takes on its class; and it refuses to clip gradients under mixed
# precision where an optimizer says that it unscales them itself, which ours do not say with fused=False.
LIGHTNING_PROGRAM = """
    import lightning, torch, fusedopt

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

        def configure_optimizers(self):
            return fusedopt.AdamW(self.parameters(), fused=False, skip_nonfinite=True, stats=True)

        def training_step(self, x, _):
            return self.layer(x).square().mean()

        def on_train_batch_end(self, *_):
            wrapper, [inner] = self.optimizers(), self.trainer.optimizers
            assert wrapper is not inner and isinstance(wrapper, fusedopt.AdamW)
            assert wrapper.grad_norm == inner.grad_norm < 0.1001
            assert wrapper.stats() == inner.stats()
            print("seen")

    data = torch.utils.data.DataLoader(torch.ones(2, 4))
    trainer = lightning.Trainer(accelerator="cpu", precision="bf16-mixed", gradient_clip_val=0.1, max_epochs=1,
                                logger=False, enable_checkpointing=False)
    trainer.fit(Model(), data)
"""


def test_lightnings_wrapper_and_clipping_in_mixed_precision() -> None:
    require("lightning")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LIGHTNING_PROGRAM)],
        capture_output=True, text=True, timeout=LIMIT, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("seen") == 2
